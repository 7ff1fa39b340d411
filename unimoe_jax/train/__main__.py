"""Train a multimodal mixture of experts through all stages of a run file.

    python -m unimoe_jax.train --config configs/run/tiny.yaml [key=value …]

A run starts in one of four ways: from nothing; where it stopped (the same command again); from an
earlier stage (`--stage NAME` runs that stage alone); from converted checkpoints (`init:` in the run
file).

Exit codes:
  0    everything is done, or SIGTERM or SIGINT stopped the run and its state is saved; if
       UNIMOE_STOPPED_CODE is set, a stopped run exits with that code instead, so that a launcher
       can start the same command again
  1    training stopped with an error
  2    the settings are wrong
  130  interrupted before there was anything to save, or interrupted a second time
  141  the reader of the output of --print-config or --dry-run has gone (`… | head`)
"""

from __future__ import annotations

if __name__ == "__main__":
    from unimoe_jax.runtime.memory import restart_with_huge_pages

    restart_with_huge_pages()

import argparse
import sys
from collections.abc import Sequence

from unimoe_jax.config.load import Resolved, print_config, resolve_config, settings_help
from unimoe_jax.data.tally import TooManyBadSamples
from unimoe_jax.evaluate.exact_match import SCORING_ERRORS
from unimoe_jax.parallel import distributed
from unimoe_jax.runtime.files import WriteError
from unimoe_jax.runtime.pipes import exit_quietly_on_closed_pipe
from unimoe_jax.runtime.program import program_name
from unimoe_jax.train.dry_run import dry_run
from unimoe_jax.train.loop import TrainingStopped
from unimoe_jax.train.preflight import check_stage_name
from unimoe_jax.train.run import run
from unimoe_jax.train.run_folder import RunFolderError

SETTINGS_ERRORS = (*SCORING_ERRORS, RunFolderError)
# Data that cannot be read at the start (a missing file, a broken tokenizer) count as bad settings.
DATA_ERRORS = (FileNotFoundError, ValueError)


# ------------------------------------------------------------------------------ command line


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `--help` lists every setting with its default."""
    parser = argparse.ArgumentParser(
        prog=program_name("train"),
        description=__doc__,
        epilog="settings (override with key=value, e.g. stages.tune.optim.steps=50)\n\n"
        + settings_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config",
        required=True,
        help="run file, or the name of one that comes with the package, e.g. tiny",
    )
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
    """Run the command line. Returns the exit code; see the module's docstring."""
    args = parse(arguments)
    return distributed.guard(lambda: run_command(args))


def run_command(args: argparse.Namespace) -> int:
    """Carry out the parsed command. Returns the exit code."""
    try:
        resolved = resolve(args)
        if args.print_config or args.dry_run:
            return exit_quietly_on_closed_pipe(lambda: _show(resolved, args))
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


def _show(resolved: Resolved, args: argparse.Namespace) -> int:
    """Print the settings, or carry out the dry run."""
    if args.print_config:
        print_config(resolved.config, resolved.origins)
    else:
        check_stage_name(resolved.config, args.stage)
        dry_run(resolved.config, args.stage)
    return 0


def resolve(args: argparse.Namespace) -> Resolved:
    """The run file with the overrides of the command line."""
    resolved = resolve_config(args.config, args.overrides)
    if not args.strict:
        return resolved
    # A stage with its own `loader` replaces the shared one entirely, so set `strict` on both.
    numbers = [number for number, stage in enumerate(resolved.config.stages) if stage.loader]
    keys = ["data.loader", *(f"stages.{number}.loader" for number in numbers)]
    return resolve_config(args.config, [*args.overrides, *(f"{k}.strict=true" for k in keys)])


if __name__ == "__main__":
    sys.exit(main())
