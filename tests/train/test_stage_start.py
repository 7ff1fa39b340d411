"""The start of a resumed stage: frozen parameters, and data that do not fit its checkpoint."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.train import stage_start

STEPS = 12


def resumed_at_4(monkeypatch, check_state) -> list[int]:
    """Resume a stage at step 4; return the seeds with which it draws fresh parameters.

    The stage began with seed 1. Its place in the run would give it seed 2 now.
    """
    seeds = []
    monkeypatch.setattr(stage_start, "open_sources", lambda *_: {})
    monkeypatch.setattr(stage_start, "initial_params", lambda *args, only: seeds.append(args[3]))
    settings = SimpleNamespace(name="tune", config=None, param_seed=2)
    stage = SimpleNamespace(
        settings=settings, infos={}, steps=STEPS, state_template=lambda mesh: None
    )
    context = SimpleNamespace(mesh=None, layout=None, announce=print)
    checkpoint = (4, SimpleNamespace(seed=np.uint32(1)), {"data": {}})
    checkpoints = SimpleNamespace(
        restore_latest=lambda template, announce: checkpoint, folder=Path("tune/steps")
    )
    pipeline = SimpleNamespace(check_state=check_state)
    start = stage_start.start_stage(context, stage, pipeline, checkpoints)
    assert start.step == 4
    return seeds


def test_frozen_parameters_are_drawn_as_when_the_stage_began(monkeypatch):
    """A stage that is inserted changes the seeds of later stages, but not of one that has begun."""
    assert resumed_at_4(monkeypatch, lambda state: 4) == [1]


def test_different_data_are_refused_with_the_name_of_the_checkpoint(monkeypatch):
    def check_state(state):
        raise ValueError("the data differ")

    with pytest.raises(CheckpointError, match=r"^tune/steps/4: the data differ"):
        resumed_at_4(monkeypatch, check_state)
