"""What all figures are drawn with: panels, curves, legends and one style.

One panel per stage, because stages differ in length and in what they train. Colours are those of
Okabe and Ito (2008), which people with colour-vision deficiencies can tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from unimoe_jax.metrics.series import Stages

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
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


def panels(names: Sequence[str], draw: Callable, ylabel: str, *, log: bool = False, share=True):
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
            plain_ticks(axes)
        axes.locator_params(axis="x", nbins=6, integer=True)
        draw(axes, names[index])
    return figure


def plain_ticks(axes) -> None:
    """Numbers in full: matplotlib's common factor would sit on the panel's title."""
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def start_at_zero(figure) -> None:
    """Once all panels are drawn: a shared axis stops growing with the data from here on."""
    for axes in figure.axes:
        axes.set_ylim(bottom=0)


def smoothed(value: np.ndarray) -> np.ndarray:
    """Moving mean over a twentieth of the points; symmetric, so it narrows towards the ends."""
    index = np.arange(len(value))
    half = np.minimum(max(1, len(value) // 40), np.minimum(index, index[::-1]))
    total = np.concatenate([[0.0], np.cumsum(value)])
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def line(axes, step, value, colour: str, *, dash="-", label=None, smooth=False) -> None:
    """A curve; with `smooth`, the points faint behind their moving mean. Crosses: not finite."""
    finite = np.isfinite(value)
    bad = step[~finite]
    step, value = step[finite], value[finite]
    marker = "o" if len(step) <= 12 else None
    style = {"color": colour, "linestyle": dash, "linewidth": 1.8, "markersize": 3.5}
    if smooth and len(step) > 40:
        axes.plot(step, value, color=colour, linewidth=0.8, alpha=0.25)
        value = smoothed(value)
    axes.plot(step, value, marker=marker, label=label, **style)
    if len(bad):
        low = np.full(len(bad), 0.02)
        frame = axes.get_xaxis_transform()
        axes.plot(bad, low, "x", color=COLOURS[1], transform=frame, label="not finite")


def legend(figure, columns: int = 6) -> None:
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


def has(stages: Stages, name: str) -> list[str]:
    return [stage for stage, records in stages.items() if any(r.get(name) for r in records)]
