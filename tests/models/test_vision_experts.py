"""Experts in the vision encoder and connector: statistics, unused images, expert parallelism."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from tests.close import relative_error
from tests.models.tiny import decoder_config, make_batch, random_params
from unimoe_jax.config import (
    AuxLossConfig,
    MeshConfig,
    MlpConnectorConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    RouterLossConfig,
    VisionConfig,
)
from unimoe_jax.data.batch import Batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.sharding import batch_sharding, make_mesh, param_sharding, use_mesh
from unimoe_jax.params.paths import nest
from unimoe_jax.params.table import declared
from unimoe_jax.stages.losses import router_losses

EXPERTS, LAYERS, TOKENS, PATCHES, VIEWS = 4, 3, 5, 4, 5
MOE = MoEConfig(
    num_experts=EXPERTS,
    router=RouterConfig(dtype_order="softmax_cast_topk", init="fan_in"),
)
CLIP = dict(hidden_size=8, mlp_dim=12, num_layers=LAYERS, num_heads=2, image_size=8, patch_size=4)
LOSSES = RouterLossConfig(balance=0.1, router_z=0.01)
AUX = AuxLossConfig(encoder=LOSSES, connector=LOSSES, decoder=LOSSES)


def vision(**changes) -> VisionConfig:
    encoder = {**CLIP, "moe": MOE, "unread_layers": "keep"}
    connector = MlpConnectorConfig(moe=MOE)
    fields = dict(encoder=encoder, connector=connector, scales=(1, 2), frames=2)
    return VisionConfig(**{**fields, **changes})


def model_config(**changes) -> ModelConfig:
    return ModelConfig(decoder=decoder_config(num_layers=1), vision=vision(**changes))


def batch_of(images: int, used: tuple[int, ...], shards: int = 1, video: bool = False) -> Batch:
    """A batch with `images` pool entries per shard; rows refer to the entries `used`, reversed."""
    config = model_config()
    batch = make_batch(config, shards, 20, shards)._replace(image_GIHWC=None, video_GIFHWC=None)
    rng = np.random.default_rng(1)
    pixels = rng.standard_normal((shards, images, 8, 8, 3)).astype(np.float32)
    slots, modality = batch.slot_BT.copy(), batch.modality_BT.copy()
    for number, image in enumerate(reversed(used)):
        positions = slice(number * PATCHES, (number + 1) * PATCHES)
        slots[:, positions] = np.arange(PATCHES) + image * PATCHES
        modality[:, positions] = 2 if video else 1
    batch = batch._replace(slot_BT=slots, modality_BT=modality)
    if video:
        return batch._replace(video_GIFHWC=np.stack([pixels, -pixels], axis=2))
    return batch._replace(image_GIHWC=pixels)


@cache
def params() -> dict:
    return random_params(UniMoE(model_config(), LayerOptions()), batch_of(1, (0,)))


@partial(jax.jit, static_argnums=0)
def apply(model: UniMoE, flat: dict, batch: Batch):
    return model.apply({"params": nest(flat)}, batch)


def run(batch: Batch, **changes):
    return apply(UniMoE(model_config(**changes), LayerOptions()), params(), batch)


def test_encoder_statistics_are_means_over_images_and_scales():
    """Tiles and images are averaged first, then scales. The unread layer counts as well."""
    aux = run(batch_of(2, (0, 1))).aux["encoder"]
    logits = np.asarray(aux.logits_BTE, np.float64).reshape(LAYERS, 2, VIEWS, TOKENS, EXPERTS)
    assert aux.balance.shape == (LAYERS,)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    first = np.eye(EXPERTS)[logits.argmax(-1)]
    balance = EXPERTS * (probs.mean(3) * first.mean(3)).sum(-1)  # [layers, images, views]
    by_scale = balance[:, :, 0].mean(1), balance[:, :, 1:].mean((1, 2))
    np.testing.assert_allclose(aux.balance, np.mean(by_scale, axis=0), rtol=1e-5)
    squared = np.log(np.exp(logits).sum(-1)) ** 2
    by_scale = squared[:, :, 0].mean((1, 2)), squared[:, :, 1:].mean((1, 2, 3))
    np.testing.assert_allclose(aux.router_z, np.mean(by_scale, axis=0), rtol=1e-5)
    # In the load, tokens of an image and tokens of its tiles count the same.
    np.testing.assert_array_equal(aux.load_ME.sum((1, 2)), [2 * 2 * VIEWS * TOKENS] * LAYERS)


def test_connector_statistics_are_means_over_images():
    aux = run(batch_of(2, (0, 1))).aux["connector"]
    logits = np.asarray(aux.logits_BTE[0], np.float64)
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    first = np.eye(EXPERTS)[logits.argmax(-1)]
    balance = EXPERTS * (probs.mean(1) * first.mean(1)).sum(-1)
    np.testing.assert_allclose(aux.balance, [balance.mean()], rtol=1e-5)


def test_images_that_no_token_refers_to():
    """They go to no expert and count nowhere, unless the settings count unused images."""
    one = batch_of(2, (1,))
    alone = one._replace(
        image_GIHWC=one.image_GIHWC[:, 1:], slot_BT=np.where(one.slot_BT < 0, -1, one.slot_BT - 4)
    )
    skipped, expected, counted = run(one), run(alone), run(one, unused_images="count")
    np.testing.assert_allclose(skipped.logits_BTV, expected.logits_BTV, rtol=1e-5, atol=1e-5)
    for name in ("encoder", "connector"):
        # The first four statistics are balance, router_z, entropy and load_ME.
        for actual, right in zip(skipped.aux[name][:4], expected.aux[name][:4], strict=True):
            np.testing.assert_allclose(actual, right, rtol=1e-5)
        assert counted.aux[name].load_ME.sum() == 2 * skipped.aux[name].load_ME.sum()
        assert abs(counted.aux[name].balance - skipped.aux[name].balance).max() > 1e-4


def test_frames_count_as_video():
    aux = run(batch_of(1, (0,), video=True)).aux
    for name, tokens in (("encoder", 2 * VIEWS * TOKENS), ("connector", 2 * PATCHES)):
        load_M = aux[name].load_ME[0].sum(-1)
        np.testing.assert_array_equal(load_M, [0, 0, 2 * tokens, 0, 0])


def test_equal_experts_are_a_dense_layer():
    """Experts that are copies of a dense layer change nothing, whatever the routers choose."""
    flat, dense = dict(params()), {}
    for path in [path for path in flat if path.startswith("vision") and "/moe/" in path]:
        if "/router/" in path:
            continue
        axis = 1 if "/encoder/" in path else 0
        leaf = jnp.take(flat[path], 0, axis=axis)
        flat[path] = jnp.stack([leaf] * EXPERTS, axis=axis)
        dense[path.replace("moe/experts/", "mlp/" if axis else "")] = leaf
    dense |= {path: leaf for path, leaf in flat.items() if "/moe/" not in path or "deco" in path}
    batch = batch_of(2, (0, 1))
    config = model_config().with_experts(["decoder"])
    expected = apply(UniMoE(config, LayerOptions()), dense, batch)
    assert set(expected.aux) == {"decoder"}
    out = apply(UniMoE(model_config(), LayerOptions()), flat, batch)
    np.testing.assert_allclose(out.logits_BTV, expected.logits_BTV, rtol=1e-4, atol=1e-5)


def test_expert_parallelism_in_all_modules():
    """Loss, statistics and gradients with sharded batch and experts equal those of one device."""
    model, shards = UniMoE(model_config(), LayerOptions()), 8
    batch = batch_of(1, (0,), shards)

    def loss(flat, batch):
        out = model.apply({"params": nest(flat)}, batch)
        nll = jnp.mean(jnp.sin(out.logits_BTV))
        return nll + router_losses(out.aux, AUX), {n: a.balance for n, a in out.aux.items()}

    step = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(step)(params(), jax.tree.map(jnp.asarray, batch))
    mesh = make_mesh(MeshConfig(data=2, expert=4), jax.devices()[:8])

    with use_mesh(mesh):
        sharded = jax.tree.map(lambda a: jax.device_put(a, batch_sharding(mesh, a.ndim)), batch)
        placed = {
            path: jax.device_put(params()[path], param_sharding(mesh, path, *shape_and_axes))
            for path, shape_and_axes in declared(model, batch).items()
        }
        experts = [leaf for path, leaf in placed.items() if "/moe/experts/" in path]
        assert all("expert" in str(leaf.sharding.spec) for leaf in experts)
        actual = jax.jit(step)(placed, sharded)
    ((value, aux), grads), ((right, right_aux), right_grads) = actual, expected
    np.testing.assert_allclose(value, right, rtol=1e-5)
    for name in right_aux:
        np.testing.assert_allclose(aux[name], right_aux[name], rtol=1e-5)
    for path, gradient in right_grads.items():
        # The gradients of key biases are zero apart from rounding, so they have no relative error.
        assert relative_error(grads[path], gradient) < 1e-4 or abs(gradient).max() < 1e-8, path


def test_impossible_settings_are_refused():
    with pytest.raises(ValidationError, match="only `all`"):
        vision(encoder={**CLIP, "moe": MOE.model_copy(update={"layers": "even"})})
    with pytest.raises(ValidationError, match="only `all`"):
        MlpConnectorConfig(moe=MoEConfig(num_experts=2, layers=(0,)))
    with pytest.raises(ValidationError, match="first must be 1"):
        vision(scales=(3, 1))
