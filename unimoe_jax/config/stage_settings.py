"""One stage together with everything that it takes from its run.

A stage of a run file may leave out its loader, template and more, and takes the run's then. Code
that builds, checks or measures a stage receives a `StageSettings`, which `resolve_stage` makes
once, so that nobody looks into the run again.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

from unimoe_jax.config.data import LoaderConfig, TemplateName
from unimoe_jax.config.errors import ConfigError
from unimoe_jax.config.model import ModelConfig
from unimoe_jax.config.run import PrecisionConfig, RunConfig
from unimoe_jax.config.stage import StageConfig


@dataclass(frozen=True)
class StageSettings:
    """A stage with nothing left open.

    config: the stage as the run file has it.
    model: the model as the stage builds it: with its experts, adapters and way to cut images.
    loader, loader_key: the loader in force, and the key that a user would change it under.
    template: the prompt template in force.
    precision: the run's.
    data_seed: orders the samples. The stage's name is in it, so that two stages over the same
        sources see them in different orders.
    param_seed: draws fresh parameters and dropout. It follows from the stage's place in the run.
    """

    config: StageConfig
    model: ModelConfig
    loader: LoaderConfig
    loader_key: str
    template: TemplateName
    precision: PrecisionConfig
    data_seed: int
    param_seed: int

    @property
    def name(self) -> str:
        """Name of the stage."""
        return self.config.name

    def pool_groups(self, shards: int) -> int:
        """G: into how many media pools a batch is cut, on a mesh with `shards` data shards.

        For example, 4 data shards and `groups: null` give 4 pools; `groups: 8` gives 8, two for
        each shard; `groups: 6` is refused, because 4 shards cannot share 6 pools evenly.

        Raises:
            ConfigError: the groups do not divide over the shards, or the rows over the groups.
        """
        loader, key = self.loader, self.loader_key
        groups = loader.groups or shards
        if groups % shards:
            raise ConfigError(
                f"{key}.groups = {groups} (stage {self.name}): allowed: multiples of {shards}, the "
                "data shards of the mesh"
            )
        if loader.rows % groups:
            cause = (
                f"{key}.groups = {groups}" if loader.groups else f"the mesh's {groups} data shards"
            )
            fitting = [n for n in range(1, loader.rows + 1) if not (loader.rows % n or n % shards)]
            numbers = " or ".join(map(str, fitting))
            others = f", or {numbers} for {key}.groups" if loader.groups and fitting else ""
            raise ConfigError(
                f"{key}.rows = {loader.rows} (stage {self.name}) does not divide over {cause}; "
                f"allowed: multiples of {groups} for {key}.rows{others}"
            )
        return groups


def resolve_stage(run: RunConfig, stage: StageConfig) -> StageSettings:
    """Fill in everything that `stage` takes from `run`; `stage` is one of the run's stages."""
    position = [other.name for other in run.stages].index(stage.name)
    return StageSettings(
        config=stage,
        model=run.stage_model(stage),
        loader=stage.loader or run.data.loader,
        loader_key=f"stages.{stage.name}.loader" if stage.loader else "data.loader",
        template=stage.template or run.data.template,
        precision=run.precision,
        data_seed=run.seed + zlib.crc32(stage.name.encode()) % 65536,
        param_seed=run.seed + 1 + position,
    )


def resolve_stages(run: RunConfig) -> tuple[StageSettings, ...]:
    """All stages of `run` in order, each with everything that it takes from the run."""
    return tuple(resolve_stage(run, stage) for stage in run.stages)
