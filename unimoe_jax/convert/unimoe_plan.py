"""From the folders of a Uni-MoE to a `ConversionPlan`: dense, 4 experts, or 8 experts (8e)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from unimoe_jax.config import DecoderConfig, ModelConfig
from unimoe_jax.convert.branches import Sources, branches_of, encoder_excuses
from unimoe_jax.convert.entry import Copy, Excuse
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import ConversionPlan
from unimoe_jax.convert.reader import ConvertError, Tensors, read_json, with_prefix
from unimoe_jax.convert.recognise import TUNED_FILES, SourceFolder, copied_files
from unimoe_jax.convert.tables import llama, unimoe


def plan_unimoe(sources: Sources, options: Options) -> ConversionPlan:
    """The plan of a Uni-MoE: base folder, encoders, and the fine-tune's folder if it is given.

    Raises:
        ConvertError: a folder or a file is missing, or a setting is not supported.
    """
    sound = _sound_branch(sources)
    groups: dict[str, Tensors] = {}
    for source in sources.values():
        groups |= source.groups
    tuned = sources.get("tuned")
    peft: Mapping[str, Any] = {}
    if tuned is not None:
        _check_complete(tuned, groups)
        peft = tuned.config["_peft"]
        _check_peft(tuned, groups)
    is_8e = tuned is not None and any("deepspeed_moe" in name for name in groups.get("gates", ()))
    config = _unimoe_config(sources, is_8e)
    # The decoder and the two branches.
    text = (_text_8e if is_8e else _text)(sources, config, groups)
    branches, branch_copies = branches_of(sources, config, groups, sound)
    copies, excuses, notes = [*text.copies, *branch_copies], list(text.excuses), text.notes
    # The adapters: PEFT's, and those inside the experts of 8e.
    if peft:
        scale = peft["lora_alpha"] / peft["r"]
        copies = _with_peft(copies, set(groups["peft"]), peft, scale, options)
        if not options.takes_router_lora:
            excuses.append(unimoe.DROPPED_ROUTER_LORA)
        notes = (*notes, f"PEFT scale: {scale}")
    builtin_lora = None
    if is_8e and "lora_r" in config:
        builtin_lora = (config["lora_r"], config["lora_alpha"], config.get("lora_dropout", 0.0))
    # Rounding of the released loaders; the RoPE tables take part in it.
    rounding = unimoe.rounding(is_8e, sound) if options.numerics == "released" else None
    decoder = text.config
    if rounding is not None:
        decoder = decoder.model_copy(update={"rope_table_dtype": rounding.rope_table})
    lora = unimoe.lora_rules(copies, peft, builtin_lora)
    model = ModelConfig(decoder=decoder, lora=lora, **branches)
    excuses += encoder_excuses(sources, model)
    order = [sources[r] for r in ("clip", "whisper", "base", "tuned") if r in sources]
    return ConversionPlan(
        family="unimoe-8e" if is_8e else f"unimoe-{sound}",
        model=model,
        parts=("",),
        groups=groups,
        copies=copies,
        excuses=excuses,
        config=model.model_dump(mode="json", exclude_none=True),
        files=copied_files(order),
        notes=(*options_notes(options, groups.get("peft", {})), *notes),
        rounding=rounding,
    )


def _sound_branch(sources: Sources) -> Literal["speech", "audio"]:
    """The name of the branch of sound.

    Raises:
        ConvertError: a folder without which no Uni-MoE can be built is missing.
    """
    for role in ("base", "clip"):
        if role not in sources:
            raise ConvertError(f"Uni-MoE needs its {role} folder as well: add --from")
    if "beats" in sources:
        return "audio"
    if "whisper" not in sources:
        raise ConvertError("Uni-MoE needs its audio encoder as well: Whisper or BEATs; add --from")
    return "speech"


def _with_peft(
    copies: Sequence[Copy],
    names: set[str],
    peft: Mapping[str, Any],
    scale: float,
    options: Options,
) -> list[Copy]:
    """The copies with PEFT's adapters, merged or kept; `names` are the tensors of adapter_model."""
    adapted = unimoe.with_adapters(
        copies,
        names=names,
        scale=scale,
        merge=options.lora == "merge",
        router=options.takes_router_lora,
    )
    # With `layers_to_transform` PEFT leaves layers without adapters on purpose.
    if not peft.get("layers_to_transform"):
        unimoe.check_adapters(adapted, peft.get("target_modules"))
    return adapted


