"""The files that a finished stage leaves."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.train import finish
from unimoe_jax.train.summary import StageSummary

STEPS = 12


def test_a_result_is_never_without_its_summary(tmp_path, monkeypatch):
    """The summary is written first: a run skips a stage with a result, and would never write it."""

    def save(folder, params, manifest):
        assert json.loads((folder.parent / "summary.json").read_text())["heldout"] == {"a": 0.5}
        raise KeyboardInterrupt  # the run ends before the result is complete

    monkeypatch.setattr(finish, "results", lambda stage, params: (params, []))
    monkeypatch.setattr(finish, "save_final", save)
    layout = RunLayout(tmp_path)
    layout.stage("tune").folder.mkdir(parents=True)
    context = SimpleNamespace(run=SimpleNamespace(name="run"), layout=layout, is_writer=True)
    config = SimpleNamespace(name="tune", merge_lora=False, init=(), mixture={})
    model = SimpleNamespace(decoder=SimpleNamespace(moe_layers=lambda: ()))
    settings = SimpleNamespace(name="tune", config=config, model=model)
    stage = SimpleNamespace(settings=settings, steps=STEPS)
    with pytest.raises(KeyboardInterrupt):
        finish.leave_results(context, stage, {}, StageSummary(STEPS, heldout={"a": 0.5}))
