"""Branches of a model: settings of encoders and connectors, and the copies that fill them.

A branch is an encoder with its connector: vision, speech or audio. `ENCODERS` handles encoders from
separate folders, which have no connector; `branches_of` handles the two branches of a Uni-MoE.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from unimoe_jax.config import (
    AudioConfig,
    ClipConfig,
    DecoderConfig,
    MlpConnectorConfig,
    ModelConfig,
    QueryConnectorConfig,
    SpeechConfig,
    VisionConfig,
    WhisperConfig,
)
from unimoe_jax.convert.entry import Copy, Entry, Excuse, expand
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.reader import ConvertError, Tensors, require, with_prefix
from unimoe_jax.convert.recognise import SourceFolder
from unimoe_jax.convert.tables import beats, clip, unimoe, whisper

Sources = Mapping[str, SourceFolder]

# A decoder for models that have none: `ModelConfig` requires one, but this one is not converted.
PLACEHOLDER = DecoderConfig(
    vocab_size=1, hidden_size=2, mlp_dim=1, num_layers=1, num_heads=1, num_kv_heads=1
)


def _connector_placeholder() -> QueryConnectorConfig:
    """A connector for encoders that are imported without one, for the same reason."""
    return QueryConnectorConfig(
        kind="qformer", num_queries=1, hidden_size=1, mlp_dim=1, num_layers=1, num_heads=1
    )


def encoder_excuses(roles: Iterable[str], model: ModelConfig) -> list[Excuse]:
    """Excuses for the tensors in the encoders' folders that this model does not need."""
    known = {"whisper": whisper.EXCUSES, "beats": beats.EXCUSES}
    if model.vision is not None:
        known["clip"] = clip.excuses(model.vision.encoder)
    return [excuse for role in roles for excuse in known.get(role, ())]


# -------------------------------------------------------------------- encoders without connector


def _clip_branch(source: SourceFolder, options: Options) -> tuple[VisionConfig, list[Copy]]:
    """A vision branch that is only an encoder, and its copies."""
    encoder = clip.clip_config(source.config, options.vision_layer)
    encoder = encoder.model_copy(update={"unread_layers": options.unread_layers})
    return VisionConfig(encoder=encoder), clip_copies(source, encoder)


def clip_copies(source: SourceFolder, encoder: ClipConfig) -> list[Copy]:
    """Copies of CLIP, from its own folder."""
    # A CLIPVisionModel that transformers 5 has saved lacks the prefix.
    prefix = "vision_model." if any(with_prefix(source.weights, "vision_model.")) else ""
    return clip.copies(encoder, "vision/encoder", f"clip:{prefix}")


def _whisper_branch(source: SourceFolder, options: Options) -> tuple[SpeechConfig, list[Copy]]:
    """A speech branch that is only an encoder, and its copies."""
    encoder = whisper.whisper_config(source.config)
    speech = _speech(encoder, _connector_placeholder())
    return speech, whisper_copies(source, encoder)


def _speech(encoder: WhisperConfig, connector: QueryConnectorConfig) -> SpeechConfig:
    """A speech branch whose chunks fill all positions of the encoder."""
    # Whisper makes 100 frames per second, and its second convolution halves them.
    seconds, rest = divmod(2 * encoder.max_positions, 100)
    if rest:
        raise ConvertError(
            f"Whisper's config.json: {encoder.max_positions} positions do not make whole seconds; "
            "max_source_positions must be a multiple of 50"
        )
    return SpeechConfig(
        encoder=encoder, connector=connector, chunk_seconds=seconds, chunk_stride="reference"
    )


def whisper_copies(source: SourceFolder, encoder: WhisperConfig) -> list[Copy]:
    """Copies of Whisper's encoder, from its own folder."""
    # WhisperForConditionalGeneration has the prefix `model.`, WhisperModel does not.
    prefix = "model.encoder." if any(with_prefix(source.weights, "model.")) else "encoder."
    return whisper.encoder_copies(encoder, "speech/encoder", prefix)


def _beats_branch(source: SourceFolder, options: Options) -> tuple[AudioConfig, list[Copy]]:
    """An audio branch that is only an encoder, and its copies."""
    encoder = beats.beats_config(source.config)
    audio = AudioConfig(encoder=encoder, connector=_connector_placeholder())
    return audio, beats.encoder_copies(encoder, "audio/encoder")


# (role of the source, name of the branch, function that makes the branch and its copies).
ENCODERS: tuple[tuple[str, str, Callable], ...] = (
    ("clip", "vision", _clip_branch),
    ("whisper", "speech", _whisper_branch),
    ("beats", "audio", _beats_branch),
)


# ------------------------------------------------------------------------ branches of a Uni-MoE

# The only supported values. They say which features of the encoders are read, and that no special
# token stands before and after an image.
SUPPORTED = {
    "mm_vision_select_feature": "patch",
    "mm_audio_select_layer": 0,
    "mm_use_im_start_end": False,
}
ALIGNER = "model.mm_audio_aligner"
# Groups that may hold the connector of sound, in load order.
ALIGNERS = ("base", "base_aligner", "aligner")


