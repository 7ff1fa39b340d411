"""Every setting of a run: frozen pydantic models that hold all defaults and their invariants.

YAML stays sparse; `config_io` turns it into these classes. A layer receives plain fields or its own
sub-config from here, never `RunConfig`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unimoe_jax.model_config import AudioConfig, ModelConfig, SpeechConfig, VisionConfig
from unimoe_jax.module_config import (
    MEDIA,
    MODULES,
    AttentionProgram,
    BeatsConfig,
    ClipConfig,
    Config,
    DecoderConfig,
    FloatType,
    Fraction,
    LoRARule,
    MediaName,
    MlpConnectorConfig,
    ModuleName,
    MoEConfig,
    NonNegative,
    Positive,
    QueryConnectorConfig,
    Regex,
    RouterConfig,
    WhisperConfig,
    compiles,
)

__all__ = [
    "MEDIA",
    "AttentionProgram",
    "AudioConfig",
    "AuxLossConfig",
    "BeatsConfig",
    "CheckpointConfig",
    "ClipConfig",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "FloatType",
    "LoRARule",
    "LoaderConfig",
    "LogConfig",
    "MediaName",
    "MeshConfig",
    "MlpConnectorConfig",
    "MoEConfig",
    "ModalityLossConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecisionConfig",
    "QueryConnectorConfig",
    "RouterConfig",
    "RouterLossConfig",
    "Rule",
    "RunConfig",
    "SourceConfig",
    "SpeechConfig",
    "StageConfig",
    "Take",
    "VisionConfig",
    "WhisperConfig",
]

AxisSize = Literal[-1] | Positive
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]  # stages add to it, and it must fit 32 bits


# ------------------------------------------------------------------------------------- data


class SourceConfig(Config):
    """One JSON file of records in the LLaVA/Uni-MoE schema, and where its media lie."""

    path: str = Field(description="JSON list or JSON lines; may be `embedded:SPLIT/NAME`")
    root: str | None = Field(None, description="media folder; default: the JSON's own folder")
    voice: Literal["speech", "audio"] | None = Field(
        None, description="which encoder hears `voice` files; default: the only one there is"
    )


class LoaderConfig(Config):
    """How records become batches."""

    row_length: Positive = Field(description="T: positions per row, soft tokens included")
    rows: Positive = Field(description="rows of one global batch")
    groups: Positive | None = Field(
        None,
        description="media pools that a batch is cut into, a multiple of the data shards; set it "
        "to get the same batches on any mesh (default: one per data shard)",
    )
    packing: bool = True
    group_by_modality: bool = Field(
        True,
        description="each batch holds one combination of media; with packing, samples of text "
        "alone fill what its rows leave",
    )
    workers: NonNegative = Field(0, description="processes; 0 reads with threads")
    threads: Positive = 4
    prefetch: Positive = 4
    strict: bool = Field(False, description="stop at the first bad sample")
    max_bad_share: Fraction = 0.01
    max_image_pixels: Positive = 89_478_485
    max_aspect_ratio: Positive = 200


TemplateName = Literal[
    "vicuna_v1", "vicuna_turns", "plain", "mistral_instruct_system", "mistral_instruct"
]


class DataConfig(Config):
    sources: dict[str, SourceConfig]
    loader: LoaderConfig
    template: TemplateName = "vicuna_v1"
    embedded_size: Positive = Field(1, description="scale of the embedded data set")
    cache: str | None = Field(None, description="folder of the embedded data set and the indices")


# ----------------------------------------------------------------------------------- stages


class Rule(Config):
    """Which parameters train. Rules are tried in order on `/`-joined paths (`re.fullmatch`)."""

    match: Regex
    lr: Annotated[float, Field(gt=0)] | None = Field(
        description="learning-rate multiplier; null freezes"
    )
    weight_decay: bool = True

    _match = field_validator("match")(compiles)


class Take(Config):
    """Where matching parameters start from. Tried in order; the first match wins.

    `source` is a stage name, `checkpoint:PATH`, or `fresh`. With `experts`, a list of such names,
    the dense feed-forward weights of each become expert 0, 1, … of every MoE layer. With `upcycle`,
    one such name, its dense layer becomes every expert; the model must then equal it at step 0.
    """

    match: Regex
    source: str | None = None
    experts: tuple[str, ...] | None = None
    upcycle: str | None = None

    _match = field_validator("match")(compiles)

    @model_validator(mode="after")
    def _one_origin(self):
        if sum(bool(given) for given in (self.source, self.experts, self.upcycle)) != 1:
            raise ValueError("name one of `source`, `experts` and `upcycle`")
        if "fresh" in self.origins and not self.source:
            raise ValueError("experts are made of trained layers, not of `fresh` ones")
        return self

    @property
    def origins(self) -> tuple[str, ...]:
        """Everything it takes from."""
        return self.experts or (self.source or self.upcycle,)


class OptimConfig(Config):
    """AdamW and its schedule. Length is `steps`, or `epochs` over the stage's own data."""

    learning_rate: Annotated[float, Field(gt=0)]
    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0)] | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: Fraction = 0.03
    final_ratio: Fraction = 0.0
    b1: float = Field(0.9, ge=0.0, lt=1.0)
    b2: float = Field(0.999, ge=0.0, lt=1.0)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    accumulate: Positive = Field(1, description="micro-batches of `rows` per optimizer step")
    max_bad_steps: Positive = Field(10, description="stop after so many non-finite steps in a row")

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("set either `steps` or `epochs`")
        return self


