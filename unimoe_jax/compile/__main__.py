"""Compile a run's real programs for devices that are not here: do they fit, what do they cost?

    python -m unimoe_jax.compile --config configs/run/unimoe_8e.yaml --topology v5p:2x2x4
    python -m unimoe_jax.compile --config configs/run/tiny.yaml --topology cpu:8 [key=value …]

TPU topologies need `pip install -e '.[tpu]'` and no TPU; their names are KIND:SHAPE, such as
v5e:2x4 or v5p:2x2x2. `h200:8` needs `.[gpu]` and no GPU. No parameter is made and no data are
read: half of the positions of a batch are soft tokens, in equal parts of every medium that the
model takes; `--media image=2,speech=10` sets the numbers instead, in entries per pool group. The
command prints a summary and writes it as JSON into the working directory, or to the file that
`--json` names.
Exit codes: 0 the program fits, 1 it does not, 2 the settings are wrong.

Memory per device, in classes:
  parameters, optimizer, batch, weights, cache
                    arguments of the program, computed from shapes and shardings
  activations       what the forward pass of one micro-batch keeps for the backward pass; read from
                    the compiled program, see compile/hlo_memory.py
  temporaries       the rest of the heap that the compiler plans
  new outputs       results that do not reuse the memory of an argument
  program           machine code
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from unimoe_jax.compile.measure import compile_program
from unimoe_jax.compile.summary import report_path, summary, verdict
from unimoe_jax.compile.targets import HBM_GIB, target_devices
from unimoe_jax.config import ConfigError
from unimoe_jax.config.load import load_config
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.parallel.sharding import ShardingError, make_mesh, use_mesh
from unimoe_jax.params.paths import ParamError
from unimoe_jax.runtime.files import write_json_atomic
from unimoe_jax.runtime.program import program_name

PROGRAMS = ("train", "score", "prefill", "decode")
EFFORT = {"quick": (-1.0, "O1"), "full": (0.0, "UNKNOWN")}
"""How much time XLA spends on generating machine code, which takes nearly all of a TPU compilation.
The effort changes neither FLOPs nor collectives; it may change the memory layout, see
benchmarks/README.md. The first value is the setting before jax 0.12, the second from then on."""


def set_effort(name: str) -> None:
    """Set the effort of every later compilation; `name` is a key of `EFFORT`."""
    effort, level = EFFORT[name]
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        jax.config.update("jax_exec_time_optimization_effort", effort)
    else:
        jax.config.update("jax_optimization_level", level)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("compile"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="run file, or a name, e.g. tiny")
    parser.add_argument("--stage", help="default: the last stage")
    parser.add_argument("--topology", required=True, help="v5p:2x2x4, h200:8, cpu:8, …")
    parser.add_argument("--program", choices=PROGRAMS, default="train")
    parser.add_argument(
        "--rows",
        type=_positive,
        default=8,
        help="rows of a decoding batch; prefill takes as many of them as are prefilled together; "
        "default: 8",
    )
    parser.add_argument(
        "--length",
        type=_positive,
        help="positions of prompt or cache, rounded up as generation does; default: row_length",
    )
    parser.add_argument("--media", help="pool entries per pool group, as image=2,speech=10")
    parser.add_argument(
        "--memory", type=_size, metavar="GIB", help="memory per device; default: that of the kind"
    )
    parser.add_argument("--effort", choices=EFFORT, default="quick", help="effort of the compiler")
    parser.add_argument("--hlo", type=Path, help="write the optimised program's text here")
    parser.add_argument(
        "--json",
        type=Path,
        help="default: NAME_STAGE_TOPOLOGY.json here, with _PROGRAM unless it is train",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def _positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _size(text: str) -> float:
    """A finite number above 0, for argparse."""
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return size


def check_target(flag: str, path: Path) -> None:
    """Make the folder of `path`, so that a wrong path is reported before the compiler runs.

    Raises:
        ConfigError: `path` cannot be written; the message names the option `flag`.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"its folder cannot be made ({error.strerror})"
        raise ConfigError(f"{flag} {path}: {reason}; name a file elsewhere") from error
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{flag} {path}: its folder is read-only; name a file elsewhere")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; see the module's docstring."""
    args = parse(arguments)
    set_effort(args.effort)
    try:
        run = load_config(args.config, args.overrides)
        stages = {stage.name: stage for stage in run.stages}
        name = args.stage or run.stages[-1].name
        if name not in stages:
            raise ConfigError(f"--stage {name}: no such stage; the run has {', '.join(stages)}")
        mesh = make_mesh(run.mesh, target_devices(args.topology))
        path = args.json or report_path(run.name, name, args.topology, args.program)
        check_target("--json", path)
        if args.hlo:
            check_target("--hlo", args.hlo)
        # An abstract mesh keeps values that are computed while tracing from being sent to devices
        # that are not here.
        with use_mesh(mesh.abstract_mesh, run.mesh.rules):
            report = compile_program(run, resolve_stage(run, stages[name]), mesh, args)
    except (ConfigError, ParamError, ShardingError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    limit = args.memory or HBM_GIB.get(args.topology.partition(":")[0])
    report = {
        "config": run.name,
        "stage": name,
        "program": args.program,
        "topology": args.topology,
        "jax": jax.__version__,
        "effort": args.effort,
        **report,
    }
    report["verdict"] = verdict(report, limit)
    write_json_atomic(path, report)
    print(summary(report))
    return 0 if not report["verdict"].startswith("does not") else 1


if __name__ == "__main__":
    sys.exit(main())
