"""report.html of made-up runs: what it says, that it needs no other file, and its errors."""

import base64
import re
import struct
from configparser import ConfigParser
from pathlib import Path

import numpy as np
import pytest

from tests.report.made_up_run import ROUTERS, SUMMARY, log_stage
from unimoe_jax import report
from unimoe_jax.report.__main__ import main
from unimoe_jax.report.numbers import ReportError
from unimoe_jax.report.page import build_page, render, write_report
from unimoe_jax.runtime.files import write_json_atomic


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory of a finished run, with its report."""
    run_dir = tmp_path_factory.mktemp("tiny")
    log_stage(run_dir, "align")
    log_stage(run_dir, "tune", layers=3, seed=1)
    write_json_atomic(run_dir / "summary.json", SUMMARY)
    write_report(run_dir)
    return run_dir


def visible_text(html: str) -> str:
    """The words of a page, without tags and pictures, separated by single spaces."""
    text = re.sub(r"<style>.*?</style>|<[^>]+>", " ", html, flags=re.DOTALL)
    return " ".join(text.split())


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


def test_page_needs_no_other_file(finished):
    html = (finished / "report.html").read_text()
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)|url\(|@import", html)
    assert "Content-Security-Policy" in html and "default-src 'none'" in html
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', html)
    assert {base64.b64decode(image) for image in images} == {
        path.read_bytes() for path in (finished / "plots").iterdir()
    }


def test_page_shows_stages_scores_and_routers(finished):
    html = (finished / "report.html").read_text()
    assert "tiny &lt;run&gt;" in html and "<run>" not in html and "<i>" not in html
    text = visible_text(html.split("<h2>Files")[0])
    assert "align 60 10.0 s 4.0000 1.5000 10,000" in text
    assert "tune 60 3 m 20 s 3.9000 nan 9,000" in text
    assert "task before tune after tune chance colour 12.5 % 94.0 % 12.5 %" in text
    assert "&lt;i&gt;pitch – 50.0 % 25.0 %" in text
    assert SUMMARY["next_command"] in text
    entropy = np.log(4) * 0.7
    assert f"tune decoder {entropy:.3f} {entropy:.3f} {np.log(4):.3f}" in text


def test_page_holds_the_files_of_the_run_unchanged(finished):
    html = (finished / "report.html").read_text()
    assert "<summary>summary.json</summary>" in html and "<summary>config.yaml" not in html
    assert "&#34;name&#34;: &#34;tiny &lt;run&gt;&#34;,\n  &#34;seconds&#34;: 48.2," in html


def test_style_sheet_is_not_escaped(finished):
    html = (finished / "report.html").read_text()
    style = html.split("<style>")[1].split("</style>")[0]
    assert (
        style.strip() == (Path(report.__file__).parent / "templates/style.css").read_text().strip()
    )


def test_templates_are_package_data():
    """A wheel holds only the files that setup.cfg lists."""
    settings = ConfigParser()
    settings.read(Path(report.__file__).parents[2] / "setup.cfg")
    package = Path(report.__file__).parents[1]
    patterns = settings["options.package_data"]["unimoe_jax"].split()
    listed = {path for pattern in patterns for path in package.glob(pattern)}
    assert set((package / "report" / "templates").iterdir()) <= listed


def test_scores_have_the_name_of_the_scored_stage_above_them(tmp_path):
    for name in ("align", "tune", "after"):
        log_stage(tmp_path, name, steps=5)
    unscored = SUMMARY["stages"]["align"]
    stages = SUMMARY["stages"] | {"after": unscored}
    write_json_atomic(tmp_path / "summary.json", SUMMARY | {"stages": stages})
    html = write_report(tmp_path).read_text()
    assert "<th>before tune</th><th>after tune</th>" in html
    assert "<h2>Before and after tune</h2>" in html


def test_running_run_without_experts_is_reported_from_its_records(tmp_path, capsys):
    log_stage(tmp_path, "align", steps=5)
    assert main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text()
    assert "unfinished" in html and "Router" not in html and "Held-out" not in html
    assert not list((tmp_path / "plots").glob("expert_load*"))


def test_page_of_a_run_with_some_finished_stages():
    stages = {"one": {"steps": 3, "seconds": 1.0}}
    summary = {"name": "run", "seconds": 1.0, "stages": stages, "stages_in_all": 4}
    html = render(build_page(Path("runs/x"), summary, [], []))
    assert ">1 of 4 stages finished in 1.0 s · runs/x<" in html


def test_page_shows_the_verdict_on_router_losses():
    html = render(build_page(Path("runs/x"), SUMMARY | {"routers": ROUTERS}, [], []))
    assert "<h2>Router losses</h2>" in html
    assert "s encoder 1.800 → 1.080 2 → nan 45.0 % the z-loss does not fall" in visible_text(html)
    assert "about 1 when all experts are used equally" in html


def test_losses_that_are_not_finite_are_counted(tmp_path):
    log_stage(tmp_path, "align", steps=5, loss=float("nan"), grad_norm=float("inf"))
    html = write_report(tmp_path).read_text()
    assert "The loss was NaN or infinite in 1 of 5 logged steps" in html


def test_every_module_has_its_own_figures(tmp_path):
    log_stage(tmp_path, "sft", steps=8, layers=3, module="encoder")
    log_stage(tmp_path, "other", steps=8, layers=1, module="connector")
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


# ------------------------------------------------------------------------------------ errors


def test_errors_name_the_missing_or_broken_file(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "metrics.jsonl does not exist; give the directory of a run" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="no step was logged"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ReportError, match=r"summary.json is not valid JSON"):
        write_report(tmp_path)


def test_folders_without_a_report_are_one_line(tmp_path, capsys):
    log_stage(tmp_path, "align", steps=5)
    # As on a read-only disk, the folder cannot be made.
    (tmp_path / "plots").touch()
    cases = ((tmp_path / "plots", "is a file; give"), (tmp_path, "where you may write"))
    for argument, message in cases:
        assert main([str(argument)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path / 'plots'}") and message in line
