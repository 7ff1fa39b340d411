"""report.html: one page that shows a run and needs no other file."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.config import ConfigError
from unimoe_jax.config.load import load_config
from unimoe_jax.metrics.records import METRICS_FILE, read_metrics
from unimoe_jax.metrics.series import by_stage
from unimoe_jax.report import figures
from unimoe_jax.report.numbers import ReportError, finished_text, scored_stage, stage_facts
from unimoe_jax.report.tables import (
    Table,
    heldout_tables,
    router_table,
    stage_table,
    trend_table,
)
from unimoe_jax.runtime.files import write_text_atomic


class Section(NamedTuple):
    """A heading and the tables below it."""

    title: str
    tables: Sequence[Table]


class Figure(NamedTuple):
    """A picture inside the page; `base64` is its PNG file."""

    title: str
    caption: str
    base64: str


class ShownFile(NamedTuple):
    """A file of the run directory that the reader can unfold."""

    name: str
    text: str


@dataclass(frozen=True)
class Page:
    """Everything that the template shows.

    Attributes:
        name: of the run.
        state: whether the run has finished, and how long it took.
        run_dir: as the user wrote it.
        logged_steps, bad_steps: number of records, and of those whose loss is NaN or infinite.
        next_command: the command line to try next, or "".
    """

    name: str
    state: str
    run_dir: str
    logged_steps: int
    bad_steps: int
    next_command: str
    sections: Sequence[Section]
    figures: Sequence[Figure]
    files: Sequence[ShownFile]


def write_report(run_dir: str | os.PathLike) -> Path:
    """Write plots/*.png and report.html into `run_dir`, and return the path of report.html.

    metrics.jsonl must be there. Without summary.json the run counts as unfinished. config.yaml, if
    it is there, supplies the numbers of the MoE layers.

    Raises:
        ReportError: the directory holds nothing to report, or one of its files is broken.
        ModuleNotFoundError: matplotlib is not installed.
    """
    run_dir = Path(run_dir)
    layout = RunLayout(run_dir)
    records = _read_records(run_dir)
    summary = _read_summary(layout.summary)
    if not records and not summary:
        raise ReportError(f"{run_dir / METRICS_FILE} is empty: no step was logged yet")
    plots = figures.write_plots(
        records,
        layout.plots,
        moe_layers=_moe_layers(layout.config),
        heldout=summary.get("heldout"),
        scored=scored_stage(summary.get("stages", {})),
    )
    write_text_atomic(layout.report, render(build_page(run_dir, summary, records, plots)))
    return layout.report


def build_page(
    run_dir: Path,
    summary: Mapping[str, Any],
    records: Sequence[Mapping],
    plots: Sequence[figures.Plot],
) -> Page:
    """Collect the contents of the page. `summary` is empty if the run has not finished."""
    stages = by_stage(records)
    # A finished stage is described by summary.json, an unfinished one by its records.
    facts = {name: stage_facts(stage_records) for name, stage_records in stages.items()}
    facts |= summary.get("stages", {})
    losses = [float(record.get("loss") or 0) for record in records]
    sections = [
        Section("Stages", [stage_table(facts)]),
        Section("Held-out exact match", heldout_tables(summary, facts)),
        Section("Routers", [table for table in [router_table(stages)] if table]),
        Section("Router losses", [table for table in [trend_table(summary)] if table]),
    ]
    return Page(
        name=summary.get("name") or run_dir.resolve().name,
        state=finished_text(summary) if summary else "unfinished: there is no summary.json",
        run_dir=os.fspath(run_dir),
        logged_steps=len(records),
        bad_steps=sum(not math.isfinite(loss) for loss in losses),
        next_command=summary.get("next_command") or "",
        sections=[section for section in sections if section.tables],
        figures=[_embed(plot) for plot in plots],
        files=_shown_files(run_dir),
    )


def render(page: Page) -> str:
    """The page as HTML. Jinja2 escapes every value, so a name may contain any character."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unimoe_jax.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("report.html.j2").render(page=page)


def _embed(plot: figures.Plot) -> Figure:
    png = base64.b64encode(plot.path.read_bytes()).decode()
    return Figure(plot.title, plot.caption, png)


def _shown_files(run_dir: Path) -> list[ShownFile]:
    layout = RunLayout(run_dir)
    paths = [layout.config, layout.environment, layout.summary]
    return [ShownFile(p.name, p.read_text(encoding="utf-8")) for p in paths if p.exists()]


def _read_records(run_dir: Path) -> list[dict]:
    """The records of metrics.jsonl.

    Raises:
        ReportError: `run_dir` is not the directory of a run, or the file is broken.
    """
    try:
        return read_metrics(run_dir)
    except FileNotFoundError as error:
        raise ReportError(
            f"{run_dir / METRICS_FILE} does not exist; give the directory of a run"
        ) from error
    except NotADirectoryError as error:
        raise ReportError(f"{run_dir} is a file; give the directory of a run") from error
    except ValueError as error:
        raise ReportError(str(error)) from error


def _read_summary(path: Path) -> dict[str, Any]:
    """summary.json, or an empty dict if the run has not written it yet."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(
            f"{path} is not valid JSON ({error}); delete it, or run the training command again"
        ) from error


def _moe_layers(config: Path) -> list[int] | None:
    """Numbers of the decoder layers that have experts; None without config.yaml."""
    if not config.exists():
        return None
    try:
        flags = load_config(config).model.decoder.moe_layers()
    except ConfigError as error:
        raise ReportError(str(error)) from error
    return [layer for layer, is_moe in enumerate(flags) if is_moe]
