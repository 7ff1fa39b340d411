"""Compile one program and measure it: memory, FLOPs and collectives."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from unimoe_jax.compile.decoding import decoding_program
from unimoe_jax.compile.flops import step_flops
from unimoe_jax.compile.hlo import Stats, read
from unimoe_jax.compile.hlo_memory import activation_bytes
from unimoe_jax.compile.summary import collective_table, too_large
from unimoe_jax.config import ConfigError, MediaName, ModelConfig, RunConfig
from unimoe_jax.config.stage_settings import StageSettings
from unimoe_jax.data.batch import Batch, batch_spec
from unimoe_jax.parallel.placement import batch_structs, bytes_per_device
from unimoe_jax.parallel.sharding import data_shards
from unimoe_jax.stages.programs import lower_score, lower_step
from unimoe_jax.stages.stage import Stage, build_stage

MEDIA_SHARE = 0.5
"""Share of the positions of a batch that media fill, if the user names no numbers."""


def parse_media(text: str | None, model: ModelConfig) -> dict[MediaName, int] | None:
    """`image=2,speech=10` -> entries per pool group.

    Raises:
        ConfigError: another form, a count of 0, or a medium that the model does not take.
    """
    if text is None:
        return None
    pairs = re.findall(r"(\w+)=(0*[1-9]\d*)(?:,|$)", text)
    known: set[Any] = set(model.tokens_per_medium())
    counts: dict[Any, str] = dict(pairs)
    read = ",".join(f"{name}={count}" for name, count in counts.items())
    if read != text or counts.keys() - known:
        raise ConfigError(
            f"--media {text}: wanted NAME=COUNT,…, NAME of {sorted(known)}, each once, COUNT from "
            "1 up"
        )
    return {name: int(count) for name, count in counts.items()}


def assumed_batch(
    settings: StageSettings,
    shards: int,
    media: Mapping[MediaName, int] | None,
    program: str = "train",
) -> tuple[Batch, dict[MediaName, int]]:
    """(ArraySpecs of the batch of a train or a score step, pool entries per pool group).

    media: entries per pool group; None fills MEDIA_SHARE of the positions with media, in equal
    parts.
    """
    model, loader = settings.model, settings.loader
    groups = settings.pool_groups(shards)
    tokens = model.tokens_per_medium()
    if media is None:
        room = MEDIA_SHARE * loader.rows * loader.row_length / groups
        media = {name: max(1, round(room / len(tokens) / size)) for name, size in tokens.items()}
    # A train step takes all micro-batches of an optimizer step; scoring has none.
    times = settings.config.optim.accumulate if program == "train" else 1
    spec = batch_spec(model, loader.rows * times, loader.row_length, groups * times, dict(media))
    return spec, dict(media)


def memory_classes(stage: Stage, mesh: Mesh, spec: Batch) -> dict[str, int]:
    """Bytes per device of the arguments of a step: exact, from shapes and shardings."""
    state = stage.state_template(mesh)
    return {
        "frozen parameters": bytes_per_device(stage.frozen_template()),
        "trained parameters": bytes_per_device(state.trained),
        "optimizer": bytes_per_device(state.optimizer),
        "batch": bytes_per_device(batch_structs(mesh, spec)),
    }


def expert_shards(stage: Stage) -> dict[str, dict[str, Any]]:
    """How the kernels of experts are sharded: shape, mesh axes that cut it, and a device's part."""
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
    """Bytes per device that the program with the HLO `text` needs beside its arguments."""
    sizes: Any = compiled.memory_analysis()
    activations = activation_bytes(text)
    return {
        "activations": activations,
        "temporaries": sizes.temp_size_in_bytes - activations,
        "new outputs": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        "program": sizes.generated_code_size_in_bytes,
    }


def compile_program(
    run: RunConfig, settings: StageSettings, mesh: Mesh, args: argparse.Namespace
) -> dict[str, Any]:
    """Compile one program and report everything about it. Must run inside `use_mesh`."""
    report: dict[str, Any] = {"mesh": dict(mesh.shape), "devices": mesh.size}
    started = time.monotonic()
    if args.program in ("prefill", "decode"):
        length = args.length or settings.loader.row_length
        decoding = decoding_program(
            settings, mesh, run.mesh.rules, args.program, rows=args.rows, length=length
        )
        report |= {"rows": decoding.rows, "row_length": decoding.length}
        report["memory"], compile_now = dict(decoding.memory), decoding.compile
    else:
        media = parse_media(args.media, settings.model)
        spec, media = assumed_batch(settings, data_shards(mesh), media, args.program)
        rows, length = spec.token_id_BT.shape
        report |= {"rows": rows, "row_length": length, "media_per_pool_group": media}
        # The number of steps only shapes the schedule; with epochs it depends on data, and any
        # number gives the same program.
        stage = build_stage(settings, mesh, steps=settings.config.optim.steps or 1000)
        report["memory"] = memory_classes(stage, mesh, spec)
        report["experts"] = expert_shards(stage)
        train = args.program == "train"
        lowered = lower_step(stage, mesh, spec) if train else lower_score(stage, mesh, spec)
        compile_now = lowered.compile
    report["trace_seconds"] = round(time.monotonic() - started, 1)
    started = time.monotonic(), time.process_time()
    try:
        compiled = compile_now()
    except jax.errors.JaxRuntimeError as error:
        return report | too_large(error)
    report["compile_seconds"] = round(time.monotonic() - started[0], 1)
    report["compile_processor_seconds"] = round(time.process_time() - started[1], 1)
    text = compiled.as_text() or ""
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
        report |= _needed(settings, spec, stats, mesh.size)
    return report


def _needed(settings: StageSettings, spec: Batch, stats: Stats, devices: int) -> dict[str, float]:
    """FLOPs that the model needs per device, and the ratio of the program's FLOPs to them."""
    needed, experts, head = (flops / devices for flops in step_flops(settings, spec))
    # The length of some loops depends on the data: loops over the rows routed to an expert, and
    # over the positions that have a target. The HLO cannot say how long they are, so the needed
    # FLOPs stand in for them. Neither number includes the attention of packed rows, whose loops
    # over tiles have no static length either, nor the attention kernel that TPUs run instead.
    counted = stats.flops + experts + head
    return {
        "flops_needed_per_device": needed,
        "flops_needed_in_experts_per_device": experts,
        "flops_needed_in_head_per_device": head,
        "flops_ratio": counted / needed,
    }
