"""From recognised sources to a `Plan`: one function per family of models."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
from unimoe_jax.convert.family import TOKENIZER_FILES, Source
from unimoe_jax.convert.plan import Plan
from unimoe_jax.convert.reader import ConvertError, Tensors, read_json, with_prefix
from unimoe_jax.convert.tables import beats, clip, llama, mixtral, unimoe, whisper

Sources = Mapping[str, Source]


@dataclass(frozen=True)
class Options:
    """What the user may choose.

    lora: merge PEFT's adapters into their kernels, or keep them apart (8e's built-in expert
        adapters always stay apart, as in the originals).
    router_lora: override: mlp_gates replaces the merged routers, so their adapters are lost, as in
        released inference; merge: the routers' adapters take part, as in training.
    vision_layer: selected hidden state of a CLIP imported on its own.
    """

    lora: Literal["merge", "keep"] = "merge"
    router_lora: Literal["override", "merge"] = "override"
    vision_layer: int = -2


def plan_of(sources: Sequence[Source], options: Options = Options()) -> Plan:
    """The plan for a set of sources.

    Raises:
        ConvertError: they do not make a model together.
    """
    by_role = {source.role: source for source in sources}
    family = "unimoe" if "base" in by_role or "tuned" in by_role else "parts"
    return FAMILIES[family](by_role, options)


# ------------------------------------------------------------------------- separate folders

PLACEHOLDER = DecoderConfig(
    vocab_size=1, hidden_size=2, mlp_dim=1, num_layers=1, num_heads=1, num_kv_heads=1
)


def _reader_placeholder() -> QueryConnectorConfig:
    return QueryConnectorConfig(
        kind="qformer", num_queries=1, hidden_size=1, mlp_dim=1, num_layers=1, num_heads=1
    )


def plan_parts(sources: Sources, options: Options) -> Plan:
    """Encoders and a text decoder from their own folders; connectors are left to training."""
    unknown = set(sources) - {"clip", "whisper", "beats", "decoder"}
    if unknown:
        raise ConvertError(f"{sorted(unknown)} come with a base and a fine-tune folder only")
    copies: list[Copy] = []
    excuses: list[Excuse] = []
    model, config, parts, groups = ModelConfig(decoder=PLACEHOLDER), {}, [], {}
    if source := sources.get("decoder"):
        is_mixtral = source.config["model_type"] == "mixtral"
        table = mixtral if is_mixtral else llama
        decoder = (mixtral.mixtral_config if is_mixtral else llama.decoder_config)(source.config)
        model = model.model_copy(update={"decoder": decoder})
        copies += table.copies(decoder)
        excuses += table.EXCUSES
        if decoder.tie_embeddings:
            excuses.append(Excuse(r"base:lm_head\.weight", "tied to the embedding"))
        parts += ["embed/", "decoder/", "lm_head/"]
        config["decoder"] = decoder.model_dump(mode="json")
    for role, sense, build in ENCODERS:
        if source := sources.get(role):
            part, made = build(source, options)
            model = model.model_copy(update={sense: part})
            copies += made
            parts.append(f"{sense}/encoder/")
            config[sense] = {"encoder": part.encoder.model_dump(mode="json")}
    for source in sources.values():
        groups |= source.groups
        excuses += ENCODER_EXCUSES.get(source.role, ())
    files = _side_files(
        [sources[role] for role in ("clip", "whisper", "decoder") if role in sources]
    )
    return Plan("+".join(sources), model, tuple(parts), groups, copies, excuses, config, files)


ENCODER_EXCUSES = {"clip": clip.EXCUSES, "whisper": whisper.EXCUSES, "beats": beats.EXCUSES}


def _clip_part(source: Source, options: Options) -> tuple[VisionConfig, list[Copy]]:
    encoder = clip.clip_config(source.config, options.vision_layer)
    return VisionConfig(encoder=encoder), _clip_copies(source, encoder)


def _clip_copies(source: Source, encoder: Any) -> list[Copy]:
    prefix = "vision_model." if any(with_prefix(source.weights, "vision_model.")) else ""
    return clip.copies(encoder, "vision/encoder", prefix)


def _whisper_part(source: Source, options: Options) -> tuple[SpeechConfig, list[Copy]]:
    encoder = whisper.whisper_config(source.config)
    speech = _speech(encoder, _reader_placeholder())
    return speech, _whisper_copies(source, encoder)


def _speech(encoder: WhisperConfig, connector: QueryConnectorConfig) -> SpeechConfig:
    seconds, rest = divmod(2 * encoder.max_positions, 100)
    if rest:
        raise ConvertError(f"Whisper with {encoder.max_positions} positions: not whole seconds")
    return SpeechConfig(
        encoder=encoder, connector=connector, chunk_seconds=seconds, chunk_stride="reference"
    )


def _whisper_copies(source: Source, encoder: WhisperConfig) -> list[Copy]:
    prefix = "model.encoder." if any(with_prefix(source.weights, "model.")) else "encoder."
    return whisper.encoder_copies(encoder, "speech/encoder", prefix)


def _beats_part(source: Source, options: Options) -> tuple[AudioConfig, list[Copy]]:
    encoder = beats.beats_config(source.config)
    audio = AudioConfig(encoder=encoder, connector=_reader_placeholder())
    return audio, beats.encoder_copies(encoder, "audio/encoder")


ENCODERS: tuple[tuple[str, str, Callable], ...] = (
    ("clip", "vision", _clip_part),
    ("whisper", "speech", _whisper_part),
    ("beats", "audio", _beats_part),
)


def _side_files(sources: Sequence[Source]) -> dict[str, Any]:
    """Tokenizer files of the last source that has them, each encoder's processor beside them."""
    files = {}
    for source in sources:
        for name, path in source.files.items():
            if name in TOKENIZER_FILES and source.role in ("decoder", "base", "tuned"):
                files[name] = path
            elif name not in TOKENIZER_FILES:
                files[f"{source.role}_{name}"] = path
    return files


