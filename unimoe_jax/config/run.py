"""Settings of a whole run: its stages, mesh, precision, checkpoints and logging.

YAML stays sparse; `config.load` turns it into these classes. A layer receives plain fields or its
own part of the settings, never `RunConfig`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unimoe_jax.config.base import MODULES, Config, FloatType, Positive
from unimoe_jax.config.data import DataConfig
from unimoe_jax.config.model import ModelConfig
from unimoe_jax.config.stage import StageConfig

AxisSize = Literal[-1] | Positive
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]  # stages add to it, and it must fit 32 bits


# ----------------------------------------------------------------------------------- stages


class MeshConfig(Config):
    """Sizes of the mesh axes (-1 once: what the devices leave) and logical axis -> mesh axis."""

    data: AxisSize = -1
    fsdp: AxisSize = 1
    expert: AxisSize = 1
    tensor: AxisSize = 1
    rules: dict[str, str | tuple[str, ...] | None] = Field(
        default_factory=dict, description="changes to the table in sharding.py"
    )

    @model_validator(mode="after")
    def _one_takes_what_is_left(self):
        wild = [name for name, size in self if size == -1]
        if len(wild) > 1:
            raise ValueError(
                f"{' and '.join(wild)} are -1, which stands for what the other axes leave; "
                "allowed: -1 at most once"
            )
        return self


class PrecisionConfig(Config):
    compute: FloatType = "bfloat16"
    frozen: FloatType = "bfloat16"
    trained: FloatType = "float32"


class CheckpointConfig(Config):
    every: Positive = 1000
    keep: Positive = 2


class LogConfig(Config):
    every: Positive = 10
    plots: bool = True
    tensorboard: bool = True


class RunConfig(Config):
    """A whole run. `configs/run/*.yaml` resolve to this."""

    name: Annotated[str, Field(min_length=1)]
    output: str = "runs/{name}"
    seed: Seed = 0
    tokenizer: str = Field("embedded", description="folder or .model file; `embedded`: own text")
    model: ModelConfig
    data: DataConfig
    stages: tuple[StageConfig, ...]
    mesh: MeshConfig = MeshConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _names_resolve(self):
        names = [stage.name for stage in self.stages]
        if not names:
            raise ValueError("stages: the run lists no stage")
        if len(set(names)) < len(names):
            raise ValueError(f"stages: two stages share a name: {names}")
        for position, stage in enumerate(self.stages):
            where = f"stages.{position} ({stage.name})"
            for source in (*stage.mixture, *stage.evaluate):
                if source not in self.data.sources:
                    raise ValueError(
                        f"{where}: data.sources has no {source!r}; it has "
                        f"{sorted(self.data.sources)}"
                    )
            wanted = set(stage.moe if isinstance(stage.moe, tuple) else ())
            if (stage.moe and not self.model.experts()) or wanted - self.model.experts().keys():
                missing = ", ".join(sorted(wanted - self.model.experts().keys())) or "any module"
                raise ValueError(f"{where}: moe is on, but the model has no experts in {missing}")
            self._check_router_losses(stage, where)
            self._check_modality_losses(stage, where)
            origins = [name for take in stage.init for name in take.origins]
            for origin in origins:
                if origin == "fresh" or origin.startswith("checkpoint:"):
                    continue
                if origin not in names[:position]:
                    raise ValueError(
                        f"{where}: init takes from {origin!r}, which is neither `fresh`, "
                        f"`checkpoint:PATH` nor an earlier stage {names[:position]}"
                    )
        return self

    def _check_router_losses(self, stage: StageConfig, where: str) -> None:
        has = self.stage_model(stage).experts()
        for module in MODULES:
            losses = getattr(stage.aux, module)
            if (losses.balance or losses.router_z) and module not in has:
                raise ValueError(f"{where}: aux.{module} needs experts in the {module}; set moe")

    def _check_modality_losses(self, stage: StageConfig, where: str) -> None:
        losses, moe = stage.aux.modality, self.stage_model(stage).decoder.moe
        if (losses.experts or losses.kl) and moe is None:
            raise ValueError(f"{where}: aux.modality needs experts in the decoder; set moe")
        beyond = {
            name: experts
            for name, experts in losses.listed().items()
            if losses.experts and max(experts) >= moe.num_experts
        }
        if beyond:
            raise ValueError(
                f"{where}: aux.modality lists experts {beyond}, but the decoder has "
                f"{moe.num_experts}, numbered from 0"
            )

    def stage_model(self, stage: StageConfig) -> ModelConfig:
        """The model as this stage builds it: dense or with experts, with the stage's adapters and
        its way to cut images."""
        modules = stage.moe if isinstance(stage.moe, tuple) else MODULES * stage.moe
        model = self.model.with_experts(modules)
        vision = model.vision
        if vision and stage.aspect:
            vision = vision.model_copy(update={"aspect": stage.aspect})
        return model.model_copy(update={"vision": vision, "lora": stage.lora})
