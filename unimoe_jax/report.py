"""report.html and plots/*.png of a run, made from what the run left in its directory.

python -m unimoe_jax.report RUN_DIR
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_jax import config_io, plots
from unimoe_jax.config import MODULES
from unimoe_jax.metric_series import (
    Stages,
    by_stage,
    expert_load,
    layer_series,
    metric_name,
    series,
)
from unimoe_jax.metrics import METRICS_FILE, format_seconds, read_metrics, write_text_atomic
from unimoe_jax.router_trends import HEAD, rows_of

CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 66rem; margin: 2rem auto; padding: 0 1.2rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.4rem; border-bottom: 1px solid #ddd; }
.quiet { color: #555; } .warn { border-left: 4px solid #D55E00; padding-left: .8rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; } caption { text-align: left; color: #555; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #e5e5e5; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td { font-variant-numeric: tabular-nums; }
figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
figcaption { color: #555; }
pre { background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""


class ReportError(ValueError):
    """The run directory cannot be reported on; says what is missing or broken."""


# ----------------------------------------------------------------------------------- numbers


def _number(value: Any, shape: str = "{:.4f}") -> str:
    """`value` in words: what is missing is a dash, "nan" and "inf" stay visible."""
    return "–" if value is None else shape.format(float(value))


def _percent(value: Any) -> str:
    return _number(None if value is None else 100 * float(value), "{:.1f} %")


def _stage_facts(records: Sequence[Mapping]) -> dict[str, Any]:
    """The summary of a stage that has none yet, from its records."""
    losses = [r["loss"] for r in records if r.get("loss") is not None]
    speeds = [float(r["tokens_per_s"]) for r in records if r.get("tokens_per_s") is not None]
    return {
        "steps": records[-1]["step"],
        "seconds": float(records[-1]["time"]) - float(records[0]["time"]),
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "tokens_per_s": float(np.median(speeds)) if speeds else None,
        "heldout": None,
    }


def _router_facts(records: Sequence[Mapping], module: str) -> list[str] | None:
    """Entropy at the start and end, its limit, the largest expert share, dropped slots."""
    _, entropy = layer_series(records, metric_name(module, "router_entropy"))
    load = expert_load(records, module)
    if not len(entropy) and load is None:
        return None
    _, dropped = series(records, metric_name(module, "dropped"))
    name = metric_name(module, "expert_load")
    slots = sum(np.sum(r.get(name, 0)) for r in records) if len(dropped) else 0
    largest = limit = None
    if load is not None:
        limit = math.log(load.shape[-1])
        per_expert = load.sum(axis=1)
        total = per_expert.sum(axis=1, keepdims=True)
        largest = np.max(per_expert / np.maximum(total, 1))
    return [
        _number(entropy[0].mean() if len(entropy) else None, "{:.3f}"),
        _number(entropy[-1].mean() if len(entropy) else None, "{:.3f}"),
        _number(limit, "{:.3f}"),
        _percent(largest),
        _percent(dropped.sum() / max(slots, 1) if len(dropped) else None),
    ]


# -------------------------------------------------------------------------------------- text


def result_block(summary: Mapping[str, Any], run_dir: str | os.PathLike | None = None) -> str:
    """The block printed at the end of a run; `summary` has the shape of summary.json.

    `run_dir` is where the run lies (default: `summary["run_dir"]`, left out if there is none).
    """
    title = f"── {summary['name']}: {_what_finished(summary)} "
    lines = ["", title + "─" * max(0, 78 - len(title))]
    rows = [["stage", "steps", "loss", "tokens/s", "time"]]
    for name, stage in summary["stages"].items():
        loss = f"{_number(stage.get('first_loss'))} → {_number(stage.get('last_loss'))}"
        speed = _number(stage.get("tokens_per_s"), "{:,.0f}")
        seconds = format_seconds(stage["seconds"])
        rows.append([name, str(stage["steps"]), loss, speed, seconds])
    lines += [*_text_table(rows), *_sample_lines(summary["stages"])]
    if summary.get("heldout"):
        rows = [["held-out exact match", "before → after", "chance"]]
        for task, score in summary["heldout"].items():
            change = f"{_percent(score.get('before'))} → {_percent(score.get('after'))}"
            rows.append([task, change, _percent(score.get("chance"))])
        lines += ["", *_text_table(rows)]
    if summary.get("routers"):
        lines += ["", *_text_table([list(HEAD), *rows_of(summary["routers"])])]
    lines.append("")
    run_dir = run_dir or summary.get("run_dir")
    if run_dir:
        lines.append(f"run directory  {os.fspath(run_dir)}")
    if summary.get("next_command"):
        lines.append(f"next           {summary['next_command']}")
    return "\n".join([*lines, "─" * 78])


def _what_finished(summary: Mapping[str, Any]) -> str:
    """The run, or some of its stages, and how long they took."""
    done, planned = len(summary["stages"]), summary.get("stages_in_all", 0)
    what = f"{done} of {planned} stages finished" if done < planned else "finished"
    return f"{what} in {format_seconds(float(summary['seconds']))}"


def _sample_lines(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of the samples that stages skipped, truncated or capped, by reason; of none, nothing.

    Reads `samples` of a stage, as `Tally.as_json` gives it; stages of earlier versions have none.
    """
    rows = []
    for name, stage in stages.items():
        found = dict(stage.get("samples") or {"total": 0})
        total = found.pop("total")
        for kind, reasons in found.items():
            rows += [[name, f"{kind}: {why}", f"{n:,} of {total:,}"] for why, n in reasons.items()]
    return ["", *_text_table([["stage", "bad or cut", "samples"], *rows])] if rows else []


