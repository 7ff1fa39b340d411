"""All stages of a run in order."""

from __future__ import annotations

import argparse
import os
import time

import jax

from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.config import ConfigError, RunConfig
from unimoe_jax.config.load import dump_config, run_dir
from unimoe_jax.config.stage_settings import resolve_stages
from unimoe_jax.data.sources import cache_folder
from unimoe_jax.parallel.distributed import require_same, wait_for_all
from unimoe_jax.parallel.sharding import make_mesh, use_mesh
from unimoe_jax.runtime.cpu import cache_programs, prepare
from unimoe_jax.train.context import RunContext
from unimoe_jax.train.finish import finish, finished_steps
from unimoe_jax.train.loop import train_stage
from unimoe_jax.train.preflight import check_run
from unimoe_jax.train.run_folder import claim
from unimoe_jax.train.stop import StopSignal

STOPPED_CODE = "UNIMOE_STOPPED_CODE"


def run(config: RunConfig, args: argparse.Namespace) -> int:
    """Train all stages (or the one of `--stage`) in order; finished stages are skipped.

    Returns the exit code: 0 when everything is done, `stopped_code()` after a stop signal.
    """
    started = time.monotonic()
    code_when_stopped = stopped_code()
    layout = RunLayout(run_dir(config))
    if args.stage and args.overwrite:
        raise ConfigError(
            f"--overwrite with --stage {args.stage} would remove every stage; to run that one "
            f"again, remove {layout.stage(args.stage).folder}"
        )
    require_same("settings", f"{dump_config(config)} {args.stage} {jax.__version__}")
    mesh = make_mesh(config.mesh)
    prepare()
    with use_mesh(mesh, config.mesh.rules):
        checked = check_run(config, args)
        # Wait until every process has passed its checks, because --overwrite deletes files.
        wait_for_all("checks")
        with claim(
            config,
            overwrite=args.overwrite,
            resume=args.resume,
            trains=bool(checked.stages_to_train),
        ):
            # Keep compiled programs beside the other caches, so that a restart does not compile
            # again. That waits until the run directory is claimed, because a refused run writes
            # nothing.
            cache_programs(cache_folder(config.data) / "xla", min_compile_seconds=0.2)
            stop = StopSignal(mesh)
            stop.install()
            context = RunContext(config, layout, mesh, checked.data, checked.tokenizer, stop)
            done = run_stages(context, args.stage)
            if done and context.is_writer:
                finish(context, time.monotonic() - started if checked.stages_to_train else None)
    return 0 if done else code_when_stopped


def stopped_code() -> int:
    """The exit code that tells a launcher that the run was stopped and has saved its state.

    Raises:
        ConfigError: UNIMOE_STOPPED_CODE is not an exit code.
    """
    text = os.environ.get(STOPPED_CODE) or "0"
    if not text.isdecimal() or int(text) > 255:
        raise ConfigError(f"{STOPPED_CODE}={text!r}: allowed: exit codes, 0..255")
    return int(text)


def run_stages(context: RunContext, only: str | None) -> bool:
    """Run all stages, or only the stage called `only`. False: a stop signal came first."""
    for settings in resolve_stages(context.run):
        if only not in (None, settings.name):
            continue
        if finished_steps(context.layout, settings.name) is not None:
            context.announce(f"{settings.name}: finished before, passed over")
            continue
        summary = train_stage(context, settings)
        if summary is None or context.stop.agreed():
            context.announce(f"{context.stop.reason}: saved; the same command continues")
            return False
    return True
