"""Which file of an exported folder holds what, and the config.json files beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unimoe_jax.config import DecoderConfig, ModelConfig
from unimoe_jax.convert.branches import PLACEHOLDER, connector_copies, projector_type
from unimoe_jax.convert.entry import LINEAR, Copy
from unimoe_jax.convert.opening import Checkpoint
from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.convert.recognise import CUMO_FILES, PROCESSOR_FILE, TOKENIZER_FILES, TUNED_FILES
from unimoe_jax.convert.tables import beats, clip, cumo, llama, mixtral, unimoe, whisper


@dataclass
class Layout:
    """Copies to run backwards, group -> file (WEIGHTS: sharded; else without suffix, unless it has
    to be a torch file), other files.

    wrapped: file -> what a torch file holds beside `model`.
    """

    copies: list[Copy]
    files: dict[str, str]
    json_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    side_files: dict[str, Path] = field(default_factory=dict)
    wrapped: dict[str, dict[str, Any]] = field(default_factory=dict)


Format = Literal["unimoe", "cumo", "hf"]
HOLDS = (
    "unimoe (vision and one of speech and audio), cumo (vision alone), hf (decoder and encoders, "
    "no connectors, no adapters)"
)


def layout_of(checkpoint: Checkpoint, format_: Format) -> Layout:
    """The layout for a checkpoint.

    Raises:
        ConvertError: the format cannot hold this model.
    """
    return {"unimoe": _unimoe, "cumo": _cumo, "hf": _hugging_face}[format_](checkpoint)


def unfit(checkpoint: Checkpoint, reason: str) -> ConvertError:
    """The error for a model that the format cannot hold."""
    return ConvertError(f"{checkpoint.path}: {reason}; choose a --format that holds it: {HOLDS}")


def _known(checkpoint: Checkpoint, role: str) -> dict[str, Any]:
    """The config.json that an import found, if this checkpoint comes from one."""
    return dict(checkpoint.manifest.get("source_configs", {}).get(role, {}))


def _whole(checkpoint: Checkpoint) -> ModelConfig:
    """The model; encoders without connectors are completed by placeholders."""
    config = {key: value for key, value in checkpoint.config.items() if key != "lora"}
    reader = {"kind": "qformer", "num_queries": 1, "hidden_size": 1, "mlp_dim": 1}
    reader |= {"num_layers": 1, "num_heads": 1}
    config.setdefault("decoder", PLACEHOLDER.model_dump())
    for sense in ("speech", "audio"):
        if sense in config:
            config[sense] = {"connector": reader} | config[sense]
            if sense == "speech":
                seconds = config[sense]["encoder"].get("max_positions", 1500) // 50
                config[sense] = {"chunk_seconds": seconds} | config[sense]
    return ModelConfig.model_validate({**config, "lora": checkpoint.config.get("lora", ())})


def decoder_json(config: DecoderConfig, known: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a LLaMA or Mixtral folder."""
    is_mixtral = config.moe is not None
    made = {
        "architectures": ["MixtralForCausalLM" if is_mixtral else "LlamaForCausalLM"],
        "model_type": "mixtral" if is_mixtral else "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_positions,
        "tie_word_embeddings": config.tie_embeddings,
    }
    if is_mixtral:
        made |= {"num_local_experts": config.moe.num_experts, "sliding_window": None}
        made["num_experts_per_tok"] = config.moe.top_k
    return made | dict(known)


def _hugging_face(checkpoint: Checkpoint) -> Layout:
    """Folders `decoder`, `clip`, `whisper` and a file `beats.pt`, for the parts there are."""
    model, config = _whole(checkpoint), checkpoint.config
    layout = Layout([], {})
    if "decoder" in config:
        moe = model.decoder.moe
        if moe is not None and not all(model.decoder.moe_layers()):
            raise unfit(checkpoint, "format hf holds experts in all layers (Mixtral) or in none")
        layout.copies += (mixtral if moe else llama).copies(model.decoder)
        layout.files["base"] = "decoder/WEIGHTS"
        layout.json_files["decoder/config.json"] = decoder_json(
            model.decoder, _known(checkpoint, "decoder")
        )
        _tokenizer(checkpoint, layout, "decoder")
    _encoders(checkpoint, model, layout)
    return layout


