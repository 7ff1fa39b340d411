"""The pipelines of a stage: its training batches, and the batches of its held-out sources."""

from __future__ import annotations

from unimoe_jax.config import ConfigError, DataConfig
from unimoe_jax.config.stage_settings import StageSettings
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.data.tokenizer import Tokenizer


def stage_pipeline(
    settings: StageSettings, data: DataConfig, tokenizer: Tokenizer, groups: int
) -> Pipeline:
    """Training batches of a stage.

    A batch holds all micro-batches of one optimizer step, so rows and pool groups are multiplied by
    `optim.accumulate`: 8 rows in 2 groups with accumulate = 4 are 32 rows in 8 groups.

    data: the run's, with every source resolved to files.
    groups: media pools of a micro-batch, see `StageSettings.pool_groups`.
    """
    accumulate = settings.config.optim.accumulate
    rows = settings.loader.rows * accumulate
    return Pipeline(
        _with_template(data, settings),
        settings.model,
        dict(settings.config.mixture),
        tokenizer,
        settings.loader.model_copy(update={"rows": rows}),
        seed=settings.data_seed,
        shards=groups * accumulate,
    )


def stage_steps(settings: StageSettings, pipeline: Pipeline) -> int:
    """How many steps the stage trains on the batches of `pipeline`.

    Raises:
        ConfigError: `epochs` is less than one step, so the stage would change nothing.
    """
    optim = settings.config.optim
    steps = optim.steps or pipeline.steps(optim.epochs or 0)
    if not steps:
        raise ConfigError(
            f"stages.{settings.name}.optim.epochs = {optim.epochs:g}: less than one step; "
            f"batches per epoch: {pipeline.steps_per_epoch}; set more epochs, or optim.steps"
        )
    return steps


def heldout_pipeline(
    settings: StageSettings, data: DataConfig, tokenizer: Tokenizer, groups: int
) -> Pipeline:
    """Every sample of the stage's held-out sources exactly once.

    All media share one signature, so that a single compiled program scores every batch.
    """
    return Pipeline(
        _with_template(data, settings),
        settings.model,
        dict.fromkeys(settings.config.evaluate, 1.0),
        tokenizer,
        settings.loader.model_copy(update={"group_by_modality": False}),
        seed=0,
        shards=groups,
        shuffle=False,
    )


def _with_template(data: DataConfig, settings: StageSettings) -> DataConfig:
    """The run's data, read with the template of this stage."""
    return data.model_copy(update={"template": settings.template})
