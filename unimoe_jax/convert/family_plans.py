"""From recognised sources to a `Plan`: one function per family of models."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from unimoe_jax.config import ModelConfig
from unimoe_jax.convert.branches import ENCODERS, PLACEHOLDER, Sources, encoder_excuses, senses_of
from unimoe_jax.convert.entry import Copy, Excuse
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import ConversionPlan
from unimoe_jax.convert.processor_checks import check_processor
from unimoe_jax.convert.reader import ConvertError, Tensors, read_json, with_prefix
from unimoe_jax.convert.recognise import TOKENIZER_FILES, TUNED_FILES, SourceFolder
from unimoe_jax.convert.tables import cumo, llama, mixtral, unimoe


def plan_of(sources: Sequence[SourceFolder], options: Options = Options()) -> ConversionPlan:
    """The plan for a set of sources.

    Raises:
        ConvertError: they do not make a model together.
    """
    for source in sources:
        _check_depth(source, sum(len(g) for s in sources for g in s.groups.values()))
        check_processor(source)
    by_role = {source.role: source for source in sources}
    families = {"cumo": "cumo", "base": "unimoe", "tuned": "unimoe"}
    found = [family for role, family in families.items() if role in by_role]
    if options.numerics == "released" and "unimoe" not in found:
        raise ConvertError("--numerics released is known for Uni-MoE alone")
    try:
        return FAMILIES[found[0] if found else "parts"](by_role, options)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join((error.title, *map(str, first["loc"])))
        message = f"{what}: {first['msg']}"
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        message = str(error)  # whatever a setting of the wrong kind provokes
    where = ", ".join(str(source.path) for source in sources)
    raise ConvertError(f"the configuration in {where} describes no model: {message}")


def _check_depth(source: SourceFolder, num_tensors: int) -> None:
    """A hostile number of layers must not fill the memory with a table of them."""
    for key, value in source.config.items():
        if key.endswith("layers") and isinstance(value, int) and value > num_tensors:
            raise ConvertError(
                f"{source.path}: {key} is {value:,}, but there are {num_tensors:,} tensors"
            )


# ------------------------------------------------------------------------- separate folders


def plan_parts(sources: Sources, options: Options) -> ConversionPlan:
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
        if is_mixtral:
            decoder = mixtral.mixtral_config(source.config)
        else:
            decoder = llama.decoder_config(source.config, kind=source.config["model_type"])
        model = model.model_copy(update={"decoder": decoder})
        copies += table.copies(decoder)
        excuses += table.EXCUSES
        if decoder.tie_embeddings:
            excuses.append(llama.TIED)
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
    excuses += encoder_excuses(sources, model)
    files = _side_files(
        [sources[role] for role in ("clip", "whisper", "decoder") if role in sources]
    )
    return ConversionPlan(
        "+".join(sources), model, tuple(parts), groups, copies, excuses, config, files
    )


def _side_files(sources: Sequence[SourceFolder]) -> dict[str, Any]:
    """Tokenizer files of the last source that has them, each encoder's processor beside them."""
    files = {}
    for source in sources:
        for name, path in source.files.items():
            if name in TOKENIZER_FILES and source.role in ("decoder", "base", "tuned", "cumo"):
                files[name] = path
            elif name not in TOKENIZER_FILES:
                files[f"{source.role}_{name}"] = path
    return files


# ---------------------------------------------------------------------------------- Uni-MoE