def branches_of(
    sources: Sources, config: Mapping[str, Any], groups: Mapping[str, Tensors], sound: str
) -> tuple[dict[str, Any], list[Copy]]:
    """The branches of a Uni-MoE by name, vision and `sound` (speech or audio), and their copies.

    Images are cut to a square even if `image_aspect_ratio` is "pad", as in released configs,
    because nothing in the originals reads that setting.

    Args:
        config: config.json of the model.
        groups: group name -> tensors, of all sources.

    Raises:
        ConvertError: a setting has another value than in `SUPPORTED`, or a connector is missing,
            or its tensors are of another kind than the settings say.
    """
    require("config.json", config, **SUPPORTED)
    depth, sequential = _projector(groups, ".mm_projector.", config, "mm_projector_type")
    encoder = clip.clip_config(sources["clip"].config, config["mm_vision_select_layer"])
    vision = VisionConfig(encoder=encoder, connector=MlpConnectorConfig(depth=depth))
    copies = clip_copies(sources["clip"], encoder) + unimoe.vision_connector(depth, sequential)
    if sound == "speech":
        sound_branch, sound_copies = _speech_branch(sources["whisper"], config, groups)
    else:
        sound_branch, sound_copies = _audio_branch(sources["beats"], config, groups)
    return {"vision": vision, sound: sound_branch}, copies + sound_copies


def projector_type(depth: int, sequential: bool) -> str:
    """The originals' name for a projector of `depth` linear layers with GELU in between.

    sequential: the layers are numbered; else there is one layer without a number.
    """
    return f"mlp{depth}x_gelu" if sequential else "linear"


def _projector(
    groups: Mapping[str, Tensors], mark: str, config: Mapping[str, Any], key: str
) -> tuple[int, bool]:
    """(number of linear layers, whether they are numbered) of a projector.

    Args:
        mark: the part of a name that all tensors of the projector have.
        key: the setting that names the type of the projector, if `config` has it.
    """
    # The copies of all groups fill the same parameters, so the first group that has a projector
    # decides; a projector of another form in another group fails the checks of the plan.
    for tensors in groups.values():
        tails = [n.split(mark)[1] for n in tensors if mark in n and n.endswith(".weight")]
        if not tails:
            continue
        depth, sequential = len(tails), tails != ["weight"]
        type_of_tensors = projector_type(depth, sequential)
        if config.get(key) not in (None, type_of_tensors):
            raise ConvertError(
                f"config.json: {key} is {config[key]!r}, but the tensors named …{mark}… are of "
                f"type {type_of_tensors!r}; correct the setting"
            )
        return depth, sequential
    raise ConvertError(f"no file has tensors named …{mark}…; is a folder missing? add --from")


def _num_queries(groups: Mapping[str, Tensors], name: str) -> int:
    """Number of learned queries, from the shape [1, queries, width] in the group loaded last."""
    for group in reversed(ALIGNERS):
        tensor = groups.get(group, {}).get(name)
        if tensor is not None:
            return tensor.shape[-2]
    raise ConvertError(f"no file has the learned queries {name!r}; is a folder missing? add --from")


def connector_copies(config: QueryConnectorConfig, branch: str, sequential: bool) -> list[Copy]:
    """Copies of the connector of sound: queries, transformer and projector.

    Every group that may hold the connector gets its copies; the last group that has a tensor wins.

    Args:
        branch: `speech` or `audio`.
        sequential: whether the linear layers of the projector are numbered.
    """
    is_whisper = config.kind == "whisper_decoder"
    queries = "model.query_tokens" if is_whisper else f"{ALIGNER}.query_tokens"
    dst, copies = f"{branch}/connector", []
    for group in ALIGNERS:
        copies += expand([Entry(f"{group}:{queries}", f"{dst}/queries", "1 q d -> q d")])
        src = f"{group}:{ALIGNER}."
        copies += unimoe.projector(
            f"{src}projector", f"{dst}/projector", config.projector_depth, sequential
        )
        if is_whisper:
            copies += whisper.reader_copies(config, f"{src}decoder.audio_decoder.", dst)
        else:
            copies += beats.qformer_copies(config, f"{src}qformer.qformer.", dst)
    return copies


def _speech_branch(
    source: SourceFolder, config: Mapping[str, Any], groups: Mapping[str, Tensors]
) -> tuple[SpeechConfig, list[Copy]]:
    """Whisper, read by a copy of its text decoder, and the copies of both."""
    depth, sequential = _projector(groups, f"{ALIGNER}.projector.", config, "audio_projector_type")
    queries = _num_queries(groups, "model.query_tokens")
    connector = whisper.reader_config(source.config, queries, depth)
    encoder = whisper.whisper_config(source.config)
    copies = whisper_copies(source, encoder) + connector_copies(connector, "speech", sequential)
    return _speech(encoder, connector), copies


def _audio_branch(
    source: SourceFolder, config: Mapping[str, Any], groups: Mapping[str, Tensors]
) -> tuple[AudioConfig, list[Copy]]:
    """BEATs, read by a Q-Former, and the copies of both."""
    depth, sequential = _projector(groups, f"{ALIGNER}.projector.", config, "audio_projector_type")
    queries = _num_queries(groups, f"{ALIGNER}.query_tokens")
    connector = beats.qformer_config(config.get("qformer_config", {}), queries, depth)
    encoder = beats.beats_config(source.config)
    copies = beats.encoder_copies(encoder, "audio/encoder")
    copies += connector_copies(connector, "audio", sequential)
    return AudioConfig(encoder=encoder, connector=connector), copies
