"""report.html, one self-contained page."""

from __future__ import annotations

import base64
import json
import math
import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from unimoe_jax.config import MODULES, load
from unimoe_jax.config.load import load_config
from unimoe_jax.metrics.progress import format_seconds
from unimoe_jax.metrics.records import METRICS_FILE, read_metrics
from unimoe_jax.metrics.router_trends import HEAD, rows_of
from unimoe_jax.metrics.series import Stages, by_stage
from unimoe_jax.report import figures
from unimoe_jax.report.console import what_finished
from unimoe_jax.report.numbers import (
    ReportError,
    format_number,
    format_percent,
    router_facts,
    stage_facts,
)
from unimoe_jax.runtime.files import write_text_atomic

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
            format_number(stage.get("first_loss")),
            format_number(stage.get("last_loss")),
            format_number(stage.get("tokens_per_s"), "{:,.0f}"),
        ]
        for name, stage in facts.items()
    ]
    return _table(["stage", "steps", "time", "first loss", "last loss", "tokens/s"], rows)


def _heldout_tables(summary: Mapping[str, Any], facts: Mapping[str, Mapping]) -> str:
    parts = []
    if summary.get("heldout"):
        rows = [
            [task, *(format_percent(score.get(k)) for k in ("before", "after", "chance"))]
            for task, score in summary["heldout"].items()
        ]
        stage = _scored(summary.get("stages", {}))
        head = ["task", f"before {stage}", f"after {stage}", "chance"]
        parts.append(_table(head, rows))
    scored = {name: stage["heldout"] for name, stage in facts.items() if stage.get("heldout")}
    if len(scored) > 1:
        tasks = list(dict.fromkeys(task for scores in scored.values() for task in scores))
        rows = [[task, *(format_percent(s.get(task)) for s in scored.values())] for task in tasks]
        parts.append(_table(["task", *scored], rows, "At the end of each stage"))
    return "<h2>Held-out exact match</h2>" + "".join(parts) if parts else ""


def _scored(stages: Mapping[str, Mapping]) -> str:
    """The stage whose scores `heldout` of the summary holds: the last that has any."""
    return next((name for name in reversed(stages) if stages[name].get("heldout")), "")


def _router_table(stages: Stages) -> str:
    rows = []
    for name, records in stages.items():
        facts = {module: router_facts(records, module) for module in MODULES}
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


def _figure(plot: figures.Plot) -> str:
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
    facts = {name: stage_facts(found) for name, found in stages.items()}
    facts |= summary.get("stages", {})
    name = summary.get("name") or run_dir.resolve().name
    state = what_finished(summary) if summary else "unfinished: there is no summary.json"
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
    drawn = figures.write_plots(
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
        flags = load_config(config).model.decoder.moe_layers()
    except load.ConfigError as error:
        raise ReportError(str(error)) from error
    return [layer for layer, is_moe in enumerate(flags) if is_moe]
