"""Settings of the parts of a model: experts, adapters, decoder, encoders, connectors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from unimoe_jax.config.base import Config, FloatType, NonNegative, Positive, Regex, compiles


class LoRARule(Config):
    """Low-rank adapters for every linear layer whose module path matches (`re.fullmatch`)."""

    match: Regex
    rank: Positive
    alpha: Annotated[float, Field(gt=0)]
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    _match = field_validator("match")(compiles)


class RouterConfig(Config):
    """How tokens choose experts. The three dtype orders agree in exact arithmetic."""

    dtype_order: Literal["topk_softmax", "softmax_topk", "softmax_cast_topk"] = Field(
        "topk_softmax",
        description="topk_softmax: Uni-MoE; softmax_topk: Mixtral (float32 until renormalised); "
        "softmax_cast_topk: CuMo (probabilities cast before top-k)",
    )
    logits_dtype: Literal["compute", "float32"] = "float32"
    sample_second: bool = Field(
        False, description="draw experts after the first by Gumbel noise, as Uni-MoE 8e does"
    )
    modality_map: bool = Field(
        False, description="per-modality linear map in front of the router (8e's 'FM block')"
    )
    init: Literal["normal", "fan_in"] = Field(
        "normal", description="fan_in: uniform within 1/sqrt(width), where CuMo's routers start"
    )
    init_std: Annotated[float, Field(gt=0)] = Field(0.02, description="of init: normal")


class MoEConfig(Config):
    """A sparse mixture of experts in place of a feed-forward layer."""

    num_experts: Positive
    top_k: Positive = 2
    layers: Literal["all", "even", "first_half", "second_half"] | tuple[NonNegative, ...] = "all"
    router: RouterConfig = RouterConfig()
    dispatch: Literal["grouped", "dense"] = Field(
        "grouped", description="grouped: sorted, dropless; dense: all experts on all tokens"
    )
    exchange: Literal["auto", "gather", "all_to_all", "ragged"] = Field(
        "auto",
        description="how tokens reach experts on other devices: all of them to all (gather), each "
        "where it is needed in buffers of a fixed size (all_to_all) or its own (ragged: TPU); "
        "auto: gather or all_to_all, whichever moves less",
    )
    capacity_factor: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="slots of a row beyond factor · T · top_k / num_experts per expert are dropped "
        "and counted; null: nothing is",
    )

    @model_validator(mode="after")
    def _top_k_fits(self):
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k = {self.top_k} is larger than num_experts = {self.num_experts}; "
                f"allowed: 1..{self.num_experts}"
            )
        return self

    def is_moe_layer(self, layer: int, num_layers: int) -> bool:
        """Whether `layer` (from 0) of `num_layers` carries experts."""
        match self.layers:
            case "all":
                return True
            case "even":
                return layer % 2 == 0
            case "first_half":
                return layer < num_layers // 2
            case "second_half":
                return layer >= num_layers // 2
            case chosen:
                return layer in chosen

    @property
    def answering(self) -> MoEConfig:
        """This configuration where answers are made or scored: no expert is drawn and no slot
        dropped, so that an answer does not depend on what else is in the batch."""
        router = self.router.model_copy(update={"sample_second": False})
        return self.unlimited.model_copy(update={"router": router})

    @property
    def unlimited(self) -> MoEConfig:
        """This configuration without a capacity."""
        return self.model_copy(update={"capacity_factor": None})

    @property
    def everywhere(self) -> MoEConfig:
        """This configuration, for a module whose layers carry experts all or none.

        Raises:
            ValueError: `layers` is another choice.
        """
        if self.layers != "all":
            raise ValueError(f"moe.layers = {self.layers!r}: here only `all` is possible")
        return self


class DecoderConfig(Config):
    """LLaMA-shaped decoder: RMSNorm, RoPE (half-split), GQA, SwiGLU or experts of it."""

    vocab_size: Positive
    hidden_size: Positive
    mlp_dim: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive | None = Field(None, description="default hidden_size / num_heads")
    norm_eps: float = Field(1e-5, ge=0.0)
    rope_theta: float = Field(10000.0, gt=0.0)
    rope_table_dtype: FloatType | Literal["float16_bfloat16"] = Field(
        "float32",
        description="what cos/sin are rounded to, one after the other: the released Uni-MoE audio "
        "float16, the released speech models float16_bfloat16",
    )
    max_positions: Positive = 4096
    tie_embeddings: bool = False
    remat: bool = Field(True, description="recompute each period of layers in the backward pass")
    moe: MoEConfig | None = None

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = "
                f"{self.num_kv_heads}"
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of num_heads = "
                f"{self.num_heads}; set head_dim"
            )
        if self.moe and not isinstance(self.moe.layers, str):
            beyond = [layer for layer in self.moe.layers if layer >= self.num_layers]
            if beyond:
                raise ValueError(f"moe.layers {beyond} are beyond num_layers = {self.num_layers}")
        if self.moe and not any(self.moe_layers()):
            raise ValueError(
                f"moe.layers = {self.moe.layers!r} is none of num_layers = {self.num_layers}; for "
                "a dense decoder leave moe out"
            )
        if self.head_size % 2:
            raise ValueError(
                f"heads of {self.head_size}: rotary positions turn pairs, make it even"
            )
        return self

    @property
    def head_size(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads

    def moe_layers(self) -> tuple[bool, ...]:
        """One flag per layer: does it carry experts?"""
        return tuple(
            self.moe is not None and self.moe.is_moe_layer(layer, self.num_layers)
            for layer in range(self.num_layers)
        )


def heads_divide(config: Any) -> Any:
    """The settings, if their heads share the width out evenly; ValueError otherwise."""
    if config.hidden_size % config.num_heads:
        raise ValueError(
            f"hidden_size = {config.hidden_size} is not a multiple of num_heads = "
            f"{config.num_heads}"
        )
    return config


class ClipConfig(Config):
    """CLIP vision transformer (pre-LayerNorm)."""

    hidden_size: Positive
    mlp_dim: Positive
    num_layers: Positive
    num_heads: Positive
    image_size: Positive
    patch_size: Positive
    norm_eps: float = 1e-5
    activation: Literal["quick_gelu", "gelu"] = Field(
        "quick_gelu", description="OpenAI's models have quick_gelu, LAION's mostly gelu"
    )
    select_layer: int = Field(-2, description="index into the hidden states; -1 is the last")
    unread_layers: Literal["drop", "keep"] = Field(
        "drop",
        description="layers after the selected hidden state; keep: hold them, and count their "
        "routers' statistics, as CuMo does",
    )
    moe: MoEConfig | None = Field(None, description="experts in place of the MLP of every layer")
    remat: bool = False

    _heads = model_validator(mode="after")(heads_divide)

    @model_validator(mode="after")
    def _has_patches(self):
        if self.patch_size > self.image_size:
            raise ValueError(
                f"patch_size = {self.patch_size} is larger than image_size = {self.image_size}"
            )
        return self

    @model_validator(mode="after")
    def _experts_everywhere(self):
        if self.moe is not None:
            _ = self.moe.everywhere
        return self

    @model_validator(mode="after")
    def _layer_exists(self):
        if not -self.num_layers - 1 <= self.select_layer <= self.num_layers:
            raise ValueError(
                f"select_layer = {self.select_layer} is not among the {self.num_layers + 1} hidden "
                f"states; allowed: {-self.num_layers - 1}..{self.num_layers}"
            )
        return self

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def used_layers(self) -> int:
        """Layers up to the selected hidden state."""
        return self.select_layer % (self.num_layers + 1)

    @property
    def kept_unread(self) -> int:
        """Layers after it that are built all the same."""
        return self.num_layers - self.used_layers if self.unread_layers == "keep" else 0


class WhisperConfig(Config):
    """Whisper encoder: two convolutions over log-mel frames, then pre-LayerNorm blocks."""

    hidden_size: Positive
    mlp_dim: Positive
    num_layers: Positive
    num_heads: Positive
    mel_bins: Positive = 80
    max_positions: Positive = Field(1500, description="encoder states, half the mel frames")
    norm_eps: float = 1e-5
    remat: bool = False

    _heads = model_validator(mode="after")(heads_divide)


class BeatsConfig(Config):
    """BEATs encoder: 16x16 patches of a kaldi fbank, DeepNorm, gated relative position bias."""

    hidden_size: Positive
    embed_size: Positive
    mlp_dim: Positive
    num_layers: Positive
    num_heads: Positive
    patch_size: Positive = 16
    mel_bins: Positive = 128
    conv_kernel: Positive = 128
    conv_groups: Positive = 16
    num_buckets: Positive = 320
    max_distance: Positive = 800
    norm_eps: float = 1e-5
    remat: bool = False

    _heads = model_validator(mode="after")(heads_divide)

    @property
    def projects(self) -> bool:
        """Whether a linear layer leads from patches to states; the original has none in between
        equal widths."""
        return self.embed_size != self.hidden_size


class MlpConnectorConfig(Config):
    """`depth` linear layers with exact GELU in between (LLaVA's mlp{depth}x_gelu)."""

    kind: Literal["mlp"] = "mlp"
    depth: Positive = 2
    moe: MoEConfig | None = Field(None, description="experts of this form in its place")

    @model_validator(mode="after")
    def _experts_everywhere(self):
        if self.moe is not None:
            _ = self.moe.everywhere
        return self


class QueryConnectorConfig(Config):
    """Learned queries read an encoder, then `projector_depth` linear layers reach the decoder."""

    kind: Literal["whisper_decoder", "qformer"]
    num_queries: Positive = 50
    hidden_size: Positive
    mlp_dim: Positive
    num_layers: Positive
    num_heads: Positive
    norm_eps: float = Field(1e-5, description="BLIP-2's Q-Former uses 1e-12")
    max_positions: Positive = Field(448, description="whisper_decoder: rows of its position table")
    cross_attention_every: Positive = Field(2, description="qformer: cross-attend in layers 0, n…")
    projector_depth: Positive = 1

    _heads = model_validator(mode="after")(heads_divide)

    @model_validator(mode="after")
    def _queries_have_positions(self):
        if self.kind == "whisper_decoder" and self.num_queries > self.max_positions:
            raise ValueError(
                f"num_queries = {self.num_queries} exceeds max_positions = {self.max_positions}, "
                "the rows of the position table"
            )
        return self
