"""Train a multimodal mixture of experts through all stages of a run file.

    python -m unimoe_jax.train --config configs/run/tiny.yaml [key=value …]

A run starts in one of four ways: from nothing; where it stopped (the same command again); from an
earlier stage (`--stage NAME` runs that stage alone); from converted checkpoints (`init:` in the run
file). Exit codes: 0 done, or stopped by SIGTERM or SIGINT after saving (then UNIMOE_STOPPED_CODE,
if that is set, for a launcher that starts it again); 1 training stopped; 2 bad settings; 130
interrupted where nothing had to be saved, or a second time; 141 who reads what --print-config or
--dry-run shows has gone (`… | head`).
"""

from __future__ import annotations

if __name__ == "__main__":
    from unimoe_jax.host_memory import restart_with_huge_pages

    restart_with_huge_pages()

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path

import jax

from unimoe_jax import config_io, distributed
from unimoe_jax.checkpoint import MANIFEST, read_manifest
from unimoe_jax.config import DataConfig, RunConfig, StageConfig
from unimoe_jax.config_yaml import ConfigError
from unimoe_jax.data.tally import TooManyBadSamples
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.disk import WriteError
from unimoe_jax.distributed import require_same, wait_for_all, writer_first
from unimoe_jax.dry_run import dry_run
from unimoe_jax.evaluate import SCORING_ERRORS, is_scorable
from unimoe_jax.host_memory import keep_freed_memory
from unimoe_jax.integrity import SUMS, CheckpointError
from unimoe_jax.loop import Runtime, TrainingStopped, train_stage
from unimoe_jax.metric_series import by_stage
from unimoe_jax.metrics import METRICS_FILE, read_metrics, write_json_atomic
from unimoe_jax.pipes import while_read
from unimoe_jax.report import result_block, write_report
from unimoe_jax.router_trends import as_json, router_trends
from unimoe_jax.run_folder import RunFolderError, claim
from unimoe_jax.setup_data import (
    cache_folder,
    chance_levels,
    check_sources,
    load_tokenizer,
    pool_groups,
    resolve_sources,
)
from unimoe_jax.sharding import (
    current_mesh,
    data_shards,
    make_mesh,
    param_sharding,
    use_mesh,
)
from unimoe_jax.stage import parameter_table
from unimoe_jax.stage_checks import check_continues, check_start, promised
from unimoe_jax.stage_log import StageSummary
from unimoe_jax.stop import StopSignal
from unimoe_jax.upcycle import Source

SETTINGS_ERRORS = (*SCORING_ERRORS, RunFolderError)
LATER = {"upcycled", "samples", "chance"}  # summaries of earlier versions lack them
SUMMARIZED = {field.name for field in fields(StageSummary)} - LATER
STOPPED_CODE = "UNIMOE_STOPPED_CODE"
# Data that cannot be read at start (a missing file, a broken tokenizer) are settings errors too.
DATA_ERRORS = (FileNotFoundError, ValueError)


# ------------------------------------------------------------------------------ command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `--help` lists every setting with its default."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_jax.train",
        description=__doc__,
        epilog="settings (override with key=value, e.g. stages.tune.optim.steps=50)\n\n"
        + config_io.help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="run file, e.g. configs/run/tiny.yaml")
    parser.add_argument("--stage", help="run this stage only")
    parser.add_argument("--dry-run", action="store_true", help="check everything, compile nothing")
    parser.add_argument("--print-config", action="store_true", help="every value and its origin")
    parser.add_argument(
        "--resume", action="store_true", help="continue although settings have changed"
    )
    parser.add_argument("--overwrite", action="store_true", help="start over in the same directory")
    parser.add_argument("--strict", action="store_true", help="stop at the first bad sample")
    parser.add_argument("--debug", action="store_true", help="full tracebacks")
    distributed.add_arguments(parser)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code; see the module's docstring."""
    args = parse(arguments)
    return distributed.guard(lambda: _main(args))


def _main(args: argparse.Namespace) -> int:
    try:
        resolved = resolve(args)
        if args.print_config or args.dry_run:
            return while_read(lambda: _show(resolved, args))
        check_stage_name(resolved.config, args.stage)
        distributed.initialize(args)
        return run(resolved.config, args)
    except (*SETTINGS_ERRORS, *DATA_ERRORS) as error:
        if args.debug or distributed.lost_peer(error):
            raise
        return distributed.fail(f"error: {error}", 2)
    except (TrainingStopped, TooManyBadSamples, WriteError, OSError) as error:
        if args.debug:
            raise
        return distributed.fail(f"stopped: {error}", 1)


