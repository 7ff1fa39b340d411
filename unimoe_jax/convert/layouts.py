"""Decide which file of an exported folder holds which tensor, and write config.json for it.

Every format has one function that returns a `Layout`: `_hugging_face`, `_cumo` and `_unimoe`. The
tensors come from the tables that also serve imports; `exporting` runs them backwards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from unimoe_jax.config import AudioConfig, DecoderConfig, ModelConfig, SpeechConfig
from unimoe_jax.convert.branches import PLACEHOLDER, connector_copies, projector_type
from unimoe_jax.convert.entry import LINEAR, Copy
from unimoe_jax.convert.opening import Checkpoint
from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.convert.recognise import CUMO_FILES, PROCESSOR_FILE, TOKENIZER_FILES, TUNED_FILES
from unimoe_jax.convert.tables import beats, clip, cumo, llama, mixtral, unimoe, whisper


@dataclass
class Layout:
    """How one checkpoint is exported.

    Attributes:
        copies: the copies of an import, to be run backwards.
        files: group of the copies -> file. The name WEIGHTS stands for shards with an index. Other
            names get the suffix of the chosen file format, unless they end in .bin already or the
            file is `wrapped`.
        json_files: file -> its content.
        side_files: file -> tokenizer or processor file that is copied there.
        wrapped: file -> what a torch file holds beside `model`.
    """

    copies: list[Copy]
    files: dict[str, str]
    json_files: dict[str, dict[str, Any]] = field(default_factory=dict)
    side_files: dict[str, Path] = field(default_factory=dict)
    wrapped: dict[str, dict[str, Any]] = field(default_factory=dict)


Format = Literal["unimoe", "cumo", "hf"]
FORMAT_CONTENTS = (
    "unimoe (vision and one of speech and audio), cumo (vision alone), hf (decoder and encoders, "
    "no connectors, no adapters)"
)


def layout_of(checkpoint: Checkpoint, format_: Format) -> Layout:
    """Lay out the files of a checkpoint in one of the original formats.

    Raises:
        ConvertError: the format cannot hold this model.
    """
    layouts = {"unimoe": _unimoe, "cumo": _cumo, "hf": _hugging_face}
    return layouts[format_](checkpoint)


def unfit(checkpoint: Checkpoint, reason: str) -> ConvertError:
    """The error for a model that the format cannot hold."""
    return ConvertError(
        f"{checkpoint.path}: {reason}; choose a --format that holds it: {FORMAT_CONTENTS}"
    )


def _imported_config(checkpoint: Checkpoint, role: str) -> dict[str, Any]:
    """config.json of the source folder with this role; empty if the checkpoint is no import."""
    return dict(checkpoint.manifest.get("source_configs", {}).get(role, {}))


def _whole_model(checkpoint: Checkpoint) -> ModelConfig:
    """The settings as a whole model, with placeholders for a missing decoder or connector.

    Format hf exports encoders without a decoder or connectors, but `ModelConfig` requires both.
    """
    config = {key: value for key, value in checkpoint.config.items() if key != "lora"}
    connector = {
        "kind": "qformer",
        "num_queries": 1,
        "hidden_size": 1,
        "mlp_dim": 1,
        "num_layers": 1,
        "num_heads": 1,
    }
    config.setdefault("decoder", PLACEHOLDER.model_dump())
    for branch in ("speech", "audio"):
        if branch in config:
            config[branch] = {"connector": connector} | config[branch]
    if "speech" in config:
        # Whisper's encoder has 50 positions per second of sound, 1500 unless it says otherwise.
        seconds = config["speech"]["encoder"].get("max_positions", 1500) // 50
        config["speech"] = {"chunk_seconds": seconds} | config["speech"]
    return ModelConfig.model_validate({**config, "lora": checkpoint.config.get("lora", ())})


def decoder_json(config: DecoderConfig, imported: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a LLaMA or Mixtral folder.

    The entries of `imported`, the config.json that an import read, replace those made here.
    """
    moe = config.moe
    content = {
        "architectures": ["LlamaForCausalLM" if moe is None else "MixtralForCausalLM"],
        "model_type": "llama" if moe is None else "mixtral",
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
    if moe is not None:
        content |= {"num_local_experts": moe.num_experts, "sliding_window": None}
        content["num_experts_per_tok"] = moe.top_k
    return content | dict(imported)


# ---------------------------------------------------------------------------- transformers


def _hugging_face(checkpoint: Checkpoint) -> Layout:
    """Lay out folders `decoder`, `clip`, `whisper` and the file `beats.pt`, for the parts present.

    Raises:
        ConvertError: only some decoder layers have experts.
    """
    model, config = _whole_model(checkpoint), checkpoint.config
    layout = Layout([], {})
    if "decoder" in config:
        moe = model.decoder.moe
        if moe is not None and not all(model.decoder.moe_layers()):
            raise unfit(checkpoint, "format hf holds experts in all layers (Mixtral) or in none")
        layout.copies += (mixtral if moe else llama).copies(model.decoder)
        layout.files["base"] = "decoder/WEIGHTS"
        layout.json_files["decoder/config.json"] = decoder_json(
            model.decoder, _imported_config(checkpoint, "decoder")
        )
        _add_tokenizer(checkpoint, layout, "decoder")
    _add_encoders(checkpoint, model, layout)
    return layout


def _add_encoders(checkpoint: Checkpoint, model: ModelConfig, layout: Layout) -> None:
    """Add each encoder of the model with its config.json and processor settings.

    The config.json that an import read is exported unchanged; otherwise it is made from the model.
    """
    if model.vision is not None:
        layout.copies += clip.copies(model.vision.encoder, "vision/encoder")
        layout.files["clip"] = "clip/WEIGHTS"
        content = _imported_config(checkpoint, "clip") or clip.to_json(model.vision.encoder)
        layout.json_files["clip/config.json"] = content
        _add_processor(checkpoint, layout, "clip")
    if model.speech is not None:
        layout.copies += whisper.encoder_copies(model.speech.encoder, "speech/encoder")
        layout.files["whisper"] = "whisper/WEIGHTS"
        content = _imported_config(checkpoint, "whisper") or whisper.to_json(
            model.speech.encoder, model.speech.connector
        )
        layout.json_files["whisper/config.json"] = content
        _add_processor(checkpoint, layout, "whisper")
    if model.audio is not None:
        # BEATs is one torch file that holds its settings beside its weights.
        layout.copies += beats.encoder_copies(model.audio.encoder, "audio/encoder")
        layout.files["beats"] = "beats.pt"
        content = _imported_config(checkpoint, "beats") or beats.to_cfg(model.audio.encoder)
        layout.wrapped["beats.pt"] = {"cfg": content}


def _add_tokenizer(checkpoint: Checkpoint, layout: Layout, folder: str) -> None:
    for name in TOKENIZER_FILES:
        if name in checkpoint.files:
            layout.side_files[f"{folder}/{name}"] = checkpoint.files[name]


def _add_processor(checkpoint: Checkpoint, layout: Layout, role: str) -> None:
    file = checkpoint.path / f"{role}_{PROCESSOR_FILE}"
    if file.is_file():
        layout.side_files[f"{role}/{PROCESSOR_FILE}"] = file


# ---------------------------------------------------------------------------------- CuMo


def _cumo(checkpoint: Checkpoint) -> Layout:
    """Lay out one folder as a stage of CuMo saves it.

    A model with experts in encoder or connector is stored in shards entirely. Without them, encoder
    and connector are the files `clip.bin` and `mm_projector.bin`, which the original reads with
    torch.

    Raises:
        ConvertError: CuMo has no such model.
    """
    model = _whole_model(checkpoint)
    # Refuse every model that CuMo cannot represent.
    if model.vision is None or model.speech or model.audio:
        raise unfit(checkpoint, "format cumo holds a vision encoder and no other")
    if model.decoder.tie_embeddings:
        raise unfit(checkpoint, "format cumo has no tied embeddings")
    if not all(model.decoder.moe_layers()) and model.decoder.moe:
        raise unfit(checkpoint, "format cumo holds a decoder with experts in all layers or in none")
    # Weights.
    layout = Layout(cumo.decoder_copies(model.decoder), {"base": "WEIGHTS"})
    if model.vision.encoder.moe or model.vision.connector.moe:
        layout.copies += cumo.vision_in_shards(model.vision)
    else:
        layout.copies += cumo.vision_in_files(model.vision)
        layout.files |= {group: f"{stem}.bin" for group, stem in CUMO_FILES.items()}
    # Settings. An encoder that the original cannot fetch by name gets a folder `clip`.
    imported = _imported_config(checkpoint, "cumo")
    content = cumo.to_json(model, decoder_json(model.decoder, imported) | imported)
    layout.json_files["config.json"] = content
    if content["mm_vision_tower"] == "clip":
        layout.json_files["clip/config.json"] = clip.to_json(model.vision.encoder)
        _add_processor(checkpoint, layout, "clip")
    _add_tokenizer(checkpoint, layout, ".")
    return layout


# ------------------------------------------------------------------------------- Uni-MoE


def _unimoe(checkpoint: Checkpoint) -> Layout:
    """Lay out folders `base` and `tuned`, `experts` for an 8e model, and the encoders.

    Raises:
        ConvertError: Uni-MoE has no such model.
    """
    model = checkpoint.model
    if model.vision is None or (model.speech is None) == (model.audio is None):
        raise unfit(checkpoint, "format unimoe holds a vision encoder and one of speech and audio")
    if model.decoder.tie_embeddings:
        raise unfit(checkpoint, "format unimoe has no tied embeddings")
    layout = Layout([], {group: f"tuned/{stem}" for group, stem in TUNED_FILES.items()})
    layout.files["base"] = "base/WEIGHTS"
    # The decoder. A model with modality maps in its routers is exported as 8e.
    has_maps = any("/moe/router/modality_map/" in path for path in checkpoint.params)
    is_8e = has_maps or checkpoint.manifest.get("family") == "unimoe-8e"
    if is_8e:
        _add_8e_decoder(checkpoint, model.decoder, layout)
    else:
        layout.copies += unimoe.decoder(model.decoder)
    layout.copies += _peft_copies(layout.copies, checkpoint)
    # The connectors. `_unimoe_json` says how many layers their projectors have.
    name, branch = _sound_branch(model)
    depth = model.vision.connector.depth
    is_numbered = _is_sequential(checkpoint, "mm_projector_type", depth)
    layout.copies += unimoe.vision_connector(depth, is_numbered)
    depth = branch.connector.projector_depth
    is_numbered = _is_sequential(checkpoint, "audio_projector_type", depth)
    layout.copies += connector_copies(branch.connector, name, is_numbered)
    _add_encoders(checkpoint, model, layout)
    _add_tokenizer(checkpoint, layout, "tuned")
    _unimoe_json(checkpoint, model, layout, is_8e)
    return layout


def _sound_branch(model: ModelConfig) -> tuple[str, SpeechConfig | AudioConfig]:
    """Name and settings of the only sound branch of a Uni-MoE, speech or audio."""
    if model.audio is not None:
        return "audio", model.audio
    assert model.speech is not None  # `_unimoe` has refused models without sound
    return "speech", model.speech


def _add_8e_decoder(checkpoint: Checkpoint, decoder: DecoderConfig, layout: Layout) -> None:
    """Add the decoder of an 8e model, with one adapter file and one weight file per expert.

    Raises:
        ConvertError: the decoder has no experts.
    """
    if decoder.moe is None:
        raise unfit(checkpoint, "an 8e model of format unimoe has experts in its decoder")
    has_dense_adapters = any(re.search(r"/mlp/\w+/lora_a$", path) for path in checkpoint.params)
    layout.copies += unimoe.decoder_8e(decoder, 1, has_dense_adapters)
    for expert, name in enumerate(unimoe.EXPERT_FILES[: decoder.moe.num_experts]):
        layout.files[f"rank{expert}"] = f"tuned/{expert}_mlp_experts"
        layout.files[f"mlp{expert}"] = f"experts/{name}"


def _peft_copies(copies: list[Copy], checkpoint: Checkpoint) -> list[Copy]:
    """Copies of the adapters that PEFT stores in adapter_model.

    Adapters that `copies` already store elsewhere, such as those built into the experts of 8e, are
    left out. A kernel may have several copies, but its adapter is stored once.
    """
    stored = {(copy.dst, copy.index) for copy in copies}
    peft_copies: dict[tuple[str, tuple[int, ...]], Copy] = {}
    for copy in copies:
        name, module = unimoe.peft_name(copy), copy.dst.removesuffix("/kernel")
        if name is None or f"{module}/lora_a" not in checkpoint.params:
            continue
        for matrix in "AB":
            dst = f"{module}/lora_{matrix.lower()}"
            if (dst, copy.index) not in stored:
                src = f"peft:{name}.lora_{matrix}.weight"
                peft_copies[dst, copy.index] = Copy(src, dst, copy.index, LINEAR, ())
    return list(peft_copies.values())


def _is_sequential(checkpoint: Checkpoint, key: str, depth: int) -> bool:
    """Whether the linear layers of a projector are numbered in the original.

    Several layers always are. One layer may be either; the config.json of an import says which.
    """
    imported = _imported_config(checkpoint, "tuned") or _imported_config(checkpoint, "base")
    return depth > 1 or imported.get(key) == projector_type(1, sequential=True)


def _unimoe_json(checkpoint: Checkpoint, model: ModelConfig, layout: Layout, is_8e: bool) -> None:
    """Add config.json of `base` and `tuned`, and adapter_config.json if PEFT has adapters."""
    assert model.vision is not None  # `_unimoe` has refused models without vision
    # The original keeps the settings of the experts outside the decoder's settings.
    content = decoder_json(model.decoder.model_copy(update={"moe": None}), {})
    _, branch = _sound_branch(model)
    depth, sound_depth = model.vision.connector.depth, branch.connector.projector_depth
    content |= {
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
        "query_tokens_size": branch.connector.num_queries,
        "image_aspect_ratio": model.vision.aspect,
    }
    if moe := model.decoder.moe:
        content["num_experts"] = moe.num_experts
        content["num_experts_per_tok"] = moe.top_k
        if is_8e:
            content["use_fm_block"] = moe.router.modality_map
    # The adapters of 8e's experts are built in, so they are settings of the model, not of PEFT.
    builtin_rules = [rule for rule in model.lora if is_8e and "moe/experts" in rule.match]
    for rule in builtin_rules:
        content |= {"lora_r": rule.rank, "lora_alpha": rule.alpha, "lora_dropout": rule.dropout}
    if model.audio:
        content["qformer_config"] = beats.to_qformer_json(model.audio.connector)
    # The entries that an import read replace those made here. `_peft` is the import's copy of
    # adapter_config.json, which is a separate file.
    for role in ("base", "tuned"):
        imported = _imported_config(checkpoint, role)
        imported.pop("_peft", None)
        layout.json_files[f"{role}/config.json"] = content | imported
    peft_rule = next((rule for rule in model.lora if rule not in builtin_rules), None)
    if peft_rule is not None:
        imported = _imported_config(checkpoint, "tuned").get("_peft", {})
        settings = {"peft_type": "LORA", "r": peft_rule.rank, "lora_alpha": peft_rule.alpha}
        layout.json_files["tuned/adapter_config.json"] = settings | imported
