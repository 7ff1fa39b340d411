"""Decoders against the classes of transformers at tiny sizes.

Compares norm, attention, blocks, logits, loss and gradients. The weights are saved to a folder and
converted from there.
"""

from __future__ import annotations

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from tests.convert.reading import read_all
from tests.reference import cross_entropy
from unimoe_jax.convert.entry import Copy
from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.plan import Resolution, resolve_plan
from unimoe_jax.convert.recognise import recognise
from unimoe_jax.data.batch import Batch
from unimoe_jax.models.decoder import Attention, Context, causal_mask
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.attention.packed import tiles_of
from unimoe_jax.nn.attention.rope import rope_tables
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.nn.norm import RMSNorm
from unimoe_jax.nn.stack import where_is
from unimoe_jax.params.paths import nest

ATOL, RTOL = 2e-5, 1e-4
GRAD_SHARE = 1e-4  # of the largest gradient of a tensor
SIZES = {
    "vocab_size": 23,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=6, rope_theta=500.0)),
    "llama_tied": (
        LlamaForCausalLM,
        LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig(**SIZES, num_key_value_heads=2, head_dim=8, sliding_window=None),
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(
            **SIZES,
            num_key_value_heads=3,
            num_local_experts=5,
            num_experts_per_tok=2,
            sliding_window=None,
        ),
    ),
}


class Pair:
    """The same weights as a torch model and as parameters of this package."""

    def __init__(self, family: str, folder):
        kind, config = FAMILIES[family]
        torch.manual_seed(0)
        model = kind(config).eval()
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.data = 1 + 0.2 * noise if "norm" in name else 0.3 * noise
        model.save_pretrained(folder)
        self.torch = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.resolution: Resolution = resolve_plan(plan_of(recognise([folder])))
        self.flat = read_all(self.resolution)
        self.config = self.resolution.plan.model
        self.options = LayerOptions()
        ids = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (2, 17)).astype(np.int32)
        zeros = np.zeros_like(ids)
        target, weight = zeros.copy(), np.zeros(ids.shape, np.float32)
        target[:, :-1], weight[:, :-1] = ids[:, 1:], 1
        position = np.broadcast_to(np.arange(17, dtype=np.int32), ids.shape)
        self.batch = Batch(ids, target, weight, zeros + 1, position, zeros, zeros - 1)
        given = torch.from_numpy(ids).long()
        self.output = self.torch(given, labels=given, output_hidden_states=True)
        self.output.loss.backward()

        def loss(flat):
            model = UniMoE(self.config, self.options, frozenset({"hidden"}))
            out = model.apply({"params": nest(flat)}, self.batch)
            total, count = cross_entropy(out.logits_BTV, target, weight)
            return total / count, out

        (self.loss, self.ours), self.grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(
            self.flat
        )

    def layer(self, number: int) -> dict:
        """Parameters of one decoder layer."""
        place = where_is(self.config.decoder.moe_layers())[number]
        stack = nest(self.flat)["decoder"][f"run_{place.run}"][f"block_{place.block}"]
        return jax.tree.map(lambda leaf: leaf[place.index], stack)


@cache
def _pair(family: str, folder) -> Pair:
    with jax.default_matmul_precision("highest"):
        return Pair(family, folder)


@pytest.fixture(params=FAMILIES, scope="module")
def pair(request, tmp_path_factory) -> Pair:
    return _pair(request.param, tmp_path_factory.mktemp(request.param))


def close(actual, expected, message: str = "") -> None:
    expected = expected.detach().numpy()
    np.testing.assert_allclose(actual, expected, atol=ATOL, rtol=RTOL, err_msg=message)


def stream() -> np.ndarray:
    shape = (2, 17, SIZES["hidden_size"])
    return np.random.default_rng(2).standard_normal(shape).astype(np.float32)


def test_norm(pair: Pair):
    params = {"params": pair.layer(0)["attention_norm"]}
    actual = RMSNorm(pair.config.decoder.norm_eps, pair.options).apply(params, stream())
    close(actual, pair.torch.model.layers[0].input_layernorm(torch.from_numpy(stream())))


def test_attention(pair: Pair):
    config, batch, x = pair.config.decoder, pair.batch, stream()
    cos, sin = rope_tables(batch.position_BT, config.head_size, config.rope_theta)
    mask = causal_mask(jnp.asarray(batch.segment_BT), jnp.asarray(batch.position_BT))
    valid = jnp.asarray(batch.segment_BT > 0)
    context = Context(cos, sin, tiles_of(mask, valid), batch.modality_BT, valid)
    params = {"params": pair.layer(1)["attention"]}
    actual = Attention(config, pair.options).apply(params, x, context)
    given, position = torch.from_numpy(x), torch.from_numpy(batch.position_BT.copy())
    tables = pair.torch.model.rotary_emb(given, position.long())
    hidden = torch.full((17, 17), float("-inf")).triu(1)[None, None]
    expected, _ = pair.torch.model.layers[1].self_attn(given, tables, hidden)
    close(actual, expected)


def test_blocks_and_logits(pair: Pair):
    layers = pair.ours.decoder.layers
    for number, place in enumerate(where_is(pair.config.decoder.moe_layers())[:-1]):
        hidden = layers[place.run][place.block].hidden[place.index]
        close(hidden, pair.output.hidden_states[number + 1], f"layer {number}")
    close(pair.ours.decoder.hidden_BTD, pair.output.hidden_states[-1], "final norm")
    close(pair.ours.logits_BTV, pair.output.logits, "logits")


def test_loss(pair: Pair):
    np.testing.assert_allclose(pair.loss, pair.output.loss.item(), atol=2e-6, rtol=0)


def test_gradients(pair: Pair):
    """Compare gradients for every torch parameter; the converter's table, backwards, finds it."""
    recorded = {copy.src.removeprefix("base:"): copy for copy in pair.resolution.plan.copies}
    checked = set()
    for name, parameter in pair.torch.named_parameters():
        for expected, sources in torch_gradients(name, parameter.grad.numpy()):
            copy: Copy = recorded[sources]
            actual = copy.backward(np.asarray(pair.grads[copy.dst])[copy.index])
            atol = GRAD_SHARE * max(np.abs(expected).max(), 1e-2)
            np.testing.assert_allclose(actual, expected, atol=atol, rtol=0, err_msg=sources)
            checked.add(copy.dst)
    assert checked == set(pair.flat)


def torch_gradients(name: str, grad: np.ndarray):
    """(gradient, name in the file) of a parameter; transformers 5 fuses Mixtral's experts."""
    fused = re.fullmatch(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)", name)
    if fused:
        for expert, value in enumerate(grad):
            prefix = f"{fused[1]}.block_sparse_moe.experts.{expert}"
            if fused[2] == "down_proj":
                yield value, f"{prefix}.w2.weight"
            else:
                gate, up = np.split(value, 2)
                yield gate, f"{prefix}.w1.weight"
                yield up, f"{prefix}.w3.weight"
    else:
        yield grad, name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight")
