"""CuMo: Mistral or Mixtral, CLIP and the connector, each dense or with experts.

Groups of source tensors; a tensor of a later group overrides the same tensor of an earlier one:

    base        the shards of the folder, which hold everything after the last stage
    clip        clip.bin, or a CLIP folder
    projector   mm_projector.bin

The names of its tensors say whether a module has experts. The vision tower has the same names in
all groups, with different prefixes.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from unimoe_jax.config import (
    ClipConfig,
    DecoderConfig,
    MlpConnectorConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    VisionConfig,
)
from unimoe_jax.convert.entry import Copy, Entry, Excuse, expand, linear
from unimoe_jax.convert.reader import ConvertError, Tensors, read_json, require, with_prefix
from unimoe_jax.convert.tables import clip, llama, mixtral

ENCODER = "vision_model."
ENCODER_IN_SHARDS = f"model.vision_tower.{ENCODER}"
CONNECTOR = "model.mm_projector."
LAYERS = "encoder.layers."
EXCUSES = (
    *llama.EXCUSES,
    *clip.OUTSIDE,
    Excuse(r"base:.*\.position_ids", "a buffer that counts positions"),
    Excuse(rf"base:{re.escape(ENCODER_IN_SHARDS)}post_layernorm\..*", clip.UNREAD_NORM),
)
# Encoders that the originals fetch by name -> their config.json, which a CuMo folder lacks. Tensors
# do not determine these settings.
KNOWN = {
    "openai/clip-vit-large-patch14-336": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
}


# --------------------------------------------------------------------------------- configs


def part_names(groups: Mapping[str, Tensors]) -> dict[str, set[str]]:
    """`encoder` and `connector` -> names of their tensors in all groups, without prefixes."""
    places = {
        "encoder": (("base", ENCODER_IN_SHARDS), ("clip", ENCODER)),
        "connector": (("base", CONNECTOR), ("projector", CONNECTOR)),
    }
    return {
        part: {
            name.removeprefix(prefix)
            for group, prefix in where
            for name in with_prefix(groups.get(group, {}), prefix)
        }
        for part, where in places.items()
    }


def named_as_in_file(tensors: Tensors) -> Tensors:
    """Name the tensors of a CLIP folder as clip.bin does.

    A vision model that transformers 5 has saved lacks the prefix `vision_model.`.
    """
    if not tensors or any(with_prefix(tensors, ENCODER)):
        return tensors
    return {ENCODER + name: tensor for name, tensor in tensors.items()}


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    """Distinct numbers in the first group of `pattern`, over all names that begin with it."""
    return sorted({int(match[1]) for name in names if (match := re.match(pattern, name))})


def experts_of(names: Iterable[str], prefix: str, top_k: int) -> MoEConfig | None:
    """Settings of the experts `{prefix}experts.{e}.…`, or None if no name is of that form.

    The router is CuMo's, also in a model whose decoder is Mixtral.
    """
    numbers = _numbers(names, re.escape(prefix) + r"experts\.(\d+)\.")
    if not numbers:
        return None
    router = RouterConfig(dtype_order="softmax_cast_topk", logits_dtype="compute", init="fan_in")
    return MoEConfig(num_experts=len(numbers), top_k=top_k, router=router)


def tower_json(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The encoder's config.json, found by `mm_vision_tower` in CuMo's config.json.

    The encoder is the folder of that name, in or beside `folder` or where the name leads as a path,
    or one of `KNOWN`. The name may also be a path of the machine that trained the model, or a name
    on a hub, so its last component is tried, too.

    Raises:
        ConvertError: there is no such folder, and the name is not known.
    """
    name = config.get("mm_vision_tower", "")
    last = Path(name).name
    places = (folder / name, folder.parent / name, Path(name), folder / last, folder.parent / last)
    for place in places:
        if name and (place / "config.json").is_file():
            return read_json(place / "config.json")
    if name not in KNOWN:
        raise ConvertError(
            f"{folder / 'config.json'}: mm_vision_tower {name!r} is neither a folder nor one of "
            f"{sorted(KNOWN)}; add the encoder's folder (its config.json is enough) by --from"
        )
    return KNOWN[name]


def clip_config(
    tower: Mapping[str, Any], names: Collection[str], config: Mapping[str, Any]
) -> ClipConfig:
    """Settings of the encoder.

    The selected layer is -2 in every model: the original hard-codes it and does not read
    `mm_vision_select_layer`.

    Args:
        tower: the encoder's config.json.
        names: names of the encoder's tensors, without prefix.
        config: CuMo's config.json.
    """
    moe = experts_of(names, f"{LAYERS}0.", config.get("num_selected", 2))
    update = {"unread_layers": "keep", "moe": moe}
    return clip.clip_config(tower, select_layer=-2).model_copy(update=update)


