"""The figures of a run, drawn from its metrics records with matplotlib's Agg canvas.

One panel per stage, because stages differ in length and in what they train. Colours are those of
Okabe and Ito (2008), which people with colour-vision deficiencies can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unimoe_jax.config import MEDIA
from unimoe_jax.metric_series import (
    Stages,
    by_stage,
    expert_load,
    layer_series,
    losses_by_modality,
    series,
)

MODALITIES = ("text", *MEDIA)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
FEW_LAYERS = 6
FEW_CELLS = 160
STYLE = {
    "savefig.dpi": 120,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.titleweight": "bold",
}


class Plot(NamedTuple):
    """A written figure: its file, a heading, and how to read it."""

    path: Path
    title: str
    caption: str


# ----------------------------------------------------------------------------------- drawing


def _panels(names: Sequence[str], draw: Callable, ylabel: str, *, log: bool = False, share=True):
    """A figure with one panel per stage; `draw(axes, name)` fills it."""
    from matplotlib.figure import Figure

    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = math.ceil(len(names) / columns)
    width = 7.0 if columns == 1 else 1.0 + 3.8 * columns
    figure = Figure(figsize=(width, 0.9 + 2.7 * rows))
    grid = figure.subplots(rows, columns, sharey=share, squeeze=False)
    for index, axes in enumerate(grid.flat):
        if index >= len(names):
            axes.set_visible(False)
            continue
        axes.set_title(names[index])
        axes.set_xlabel("step")
        if index % columns == 0:
            axes.set_ylabel(ylabel)
        if log:
            axes.set_yscale("log")
        else:
            _plain_ticks(axes)
        axes.locator_params(axis="x", nbins=6, integer=True)
        draw(axes, names[index])
    return figure


def _plain_ticks(axes) -> None:
    """Numbers in full: matplotlib's common factor would sit on the panel's title."""
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def _start_at_zero(figure) -> None:
    """Once all panels are drawn: a shared axis stops growing with the data from here on."""
    for axes in figure.axes:
        axes.set_ylim(bottom=0)


def _smooth(value: np.ndarray) -> np.ndarray:
    """Moving mean over a twentieth of the points; symmetric, so it narrows towards the ends."""
    index = np.arange(len(value))
    half = np.minimum(max(1, len(value) // 40), np.minimum(index, index[::-1]))
    total = np.concatenate([[0.0], np.cumsum(value)])
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def _line(axes, step, value, colour: str, *, dash="-", label=None, smooth=False) -> None:
    """A curve; with `smooth`, the points faint behind their moving mean. Crosses: not finite."""
    finite = np.isfinite(value)
    bad = step[~finite]
    step, value = step[finite], value[finite]
    marker = "o" if len(step) <= 12 else None
    style = {"color": colour, "linestyle": dash, "linewidth": 1.8, "markersize": 3.5}
    if smooth and len(step) > 40:
        axes.plot(step, value, color=colour, linewidth=0.8, alpha=0.25)
        value = _smooth(value)
    axes.plot(step, value, marker=marker, label=label, **style)
    if len(bad):
        low = np.full(len(bad), 0.02)
        frame = axes.get_xaxis_transform()
        axes.plot(bad, low, "x", color=COLOURS[1], transform=frame, label="not finite")


def _legend(figure, columns: int = 6) -> None:
    """One legend below the panels, every label once."""
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    if labels:
        count = min(columns, len(labels))
        figure.legend(
            labels.values(),
            labels.keys(),
            loc="outside lower center",
            ncols=count,
            handlelength=2.2,
        )


def _has(stages: Stages, name: str) -> list[str]:
    return [stage for stage, records in stages.items() if any(r.get(name) for r in records)]


# ----------------------------------------------------------------------------------- figures


def _scalar_figure(
    stages: Stages, name: str, ylabel: str, *, log=False, smooth=False, share=True, from_zero=False
):
    names = _has(stages, name)
    if not names:
        return None

    def draw(axes, stage):
        _line(axes, *series(stages[stage], name), COLOURS[0], smooth=smooth)

    positive = all((series(stages[s], name)[1] > 0).any() for s in names)
    figure = _panels(names, draw, ylabel, log=log and positive, share=share)
    if from_zero:
        _start_at_zero(figure)
    _legend(figure)
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
            _line(axes, step, loss, colour, dash=dash, label=signature or "text", smooth=True)

    figure = _panels(names, draw, "loss [nats per token]")
    _legend(figure, columns=5)
    return figure


def _entropy_figure(stages: Stages, layers: Mapping[str, Sequence[int]]):
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    names = _has(stages, "router_entropy")
    if not names:
        return None
    indices = sorted({layer for name in names for layer in layers[name]})
    few = len(indices) <= FEW_LAYERS
    norm = Normalize(indices[0], max(indices[-1], indices[0] + 1))
    shades = matplotlib.colormaps["viridis"]

    def draw(axes, stage):
        step, entropy = layer_series(stages[stage], "router_entropy")
        for column, layer in enumerate(layers[stage]):
            colour = COLOURS[indices.index(layer)] if few else shades(norm(layer))
            label = f"layer {layer}" if few else None
            _line(axes, step, entropy[:, column], colour, label=label, smooth=True)
        load = expert_load(stages[stage])
        if load is not None:
            label = "all experts equally likely (ln E)"
            axes.axhline(math.log(load.shape[-1]), color="#666666", dashes=(4, 3), label=label)

    figure = _panels(names, draw, "entropy [nats]")
    _start_at_zero(figure)
    if not few:
        figure.colorbar(ScalarMappable(norm, shades), ax=figure.axes, label="layer", pad=0.02)
    _legend(figure)
    return figure


def _aux_figure(stages: Stages):
    from matplotlib.figure import Figure

    labels = {"balance": "balance loss", "router_z": "router z-loss", "dropped": "dropped tokens"}
    rows = [name for name in labels if _has(stages, name)]
    names = [stage for stage in stages if any(stage in _has(stages, row) for row in rows)]
    if not rows:
        return None
    figure = Figure(figsize=(max(7.0, 1.0 + 3.8 * len(names)), 0.9 + 2.3 * len(rows)))
    grid = figure.subplots(len(rows), len(names), sharex="col", sharey="row", squeeze=False)
    for row, name in enumerate(rows):
        for column, stage in enumerate(names):
            axes = grid[row, column]
            axes.locator_params(axis="x", nbins=6, integer=True)
            _plain_ticks(axes)
            if column == 0:
                axes.set_ylabel(labels[name])
            if row == 0:
                axes.set_title(stage)
            if row == len(rows) - 1:
                axes.set_xlabel("step")
            _line(axes, *series(stages[stage], name), COLOURS[row], smooth=True)
    _legend(figure)
    return figure


def _load_figure(stage: str, load: np.ndarray, layers: Sequence[int]):
    """Heat maps layer x expert, one for each modality that had tokens."""
    from matplotlib.figure import Figure

    present = [m for m in range(load.shape[1]) if load[:, m].sum() > 0]
    if not present:
        return None
    num_layers, _, num_experts = load.shape
    share = [_row_shares(load[:, m]) for m in present]
    top = max(2 / num_experts, max(np.nanmax(s) for s in share))
    annotated = num_layers * num_experts <= FEW_CELLS
    panel = max(1.8, 0.4 + (0.42 if annotated else 0.22) * num_experts)
    size = (1.8 + panel * len(present), 1.7 + max(1.2, min(9.0, 0.42 * num_layers)))
    figure = Figure(figsize=size)
    grid = figure.subplots(1, len(present), sharey=True, squeeze=False)[0]
    for axes, modality, values in zip(grid, present, share, strict=True):
        image = _heat_map(axes, values, top, annotated)
        axes.set_title(MODALITIES[modality])
        axes.set_xlabel("expert")
        axes.set_xticks(range(0, num_experts, max(1, num_experts // 8)))
    every = max(1, math.ceil(num_layers / 16))
    grid[0].set_yticks(
        range(0, num_layers, every), [layers[i] for i in range(0, num_layers, every)]
    )
    grid[0].set_ylabel("layer")
    bar = figure.colorbar(image, ax=list(grid), pad=0.02, aspect=max(8, 3 * size[1]))
    bar.set_label("share of the layer's tokens [%]")
    bar.outline.set_visible(False)
    figure.suptitle(f"{stage}: equal shares would be {100 / num_experts:.3g} %", x=0.01, ha="left")
    return figure


def _row_shares(count: np.ndarray) -> np.ndarray:
    """Counts [layer, expert] -> shares of each row; NaN in rows without tokens."""
    total = count.sum(axis=1, keepdims=True)
    return np.divide(count, total, out=np.full_like(count, np.nan), where=total > 0)


def _heat_map(axes, share: np.ndarray, top: float, annotated: bool):
    """Shares [layer, expert] in per cent: white where equal, purple below, orange above."""
    import matplotlib
    from matplotlib.colors import TwoSlopeNorm

    shades = matplotlib.colormaps["PuOr_r"].with_extremes(bad="#999999")
    norm = TwoSlopeNorm(100 / share.shape[1], 0, max(top, 1.01 / share.shape[1]) * 100)
    image = axes.imshow(share * 100, cmap=shades, norm=norm, aspect="auto")
    axes.grid(False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if annotated:
        for (row, column), value in np.ndenumerate(share):
            if np.isfinite(value):
                colour = "black" if abs(norm(value * 100) - 0.5) < 0.33 else "white"
                axes.text(
                    column,
                    row,
                    f"{value * 100:.0f}",
                    ha="center",
                    va="center",
                    color=colour,
                    size=9,
                )
    return image


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
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.set_xlim(0, 100)
    axes.set_xlabel("held-out exact match [%]")
    _legend(figure)
    return figure


# ------------------------------------------------------------------------------------- public


def write_plots(
    records: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    moe_layers: Sequence[int] | None = None,
    heldout: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Plot]:
    """Writes `folder`/*.png and returns what was written, in reading order.

    `moe_layers` are the decoder layers that the rows of `router_entropy` and `expert_load` belong
    to; without it, or where their number differs, rows are counted from 0.
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
        for name, title, caption, figure in _figures(by_stage(records), moe_layers, heldout or {}):
            if figure is None:
                continue
            plots.append(Plot(folder / f"{name}.png", title, caption))
            figure.savefig(plots[-1].path, format="png")
    return plots


def _figures(stages: Stages, moe_layers, heldout):
    """(file name, heading, caption, figure or None) of every figure."""
    yield "heldout", "Before and after the last stage", "", _heldout_figure(heldout)
    loss = "loss [nats per token]"
    caption = "Thick: moving mean; faint: single steps; orange crosses: not finite."
    yield "loss", "Loss", caption, _scalar_figure(stages, "loss", loss, smooth=True)
    caption = "Batches hold one combination of media each."
    yield "loss_by_modality", "Loss by modality", caption, _signature_figure(stages)
    rate = _scalar_figure(stages, "lr", "learning rate", share=False, from_zero=True)
    yield "learning_rate", "Learning rate", "", rate
    norm = _scalar_figure(stages, "grad_norm", "gradient norm", log=True, smooth=True)
    yield "grad_norm", "Gradient norm", "Of the trained parameters, before clipping.", norm
    speed = _scalar_figure(stages, "tokens_per_s", "tokens per second", smooth=True, from_zero=True)
    yield "tokens_per_s", "Throughput", "", speed
    yield "aux_losses", "Router losses", "", _aux_figure(stages)
    layers = {}
    for stage in _has(stages, "router_entropy") + _has(stages, "expert_load"):
        first = next(r for r in stages[stage] if r.get("router_entropy") or r.get("expert_load"))
        count = len(first.get("router_entropy") or first["expert_load"])
        matches = moe_layers is not None and len(moe_layers) == count
        layers[stage] = list(moe_layers) if matches else list(range(count))
    caption = "Near the dashed line the router does not distinguish; near 0 it always picks one."
    yield "router_entropy", "Router entropy", caption, _entropy_figure(stages, layers)
    caption = "White: an equal share. Differences between the panels are specialisation."
    for stage in _has(stages, "expert_load"):
        figure = _load_figure(stage, expert_load(stages[stage]), layers[stage])
        yield f"expert_load_{stage}", f"Expert load, last quarter of {stage}", caption, figure