def _text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("   ".join(cells).rstrip())
    return lines


# -------------------------------------------------------------------------------------- HTML


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    def line(cells, tag):
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    note = f"<caption>{escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{note}<thead>{line(head, "th")}</thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _stage_table(facts: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [
        [
            name,
            f"{stage['steps']:,}",
            format_seconds(float(stage["seconds"])),
            _number(stage.get("first_loss")),
            _number(stage.get("last_loss")),
            _number(stage.get("tokens_per_s"), "{:,.0f}"),
        ]
        for name, stage in facts.items()
    ]
    return _table(["stage", "steps", "time", "first loss", "last loss", "tokens/s"], rows)


def _heldout_tables(summary: Mapping[str, Any], facts: Mapping[str, Mapping]) -> str:
    parts = []
    if summary.get("heldout"):
        rows = [
            [task, *(_percent(score.get(k)) for k in ("before", "after", "chance"))]
            for task, score in summary["heldout"].items()
        ]
        stage = _scored(summary.get("stages", {}))
        head = ["task", f"before {stage}", f"after {stage}", "chance"]
        parts.append(_table(head, rows))
    scored = {name: stage["heldout"] for name, stage in facts.items() if stage.get("heldout")}
    if len(scored) > 1:
        tasks = list(dict.fromkeys(task for scores in scored.values() for task in scores))
        rows = [[task, *(_percent(s.get(task)) for s in scored.values())] for task in tasks]
        parts.append(_table(["task", *scored], rows, "At the end of each stage"))
    return "<h2>Held-out exact match</h2>" + "".join(parts) if parts else ""


def _scored(stages: Mapping[str, Mapping]) -> str:
    """The stage whose scores `heldout` of the summary holds: the last that has any."""
    return next((name for name in reversed(stages) if stages[name].get("heldout")), "")


def _router_table(stages: Stages) -> str:
    rows = []
    for name, records in stages.items():
        facts = {module: _router_facts(records, module) for module in MODULES}
        rows += [[f"{name} {module}", *cells] for module, cells in facts.items() if cells]
    if not rows:
        return ""
    head = ["stage", "entropy, start", "entropy, end", "limit ln E"]
    head += ["largest share of one expert", "dropped slots"]
    note = "Entropy in nats, mean over layers. Largest share from the last quarter of the stage; "
    note += "a token has a slot with each of its experts in each layer."
    return "<h2>Router</h2>" + _table(head, rows, note)


def _trend_table(summary: Mapping[str, Any]) -> str:
    if not summary.get("routers"):
        return ""
    head = ["", *HEAD[1:-1], "verdict"]
    note = "Start → end (mean of the last quarter); balance is about 1 when experts are used "
    note += "alike. Least used: the smallest share of an expert in a layer, in the last quarter."
    return "<h2>Router losses</h2>" + _table(head, rows_of(summary["routers"]), note)


