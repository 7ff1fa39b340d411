"""Mixtral of transformers: LLaMA's trunk, `block_sparse_moe` in every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimoe_jax.config import DecoderConfig, MoEConfig, RouterConfig
from unimoe_jax.convert.entry import Copy, expand, linear
from unimoe_jax.convert.tables import llama

EXCUSES = llama.EXCUSES
# w1 is the gate, w3 the linear branch, w2 leads back.
NAMES = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))


def mixtral_config(config: Mapping[str, Any]) -> DecoderConfig:
    """From a `config.json` of MixtralForCausalLM."""
    router = RouterConfig(dtype_order="softmax_topk", logits_dtype="compute")
    moe = MoEConfig(
        num_experts=config.get("num_local_experts", 8),
        top_k=config.get("num_experts_per_tok", 2),
        router=router,
    )
    return llama.decoder_config(config, moe, kind="mixtral")


def copies(config: DecoderConfig) -> list[Copy]:
    """From group `base`."""
    s, d = "base:model.layers.{l}.block_sparse_moe.", "decoder/{l}/moe/"
    entries = [*linear(f"{s}gate", f"{d}router/linear", bias=False)]
    for theirs, ours in NAMES:
        entries += linear(f"{s}experts.{{e}}.{theirs}", f"{d}experts/{ours}", bias=False)
    experts = range(config.moe.num_experts)
    return llama.trunk(config) + expand(entries, llama.chosen(config, moe=True), experts)
