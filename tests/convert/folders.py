"""Write tiny source folders without torch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from unimoe_jax.convert.exporting import Piece, write_safetensors

WIDTH, HIDDEN, LAYERS, VOCAB = 8, 12, 2, 11
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5,
}


def llama_tensors() -> dict[str, np.ndarray]:
    """Random weights with the names of LlamaForCausalLM."""
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for part, out in (("q", WIDTH), ("k", WIDTH // 2), ("v", WIDTH // 2), ("o", WIDTH)):
            shapes[f"{prefix}self_attn.{part}_proj.weight"] = (out, WIDTH)
        for part in ("gate", "up"):
            shapes[f"{prefix}mlp.{part}_proj.weight"] = (HIDDEN, WIDTH)
        shapes[f"{prefix}mlp.down_proj.weight"] = (WIDTH, HIDDEN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{norm}.weight"] = (WIDTH,)
    rng = np.random.default_rng(0)
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def write_file(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Write one safetensors file."""
    pieces = [
        Piece(name, value.shape, value.dtype.name, lambda value=value: value)
        for name, value in tensors.items()
    ]
    write_safetensors(path, pieces)


def write_llama(folder: Path, tensors: dict[str, np.ndarray], **config) -> Path:
    """Write a folder of transformers: weights, config.json and tokenizer settings."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder
