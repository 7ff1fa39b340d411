"""Compile a run's real programs for devices that are not here: does it fit, what does it cost?

    python -m unimoe_jax.compile --config configs/run/unimoe_8e.yaml --topology v5p:2x2x4
    python -m unimoe_jax.compile --config configs/run/tiny.yaml --topology cpu:8 [key=value …]

TPU topologies need `pip install -e '.[tpu]'` and no TPU; names are KIND:SHAPE, as v5e:2x4 or
v5p:2x2x2. `h200:8` needs `.[gpu]` and no GPU. No parameter is made and no data are read: batches
hold half soft tokens, in equal parts of every medium the model takes (`--media image=2,speech=10`
says otherwise, in entries per pool group). Prints a summary and writes it as JSON, here unless
`--json` names a file. Exit codes: 0 fits, 1 does not, 2 bad settings.

Memory per device, in classes:
  parameters, optimizer, batch, weights, cache    what the program is given; by shape and sharding
  activations       what the forward pass keeps for the backward pass, one micro-batch's; read from
                    the compiled program, see hlo_memory.py
  temporaries       what else the compiler plans: all the heap (its own number) but the activations
  new outputs       results that do not take the place of an argument
  program           machine code
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from unimoe_jax import config_io
from unimoe_jax.compile_report import collective_table, report_path, summary, too_large, verdict
from unimoe_jax.compile_serving import serving_program
from unimoe_jax.compile_targets import HBM_GIB, target_devices
from unimoe_jax.config import ModelConfig, RunConfig, StageConfig
from unimoe_jax.config_yaml import ConfigError
from unimoe_jax.data.batch import Batch, batch_spec
from unimoe_jax.flops import step_flops
from unimoe_jax.hlo_memory import activation_bytes
from unimoe_jax.hlo_stats import Stats, read
from unimoe_jax.metrics import write_json_atomic
from unimoe_jax.params import ParamError
from unimoe_jax.programs import batch_structs, lower_score, lower_step
from unimoe_jax.setup_data import pool_groups
from unimoe_jax.sharding import ShardingError, data_shards, make_mesh, use_mesh
from unimoe_jax.stage import Stage, build_stage

MEDIA_SHARE = 0.5
PROGRAMS = ("train", "score", "prefill", "decode")
EFFORT = {"quick": (-1.0, "O1"), "full": (0.0, "UNKNOWN")}
"""How much XLA spends on machine code; a TPU's compiler spends nearly all of its time there. FLOPs
and collectives are settled before; the heap is laid out anew, see benchmarks/README.md. The second
is the setting's form from jax 0.12 on."""


def set_effort(name: str) -> None:
    """For everything that is compiled from here on; `name` is a key of `EFFORT`."""
    effort, level = EFFORT[name]
    if hasattr(jax.config, "jax_exec_time_optimization_effort"):
        jax.config.update("jax_exec_time_optimization_effort", effort)
    else:
        jax.config.update("jax_optimization_level", level)


# ---------------------------------------------------------------------------- what to compile


def parse_media(text: str | None, model: ModelConfig) -> dict[str, int] | None:
    """`image=2,speech=10` -> entries per pool group.

    Raises:
        ConfigError: not of this form, nothing of a medium, or one that the model does not take.
    """
    if text is None:
        return None
    pairs = re.findall(r"(\w+)=(0*[1-9]\d*)(?:,|$)", text)
    known, counts = set(model.tokens_per_medium()), dict(pairs)
    read = ",".join(f"{name}={count}" for name, count in counts.items())
    if read != text or counts.keys() - known:
        raise ConfigError(
            f"--media {text}: wanted NAME=COUNT,…, NAME of {sorted(known)}, each once, COUNT from "
            "1 up"
        )
    return {name: int(count) for name, count in counts.items()}


