"""Everything that can be wrong with a run and costs nothing to find."""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.checkpoints.final import open_source
from unimoe_jax.checkpoints.origins import origin_of, start_of
from unimoe_jax.checkpoints.sources import ParamSource
from unimoe_jax.checkpoints.steps import StepCheckpoints
from unimoe_jax.config import ConfigError, DataConfig, LoRARule, RunConfig, StageConfig, Take
from unimoe_jax.config.load import run_dir
from unimoe_jax.data.sources import check_sources, load_tokenizer, resolve_sources
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.parallel.distributed import writer_first
from unimoe_jax.parallel.sharding import current_mesh, data_shards, param_sharding
from unimoe_jax.params import lora
from unimoe_jax.params.layer_parts import layer_parts
from unimoe_jax.params.paths import ParamError, first_match
from unimoe_jax.params.table import ParamInfo
from unimoe_jax.stages.data import pool_groups
from unimoe_jax.stages.final_params import left_behind
from unimoe_jax.stages.initial_params import source_folder
from unimoe_jax.stages.stage import moe_key, parameter_table
from unimoe_jax.train.finish import finished_stages


def check_start(
    run: RunConfig,
    stage: StageConfig,
    infos: Mapping[str, ParamInfo],
    run_dir: Path,
    to_come: Mapping[str, ParamSource | None],
) -> None:
    """Whether every parameter of the stage has a place to start from; reads manifests alone.

    to_come: sources that need not be there yet: stages that the same command runs, as `promised`
    says what they will leave; None where nothing is known.

    Raises:
        CheckpointError: a source is not there or not finished.
        ParamError: no origin, another number of experts, another shape in a source, a rule of
            `init` or `lora` that is the first match of nothing, or nothing that trains.
    """
    if not any(info.trained for info in infos.values()):
        raise ParamError(
            f"stages.{stage.name}.train: every rule has lr: null, so nothing would be learned; "
            "give one a rate, or remove the stage"
        )
    moe_layers = run.stage_model(stage).decoder.moe_layers()
    sources, found = _opened(stage, run_dir, to_come), set()
    try:
        for path, info in infos.items():
            take = origin_of(path, stage.init)
            number = stage.init.index(take)
            found.add(number)
            if take.experts:
                _check_count(f"init.{number}.experts", path, info, take, moe_layers)
            if take.source != "fresh" and all(sources[name] for name in take.origins):
                start_of(path, info.shape, take, sources, moe_layers)
        _check_used("init", stage.init, found, "parameter")
        adapted = (first_match(stage.lora, p, lambda rule: rule.match) for p in lora.modules(infos))
        _check_used("lora", stage.lora, set(adapted), "layer")
    except ParamError as error:
        raise ParamError(f"stages.{stage.name}.{error}") from None


def _check_used(
    key: str, rules: Sequence[Take | LoRARule], found: Collection[int | None], what: str
) -> None:
    """A rule that does nothing is a misspelt one, or comes too late."""
    idle = [rule.match for number, rule in enumerate(rules) if number not in found]
    if idle:
        raise ParamError(
            f"{key}: rules {idle} are the first match of no {what}; correct the pattern or the "
            "order, or remove them"
        )


def _opened(
    stage: StageConfig, run_dir: Path, to_come: Mapping[str, ParamSource | None]
) -> dict[str, ParamSource | None]:
    """Every source of the stage."""
    sources = dict(to_come)
    for number, take in enumerate(stage.init):
        for name in take.origins:
            if name == "fresh" or name in sources:
                continue
            try:
                sources[name] = open_source(name, source_folder(run_dir, name))
            except CheckpointError as error:
                first = "" if name.startswith("checkpoint:") else "; run that stage first"
                raise CheckpointError(
                    f"stages.{stage.name}.init.{number}: {error}{first}"
                ) from None
    return sources


def promised(run: RunConfig, stage: StageConfig, infos: Mapping[str, ParamInfo]) -> ParamSource:
    """What the stage will leave: names and shapes alone, nothing can be read yet."""
    left, _ = left_behind(stage, infos)
    moe_layers = run.stage_model(stage).decoder.moe_layers()

    def load(path: str, index: Any) -> np.ndarray:
        raise CheckpointError(f"stage {stage.name} has not left {path!r} yet")

    return ParamSource(stage.name, {path: infos[path].shape for path in left}, load, moe_layers)


