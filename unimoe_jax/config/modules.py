"""Settings of the parts of a model: experts, adapters, decoder, encoders, connectors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from unimoe_jax.config.base import (
    Config,
    FloatType,
    NonNegative,
    Positive,
    Regex,
    compiles,
    invalid,
)


class LoRARule(Config):
    """Low-rank adapters for every linear layer whose module path matches (`re.fullmatch`)."""

    match: Regex = Field(description="regular expression over module paths")
    rank: Positive = Field(description="R: width of the adapter")
    alpha: Annotated[float, Field(gt=0)] = Field(
        description="the adapter is scaled by alpha / rank"
    )
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.0, description="share of the adapter's inputs that a training step sets to zero"
    )

    _match = field_validator("match")(compiles)


class RouterConfig(Config):
    """How tokens choose experts. The three dtype orders agree in exact arithmetic."""

    dtype_order: Literal["topk_softmax", "softmax_topk", "softmax_cast_topk"] = Field(
        default="topk_softmax",
        description="topk_softmax: Uni-MoE; softmax_topk: Mixtral (float32 until renormalised); "
        "softmax_cast_topk: CuMo (probabilities cast before top-k)",
    )
    logits_dtype: Literal["compute", "float32"] = Field(
        default="float32", description="dtype of the router logits; compute: precision.compute"
    )
    sample_second: bool = Field(
        default=False,
        description="draw experts after the first by Gumbel noise, as Uni-MoE 8e does",
    )
    modality_map: bool = Field(
        default=False,
        description="per-modality linear map in front of the router (8e's 'FM block')",
    )
    init: Literal["normal", "fan_in"] = Field(
        default="normal",
        description="initial weights; normal: see init_std; fan_in: uniform within "
        "±1/sqrt(width), as CuMo's routers start",
    )
    init_std: Annotated[float, Field(gt=0)] = Field(
        default=0.02, description="standard deviation of `init: normal`"
    )


class MoEConfig(Config):
    """A sparse mixture of experts in place of a feed-forward layer."""

    num_experts: Positive = Field(description="E: experts per layer")
    top_k: Positive = Field(default=2, description="K: experts that a token visits")
    layers: Literal["all", "even", "first_half", "second_half"] | tuple[NonNegative, ...] = Field(
        default="all", description="layers that carry experts; a list gives their numbers from 0"
    )
    router: RouterConfig = RouterConfig()
    dispatch: Literal["grouped", "dense"] = Field(
        default="grouped", description="grouped: sorted, dropless; dense: all experts on all tokens"
    )
    exchange: Literal["auto", "gather", "all_to_all", "ragged"] = Field(
        default="auto",
        description="how tokens reach experts on other devices; gather: every device gets all "
        "tokens; all_to_all: every token travels to the devices of its experts in buffers of a "
        "fixed size; ragged (TPU): in buffers of the size that is needed; auto: gather or "
        "all_to_all, whichever moves fewer bytes",
    )
    capacity_factor: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="an expert takes at most factor · T · top_k / num_experts slots of a row; "
        "slots beyond that are dropped and counted; null: nothing is dropped",
    )

    @model_validator(mode="after")
    def _top_k_fits(self):
        if self.top_k > self.num_experts:
            raise invalid(
                f"top_k = {self.top_k} is larger than num_experts = {self.num_experts}; "
                f"allowed: 1..{self.num_experts}",
                "top_k",
                "num_experts",
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
        """These settings for answering and scoring: no expert is drawn and no slot is dropped, so
        that an answer does not depend on the rest of the batch."""
        router = self.router.model_copy(update={"sample_second": False})
        return self.unlimited.model_copy(update={"router": router})

    @property
    def unlimited(self) -> MoEConfig:
        """These settings without a capacity."""
        return self.model_copy(update={"capacity_factor": None})

    @property
    def everywhere(self) -> MoEConfig:
        """These settings, for a module in which either all layers carry experts or none.

        Raises:
            ValueError: `layers` is another choice.
        """
        if self.layers != "all":
            raise invalid(
                f"moe.layers = {self.layers!r}: here only `all` is possible", "moe.layers"
            )
        return self


class DecoderConfig(Config):
    """LLaMA-shaped decoder: RMSNorm, RoPE (half-split), GQA, and SwiGLU layers or experts."""

    vocab_size: Positive = Field(description="V: rows of the embedding")
    hidden_size: Positive = Field(description="D: width of the token stream")
    mlp_dim: Positive = Field(description="F: width inside a feed-forward layer or an expert")
    num_layers: Positive = Field(description="L")
    num_heads: Positive = Field(description="N: heads of the queries")
    num_kv_heads: Positive = Field(description="heads of keys and values; divides num_heads")
    head_dim: Positive | None = Field(
        default=None, description="H: width of a head; default: hidden_size / num_heads"
    )
    norm_eps: float = Field(default=1e-5, ge=0.0, description="added to the mean square in RMSNorm")
    rope_theta: float = Field(default=10000.0, gt=0.0, description="base of the rotary frequencies")
    rope_table_dtype: FloatType | Literal["float16_bfloat16"] = Field(
        default="float32",
        description="dtype that the cos and sin tables are rounded to; the released Uni-MoE audio "
        "model has float16, the released speech models round to float16 and then to bfloat16 "
        "(float16_bfloat16)",
    )
    max_positions: Positive = Field(
        default=4096, description="longest stream that generation allows"
    )
    tie_embeddings: bool = Field(default=False, description="use the embedding as the output head")
    remat: bool = Field(
        default=True, description="recompute each period of layers in the backward pass"
    )
    moe: MoEConfig | None = Field(
        default=None, description="experts in place of feed-forward layers"
    )

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.num_heads % self.num_kv_heads:
            raise invalid(
                f"num_heads = {self.num_heads} is not a multiple of num_kv_heads = "
                f"{self.num_kv_heads}",
                "num_heads",
                "num_kv_heads",
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise invalid(
                f"hidden_size = {self.hidden_size} is not a multiple of num_heads = "
                f"{self.num_heads}; set head_dim",
                "hidden_size",
                "num_heads",
            )
        if self.head_size % 2:
            raise invalid(
                f"heads of {self.head_size}: rotary positions turn pairs of numbers, so the width "
                "of a head must be even",
                "head_dim",
                "hidden_size",
                "num_heads",
            )
        return self

    @model_validator(mode="after")
    def _layers_exist(self):
        if self.moe is None:
            return self
        layers = self.moe.layers
        if not isinstance(layers, str):
            beyond = [layer for layer in layers if layer >= self.num_layers]
            if beyond:
                raise invalid(
                    f"moe.layers {beyond} are beyond num_layers = {self.num_layers}",
                    "moe.layers",
                    "num_layers",
                )
        if not any(self.moe_layers()):
            raise invalid(
                f"moe.layers = {layers!r} is none of num_layers = {self.num_layers}; for a dense "
                "decoder leave moe out",
                "moe.layers",
                "num_layers",
            )
        return self

    @property
    def head_size(self) -> int:
        """H: width of a head."""
        return self.head_dim or self.hidden_size // self.num_heads

    def moe_layers(self) -> tuple[bool, ...]:
        """One flag per layer: whether it carries experts."""
        return tuple(
            self.moe is not None and self.moe.is_moe_layer(layer, self.num_layers)
            for layer in range(self.num_layers)
        )


def heads_divide(config: Any) -> Any:
    """The settings, if hidden_size is a multiple of num_heads; ValueError otherwise."""
    if config.hidden_size % config.num_heads:
        raise invalid(
            f"hidden_size = {config.hidden_size} is not a multiple of num_heads = "
            f"{config.num_heads}",
            "hidden_size",
            "num_heads",
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
        default="quick_gelu", description="OpenAI's models have quick_gelu, most of LAION's gelu"
    )
    select_layer: int = Field(
        default=-2, description="hidden state that is read, as an index; -1 is the last one"
    )
    unread_layers: Literal["drop", "keep"] = Field(
        default="drop",
        description="what becomes of the layers after the selected hidden state; keep: the model "
        "has them, and their router statistics count, as in CuMo",
    )
    moe: MoEConfig | None = Field(
        default=None, description="experts in place of the MLP of every layer"
    )
    remat: bool = False

    _heads = model_validator(mode="after")(heads_divide)

    @model_validator(mode="after")
    def _has_patches(self):
        if self.patch_size > self.image_size:
            raise invalid(
                f"patch_size = {self.patch_size} is larger than image_size = {self.image_size}",
                "patch_size",
                "image_size",
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
            raise invalid(
                f"select_layer = {self.select_layer} is not among the {self.num_layers + 1} hidden "
                f"states; allowed: {-self.num_layers - 1}..{self.num_layers}",
                "select_layer",
                "num_layers",
            )
        return self

    @property
    def num_patches(self) -> int:
        """Patches of an image, which are its soft tokens."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def used_layers(self) -> int:
        """Layers up to the selected hidden state."""
        return self.select_layer % (self.num_layers + 1)

    @property
    def kept_unread(self) -> int:
        """Layers after the selected hidden state that the model has."""
        return self.num_layers - self.used_layers if self.unread_layers == "keep" else 0


