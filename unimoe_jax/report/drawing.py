"""The parts that all figures share: one style, panels, curves and legends.

A figure has one panel per stage, because stages differ in length and in which parameters they
train. The colours are those of Okabe and Ito (2008), which people with colour-vision deficiencies
can tell apart. matplotlib is imported inside the functions, so that a run without plots needs none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from unimoe_jax.metrics.series import Stages

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
STYLE: dict[Any, Any] = {
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
FEW_POINTS = 12
"""A curve with at most this many points marks each of them."""
MANY_POINTS = 40
"""A curve with more points than this is smoothed, if it may be."""


def panels(
    names: Sequence[str],
    draw: Callable[[Axes, str], None],
    ylabel: str,
    *,
    log: bool = False,
    share: bool = True,
) -> Figure:
    """A figure with one panel per stage, which `draw(axes, name)` fills.

    `log` makes the y axis logarithmic; `share` gives all panels the same y axis.
    """
    from matplotlib.figure import Figure

    # Four panels form a square; other numbers come in rows of three.
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


def plain_ticks(axes: Axes) -> None:
    """Write numbers in full: matplotlib would print a common factor on top of the panel's title."""
    axes.ticklabel_format(axis="y", style="plain", useOffset=False)


def start_at_zero(figure: Figure) -> None:
    """Let all y axes begin at zero.

    Call this after all panels are drawn: a shared axis no longer grows with the data afterwards.
    """
    for axes in figure.axes:
        axes.set_ylim(bottom=0)


def smoothed(value: np.ndarray) -> np.ndarray:
    """A moving mean over a twentieth of the points, [N] -> [N].

    The window is symmetric, so it becomes narrower towards both ends, and the first and last point
    keep their values.
    """
    index = np.arange(len(value))
    half = np.minimum(max(1, len(value) // 40), np.minimum(index, index[::-1]))
    # The sum of a window is the difference of two cumulative sums.
    total = np.concatenate([[0.0], np.cumsum(value)])
    return (total[index + half + 1] - total[index - half]) / (2 * half + 1)


def line(
    axes: Axes,
    step: np.ndarray,
    value: np.ndarray,
    colour: Any,
    *,
    dash: str = "-",
    label: str | None = None,
    smooth: bool = False,
) -> None:
    """Draw a curve, and a cross at the bottom of the panel for every NaN or infinite value.

    `smooth` draws the moving mean of a long curve, and its single points faintly behind it.
    """
    finite = np.isfinite(value)
    bad_steps = step[~finite]
    step, value = step[finite], value[finite]
    marker = "o" if len(step) <= FEW_POINTS else None
    if smooth and len(step) > MANY_POINTS:
        axes.plot(step, value, color=colour, linewidth=0.8, alpha=0.25)
        value = smoothed(value)
    axes.plot(
        step,
        value,
        color=colour,
        linestyle=dash,
        linewidth=1.8,
        marker=marker,
        markersize=3.5,
        label=label,
    )
    if len(bad_steps):
        # x counts steps; y counts from 0 at the bottom of the panel to 1 at its top.
        frame = axes.get_xaxis_transform()
        height = np.full(len(bad_steps), 0.02)
        axes.plot(bad_steps, height, "x", color=COLOURS[1], transform=frame, label="not finite")


def legend(figure: Figure, columns: int = 6) -> None:
    """Put one legend below the panels, in which every label occurs once."""
    labels: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            labels.setdefault(label, handle)
    if labels:
        figure.legend(
            list(labels.values()),
            list(labels.keys()),
            loc="outside lower center",
            ncols=min(columns, len(labels)),
            handlelength=2.2,
        )


def stages_with(stages: Stages, metric: str) -> list[str]:
    """Names of the stages whose records hold `metric`."""
    return [name for name, records in stages.items() if any(r.get(metric) for r in records)]
