"""Encoders and connectors: their settings, and which tensors fill them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from unimoe_jax.config import (
    AudioConfig,
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

# Stands for a decoder or connector that the sources do not have.
PLACEHOLDER = DecoderConfig(
    vocab_size=1, hidden_size=2, mlp_dim=1, num_layers=1, num_heads=1, num_kv_heads=1
)


def _reader_placeholder() -> QueryConnectorConfig:
    return QueryConnectorConfig(
        kind="qformer", num_queries=1, hidden_size=1, mlp_dim=1, num_layers=1, num_heads=1
    )


def encoder_excuses(roles: Iterable[str], model: ModelConfig) -> list[Excuse]:
    """Tensors of the encoders' folders that this model has no use for."""
    known = {"whisper": whisper.EXCUSES, "beats": beats.EXCUSES}
    if model.vision is not None:
        known["clip"] = clip.excuses(model.vision.encoder)
    return [excuse for role in roles for excuse in known.get(role, ())]


def _clip_part(source: SourceFolder, options: Options) -> tuple[VisionConfig, list[Copy]]:
    encoder = clip.clip_config(source.config, options.vision_layer)
    encoder = encoder.model_copy(update={"unread_layers": options.unread_layers})
    return VisionConfig(encoder=encoder), clip_copies(source, encoder)


def clip_copies(source: SourceFolder, encoder: Any) -> list[Copy]:
    prefix = "vision_model." if any(with_prefix(source.weights, "vision_model.")) else ""
    return clip.copies(encoder, "vision/encoder", f"clip:{prefix}")


def _whisper_part(source: SourceFolder, options: Options) -> tuple[SpeechConfig, list[Copy]]:
    encoder = whisper.whisper_config(source.config)
    speech = _speech(encoder, _reader_placeholder())
    return speech, whisper_copies(source, encoder)


def _speech(encoder: WhisperConfig, connector: QueryConnectorConfig) -> SpeechConfig:
    seconds, rest = divmod(2 * encoder.max_positions, 100)
    if rest:
        raise ConvertError(f"Whisper with {encoder.max_positions} positions: not whole seconds")
    return SpeechConfig(
        encoder=encoder, connector=connector, chunk_seconds=seconds, chunk_stride="reference"
    )


def whisper_copies(source: SourceFolder, encoder: WhisperConfig) -> list[Copy]:
    prefix = "model.encoder." if any(with_prefix(source.weights, "model.")) else "encoder."
    return whisper.encoder_copies(encoder, "speech/encoder", prefix)


def _beats_part(source: SourceFolder, options: Options) -> tuple[AudioConfig, list[Copy]]:
    encoder = beats.beats_config(source.config)
    audio = AudioConfig(encoder=encoder, connector=_reader_placeholder())
    return audio, beats.encoder_copies(encoder, "audio/encoder")


ENCODERS: tuple[tuple[str, str, Callable], ...] = (
    ("clip", "vision", _clip_part),
    ("whisper", "speech", _whisper_part),
    ("beats", "audio", _beats_part),
)


def senses_of(
    sources: Sources, config: Mapping[str, Any], groups: Mapping[str, Tensors], sense: str
) -> tuple[dict[str, Any], list[Copy]]:
    """A Uni-MoE's vision and its `sense` (speech or audio) as settings, and their copies.

    Images are cut to a square whatever `image_aspect_ratio` says: released configs hold "pad", and
    nothing in the originals reads it.

    Raises:
        ConvertError: a setting of `ONLY` has another value, or a connector is missing or of
            another kind than its settings say.
    """
    require("config.json", config, **ONLY)
    depth, sequential = _projector(groups, ".mm_projector.", config, "mm_projector_type")
    encoder = clip.clip_config(sources["clip"].config, config["mm_vision_select_layer"])
    vision = VisionConfig(encoder=encoder, connector=MlpConnectorConfig(depth=depth))
    copies = clip_copies(sources["clip"], encoder) + unimoe.vision_connector(depth, sequential)
    if sense == "speech":
        part, more = _speech_sense(sources["whisper"], config, groups)
    else:
        part, more = _audio_sense(sources["beats"], config, groups)
    return {"vision": vision, sense: part}, copies + more


# Which features are read, and that no token of its own stands before and after an image.
ONLY = {
    "mm_vision_select_feature": "patch",
    "mm_audio_select_layer": 0,
    "mm_use_im_start_end": False,
}
ALIGNER = "model.mm_audio_aligner"
ALIGNERS = ("base", "base_aligner", "aligner")


def projector_type(depth: int, sequential: bool) -> str:
    """The originals' word for `depth` linear layers with GELU in between, numbered or one bare."""
    return f"mlp{depth}x_gelu" if sequential else "linear"


def _projector(
    groups: Mapping[str, Tensors], mark: str, config: Mapping[str, Any], key: str
) -> tuple[int, bool]:
    """(linear layers, whether they are numbered) of a projector, from whichever group has it."""
    for tensors in groups.values():
        tails = [n.split(mark)[1] for n in tensors if mark in n and n.endswith(".weight")]
        if not tails:
            continue
        found = len(tails), tails != ["weight"]
        if config.get(key) not in (None, projector_type(*found)):
            raise ConvertError(
                f"config.json: {key} {config[key]!r} is not what the tensors named …{mark}… are, "
                f"{projector_type(*found)!r}"
            )
        return found
    raise ConvertError(f"no file has tensors named …{mark}…; is a folder missing? add --from")


def _queries(groups: Mapping[str, Tensors], name: str) -> int:
    for group in reversed(ALIGNERS):
        tensor = groups.get(group, {}).get(name)
        if tensor is not None:
            return tensor.shape[-2]
    raise ConvertError(f"no file has the learned queries {name!r}")


def connector_copies(config: QueryConnectorConfig, sense: str, sequential: bool) -> list[Copy]:
    """Queries, reader and projector of the sound side, from every file that may hold them."""
    is_whisper = config.kind == "whisper_decoder"
    queries = "model.query_tokens" if is_whisper else f"{ALIGNER}.query_tokens"
    dst, copies = f"{sense}/connector", []
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


def _speech_sense(source: SourceFolder, config: Mapping[str, Any], groups: Mapping[str, Tensors]):
    depth, sequential = _projector(groups, f"{ALIGNER}.projector.", config, "audio_projector_type")
    queries = _queries(groups, "model.query_tokens")
    connector = whisper.reader_config(source.config, queries, depth)
    encoder = whisper.whisper_config(source.config)
    copies = whisper_copies(source, encoder) + connector_copies(connector, "speech", sequential)
    return _speech(encoder, connector), copies


def _audio_sense(source: SourceFolder, config: Mapping[str, Any], groups: Mapping[str, Tensors]):
    depth, sequential = _projector(groups, f"{ALIGNER}.projector.", config, "audio_projector_type")
    queries = _queries(groups, f"{ALIGNER}.query_tokens")
    connector = beats.qformer_config(config.get("qformer_config", {}), queries, depth)
    encoder = beats.beats_config(source.config)
    copies = beats.encoder_copies(encoder, "audio/encoder")
    copies += connector_copies(connector, "audio", sequential)
    return AudioConfig(encoder=encoder, connector=connector), copies
