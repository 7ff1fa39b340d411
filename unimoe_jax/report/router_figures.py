"""Figures of routers: entropy, balance and z-loss, expert load; of one module at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

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
from unimoe_jax.report.drawing import COLOURS, has, legend, line, panels, plain_ticks, start_at_zero

MODALITIES = ("text", *MEDIA)
FEW_LAYERS = 6
FEW_CELLS = 160


def entropy_figure(stages: Stages, module: str, layers: Mapping[str, Sequence[int]]):
    """One curve per layer; `layers`: their numbers, by stage."""
    import matplotlib
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    name = metric_name(module, "router_entropy")
    names = has(stages, name)
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
            label = "all experts equally likely (ln E)"
            axes.axhline(math.log(load.shape[-1]), color="#666666", dashes=(4, 3), label=label)

    figure = panels(names, draw, "entropy [nats]")
    start_at_zero(figure)
    if not few:
        figure.colorbar(ScalarMappable(norm, shades), ax=figure.axes, label="layer", pad=0.02)
    legend(figure)
    return figure


def aux_figure(stages: Stages, module: str):
    """Balance with its value for equal shares, z-loss, and dropped slots where there are any."""
    from matplotlib.figure import Figure

    kinds = {"balance": "balance loss", "router_z": "router z-loss", "dropped": "dropped slots [%]"}
    labels = {metric_name(module, kind): label for kind, label in kinds.items()}
    rows = [name for name in labels if has(stages, name)]
    names = [stage for stage in stages if any(stage in has(stages, row) for row in rows)]
    if not rows:
        return None
    figure = Figure(figsize=(max(7.0, 1.0 + 3.8 * len(names)), 0.9 + 2.3 * len(rows)))
    grid = figure.subplots(len(rows), len(names), sharex="col", sharey="row", squeeze=False)
    for row, name in enumerate(rows):
        for column, stage in enumerate(names):
            axes = grid[row, column]
            axes.locator_params(axis="x", nbins=6, integer=True)
            plain_ticks(axes)
            if column == 0:
                axes.set_ylabel(labels[name])
            if row == 0:
                axes.set_title(stage)
            if row == len(rows) - 1:
                axes.set_xlabel("step")
            if name == metric_name(module, "dropped"):
                step, share = dropped_share(stages[stage], module)
                line(axes, step, 100 * share, COLOURS[row], smooth=True)
            else:
                line(axes, *series(stages[stage], name), COLOURS[row], smooth=True)
            if name == metric_name(module, "balance"):
                axes.axhline(1, color="#666666", dashes=(4, 3))
    legend(figure)
    return figure


def load_figure(stage: str, load: np.ndarray, layers: Sequence[int]):
    """Heat maps layer x expert, one for each modality that had tokens."""
    from matplotlib.figure import Figure

    present = [m for m in range(load.shape[1]) if load[:, m].sum() > 0]
    if not present:
        return None
    num_layers, _, num_experts = load.shape
    share = [row_shares(load[:, m]) for m in present]
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
    bar.set_label("share of the layer's slots [%]")
    bar.outline.set_visible(False)
    figure.suptitle(f"{stage}: equal shares would be {100 / num_experts:.3g} %", x=0.01, ha="left")
    return figure


def row_shares(count: np.ndarray) -> np.ndarray:
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
