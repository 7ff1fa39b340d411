"""Train a multimodal mixture of experts through all stages of a run file.

    python -m unimoe_jax.train --config configs/run/tiny.yaml [key=value …]

A run starts in one of four ways: from nothing; where it stopped (the same command again); from an
earlier stage (`--stage NAME` runs that stage alone); from converted checkpoints (`init:` in the run
file). Exit codes: 0 done, or stopped by SIGTERM after saving (then UNIMOE_STOPPED_CODE, if that is
set, for a launcher that starts it again); 1 training stopped; 2 bad settings.
"""

from __future__ import annotations

if __name__ == "__main__":
    from unimoe_jax.host_memory import restart_with_huge_pages

    restart_with_huge_pages()

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import jax

from unimoe_jax import config_io, distributed
from unimoe_jax.checkpoint import CheckpointError, read_manifest
from unimoe_jax.config import RunConfig
from unimoe_jax.config_yaml import ConfigError
from unimoe_jax.data.tally import TooManyBadSamples
from unimoe_jax.distributed import DistributedError, require_same, writer_first
from unimoe_jax.dry_run import dry_run
from unimoe_jax.host_memory import keep_freed_memory
from unimoe_jax.loop import Runtime, TrainingStopped, train_stage
from unimoe_jax.metric_series import by_stage
from unimoe_jax.metrics import read_metrics, write_json_atomic
from unimoe_jax.params import ParamError
from unimoe_jax.report import result_block, write_report
from unimoe_jax.router_trends import as_json, router_trends
from unimoe_jax.run_folder import RunFolderError, claim
from unimoe_jax.setup_data import (
    cache_folder,
    chance_levels,
    load_tokenizer,
    pool_groups,
    resolve_sources,
)
from unimoe_jax.sharding import ShardingError, data_shards, make_mesh, use_mesh
from unimoe_jax.stage import parameter_table
from unimoe_jax.stop import StopSignal

SETTINGS_ERRORS = (
    *(ConfigError, ParamError, ShardingError, RunFolderError, CheckpointError),
    DistributedError,
)
STOPPED_CODE = int(os.environ.get("UNIMOE_STOPPED_CODE", "0"))
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
        overrides = [*args.overrides, *(["data.loader.strict=true"] if args.strict else [])]
        resolved = config_io.resolve(args.config, overrides)
        if args.print_config:
            config_io.print_config(resolved.config, resolved.origins)
            return 0
        if args.dry_run:
            dry_run(resolved.config)
            return 0
        distributed.initialize(args)
        return run(resolved.config, args)
    except (*SETTINGS_ERRORS, *DATA_ERRORS) as error:
        if args.debug:
            raise
        return distributed.fail(f"error: {error}", 2)
    except (TrainingStopped, TooManyBadSamples) as error:
        if args.debug:
            raise
        return distributed.fail(f"stopped: {error}", 1)


# --------------------------------------------------------------------------------- the run


def run(config: RunConfig, args: argparse.Namespace) -> int:
    """All stages (or one) in order; finished stages are passed over."""
    started = time.monotonic()
    check_stage_name(config, args.stage)
    require_same("settings", f"{config_io.dump(config)} {args.stage} {jax.__version__}")
    mesh = make_mesh(config.mesh)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    with (
        use_mesh(mesh, config.mesh.rules),
        claim(config, overwrite=args.overwrite, resume=args.resume) as folder,
    ):
        for stage in config.stages:  # before the first of them costs anything
            pool_groups(config, stage, data_shards(mesh))
            parameter_table(config, stage)
        enable_compilation_cache(config)
        data = writer_first("data", lambda: resolve_sources(config.data))
        tokenizer, _ = load_tokenizer(config)
        stop = StopSignal(mesh)
        stop.install()
        runtime = Runtime(config, folder, mesh, data, tokenizer, stop)
        for stage in config.stages:
            if args.stage not in (None, stage.name):
                continue
            if stage_is_finished(folder, stage.name):
                runtime.tell(f"{stage.name}: finished before, passed over")
                continue
            summary = train_stage(runtime, stage)
            if summary is not None and runtime.is_writer:
                write_stage_summary(folder, stage.name, asdict(summary))
            if summary is None or stop.agreed():
                runtime.tell(f"{stop.reason}: saved; the same command continues")
                return STOPPED_CODE
        if runtime.is_writer:
            finish(runtime, time.monotonic() - started)
    return 0


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


def stage_is_finished(folder: Path, name: str) -> bool:
    """Whether the stage has left its result."""
    try:
        return bool(read_manifest(folder / "checkpoints" / name / "final"))
    except CheckpointError:
        return False


# --------------------------------------------------------------------------------- results


def write_stage_summary(folder: Path, name: str, summary: dict) -> None:
    """Kept per stage, so that a run finished in several sittings still sums up."""
    path = folder / "checkpoints" / name / "summary.json"
    write_json_atomic(path, summary)


def finish(runtime: Runtime, seconds: float) -> None:
    """summary.json, plots, report, and the block at the end."""
    config, folder = runtime.run, runtime.folder
    stages = {}
    for stage in config.stages:
        path = folder / "checkpoints" / stage.name / "summary.json"
        if path.exists():
            stages[stage.name] = json.loads(path.read_text())
    last = next((s for s in reversed(stages.values()) if s["heldout"]), None)
    before = last["heldout_before"] if last else {}
    levels = chance_levels(runtime.data, before)
    summary = {
        "name": config.name,
        "seconds": sum(stage["seconds"] for stage in stages.values()),
        "wall_seconds": seconds,
        "stages": stages,
        "heldout": {
            task: {"before": share, "after": last["heldout"][task], "chance": levels[task]}
            for task, share in before.items()
        },
        "routers": as_json(router_trends(by_stage(read_metrics(folder)), config)),
        "run_dir": str(folder),
        "next_command": f"python -m unimoe_jax.evaluate {folder} --shuffle-media",
    }
    write_json_atomic(folder / "summary.json", summary)
    if config.log.plots:
        write_report(folder)
    print(result_block(summary, folder))


if __name__ == "__main__":
    sys.exit(main())
