"""The upcycled model equals the dense one at step 0; a mistake stops the stage."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest

from tests.sources import array_source
from unimoe_jax.checkpoints.sources import ParamSource
from unimoe_jax.config import MeshConfig, RunConfig, StageConfig, Take
from unimoe_jax.config.load import resolve_config
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.parallel.sharding import make_mesh, use_mesh
from unimoe_jax.params.paths import ParamError
from unimoe_jax.stages.initial_params import initial_params
from unimoe_jax.stages.stage import Stage, build_stage, parameter_table
from unimoe_jax.stages.upcycle_check import ROUNDING, check_upcycled

RUN = Path(__file__).parents[2] / "configs/run/cumo_tiny.yaml"


def settings(*overrides: str) -> RunConfig:
    return resolve_config(RUN, ["model.vision.scales=[1]", *overrides]).config


def stage_of(run: RunConfig, name: str) -> StageConfig:
    return next(stage for stage in run.stages if stage.name == name)


def random_source(run: RunConfig, stage: StageConfig) -> ParamSource:
    """What the stage could have left: small random numbers, large enough for rounding."""
    generator = np.random.default_rng(0)
    arrays = {
        path: (0.2 * generator.standard_normal(info.shape) + path.endswith("scale")).astype("f4")
        for path, info in parameter_table(resolve_stage(run, stage)).items()
    }
    return array_source(stage.name, arrays, run.stage_model(stage).decoder.moe_layers())


@pytest.fixture
def mesh():
    one = MeshConfig(data=1)
    mesh = make_mesh(one, jax.devices()[:1])
    with use_mesh(mesh, {}):
        yield mesh


def started(run: RunConfig, mesh) -> tuple[Stage, dict, dict]:
    """(stage sft, its parameters at step 0, sources)."""
    stage = build_stage(resolve_stage(run, stage_of(run, "sft")), mesh, 1)
    sources = {"pft": random_source(run, stage_of(run, "pft"))}
    return stage, initial_params(stage, sources, mesh, 0), sources


def test_encoder_and_connector(mesh):
    """Equal up to rounding, whatever the fresh routers choose; one changed expert is found."""
    stage, params, sources = started(settings(), mesh)
    found = check_upcycled(stage, params, sources, mesh)
    assert found.modules == ("connector", "encoder") and found.sources == ("pft",)
    assert found.what == "logits" and found.largest > 0.1
    assert 0 < found.difference < ROUNDING * found.largest / 10
    path = "vision/encoder/layers/moe/experts/fc2/bias"
    wrong = {**params, path: params[path].at[0, 2].add(0.5)}
    with pytest.raises(
        ParamError, match=r"init of stage sft: connector, encoder upcycled from pft"
    ):
        check_upcycled(stage, wrong, sources, mesh)


def test_a_capacity_is_no_difference(mesh):
    """What it drops is the layer's doing; whether every expert is the dense layer shows without."""
    tight = [f"model.vision.{m}.moe.capacity_factor=0.3" for m in ("encoder", "connector")]
    stage, params, sources = started(settings(*tight), mesh)
    found = check_upcycled(stage, params, sources, mesh)
    assert 0 < found.difference < ROUNDING * found.largest / 10


def test_experts_before_and_after(mesh):
    """A decoder with experts of its own: near ties of its routers may flip, its input may not."""
    moe = "model.decoder.moe={num_experts: 3, layers: even}"
    run = settings(moe, "stages.pft.moe=[decoder]", "stages.base.moe=[decoder]")
    stage, params, sources = started(run, mesh)
    found = check_upcycled(stage, params, sources, mesh)
    assert found.what == "soft tokens"
    assert found.difference <= ROUNDING * found.largest


def test_layers_of_another_placement(mesh):
    """The decoder's even layers upcycled: the dense model stacks what both have in another way."""
    run = settings("model.decoder.moe={num_experts: 3, layers: even}")
    sft = stage_of(run, "sft")
    takes = (
        Take(match=".*/router/.*", source="fresh"),
        Take(match="decoder/.*/moe/experts/.*", upcycle="pft"),
        Take(match=".*", source="pft"),
    )
    sft = sft.model_copy(update={"init": takes, "moe": ("decoder",)})
    stage = build_stage(resolve_stage(run, sft), mesh, 1)
    sources = {"pft": random_source(run, stage_of(run, "pft"))}
    params = initial_params(stage, sources, mesh, 0)
    found = check_upcycled(stage, params, sources, mesh)
    assert found.modules == ("decoder",) and found.what == "logits"
    assert found.difference <= ROUNDING * found.largest


def test_stages_that_upcycle_nothing_are_not_compared(mesh):
    run = settings()
    stage = build_stage(resolve_stage(run, stage_of(run, "base")), mesh, 1)
    assert check_upcycled(stage, {}, {}, mesh) is None