def assumed_batch(
    run: RunConfig,
    stage: StageConfig,
    shards: int,
    media: Mapping[str, int] | None,
    program: str = "train",
) -> tuple[Batch, dict[str, int]]:
    """(ArraySpecs of the batch of a train or a score step, pool entries per pool group)."""
    model, loader = run.stage_model(stage), stage.loader or run.data.loader
    groups = pool_groups(run, stage, shards)
    tokens = model.tokens_per_medium()
    if media is None:
        room = MEDIA_SHARE * loader.rows * loader.row_length / groups
        media = {name: max(1, round(room / len(tokens) / size)) for name, size in tokens.items()}
    # Micro-batches are those of an optimizer step: scoring has none, as in `heldout_pipeline`.
    times = stage.optim.accumulate if program == "train" else 1
    spec = batch_spec(model, loader.rows * times, loader.row_length, groups * times, dict(media))
    return spec, dict(media)


# ------------------------------------------------------------------------------- the report


def memory_classes(stage: Stage, mesh: Mesh, spec: Batch) -> dict[str, int]:
    """Bytes per device of what a step is given: exact, from shapes and shardings."""
    state = stage.state_template(mesh)

    def size(tree: Any) -> int:
        return sum(
            int(np.prod(leaf.sharding.shard_shape(leaf.shape), dtype=np.int64))
            * leaf.dtype.itemsize
            for leaf in jax.tree.leaves(tree)
        )

    return {
        "frozen parameters": size(stage.frozen_template()),
        "trained parameters": size(state.trained),
        "optimizer": size(state.optimizer),
        "batch": size(batch_structs(mesh, spec)),
    }


def expert_shards(stage: Stage) -> dict[str, dict[str, Any]]:
    """How the kernels of experts lie on the mesh: shape, axes that cut it, a device's part."""
    table = {}
    for path, info in stage.infos.items():
        if "/experts/" in path and path.endswith("/kernel"):
            placed = stage.shardings[path]
            table[path] = {
                "shape": list(info.shape),
                "cut_over": [
                    list(axes) if isinstance(axes, tuple) else axes for axes in placed.spec
                ],
                "per_device": list(placed.shard_shape(info.shape)),
            }
    return table


def working_memory(compiled: jax.stages.Compiled, text: str) -> dict[str, int]:
    """Bytes per device that the program, whose HLO is `text`, needs beside its arguments."""
    sizes = compiled.memory_analysis()
    activations = activation_bytes(text)
    return {
        "activations": activations,
        "temporaries": sizes.temp_size_in_bytes - activations,
        "new outputs": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
    }


def compile_program(
    run: RunConfig, config: StageConfig, mesh: Mesh, args: argparse.Namespace
) -> dict[str, Any]:
    """Everything that is reported about one program; must run inside `use_mesh`."""
    report: dict[str, Any] = {"mesh": dict(mesh.shape), "devices": mesh.size}
    started = time.monotonic()
    if args.program in ("prefill", "decode"):
        length = args.length or config_length(run, config)
        serving = serving_program(run, config, mesh, args.program, args.rows, length)
        report |= {"rows": serving.rows, "row_length": serving.length}
        report["memory"], make = dict(serving.memory), serving.compile
    else:
        media = parse_media(args.media, run.stage_model(config))
        spec, media = assumed_batch(run, config, data_shards(mesh), media, args.program)
        rows, length = spec.token_id_BT.shape
        report |= {"rows": rows, "row_length": length, "media_per_pool_group": media}
        stage = build_stage(run, config, mesh, steps=config.optim.steps or 1000)
        report["memory"] = memory_classes(stage, mesh, spec)
        report["experts"] = expert_shards(stage)
        train = args.program == "train"
        lowered = lower_step(run, stage, mesh, spec) if train else lower_score(stage, mesh, spec)
        make = lowered.compile
    report["trace_seconds"] = round(time.monotonic() - started, 1)
    started = time.monotonic(), time.process_time()
    try:
        compiled = make()
    except jax.errors.JaxRuntimeError as error:
        return report | too_large(error)
    report["compile_seconds"] = round(time.monotonic() - started[0], 1)
    report["compile_processor_seconds"] = round(time.process_time() - started[1], 1)
    text = compiled.as_text()
    if args.hlo:
        args.hlo.write_text(text)
    report["memory"] |= working_memory(compiled, text)
    report["memory"]["sum"] = sum(report["memory"].values())
    stats = read(text)
    report |= {
        "flops_per_device": stats.flops,
        "flops_per_trip_of_loops_of_unknown_length": stats.flops_unknown,
        "loops_of_unknown_length": stats.loops_unknown,
        "collectives": collective_table(stats),
    }
    if args.program == "train":
        report |= _needed(run, config, spec, stats, mesh.size)
    return report