def plan_unimoe(sources: Sources, options: Options) -> ConversionPlan:
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
    peft = _peft(tuned, groups) if tuned else {}
    is_8e = tuned is not None and any("deepspeed_moe" in name for name in groups.get("gates", ()))
    config = _unimoe_config(sources, is_8e)
    text, copies, excuses, notes = (_text_8e if is_8e else _text)(sources, config, groups)
    senses, more = senses_of(sources, config, groups, sense)
    copies = [*copies, *more]
    if peft:
        scale, use_router = peft["lora_alpha"] / peft["r"], options.takes_router_lora
        names = set(groups["peft"])
        copies = unimoe.with_adapters(copies, names, scale, options.lora == "merge", use_router)
        if not peft.get("layers_to_transform"):
            unimoe.check_adapters(copies, peft.get("target_modules"))
        if not use_router:
            excuses.append(unimoe.DROPPED_ROUTER_LORA)
        notes = (*notes, f"PEFT scale: {scale}")
    own = None
    if is_8e and "lora_r" in config:
        own = (config["lora_r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    rounding = unimoe.rounding(is_8e, sense) if options.numerics == "released" else None
    if rounding is not None:
        text = text.model_copy(update={"rope_table_dtype": rounding.rope_table})
    model = ModelConfig(decoder=text, lora=unimoe.lora_rules(copies, peft, own), **senses)
    excuses += encoder_excuses(sources, model)
    order = [sources[r] for r in ("clip", "whisper", "base", "tuned") if r in sources]
    return ConversionPlan(
        family="unimoe-8e" if is_8e else f"unimoe-{sense}",
        model=model,
        parts=("",),
        groups=groups,
        copies=copies,
        excuses=excuses,
        config=model.model_dump(mode="json", exclude_none=True),
        files=_side_files(order),
        notes=(*options_notes(options, groups.get("peft", {})), *notes),
        rounding=rounding,
    )


# Settings of PEFT that change what its adapters do.
UNKNOWN_PEFT = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
)
# Starts of adapters that PEFT takes away from the base before it adds what was trained.
MOVED_BASES = ("pissa", "olora", "corda", "loftq")


def _peft(tuned: SourceFolder, groups: Mapping[str, Tensors]) -> Mapping[str, Any]:
    """adapter_config.json; every file without which trained weights would be lost must be there."""
    has_experts = "file0" in groups or bool(unimoe.moe_layers(groups["base"]))
    peft = tuned.config["_peft"]
    needed = ("tuned", "aligner", *(["gates"] if has_experts else []), *(["peft"] if peft else []))
    missing = [TUNED_FILES[group] for group in needed if group not in groups]
    if missing:
        raise ConvertError(
            f"{tuned.path}: is incomplete, it lacks {missing} (.bin or .safetensors)"
        )
    if "file0" not in groups:  # else the base's experts are not used
        routers = unimoe.moe_layers(groups.get("gates", ()))
        if lost := sorted(set(unimoe.moe_layers(groups["base"])) - set(routers)):
            raise ConvertError(
                f"{tuned.path}: mlp_gates lacks the routers of layers {lost}, which have experts"
            )
    unknown = [key for key in UNKNOWN_PEFT if peft.get(key)]
    if str(peft.get("init_lora_weights")).lower().startswith(MOVED_BASES):
        unknown.append("init_lora_weights")
    if peft.get("peft_type") not in (None, "LORA"):
        unknown.append("peft_type")
    for key in unknown:
        raise ConvertError(
            f"{tuned.path / 'adapter_config.json'}: {key} = {peft[key]!r} is not supported"
        )
    adapters = [t for name, t in groups.get("peft", {}).items() if ".lora_A." in name]
    for tensor in adapters:
        if tensor.shape[:1] != (peft["r"],):
            raise ConvertError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, but "
                f"adapter_config.json says r = {peft['r']}"
            )
    return peft


def options_notes(options: Options, adapters: Iterable[str]) -> tuple[str, ...]:
    """The choices, and what they mean where that is easily overlooked."""
    notes = [f"PEFT adapters: {options.lora}", f"numerics: {options.numerics}"]
    if any(".mlp.gate.lora_" in name for name in adapters):
        taken = "take part, as in training"
        lost = "lost, mlp_gates replaces the routers, as in released inference"
        notes.append(f"router adapters: {taken if options.takes_router_lora else lost}")
    return tuple(notes)


def _unimoe_config(sources: Sources, is_8e: bool) -> Mapping[str, Any]:
    """4-expert models read the fine-tune's config, as their loader does; 8e's knows its experts."""
    candidates = [sources[role].config for role in ("tuned", "base") if role in sources]
    if is_8e:
        # The released base serves two models and keeps 8e's settings beside its own.
        beside = sources["base"].path / "8config.json"
        candidates += [read_json(beside)] if beside.is_file() else []
        candidates.sort(key=lambda config: "lora_r" not in config)
        # An export of a pruned model has none: its adapters are merged.
        if "lora_r" not in candidates[0] and any(map(_has_builtin, sources.values())):
            raise ConvertError("8e: no config.json (or 8config.json) has lora_r and lora_alpha")
    return candidates[0]


def _has_builtin(source: SourceFolder) -> bool:
    """Whether experts or dense layers have adapters of their own, not PEFT's."""
    groups = (tensors for group, tensors in source.groups.items() if group != "peft")
    return any("_proj_lora_A" in name for tensors in groups for name in tensors)


