"""What must hold before a stage costs anything: rules that do something, a start for every
parameter, saved steps that can be gone on from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_jax import lora
from unimoe_jax.checkpoint import StepCheckpoints, open_source
from unimoe_jax.config import LoRARule, RunConfig, StageConfig, Take
from unimoe_jax.integrity import CheckpointError
from unimoe_jax.params import ParamError, ParamInfo, first_match
from unimoe_jax.stage import left_behind, moe_key, source_folder
from unimoe_jax.upcycle import Source, members, origin_of, start_of


def check_start(
    run: RunConfig,
    stage: StageConfig,
    infos: Mapping[str, ParamInfo],
    run_dir: Path,
    to_come: Mapping[str, Source | None],
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
    stage: StageConfig, run_dir: Path, to_come: Mapping[str, Source | None]
) -> dict[str, Source | None]:
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


def promised(run: RunConfig, stage: StageConfig, infos: Mapping[str, ParamInfo]) -> Source:
    """What the stage will leave: names and shapes alone, nothing can be read yet."""
    left, _ = left_behind(stage, infos)
    moe_layers = run.stage_model(stage).decoder.moe_layers()

    def load(path: str, index: Any) -> np.ndarray:
        raise CheckpointError(f"stage {stage.name} has not left {path!r} yet")

    return Source(stage.name, {path: infos[path].shape for path in left}, load, moe_layers)


def _check_count(
    key: str, path: str, info: ParamInfo, take: Take, moe_layers: tuple[bool, ...]
) -> None:
    """As many experts must be named as the model has where they go."""
    at, member = members(path, info.shape, moe_layers)[0]
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