# Settings of PEFT that change the effect of its adapters and that are not implemented here.
UNKNOWN_PEFT = (
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
)
# Initialisations for which PEFT changes the base weights as well: it subtracts the initial adapters
# from them, so the base folder's weights do not fit the trained adapters.
MOVED_BASES = ("pissa", "olora", "corda", "loftq")


def _check_complete(tuned: SourceFolder, groups: Mapping[str, Tensors]) -> None:
    """Check that the fine-tune's folder has every file that holds trained weights.

    Raises:
        ConvertError: a file or a router is missing.
    """
    has_experts = "file0" in groups or bool(unimoe.moe_layers(groups["base"]))
    peft = tuned.config["_peft"]  # adapter_config.json, empty if there are no adapters
    needed = ("tuned", "aligner", *(["gates"] if has_experts else []), *(["peft"] if peft else []))
    missing = [TUNED_FILES[group] for group in needed if group not in groups]
    if missing:
        raise ConvertError(
            f"{tuned.path}: is incomplete, it lacks {missing} (.bin or .safetensors)"
        )
    # Every layer of the base with experts needs its trained router. 8e does not use the experts of
    # the base; its experts are in the rank files (`file0` and so on).
    if "file0" not in groups:
        routers = unimoe.moe_layers(groups.get("gates", ()))
        if lost := sorted(set(unimoe.moe_layers(groups["base"])) - set(routers)):
            raise ConvertError(
                f"{tuned.path}: mlp_gates lacks the routers of layers {lost}, which have experts"
            )


def _check_peft(tuned: SourceFolder, groups: Mapping[str, Tensors]) -> None:
    """Check adapter_config.json, and that its rank is the rank of the adapters.

    Raises:
        ConvertError: PEFT has a setting that is not implemented, or an adapter has another rank.
    """
    peft = tuned.config["_peft"]
    unknown = [key for key in UNKNOWN_PEFT if peft.get(key)]
    if str(peft.get("init_lora_weights")).lower().startswith(MOVED_BASES):
        unknown.append("init_lora_weights")
    if peft.get("peft_type") not in (None, "LORA"):
        unknown.append("peft_type")
    if unknown:
        key = unknown[0]
        raise ConvertError(
            f"{tuned.path / 'adapter_config.json'}: {key} = {peft[key]!r} is not supported"
        )
    # The rank determines the scale of the adapters, so it must be the rank of the tensors.
    adapters = [t for name, t in groups.get("peft", {}).items() if ".lora_A." in name]
    for tensor in adapters:
        if tensor.shape[:1] != (peft["r"],):
            raise ConvertError(
                f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, but "
                f"adapter_config.json says r = {peft['r']}"
            )


def options_notes(options: Options, adapters: Iterable[str]) -> tuple[str, ...]:
    """Notes on the choices of the user, and on their effect if there are adapters of routers."""
    notes = [f"PEFT adapters: {options.lora}", f"numerics: {options.numerics}"]
    if any(".mlp.gate.lora_" in name for name in adapters):
        taken = "take part, as in training"
        lost = "lost, mlp_gates replaces the routers, as in released inference"
        notes.append(f"router adapters: {taken if options.takes_router_lora else lost}")
    return tuple(notes)


def _unimoe_config(sources: Sources, is_8e: bool) -> Mapping[str, Any]:
    """The config.json of the model.

    4-expert models use the config.json of the fine-tune (or else of the base), as their loader
    does. 8e uses the first file that has the settings of its built-in adapters.
    """
    candidates = [sources[role].config for role in ("tuned", "base") if role in sources]
    if is_8e:
        # The released base serves two models; 8e's settings are in a second file.
        second = sources["base"].path / "8config.json"
        candidates += [read_json(second)] if second.is_file() else []
        # False sorts before True: files with `lora_r` come first.
        candidates.sort(key=lambda config: "lora_r" not in config)
        # No file has `lora_r` in an export of a pruned model, whose adapters are merged.
        if "lora_r" not in candidates[0] and any(map(_has_builtin, sources.values())):
            raise ConvertError(
                "8e: no config.json (or 8config.json) has lora_r and lora_alpha, the settings of "
                "the adapters inside its experts"
            )
    return candidates[0]


