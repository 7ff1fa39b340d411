"""The check that an upcycled model equals the dense one at step 0; a mistake stops the stage."""

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
    """A possible result of a stage: small random numbers, large enough that rounding shows."""
    generator = np.random.default_rng(0)
    arrays = {
        path: (0.2 * generator.standard_normal(info.shape) + path.endswith("scale")).astype("f4")
        for path, info in parameter_table(resolve_stage(run, stage)).items()
    }
    return array_source(stage.name, arrays, run.stage_model(stage).decoder.moe_layers())


@pytest.fixture
def mesh():
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with use_mesh(mesh, {}):
        yield mesh


def started(run: RunConfig, mesh) -> tuple[Stage, dict, dict]:
    """The stage sft, its parameters at step 0, and the sources that they start from."""
    stage = build_stage(resolve_stage(run, stage_of(run, "sft")), mesh, 1)
    sources = {"pft": random_source(run, stage_of(run, "pft"))}
    return stage, initial_params(stage, sources, mesh, 0), sources


def test_encoder_and_connector(mesh):
    """The logits are equal up to rounding whatever the fresh routers choose.

    If one expert is changed, the check fails.
    """
    stage, params, sources = started(settings(), mesh)
    result = check_upcycled(stage, params, sources, mesh)
    assert result.modules == ("connector", "encoder") and result.sources == ("pft",)
    assert result.what == "logits" and result.largest > 0.1
    assert 0 < result.difference < ROUNDING * result.largest / 10
    path = "vision/encoder/layers/moe/experts/fc2/bias"
    wrong = {**params, path: params[path].at[0, 2].add(0.5)}
    with pytest.raises(
        ParamError, match=r"init of stage sft: connector, encoder upcycled from pft"
    ):
        check_upcycled(stage, wrong, sources, mesh)


def test_a_capacity_does_not_count_as_a_difference(mesh):
    """Dropped tokens are the layer's doing, so the check compares without a capacity."""
    tight = [f"model.vision.{m}.moe.capacity_factor=0.3" for m in ("encoder", "connector")]
    stage, params, sources = started(settings(*tight), mesh)
    result = check_upcycled(stage, params, sources, mesh)
    assert 0 < result.difference < ROUNDING * result.largest / 10


def test_a_decoder_that_has_experts_before_and_after(mesh):
    """Near ties of its routers may flip by rounding, so the input of the decoder is compared."""
    moe = "model.decoder.moe={num_experts: 3, layers: even}"
    run = settings(moe, "stages.pft.moe=[decoder]", "stages.base.moe=[decoder]")
    stage, params, sources = started(run, mesh)
    result = check_upcycled(stage, params, sources, mesh)
    assert result.what == "soft tokens"
    assert result.difference <= ROUNDING * result.largest


def test_a_decoder_with_experts_in_even_layers(mesh):
    """The dense model stacks its layers in another way than the model with experts."""
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
    result = check_upcycled(stage, params, sources, mesh)
    assert result.modules == ("decoder",) and result.what == "logits"
    assert result.difference <= ROUNDING * result.largest


def test_stages_that_upcycle_nothing_are_not_compared(mesh):
    run = settings()
    stage = build_stage(resolve_stage(run, stage_of(run, "base")), mesh, 1)
    assert check_upcycled(stage, {}, {}, mesh) is None