def _check_count(
    key: str, path: str, info: ParamInfo, take: Take, moe_layers: tuple[bool, ...]
) -> None:
    """As many experts must be named as the model has where they go."""
    at, member = layer_parts(path, info.shape, moe_layers)[0]
    count = info.shape[len(at)] if member.expert is not None else len(take.experts)
    if count != len(take.experts):
        raise ParamError(
            f"{key}: names {len(take.experts)} origins, but {moe_key(member.module)}.num_experts "
            f"= {count}; allowed: one for every expert"
        )


def check_continues(stage: StageConfig, infos: Mapping[str, ParamInfo], folder: Path) -> None:
    """Whether the stage, as it is set now, can go on from the steps saved in `folder`.

    Raises:
        CheckpointError: more steps are done than are wanted, or other parameters trained.
    """
    newest = StepCheckpoints.newest(folder)
    if newest is None:
        return
    step, saved = newest
    again = f"or remove {folder} to start the stage again"
    if stage.optim.steps is not None and stage.optim.steps < step:
        raise CheckpointError(
            f"stages.{stage.name}.optim.steps = {stage.optim.steps}: {step} steps are done; "
            f"allowed: {step} or more, {again}"
        )
    now = {path: info.shape for path, info in infos.items() if info.trained}
    more, less = sorted(now.keys() - saved.keys()), sorted(saved.keys() - now.keys())
    other = sorted(path for path in now.keys() & saved.keys() if now[path] != saved[path])
    changes = {"now also": more, "no longer": less, "of another shape:": other}
    told = [f"{what} {_some(paths)}" for what, paths in changes.items() if paths]
    if told:
        raise CheckpointError(
            f"stages.{stage.name}.train: what trains has changed since step {step} was saved: "
            f"{', '.join(told)}; take the change back, {again}"
        )


def _some(paths: list[str]) -> str:
    return repr(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")


def check(
    config: RunConfig, args: argparse.Namespace
) -> tuple[DataConfig, Tokenizer, list[StageConfig]]:
    """Everything that can be wrong and costs nothing to find out, of all stages that are to run;
    the run directory is read, and stays as it is. Returns what the stages share, and which of them
    are to be trained.

    Raises:
        one of SETTINGS_ERRORS.
    """
    folder = run_dir(config)
    done = {} if args.overwrite else finished_stages(config, folder)
    ahead = [s for s in config.stages if args.stage in (None, s.name) and s.name not in done]
    for stage in config.stages:
        pool_groups(config, stage, data_shards(current_mesh()))
        if args.resume and stage.name in done:
            check_same_length(stage, done[stage.name], folder)
    check_sources(config, ahead)
    to_come: dict[str, ParamSource | None] = {}
    for stage in config.stages:
        infos = parameter_table(config, stage)
        if stage in ahead:
            for path, info in infos.items():
                param_sharding(current_mesh(), path, info.shape, info.axes)
            check_start(config, stage, infos, folder, to_come)
            to_come[stage.name] = promised(config, stage, infos)
            if args.resume and not args.overwrite:
                check_continues(stage, infos, folder / "checkpoints" / stage.name / "steps")
    # The embedded data set is made by one process and found by the others.
    tokenizer, _ = writer_first("tokenizer", lambda: load_tokenizer(config))
    return writer_first("data", lambda: resolve_sources(config.data)), tokenizer, ahead


def check_same_length(stage: StageConfig, done: int, folder: Path) -> None:
    """A finished stage is passed over, so `--resume` cannot change how long it is."""
    if stage.optim.steps not in (None, done):
        raise ConfigError(
            f"stages.{stage.name}.optim.steps = {stage.optim.steps}: the stage has finished with "
            f"{done}; allowed: {done}, or remove {folder / 'checkpoints' / stage.name} to train "
            "it again"
        )


def check_stage_name(config: RunConfig, name: str | None) -> None:
    """`--stage` must name one of the run's stages."""
    names = [stage.name for stage in config.stages]
    if name is not None and name not in names:
        raise ConfigError(f"--stage {name}: no such stage; the run has {', '.join(names)}")
