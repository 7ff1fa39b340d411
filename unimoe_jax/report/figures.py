"""All figures of a run, drawn from its metrics records and written as PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
    legend,
    line,
    panels,
    stages_with,
    start_at_zero,
)
from unimoe_jax.report.router_figures import aux_figure, entropy_figure, load_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOSS_LABEL = "loss [nats per token]"


class Plot(NamedTuple):
    """A figure that was written: its file, a heading, and a caption that says how to read it."""

    path: Path
    title: str
    caption: str


class Drawing(NamedTuple):
    """A figure that is not written yet; `figure` is None if the run has nothing to show in it."""

    name: str
    title: str
    caption: str
    figure: Figure | None


# ------------------------------------------------------------------------------- all figures


def write_plots(
    records: Sequence[Mapping[str, Any]],
    folder: Path,
    *,
    moe_layers: Sequence[int] | None = None,
    heldout: Mapping[str, Mapping[str, Any]] | None = None,
    scored: str = "",
) -> list[Plot]:
    """Write `folder`/*.png, and return the plots in reading order.

    `moe_layers` are the decoder layers to which the rows of `router_entropy` and `expert_load`
    belong. Without it, or if its length differs from the number of rows, rows are counted from 0.
    `heldout` holds the scores of stage `scored`, as in summary.json.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plots need matplotlib; `pip install matplotlib` or set log.plots=false"
        ) from error
    folder.mkdir(parents=True, exist_ok=True)
    plots = []
    with matplotlib.rc_context(STYLE):
        for drawing in _drawings(by_stage(records), moe_layers, heldout or {}, scored):
            if drawing.figure is None:
                continue
            path = folder / f"{drawing.name}.png"
            drawing.figure.savefig(path, format="png")
            plots.append(Plot(path, drawing.title, drawing.caption))
    return plots


def _drawings(
    stages: Stages,
    moe_layers: Sequence[int] | None,
    heldout: Mapping[str, Mapping[str, Any]],
    scored: str,
) -> Iterator[Drawing]:
    """Draw the figures one by one, so that only one is held in memory."""
    yield Drawing(
        "heldout",
        f"Before and after {scored or 'the last stage'}",
        "",
        _heldout_figure(heldout),
    )
    yield Drawing(
        "loss",
        "Loss",
        "The thick line is a moving mean; the faint line shows single steps. Orange crosses mark "
        "steps whose loss was NaN or infinite.",
        _scalar_figure(stages, "loss", LOSS_LABEL, smooth=True),
    )
    yield Drawing(
        "loss_by_modality",
        "Loss by modality",
        "Each sample counts for the combination of media that it holds, whichever samples share "
        "its batch.",
        _modality_figure(stages),
    )
    yield Drawing(
        "learning_rate",
        "Learning rate",
        "",
        _scalar_figure(stages, "lr", "learning rate", share=False, from_zero=True),
    )
    yield Drawing(
        "grad_norm",
        "Gradient norm",
        "The norm over all trained parameters, before clipping.",
        _scalar_figure(stages, "grad_norm", "gradient norm", log=True, smooth=True),
    )
    yield Drawing(
        "tokens_per_s",
        "Throughput",
        "",
        _scalar_figure(stages, "tokens_per_s", "tokens per second", smooth=True, from_zero=True),
    )
    for module in MODULES:
        yield from _router_drawings(stages, module, moe_layers if module == "decoder" else None)


def _router_drawings(
    stages: Stages, module: str, moe_layers: Sequence[int] | None
) -> Iterator[Drawing]:
    """Draw the figures of the routers of one module; they are empty if it has no routers."""
    suffix = "" if module == "decoder" else f", {module}"
    losses, entropy, load = (
        metric_name(module, name) for name in ("aux_losses", "router_entropy", "expert_load")
    )
    yield Drawing(
        losses,
        f"Router losses{suffix}",
        "The dashed line is the balance loss when all experts are equally likely and equally "
        "often chosen.",
        aux_figure(stages, module),
    )
    layers = {
        stage: _layer_numbers(stages[stage], entropy, load, moe_layers)
        for stage in stages_with(stages, entropy) + stages_with(stages, load)
    }
    yield Drawing(
        entropy,
        f"Router entropy{suffix}",
        "Near the dashed line the router does not distinguish between experts; near 0 it always "
        "picks the same one.",
        entropy_figure(stages, module, layers),
    )
    for stage in stages_with(stages, load):
        counts = expert_load(stages[stage], module)
        assert counts is not None  # stages_with has found some
        yield Drawing(
            f"{load}_{stage}",
            f"Expert load{suffix}, last quarter of {stage}",
            "White is an equal share. Where panels differ, experts have specialised in modalities.",
            load_figure(stage, counts, layers[stage]),
        )


def _layer_numbers(
    records: Sequence[Mapping], entropy: str, load: str, moe_layers: Sequence[int] | None
) -> list[int]:
    """The number of the layer to which every row of the metrics `entropy` and `load` belongs."""
    first = next(r for r in records if r.get(entropy) or r.get(load))
    count = len(first.get(entropy) or first[load])
    if moe_layers is not None and len(moe_layers) == count:
        return list(moe_layers)
    return list(range(count))


# ----------------------------------------------------------------------------- single figures


def _scalar_figure(
    stages: Stages,
    name: str,
    ylabel: str,
    *,
    log: bool = False,
    smooth: bool = False,
    share: bool = True,
    from_zero: bool = False,
) -> Figure | None:
    """One curve per stage of the metric `name`, or None if no stage has it."""
    names = stages_with(stages, name)
    if not names:
        return None

    def draw(axes, stage):
        step, value = series(stages[stage], name)
        line(axes, step, value, COLOURS[0], smooth=smooth)

    # A logarithmic axis needs at least one positive value in every panel.
    positive = all((series(stages[stage], name)[1] > 0).any() for stage in names)
    figure = panels(names, draw, ylabel, log=log and positive, share=share)
    if from_zero:
        start_at_zero(figure)
    legend(figure)
    return figure


def _modality_figure(stages: Stages) -> Figure | None:
    """One curve per combination of media and stage, or None if no record holds such losses."""
    losses = {stage: losses_by_modality(records) for stage, records in stages.items()}
    names = [stage for stage, curves in losses.items() if curves]
    media = sorted({combination for curves in losses.values() for combination in curves})
    if not media:
        return None

    def draw(axes, stage):
        for combination, (step, loss) in losses[stage].items():
            # Combinations beyond the number of colours use the same colours with other dashes.
            dash_index, colour_index = divmod(media.index(combination), len(COLOURS))
            dash = DASHES[dash_index % len(DASHES)]
            label = combination or "text"
            line(axes, step, loss, COLOURS[colour_index], dash=dash, label=label, smooth=True)

    figure = panels(names, draw, LOSS_LABEL)
    legend(figure, columns=5)
    return figure


def _heldout_figure(heldout: Mapping[str, Mapping[str, Any]]) -> Figure | None:
    """Accuracy before and after, with the chance level; one row per task, None without tasks."""
    from matplotlib.figure import Figure

    tasks = list(heldout)[::-1]  # rows are drawn from the bottom up
    if not tasks:
        return None
    figure = Figure(figsize=(7.0, 1.4 + 0.42 * len(tasks)))
    axes = figure.subplots()
    # A grey line connects the two scores of a task.
    for row, task in enumerate(tasks):
        before, after = (heldout[task].get(name) for name in ("before", "after"))
        if before is not None and after is not None:
            ends = [100 * before, 100 * after]
            axes.plot(ends, [row, row], color="#BBBBBB", linewidth=2, zorder=1)
    styles = {
        "chance": {"marker": "|", "markersize": 16, "markeredgewidth": 2, "color": "#888888"},
        "before": {"marker": "o", "markersize": 8, "color": COLOURS[4]},
        "after": {"marker": "o", "markersize": 8, "color": COLOURS[0]},
    }
    for name, style in styles.items():
        scores = [(heldout[task].get(name), row) for row, task in enumerate(tasks)]
        points = [(100 * score, row) for score, row in scores if score is not None]
        if points:
            axes.plot(*zip(*points, strict=True), linestyle="", label=name, clip_on=False, **style)
    # A source may have a name such as $a_$, which is no formula.
    axes.set_yticks(range(len(tasks)), tasks, parse_math=False)
    axes.set_ylim(-0.6, len(tasks) - 0.4)
    axes.set_xlim(0, 100)
    axes.set_xlabel("held-out exact match [%]")
    legend(figure)
    return figure