class RouterLossConfig(Config):
    """Coefficients of the losses of one module's routers."""

    balance: Annotated[float, Field(ge=0)] = 0.0
    router_z: Annotated[float, Field(ge=0)] = 0.0
    balance_layers: Literal["mean", "sum"] = Field(
        "mean", description="over layers; mean: CuMo; sum: Uni-MoE 8e. The z-loss is a mean"
    )
    gradient: Literal["real", "none"] = Field(
        "real", description="none: reported, but not followed, as CuMo's Mixtral was trained"
    )


class ModalityLossConfig(Config):
    """Coefficients of Uni-MoE 8e's losses over modalities in the decoder's routers; 8e: 0.01.

    Summed over layers and rows, as in 8e, where a row is one sample: turn packing off.
    """

    experts: Annotated[float, Field(ge=0)] = Field(
        0.0, description="distance of a modality's routes from its own experts, listed below"
    )
    kl: Annotated[float, Field(ge=0)] = Field(
        0.0, description="1 - KL divergence between the mean routes of pairs of modalities"
    )
    image_experts: tuple[NonNegative, ...] = (2, 3, 4, 6)
    video_experts: tuple[NonNegative, ...] = (2, 3, 4, 6)
    audio_experts: tuple[NonNegative, ...] = Field((0, 4, 5, 7), description="speech as well")

    def listed(self) -> dict[str, tuple[int, ...]]:
        """image, video and audio -> their experts, those that have any."""
        found = {
            "image": self.image_experts,
            "video": self.video_experts,
            "audio": self.audio_experts,
        }
        return {name: experts for name, experts in found.items() if experts}


class AuxLossConfig(Config):
    """Router losses of every kind of module that may carry experts."""

    encoder: RouterLossConfig = RouterLossConfig()
    connector: RouterLossConfig = RouterLossConfig()
    decoder: RouterLossConfig = RouterLossConfig()
    modality: ModalityLossConfig = ModalityLossConfig()


class StageConfig(Config):
    """One stage: its data, what trains, how long, what it starts from, what it leaves behind."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="source -> weight"
    )
    train: tuple[Rule, ...]
    init: tuple[Take, ...] = (Take(match=".*", source="fresh"),)
    optim: OptimConfig
    moe: bool | tuple[ModuleName, ...] = Field(
        False,
        description="experts where the model has `moe`: everywhere, or in the modules named; else "
        "dense layers",
    )
    lora: tuple[LoRARule, ...] = ()
    aux: AuxLossConfig = AuxLossConfig()
    leaves: Literal["all", "trained"] = Field(
        "all", description="parameters written at the end; merge_lora adds the adapters to them"
    )
    merge_lora: bool = False
    loader: LoaderConfig | None = Field(None, description="replaces data.loader in this stage")
    evaluate: tuple[str, ...] = Field((), description="held-out sources scored at start and end")
    template: TemplateName | None = Field(None, description="replaces data.template in this stage")
    aspect: Literal["square", "pad"] | None = Field(
        None, description="replaces model.vision.aspect in this stage"
    )


# -------------------------------------------------------------------------------------- run


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