def _text(sources: Sources, config: Mapping[str, Any], groups: Mapping[str, Tensors]):
    base = groups["base"]
    layers = unimoe.moe_layers(base)
    moe = None
    if layers:
        prefix = f"model.layers.{layers[0]}.mlp.experts."
        count = len({name[len(prefix) :].split(".")[0] for name in with_prefix(base, prefix)})
        if config.get("num_experts") not in (None, count):
            raise ConvertError(
                f"config.json: num_experts = {config['num_experts']}, but the base has {count}"
            )
        moe = unimoe.moe_config(config, count, layers, is_8e=False, fm=False)
    decoder = llama.decoder_config(config, moe)
    return decoder, unimoe.decoder(decoder), unimoe.excuses(decoder, groups), ()


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
    _check_8e(config, bool(groups.get("fm")))
    moe = unimoe.moe_config(config, count, layers, is_8e=True, fm=bool(groups.get("fm")))
    decoder = llama.decoder_config(config, moe)
    dense = any("mlp.gate_proj_lora_A" in name for name in groups["base"])
    copies = unimoe.decoder_8e(decoder, local, dense)
    notes = ("the second expert is the second best; router.sample_second draws it as released",)
    excuses = [
        *unimoe.excuses(decoder, groups),
        *unimoe.EXCUSES_8E,
        *_dense_experts(layers, decoder.num_layers),
    ]
    return decoder, copies, excuses, notes


def _check_8e(config: Mapping[str, Any], has_maps: bool) -> None:
    """DeepSpeed weighs a single expert by its probability, so top-1 is not top-2 with one expert
    less; and its loader skips what the model it built has no place for."""
    if (top_k := config.get("num_experts_per_tok", 2)) != 2:
        raise ConvertError(
            f"8e's config.json: num_experts_per_tok = {top_k} is not supported; it must be 2"
        )
    if config.get("use_fm_block", has_maps) != has_maps:
        raise ConvertError(
            f"8e's config.json: use_fm_block = {config['use_fm_block']!r}, but fm_adapter "
            f"{'has' if has_maps else 'is missing or has no'} maps in front of the routers"
        )


def _dense_experts(layers: Sequence[int], num_layers: int) -> list[Excuse]:
    dense = [str(layer) for layer in range(num_layers) if layer not in layers]
    if not dense:
        return []
    match = rf"mlp\d+:model\.layers\.({'|'.join(dense)})\.mlp\..*"
    return [Excuse(match, "expert files hold all layers; these layers are dense")]


# ------------------------------------------------------------------------------------- CuMo


def plan_cumo(sources: Sources, options: Options) -> ConversionPlan:
    """What a stage of CuMo leaves: connector only, dense parts in three files, or one whole model.

    A decoder folder and a CLIP folder fill in what the stage did not keep.
    """
    del options
    source, config = sources["cumo"], sources["cumo"].config
    if others := set(sources) - {"cumo", "clip", "decoder"}:
        raise ConvertError(f"CuMo has no use for {sorted(others)}")
    groups = {group: tensors for s in sources.values() for group, tensors in s.groups.items()}
    groups["clip"] = cumo.named_as_in_file(groups.get("clip", {}))
    groups |= source.groups
    named = cumo.part_names(groups)
    tower = sources["clip"].config if "clip" in sources else cumo.tower_json(source.path, config)
    encoder = cumo.clip_config(tower, named["encoder"], config)
    decoder = cumo.decoder_config(config)
    model = ModelConfig(
        decoder=decoder, vision=cumo.vision_config(encoder, named["connector"], config)
    )
    parts = [f"vision/{part}/" for part in named if named[part]]
    dumped = model.model_dump(mode="json", exclude_none=True)
    if "model.embed_tokens.weight" in groups.get("base", ()):
        parts += ["embed/", "decoder/", "lm_head/"]
    else:
        del dumped["decoder"]
    return ConversionPlan(
        family="cumo",
        model=model,
        parts=tuple(parts),
        groups=groups,
        copies=[
            *cumo.decoder_copies(decoder),
            *cumo.vision_in_shards(model.vision),
            *cumo.vision_in_files(model.vision),
        ],
        excuses=[*cumo.EXCUSES, *([llama.TIED] if decoder.tie_embeddings else [])],
        config=dumped,
        files=_side_files([sources[r] for r in ("clip", "decoder", "cumo") if r in sources]),
    )


FAMILIES: dict[str, Callable[[Sources, Options], ConversionPlan]] = {
    "cumo": plan_cumo,
    "parts": plan_parts,
    "unimoe": plan_unimoe,
}
