"""Linear layers, norms and feed-forward layers: values, adapters, dropout, declarations."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.config import LoRARule
from unimoe_jax.nn.linear import ExpertLinear, LayerOptions, Linear, declare, dropout
from unimoe_jax.nn.mlp import Mlp, SwiGLU, gelu, quick_gelu
from unimoe_jax.nn.norm import LayerNorm, RMSNorm

INPUTS, FEATURES = 5, 7
RULE = LoRARule(match="layer", rank=2, alpha=3.0)
DROPPING = RULE.model_copy(update={"dropout": 0.5})


class Model(nn.Module):
    """A module with one linear layer, which thereby has the path `layer`."""

    options: LayerOptions
    use_bias: bool = True

    @nn.compact
    def __call__(self, x):
        return Linear(FEATURES, self.options, use_bias=self.use_bias, name="layer")(x)


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((2, 3, INPUTS), np.float32)


def initialised(module: nn.Module, *args):
    """Return random values for all parameters of a module, including those that start at zero."""
    params = nn.unbox(module.init(jax.random.key(0), *args))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda p: rng.standard_normal(p.shape, np.float32), params)


def output(module: nn.Module, params: Any, *args: Any, **options: Any) -> Any:
    """Apply a module to arguments."""
    return module.apply({"params": params}, *args, **options)


def test_linear_with_adapter(x):
    model = Model(LayerOptions(lora=(RULE,)))
    params = initialised(model, x)
    layer = params["layer"]
    assert {name: leaf.shape for name, leaf in layer.items()} == {
        "kernel": (INPUTS, FEATURES),
        "bias": (FEATURES,),
        "lora_a": (INPUTS, 2),
        "lora_b": (2, FEATURES),
    }
    merged = layer["kernel"] + 1.5 * layer["lora_a"] @ layer["lora_b"]
    expected = x @ merged + layer["bias"]
    np.testing.assert_allclose(output(model, params, x), expected, rtol=1e-4, atol=1e-5)


def test_a_new_adapter_changes_nothing(x):
    plain, adapted = Model(LayerOptions()), Model(LayerOptions(lora=(RULE,)))
    params = nn.unbox(adapted.init(jax.random.key(0), x))["params"]
    assert np.any(params["layer"]["lora_a"])
    assert not np.any(params["layer"]["lora_b"])
    without = {"layer": {key: params["layer"][key] for key in ("kernel", "bias")}}
    np.testing.assert_array_equal(output(adapted, params, x), output(plain, without, x))


def test_first_rule_wins_and_must_match_the_whole_path(x):
    other = LoRARule(match="lay.*", rank=4, alpha=1.0)
    for rules, rank in (((RULE, other), 2), ((other, RULE), 4)):
        params = initialised(Model(LayerOptions(lora=rules)), x)
        assert params["layer"]["lora_a"].shape == (INPUTS, rank)
    part = RULE.model_copy(update={"match": "lay"})
    assert "lora_a" not in initialised(Model(LayerOptions(lora=(part,))), x)["layer"]


def test_dropout_only_in_training(x):
    scoring, training = (Model(LayerOptions(lora=(DROPPING,), train=t)) for t in (False, True))
    params = initialised(scoring, x)
    scored = output(scoring, params, x)  # needs no rng
    without_dropout = Model(LayerOptions(lora=(RULE,)))
    np.testing.assert_array_equal(output(without_dropout, params, x), scored)
    keys = [jax.random.key(number) for number in (0, 0, 1)]
    trained = [output(training, params, x, rngs={"dropout": key}) for key in keys]
    np.testing.assert_array_equal(trained[0], trained[1])
    assert not np.allclose(trained[0], trained[2])
    assert not np.allclose(trained[0], scored)
    with pytest.raises(Exception, match="dropout"):
        output(training, params, x)


def test_dropout_keeps_the_mean_and_the_rate():
    x = np.ones((40, 50, 20), np.float32)
    scaled = np.asarray(dropout(jnp.asarray(x), jnp.uint32(5), 0.3))
    assert set(np.unique(scaled)) == {0, np.float32(1 / 0.7)}
    dropped = scaled == 0
    assert np.mean(dropped) == pytest.approx(0.3, abs=0.01)
    # The mask has no structure: all columns and all rows drop about the same share, and rows are
    # not correlated with the rows before them.
    assert np.std(np.mean(dropped, axis=(0, 1))) < 0.03
    assert np.std(np.mean(dropped, axis=2)) < 0.15
    rows = dropped.reshape(-1, 20)
    assert abs(np.corrcoef(rows[:-1].ravel(), rows[1:].ravel())[0, 1]) < 0.03


def test_compute_dtype(x):
    model = Model(LayerOptions(dtype=jnp.bfloat16, lora=(RULE,)))
    params = initialised(model, x)
    out = output(model, params, x)
    assert out.dtype == jnp.bfloat16
    exact = output(Model(LayerOptions(lora=(RULE,))), params, x)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=0.1)


def test_declaration_checks_its_axes():
    class Wrong(nn.Module):
        @nn.compact
        def __call__(self):
            return declare(self, "weight", nn.initializers.zeros, (2, 3), ("embed",))

    with pytest.raises(ValueError, match="weight"):
        Wrong().init(jax.random.key(0))


def test_expert_linear_declares_every_expert():
    rule = LoRARule(match=".*", rank=3, alpha=1.0)
    layer = ExpertLinear(4, INPUTS, FEATURES, LayerOptions(lora=(rule,)), use_bias=True)
    boxed = layer.init(jax.random.key(0))["params"]
    weights = nn.unbox(boxed)
    assert {name: leaf.shape for name, leaf in weights.items()} == {
        "kernel": (4, INPUTS, FEATURES),
        "bias": (4, FEATURES),
        "lora_a": (4, INPUTS, 3),
        "lora_b": (4, 3, FEATURES),
    }
    axes = {name: tuple(spec) for name, spec in nn.get_partition_spec(boxed).items()}
    assert axes == {
        "kernel": ("expert", "expert_embed", "mlp"),
        "bias": ("expert", "mlp"),
        "lora_a": ("expert", "expert_embed", "rank"),
        "lora_b": ("expert", "rank", "mlp"),
    }
    # The fan-in is that of one expert: the scale does not shrink with the number of experts.
    assert np.std(weights["kernel"]) == pytest.approx(INPUTS**-0.5, rel=0.2)
    returned = layer.apply({"params": weights})
    assert jax.tree.map(np.shape, returned) == jax.tree.map(np.shape, weights)


# ------------------------------------------------------------- norms and feed-forward layers


def test_norms(x):
    x = 3 * x + 1
    rms, layer = RMSNorm(1e-3, LayerOptions()), LayerNorm(1e-3, LayerOptions())
    params = initialised(rms, x)
    expected = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-3) * params["scale"]
    np.testing.assert_allclose(output(rms, params, x), expected, rtol=1e-5)
    params = initialised(layer, x)
    centred = x - x.mean(-1, keepdims=True)
    normal = centred / np.sqrt(x.var(-1, keepdims=True) + 1e-3)
    expected = normal * params["scale"] + params["bias"]
    np.testing.assert_allclose(output(layer, params, x), expected, rtol=1e-4, atol=1e-5)


def test_norm_statistics_are_float32():
    """The square of 300 is above the largest float16."""
    options = LayerOptions(dtype=jnp.bfloat16)
    x = jnp.asarray([[300.0, -300.0] * 4], jnp.float16)
    out = output(RMSNorm(1e-5, options), {"scale": np.ones(8, np.float32)}, x)
    np.testing.assert_allclose(out.astype(jnp.float32), np.sign(x), rtol=1e-2)
    assert out.dtype == jnp.bfloat16


def test_feed_forward_layers(x):
    mlp, swiglu = Mlp(6, quick_gelu, LayerOptions()), SwiGLU(6, LayerOptions())
    p = initialised(mlp, x)
    hidden = x @ p["fc1"]["kernel"] + p["fc1"]["bias"]
    expected = hidden / (1 + np.exp(-1.702 * hidden)) @ p["fc2"]["kernel"] + p["fc2"]["bias"]
    np.testing.assert_allclose(output(mlp, p, x), expected, rtol=1e-4, atol=1e-4)
    p = initialised(swiglu, x)
    gate = x @ p["gate_proj"]["kernel"]
    hidden = gate / (1 + np.exp(-gate)) * (x @ p["up_proj"]["kernel"])
    expected = hidden @ p["down_proj"]["kernel"]
    np.testing.assert_allclose(output(swiglu, p, x), expected, rtol=1e-4, atol=1e-4)
    erf = jax.scipy.special.erf(np.float32(1 / np.sqrt(2)))
    np.testing.assert_allclose(gelu(jnp.float32(1)), 0.5 * (1 + erf), rtol=1e-6)
