"""The modality losses of Uni-MoE 8e as settings of a stage: in loss, gradient and metrics."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from tests.stages.test_train_step import batch_of, build, compiled_step, run_config, start
from unimoe_jax.config import AuxLossConfig, MeshConfig, ModalityLossConfig, RunConfig
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.parallel.sharding import make_mesh, use_mesh
from unimoe_jax.params.paths import nest
from unimoe_jax.params.table import split
from unimoe_jax.stages.losses import modality_expert_loss, modality_kl_loss
from unimoe_jax.stages.train_step import init_state

LISTED = {"image": (0, 1), "video": (1,), "audio": (2,)}
SETTINGS = ModalityLossConfig(
    experts=0.3,
    kl=0.2,
    **{f"{name}_experts": experts for name, experts in LISTED.items()},
)
ROUTER = "decoder/run_0/block_0/moe/router/linear/kernel"


def with_losses(settings: ModalityLossConfig):
    """The text-only run and stage of test_train_step.py without dropout, with these losses."""
    run, stage = run_config(media=False, dropout=False)
    return run, stage.model_copy(update={"aux": AuxLossConfig(modality=settings)})


def batch_with_modalities():
    """A text batch whose positions are labelled with all modalities, which only the losses read."""
    batch = batch_of(False)
    modality = np.random.default_rng(0).integers(0, 5, batch.modality_BT.shape)
    modality[0] = 0
    modality = np.where(batch.segment_BT > 0, modality, -1).astype(np.int32)
    return jax.tree.map(jnp.asarray, batch._replace(modality_BT=modality))


def step_with(settings: ModalityLossConfig):
    """The stage, and the metrics and gradients of its first step."""
    run, config = with_losses(settings)
    stage = build(run, config, jax.devices()[:1], MeshConfig())
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with use_mesh(mesh):
        trained, frozen = split(start(False), stage.infos)
        state = init_state(trained, stage.optimizer, seed=3)
        state = jax.device_put(state, stage.state_shardings(mesh))
        step = compiled_step(stage, mesh)
        state, metrics = step(state, frozen, batch_with_modalities())
    return stage, metrics, state.optimizer[0].trace


def test_both_losses_are_part_of_the_step():
    """The gradients with and without the losses differ by the gradient of the losses."""
    stage, metrics, gradients = step_with(SETTINGS)
    batch, params = batch_with_modalities(), start(False)
    model: UniMoE = stage.model

    def losses(router):
        out = model.apply({"params": nest({**params, ROUTER: router})}, batch)
        logits = out.aux["decoder"].logits_BTE
        experts = modality_expert_loss(logits, batch.modality_BT, LISTED)
        kl = modality_kl_loss(logits, batch.modality_BT)
        return SETTINGS.experts * experts + SETTINGS.kl * kl

    expected, gradient = jax.jit(jax.value_and_grad(losses))(params[ROUTER])
    np.testing.assert_allclose(metrics["aux"], expected, rtol=1e-5)
    scaled = SETTINGS.experts * metrics["modality_experts"] + SETTINGS.kl * metrics["modality_kl"]
    np.testing.assert_allclose(metrics["aux"], scaled, rtol=1e-6)
    _, other_metrics, other_gradients = step_with(ModalityLossConfig())
    assert not {"modality_experts", "modality_kl"} & set(other_metrics)
    assert float(other_metrics["aux"]) == 0
    difference = np.asarray(gradients[ROUTER]) - np.asarray(other_gradients[ROUTER])
    assert np.abs(difference).max() > 1e-3
    np.testing.assert_allclose(difference, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "settings", "words"),
    [
        ({"moe": False}, SETTINGS, "needs experts in the decoder"),
        ({}, ModalityLossConfig(experts=0.1, audio_experts=(3, 9)), "lists experts {'"),
    ],
)
def test_losses_that_do_not_fit_the_model_are_refused(change, settings, words):
    run, stage = with_losses(settings)
    stage = stage.model_copy(update=change)
    content = run.model_copy(update={"stages": (stage,)}).model_dump()
    with pytest.raises(ValidationError, match=words):
        RunConfig.model_validate(content)