def config_length(run: RunConfig, config: StageConfig) -> int:
    """Positions of a row of the stage."""
    return (config.loader or run.data.loader).row_length


def _needed(
    run: RunConfig, config: StageConfig, spec: Batch, stats: Stats, devices: int
) -> dict[str, float]:
    """What the model needs, and the ratio of what the program does to it."""
    needed, experts, head = (flops / devices for flops in step_flops(run, config, spec))
    # Loops over the rows that were routed to an expert, or over positions with a target, have no
    # length before they run; nor have those over the tiles that packed rows see, which neither
    # number holds, nor what the kernel does that TPUs run instead.
    counted = stats.flops + experts + head
    return {
        "flops_needed_per_device": needed,
        "flops_needed_in_experts_per_device": experts,
        "flops_needed_in_head_per_device": head,
        "flops_ratio": counted / needed,
    }


# ------------------------------------------------------------------------------ the program


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_jax.compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="run file")
    parser.add_argument("--stage", help="default: the last")
    parser.add_argument("--topology", required=True, help="v5p:2x2x4, h200:8, cpu:8, …")
    parser.add_argument("--program", choices=PROGRAMS, default="train")
    parser.add_argument(
        "--rows",
        type=_positive,
        default=8,
        help="side by side in decode; in prefill those of them that go together; default: 8",
    )
    parser.add_argument(
        "--length",
        type=_positive,
        help="of prompt or cache, rounded up as generation does; default: row_length",
    )
    parser.add_argument("--media", help="pool entries per pool group, as image=2,speech=10")
    parser.add_argument(
        "--memory", type=_size, metavar="GIB", help="per device; default: the kind's"
    )
    parser.add_argument("--effort", choices=EFFORT, default="quick", help="of the compiler")
    parser.add_argument("--hlo", type=Path, help="write the optimised program's text here")
    parser.add_argument(
        "--json",
        type=Path,
        help="default: NAME_STAGE_TOPOLOGY.json here, with _PROGRAM unless it is train",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    return parser.parse_intermixed_args(arguments)


def _positive(text: str) -> int:
    """An argument that counts something."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 up")
    return int(text)


def _size(text: str) -> float:
    """An argument that says how large something is."""
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return size


def check_target(flag: str, path: Path) -> None:
    """Makes the folder of `path`; what is wrong with it must show before the compiler runs.

    Raises:
        ConfigError: `path` cannot be written; `flag` says what is to be changed.
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
    """Returns the exit code; see the module's docstring."""
    args = parse(arguments)
    set_effort(args.effort)
    try:
        run = config_io.load(args.config, args.overrides)
        stages = {stage.name: stage for stage in run.stages}
        name = args.stage or run.stages[-1].name
        if name not in stages:
            raise ConfigError(f"--stage {name}: no such stage; the run has {', '.join(stages)}")
        mesh = make_mesh(run.mesh, target_devices(args.topology))
        path = args.json or report_path(run.name, name, args.topology, args.program)
        check_target("--json", path)
        if args.hlo:
            check_target("--hlo", args.hlo)
        # Abstract: what is computed while preparing must not be sent to devices that are not here.
        with use_mesh(mesh.abstract_mesh, run.mesh.rules):
            report = compile_program(run, stages[name], mesh, args)
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
