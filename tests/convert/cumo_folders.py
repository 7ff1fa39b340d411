"""The released layouts of CuMo: names and shapes at any size, and tiny folders of every stage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tests.convert.folders import write_file

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of decoder and vision encoder. `mixtral`: experts of the decoder, 0 for Mistral."""

    hidden: int = 8
    mlp: int = 12
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 11
    mixtral: int = 0
    clip_hidden: int = 8
    clip_mlp: int = 12
    clip_layers: int = 3
    clip_heads: int = 2
    image: int = 8
    patch: int = 4
    experts: int = 4
    scales: tuple[int, ...] = (1, 3)


TINY = Sizes()
SEVEN = Sizes(4096, 14336, 32, 32, 8, 32000, 0, 1024, 4096, 24, 16, 336, 14)
EIGHT_SEVEN = Sizes(4096, 14336, 32, 32, 8, 32000, 8, 1024, 4096, 24, 16, 336, 14)


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    weight = {f"{name}.weight": (outputs, inputs)}
    return weight | ({f"{name}.bias": (outputs,)} if bias else {})


def decoder_shapes(size: Sizes) -> Shapes:
    """Tensors of MistralForCausalLM or MixtralForCausalLM."""
    wide, head = size.hidden, size.hidden // size.heads
    found = {"model.embed_tokens.weight": (size.vocab, wide), "model.norm.weight": (wide,)}
    found |= linear("lm_head", wide, size.vocab, bias=False)
    for layer in range(size.layers):
        at = f"model.layers.{layer}."
        for part, heads in (("q", size.heads), ("k", size.kv_heads), ("v", size.kv_heads)):
            found |= linear(f"{at}self_attn.{part}_proj", wide, heads * head, bias=False)
        found |= linear(f"{at}self_attn.o_proj", wide, wide, bias=False)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{at}{norm}.weight"] = (wide,)
        if size.mixtral:
            found |= linear(f"{at}block_sparse_moe.gate", wide, size.mixtral, bias=False)
        for expert in range(size.mixtral):
            inside = f"{at}block_sparse_moe.experts.{expert}."
            found |= linear(f"{inside}w1", wide, size.mlp, bias=False)
            found |= linear(f"{inside}w2", size.mlp, wide, bias=False)
            found |= linear(f"{inside}w3", wide, size.mlp, bias=False)
        if not size.mixtral:
            for part in ("gate", "up"):
                found |= linear(f"{at}mlp.{part}_proj", wide, size.mlp, bias=False)
            found |= linear(f"{at}mlp.down_proj", size.mlp, wide, bias=False)
    return found


def encoder_shapes(size: Sizes, moe: bool) -> Shapes:
    """Tensors of the vision tower, with names from `vision_model.` on."""
    wide, top = size.clip_hidden, "vision_model."
    patches = (size.image // size.patch) ** 2
    found = {
        f"{top}embeddings.class_embedding": (wide,),
        f"{top}embeddings.patch_embedding.weight": (wide, 3, size.patch, size.patch),
        f"{top}embeddings.position_embedding.weight": (patches + 1, wide),
    }
    norms = [f"{top}pre_layrnorm"]
    for layer in range(size.clip_layers):
        at = f"{top}encoder.layers.{layer}."
        norms += [f"{at}layer_norm1", f"{at}layer_norm2"]
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= linear(f"{at}self_attn.{part}", wide, wide)
        inner = [f"{at}experts.{e}." for e in range(size.experts)] if moe else [f"{at}mlp."]
        found |= linear(f"{at}gate", wide, size.experts, bias=False) if moe else {}
        for name in inner:
            found |= linear(f"{name}fc1", wide, size.clip_mlp)
            found |= linear(f"{name}fc2", size.clip_mlp, wide)
    for norm in norms:
        found |= {f"{norm}.weight": (wide,), f"{norm}.bias": (wide,)}
    return found


def connector_shapes(size: Sizes, moe: bool) -> Shapes:
    """Tensors of the connector, `model.mm_projector.…`."""
    inputs, top = size.clip_hidden * len(size.scales), "model.mm_projector."
    found = linear(f"{top}gate", inputs, size.experts, bias=False) if moe else {}
    inner = [f"{top}experts.{e}." for e in range(size.experts)] if moe else [top]
    for name in inner:
        found |= linear(f"{name}0", inputs, size.hidden)
        found |= linear(f"{name}2", size.hidden, size.hidden)
    return found


def whole_shapes(size: Sizes) -> Shapes:
    """Tensors that the last stage saves, all of them in the shards."""
    encoder = {f"model.vision_tower.{k}": v for k, v in encoder_shapes(size, True).items()}
    return decoder_shapes(size) | encoder | connector_shapes(size, True)


def config_json(size: Sizes, moe: bool) -> dict:
    """config.json of a CuMo folder."""
    made = {
        "model_type": "llava_mixtral" if size.mixtral else "llava_mistral",
        "hidden_size": size.hidden,
        "intermediate_size": size.mlp,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocab,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
        "sliding_window": None,
        "num_selected": 2,
        "scales": list(size.scales),
        "clip_smoe": moe,
        "mlp_smoe": moe,
        "image_aspect_ratio": "pad",
        "mm_projector_type": "smoe_mlp" if moe else "mlp2x_gelu",
        "mm_vision_tower": "openai/clip-vit-large-patch14-336" if size.image == 336 else "tower",
    }
    if size.mixtral:
        made |= {"num_local_experts": size.mixtral, "num_experts_per_tok": 2}
    return made


def tower_json(size: Sizes) -> dict:
    """config.json of the encoder's folder."""
    vision = {
        "hidden_size": size.clip_hidden,
        "intermediate_size": size.clip_mlp,
        "num_hidden_layers": size.clip_layers,
        "num_attention_heads": size.clip_heads,
        "image_size": size.image,
        "patch_size": size.patch,
    }
    return {"model_type": "clip", "vision_config": vision}


def tensors(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def write_stage(folder: Path, stage: str, size: Sizes = TINY) -> Path:
    """Write the folder that stage `pt`, `pft` or `sft` saves.

    The encoder's config.json is in the folder `tower` beside it.
    Files that the originals write with torch are safetensors here, so that torch is not needed.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(size, stage == "sft")))
    (folder / "tokenizer_config.json").write_text("{}")
    tower = folder.with_name("tower")
    tower.mkdir(exist_ok=True)
    (tower / "config.json").write_text(json.dumps(tower_json(size)))
    if stage == "sft":
        write_file(folder / "model.safetensors", tensors(whole_shapes(size)))
        return folder
    write_file(folder / "mm_projector.safetensors", tensors(connector_shapes(size, False)))
    if stage == "pft":
        write_file(folder / "model.safetensors", tensors(decoder_shapes(size)))
        write_file(folder / "clip.safetensors", tensors(encoder_shapes(size, False)))
    return folder
