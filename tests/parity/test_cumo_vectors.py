"""The vision path against numbers of the published CuMo code, for weights and pixels from formulas.

A parameter is 0.1 sin(0.37 i + 0.91 k), where k is the position of its name among the sorted names
and i the flat index. Routers are ten times as large, and scales of LayerNorms have one added.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.config import ClipConfig, MlpConnectorConfig, MoEConfig, RouterConfig, VisionConfig
from unimoe_jax.convert.tables import clip, cumo
from unimoe_jax.models.branches import Pictures, Vision
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params.paths import nest
from unimoe_jax.params.table import declared

FEATURES = 24
ROUTER = RouterConfig(dtype_order="softmax_cast_topk", logits_dtype="compute")
MOE = MoEConfig(num_experts=4, top_k=2, router=ROUTER)
CLIP = ClipConfig(
    hidden_size=16,
    mlp_dim=32,
    num_layers=3,
    num_heads=2,
    image_size=28,
    patch_size=7,
    unread_layers="keep",
)
# (scales, whether there are experts) -> (sum of the features, sum of their squares, balance loss,
# z loss), the first values, the last values.
ENCODER = {
    ((1,), False): (
        (-2.7161678709, 541.7357594406, None, None),
        (1.1133291721, -1.2215089798, 0.5767875910, 0.4506309927),
        (0.1196659878, 1.8237748146, -0.8256633282, 0.5988284349),
    ),
    ((1, 3), False): (
        (-5.8782830680, 667.6469388110, None, None),
        (1.1133291721, -1.2215089798, 0.5767875910, 0.4506309927),
        (0.7495314479, 0.8570426106, 0.7879900932, 0.2211178988),
    ),
    ((1,), True): (
        (32.7021275926, 622.9799368010, 1.7769068480, 10.4779090881),
        (0.7529907227, -1.4921735525, 0.9427434206, 0.9412356615),
        (0.3024823964, 1.2863358259, -1.5896646976, -0.5064703226),
    ),
    ((1, 3), True): (
        (66.2413361360, 799.9116043003, 1.6379822493, 16.0835227966),
        (0.7529907227, -1.4921735525, 0.9427434206, 0.9412356615),
        (0.8263852000, 0.5371598005, 0.0951133296, -0.6501238346),
    ),
}
# whether there are experts -> the same for the connector, which reads the features of the encoder
# with experts at scales 1 and 3.
CONNECTOR = {
    False: (
        (2.3731609304, 17.0098635102, None, None),
        (0.0304929018, 0.0788773075, 0.1257269084, -0.0975290537),
        (-0.0910022929, 0.1904288828, -0.2935242057, 0.1292962983),
    ),
    True: (
        (15.2491365478, 4.5080809172, 3.8317832947, 18.1442012787),
        (-0.0282933619, 0.0985861272, 0.0271063335, 0.1009610221),
        (0.1225102246, 0.0444209985, 0.1554818004, 0.0079520298),
    ),
}
# Balance and z losses in bfloat16.
LOW = {"encoder": (1.6458067894, 16.0), "connector": (3.828125, 18.125)}


def vision(steps: tuple[int, ...], encoder: bool, connector: MlpConnectorConfig, features: int):
    config = VisionConfig(
        encoder=CLIP.model_copy(update={"moe": MOE if encoder else None}),
        connector=connector,
        scales=steps,
    )
    return Vision(config, features, LayerOptions())


def pictures() -> Pictures:
    at = np.arange(3 * 28 * 28)
    image_BCHW = np.stack([np.sin(0.05 * at * (b + 1)).reshape(3, 28, 28) for b in range(2)])
    return Pictures(image_BCHW.transpose(0, 2, 3, 1)[None].astype(np.float32), None)


def wave(module: Vision) -> dict[str, np.ndarray]:
    """Parameters of the module from the formula, which depends on the names of the original."""
    shapes = {path: shape for path, (shape, _) in declared(module, pictures()).items()}
    flat = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    config = module.config
    for copies in (
        clip.copies(config.encoder, "encoder"),
        cumo.connector_copies(config.connector, "", dst="connector"),
    ):
        for k, copy in enumerate(sorted(copies, key=lambda copy: copy.src)):
            shape = copy.source_shape(shapes[copy.dst])
            value = 0.1 * np.sin(0.37 * np.arange(np.prod(shape)) + 0.91 * k)
            value *= 10 if copy.src.endswith("gate.weight") else 1
            value += "norm" in copy.src and copy.src.endswith(".weight")
            flat[copy.dst][copy.index] = copy.forward(value.reshape(shape))
    return flat


def encoded(steps: tuple[int, ...], experts: bool, flat: dict | None = None):
    """(features [B,P,D], statistics, parameters) with a connector that is an identity."""
    width = CLIP.hidden_size * len(steps)
    module = vision(steps, experts, MlpConnectorConfig(depth=1), width)
    params = wave(module) if flat is None else flat
    params |= {"connector/fc1/kernel": np.eye(width, dtype=np.float32)}
    params |= {"connector/fc1/bias": np.zeros(width, np.float32)}
    (table,), aux = jax.jit(module.apply)({"params": nest(params)}, pictures())
    return table.reshape(2, -1, width), aux.get("encoder"), params


def check(value_BPD, aux, expected) -> None:
    # The original rounds positions to float32 when it enlarges images; this alone changes pixels by
    # 5e-6.
    (total, squares, balance, z), first, last = expected
    value = np.asarray(value_BPD, np.float64)
    np.testing.assert_allclose(value.sum(), total, atol=1e-3)
    np.testing.assert_allclose((value**2).sum(), squares, rtol=1e-5)
    np.testing.assert_allclose(value.ravel()[: len(first)], first, atol=1e-5)
    np.testing.assert_allclose(value.ravel()[-len(last) :], last, atol=1e-5)
    if balance is None:
        assert aux is None
        return
    np.testing.assert_allclose(aux.balance.mean(), balance, rtol=1e-5)
    np.testing.assert_allclose(aux.router_z.mean(), z, rtol=1e-5)


@pytest.mark.parametrize("steps, experts", ENCODER)
def test_encoder(steps: tuple[int, ...], experts: bool):
    with jax.default_matmul_precision("highest"):
        features, aux, _ = encoded(steps, experts)
    check(features, aux, ENCODER[steps, experts])


@pytest.mark.parametrize("experts", CONNECTOR)
def test_connector(experts: bool):
    config = MlpConnectorConfig(moe=MOE if experts else None)
    module = vision((1, 3), True, config, FEATURES)
    with jax.default_matmul_precision("highest"):
        (table,), aux = jax.jit(module.apply)({"params": nest(wave(module))}, pictures())
    check(table.reshape(2, -1, FEATURES), aux.get("connector"), CONNECTOR[experts])


def test_bfloat16():
    """A rough check, because the original's kernels round at places that cannot be reproduced."""
    module = vision((1, 3), True, MlpConnectorConfig(moe=MOE), FEATURES)
    low = Vision(module.config, FEATURES, LayerOptions(dtype=jnp.bfloat16))
    _, aux = jax.jit(low.apply)({"params": nest(wave(module))}, pictures())
    for name, (balance, z) in LOW.items():
        np.testing.assert_allclose(aux[name].balance.mean(), balance, rtol=1e-2)
        np.testing.assert_allclose(aux[name].router_z.mean(), z, rtol=1e-2)


def test_the_unread_layer_counts_in_the_losses_alone():
    features, aux, params = encoded((1,), True)
    changed = {
        path: leaf * 0.5 if "unread" in path and "router" in path else leaf
        for path, leaf in params.items()
    }
    same, other, _ = encoded((1,), True, changed)
    np.testing.assert_array_equal(features, same)
    np.testing.assert_array_equal(aux.balance[:-1], other.balance[:-1])
    assert abs(float(aux.balance[-1] - other.balance[-1])) > 1e-3
    assert abs(float(aux.router_z[-1] - other.router_z[-1])) > 1e-3
