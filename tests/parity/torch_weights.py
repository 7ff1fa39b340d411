"""Convert state dicts of the PyTorch originals to parameters of this package by tables of names.

This does not use `unimoe_jax.convert`, because the parity tests must not depend on the code that
they check. Every function is linear in the weights, so it converts gradients as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from flax.traverse_util import unflatten_dict

from unimoe_jax.config import ClipConfig, QueryConnectorConfig
from unimoe_jax.connectors.query import cross_layers, qformer_places

State = Mapping[str, np.ndarray]
CLIP_LAYER = {
    "attention_norm": "layer_norm1",
    **{f"attention/{n}_proj": f"self_attn.{n}_proj" for n in "qkv"},
    "attention/o_proj": "self_attn.out_proj",
    "mlp_norm": "layer_norm2",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}
WHISPER_LAYER = {
    "attention_norm": "self_attn_layer_norm",
    **{f"attention/{n}_proj": f"self_attn.{n}_proj" for n in "qkv"},
    "attention/o_proj": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp/fc1": "fc1",
    "mlp/fc2": "fc2",
}
WHISPER_DECODER_LAYER = WHISPER_LAYER | {
    "cross_attention_norm": "encoder_attn_layer_norm",
    **{f"cross_attention/{n}_proj": f"encoder_attn.{n}_proj" for n in "qkv"},
    "cross_attention/o_proj": "encoder_attn.out_proj",
}
BEATS_LAYER = WHISPER_LAYER | {"attention/grep_linear": "self_attn.grep_linear"}


def _bert_attention(dst: str, src: str) -> dict[str, str]:
    heads = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}
    return {f"{dst}/{ours}": f"{src}.attention.{theirs}" for ours, theirs in heads.items()} | {
        f"{dst}/o_proj": f"{src}.output.dense",
        f"{dst}_norm": f"{src}.output.LayerNorm",
    }


QFORMER_LAYER = _bert_attention("attention", "attention") | {
    "mlp/fc1": "intermediate_query.dense",
    "mlp/fc2": "output_query.dense",
    "mlp_norm": "output_query.LayerNorm",
}
QFORMER_CROSS = _bert_attention("cross_attention", "crossattention")


def numpy_state(state: Mapping, prefix: str = "") -> dict[str, np.ndarray]:
    """Tensors below `prefix`, by name without it, as numpy; None (no gradient) is left out."""
    return {
        name[len(prefix) :]: tensor.detach().cpu().numpy()
        for name, tensor in state.items()
        if name.startswith(prefix) and tensor is not None
    }


def modules(state: State, table: Mapping[str, str], prefix: str = "") -> dict[str, np.ndarray]:
    """Convert linear layers, whose weight is transposed, and norms; returns arrays by path."""
    flat = {}
    for dst, src in table.items():
        weight = state[f"{prefix}{src}.weight"]
        flat[f"{dst}/kernel" if weight.ndim == 2 else f"{dst}/scale"] = weight.T
        if f"{prefix}{src}.bias" in state:
            flat[f"{dst}/bias"] = state[f"{prefix}{src}.bias"]
    return flat


def stacked(layers: Sequence[Mapping[str, np.ndarray]], prefix: str = "layers") -> dict:
    """Stack the flat dicts of layers into one whose arrays have a leading layer axis."""
    return {f"{prefix}/{k}": np.stack([layer[k] for layer in layers]) for k in layers[0]}


def nested(flat: Mapping[str, np.ndarray]) -> dict:
    """Turn arrays by path into the tree that `apply` takes as `params`."""
    return unflatten_dict(dict(flat), sep="/")


def clip_params(state: State, config: ClipConfig) -> dict[str, np.ndarray]:
    """Convert a CLIP encoder from the tensors below `vision_model.`."""
    patch = state["embeddings.patch_embedding.weight"]
    layers = [
        modules(state, CLIP_LAYER, f"encoder.layers.{layer}.")
        for layer in range(config.used_layers)
    ]
    return {
        "patch_embedding/kernel": patch.transpose(2, 3, 1, 0).reshape(-1, patch.shape[0]),
        "class_embedding": state["embeddings.class_embedding"],
        "position_embedding": state["embeddings.position_embedding.weight"],
        **modules(state, {"pre_norm": "pre_layrnorm"}),
        **stacked(layers),
    }


def whisper_encoder_params(state: State, num_layers: int) -> dict[str, np.ndarray]:
    """Convert a Whisper encoder from the tensors below `model.encoder.`."""
    flat = {"position_embedding": state["embed_positions.weight"]}
    for name in ("conv1", "conv2"):
        weight = state[f"{name}.weight"]
        flat[f"{name}/kernel"] = weight.transpose(2, 1, 0).reshape(-1, weight.shape[0])
        flat[f"{name}/bias"] = state[f"{name}.bias"]
    layers = [modules(state, WHISPER_LAYER, f"layers.{layer}.") for layer in range(num_layers)]
    return flat | modules(state, {"final_norm": "layer_norm"}) | stacked(layers)


def beats_params(state: State, num_layers: int) -> dict[str, np.ndarray]:
    """Convert BEATs from the `model` entry of its checkpoint."""
    patch = state["patch_embedding.weight"]
    table = {
        "patch_norm": "layer_norm",
        "embed_proj": "post_extract_proj",
        "embed_norm": "encoder.layer_norm",
    }
    layers = []
    for layer in range(num_layers):
        prefix = f"encoder.layers.{layer}."
        grep_a = state[f"{prefix}self_attn.grep_a"].reshape(-1)
        layers.append(modules(state, BEATS_LAYER, prefix) | {"attention/grep_a": grep_a})
    return {
        "patch_embedding/kernel": patch.reshape(patch.shape[0], -1).T,
        "relative_attention_bias": state[
            "encoder.layers.0.self_attn.relative_attention_bias.weight"
        ],
        "conv_position/weight_v": state["encoder.pos_conv.0.weight_v"].transpose(2, 1, 0),
        "conv_position/weight_g": state["encoder.pos_conv.0.weight_g"].reshape(-1),
        "conv_position/bias": state["encoder.pos_conv.0.bias"],
        **modules(state, table),
        **stacked(layers),
    }


def whisper_decoder_params(state: State, num_layers: int) -> dict[str, np.ndarray]:
    """Convert a Whisper reader, without queries and projector, from `….audio_decoder.`."""
    layers = [
        modules(state, WHISPER_DECODER_LAYER, f"layers.{layer}.") for layer in range(num_layers)
    ]
    positions = {"position_embedding": state["embed_positions.weight"]}
    return positions | modules(state, {"final_norm": "layer_norm"}) | stacked(layers)


def qformer_params(state: State, config: QueryConnectorConfig) -> dict[str, np.ndarray]:
    """Convert a Q-Former, without queries and projector, from the tensors below `….qformer.`."""
    groups: dict[str, list[dict]] = {}
    for layer, place in enumerate(qformer_places(config)):
        cross = QFORMER_CROSS if cross_layers(config)[layer] else {}
        weights = modules(state, QFORMER_LAYER | cross, f"encoder.layer.{layer}.")
        groups.setdefault(place.prefix, []).append(weights)
    flat = modules(state, {"query_norm": "layernorm"})
    for prefix, layers in groups.items():
        flat |= stacked(layers, prefix)
    return flat


def mlp_params(state: State, prefix: str) -> dict[str, np.ndarray]:
    """Convert `{prefix}0`, `{prefix}2`, … of a torch Sequential to fc1, fc2, …"""
    numbers = sorted(
        int(name[len(prefix) :].split(".")[0])
        for name in state
        if name.startswith(prefix) and name.endswith(".weight")
    )
    return modules(state, {f"fc{i + 1}": f"{prefix}{n}" for i, n in enumerate(numbers)})
