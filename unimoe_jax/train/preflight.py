"""Everything that can be wrong with a run and costs nothing to find."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.checkpoints.final import open_source
from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.checkpoints.origins import CHECKPOINT, origin_of, start_of
from unimoe_jax.checkpoints.sources import ParamSource
from unimoe_jax.checkpoints.steps import StepCheckpoints
from unimoe_jax.config import ConfigError, DataConfig, LoRARule, RunConfig, Take
from unimoe_jax.config.load import run_dir
from unimoe_jax.config.stage_settings import StageSettings, resolve_stages
from unimoe_jax.data.sources import check_sources, load_tokenizer, resolve_sources
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.parallel.distributed import writer_first
from unimoe_jax.parallel.sharding import current_mesh, data_shards, param_sharding
from unimoe_jax.params import lora
from unimoe_jax.params.layer_parts import layer_parts
from unimoe_jax.params.paths import ParamError, first_match
from unimoe_jax.params.table import ParamInfo
from unimoe_jax.stages.final_params import left_behind
from unimoe_jax.stages.initial_params import source_folder
from unimoe_jax.stages.stage import moe_key, parameter_table
from unimoe_jax.train.finish import finished_stages


@dataclass(frozen=True)
class CheckedRun:
    """What the checks have made: the run's data resolved to files, its tokenizer, and the stages
    that are left to train."""

    data: DataConfig
    tokenizer: Tokenizer
    stages_to_train: tuple[StageSettings, ...]


def check_run(config: RunConfig, args: argparse.Namespace) -> CheckedRun:
    """Find everything that can be wrong with a run and costs nothing to find.

    Every stage that is to train is checked before the first one trains. The run directory is read
    and stays as it is.

    Raises:
        ConfigError, ParamError, ShardingError, CheckpointError, RunFolderError: the first problem.
    """
    layout, stages = RunLayout(run_dir(config)), resolve_stages(config)
    mesh = current_mesh()
    assert mesh is not None, "call inside use_mesh"
    finished = {} if args.overwrite else finished_stages(config, layout)
    ahead = tuple(s for s in stages if args.stage in (None, s.name) and s.name not in finished)
    for settings in stages:
        settings.pool_groups(data_shards(mesh))
        if args.resume and settings.name in finished:
            check_same_length(settings, finished[settings.name], layout)
    check_sources(config, [settings.config for settings in ahead])
    to_come: dict[str, ParamSource | None] = {}
    for settings in stages:
        infos = parameter_table(settings)
        if settings not in ahead:
            continue
        for path, info in infos.items():
            param_sharding(mesh, path, info.shape, info.axes)
        check_start(settings, infos, layout, to_come)
        to_come[settings.name] = promised(settings, infos)
        if args.resume and not args.overwrite:
            check_continues(settings, infos, layout.stage(settings.name).steps)
    # Process 0 makes the embedded data set, and the other processes find it in the cache.
    tokenizer, _ = writer_first("tokenizer", lambda: load_tokenizer(config))
    data = writer_first("data", lambda: resolve_sources(config.data))
    return CheckedRun(data, tokenizer, ahead)


def check_stage_name(config: RunConfig, name: str | None) -> None:
    """`--stage` must name one of the run's stages. Raises ConfigError otherwise."""
    names = [stage.name for stage in config.stages]
    if name is not None and name not in names:
        raise ConfigError(f"--stage {name}: no such stage; the run has {', '.join(names)}")


def check_same_length(settings: StageSettings, done: int, layout: RunLayout) -> None:
    """A finished stage is skipped, so `--resume` cannot change its length.

    Raises:
        ConfigError: `optim.steps` is not the `done` steps that the stage has trained.
    """
    steps = settings.config.optim.steps
    if steps not in (None, done):
        raise ConfigError(
            f"stages.{settings.name}.optim.steps = {steps}: the stage has finished with {done}; "
            f"allowed: {done}, or remove {layout.stage(settings.name).folder} to train it again"
        )


# ------------------------------------------------------------------------- where a stage starts


