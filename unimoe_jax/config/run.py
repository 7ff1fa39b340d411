"""Settings of a whole run: its stages, mesh, precision, checkpoints and logging.

YAML stays sparse; `config.load` turns it into these classes. A layer receives plain fields or its
own part of the settings, never `RunConfig`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unimoe_jax.config.base import MODULES, Config, FloatType, Positive, invalid
from unimoe_jax.config.data import DataConfig
from unimoe_jax.config.model import ModelConfig
from unimoe_jax.config.stage import StageConfig, Take

AxisSize = Literal[-1] | Positive
# Stages add small numbers to the seed, and the sum must fit 32 bits.
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]


class MeshConfig(Config):
    """Sizes of the mesh axes. One of them may be -1: it takes all devices that the others leave."""

    data: AxisSize = Field(default=-1, description="copies of the model, each with other rows")
    fsdp: AxisSize = Field(default=1, description="shards of parameters and optimizer state")
    expert: AxisSize = Field(default=1, description="groups of experts")
    tensor: AxisSize = Field(default=1, description="parts of heads and feed-forward layers")
    rules: dict[str, str | tuple[str, ...] | None] = Field(
        default_factory=dict,
        description="changes to the table from logical axes to mesh axes, parallel/sharding.py",
    )

    @model_validator(mode="after")
    def _one_takes_what_is_left(self):
        wild = [name for name, size in self if size == -1]
        if len(wild) > 1:
            raise invalid(
                f"{' and '.join(wild)} are -1, which stands for the devices that the other axes "
                "leave; allowed: -1 at most once",
                *wild,
            )
        return self


class PrecisionConfig(Config):
    """Floating-point types."""

    compute: FloatType = Field(default="bfloat16", description="of activations and products")
    frozen: FloatType = Field(default="bfloat16", description="of parameters that do not train")
    trained: FloatType = Field(
        default="float32", description="of parameters that train, and their moments"
    )


class CheckpointConfig(Config):
    """When the training state is saved."""

    every: Positive = Field(default=1000, description="steps between two checkpoints")
    keep: Positive = Field(default=2, description="checkpoints that are kept, the newest ones")


class LogConfig(Config):
    """What is recorded while training."""

    every: Positive = Field(default=10, description="steps between two records in metrics.jsonl")
    plots: bool = Field(default=True, description="write report.html and plots at the end")
    tensorboard: bool = Field(default=True, description="write TensorBoard events")


class RunConfig(Config):
    """A whole run. `configs/run/*.yaml` resolve to this."""

    name: Annotated[str, Field(min_length=1)] = Field(description="name of the run")
    output: str = Field(
        default="runs/{name}", description="run directory; {name} stands for the name"
    )
    seed: Seed = Field(
        default=0, description="seed of parameters, dropout and the order of samples"
    )
    tokenizer: str = Field(
        default="embedded",
        description="folder with tokenizer.model, or a .model file; `embedded`: the tokenizer of "
        "the embedded data set",
    )
    model: ModelConfig
    data: DataConfig
    stages: tuple[StageConfig, ...] = Field(description="the stages in order")
    mesh: MeshConfig = MeshConfig()
    precision: PrecisionConfig = PrecisionConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()

    @model_validator(mode="after")
    def _stages_fit(self):
        names = [stage.name for stage in self.stages]
        if not names:
            raise invalid("the run lists no stage", "stages")
        if len(set(names)) < len(names):
            places = [
                ("stages", n, "name") for n, name in enumerate(names) if names.count(name) > 1
            ]
            raise invalid(f"two stages share a name: {names}", *places)
        for position, stage in enumerate(self.stages):
            self._check_sources(position, stage)
            self._check_experts(position, stage)
            self._check_router_losses(position, stage)
            self._check_modality_losses(position, stage)
            self._check_origins(position, stage, earlier=names[:position])
        return self

    def _check_sources(self, position: int, stage: StageConfig) -> None:
        """A stage reads and scores only sources that `data.sources` has."""
        places = {name: ("mixture", name) for name in stage.mixture}
        places |= {name: ("evaluate", number) for number, name in enumerate(stage.evaluate)}
        for source, place in places.items():
            if source not in self.data.sources:
                raise invalid(
                    f"{_place(position, stage)}: data.sources has no {source!r}; it has "
                    f"{sorted(self.data.sources)}",
                    ("stages", position, *place),
                )

    def _check_experts(self, position: int, stage: StageConfig) -> None:
        """A stage builds experts only where the model has some."""
        wanted = set(stage.moe if isinstance(stage.moe, tuple) else ())
        missing = wanted - self.model.experts().keys()
        if missing or (stage.moe and not self.model.experts()):
            raise invalid(
                f"{_place(position, stage)}: moe is on, but the model has no experts in "
                f"{', '.join(sorted(missing)) or 'any module'}",
                ("stages", position, "moe"),
            )

    def _check_router_losses(self, position: int, stage: StageConfig) -> None:
        """Router losses need routers."""
        modules = self.stage_model(stage).experts()
        for module in MODULES:
            losses = getattr(stage.aux, module)
            if (losses.balance or losses.router_z) and module not in modules:
                raise invalid(
                    f"{_place(position, stage)}: aux.{module} needs experts in the {module}; set "
                    "moe",
                    ("stages", position, "aux", module),
                    ("stages", position, "moe"),
                )

    def _check_modality_losses(self, position: int, stage: StageConfig) -> None:
        """The losses over modalities need experts in the decoder, and list only existing ones."""
        losses, moe = stage.aux.modality, self.stage_model(stage).decoder.moe
        keys = ("stages", position, "aux", "modality"), ("stages", position, "moe")
        if moe is None:
            if losses.experts or losses.kl:
                raise invalid(
                    f"{_place(position, stage)}: aux.modality needs experts in the decoder; set "
                    "moe",
                    *keys,
                )
            return
        beyond = {
            name: experts
            for name, experts in losses.listed().items()
            if losses.experts and max(experts) >= moe.num_experts
        }
        if beyond:
            raise invalid(
                f"{_place(position, stage)}: aux.modality lists experts {beyond}, but the decoder "
                f"has {moe.num_experts}, numbered from 0",
                keys[0],
                "model.decoder.moe.num_experts",
            )

    def _check_origins(self, position: int, stage: StageConfig, earlier: list[str]) -> None:
        """Parameters start fresh, in a checkpoint, or in an earlier stage."""
        for number, take in enumerate(stage.init):
            for origin in take.origins:
                known = origin == "fresh" or origin.startswith("checkpoint:") or origin in earlier
                if not known:
                    raise invalid(
                        f"{_place(position, stage)}: init takes from {origin!r}, which is neither "
                        f"`fresh`, `checkpoint:PATH` nor an earlier stage {earlier}",
                        ("stages", position, "init", number, *_place_of_origin(take, origin)),
                    )

    def stage_model(self, stage: StageConfig) -> ModelConfig:
        """The model as this stage builds it: dense or with experts, with the stage's adapters and
        aspect. Use `resolve_stage`, which gives this as `StageSettings.model`."""
        modules = stage.moe if isinstance(stage.moe, tuple) else MODULES * stage.moe
        model = self.model.with_experts(modules)
        vision = model.vision
        if vision and stage.aspect:
            vision = vision.model_copy(update={"aspect": stage.aspect})
        return model.model_copy(update={"vision": vision, "lora": stage.lora})


def _place(position: int, stage: StageConfig) -> str:
    """How messages name a stage: number and name."""
    return f"stages.{position} ({stage.name})"


def _place_of_origin(take: Take, origin: str) -> tuple[str | int, ...]:
    """The key of `take` that names `origin`."""
    if take.experts:
        return "experts", take.experts.index(origin)
    return ("source",) if take.source else ("upcycle",)
