"""Settings of one stage: data mixture, what trains, where it starts, optimizer, losses."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from unimoe_jax.config.base import (
    Config,
    Fraction,
    ModuleName,
    NonNegative,
    Positive,
    Regex,
    compiles,
)
from unimoe_jax.config.data import LoaderConfig, TemplateName
from unimoe_jax.config.modules import LoRARule


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
