"""Checks of `train` before anything is trained, written or removed. Nothing is compiled."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.checkpoints.final import save_final
from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.checkpoints.steps import StepCheckpoints
from unimoe_jax.config import ConfigError
from unimoe_jax.config.load import dump_config, load_config
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.evaluate import __main__ as evaluate
from unimoe_jax.parallel.sharding import ShardingError, make_mesh, planned_mesh, use_mesh
from unimoe_jax.params.paths import ParamError
from unimoe_jax.runtime.files import WriteError, write_json_atomic
from unimoe_jax.stages.stage import build_stage, parameter_table
from unimoe_jax.stages.train_step import TrainState
from unimoe_jax.train import __main__ as train
from unimoe_jax.train.finish import finish, finished_steps, next_command
from unimoe_jax.train.preflight import check_continues
from unimoe_jax.train.run import run
from unimoe_jax.train.run_folder import RunFolderError
from unimoe_jax.train.summary import StageSummary, read_stage_summary

RUN = """
name: run
tokenizer: {tmp}/missing.model
model:
  decoder: {{vocab_size: 64, hidden_size: 16, mlp_dim: 32, num_layers: 1, num_heads: 2,
            num_kv_heads: 1, moe: {{num_experts: 2, top_k: 1}}}}
data:
  sources: {{a: {{path: {tmp}/a.json}}, gone: {{path: {tmp}/gone.json}}}}
  loader: {{row_length: 64, rows: 8}}
stages:
  - {{name: one, mixture: {{a: 1}}, train: [{{match: .*, lr: 1}}],
     optim: {{learning_rate: 1, steps: 12}}}}
  - name: two
    mixture: {{a: 1}}
    moe: true
    init:
      - {{match: ".*/router/.*", source: fresh}}
      - {{match: ".*/moe/experts/.*", experts: [one, one]}}
      - {{match: .*, source: one}}
    train: [{{match: ".*/router/.*", lr: 1}}, {{match: .*, lr: null}}]
    optim: {{learning_rate: 1, steps: 12}}
