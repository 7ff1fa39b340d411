"""Compilation of the programs of a stage in threads."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from unimoe_jax.config import MeshConfig
from unimoe_jax.parallel.sharding import batch_mesh_axes, current_mesh, make_mesh
from unimoe_jax.train import stage_programs
from unimoe_jax.train.stage_programs import compile_stage

NOTHING_TO_SCORE = SimpleNamespace(settings=SimpleNamespace(config=SimpleNamespace(evaluate=())))
SILENT = SimpleNamespace(announce=lambda text: None)


def context_on(mesh) -> SimpleNamespace:
    """A run on `mesh` whose rules for logical axes are not the default ones."""
    return SimpleNamespace(run=SimpleNamespace(mesh=MeshConfig(rules={"batch": "data"})), mesh=mesh)


def test_programs_are_traced_with_the_axis_rules_of_the_run(devices, monkeypatch):
    """They are traced in threads, and a new thread starts with the default rules."""

    def lower(*_):
        traced = batch_mesh_axes(), current_mesh().size
        return SimpleNamespace(compile=lambda: traced)

    monkeypatch.setattr(stage_programs, "lower_step", lower)
    pipeline = SimpleNamespace(signatures=("text",), spec=lambda name: name)
    context = context_on(make_mesh(MeshConfig(data=2, expert=2), devices[:4]))
    programs = compile_stage(context, NOTHING_TO_SCORE, pipeline, SILENT)
    assert programs.step == {"text": (("data",), 4)}


def test_an_interruption_does_not_wait_for_compilations(devices, monkeypatch):
    """One program is interrupted while another one compiles for ten seconds."""
    started, ended = threading.Event(), threading.Event()

    class Program:
        def __init__(self, name):
            self.name = name

        def compile(self):
            if self.name == "interrupted":
                started.wait(30)
                raise KeyboardInterrupt
            started.set()
            ended.wait(10)

    monkeypatch.setattr(stage_programs, "lower_step", lambda stage, mesh, name: Program(name))
    names = dict.fromkeys(("interrupted", "long"))
    pipeline = SimpleNamespace(signatures=names, spec=lambda name: name)
    context = context_on(make_mesh(MeshConfig(), devices[:1]))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        compile_stage(context, NOTHING_TO_SCORE, pipeline, SILENT)
    assert time.monotonic() - began < 8
    ended.set()