# ---------------------------------------------------------------------------------- Uni-MoE


def plan_unimoe(sources: Sources, options: Options) -> Plan:
    """A Uni-MoE base, with or without its fine-tune, and its encoders."""
    for role in ("base", "clip"):
        if role not in sources:
            raise ConvertError(f"Uni-MoE needs its {role} folder as well: add --from")
    sense = "audio" if "beats" in sources else "speech"
    if sense == "speech" and "whisper" not in sources:
        raise ConvertError("Uni-MoE needs its audio encoder as well: Whisper or BEATs; add --from")
    groups: dict[str, Tensors] = {}
    for source in sources.values():
        groups |= source.groups
    tuned = sources.get("tuned")
    is_8e = tuned is not None and any("deepspeed_moe" in name for name in groups.get("gates", ()))
    config = _unimoe_config(sources, is_8e)
    text, copies, excuses, notes = (_text_8e if is_8e else _text)(sources, config, groups)
    senses, more = _senses(sources, config, groups, sense)
    peft = tuned.config["_peft"] if tuned else {}
    copies = [*copies, *more]
    if peft and "peft" in groups:
        scale, use_router = peft["lora_alpha"] / peft["r"], options.router_lora == "merge"
        names = set(groups["peft"])
        copies = unimoe.with_adapters(copies, names, scale, options.lora == "merge", use_router)
        if not use_router:
            excuses.append(unimoe.DROPPED_ROUTER_LORA)
        notes = (*notes, f"PEFT scale: {scale}")
    own = None
    if is_8e:
        own = (config["lora_r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    model = ModelConfig(decoder=text, lora=unimoe.lora_rules(copies, peft, own), **senses)
    for role in ("clip", "whisper", "beats"):
        excuses += ENCODER_EXCUSES[role] if role in sources else ()
    order = [sources[r] for r in ("clip", "whisper", "base", "tuned") if r in sources]
    return Plan(
        family="unimoe-8e" if is_8e else f"unimoe-{sense}",
        model=model,
        parts=("",),
        groups=groups,
        copies=copies,
        excuses=excuses,
        config=model.model_dump(mode="json", exclude_none=True),
        files=_side_files(order),
        notes=(f"PEFT adapters: {options.lora}", f"router adapters: {options.router_lora}", *notes),
    )


def _unimoe_config(sources: Sources, is_8e: bool) -> Mapping[str, Any]:
    """4-expert models read the fine-tune's config, as their loader does; 8e's knows its experts."""
    candidates = [sources[role].config for role in ("tuned", "base") if role in sources]
    if is_8e:
        # The released base serves two models and keeps 8e's settings beside its own.
        beside = sources["base"].path / "8config.json"
        candidates += [read_json(beside)] if beside.is_file() else []
        candidates.sort(key=lambda config: "lora_r" not in config)
        if "lora_r" not in candidates[0]:
            raise ConvertError("8e: no config.json (or 8config.json) has lora_r and lora_alpha")
    return candidates[0]


def _text(sources: Sources, config: Mapping[str, Any], groups: Mapping[str, Tensors]):
    base = groups["base"]
    layers = unimoe.moe_layers(base)
    moe = None
    if layers:
        prefix = f"model.layers.{layers[0]}.mlp.experts."
        count = len({name[len(prefix) :].split(".")[0] for name in with_prefix(base, prefix)})
        moe = unimoe.moe_config(config, count, layers, is_8e=False, fm=False)
    decoder = llama.decoder_config(config, moe)
    return decoder, unimoe.decoder(decoder), list(unimoe.EXCUSES), ()


def _text_8e(sources: Sources, config: Mapping[str, Any], groups: dict[str, Tensors]):
    if "experts" not in sources:
        raise ConvertError("Uni-MoE 8e needs its experts folder (mlp_*.bin) as well: add --from")
    files = [group for group in groups if group.startswith("file")]
    count = config["num_experts"]
    if not files or count % len(files) or count > len(unimoe.EXPERT_FILES):
        raise ConvertError(f"8e: {count} experts do not lie in {len(files)} rank files")
    local = count // len(files)
    for expert, name in enumerate(unimoe.EXPERT_FILES[:count]):
        if name not in groups:
            raise ConvertError(f"{sources['experts'].path}: expert {expert} needs {name}.bin")
        groups[f"mlp{expert}"] = groups[name]
        mark = f".deepspeed_experts.{expert % local}."
        mine = groups[f"file{expert // local}"]
        groups[f"rank{expert}"] = {key: value for key, value in mine.items() if mark in key}
    for name in [*files, *sources["experts"].groups]:
        del groups[name]
    layers = unimoe.moe_layers(groups["gates"])
    moe = unimoe.moe_config(config, count, layers, is_8e=True, fm="fm" in groups)
    decoder = llama.decoder_config(config, moe)
    dense = any("mlp.gate_proj_lora_A" in name for name in groups["base"])
    copies = unimoe.decoder_8e(decoder, local, dense)
    notes = ("the second expert is the second best; router.sample_second draws it as released",)
    excuses = [*unimoe.EXCUSES, *unimoe.EXCUSES_8E, *_dense_experts(layers, decoder.num_layers)]
    return decoder, copies, excuses, notes


def _dense_experts(layers: Sequence[int], num_layers: int) -> list[Excuse]:
    dense = [str(layer) for layer in range(num_layers) if layer not in layers]
    if not dense:
        return []
    match = rf"mlp\d+:model\.layers\.({'|'.join(dense)})\.mlp\..*"
    return [Excuse(match, "expert files hold all layers; these layers are dense")]


def _senses(sources: Sources, config: Mapping[str, Any], groups: Mapping[str, Tensors], sense: str):
    depth, sequential = _projector(groups, ".mm_projector.")
    encoder = clip.clip_config(sources["clip"].config, config["mm_vision_select_layer"])
    vision = VisionConfig(
        encoder=encoder,
        connector=MlpConnectorConfig(depth=depth),
        aspect="pad" if config.get("image_aspect_ratio") == "pad" else "square",
    )
    copies = _clip_copies(sources["clip"], encoder) + unimoe.vision_connector(depth, sequential)
    if sense == "speech":
        part, more = _speech_sense(sources["whisper"], groups)
    else:
        part, more = _audio_sense(sources["beats"], config, groups)
    return {"vision": vision, sense: part}, copies + more


ALIGNERS = ("base", "base_aligner", "aligner")


def _projector(groups: Mapping[str, Tensors], mark: str) -> tuple[int, bool]:
    """(linear layers, whether they are numbered) of a projector, from whichever group has it."""
    for tensors in groups.values():
        tails = [n.split(mark)[1] for n in tensors if mark in n and n.endswith(".weight")]
        if tails:
            return len(tails), tails != ["weight"]
    raise ConvertError(f"no file has tensors named …{mark}…")


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


ALIGNER = "model.mm_audio_aligner"


def _speech_sense(source: Source, groups: Mapping[str, Tensors]):
    depth, sequential = _projector(groups, ".mm_audio_aligner.projector.")
    queries = _queries(groups, "model.query_tokens")
    connector = whisper.reader_config(source.config, queries, depth)
    encoder = whisper.whisper_config(source.config)
    copies = _whisper_copies(source, encoder) + connector_copies(connector, "speech", sequential)
    return _speech(encoder, connector), copies


def _audio_sense(source: Source, config: Mapping[str, Any], groups: Mapping[str, Tensors]):
    depth, sequential = _projector(groups, ".mm_audio_aligner.projector.")
    queries = _queries(groups, f"{ALIGNER}.query_tokens")
    connector = beats.qformer_config(config.get("qformer_config", {}), queries, depth)
    encoder = beats.beats_config(source.config)
    copies = beats.encoder_copies(encoder, "audio/encoder")
    copies += connector_copies(connector, "audio", sequential)
    return AudioConfig(encoder=encoder, connector=connector), copies


FAMILIES: dict[str, Callable[[Sources, Options], Plan]] = {
    "parts": plan_parts,
    "unimoe": plan_unimoe,
}
