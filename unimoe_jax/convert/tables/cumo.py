"""CuMo: Mistral or Mixtral, CLIP and the connector, each dense or with experts.

Groups, a later one overriding an earlier one: `base` (the folder's shards, which after the last
stage hold everything), `clip` (clip.bin, or a CLIP folder), `projector` (mm_projector.bin). Whether
a module carries experts is read from its tensors' names. Names of the vision tower are the same in
all places but for their prefix.
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
# The encoders that the originals fetch by name: what their config.json says, as no tensor tells it.
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
    """Names of the tensors of `encoder` and `connector`, without what stands before them."""
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
    """A CLIP folder's tensors as clip.bin names them: a vision model that transformers 5 has saved
    lacks the prefix."""
    if not tensors or any(with_prefix(tensors, ENCODER)):
        return tensors
    return {ENCODER + name: tensor for name, tensor in tensors.items()}


def _numbers(names: Iterable[str], pattern: str) -> list[int]:
    return sorted({int(match[1]) for name in names if (match := re.match(pattern, name))})


def experts_of(names: Iterable[str], prefix: str, top_k: int) -> MoEConfig | None:
    """Experts below `prefix` (`{prefix}experts.{e}.`), if there are any; CuMo's own router."""
    found = _numbers(names, re.escape(prefix) + r"experts\.(\d+)\.")
    if not found:
        return None
    router = RouterConfig(dtype_order="softmax_cast_topk", logits_dtype="compute", init="fan_in")
    return MoEConfig(num_experts=len(found), top_k=top_k, router=router)


def tower_json(folder: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json of the encoder that CuMo's own names: in or beside `folder`, or from `KNOWN`.

    A path of another machine, or a hub's name, stands for the folder of its last component.

    Raises:
        ConvertError: neither is there.
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
    """From the encoder's config.json, the names of its tensors here and CuMo's config.json.

    The selected layer is hard-coded in the original, which does not read `mm_vision_select_layer`.
    """
    moe = experts_of(names, f"{LAYERS}0.", config.get("num_selected", 2))
    update = {"unread_layers": "keep", "moe": moe}
    return clip.clip_config(tower, select_layer=-2).model_copy(update=update)


def vision_config(
    encoder: ClipConfig, connector: Collection[str], config: Mapping[str, Any]
) -> VisionConfig:
    """`connector`: names of its tensors, without prefix; none: it is not converted."""
    only = {"mm_vision_select_feature": "patch", "mm_use_im_start_end": False}
    require("config.json", config, **only)
    moe = experts_of(connector, "", config.get("num_selected", 2))
    expert = r"experts\.0\." if moe else ""
    depth = len(_numbers(connector, expert + r"(\d+)\.weight"))
    kind, found = config.get("mm_projector_type"), "smoe_mlp" if moe else f"mlp{depth}x_gelu"
    if connector and not depth:
        raise ConvertError(f"mm_projector_type {kind!r}: not one of mlp<N>x_gelu and smoe_mlp")
    if connector and kind not in (None, found):
        raise ConvertError(
            f"config.json: mm_projector_type {kind!r} is not what the tensors of the connector "
            f"are, {found!r}"
        )
    return VisionConfig(
        encoder=encoder,
        connector=MlpConnectorConfig(depth=depth or 2, moe=moe),
        aspect="pad" if config.get("image_aspect_ratio") == "pad" else "square",
        scales=tuple(config.get("scales", (1,))),
    )


def decoder_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Mistral or Mixtral, from CuMo's config.json."""
    if config["model_type"] == "llava_mixtral":
        return mixtral.mixtral_config(config)
    return llama.decoder_config(config, kind="mistral")


# ----------------------------------------------------------------------------------- copies


def connector_copies(
    config: MlpConnectorConfig, src: str, dst: str = "vision/connector"
) -> list[Copy]:
    """A Sequential of linear layers and GELUs (numbers 0, 2, …), or experts of that form."""
    entries: list[Entry] = []
    experts = None
    if config.moe is not None:
        entries += linear(f"{src}gate", f"{dst}/moe/router/linear", bias=False)
        src, dst = f"{src}experts.{{e}}.", f"{dst}/moe/experts"
        experts = range(config.moe.num_experts)
    for layer in range(config.depth):
        entries += linear(f"{src}{2 * layer}", f"{dst}/fc{layer + 1}")
    return expand(entries, experts=experts)


def decoder_copies(config: DecoderConfig) -> list[Copy]:
    """From group `base`."""
    return (mixtral if config.moe else llama).copies(config)


def vision_in_shards(config: VisionConfig) -> list[Copy]:
    """Encoder and connector beside the decoder, as the last stage leaves them."""
    encoder = clip.copies(config.encoder, "vision/encoder", f"base:{ENCODER_IN_SHARDS}")
    return encoder + connector_copies(config.connector, f"base:{CONNECTOR}")


def vision_in_files(config: VisionConfig) -> list[Copy]:
    """Encoder and connector in files of their own, as earlier stages leave them."""
    encoder = clip.copies(config.encoder, "vision/encoder", f"clip:{ENCODER}")
    return encoder + connector_copies(config.connector, f"projector:{CONNECTOR}")


# ------------------------------------------------------------------------------- config.json


def to_json(config: ModelConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """The multimodal part of a config.json; `known` is the one that an import found, or {}.

    An encoder that the original cannot fetch by name is called `clip`, a folder to go beside it.

    Raises:
        ConvertError: encoder and connector differ in what has one key for both.
    """
    vision, is_mixtral = config.vision, config.decoder.moe is not None
    name = known.get("mm_vision_tower", next(iter(KNOWN)))
    same = KNOWN.get(name, {}).items() <= clip.to_json(vision.encoder).items()
    parts = {"encoder": vision.encoder.moe, "connector": vision.connector.moe}
    counts = {name: (moe.num_experts, moe.top_k) for name, moe in parts.items() if moe}
    if len(set(counts.values())) > 1:
        raise ConvertError(
            f"format cumo has one num_experts and one num_selected for encoder and connector; "
            f"here (experts, selected) are {counts}"
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
        # The original wants it false wherever it does not train, and stores what it happens to be.
        "training": False,
    }
    if vision.connector.moe:
        made["mm_projector_type"] = "smoe_mlp"
    return {"num_layers": 3, "dropout": False} | dict(known) | made