def _show(resolved: config_io.Resolved, args: argparse.Namespace) -> int:
    """What --print-config or --dry-run asks for."""
    if args.print_config:
        config_io.print_config(resolved.config, resolved.origins)
    else:
        check_stage_name(resolved.config, args.stage)
        dry_run(resolved.config, args.stage)
    return 0


def resolve(args: argparse.Namespace) -> config_io.Resolved:
    """The settings that the command line asks for."""
    resolved = config_io.resolve(args.config, args.overrides)
    if not args.strict:
        return resolved
    # A stage with a loader of its own takes nothing from the one that the others share.
    own = [number for number, stage in enumerate(resolved.config.stages) if stage.loader]
    keys = ["data.loader", *(f"stages.{number}.loader" for number in own)]
    return config_io.resolve(args.config, [*args.overrides, *(f"{k}.strict=true" for k in keys)])


# --------------------------------------------------------------------------------- the run


def run(config: RunConfig, args: argparse.Namespace) -> int:
    """All stages (or one) in order; finished stages are passed over."""
    started = time.monotonic()
    stopped = stopped_code()
    if args.stage and args.overwrite:
        raise ConfigError(
            f"--overwrite with --stage {args.stage} would remove every stage; to run that one "
            f"again, remove {config_io.run_dir(config) / 'checkpoints' / args.stage}"
        )
    require_same("settings", f"{config_io.dump(config)} {args.stage} {jax.__version__}")
    mesh = make_mesh(config.mesh)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    with use_mesh(mesh, config.mesh.rules):
        data, tokenizer, ahead = check(config, args)
        wait_for_all("checks")  # before one of them removes what another would have refused
        options = {"overwrite": args.overwrite, "resume": args.resume, "trains": bool(ahead)}
        with claim(config, **options) as folder:
            enable_compilation_cache(config)
            stop = StopSignal(mesh)
            stop.install()
            runtime = Runtime(config, folder, mesh, data, tokenizer, stop)
            done = run_stages(runtime, args.stage)
            if done and runtime.is_writer:
                finish(runtime, time.monotonic() - started if ahead else None)
    return 0 if done else stopped


def stopped_code() -> int:
    """What the launcher is told when a run has stopped and saved.

    Raises:
        ConfigError: the environment holds what is no exit code.
    """
    text = os.environ.get(STOPPED_CODE) or "0"
    if not text.isdecimal() or int(text) > 255:
        raise ConfigError(f"{STOPPED_CODE}={text!r}: allowed: exit codes, 0..255")
    return int(text)


def run_stages(runtime: Runtime, only: str | None) -> bool:
    """Whether all stages (or `only` that one) are done; a stop signal may come first."""
    folder = runtime.folder
    for stage in runtime.run.stages:
        if only not in (None, stage.name):
            continue
        if finished_steps(folder, stage.name) is not None:
            runtime.tell(f"{stage.name}: finished before, passed over")
            continue
        summary = train_stage(runtime, stage)
        if summary is None or runtime.stop.agreed():
            runtime.tell(f"{runtime.stop.reason}: saved; the same command continues")
            return False
    return True


# ------------------------------------------------------------------------ before anything costs


def check(
    config: RunConfig, args: argparse.Namespace
) -> tuple[DataConfig, Tokenizer, list[StageConfig]]:
    """Everything that can be wrong and costs nothing to find out, of all stages that are to run;
    the run directory is read, and stays as it is. Returns what the stages share, and which of them
    are to be trained.

    Raises:
        one of SETTINGS_ERRORS.
    """
    folder = config_io.run_dir(config)
    done = {} if args.overwrite else finished_stages(config, folder)
    ahead = [s for s in config.stages if args.stage in (None, s.name) and s.name not in done]
    for stage in config.stages:
        pool_groups(config, stage, data_shards(current_mesh()))
        if args.resume and stage.name in done:
            check_same_length(stage, done[stage.name], folder)
    check_sources(config, ahead)
    to_come: dict[str, Source | None] = {}
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