def _has_builtin(source: SourceFolder) -> bool:
    """Whether experts or dense layers have built-in adapters, which are not PEFT's."""
    groups = (tensors for group, tensors in source.groups.items() if group != "peft")
    return any("_proj_lora_A" in name for tensors in groups for name in tensors)


@dataclass(frozen=True)
class _Text:
    """The text decoder of a Uni-MoE: its settings, copies, excuses and notes for the manifest."""

    config: DecoderConfig
    copies: Sequence[Copy]
    excuses: Sequence[Excuse]
    notes: tuple[str, ...] = ()


def _text(sources: Sources, config: Mapping[str, Any], groups: Mapping[str, Tensors]) -> _Text:
    """The decoder of a dense or 4-expert model, whose experts are in the base's shards."""
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
        moe = unimoe.moe_config(config, count, layers, is_8e=False, modality_map=False)
    decoder = llama.decoder_config(config, moe)
    return _Text(decoder, unimoe.decoder(decoder), unimoe.excuses(decoder, groups))


def _text_8e(sources: Sources, config: Mapping[str, Any], groups: dict[str, Tensors]) -> _Text:
    """The decoder of 8e, whose experts are in files per rank and per expert.

    Replaces the groups of these files (`file{rank}`, the stems of the experts folder) by one group
    per expert, `rank{e}` and `mlp{e}`, as `tables.unimoe` expects.
    """
    if "experts" not in sources:
        raise ConvertError("Uni-MoE 8e needs its experts folder (mlp_*.bin) as well: add --from")
    files = [group for group in groups if group.startswith("file")]
    count = config["num_experts"]
    if not files or count % len(files) or count > len(unimoe.EXPERT_FILES):
        raise ConvertError(
            f"8e: {count} experts cannot be in {len(files)} rank files (*_mlp_experts); every rank "
            f"file holds the same number of experts, at most {len(unimoe.EXPERT_FILES)} in all"
        )
    # One group per expert. Example: 8 experts in 4 rank files are 2 per file, so expert 5 is
    # number 1 in the file of rank 2.
    local = count // len(files)
    for expert, name in enumerate(unimoe.EXPERT_FILES[:count]):
        if name not in groups:
            raise ConvertError(f"{sources['experts'].path}: expert {expert} needs {name}.bin")
        groups[f"mlp{expert}"] = groups[name]
        mark = f".deepspeed_experts.{expert % local}."
        rank_file = groups[f"file{expert // local}"]
        groups[f"rank{expert}"] = {key: value for key, value in rank_file.items() if mark in key}
    for name in [*files, *sources["experts"].groups]:
        del groups[name]
    # Routers and the maps in front of them.
    layers = unimoe.moe_layers(groups["gates"])
    has_maps = bool(groups.get("fm"))
    _check_8e(config, has_maps)
    moe = unimoe.moe_config(config, count, layers, is_8e=True, modality_map=has_maps)
    decoder = llama.decoder_config(config, moe)
    builtin_dense = any("mlp.gate_proj_lora_A" in name for name in groups["base"])
    copies = unimoe.decoder_8e(decoder, local, builtin_dense)
    notes = ("the second expert is the second best; router.sample_second draws it as released",)
    excuses = [
        *unimoe.excuses(decoder, groups),
        *unimoe.EXCUSES_8E,
        *_dense_experts(layers, decoder.num_layers),
    ]
    return _Text(decoder, copies, excuses, notes)


def _check_8e(config: Mapping[str, Any], has_maps: bool) -> None:
    """Refuse settings with which 8e would compute something else.

    DeepSpeed weighs a single expert by its probability, so top-1 is not top-2 with one expert less.
    The original's loader ignores tensors that its model has no place for, so config.json decides
    whether maps take part, and fm_adapter has to agree with it.

    Args:
        has_maps: whether fm_adapter holds maps in front of the routers.
    """
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
    """The excuse for dense layers in the experts folder; `layers` are those with experts."""
    dense = [str(layer) for layer in range(num_layers) if layer not in layers]
    if not dense:
        return []
    match = rf"mlp\d+:model\.layers\.({'|'.join(dense)})\.mlp\..*"
    return [Excuse(match, "expert files hold all layers; these layers are dense")]
