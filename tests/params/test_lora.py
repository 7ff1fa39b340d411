"""Merging adapters into their kernels."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest

from tests.close import relative_error
from tests.models.tiny import build, decoder_config, make_batch, model_config
from unimoe_jax.config import LoRARule
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params.lora import is_adapter, merge, scale_of
from unimoe_jax.params.paths import ParamError, nest

RULES = (
    LoRARule(match="decoder/.*/attention/q_proj", rank=3, alpha=6.0),
    LoRARule(match="decoder/.*/(attention|mlp|moe/experts)/.*", rank=2, alpha=1.0, dropout=0.2),
)


def test_merged_model_equals_the_adapted_one():
    """The adapters of attention, dense layers and experts are merged, under two rules."""
    config = model_config(decoder=decoder_config(num_layers=2), lora=RULES)
    batch = make_batch(config, 1, 8, 1)
    model, params = build(config, batch)
    adapters = [path for path in params if is_adapter(path)]
    assert len(adapters) == 2 * (2 * 4 + 3 + 3)  # halves · (attentions + dense + experts)
    merged = merge({path: np.asarray(leaf) for path, leaf in params.items()}, RULES)
    assert set(merged) == set(params) - set(adapters)
    plain = UniMoE(config.model_copy(update={"lora": ()}), LayerOptions())
    expected = jax.jit(model.apply)({"params": nest(params)}, batch).logits_BTV
    actual = jax.jit(plain.apply)({"params": nest(merged)}, batch).logits_BTV
    assert relative_error(actual, expected) < 5e-6
    # Without the adapters the logits differ, so the comparison above is not trivial.
    bare = {path: leaf for path, leaf in params.items() if path not in adapters}
    without = jax.jit(plain.apply)({"params": nest(bare)}, batch).logits_BTV
    assert relative_error(without, expected) > 1e-2


def test_merging_adds_in_float32():
    kernel = np.full((2, 2), 256.0, ml_dtypes.bfloat16)
    a, b = np.full((2, 2), 0.9, np.float32), np.full((2, 2), 1.0, np.float32)
    flat = {"decoder/x/attention/k_proj/kernel": kernel}
    flat |= {f"decoder/x/attention/k_proj/lora_{name}": leaf for name, leaf in (("a", a), ("b", b))}
    merged = merge(flat, RULES)["decoder/x/attention/k_proj/kernel"]
    assert merged.dtype == ml_dtypes.bfloat16
    # 256 + 0.5 · 1.8 rounds to 256 in bfloat16; 1/2 is the scale of the second rule.
    np.testing.assert_array_equal(merged, np.full((2, 2), 256.9, np.float32).astype(merged.dtype))


def test_scale_comes_from_the_first_rule():
    assert scale_of("decoder/run_0/block_0/attention/q_proj", RULES) == 2.0
    assert scale_of("decoder/run_0/block_0/attention/v_proj", RULES) == 0.5
    with pytest.raises(ParamError, match="lm_head"):
        scale_of("lm_head", RULES)


def test_only_the_two_matrices_are_an_adapter():
    assert is_adapter("a/lora_a")
    assert is_adapter("a/lora_b")
    assert not any(is_adapter(path) for path in ("a/kernel", "lora_a/kernel", "a/lora_alpha"))