def finished_stages(config: RunConfig, folder: Path) -> dict[str, int]:
    """Steps of the stages that are finished; their summaries can be read."""
    found = {stage.name: finished_steps(folder, stage.name) for stage in config.stages}
    done = {name: steps for name, steps in found.items() if steps is not None}
    for name in done:
        read_stage_summary(folder, name)
    return done


def finished_steps(folder: Path, name: str) -> int | None:
    """How many steps the stage has trained, if it has left its result whole; None if it has none.

    Raises:
        CheckpointError: a part of the result is gone.
    """
    final = folder / "checkpoints" / name / "final"
    if not final.exists():  # it comes into its place complete
        return None
    try:
        steps = int(read_manifest(final)["steps"])
        sealed = json.loads((final / SUMS).read_text())
        lost = next((file for file in sealed if not (final / file).is_file()), None)
        problem = lost and f"{final / lost}: missing"
    except CheckpointError as error:
        problem = str(error)
    except (OSError, KeyError, TypeError, ValueError):
        problem = f"{final}: {MANIFEST} or {SUMS} is missing or damaged"
    if problem:
        raise CheckpointError(
            f"stage {name} has finished, but its result is not whole: {problem}; bring it back, or "
            f"remove {final} to train the stage again from its last checkpoint"
        )
    return steps


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


def enable_compilation_cache(config: RunConfig) -> None:
    """Programs compiled once are found again by a restart, beside the other caches."""
    folder = cache_folder(config.data) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


# --------------------------------------------------------------------------------- results


def read_stage_summary(folder: Path, name: str) -> dict | None:
    """What `train_stage` has written of a stage, so that a run finished in several sittings still
    sums up; None if there is nothing.

    Raises:
        RunFolderError: the file is not that.
    """
    path = folder / "checkpoints" / name / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        missing = SUMMARIZED - summary.keys()
        problem = f"lacks {', '.join(sorted(missing))}" if missing else ""
    except (OSError, ValueError, AttributeError) as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise RunFolderError(f"{path}: {problem}; remove it to go on without this summary")
    return summary


def next_command(config: RunConfig, folder: Path, done: Collection[str]) -> str:
    """What to try now: the control of the evaluation, if the stage that it scores is `done`."""
    named = shlex.quote(str(folder))
    scored = [stage for stage in config.stages if stage.evaluate]
    if scored and scored[-1].name in done and is_scorable(scored[-1]):
        return f"python -m unimoe_jax.evaluate {named} --shuffle-media"
    return f"python -m unimoe_jax.generate --model {named} --chat"


def finish(runtime: Runtime, seconds: float | None) -> None:
    """summary.json, plots, report, and the block at the end. seconds: that this call took; None if
    it has trained nothing, then the time of the last that has stays."""
    config, folder = runtime.run, runtime.folder
    names = [stage.name for stage in config.stages]
    # A stage writes its summary before its result.
    done = [name for name in names if finished_steps(folder, name) is not None]
    found = {name: read_stage_summary(folder, name) for name in done}
    stages = {name: summary for name, summary in found.items() if summary is not None}
    last = next((s for s in reversed(stages.values()) if s["heldout"]), None)
    # What is scored may have changed between two sittings.
    before, after = (last["heldout_before"] or {}, last["heldout"]) if last else ({}, {})
    levels = (last or {}).get("chance") or chance_levels(runtime.data, after)
    if seconds is None:
        # There may be none, or a damaged one: it is about to be written anew.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            seconds = json.loads((folder / "summary.json").read_text())["wall_seconds"]
    recorded = (folder / METRICS_FILE).exists()
    if not recorded:
        runtime.tell(f"{folder / METRICS_FILE}: missing, so there is no report of the stages")
    records = by_stage(read_metrics(folder)) if recorded else {}
    summary = {
        "name": config.name,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "wall_seconds": seconds,
        "stages": stages,
        "stages_in_all": len(config.stages),
        "heldout": {
            task: {"before": before.get(task), "after": share, "chance": levels[task]}
            for task, share in after.items()
        },
        "routers": as_json(router_trends(records, config)),
        "run_dir": str(folder),
        "next_command": next_command(config, folder, stages),
    }
    write_json_atomic(folder / "summary.json", summary)
    if config.log.plots and recorded:
        write_report(folder)
    print(result_block(summary, folder))


if __name__ == "__main__":
    sys.exit(main())
