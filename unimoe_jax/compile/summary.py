"""The report on a compiled program for people: collectives, verdict, text, and its file name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from unimoe_jax.compile.hlo import Stats

GIB = 2**30


def collective_table(stats: Stats) -> list[dict[str, Any]]:
    """One row for all collectives of the same kind, size and group, the most bytes first."""
    table: dict[tuple, dict[str, Any]] = {}
    for collective in stats.collectives:
        key = (collective.op, collective.bytes, collective.group, collective.conditional)
        row = table.setdefault(
            key,
            {
                "op": collective.op,
                "bytes": int(collective.bytes),
                "devices": collective.group,
                "conditional": collective.conditional,
                "runs": 0,
            },
        )
        row["runs"] += int(collective.count)
    return sorted(table.values(), key=lambda row: -row["bytes"] * row["runs"])


def too_large(error: Exception) -> dict[str, Any]:
    """The part of a report on a program that its compiler refused, because a TPU's memory is small.

    error: a `jax.errors.JaxRuntimeError`. It is raised again if it has another cause.
    """
    sizes = re.search(r"Used ([\d.]+)([GM]) of ([\d.]+)G hbm", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
        raise error
    used = float(sizes[1]) / (1 if sizes[2] == "G" else 1024)
    return {"compiler_refused": str(error).splitlines()[0], "needed_gib": used}


def verdict(report: dict[str, Any], limit_gib: float | None) -> str:
    """Whether a program fits, or how much memory is missing.

    limit_gib: memory per device; None, if it is not known, gives only the memory that is needed.
    """
    needed = report.get("needed_gib") or report["memory"]["sum"] / GIB
    if limit_gib is None:
        return f"needs {needed:.2f} GiB per device"
    if needed <= limit_gib:
        return f"fits: {needed:.2f} of {limit_gib:.2f} GiB per device"
    return f"does not fit: {needed - limit_gib:.2f} GiB more than the {limit_gib:.2f} of a device"


def summary(report: dict[str, Any]) -> str:
    """The report as text."""
    # The program, its batch, and its memory.
    lines = [
        f"{report['program']} step of {report['config']}, stage {report['stage']}, on "
        f"{report['topology']}: {report['devices']} devices {report['mesh']}",
        f"{report['rows']} rows of {report['row_length']}, media per pool group "
        f"{report.get('media_per_pool_group', {})}",
        "memory per device",
    ]
    lines += [f"  {name:<34}{size / GIB:>10.3f} GiB" for name, size in report["memory"].items()]
    # FLOPs and collectives, unless the compiler has refused the program.
    if "collectives" in report:
        lines.append(
            f"compiled in {report['compile_seconds']} s, {report['compile_processor_seconds']} s "
            "of a processor"
        )
        lines.append(f"{report['flops_per_device']:.4g} FLOPs per device")
        if report["loops_of_unknown_length"]:
            trip = report["flops_per_trip_of_loops_of_unknown_length"]
            count = report["loops_of_unknown_length"]
            lines.append(f"  and {count} loops whose length depends on the data, {trip:.4g} a trip")
        if "flops_ratio" in report:
            lines.append(
                f"  {report['flops_ratio']:.3f} of the FLOPs that the model needs; loops over "
                "experts and head count with what they need"
            )
        for row in report["collectives"]:
            note = " (not in every step)" if row["conditional"] else ""
            lines.append(
                f"  {row['op']:<20}{row['bytes']:>16,} B x {row['runs']:<6} over {row['devices']}"
                f"{note}"
            )
    return "\n".join([*lines, report["verdict"]])


def report_path(run: str, stage: str, topology: str, program: str) -> Path:
    """The default file of a report, a different one for every program of a run."""
    suffix = "" if program == "train" else f"_{program}"
    return Path(f"{run}_{stage}_{topology.replace(':', '_')}{suffix}.json")