def _figure(plot: plots.Plot) -> str:
    data = base64.b64encode(plot.path.read_bytes()).decode()
    caption = f"<figcaption>{escape(plot.caption)}</figcaption>" if plot.caption else ""
    return (
        f"<h2>{escape(plot.title)}</h2>\n<figure>"
        f'<img alt="{escape(plot.title)}" src="data:image/png;base64,{data}">{caption}</figure>'
    )


def _details(path: Path) -> str:
    if not path.exists():
        return ""
    text = escape(path.read_text(encoding="utf-8"))
    return f"<details><summary>{escape(path.name)}</summary><pre>{text}</pre></details>"


def _page(run_dir: Path, summary: Mapping, records: Sequence[Mapping], drawn) -> str:
    stages = by_stage(records)
    facts = {name: _stage_facts(found) for name, found in stages.items()}
    facts |= summary.get("stages", {})
    name = summary.get("name") or run_dir.resolve().name
    state = _what_finished(summary) if summary else "unfinished: there is no summary.json"
    bad = sum(not math.isfinite(float(r.get("loss") or 0)) for r in records)
    parts = [
        f"<h1>{escape(name)}</h1>",
        f'<p class="quiet">{escape(state)} · {escape(os.fspath(run_dir))}</p>',
    ]
    if bad:
        parts.append(f'<p class="warn">{bad} logged steps had a loss that is not finite.</p>')
    if summary.get("next_command"):
        parts.append(f"<p>Next:</p><pre>{escape(summary['next_command'])}</pre>")
    parts += ["<h2>Stages</h2>", _stage_table(facts)]
    parts += [_heldout_tables(summary, facts), _router_table(stages), _trend_table(summary)]
    parts += [_figure(plot) for plot in drawn]
    kept = [_details(run_dir / file) for file in ("config.yaml", "env.json", "summary.json")]
    parts += ["<h2>Files</h2>", *kept]
    # The policy makes a browser refuse any request to elsewhere, should one ever slip in.
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)}</title><style>{CSS}</style></head>\n<body>\n"
        + "\n".join(part for part in parts if part)
        + "\n</body></html>\n"
    )


# ------------------------------------------------------------------------------------ public


def write_report(run_dir: str | os.PathLike) -> Path:
    """Writes plots/*.png and the self-contained report.html of `run_dir`; returns the latter.

    Needs metrics.jsonl. Without summary.json the run counts as unfinished; config.yaml supplies the
    numbers of the MoE layers. Raises ReportError if the directory holds nothing to report or a file
    is broken, ModuleNotFoundError without matplotlib.
    """
    run_dir = Path(run_dir)
    try:
        records = read_metrics(run_dir)
    except FileNotFoundError as error:
        raise ReportError(
            f"{run_dir / METRICS_FILE} does not exist; give the directory of a run"
        ) from error
    except NotADirectoryError as error:
        raise ReportError(f"{run_dir} is a file; give the directory of a run") from error
    except ValueError as error:
        raise ReportError(str(error)) from error
    summary = _read_summary(run_dir / "summary.json")
    if not records and not summary:
        raise ReportError(f"{run_dir / METRICS_FILE} is empty: no step was logged yet")
    drawn = plots.write_plots(
        records,
        run_dir / "plots",
        moe_layers=_moe_layers(run_dir / "config.yaml"),
        heldout=summary.get("heldout"),
        scored=_scored(summary.get("stages", {})),
    )
    path = run_dir / "report.html"
    write_text_atomic(path, _page(run_dir, summary, records, drawn))
    return path


def _read_summary(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{path}: not JSON ({error}); delete it or run again") from error


def _moe_layers(config: Path) -> list[int] | None:
    if not config.exists():
        return None
    try:
        flags = config_io.load(config).model.decoder.moe_layers()
    except config_io.ConfigError as error:
        raise ReportError(str(error)) from error
    return [layer for layer, is_moe in enumerate(flags) if is_moe]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 written, 2 nothing to report, a broken file, or no place to write."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_jax.report",
        description="Writes report.html and plots/*.png from the files of a run.",
        epilog="example: python -m unimoe_jax.report runs/tiny",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the directory of a run")
    run_dir = parser.parse_args(arguments).run_dir
    try:
        print(write_report(run_dir))
    except (ReportError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename or run_dir}: {error.strerror or error}"
        remedy = "the report is written into the run's directory: copy that to where you may write"
        print(f"error: {reason}; {remedy}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
