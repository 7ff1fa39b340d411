"""Between settings and loaders: the embedded data set, tokenizers, and a stage's pipeline."""

from __future__ import annotations

import zlib

from unimoe_jax.config import ConfigError, DataConfig, RunConfig, StageConfig
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.data.tokenizer import Tokenizer


def pool_groups(run: RunConfig, stage: StageConfig, shards: int) -> int:
    """G: media pools per batch; rows and data shards must fit it.

    Raises:
        ConfigError: they do not.
    """
    loader = stage.loader or run.data.loader
    key = f"stages.{stage.name}.loader" if stage.loader else "data.loader"
    groups = loader.groups or shards
    if groups % shards:
        raise ConfigError(
            f"{key}.groups = {groups} (stage {stage.name}): allowed: multiples of {shards}, the "
            "data shards of the mesh"
        )
    if loader.rows % groups:
        whose = f"{key}.groups = {groups}" if loader.groups else f"the mesh's {groups} data shards"
        divisors = [n for n in range(1, loader.rows + 1) if not (loader.rows % n or n % shards)]
        others = f", or {_listed(divisors)} for {key}.groups" if loader.groups and divisors else ""
        raise ConfigError(
            f"{key}.rows = {loader.rows} (stage {stage.name}) does not divide over {whose}; "
            f"allowed: multiples of {groups} for {key}.rows{others}"
        )
    return groups


def _listed(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def stage_pipeline(
    run: RunConfig, stage: StageConfig, data: DataConfig, tokenizer: Tokenizer, groups: int
) -> Pipeline:
    """Training batches of a stage. Each holds the micro-batches of one optimizer step: rows and
    groups are multiplied by `optim.accumulate`."""
    loader = stage.loader or data.loader
    accumulate = stage.optim.accumulate
    loader = loader.model_copy(update={"rows": loader.rows * accumulate})
    return Pipeline(
        _stage_data(data, stage),
        run.stage_model(stage),
        dict(stage.mixture),
        tokenizer,
        loader,
        seed=stage_seed(run, stage),
        shards=groups * accumulate,
    )


def stage_seed(run: RunConfig, stage: StageConfig) -> int:
    """The stage's name is in it: stages over the same sources see them in another order."""
    return run.seed + zlib.crc32(stage.name.encode()) % 65536


def stage_steps(stage: StageConfig, pipeline: Pipeline) -> int:
    """How many steps the stage trains on the batches of `pipeline`.

    Raises:
        ConfigError: none; it would leave what it began with.
    """
    steps = stage.optim.steps or pipeline.steps(stage.optim.epochs)
    if not steps:
        raise ConfigError(
            f"stages.{stage.name}.optim.epochs = {stage.optim.epochs:g}: less than one step; "
            f"batches per epoch: {pipeline.steps_per_epoch}; set more epochs, or optim.steps"
        )
    return steps


def heldout_pipeline(
    run: RunConfig, stage: StageConfig, data: DataConfig, tokenizer: Tokenizer, groups: int
) -> Pipeline:
    """Every sample of the stage's held-out sources exactly once, all media in one signature: one
    program scores them all."""
    loader = (stage.loader or data.loader).model_copy(update={"group_by_modality": False})
    mixture = dict.fromkeys(stage.evaluate, 1.0)
    return Pipeline(
        _stage_data(data, stage),
        run.stage_model(stage),
        mixture,
        tokenizer,
        loader,
        seed=0,
        shards=groups,
        shuffle=False,
    )


def _stage_data(data: DataConfig, stage: StageConfig) -> DataConfig:
    """The data as this stage reads them: with its own template, if it has one."""
    return data.model_copy(update={"template": stage.template or data.template})
