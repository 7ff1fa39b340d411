"""Figures: curves, axes, heat maps and the layers that they name."""

import numpy as np

from tests.report.made_up_run import log_stage
from unimoe_jax.metrics.records import MetricsWriter, read_metrics
from unimoe_jax.metrics.series import by_stage, dropped_share
from unimoe_jax.report import drawing, figures, router_figures
from unimoe_jax.report.tables import router_table


def test_a_held_out_source_may_have_any_name(tmp_path):
    """`$` begins a formula in matplotlib's texts."""
    heldout = {name: {"before": 0.1, "after": 0.2} for name in ("in $, $out_$", r"$\no{$", "<b>")}
    (plot,) = figures.write_plots([], tmp_path, heldout=heldout)
    assert plot.path.stat().st_size > 5000


def test_the_moving_mean_keeps_the_ends():
    value = np.arange(100.0) ** 2
    smooth = drawing.smoothed(value)
    assert smooth[0] == value[0] and smooth[-1] == value[-1]
    np.testing.assert_allclose(smooth[50], value[48:53].mean())


def test_axes_that_begin_at_zero_show_every_stage():
    records = [{"stage": s, "step": 1, "tokens_per_s": v} for s, v in (("a", 10), ("b", 90))]
    figure = figures._scalar_figure(
        by_stage(records), "tokens_per_s", "tokens per second", from_zero=True
    )
    assert figure is not None and len(figure.axes) == 2
    for axes in figure.axes:
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 90


def test_losses_that_are_not_finite_are_crosses_at_the_bottom():
    records = [{"stage": "a", "step": s, "loss": v} for s, v in ((1, 2.0), (2, "nan"), (3, 1.0))]
    figure = figures._scalar_figure(by_stage(records), "loss", "loss")
    assert figure is not None
    curve, crosses = figure.axes[0].lines
    np.testing.assert_array_equal(curve.get_xdata(), [1, 3])
    np.testing.assert_array_equal(crosses.get_xdata(), [2])


def test_layer_numbers_come_from_the_config(tmp_path, monkeypatch):
    log_stage(tmp_path, "tune", steps=4, layers=2)
    seen = {}
    real = figures.load_figure

    def remember(stage, load, layers):
        seen[stage] = layers
        return real(stage, load, layers)

    monkeypatch.setattr(figures, "load_figure", remember)
    records = read_metrics(tmp_path)
    figures.write_plots(records, tmp_path / "plots", moe_layers=[0, 2])
    assert seen == {"tune": [0, 2]}
    # Three numbers do not fit two rows, so the rows are counted.
    figures.write_plots(records, tmp_path / "plots", moe_layers=[0, 2, 4])
    assert seen == {"tune": [0, 1]}


def test_heat_maps_show_shares_of_slots():
    shares = router_figures.row_shares(np.array([[1.0, 3.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(shares, [[0.25, 0.75], [np.nan, np.nan]])
    # With top-2 routing, an expert that every token goes to has half of the slots, not all.
    figure = router_figures.load_figure("a", np.ones((1, 5, 2)), [0])
    assert figure is not None
    assert figure.axes[-1].get_ylabel() == "share of the layer's slots [%]"


def test_dropped_slots_are_a_share_however_many_steps_a_record_covers(tmp_path):
    """With two layers and top-2 routing, 100 tokens have 400 slots, so more slots may be dropped
    than there are tokens."""
    with MetricsWriter(tmp_path, "tune", 10) as writer:
        for step, steps in ((1, 1), (10, 9)):
            load = steps * np.full((2, 5, 4), 10)
            values = {"loss": 1.0, "dropped": 120.0 * steps, "expert_load": load}
            writer.write(step, values | {"router_entropy": [1.0, 1.0]})
    records = by_stage(read_metrics(tmp_path))
    step, share = dropped_share(records["tune"], "decoder")
    assert step.tolist() == [1, 10] and share.tolist() == [0.3, 0.3]
    table = router_table(records)
    assert table is not None
    assert table.head[-1] == "dropped slots" and table.rows[0][-1] == "30.0 %"
    figure = router_figures.aux_figure(records, "decoder")
    assert figure is not None
    axes = figure.axes[-1]
    assert axes.get_ylabel() == "dropped slots [%]"
    np.testing.assert_allclose(np.asarray(axes.lines[0].get_ydata()), [30, 30])