def _encoders(checkpoint: Checkpoint, model: ModelConfig, layout: Layout) -> None:
    config = checkpoint.config
    if "vision" in config:
        layout.copies += clip.copies(model.vision.encoder, "vision/encoder")
        layout.files["clip"] = "clip/WEIGHTS"
        known = _known(checkpoint, "clip") or clip.to_json(model.vision.encoder)
        layout.json_files["clip/config.json"] = known
        _side(checkpoint, layout, "clip")
    if "speech" in config:
        layout.copies += whisper.encoder_copies(model.speech.encoder, "speech/encoder")
        layout.files["whisper"] = "whisper/WEIGHTS"
        known = _known(checkpoint, "whisper") or whisper.to_json(
            model.speech.encoder, model.speech.connector
        )
        layout.json_files["whisper/config.json"] = known
        _side(checkpoint, layout, "whisper")
    if "audio" in config:
        layout.copies += beats.encoder_copies(model.audio.encoder, "audio/encoder")
        layout.files["beats"] = "beats.pt"
        known = _known(checkpoint, "beats") or beats.to_cfg(model.audio.encoder)
        layout.wrapped["beats.pt"] = {"cfg": known}


def _tokenizer(checkpoint: Checkpoint, layout: Layout, folder: str) -> None:
    for name in TOKENIZER_FILES:
        if name in checkpoint.files:
            layout.side_files[f"{folder}/{name}"] = checkpoint.files[name]


def _side(checkpoint: Checkpoint, layout: Layout, role: str) -> None:
    file = checkpoint.path / f"{role}_{PROCESSOR_FILE}"
    if file.is_file():
        layout.side_files[f"{role}/{PROCESSOR_FILE}"] = file


# ---------------------------------------------------------------------------------- CuMo


def _cumo(checkpoint: Checkpoint) -> Layout:
    """One folder as a stage leaves it: with experts all in shards, else encoder and connector in
    `clip.bin` and `mm_projector.bin`, which the original reads with torch."""
    model = _whole(checkpoint)
    if model.vision is None or model.speech or model.audio:
        raise unfit(checkpoint, "format cumo holds a vision encoder and no other")
    if model.decoder.tie_embeddings:
        raise unfit(checkpoint, "format cumo has no tied embeddings")
    if not all(model.decoder.moe_layers()) and model.decoder.moe:
        raise unfit(checkpoint, "format cumo holds a decoder with experts in all layers or in none")
    layout = Layout(cumo.decoder_copies(model.decoder), {"base": "WEIGHTS"})
    if model.vision.encoder.moe or model.vision.connector.moe:
        layout.copies += cumo.vision_in_shards(model.vision)
    else:
        layout.copies += cumo.vision_in_files(model.vision)
        layout.files |= {group: f"{stem}.bin" for group, stem in CUMO_FILES.items()}
    known = _known(checkpoint, "cumo")
    made = cumo.to_json(model, decoder_json(model.decoder, known) | known)
    layout.json_files["config.json"] = made
    if made["mm_vision_tower"] == "clip":
        layout.json_files["clip/config.json"] = clip.to_json(model.vision.encoder)
        _side(checkpoint, layout, "clip")
    _tokenizer(checkpoint, layout, ".")
    return layout


# ------------------------------------------------------------------------------- Uni-MoE


