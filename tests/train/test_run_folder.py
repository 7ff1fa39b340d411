"""Which command may write a run directory, and which files `--overwrite` may remove."""

from __future__ import annotations

import pytest

from unimoe_jax.config.load import load_config
from unimoe_jax.train.run_folder import RunFolderError, claim

RUN = """
name: one
model:
  decoder: {vocab_size: 64, hidden_size: 16, mlp_dim: 32, num_layers: 1, num_heads: 2,
            num_kv_heads: 1}
data: {sources: {a: {path: a.json}}, loader: {row_length: 64, rows: 4}}
stages:
  - {name: s, mixture: {a: 1}, train: [{match: .*, lr: 1}], optim: {learning_rate: 1, steps: 1}}
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "run.yaml").write_text(RUN)
    return load_config(tmp_path / "run.yaml", [f"output={tmp_path / 'out'}"])


def claimed(config, *, overwrite=False, resume=False):
    """Claim the run directory and release it again; return its folder."""
    with claim(config, overwrite=overwrite, resume=resume) as layout:
        return layout.folder


def test_a_run_directory_is_written_locked_and_continued(config):
    with claim(config, overwrite=False, resume=False) as layout:
        folder = layout.folder
        assert load_config(folder / "config.yaml") == config
        with pytest.raises(RunFolderError, match="another run is writing it"):
            claimed(config)
    assert claimed(config) == folder
    # Other settings are allowed as long as nothing has been trained.
    assert load_config(claimed(config.model_copy(update={"seed": 2})) / "config.yaml").seed == 2
    claimed(config)
    (folder / "checkpoints" / "s" / "steps").mkdir(parents=True)
    claimed(config)
    (folder / "metrics.jsonl").touch()
    with pytest.raises(RunFolderError, match=r"\+seed: 1"):
        claimed(config.model_copy(update={"seed": 1}))


def test_damaged_settings_count_as_other_settings(config):
    folder = claimed(config)
    (folder / "metrics.jsonl").touch()
    (folder / "config.yaml").write_bytes(b"\xff\0")
    with pytest.raises(RunFolderError, match=f"^output {folder}: holds a run with other settings"):
        claimed(config)
    assert load_config(claimed(config, resume=True) / "config.yaml") == config


def fail_with(config, records: str = "") -> None:
    """Start a resumed run that logs `records` and then ends with an error."""
    with claim(config, overwrite=False, resume=True) as layout:
        folder = layout.folder
        assert load_config(folder / "config.yaml") == config
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(records)
        raise ValueError("the data do not fit")


def test_the_settings_of_a_refused_command_are_not_kept(config):
    """A user who takes back a change that does not fit the checkpoints needs no flag.

    Settings are kept once a step has been logged with them.
    """
    folder = claimed(config)
    (folder / "metrics.jsonl").write_text("{}\n")
    other = config.model_copy(update={"seed": 2})
    with pytest.raises(ValueError, match="do not fit"):
        fail_with(other)
    assert claimed(config) == folder
    with pytest.raises(ValueError, match="do not fit"):
        fail_with(other, records="{}\n")
    with pytest.raises(RunFolderError, match="other settings"):
        claimed(config)


def test_the_environment_of_the_training_is_kept(config):
    """A command that trains nothing does not replace env.json."""
    folder = claimed(config)
    (folder / "env.json").write_text("from training")
    with claim(config, overwrite=False, resume=False, trains=False):
        assert (folder / "env.json").read_text() == "from training"
    claimed(config)
    assert (folder / "env.json").read_text() != "from training"


def test_a_folder_that_is_no_run_directory_is_not_overwritten(config, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("thesis.txt", "config.yaml"):  # a config.yaml alone does not make a run directory
        (folder / name).write_text("hi")
        with pytest.raises(RunFolderError, match="no run directory"):
            claimed(config, overwrite=True)
        assert (folder / name).read_text() == "hi"
    assert not (folder / ".lock").exists()


def test_overwriting_removes_only_files_that_runs_write(config):
    folder = claimed(config)
    step = folder / "checkpoints" / "s" / "steps" / "1"
    step.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("{}")
    (folder / "answers.jsonl").write_text("mine")
    claimed(config.model_copy(update={"seed": 1}), overwrite=True)
    assert load_config(folder / "config.yaml").seed == 1
    assert not step.exists()
    assert not (folder / "metrics.jsonl").exists()
    assert (folder / "answers.jsonl").read_text() == "mine"
