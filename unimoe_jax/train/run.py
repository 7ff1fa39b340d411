"""All stages of a run in order."""

from __future__ import annotations

import argparse
import os
import time

import jax

from unimoe_jax.config import ConfigError, RunConfig
from unimoe_jax.config.load import dump_config, run_dir
from unimoe_jax.data.sources import cache_folder
from unimoe_jax.parallel.distributed import require_same, wait_for_all
from unimoe_jax.parallel.sharding import make_mesh, use_mesh
from unimoe_jax.runtime.memory import keep_freed_memory
from unimoe_jax.train.context import RunContext
from unimoe_jax.train.finish import finish, finished_steps
from unimoe_jax.train.loop import train_stage
from unimoe_jax.train.preflight import check
from unimoe_jax.train.run_folder import claim
from unimoe_jax.train.stop import StopSignal

STOPPED_CODE = "UNIMOE_STOPPED_CODE"


def run(config: RunConfig, args: argparse.Namespace) -> int:
    """All stages (or one) in order; finished stages are passed over."""
    started = time.monotonic()
    stopped = stopped_code()
    if args.stage and args.overwrite:
        raise ConfigError(
            f"--overwrite with --stage {args.stage} would remove every stage; to run that one "
            f"again, remove {run_dir(config) / 'checkpoints' / args.stage}"
        )
    require_same("settings", f"{dump_config(config)} {args.stage} {jax.__version__}")
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
            runtime = RunContext(config, folder, mesh, data, tokenizer, stop)
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


def run_stages(runtime: RunContext, only: str | None) -> bool:
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


def enable_compilation_cache(config: RunConfig) -> None:
    """Programs compiled once are found again by a restart, beside the other caches."""
    folder = cache_folder(config.data) / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