def check_start(
    settings: StageSettings,
    infos: Mapping[str, ParamInfo],
    layout: RunLayout,
    to_come: Mapping[str, ParamSource | None],
) -> None:
    """Check that every parameter of the stage has a place to start from; reads only manifests.

    to_come: sources that need not exist yet. A stage that the same command runs before this one is
        described by `promised`; None stands for a source about which nothing is known.

    Raises:
        CheckpointError: a source is missing or not finished.
        ParamError: a parameter has no origin, its source has another shape or another number of
            experts, a rule of `init` or `lora` is the first match of nothing, or nothing trains.
    """
    if not any(info.trained for info in infos.values()):
        raise ParamError(
            f"stages.{settings.name}.train: every rule has lr: null, so nothing would be learned; "
            "give one a rate, or remove the stage"
        )
    init, lora_rules = settings.config.init, settings.config.lora
    moe_layers = settings.model.decoder.moe_layers()
    sources = _open_sources(settings, layout, to_come)
    known = {name: source for name, source in sources.items() if source is not None}
    used_takes: set[int] = set()
    try:
        for path, info in infos.items():
            take = origin_of(path, init)
            number = init.index(take)
            used_takes.add(number)
            if take.experts:
                _check_count(f"init.{number}.experts", path, info, take, moe_layers)
            if take.source != "fresh" and known.keys() >= set(take.origins):
                start_of(path, info.shape, take, known, moe_layers)
        _check_used("init", init, used_takes, "parameter")
        layers = lora.modules(infos)
        used_rules = {first_match(lora_rules, path, lambda rule: rule.match) for path in layers}
        _check_used("lora", lora_rules, used_rules, "layer")
    except ParamError as error:
        raise ParamError(f"stages.{settings.name}.{error}") from None


def _check_used(
    key: str, rules: Sequence[Take | LoRARule], used: Collection[int | None], kind: str
) -> None:
    """A rule that is never the first match is misspelt, or an earlier rule hides it."""
    idle = [rule.match for number, rule in enumerate(rules) if number not in used]
    if idle:
        raise ParamError(
            f"{key}: rules {idle} are the first match of no {kind}; correct the pattern or the "
            "order, or remove them"
        )


def _open_sources(
    settings: StageSettings, layout: RunLayout, to_come: Mapping[str, ParamSource | None]
) -> dict[str, ParamSource | None]:
    """Every source of the stage, by name."""
    sources = dict(to_come)
    for number, take in enumerate(settings.config.init):
        for name in take.origins:
            if name == "fresh" or name in sources:
                continue
            try:
                sources[name] = open_source(name, source_folder(layout, name))
            except CheckpointError as error:
                remedy = "" if name.startswith(CHECKPOINT) else "; run that stage first"
                raise CheckpointError(
                    f"stages.{settings.name}.init.{number}: {error}{remedy}"
                ) from None
    return sources


def promised(settings: StageSettings, infos: Mapping[str, ParamInfo]) -> ParamSource:
    """What the stage will leave behind: a source with names and shapes, and nothing to read yet."""
    kept, _ = left_behind(settings.config, infos)

    def load(path: str, index: Any) -> np.ndarray:
        raise CheckpointError(f"stage {settings.name} has not left {path!r} yet")

    shapes = {path: infos[path].shape for path in kept}
    return ParamSource(settings.name, shapes, load, settings.model.decoder.moe_layers())


def _check_count(
    key: str, path: str, info: ParamInfo, take: Take, moe_layers: tuple[bool, ...]
) -> None:
    """`experts` must list as many origins as the model has experts in that layer."""
    index, part = layer_parts(path, info.shape, moe_layers)[0]
    if part.expert is None or part.module is None:
        return
    count = info.shape[len(index)]
    if count != len(take.origins):
        raise ParamError(
            f"{key}: names {len(take.origins)} origins, but {moe_key(part.module)}.num_experts "
            f"= {count}; allowed: one for every expert"
        )


# ----------------------------------------------------------------------------- resuming a stage


def check_continues(settings: StageSettings, infos: Mapping[str, ParamInfo], steps: Path) -> None:
    """Check that the stage, as it is set now, can go on from the steps saved in the folder `steps`.

    Raises:
        CheckpointError: more steps are done than the settings ask for, or other parameters trained.
    """
    newest = StepCheckpoints.newest(steps)
    if newest is None:
        return
    step, saved = newest
    remedy = f"or remove {steps} to start the stage again"
    wanted = settings.config.optim.steps
    if wanted is not None and wanted < step:
        raise CheckpointError(
            f"stages.{settings.name}.optim.steps = {wanted}: {step} steps are done; "
            f"allowed: {step} or more, {remedy}"
        )
    now = {path: info.shape for path, info in infos.items() if info.trained}
    changes = {
        "now also": sorted(now.keys() - saved.keys()),
        "no longer": sorted(saved.keys() - now.keys()),
        "of another shape:": sorted(p for p in now.keys() & saved.keys() if now[p] != saved[p]),
    }
    differences = [f"{kind} {_some(paths)}" for kind, paths in changes.items() if paths]
    if differences:
        raise CheckpointError(
            f"stages.{settings.name}.train: what trains has changed since step {step} was saved: "
            f"{', '.join(differences)}; take the change back, {remedy}"
        )


def _some(paths: list[str]) -> str:
    """The first path, and how many more there are."""
    return repr(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
