"""CLIP vision models of transformers (`CLIPModel` or `CLIPVisionModel`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimoe_jax.config import ClipConfig
from unimoe_jax.convert.entry import Copy, Entry, Excuse, expand, flat_stack, linear, norm
from unimoe_jax.convert.reader import ConvertError

UNREAD_NORM = "only the class token of the last layer passes it; patch features do not"
OUTSIDE = (
    Excuse(
        r"clip:(text_model|text_projection|visual_projection|logit_scale)\b.*",
        "text side of CLIP, not part of a vision encoder",
    ),
    Excuse(r"clip:(vision_model\.)?post_layernorm\..*", UNREAD_NORM),
    Excuse(r"clip:(.*\.)?position_ids", "a buffer that counts positions"),
)


def excuses(config: ClipConfig) -> tuple[Excuse, ...]:
    """Excuses for the parts of a CLIP that this encoder does not build.

    They cover whole layers only. An unknown tensor in a layer that is built would change the
    features, so it is never excused.
    """
    numbers = range(config.used_layers + config.kept_unread, config.num_layers)
    layers = rf"encoder\.layers\.({'|'.join(map(str, numbers))})\..*"
    dropped = Excuse(rf"clip:(vision_model\.)?{layers}", "layers after the selected hidden state")
    return (*OUTSIDE, dropped) if numbers else OUTSIDE


def clip_config(config: Mapping[str, Any], select_layer: int) -> ClipConfig:
    """Settings of the encoder, from a `config.json` of CLIPModel or CLIPVisionModel.

    Missing keys get the defaults of transformers.

    Args:
        select_layer: the hidden state whose features are read; -2 is the input of the last layer.

    Raises:
        ConvertError: an activation that this encoder does not have.
    """
    # CLIPModel nests the settings of its vision side, CLIPVisionModel does not.
    vision = config.get("vision_config") or config
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ConvertError(
            f"CLIP's config.json: hidden_act {activation!r} is not supported; it must be "
            "quick_gelu or gelu"
        )
    return ClipConfig(
        hidden_size=vision.get("hidden_size", 768),
        mlp_dim=vision.get("intermediate_size", 3072),
        num_layers=vision.get("num_hidden_layers", 12),
        num_heads=vision.get("num_attention_heads", 12),
        image_size=vision.get("image_size", 224),
        patch_size=vision.get("patch_size", 32),
        norm_eps=vision.get("layer_norm_eps", 1e-5),
        activation=activation,
        select_layer=select_layer,
    )


def copies(config: ClipConfig, dst: str, src: str = "clip:vision_model.") -> list[Copy]:
    """Copies of the layers up to the selected hidden state, and of unread layers that are kept.

    Args:
        dst: path of the encoder.
        src: group and prefix of every source name.
    """
    # Embeddings. The patch convolution becomes a matrix that multiplies flattened patches.
    patch = (("p", config.patch_size), ("q", config.patch_size))
    top = (
        Entry(
            f"{src}embeddings.patch_embedding.weight",
            f"{dst}/patch_embedding/kernel",
            "d c p q -> (p q c) d",
            patch,
        ),
        Entry(f"{src}embeddings.class_embedding", f"{dst}/class_embedding"),
        Entry(f"{src}embeddings.position_embedding.weight", f"{dst}/position_embedding"),
        *norm(f"{src}pre_layrnorm", f"{dst}/pre_norm"),
    )
    # One layer; CuMo's layers have experts in place of the MLP.
    s, d = f"{src}encoder.layers.{{l}}.", f"{dst}/{{l}}/"
    layer = (
        *norm(f"{s}layer_norm1", f"{d}attention_norm"),
        *linear(f"{s}self_attn.q_proj", f"{d}attention/q_proj"),
        *linear(f"{s}self_attn.k_proj", f"{d}attention/k_proj"),
        *linear(f"{s}self_attn.v_proj", f"{d}attention/v_proj"),
        *linear(f"{s}self_attn.out_proj", f"{d}attention/o_proj"),
        *norm(f"{s}layer_norm2", f"{d}mlp_norm"),
    )
    experts = None
    if config.moe is None:
        layer += linear(f"{s}mlp.fc1", f"{d}mlp/fc1") + linear(f"{s}mlp.fc2", f"{d}mlp/fc2")
    else:
        experts = range(config.moe.num_experts)
        layer += linear(f"{s}gate", f"{d}moe/router/linear", bias=False)
        for name in ("fc1", "fc2"):
            layer += linear(f"{s}experts.{{e}}.{name}", f"{d}moe/experts/{name}")
    # Layers after the selected hidden state are stacked separately, as `unread_layers`.
    used = config.used_layers
    places = flat_stack(used)
    for layer_number in range(config.kept_unread):
        places[used + layer_number] = ("unread_layers", layer_number)
    return expand(top) + expand(layer, places, experts)


def to_json(config: ClipConfig) -> dict[str, Any]:
    """The `config.json` of a CLIPVisionModel, for an export."""
    return {
        "architectures": ["CLIPVisionModel"],
        "model_type": "clip_vision_model",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": config.norm_eps,
        "hidden_act": config.activation,
    }
