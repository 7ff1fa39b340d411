"""Query connectors: shapes, which query sees which, stacking, low precision."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from unimoe_jax.config import QueryConnectorConfig
from unimoe_jax.connectors.mlp import MlpConnector
from unimoe_jax.connectors.query import QueryConnector, qformer_places
from unimoe_jax.nn.linear import LayerOptions

SIZES = dict(num_queries=4, hidden_size=8, mlp_dim=16, num_layers=3, num_heads=2)
READER = QueryConnectorConfig(kind="whisper_decoder", max_positions=7, **SIZES)
QFORMER = QueryConnectorConfig(kind="qformer", norm_eps=1e-12, projector_depth=2, **SIZES)


def shapes(config: QueryConnectorConfig, features: int, width: int):
    module = QueryConnector(config, features, LayerOptions())
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 9, width)))
    return nn.unbox(variables)["params"]


@pytest.fixture(scope="module", params=[READER, QFORMER], ids=lambda config: config.kind)
def connector(request):
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes(request.param, 10, 5)
    )
    states = rng.standard_normal((2, 6, 5), np.float32)
    return QueryConnector(request.param, 10, LayerOptions()), {"params": params}, states


def test_shape_and_low_precision(connector):
    module, variables, states = connector
    soft = jax.jit(module.apply)(variables, states)
    assert soft.shape == (2, 4, 10)
    low = QueryConnector(module.config, 10, LayerOptions(dtype=jnp.bfloat16))
    out = jax.jit(low.apply)(variables, states)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), soft, atol=0.1)


def test_queries_see_earlier_queries_or_all_queries(connector):
    """Whisper's decoder is causal, and the Q-Former is not."""
    module, variables, states = connector

    def outputs(queries):
        params = variables["params"] | {"queries": queries}
        return module.apply({"params": params}, states)

    jacobian = jax.jit(jax.jacrev(outputs))(variables["params"]["queries"])  # [B,Q,features,Q,D]
    reach = np.abs(np.asarray(jacobian)).max(axis=(0, 2, 4)) > 0
    causal = np.tril(np.ones((4, 4), bool))
    expected = causal if module.config.kind == "whisper_decoder" else np.ones((4, 4), bool)
    np.testing.assert_array_equal(reach, expected)


def test_every_state_is_read(connector):
    module, variables, states = connector
    grad = jax.jit(jax.grad(lambda s: jnp.sum(jnp.sin(module.apply(variables, s)))))(states)
    assert (np.abs(grad).max(axis=2) > 0).all()


def test_reader_parameters():
    params = shapes(READER, 10, 5)
    assert params["queries"].shape == (4, 8)
    assert params["position_embedding"].shape == (7, 8)
    assert params["layers"]["cross_attention"]["k_proj"]["kernel"].shape == (3, 5, 8)
    assert "bias" not in params["layers"]["cross_attention"]["k_proj"]
    assert params["projector"]["fc1"]["kernel"].shape == (8, 10)


def test_qformer_reads_the_encoder_in_every_second_layer():
    params = shapes(QFORMER, 10, 5)
    for layer, place in enumerate(qformer_places(QFORMER)):
        run, block = place.prefix.split("/")
        assert ("cross_attention" in params[run][block]) == (layer % 2 == 0)
        assert params[run][block]["mlp"]["fc1"]["kernel"].shape[0] > place.index
    assert set(params["projector"]) == {"fc1", "fc2"}


def test_released_qformer_is_one_scan_of_six_pairs():
    """The original has 99.24 M parameters without queries and projector."""
    sizes = dict(hidden_size=768, mlp_dim=3072, num_layers=12, num_heads=12)
    params = shapes(QueryConnectorConfig(kind="qformer", **sizes), 4096, 768)
    assert {name for name in params if name.startswith("run_")} == {"run_0"}
    body = {name: tree for name, tree in params.items() if name not in ("projector", "queries")}
    assert round(sum(x.size for x in jax.tree.leaves(body)) / 1e6, 2) == 99.24


def test_more_queries_than_positions_are_refused():
    with pytest.raises(ValueError, match="max_positions = 7"):
        QueryConnectorConfig.model_validate(READER.model_dump() | {"num_queries": 8})


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_mlp_connector_has_gelu_between_linear_layers(depth: int):
    module = MlpConnector(depth, 6, LayerOptions())
    x = jax.random.normal(jax.random.key(0), (2, 3, 4))
    variables = nn.unbox(module.init(jax.random.key(1), x))
    expected = x
    for layer in range(depth):
        weights = variables["params"][f"fc{layer + 1}"]
        if layer:
            expected = 0.5 * expected * (1 + jax.scipy.special.erf(expected / np.sqrt(2.0)))
        expected = jnp.matmul(expected, weights["kernel"]) + weights["bias"][None, None]
    np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-5)