def _unimoe(checkpoint: Checkpoint) -> Layout:
    """Folders `base`, `tuned`, for 8e `experts`, and the encoders."""
    model = checkpoint.model
    sense = "audio" if model.audio else "speech"
    if model.vision is None or (model.speech is None) == (model.audio is None):
        raise unfit(checkpoint, "format unimoe holds a vision encoder and one of speech and audio")
    if model.decoder.tie_embeddings:
        raise unfit(checkpoint, "format unimoe has no tied embeddings")
    has_maps = any("/moe/router/modality_map/" in path for path in checkpoint.params)
    is_8e = has_maps or checkpoint.manifest.get("family") == "unimoe-8e"
    layout = Layout([], {group: f"tuned/{stem}" for group, stem in TUNED_FILES.items()})
    layout.files["base"] = "base/WEIGHTS"
    if is_8e:
        count = model.decoder.moe.num_experts
        dense = any(re.search(r"/mlp/\w+/lora_a$", path) for path in checkpoint.params)
        layout.copies += unimoe.decoder_8e(model.decoder, 1, dense)
        for expert, name in enumerate(unimoe.EXPERT_FILES[:count]):
            layout.files[f"rank{expert}"] = f"tuned/{expert}_mlp_experts"
            layout.files[f"mlp{expert}"] = f"experts/{name}"
    else:
        layout.copies += unimoe.decoder(model.decoder)
    layout.copies += _peft_copies(layout.copies, checkpoint)
    vision, connector = model.vision.connector, getattr(model, sense).connector
    image, sound = (
        _is_sequential(checkpoint, f"{name}_projector_type", depth)
        for name, depth in (("mm", vision.depth), ("audio", connector.projector_depth))
    )
    layout.copies += unimoe.vision_connector(vision.depth, image)
    layout.copies += connector_copies(connector, sense, sound)
    _encoders(checkpoint, model, layout)
    _tokenizer(checkpoint, layout, "tuned")
    _unimoe_json(checkpoint, model, layout, is_8e)
    return layout


def _peft_copies(copies: list[Copy], checkpoint: Checkpoint) -> list[Copy]:
    taken = {(copy.dst, copy.index) for copy in copies}
    made: dict[tuple[str, tuple[int, ...]], Copy] = {}
    for copy in copies:
        name, module = unimoe.peft_name(copy), copy.dst.removesuffix("/kernel")
        if name is None or f"{module}/lora_a" not in checkpoint.params:
            continue
        for part in "AB":
            dst = f"{module}/lora_{part.lower()}"
            if (dst, copy.index) not in taken:
                src = f"peft:{name}.lora_{part}.weight"
                made[dst, copy.index] = Copy(src, dst, copy.index, LINEAR, ())
    return list(made.values())


def _is_sequential(checkpoint: Checkpoint, key: str, depth: int) -> bool:
    """Whether a projector's layers are numbered: of one alone the import's config.json tells."""
    known = _known(checkpoint, "tuned") or _known(checkpoint, "base")
    return depth > 1 or known.get(key) == projector_type(1, sequential=True)


def _unimoe_json(checkpoint: Checkpoint, model: ModelConfig, layout: Layout, is_8e: bool) -> None:
    made = decoder_json(model.decoder.model_copy(update={"moe": None}), {})
    sense = model.speech or model.audio
    depth, sound_depth = model.vision.connector.depth, sense.connector.projector_depth
    made |= {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama" if is_8e else "llava",
        "moe": model.decoder.moe is not None,
        "mm_vision_tower": "clip",
        "mm_audio_tower": "whisper" if model.speech else "beats.pt",
        "mm_vision_select_layer": model.vision.encoder.select_layer,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": projector_type(depth, depth > 1),
        "audio_projector_type": projector_type(sound_depth, sound_depth > 1),
        "mm_audio_select_layer": 0,
        "query_tokens_size": sense.connector.num_queries,
        "image_aspect_ratio": model.vision.aspect,
    }
    if model.decoder.moe:
        made["num_experts"] = model.decoder.moe.num_experts
        made["num_experts_per_tok"] = model.decoder.moe.top_k
    if is_8e:
        made["use_fm_block"] = model.decoder.moe.router.modality_map
    # PEFT never adapts 8e's experts: their adapters are built in.
    own = [rule for rule in model.lora if is_8e and "moe/experts" in rule.match]
    for rule in own:
        made |= {"lora_r": rule.rank, "lora_alpha": rule.alpha, "lora_dropout": rule.dropout}
    if model.audio:
        made["qformer_config"] = beats.to_qformer_json(model.audio.connector)
    for role in ("base", "tuned"):
        known = _known(checkpoint, role)
        known.pop("_peft", None)
        layout.json_files[f"{role}/config.json"] = made | known
    peft = next((rule for rule in model.lora if rule not in own), None)
    if peft is not None:
        known = _known(checkpoint, "tuned").get("_peft", {})
        settings = {"peft_type": "LORA", "r": peft.rank, "lora_alpha": peft.alpha}
        layout.json_files["tuned/adapter_config.json"] = settings | known