class WhisperConfig(Config):
    """Whisper encoder: two convolutions over log-mel frames, then pre-LayerNorm blocks."""

    hidden_size: Positive
    mlp_dim: Positive
    num_layers: Positive
    num_heads: Positive
    mel_bins: Positive = 80
    max_positions: Positive = Field(
        default=1500, description="encoder states of a chunk: half its mel frames"
    )
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
        """Whether a linear layer maps patches to states; equal widths need none, as in BEATs."""
        return self.embed_size != self.hidden_size


class MlpConnectorConfig(Config):
    """`depth` linear layers with exact GELU between them (LLaVA's mlp{depth}x_gelu)."""

    kind: Literal["mlp"] = "mlp"
    depth: Positive = 2
    moe: MoEConfig | None = Field(default=None, description="experts in place of the whole MLP")

    @model_validator(mode="after")
    def _experts_everywhere(self):
        if self.moe is not None:
            _ = self.moe.everywhere
        return self


class QueryConnectorConfig(Config):
    """Learned queries attend to encoder states; `projector_depth` linear layers follow."""

    kind: Literal["whisper_decoder", "qformer"]
    num_queries: Positive = Field(default=50, description="soft tokens per chunk")
    hidden_size: Positive
    mlp_dim: Positive
    num_layers: Positive
    num_heads: Positive
    norm_eps: float = Field(default=1e-5, description="BLIP-2's Q-Former uses 1e-12")
    max_positions: Positive = Field(
        default=448, description="whisper_decoder: rows of the position table"
    )
    cross_attention_every: Positive = Field(
        default=2, description="qformer: layers 0, n, 2n … attend to the encoder"
    )
    projector_depth: Positive = 1

    _heads = model_validator(mode="after")(heads_divide)

    @model_validator(mode="after")
    def _queries_have_positions(self):
        if self.kind == "whisper_decoder" and self.num_queries > self.max_positions:
            raise invalid(
                f"num_queries = {self.num_queries} exceeds max_positions = {self.max_positions}, "
                "the rows of the position table",
                "num_queries",
                "max_positions",
            )
        return self
