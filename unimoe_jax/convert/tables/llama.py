"""LLaMA-shaped decoders of transformers: LLaMA, Vicuna, Mistral.

`trunk`, `swiglu` and `chosen` are also used by the tables of Mixtral, Uni-MoE and CuMo, which have
the same decoder with other feed-forward layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimoe_jax.config import DecoderConfig, MoEConfig
from unimoe_jax.convert.entry import LINEAR, Copy, Entry, Excuse, expand, linear, norm
from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.nn.stack import Place, where_is

TIED = Excuse(r"base:lm_head\.weight", "tied to the embedding")
EXCUSES = (
    Excuse(
        r"base:(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)",
        "a buffer of rotary frequencies, recomputed here",
    ),
)

# Values that transformers uses for keys that a config.json lacks. Files that transformers saves may
# leave out every key that has its default.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "mistral": {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "sliding_window": 4096,
    },
    "mixtral": {
        "max_position_embeddings": 4096 * 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
    },
}


def decoder_config(
    config: Mapping[str, Any], moe: MoEConfig | None = None, kind: str = "llama"
) -> DecoderConfig:
    """Settings of the decoder, from a `config.json` of Llama-, Mistral- or MixtralForCausalLM.

    Args:
        moe: the experts of the decoder, which these files describe in different ways.
        kind: the model whose defaults are used for keys that are missing, one of `DEFAULTS`.

    Raises:
        ConvertError: the model has an option that changes numbers and that this decoder lacks.
    """
    defaults = DEFAULTS[kind]
    # transformers 5 writes `rope_parameters` where earlier versions write `rope_scaling`.
    scaling = config.get("rope_scaling") or config.get("rope_parameters") or {}
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    # Options that the decoder does not have.
    if rope_type != "default":
        raise ConvertError(f"config.json: rope_scaling {rope_type!r} is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ConvertError(f"config.json: hidden_act {config['hidden_act']!r} is not supported")
    for key in ("attention_bias", "mlp_bias"):
        if config.get(key):
            raise ConvertError(f"config.json: {key} is not supported")
    # Keys that may be missing. A sliding window or a number of heads may also be null.
    window = config.get("sliding_window", defaults.get("sliding_window"))
    max_positions = config.get("max_position_embeddings", defaults["max_position_embeddings"])
    theta = config.get("rope_theta") or scaling.get("rope_theta") or defaults["rope_theta"]
    kv_heads = config.get("num_key_value_heads", defaults.get("num_key_value_heads"))
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=kv_heads or config["num_attention_heads"],
        head_dim=config.get("head_dim"),
        norm_eps=config.get("rms_norm_eps", defaults["rms_norm_eps"]),
        rope_theta=float(theta),
        # This decoder has no sliding window. Full attention gives the same result as long as no
        # stream is longer than the window, so the window bounds the positions.
        max_positions=min(window, max_positions) if window else max_positions,
        tie_embeddings=bool(config.get("tie_word_embeddings", False)),
        moe=moe,
    )


def places(config: DecoderConfig) -> dict[int, Place]:
    """Layer number -> the place of its parameters below `decoder/`."""
    return dict(enumerate(where_is(config.moe_layers())))


def chosen(config: DecoderConfig, moe: bool) -> dict[int, Place]:
    """Places of the layers with experts if `moe` is true, else of the dense layers."""
    kinds = config.moe_layers()
    return {layer: place for layer, place in places(config).items() if kinds[layer] == moe}


def trunk(config: DecoderConfig) -> list[Copy]:
    """Copies of everything but the feed-forward layers, from group `base`."""
    top = [
        Entry("base:model.embed_tokens.weight", "embed/embedding"),
        *norm("base:model.norm", "decoder/final_norm", bias=False),
    ]
    if not config.tie_embeddings:
        top.append(Entry("base:lm_head.weight", "lm_head/kernel", LINEAR))
    # s is the source's prefix, d the destination's; all tables use these two letters.
    s, d = "base:model.layers.{l}.", "decoder/{l}/"
    layers = [
        *norm(f"{s}input_layernorm", f"{d}attention_norm", bias=False),
        *norm(f"{s}post_attention_layernorm", f"{d}mlp_norm", bias=False),
    ]
    for name in "qkvo":
        layers += linear(f"{s}self_attn.{name}_proj", f"{d}attention/{name}_proj", bias=False)
    return expand(top) + expand(layers, places(config))


def swiglu(src: str, dst: str) -> tuple[Entry, ...]:
    """Entries of the three matrices of one feed-forward layer (or one expert): gate, up, down."""
    names = ("gate_proj", "up_proj", "down_proj")
    return tuple(
        entry for name in names for entry in linear(f"{src}{name}", f"{dst}{name}", bias=False)
    )


def copies(config: DecoderConfig) -> list[Copy]:
    """Copies of a dense decoder, from group `base`."""
    mlp = swiglu("base:model.layers.{l}.mlp.", "decoder/{l}/mlp/")
    return trunk(config) + expand(mlp, chosen(config, moe=False))
