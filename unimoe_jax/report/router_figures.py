"""Figures of the routers of one module: losses, entropy, and the load of its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from unimoe_jax.config import MEDIA
from unimoe_jax.metrics.series import (
    Stages,
    dropped_share,
    expert_load,
    layer_series,
    metric_name,
    series,
)
from unimoe_jax.report.drawing import (
    COLOURS,
    legend,
    line,
    panels,
    plain_ticks,
    stages_with,
    start_at_zero,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

MODALITIES = ("text", *MEDIA)
FEW_LAYERS = 6
"""Up to this many layers have a colour and a legend entry each; more are shades of one scale."""
FEW_CELLS = 160
"""A heat map of up to this many cells shows its numbers."""
GUIDE = {"color": "#666666", "dashes": (4, 3)}


def entropy_figure(
    stages: Stages, module: str, layers: Mapping[str, Sequence[int]]
) -> Figure | None:
    """One curve per layer. `layers` are the numbers of the layers, by stage."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    name = metric_name(module, "router_entropy")
    names = stages_with(stages, name)
    if not names:
        return None
    indices = sorted({layer for stage in names for layer in layers[stage]})
    few = len(indices) <= FEW_LAYERS
    norm = Normalize(indices[0], max(indices[-1], indices[0] + 1))
    shades = matplotlib.colormaps["viridis"]

    def draw(axes, stage):
        step, entropy = layer_series(stages[stage], name)
        for column, layer in enumerate(layers[stage]):
            colour = COLOURS[indices.index(layer)] if few else shades(norm(layer))
            label = f"layer {layer}" if few else None
            line(axes, step, entropy[:, column], colour, label=label, smooth=True)
        load = expert_load(stages[stage], module)
        if load is not None:
            num_experts = load.shape[-1]
            axes.axhline(math.log(num_experts), label="all experts equally likely (ln E)", **GUIDE)

    figure = panels(names, draw, "entropy [nats]")
    start_at_zero(figure)
    if not few:
        figure.colorbar(ScalarMappable(norm, shades), ax=figure.axes, label="layer", pad=0.02)
    legend(figure)
    return figure


def aux_figure(stages: Stages, module: str) -> Figure | None:
    """Balance loss, z-loss and dropped slots: one row for each that exists, a column per stage."""
    from matplotlib.figure import Figure

    labels = {
        "balance": "balance loss",
        "router_z": "router z-loss",
        "dropped": "dropped slots [%]",
    }
    kinds = [kind for kind in labels if stages_with(stages, metric_name(module, kind))]
    names = [
        stage
        for stage in stages
        if any(stage in stages_with(stages, metric_name(module, kind)) for kind in kinds)
    ]
    if not kinds:
        return None
    figure = Figure(figsize=(max(7.0, 1.0 + 3.8 * len(names)), 0.9 + 2.3 * len(kinds)))
    grid = figure.subplots(len(kinds), len(names), sharex="col", sharey="row", squeeze=False)
    for row, kind in enumerate(kinds):
        grid[row, 0].set_ylabel(labels[kind])
        for column, stage in enumerate(names):
            axes = grid[row, column]
            axes.locator_params(axis="x", nbins=6, integer=True)
            plain_ticks(axes)
            _draw_aux_curve(axes, stages[stage], module, kind, COLOURS[row])
    for column, stage in enumerate(names):
        grid[0, column].set_title(stage)
        grid[-1, column].set_xlabel("step")
    legend(figure)
    return figure


def _draw_aux_curve(
    axes: Axes, records: Sequence[Mapping], module: str, kind: str, colour: str
) -> None:
    """Draw one metric of the routers: `balance`, `router_z` or `dropped`."""
    if kind == "dropped":
        step, share = dropped_share(records, module)
        line(axes, step, 100 * share, colour, smooth=True)
        return
    step, value = series(records, metric_name(module, kind))
    line(axes, step, value, colour, smooth=True)
    if kind == "balance":
        axes.axhline(1, **GUIDE)


def load_figure(stage: str, load: np.ndarray, layers: Sequence[int]) -> Figure | None:
    """Heat maps over layers and experts, one for each modality that had tokens.

    `load` are counts of slots [layer, modality, expert]; `layers` are the numbers of the layers.
    """
    from matplotlib.figure import Figure

    present = [m for m in range(load.shape[1]) if load[:, m].sum() > 0]
    if not present:
        return None
    num_layers, _, num_experts = load.shape
    shares = [row_shares(load[:, m]) for m in present]
    # All panels use one scale, which reaches to at least twice the equal share.
    top = max(2 / num_experts, max(np.nanmax(share) for share in shares))

    # The size follows the numbers of layers and experts.
    annotated = num_layers * num_experts <= FEW_CELLS
    panel_width = max(1.8, 0.4 + (0.42 if annotated else 0.22) * num_experts)
    height = 1.7 + max(1.2, min(9.0, 0.42 * num_layers))
    figure = Figure(figsize=(1.8 + panel_width * len(present), height))
    grid = figure.subplots(1, len(present), sharey=True, squeeze=False)[0]
    images = []
    for axes, modality, share in zip(grid, present, shares, strict=True):
        images.append(_heat_map(axes, share, top, annotated))
        axes.set_title(MODALITIES[modality])
        axes.set_xlabel("expert")
        axes.set_xticks(range(0, num_experts, max(1, num_experts // 8)))

    # The y axis and the colour bar belong to all panels. At most 16 layers are labelled.
    labelled = range(0, num_layers, max(1, math.ceil(num_layers / 16)))
    grid[0].set_yticks(labelled, [layers[row] for row in labelled])
    grid[0].set_ylabel("layer")
    bar = figure.colorbar(images[-1], ax=list(grid), pad=0.02, aspect=max(8, 3 * height))
    bar.set_label("share of the layer's slots [%]")
    bar.outline.set_visible(False)
    figure.suptitle(f"{stage}: equal shares would be {100 / num_experts:.3g} %", x=0.01, ha="left")
    return figure


def row_shares(count: np.ndarray) -> np.ndarray:
    """Counts [layer, expert] -> shares of each row; NaN in rows without tokens.

    [[1, 3], [0, 0]] becomes [[0.25, 0.75], [NaN, NaN]].
    """
    total = count.sum(axis=1, keepdims=True)
    return np.divide(count, total, out=np.full_like(count, np.nan), where=total > 0)


def _heat_map(axes: Axes, share: np.ndarray, top: float, annotated: bool) -> AxesImage:
    """Draw shares [layer, expert] in per cent: white if equal, purple below, orange above.

    Rows without tokens are grey. `annotated` writes the number into every cell.
    """
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
                # White digits on the dark ends of the scale, black ones in its light middle.
                colour = "black" if abs(norm(value * 100) - 0.5) < 0.33 else "white"
                text = f"{value * 100:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=colour, size=9)
    return image
