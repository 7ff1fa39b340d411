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
    invalid,
)
from unimoe_jax.config.data import LoaderConfig, TemplateName
from unimoe_jax.config.modules import LoRARule


class Rule(Config):
    """Which parameters train. Rules are tried in order on `/`-joined paths (`re.fullmatch`)."""

    match: Regex = Field(description="regular expression over parameter paths")
    lr: Annotated[float, Field(gt=0)] | None = Field(
        description="learning-rate multiplier; null freezes"
    )
    weight_decay: bool = Field(default=True, description="whether optim.weight_decay applies")

    _match = field_validator("match")(compiles)


class Take(Config):
    """Where matching parameters start from. Rules are tried in order; the first match wins.

    A rule has one of three origins, each named by an earlier stage or `checkpoint:PATH`.
    """

    match: Regex = Field(description="regular expression over parameter paths")
    source: str | None = Field(
        default=None, description="take the parameter as it is there; `fresh`: draw it at random"
    )
    experts: tuple[str, ...] | None = Field(
        default=None,
        description="the dense feed-forward layers of these origins become expert 0, 1, … of "
        "every MoE layer",
    )
    upcycle: str | None = Field(
        default=None,
        description="the dense layer of this origin becomes every expert; the model must then "
        "equal the dense one at step 0",
    )

    _match = field_validator("match")(compiles)

    @model_validator(mode="after")
    def _one_origin(self):
        if sum(bool(given) for given in (self.source, self.experts, self.upcycle)) != 1:
            raise invalid("name one of `source`, `experts` and `upcycle`")
        if "fresh" in self.origins and not self.source:
            raise invalid(
                "experts are made of trained layers, not of `fresh` ones", "experts", "upcycle"
            )
        return self

    @property
    def origins(self) -> tuple[str, ...]:
        """Every origin that the rule names."""
        if self.experts:
            return self.experts
        return tuple(name for name in (self.source, self.upcycle) if name)


class OptimConfig(Config):
    """AdamW and its schedule. Length is `steps`, or `epochs` over the stage's own data."""

    learning_rate: Annotated[float, Field(gt=0)] = Field(
        description="rate after warm-up; rules multiply it"
    )
    steps: Positive | None = Field(default=None, description="optimizer steps of the stage")
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="passes over the stage's data, instead of steps"
    )
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="course of the rate after warm-up"
    )
    warmup_ratio: Fraction = Field(
        default=0.03, description="share of the steps with a rising rate"
    )
    final_ratio: Fraction = Field(
        default=0.0, description="rate at the end, relative to learning_rate"
    )
    b1: float = Field(default=0.9, ge=0.0, lt=1.0, description="decay of the first moment")
    b2: float = Field(default=0.999, ge=0.0, lt=1.0, description="decay of the second moment")
    eps: Annotated[float, Field(gt=0)] = Field(
        default=1e-8, description="added to the root of Adam"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="decoupled, as in AdamW"
    )
    clip_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="largest norm of all gradients together; null: no clipping"
    )
    accumulate: Positive = Field(
        default=1, description="micro-batches of `rows` per optimizer step"
    )
    max_bad_steps: Positive = Field(
        default=10, description="stop after so many non-finite steps in a row"
    )

    @model_validator(mode="after")
    def _one_length(self):
        if (self.steps is None) == (self.epochs is None):
            raise invalid("set either `steps` or `epochs`", "steps", "epochs")
        return self


class RouterLossConfig(Config):
    """Coefficients of the losses of one module's routers."""

    balance: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="of the balance loss, which is smallest if all experts get equal shares",
    )
    router_z: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="of the z-loss, which keeps router logits small"
    )
    balance_layers: Literal["mean", "sum"] = Field(
        default="mean",
        description="how the balance losses of layers are joined; CuMo: mean; Uni-MoE 8e: sum; the "
        "z-loss is always a mean",
    )
    gradient: Literal["real", "none"] = Field(
        default="real",
        description="none: the losses are reported and have no gradient, as CuMo's Mixtral was "
        "trained",
    )


class ModalityLossConfig(Config):
    """Coefficients of Uni-MoE 8e's losses over modalities in the decoder's routers.

    8e uses 0.01. The losses are summed over layers and rows, and a row of 8e holds one sample, so
    turn packing off to get the same numbers.
    """

    experts: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="of the distance between a modality's routes and its experts, which are "
        "listed below",
    )
    kl: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="of 1 - KL divergence between the mean routes of pairs of modalities",
    )
    image_experts: tuple[NonNegative, ...] = Field(
        default=(2, 3, 4, 6), description="experts of images"
    )
    video_experts: tuple[NonNegative, ...] = Field(
        default=(2, 3, 4, 6), description="experts of videos"
    )
    audio_experts: tuple[NonNegative, ...] = Field(
        default=(0, 4, 5, 7), description="experts of sounds, and of speech as well"
    )

    def listed(self) -> dict[str, tuple[int, ...]]:
        """image, video and audio -> their experts, without modalities that have none."""
        found = {
            "image": self.image_experts,
            "video": self.video_experts,
            "audio": self.audio_experts,
        }
        return {name: experts for name, experts in found.items() if experts}


class AuxLossConfig(Config):
    """Router losses of every kind of module that may carry experts."""

    encoder: RouterLossConfig = Field(
        default=RouterLossConfig(), description="of the vision encoder"
    )
    connector: RouterLossConfig = Field(
        default=RouterLossConfig(), description="of the vision connector"
    )
    decoder: RouterLossConfig = Field(default=RouterLossConfig(), description="of the decoder")
    modality: ModalityLossConfig = Field(
        default=ModalityLossConfig(), description="over modalities, in the decoder"
    )


class StageConfig(Config):
    """One stage: its data, which parameters train, where they start, and what it leaves."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")] = Field(
        description="names its folder in the run directory"
    )
    mixture: dict[str, Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="sources of data.sources and their weights"
    )
    train: tuple[Rule, ...] = Field(description="which parameters train")
    init: tuple[Take, ...] = Field(
        default=(Take(match=".*", source="fresh"),), description="where parameters start"
    )
    optim: OptimConfig
    moe: bool | tuple[ModuleName, ...] = Field(
        default=False,
        description="build experts where the model has `moe`; true: in all modules; a list: in "
        "these modules; false: dense layers everywhere",
    )
    lora: tuple[LoRARule, ...] = Field(default=(), description="adapters of this stage")
    aux: AuxLossConfig = Field(default=AuxLossConfig(), description="router losses")
    leaves: Literal["all", "trained"] = Field(
        default="all", description="parameters that are written at the end"
    )
    merge_lora: bool = Field(
        default=False, description="add the adapters to their kernels at the end"
    )
    loader: LoaderConfig | None = Field(
        default=None, description="replaces data.loader in this stage"
    )
    evaluate: tuple[str, ...] = Field(
        default=(), description="held-out sources, scored at start and end"
    )
    template: TemplateName | None = Field(
        default=None, description="replaces data.template in this stage"
    )
    aspect: Literal["square", "pad"] | None = Field(
        default=None, description="replaces model.vision.aspect in this stage"
    )