"""


@pytest.fixture
def place(tmp_path) -> Path:
    """A folder with the run file and an empty source."""
    (tmp_path / "run.yaml").write_text(RUN.format(tmp=tmp_path))
    (tmp_path / "a.json").write_text("[]")
    return tmp_path


def load(place: Path, *overrides: str):
    return load_config(place / "run.yaml", [f"output={place / 'out'}", *overrides])


def arguments(stage=None, overwrite=False, resume=False):
    return SimpleNamespace(stage=stage, overwrite=overwrite, resume=resume)


def refused(place: Path, kind: type[Exception], *overrides: str, **flags) -> str:
    """Return the one-line message with which a run is refused before it writes anything."""
    before = sorted(place.rglob("*"))
    with pytest.raises(kind) as caught:
        run(load(place, *overrides), arguments(**flags))
    assert sorted(place.rglob("*")) == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def leave(place: Path, name: str, steps: int = 12) -> Path:
    """Write the result of a finished stage with a single made-up parameter; return its folder."""
    final = place / "out" / "checkpoints" / name / "final"
    shapes = {"embed/embedding": [2]}
    manifest = {"steps": steps, "moe_layers": [False], "shapes": shapes}
    save_final(final, {"embed/embedding": jnp.zeros(2)}, manifest)
    return final


@pytest.mark.parametrize(
    ("kind", "override", "parts"),
    [
        (ConfigError, "stages.two.mixture={gone: 1}", ("data.sources.gone.path", "(stage two)")),
        (ConfigError, "stages.two.evaluate=[gone]", ("data.sources.gone.path", "gone.json")),
        (ConfigError, "data.loader.groups=3", ("data.loader.groups = 3", "multiples of 8")),
        (ConfigError, "data.loader.rows=9", ("data.loader.rows = 9", "mesh's 8 data shards")),
        (ConfigError, "name=run", ("tokenizer = ", "missing.model", "embedded")),
        (
            CheckpointError,
            "stages.two.init=[{match: .*, source: 'checkpoint:/nope'}]",
            ("stages.two.init.0: ", "/nope"),
        ),
        (
            ParamError,
            "model.decoder.moe.num_experts=3",
            ("stages.two.init.1.experts", "2 origins", "model.decoder.moe.num_experts = 3"),
        ),
        (
            ParamError,
            "stages.one.init=[{match: embed.*, source: fresh}]",
            ("stages.one.init", '{match: ".*", source: fresh}'),
        ),
        (
            ParamError,
            "stages.two.train=[{match: .*/router/.*, lr: 1}]",
            ("stages.two.train", '{match: ".*", lr: null}'),
        ),
        (
            ParamError,
            "stages.two.train=[{match: .*, lr: 1}, {match: zzz, lr: 1}]",
            ("stages.two.train", "zzz"),
        ),
        (
            ParamError,
            "stages.two.train=[{match: .*, lr: null}]",
            ("stages.two.train: every rule has lr: null", "nothing would be learned"),
        ),
        (
            ParamError,
            "stages.one.init=[{match: embde.*, source: fresh}, {match: .*, source: fresh}]",
            ("stages.one.init: rules ['embde.*'] are the first match of no parameter",),
        ),
        (
            ParamError,
            "stages.two.init=[{match: .*, source: fresh}, {match: embed.*, source: one}]",
            ("stages.two.init: rules ['embed.*'] are the first match of no parameter",),
        ),
        (
            ParamError,
            "stages.one.lora=[{match: decoder/.*/moe/.*, rank: 2, alpha: 1}]",
            ("stages.one.lora: rules ['decoder/.*/moe/.*'] are the first match of no layer",),
        ),
        (
            ParamError,
            "stages.two.init=[{match: .*/moe/experts/.*, experts: [one, one]}, "
            "{match: .*, source: one}]",
            ("stages.two.init: ", "one has no 'decoder/run_0/block_0/moe/router/"),
        ),
        (
            ConfigError,
            "stages.two.mixture={}",
            ("stages.1.mixture = {}", "allowed: mapping of name to number > 0, not empty"),
        ),
        (ConfigError, "stages.one.aux.decoder.balance=1", ("aux.decoder needs experts", "set moe")),
        (ConfigError, "name=''", ('name = ""', "not empty")),
    ],
)
def test_later_stages_are_checked_before_the_first(place, devices, kind, override, parts):
    text = refused(place, kind, override)
    assert all(part in text for part in parts), text


ADAPTERS = "stages.%s.lora=[{match: decoder/.*/attention/.*, rank: 2, alpha: 1}]"


def test_a_stage_is_checked_against_the_parameters_that_earlier_ones_will_leave(place, devices):
    some = "stages.one.train=[{match: embed.*, lr: 1}, {match: .*, lr: null}]"
    text = refused(place, ParamError, some, "stages.one.leaves=trained")
    assert "stages.two.init: 'decoder/" in text and "one has no 'decoder/" in text
    adapters = (ADAPTERS % "one", ADAPTERS % "two")
    text = refused(place, ParamError, *adapters, "stages.one.merge_lora=true")
    assert "stages.two.init: " in text and "/lora_a'" in text
    assert "tokenizer" in refused(place, ConfigError, *adapters)  # the only problem left


def test_strict_reaches_every_loader(place):
    loader = "stages.two.loader={row_length: 32, rows: 8}"
    command = ["--config", str(place / "run.yaml"), loader]
    for more, strict in (([], False), (["--strict"], True)):
        config = train.resolve(train.parse([*command, *more])).config
        assert (config.stages[1].loader.strict, config.data.loader.strict) == (strict, strict)
        assert config.stages[0].loader is None


def test_a_dry_run_of_one_stage_shows_only_that_stage(place, capsys):
    command = ["--config", str(place / "run.yaml"), "--dry-run", "--cluster", "none", "--stage"]
    assert train.main([*command, "two"]) == 0
    shown = capsys.readouterr().out
    assert "= stage two =" in shown and "= stage one =" not in shown
    assert train.main([*command, "tow"]) == 2
    assert capsys.readouterr().err == "error: --stage tow: no such stage; the run has one, two\n"


RANK_3 = "stages.two.lora=[{match: '%s', rank: 3, alpha: 1}]"


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("decoder/.*/moe/.*", "moe/experts/down_proj/lora_a: dimension 2 (rank)"),
        ("decoder/.*/attention/.*", "attention/k_proj/lora_a: dimension 2 (rank)"),
    ],
)
def test_later_stages_must_fit_the_mesh(place, devices, module, message):
    text = refused(place, ShardingError, RANK_3 % module, "mesh.rules={rank: data}")
    assert f"{message} of size 3 does not divide by the 8 shards" in text


def scoring_fails(capsys, folder: Path, *overrides: str) -> str:
    """Run `evaluate` on a run directory; return the one line with which it fails."""
    assert evaluate.main([str(folder), *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_evaluate_refuses_wrong_settings_and_data_in_one_line(place, devices, capsys):
    (place / "out").mkdir()
    (place / "out" / "config.yaml").write_text(dump_config(load(place, "stages.two.evaluate=[a]")))
    assert "mesh.data=3" in scoring_fails(capsys, place / "out", "mesh.data=3")
    for path in (place, "/nope.json"):
        line = scoring_fails(capsys, place / "out", f"data.sources.a.path={path}")
        assert f"data.sources.a.path = '{path}' (stage two)" in line
    (place / "a.json").write_text("# no JSON")
    assert "a.json: neither a JSON list" in scoring_fails(capsys, place / "out")


def test_a_cache_that_cannot_be_written_is_named(place, devices):
    (place / "file").touch()
    text = refused(place, ConfigError, "tokenizer=embedded", f"data.cache={place / 'file'}")
    assert f"data.cache {place / 'file'}" in text
    assert "XDG_CACHE_HOME" in text


def test_a_single_stage_needs_the_results_that_it_starts_from(place, devices):
    assert "run that stage first" in refused(place, CheckpointError, stage="two")


def test_a_source_of_another_shape_is_refused(place, devices):
    leave(place, "one")
    assert "stages.two.init" in refused(place, ParamError)


def test_a_refused_run_removes_nothing_with_overwrite(place, devices):
    leave(place, "one")
    (place / "out" / "config.yaml").write_text("name: before")
    refused(place, ConfigError, "data.loader.groups=3", overwrite=True)
    assert "would remove every stage" in refused(place, ConfigError, overwrite=True, stage="two")


def test_an_incomplete_result_is_named(place, devices):
    final = leave(place, "one")
    assert finished_steps(RunLayout(place / "out"), "one") == 12
    assert finished_steps(RunLayout(place / "out"), "two") is None
    (final / "params" / "_METADATA").unlink()
    assert "params/_METADATA: missing" in refused(place, CheckpointError)
    (final / "manifest.json").unlink()
    assert f"remove {final}" in refused(place, CheckpointError)


def test_a_finished_stage_keeps_its_length(place, devices):
    leave(place, "one")
    text = refused(place, ConfigError, "stages.one.optim.steps=5", resume=True)
    assert "stages.one.optim.steps = 5" in text
    assert "finished with 12" in text


def test_a_broken_summary_is_named_at_the_start(place, devices):
    final = leave(place, "one")
    path = final.with_name("summary.json")
    write_json_atomic(path, vars(StageSummary(12)))
    assert read_stage_summary(RunLayout(place / "out").stage("one"))["steps"] == 12
    for text in ("{", "[]", json.dumps({"steps": 12})):
        path.write_text(text)
        assert str(path) in refused(place, RunFolderError)


def finished(place: Path, *overrides: str) -> dict:
    """Finish the run, whose stage `one` is done, and return its summary.json."""
    config = load(place, *overrides)
    layout = RunLayout(place / "out")
    context = SimpleNamespace(run=config, layout=layout, data=config.data, announce=print)
    finish(context, None)
    return json.loads((place / "out" / "summary.json").read_text())


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"wall_seconds": 7.5}'])
def test_a_broken_summary_of_the_run_is_written_again(place, devices, text, capsys):
    """The seconds of earlier runs are kept if they can be read."""
    leave(place, "one")
    path = place / "out" / "summary.json"
    path.write_text(text)
    assert finished(place)["wall_seconds"] == (7.5 if "7.5" in text else None)


def test_scored_sources_may_change_between_runs(place):
    """One source was not scored at the start, and another one is not scored any more."""
    turns = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "This."}]
    (place / "a.json").write_text(json.dumps([{"conversations": turns}]))
    summary = StageSummary(12, heldout={"a": 0.5}, heldout_before={"gone": 0.25})
    write_json_atomic(leave(place, "one").with_name("summary.json"), vars(summary))
    scores = {"a": {"before": None, "after": 0.5, "chance": 1.0}}
    assert finished(place)["heldout"] == scores


def test_a_summary_does_not_need_the_sources_that_were_scored(place):
    """Their files may be gone, or sources may be renamed, when a later stage ends."""
    summary = StageSummary(12, heldout={"b": 0.5}, heldout_before={"b": 0}, chance={"b": 0.25})
    write_json_atomic(leave(place, "one").with_name("summary.json"), vars(summary))
    assert finished(place)["heldout"] == {"b": {"before": 0, "after": 0.5, "chance": 0.25}}


def test_trained_parameters_and_number_of_steps_must_fit_the_saved_steps(place, devices):
    config = load(place)
    settings, folder = resolve_stage(config, config.stages[0]), place / "steps"
    infos = parameter_table(settings)
    trained = {path: jnp.zeros(info.shape) for path, info in infos.items()}
    number = jnp.int32(8)
    with StepCheckpoints(folder, keep=2) as checkpoints:
        checkpoints.save(8, TrainState(number, trained, (), number, number), {})
    check_continues(settings, infos, folder)
    shorter = replace(settings, config=load(place, "stages.one.optim.steps=5").stages[0])
    with pytest.raises(CheckpointError, match=r"stages.one.optim.steps = 5: 8 steps are done"):
        check_continues(shorter, infos, folder)
    with pytest.raises(CheckpointError, match=r"stages.one.train: .* now also 'decoder/.*/router"):
        check_continues(settings, parameter_table(resolve_stage(config, config.stages[1])), folder)


@pytest.mark.parametrize("count", [2, 6])
def test_experts_must_divide_over_the_mesh(place, count):
    config = load(place, "mesh.expert=4", f"model.decoder.moe.num_experts={count}")
    with (
        use_mesh(planned_mesh(config.mesh)),
        pytest.raises(
            ShardingError, match=rf"^model.decoder.moe.num_experts = {count} .*expert = 4"
        ),
    ):
        parameter_table(resolve_stage(config, config.stages[1]))


def test_a_form_of_exchange_that_cpus_lack_is_refused(place, devices):
    config = load(place, "mesh={data: 4, expert: 2}", "model.decoder.moe.exchange=ragged")
    mesh = make_mesh(config.mesh, devices)
    message = r"^model.decoder.moe.exchange = ragged: .* auto \| gather"
    with use_mesh(mesh.abstract_mesh), pytest.raises(ShardingError, match=message):
        build_stage(resolve_stage(config, config.stages[1]), mesh, 1)


def test_pool_groups_that_do_not_divide_the_rows_are_refused(place):
    config = load(place, "data.loader.groups=3")
    with pytest.raises(ConfigError, match=r"rows = 8 .* data.loader.groups = 3; .*1 or 2 or 4"):
        resolve_stage(config, config.stages[0]).pool_groups(1)


@pytest.mark.parametrize("text", ["requeue", "-1", "256"])
def test_a_wrong_exit_code_in_the_environment_is_refused(place, devices, monkeypatch, text):
    monkeypatch.setenv("UNIMOE_STOPPED_CODE", text)
    assert f"UNIMOE_STOPPED_CODE={text!r}" in refused(place, ConfigError)


@pytest.mark.parametrize("error", [WriteError("out: full"), OSError(28, "No space left", "out")])
def test_a_write_error_stops_a_run_in_one_line(place, monkeypatch, capsys, error):
    def run(*_):
        raise error

    monkeypatch.setattr(train, "run", run)
    assert train.main(["--config", str(place / "run.yaml"), "--cluster", "none"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("stopped: ") and "out" in line


def test_the_suggested_next_command_works(place):
    """It is `evaluate` if held-out sources can be scored, and `generate` otherwise."""
    folder = place / "out"
    config = load(place)
    assert "generate --model" in next_command(config, RunLayout(folder), ["one", "two"])
    with pytest.raises(ConfigError, match="no stage of this run has held-out sources"):
        evaluate.stage_to_score(config, None, folder)
    spaced = next_command(config, RunLayout(place / "my out"), ["one", "two"])
    assert shlex.split(spaced)[4] == str(place / "my out")
    scored = load(place, "stages.two.evaluate=[a]")
    assert "evaluate" in next_command(scored, RunLayout(folder), ["one", "two"])
    assert "generate" in next_command(scored, RunLayout(folder), ["one"])
    assert evaluate.stage_to_score(scored, None, folder).name == "two"
    with pytest.raises(ConfigError, match="--stage one: has no held-out sources; allowed: two"):
        evaluate.stage_to_score(scored, "one", folder)
