"""The report from synthetic metrics: figures, HTML, result block."""

import base64
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest

from unimoe_jax.config import RunConfig
from unimoe_jax.metrics import series
from unimoe_jax.metrics.records import MetricsWriter, read_metrics
from unimoe_jax.metrics.router_trends import as_json, router_trends, rows_of
from unimoe_jax.metrics.series import by_stage, metric_name
from unimoe_jax.report import __main__ as report
from unimoe_jax.report import drawing, figures, router_figures
from unimoe_jax.report.console import result_block
from unimoe_jax.report.numbers import ReportError
from unimoe_jax.report.page import _page, _router_table, _trend_table, write_report
from unimoe_jax.runtime.files import jsonable, write_json_atomic

SIGNATURES = ("text", "image", "audio+image", "speech")


def stage(run_dir, name, steps=60, layers=0, experts=4, seed=0, module="decoder", **extra):
    """Logs a made-up stage; with `layers`, one with experts in `module`."""
    rng = np.random.default_rng(seed)
    taste = rng.dirichlet(np.ones(experts) * 2, (layers, 5))
    with MetricsWriter(run_dir, name, steps) as writer:
        for step in range(1, steps + 1):
            values = {
                "loss": 1 + 3 * np.exp(-step / 20) + 0.1 * rng.normal(),
                "loss_by_modality": {SIGNATURES[step % len(SIGNATURES)]: 3.0 / step + 0.5},
                "lr": 1e-3 * min(1, step / 5) * (1 - step / (steps + 1)),
                "grad_norm": np.exp(rng.normal()),
                "tokens_per_s": 1e4 + 100 * rng.normal(),
            }
            if layers:
                load = rng.multinomial(500, taste)
                load[:, 2] = 0  # no video in this data set
                routers = {
                    "router_entropy": np.log(experts) * np.linspace(0.5, 0.9, layers),
                    "expert_load": load,
                    "balance": 1 + 1 / step,
                    "router_z": 0.1 / step,
                    "dropped": 0,
                }
                values |= {metric_name(module, name): value for name, value in routers.items()}
            writer.write(step, values | {k: v for k, v in extra.items() if step == steps})


