"""The figures of a run, drawn from its metrics records with matplotlib's Agg canvas."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unimoe_jax.config import MODULES
from unimoe_jax.metrics.series import (
    Stages,
    by_stage,
    expert_load,
    losses_by_modality,
    metric_name,
    series,
)
from unimoe_jax.report.drawing import (
    COLOURS,
    DASHES,
    STYLE,
    has,
    legend,
    line,
    panels,
    start_at_zero,
)
from unimoe_jax.report.router_figures import aux_figure, entropy_figure, load_figure


class Plot(NamedTuple):
    """A written figure: its file, a heading, and how to read it."""

    path: Path
    title: str
    caption: str


# ----------------------------------------------------------------------------------- figures


def _scalar_figure(
    stages: Stages, name: str, ylabel: str, *, log=False, smooth=False, share=True, from_zero=False
):
    names = has(stages, name)
    if not names:
        return None

    def draw(axes, stage):
        line(axes, *series(stages[stage], name), COLOURS[0], smooth=smooth)

    positive = all((series(stages[s], name)[1] > 0).any() for s in names)
    figure = panels(names, draw, ylabel, log=log and positive, share=share)
    if from_zero:
        start_at_zero(figure)
    legend(figure)
    return figure


def _signature_figure(stages: Stages):
    losses = {stage: losses_by_modality(records) for stage, records in stages.items()}
    names = [stage for stage, found in losses.items() if found]
    signatures = sorted({signature for found in losses.values() for signature in found})
    if not signatures:
        return None

    def draw(axes, stage):
        for signature, (step, loss) in losses[stage].items():
            index = signatures.index(signature)
            colour = COLOURS[index % len(COLOURS)]
            dash = DASHES[index // len(COLOURS) % len(DASHES)]
            line(axes, step, loss, colour, dash=dash, label=signature or "text", smooth=True)

    figure = panels(names, draw, "loss [nats per token]")
    legend(figure, columns=5)
    return figure


def _heldout_figure(heldout: Mapping[str, Mapping[str, Any]]):
    """Accuracy before -> after per task, with the chance level."""
    from matplotlib.figure import Figure

    tasks = list(heldout)[::-1]
    if not tasks:
        return None
    figure = Figure(figsize=(7.0, 1.4 + 0.42 * len(tasks)))
    axes = figure.subplots()
    styles = {
        "chance": {"marker": "|", "markersize": 16, "markeredgewidth": 2, "color": "#888888"},
        "before": {"marker": "o", "markersize": 8, "color": COLOURS[4]},
        "after": {"marker": "o", "markersize": 8, "color": COLOURS[0]},
    }
    for row, task in enumerate(tasks):
        ends = [heldout[task].get(name) for name in ("before", "after")]
        if None not in ends:
            axes.plot([100 * e for e in ends], [row, row], color="#BBBBBB", linewidth=2, zorder=1)
    for name, style in styles.items():
        scores = [(heldout[task].get(name), row) for row, task in enumerate(tasks)]
        known = [(100 * score, row) for score, row in scores if score is not None]
        if known:
            axes.plot(*zip(*known, strict=True), linestyle="", label=name, clip_on=False, **style)
    axes.set_yticks(range(len(tasks)), tasks, parse_math=False)  # a source may be called $a_$
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.set_xlim(0, 100)
    axes.set_xlabel("held-out exact match [%]")
    legend(figure)
    return figure


# ------------------------------------------------------------------------------------- public


def write_plots(
    records: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    moe_layers: Sequence[int] | None = None,
    heldout: Mapping[str, Mapping[str, Any]] | None = None,
    scored: str = "",
) -> list[Plot]:
    """Writes `folder`/*.png and returns what was written, in reading order.

    `moe_layers` are the decoder layers that the rows of `router_entropy` and `expert_load` belong
    to; without it, or where their number differs, rows are counted from 0. `heldout` holds the
    scores of stage `scored`.
    Raises ModuleNotFoundError without matplotlib.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib; `pip install matplotlib` or set log.plots=false"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        plots = []
        ends = {scored or "the last stage": heldout or {}}
        for name, title, caption, figure in _figures(by_stage(records), moe_layers, ends):
            if figure is None:
                continue
            plots.append(Plot(folder / f"{name}.png", title, caption))
            figure.savefig(plots[-1].path, format="png")
    return plots


def _figures(stages: Stages, moe_layers, heldout):
    """(file name, heading, caption, figure or None) of every figure. heldout: stage -> scores."""
    for stage, scores in heldout.items():
        yield "heldout", f"Before and after {stage}", "", _heldout_figure(scores)
    loss = "loss [nats per token]"
    caption = "Thick: moving mean; faint: single steps; orange crosses: not finite."
    yield "loss", "Loss", caption, _scalar_figure(stages, "loss", loss, smooth=True)
    caption = "By the media of each sample, whatever else its batch holds."
    yield "loss_by_modality", "Loss by modality", caption, _signature_figure(stages)
    rate = _scalar_figure(stages, "lr", "learning rate", share=False, from_zero=True)
    yield "learning_rate", "Learning rate", "", rate
    norm = _scalar_figure(stages, "grad_norm", "gradient norm", log=True, smooth=True)
    yield "grad_norm", "Gradient norm", "Of the trained parameters, before clipping.", norm
    speed = _scalar_figure(stages, "tokens_per_s", "tokens per second", smooth=True, from_zero=True)
    yield "tokens_per_s", "Throughput", "", speed
    for module in MODULES:
        yield from _router_figures(stages, module, moe_layers if module == "decoder" else None)


def _router_figures(stages: Stages, module: str, moe_layers) -> Iterator[tuple]:
    """As `_figures`, of the routers of one module; nothing where it has none."""
    where = "" if module == "decoder" else f", {module}"
    caption = "Dashed: balance when experts are equally likely and equally chosen."
    name = metric_name(module, "aux_losses")
    yield name, f"Router losses{where}", caption, aux_figure(stages, module)
    layers, entropy, load = {}, *(metric_name(module, m) for m in ("router_entropy", "expert_load"))
    for stage in has(stages, entropy) + has(stages, load):
        first = next(r for r in stages[stage] if r.get(entropy) or r.get(load))
        count = len(first.get(entropy) or first[load])
        matches = moe_layers is not None and len(moe_layers) == count
        layers[stage] = list(moe_layers) if matches else list(range(count))
    caption = "Near the dashed line the router does not distinguish; near 0 it always picks one."
    yield entropy, f"Router entropy{where}", caption, entropy_figure(stages, module, layers)
    caption = "White: an equal share. Differences between the panels are specialisation."
    for stage in has(stages, load):
        figure = load_figure(stage, expert_load(stages[stage], module), layers[stage])
        title = f"Expert load{where}, last quarter of {stage}"
        yield f"{load}_{stage}", title, caption, figure
