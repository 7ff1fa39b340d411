"""What `unimoe_jax.compile` says about a program: collectives, verdict, the text for people."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax

from unimoe_jax.compile.hlo import Stats

GIB = 2**30


def collective_table(stats: Stats) -> list[dict[str, Any]]:
    """Collectives of a kind, size and group together, the most bytes first."""
    table: dict[tuple, dict[str, Any]] = {}
    for one in stats.collectives:
        key = (one.op, one.bytes, one.group, one.conditional)
        row = table.setdefault(
            key,
            {
                "op": one.op,
                "bytes": int(one.bytes),
                "devices": one.group,
                "conditional": one.conditional,
                "runs": 0,
            },
        )
        row["runs"] += int(one.count)
    return sorted(table.values(), key=lambda row: -row["bytes"] * row["runs"])


def too_large(error: jax.errors.JaxRuntimeError) -> dict[str, Any]:
    """What the compiler says when a program exceeds a TPU's memory; other errors go on."""
    sizes = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)G hbm", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
        raise error
    used = float(sizes[1]) / (1 if sizes[2] == "G" else 1024)
    return {"compiler_refused": str(error).splitlines()[0], "needed_gib": used}


def verdict(report: dict[str, Any], limit_gib: float | None) -> str:
    """`fits`, or by how much not; without a known limit only what is needed."""
    needed = report.get("needed_gib") or report["memory"]["sum"] / GIB
    if limit_gib is None:
        return f"needs {needed:.2f} GiB per device"
    if needed <= limit_gib:
        return f"fits: {needed:.2f} of {limit_gib:.2f} GiB per device"
    return f"does not fit: {needed - limit_gib:.2f} GiB more than the {limit_gib:.2f} of a device"


def summary(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"{report['program']} step of {report['config']}, stage {report['stage']}, on "
        f"{report['topology']}: {report['devices']} devices {report['mesh']}",
        f"{report['rows']} rows of {report['row_length']}, media per pool group "
        f"{report.get('media_per_pool_group', {})}",
        "memory per device",
    ]
    lines += [f"  {name:<34}{size / GIB:>10.3f} GiB" for name, size in report["memory"].items()]
    if "collectives" in report:
        seconds = report["compile_seconds"], report["compile_processor_seconds"]
        lines.append("compiled in {} s, {} s of a processor".format(*seconds))
        lines.append(f"{report['flops_per_device']:.4g} FLOPs per device")
        if report["loops_of_unknown_length"]:
            trip = report["flops_per_trip_of_loops_of_unknown_length"]
            count = report["loops_of_unknown_length"]
            lines.append(f"  and {count} loops whose length depends on the data, {trip:.4g} a trip")
        if "flops_ratio" in report:
            note = "of such loops what experts and head need"
            lines.append(f"  {report['flops_ratio']:.3f} of what the model needs, {note}")
        for row in report["collectives"]:
            note = " (not in every step)" if row["conditional"] else ""
            lines.append(
                f"  {row['op']:<20}{row['bytes']:>16,} B x {row['runs']:<6} over {row['devices']}"
                f"{note}"
            )
    return "\n".join([*lines, report["verdict"]])


def report_path(run: str, stage: str, topology: str, program: str) -> Path:
    """Where the report goes unless told; programs of one run do not overwrite one another."""
    suffix = "" if program == "train" else f"_{program}"
    return Path(f"{run}_{stage}_{topology.replace(':', '_')}{suffix}.json")