SUMMARY = {
    "name": "tiny <run>",
    "seconds": 48.2,
    "stages": {
        "align": {
            "steps": 60,
            "seconds": 10.0,
            "first_loss": 4.0,
            "last_loss": 1.5,
            "tokens_per_s": 10000.0,
            "heldout": None,
        },
        "tune": {
            "steps": 60,
            "seconds": 200.0,
            "first_loss": 3.9,
            "last_loss": "nan",
            "tokens_per_s": 9000.0,
            "heldout": {"colour": 0.94, "<i>pitch": 0.5},
        },
    },
    "heldout": {
        "colour": {"before": 0.125, "after": 0.94, "chance": 0.125},
        "<i>pitch": {"before": None, "after": 0.5, "chance": 0.25},
    },
    "next_command": "python -m unimoe_jax.generate --run runs/tiny",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("tiny")
    stage(run_dir, "align")
    stage(run_dir, "tune", layers=3, seed=1)
    write_json_atomic(run_dir / "summary.json", SUMMARY)
    write_report(run_dir)
    return run_dir


def test_every_figure_is_written_and_not_blank(finished):
    names = {path.stem for path in (finished / "plots").iterdir()}
    assert names == {
        *("loss", "loss_by_modality", "learning_rate", "grad_norm", "tokens_per_s"),
        *("aux_losses", "router_entropy", "expert_load_tune", "heldout"),
    }
    for path in (finished / "plots").iterdir():
        content = path.read_bytes()
        width, height = struct.unpack(">II", content[16:24])
        assert content.startswith(b"\x89PNG") and width >= 400 and height >= 200
        assert len(content) > 5000


def test_html_is_self_contained_and_says_the_essentials(finished):
    html = (finished / "report.html").read_text()
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)|url\(|@import", html)
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert {base64.b64decode(image) for image in images} == {
        path.read_bytes() for path in (finished / "plots").iterdir()
    }
    assert "tiny &lt;run&gt;" in html and "<run>" not in html and "<i>" not in html
    text = re.sub(r"<[^>]+>", " ", html.split("<h2>Files")[0])
    text = " ".join(re.sub(r"data:\S+", "", text).split())
    assert "align 60 10.0 s 4.0000 1.5000 10,000" in text
    assert "tune 60 3 m 20 s 3.9000 nan 9,000" in text
    assert "task before tune after tune chance colour 12.5 % 94.0 % 12.5 %" in text
    assert "&lt;i&gt;pitch – 50.0 % 25.0 %" in text
    assert SUMMARY["next_command"] in text
    entropy = np.log(4) * 0.7
    assert f"tune decoder {entropy:.3f} {entropy:.3f} {np.log(4):.3f}" in text


def test_a_held_out_source_may_have_any_name(tmp_path):
    """`$` in matplotlib's texts begins a formula."""
    heldout = {name: {"before": 0.1, "after": 0.2} for name in ("in $, $out_$", r"$\no{$", "<b>")}
    (plot,) = figures.write_plots([], tmp_path, heldout=heldout)
    assert plot.path.stat().st_size > 5000


def test_scores_are_headed_by_the_stage_that_was_scored(tmp_path):
    for name in ("align", "tune", "after"):
        stage(tmp_path, name, steps=5)
    unscored = SUMMARY["stages"]["align"]
    stages = SUMMARY["stages"] | {"after": unscored}
    write_json_atomic(tmp_path / "summary.json", SUMMARY | {"stages": stages})
    html = write_report(tmp_path).read_text()
    assert "<th>before tune</th><th>after tune</th>" in html
    assert "<h2>Before and after tune</h2>" in html


def test_running_run_without_experts_is_reported_from_its_records(tmp_path, capsys):
    stage(tmp_path, "align", steps=5)
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "unfinished" in html and "Router" not in html and "Held-out" not in html
    assert not list((tmp_path / "plots").glob("expert_load*"))


def test_non_finite_losses_are_shown(tmp_path):
    stage(tmp_path, "align", steps=5, loss=float("nan"), grad_norm=float("inf"))
    assert "1 logged steps had a loss" in write_report(tmp_path).read_text()


def test_errors_say_what_is_missing(tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "metrics.jsonl does not exist; give the directory of a run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="no step was logged"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ReportError, match=r"summary.json: not JSON"):
        write_report(tmp_path)


def test_folders_that_hold_no_report_are_one_line(tmp_path, capsys):
    stage(tmp_path, "align", steps=5)
    (tmp_path / "plots").touch()  # as on a read-only disk: the folder cannot be made
    for given, said in ((tmp_path / "plots", "is a file; give"), (tmp_path, "where you may write")):
        assert report.main([str(given)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / 'plots'}") and said in line


def test_expert_load_is_summed_over_the_last_quarter():
    records = [{"stage": "a", "step": s, "expert_load": [[[s, 1]]]} for s in range(1, 9)]
    np.testing.assert_array_equal(series.expert_load(records), [[[7 + 8, 2]]])
    assert series.expert_load([{"stage": "a", "step": 1}]) is None
    shares = router_figures.row_shares(np.array([[1.0, 3.0], [0.0, 0.0]]))
    np.testing.assert_array_equal(shares, [[0.25, 0.75], [np.nan, np.nan]])
    # Of what tokens ask for: with top-2 routing an expert that all tokens go to has half of it.
    bar = router_figures.load_figure("a", np.ones((1, 5, 2)), [0]).axes[-1]
    assert bar.get_ylabel() == "share of the layer's slots [%]"


def test_the_moving_mean_keeps_the_ends():
    value = np.arange(100.0) ** 2
    smooth = drawing.smoothed(value)
    assert smooth[0] == value[0] and smooth[-1] == value[-1]
    np.testing.assert_allclose(smooth[50], value[48:53].mean())


def test_axes_from_zero_still_hold_every_stage():
    records = [{"stage": s, "step": 1, "tokens_per_s": v} for s, v in (("a", 10), ("b", 90))]
    stages = series.by_stage(records)
    figure = figures._scalar_figure(stages, "tokens_per_s", "tokens per second", from_zero=True)
    for axes in figure.axes:
        assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 90


def test_losses_by_modality_comes_from_the_records_that_hold_it():
    records = [
        {"step": 1, "loss_by_modality": {"image": 2.0}, "loss": 2.0},
        {"step": 2, "loss_by_modality": {"image": 1.0, "text": "nan"}, "loss": 5.0},
        {"step": 3, "loss": 4.0},
    ]
    found = series.losses_by_modality(records)
    np.testing.assert_array_equal(found["image"], [[1, 2], [2.0, 1.0]])
    assert set(found) == {"image", "text"}


def test_layer_numbers_come_from_the_config(tmp_path, monkeypatch):
    stage(tmp_path, "tune", steps=4, layers=2)
    seen = {}
    real = figures.load_figure
    monkeypatch.setattr(
        figures,
        "load_figure",
        lambda s, load, layers: seen.update({s: layers}) or real(s, load, layers),
    )
    records = read_metrics(tmp_path)
    figures.write_plots(records, tmp_path / "plots", moe_layers=[0, 2])
    assert seen == {"tune": [0, 2]}
    figures.write_plots(records, tmp_path / "plots", moe_layers=[0, 2, 4])
    assert seen == {"tune": [0, 1]}


def test_result_block():
    text = result_block(json.loads(json.dumps(SUMMARY)), "runs/tiny")
    lines = text.splitlines()
    assert "tiny <run>: finished in 48.2 s" in lines[1]
    assert re.fullmatch(r"align +60 +4.0000 → 1.5000 +10,000 +10.0 s", lines[3])
    assert re.fullmatch(r"tune +60 +3.9000 → nan +9,000 +3 m 20 s", lines[4])
    assert "colour                 12.5 % → 94.0 %   12.5 %" in lines
    assert "run directory  runs/tiny" in lines
    assert "next           python -m unimoe_jax.generate --run runs/tiny" in lines
    assert max(map(len, lines)) <= 80


def test_result_block_of_some_stages():
    stages = {"one": {"steps": 3, "seconds": 1.0}}
    summary = {"name": "run", "seconds": 1.0, "stages": stages, "stages_in_all": 4}
    assert "run: 1 of 4 stages finished" in result_block(summary)
    assert ">1 of 4 stages finished in 1.0 s ·" in _page(Path("runs/x"), summary, [], [])


def test_result_block_counts_the_samples_that_were_bad_or_cut():
    summary = json.loads(json.dumps(SUMMARY))
    summary["stages"]["align"]["samples"] = {"total": 9000}
    assert "bad or cut" not in result_block(summary)
    found = {"total": 9000, "bad": {"missing_file": 30}, "truncated": {"too_long": 1200}}
    summary["stages"]["tune"]["samples"] = found
    text = result_block(summary)
    assert re.search(
        r"\ntune +bad: missing_file +30 of 9,000\ntune +trunc.* 1,200 of 9,000\n", text
    )


# ------------------------------------------------------------------------------ router losses


def test_every_module_has_its_own_figures(tmp_path):
    stage(tmp_path, "sft", steps=8, layers=3, module="encoder")
    stage(tmp_path, "other", steps=8, layers=1, module="connector")
    write_report(tmp_path)
    names = {path.stem for path in (tmp_path / "plots").iterdir()}
    routers = {
        f"{module}_{name}"
        for module, stage_name in (("encoder", "sft"), ("connector", "other"))
        for name in ("aux_losses", "router_entropy", f"expert_load_{stage_name}")
    }
    assert routers <= names
    assert not {"aux_losses", "router_entropy", "encoder_expert_load_other"} & names
    html = (tmp_path / "report.html").read_text()
    assert "Router losses, encoder" in html and "Router losses, connector" in html


def test_dropped_slots_are_a_share_however_many_steps_a_record_tells_of(tmp_path):
    """Of two layers and top-2 routing 100 tokens have 400 slots: more may drop than there are
    tokens."""
    with MetricsWriter(tmp_path, "tune", 10) as writer:
        for step, steps in ((1, 1), (10, 9)):
            load = steps * np.full((2, 5, 4), 10)
            values = {"loss": 1.0, "dropped": 120.0 * steps, "expert_load": load}
            writer.write(step, values | {"router_entropy": [1.0, 1.0]})
    records = by_stage(read_metrics(tmp_path))
    step, share = series.dropped_share(records["tune"], "decoder")
    assert step.tolist() == [1, 10] and share.tolist() == [0.3, 0.3]
    table = _router_table(records)
    assert "<td>30.0 %</td></tr>" in table and "<th>dropped slots</th>" in table
    axes = router_figures.aux_figure(records, "decoder").axes[-1]
    assert axes.get_ylabel() == "dropped slots [%]"
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [30, 30])


def records_of(balance, router_z, load):
    """One stage `s` of the encoder, a record per value; `load`: [layer][expert] of every step."""
    return [
        {
            "stage": "s",
            "step": step,
            "encoder_balance": b,
            "encoder_router_z": z,
            "encoder_expert_load": [[row] for row in load],
        }
        for step, (b, z) in enumerate(zip(balance, router_z, strict=True), 1)
    ]


def run_with(aux) -> RunConfig:
    """A run with one stage `s`, which has experts in encoder and decoder."""
    own = {"aux": aux, "moe": True}
    stage = {"name": "s", "mixture": {"a": 1}, "train": [], "optim": OPTIM} | own
    data = {"sources": {"a": {"path": "a"}}, "loader": {"row_length": 1, "rows": 1}}
    moe = {"num_experts": 2, "top_k": 1}
    encoder = dict.fromkeys(ENCODER, 1) | {"num_layers": 2, "moe": moe}
    decoder = dict.fromkeys(DECODER, 1) | {"head_dim": 2, "moe": moe}
    model = {"decoder": decoder, "vision": {"encoder": encoder}}
    return RunConfig(name="x", model=model, data=data, stages=[stage])


DECODER = ("vocab_size", "hidden_size", "mlp_dim", "num_layers", "num_heads", "num_kv_heads")
ENCODER = ("image_size", "patch_size", "hidden_size", "mlp_dim", "num_heads")
OPTIM = {"learning_rate": 1, "steps": 1}
GOOD = ([1.8, 1.2, 1.1, 1.08], [2.0, 1.0, 0.5, 0.3], [[10, 12], [9, 11]])


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        ({}, "falling, balanced, none dead"),
        ({"router_z": [2.0, 1.0, 2.0, 2.5]}, "the z-loss does not fall"),
        ({"router_z": [2.0, 1.0, 2.0, float("nan")]}, "the z-loss does not fall"),
        ({"router_z": [2.0, 1.0, 0.5, float("nan")]}, "falling, balanced, none dead"),
        ({"router_z": [float("nan")] * 4}, "the z-loss does not fall"),
        ({"balance": [1.2, 1.2, 1.3, 1.5]}, "balance does not approach 1"),
        ({"balance": [1.0, 1.0, 1.0, 1.04]}, "falling, balanced, none dead"),
        ({"load": [[10, 12], [0, 22]]}, "1 dead experts"),
        (
            {"load": [[22, 0], [0, 22]], "balance": [1.0, 1.9, 1.9, 1.9]},
            "balance does not approach 1; 2 dead experts",
        ),
    ],
)
def test_verdict_on_router_trends(changes, verdict):
    """A run that does not show the published trends says so."""
    given = dict(zip(("balance", "router_z", "load"), GOOD, strict=True)) | changes
    stages = by_stage(records_of(**given))
    (trend,) = router_trends(stages, run_with({"encoder": {"router_z": 0.1}}))["s"].values()
    assert trend.verdict == verdict
    summary = SUMMARY | {
        "routers": as_json(router_trends(stages, run_with({"encoder": {"balance": 0.1}})))
    }
    block = result_block(summary)
    assert verdict in next(line for line in block.splitlines() if line.startswith("s encoder"))
    written = json.loads(json.dumps(jsonable(summary)))
    table = _trend_table(written)
    assert verdict in table and "balance is about 1 when experts are used alike" in table


def test_only_routers_with_losses_are_judged():
    stages = by_stage(records_of(*GOOD))
    assert router_trends(stages, run_with({})) == {}
    assert router_trends(stages, run_with({"decoder": {"balance": 0.1}})) == {}
    (row,) = rows_of(as_json(router_trends(stages, run_with({"encoder": {"balance": 0.1}}))))
    assert row[:4] == ["s encoder", "1.800 → 1.080", "2 → 0.3", "45.0 %"]
