"""Mixtral of transformers: the trunk of `llama`, with `block_sparse_moe` in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimoe_jax.config import DecoderConfig, MoEConfig, RouterConfig
from unimoe_jax.convert.entry import Copy, expand, linear
from unimoe_jax.convert.tables import llama

EXCUSES = llama.EXCUSES
# down(silu(gate(x)) * up(x)) is w2(silu(w1(x)) * w3(x)) in Mixtral's names.
NAMES = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))


def mixtral_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Settings of the decoder, from a `config.json` of MixtralForCausalLM; defaults as there."""
    router = RouterConfig(dtype_order="softmax_topk", logits_dtype="compute")
    moe = MoEConfig(
        num_experts=config.get("num_local_experts", 8),
        top_k=config.get("num_experts_per_tok", 2),
        router=router,
    )
    return llama.decoder_config(config, moe, kind="mixtral")


def copies(config: DecoderConfig) -> list[Copy]:
    """Copies of a Mixtral decoder, from group `base`."""
    assert config.moe is not None  # `mixtral_config` always sets it
    s, d = "base:model.layers.{l}.block_sparse_moe.", "decoder/{l}/moe/"
    entries = [*linear(f"{s}gate", f"{d}router/linear", bias=False)]
    for their_name, our_name in NAMES:
        entries += linear(f"{s}experts.{{e}}.{their_name}", f"{d}experts/{our_name}", bias=False)
    experts = range(config.moe.num_experts)
    return llama.trunk(config) + expand(entries, llama.chosen(config, moe=True), experts)