def vision_config(
    encoder: ClipConfig, connector: Collection[str], config: Mapping[str, Any]
) -> VisionConfig:
    """Settings of encoder and connector.

    Args:
        encoder: settings of the encoder.
        connector: names of the connector's tensors, without prefix; if there are none, the
            connector is not converted and its settings are placeholders.
        config: CuMo's config.json.

    Raises:
        ConvertError: a setting is not supported, or does not fit the connector's tensors.
    """
    supported = {"mm_vision_select_feature": "patch", "mm_use_im_start_end": False}
    require("config.json", config, **supported)
    # The connector's form, from its names: `0.weight`, `2.weight`, … or the same in each expert.
    moe = experts_of(connector, "", config.get("num_selected", 2))
    expert = r"experts\.0\." if moe else ""
    depth = len(_numbers(connector, expert + r"(\d+)\.weight"))
    kind = config.get("mm_projector_type")
    kind_of_tensors = "smoe_mlp" if moe else f"mlp{depth}x_gelu"
    if connector and not depth:
        raise ConvertError(
            f"config.json: mm_projector_type {kind!r} is not supported; it must be mlp<N>x_gelu "
            "or smoe_mlp"
        )
    if connector and kind not in (None, kind_of_tensors):
        raise ConvertError(
            f"config.json: mm_projector_type is {kind!r}, but the tensors of the connector are of "
            f"type {kind_of_tensors!r}; correct the setting"
        )
    return VisionConfig(
        encoder=encoder,
        connector=MlpConnectorConfig(depth=depth or 2, moe=moe),
        aspect="pad" if config.get("image_aspect_ratio") == "pad" else "square",
        scales=tuple(config.get("scales", (1,))),
    )


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Settings of the decoder, Mistral or Mixtral, from CuMo's config.json."""
    if config["model_type"] == "llava_mixtral":
        return mixtral.mixtral_config(config)
    return llama.decoder_config(config, kind="mistral")


# ----------------------------------------------------------------------------------- copies


def connector_copies(
    config: MlpConnectorConfig, src: str, dst: str = "vision/connector"
) -> list[Copy]:
    """Copies of the connector; `src` is group and prefix.

    It is a torch Sequential, in which linear layers and GELUs alternate, so that the linear layers
    have the numbers 0, 2, …; or a router and experts, each of that form.
    """
    entries: list[Entry] = []
    experts = None
    if config.moe is not None:
        entries += linear(f"{src}gate", f"{dst}/moe/router/linear", bias=False)
        src, dst = f"{src}experts.{{e}}.", f"{dst}/moe/experts"
        experts = range(config.moe.num_experts)
    # Torch numbers the GELUs as well.
    for layer in range(config.depth):
        entries += linear(f"{src}{2 * layer}", f"{dst}/fc{layer + 1}")
    return expand(entries, experts=experts)


def decoder_copies(config: DecoderConfig) -> list[Copy]:
    """Copies of the decoder, from group `base`."""
    return (mixtral if config.moe else llama).copies(config)


def vision_in_shards(config: VisionConfig) -> list[Copy]:
    """Copies of encoder and connector from the shards that the last stage saves."""
    encoder = clip.copies(config.encoder, "vision/encoder", f"base:{ENCODER_IN_SHARDS}")
    return encoder + connector_copies(config.connector, f"base:{CONNECTOR}")


def vision_in_files(config: VisionConfig) -> list[Copy]:
    """Copies of encoder and connector from the separate files that earlier stages save."""
    encoder = clip.copies(config.encoder, "vision/encoder", f"clip:{ENCODER}")
    return encoder + connector_copies(config.connector, f"projector:{CONNECTOR}")


# ------------------------------------------------------------------------------- config.json


def to_json(config: ModelConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """The multimodal part of a config.json, for an export.

    An encoder that the original cannot fetch by name is exported as a folder `clip` beside the
    model, and `mm_vision_tower` names that folder.

    Args:
        config: settings of a model with a vision branch.
        known: the config.json that an import found, or {}.

    Raises:
        ConvertError: encoder and connector have different numbers of experts or selected experts.
            config.json has one key for both.
    """
    vision, is_mixtral = config.vision, config.decoder.moe is not None
    assert vision is not None
    # The encoder can be fetched by its name only if it still has the settings of that encoder.
    name = known.get("mm_vision_tower", next(iter(KNOWN)))
    same = KNOWN.get(name, {}).items() <= clip.to_json(vision.encoder).items()
    experts = {"encoder": vision.encoder.moe, "connector": vision.connector.moe}
    counts = {module: (moe.num_experts, moe.top_k) for module, moe in experts.items() if moe}
    if len(set(counts.values())) > 1:
        raise ConvertError(
            "format cumo has one num_experts and one num_selected for both encoder and connector, "
            f"but (experts, selected) are {counts}; choose another --format"
        )
    moe = vision.encoder.moe or vision.connector.moe
    made = {
        "architectures": [f"Llava{'Mixtral' if is_mixtral else 'Mistral'}ForCausalLM"],
        "model_type": "llava_mixtral" if is_mixtral else "llava_mistral",
        "mm_vision_tower": name if name in KNOWN and same else "clip",
        "mm_hidden_size": vision.encoder.hidden_size,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": f"mlp{vision.connector.depth}x_gelu",
        "clip_smoe": vision.encoder.moe is not None,
        "mlp_smoe": vision.connector.moe is not None,
        "num_experts": moe.num_experts if moe else 1,
        "num_selected": moe.top_k if moe else 1,
        "scales": list(vision.scales),
        "image_aspect_ratio": vision.aspect,
        "use_mm_proj": True,
        # The original needs false everywhere except in training, and saves whatever value it has.
        "training": False,
    }
    if vision.connector.moe:
        made["mm_projector_type"] = "smoe_mlp"
    # Keys that the original needs, but that no setting of this package determines.
    return {"num_layers": 3, "dropout": False} | dict(known) | made
