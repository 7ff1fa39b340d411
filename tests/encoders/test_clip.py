"""CLIP encoder: which layers are built, shapes, patch order, low precision."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from pydantic import ValidationError

from unimoe_jax.config import ClipConfig
from unimoe_jax.encoders.clip import ClipEncoder
from unimoe_jax.nn.linear import LayerOptions

CONFIG = ClipConfig(
    hidden_size=8, mlp_dim=16, num_layers=3, num_heads=2, image_size=8, patch_size=4
)


def init(config: ClipConfig):
    module = ClipEncoder(config, LayerOptions())
    image = jax.random.normal(jax.random.key(0), (2, config.image_size, config.image_size, 3))
    return module, nn.unbox(jax.jit(module.init)(jax.random.key(1), image)), image


def run(module: ClipEncoder, variables, image: jax.Array) -> jax.Array:
    return jax.jit(module.apply)(variables, image)[0]


@pytest.mark.parametrize("select_layer,used", [(-2, 2), (-1, 3), (1, 1), (0, 0), (-4, 0)])
def test_only_used_layers_are_declared(select_layer: int, used: int):
    config = CONFIG.model_copy(update={"select_layer": select_layer})
    image = jnp.zeros((1, 8, 8, 3))
    params = jax.eval_shape(ClipEncoder(config, LayerOptions()).init, jax.random.key(0), image)
    params = nn.unbox(params)["params"]
    assert config.used_layers == used
    if used:
        assert params["layers"]["attention"]["q_proj"]["kernel"].shape == (used, 8, 8)
    else:
        assert "layers" not in params
    assert "post_norm" not in params


def test_a_select_layer_that_does_not_exist_is_refused():
    with pytest.raises(ValidationError, match="select_layer = 4"):
        ClipConfig(**CONFIG.model_dump() | {"select_layer": 4})


def test_select_layer_is_the_hidden_state_of_a_deeper_encoder():
    """hidden_states[-2] of three layers is the last hidden state of the first two layers."""
    module, variables, image = init(CONFIG)
    shallow = CONFIG.model_copy(update={"num_layers": 2, "select_layer": -1})
    np.testing.assert_array_equal(
        run(module, variables, image),
        run(ClipEncoder(shallow, LayerOptions()), variables, image),
    )


def test_patches_are_row_major_without_the_class_token():
    """Without layers, the features of a patch depend only on its pixels."""
    config = CONFIG.model_copy(update={"select_layer": 0})
    module, variables, image = init(config)
    features = run(module, variables, image)
    assert features.shape == (2, config.num_patches, 8)
    changed = run(module, variables, image.at[:, 0:4, 4:8].add(1.0))  # top right patch
    moved = np.abs(changed - features).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(moved, [False, True, False, False])


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="8x8x3"):
        ClipEncoder(CONFIG, LayerOptions()).init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))
    uneven = CONFIG.model_copy(update={"num_heads": 3})
    with pytest.raises(ValueError, match="3 heads"):
        ClipEncoder(uneven, LayerOptions()).init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))


def test_bfloat16_and_remat_agree_with_float32():
    module, variables, image = init(CONFIG)
    config = CONFIG.model_copy(update={"remat": True})
    low = run(ClipEncoder(config, LayerOptions(dtype=jnp.bfloat16)), variables, image)
    assert low.dtype == jnp.bfloat16
    np.testing.assert_allclose(low.astype(jnp.float32), run(module, variables, image), atol=0.05)


def test_experts_that_nothing_reads_have_no_backward_pass():
    moe = {"num_experts": 4, "router": {"dtype_order": "softmax_cast_topk"}}
    config = ClipConfig(
        hidden_size=16,
        mlp_dim=32,
        num_layers=3,
        num_heads=2,
        image_size=24,
        patch_size=12,
        unread_layers="keep",
        moe=moe,
    )
    module = ClipEncoder(config, LayerOptions())
    image = jnp.ones((2, 24, 24, 3))
    variables = jax.eval_shape(lambda: nn.unbox(module.init(jax.random.key(0), image)))

    def loss(variables):
        states, aux = module.apply(variables, image)
        return jnp.sum(states**2) + jnp.sum(aux.balance)

    text = jax.jit(jax.grad(loss)).lower(variables).compile().as_text() or ""
    products = [line for line in text.splitlines() if " dot(" in line and "transpose(" in line]
    # Count the products of experts in the backward pass, without those of the routers.
    found = {
        name: sum(bool(re.search(rf"/{name}/moe/(?!router)", line)) for line in products)
        for name in ("layers", "unread_layers")
    }
    assert found["layers"] > 0 and found["unread_layers"] == 0
    # The routers of unread layers do train, by their losses.
    assert any("unread_layers/moe/router" in line for line in products)
