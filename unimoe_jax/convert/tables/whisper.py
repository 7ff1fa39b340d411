"""Whisper of transformers: its encoder, and its text decoder as a reader of learned queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimoe_jax.config import QueryConnectorConfig, WhisperConfig
from unimoe_jax.convert.entry import Copy, Entry, Excuse, expand, flat_stack, linear, norm
from unimoe_jax.convert.reader import require

EXCUSES = (
    Excuse(
        r"whisper:((model\.)?decoder\..*|proj_out\.weight)",
        "Whisper's own text decoder; the connector brings its own",
    ),
)


def whisper_config(config: Mapping[str, Any]) -> WhisperConfig:
    """From a `config.json` of WhisperModel.

    `scale_embedding` is not read: transformers' Whisper computes the scale and never applies it.

    Raises:
        ConvertError: an activation that this encoder does not have.
    """
    require("Whisper's config.json", config, activation_function="gelu")
    return WhisperConfig(
        hidden_size=config["d_model"],
        mlp_dim=config["encoder_ffn_dim"],
        num_layers=config["encoder_layers"],
        num_heads=config["encoder_attention_heads"],
        mel_bins=config.get("num_mel_bins", 80),
        max_positions=config.get("max_source_positions", 1500),
    )


def reader_config(
    config: Mapping[str, Any], num_queries: int, projector_depth: int
) -> QueryConnectorConfig:
    """The connector that is this Whisper's decoder."""
    return QueryConnectorConfig(
        kind="whisper_decoder",
        num_queries=num_queries,
        hidden_size=config["d_model"],
        mlp_dim=config["decoder_ffn_dim"],
        num_layers=config["decoder_layers"],
        num_heads=config["decoder_attention_heads"],
        max_positions=config.get("max_target_positions", 448),
        projector_depth=projector_depth,
    )


def attention(src: str, dst: str) -> tuple[Entry, ...]:
    """Whisper's attention: keys have no bias."""
    return (
        *linear(f"{src}.q_proj", f"{dst}/q_proj"),
        *linear(f"{src}.k_proj", f"{dst}/k_proj", bias=False),
        *linear(f"{src}.v_proj", f"{dst}/v_proj"),
        *linear(f"{src}.out_proj", f"{dst}/o_proj"),
    )


def block(s: str, d: str) -> tuple[Entry, ...]:
    """What encoder and decoder layers share."""
    return (
        *norm(f"{s}self_attn_layer_norm", f"{d}attention_norm"),
        *attention(f"{s}self_attn", f"{d}attention"),
        *norm(f"{s}final_layer_norm", f"{d}mlp_norm"),
        *linear(f"{s}fc1", f"{d}mlp/fc1"),
        *linear(f"{s}fc2", f"{d}mlp/fc2"),
    )


def encoder_copies(config: WhisperConfig, dst: str, prefix: str = "model.encoder.") -> list[Copy]:
    """The encoder, from group `whisper`."""
    src = f"whisper:{prefix}"
    top = [Entry(f"{src}embed_positions.weight", f"{dst}/position_embedding")]
    for name, inputs in (("conv1", config.mel_bins), ("conv2", config.hidden_size)):
        pattern = Entry(
            f"{src}{name}.weight", f"{dst}/{name}/kernel", "o i k -> (k i) o", (("i", inputs),)
        )
        top += [pattern, Entry(f"{src}{name}.bias", f"{dst}/{name}/bias")]
    top += norm(f"{src}layer_norm", f"{dst}/final_norm")
    layers = block(f"{src}layers.{{l}}.", f"{dst}/{{l}}/")
    return expand(top) + expand(layers, flat_stack(config.num_layers))


def reader_copies(config: QueryConnectorConfig, src: str, dst: str) -> list[Copy]:
    """The decoder as a connector's reader; `src` includes its group, queries are not among it."""
    top = (
        Entry(f"{src}embed_positions.weight", f"{dst}/position_embedding"),
        *norm(f"{src}layer_norm", f"{dst}/final_norm"),
    )
    s, d = f"{src}layers.{{l}}.", f"{dst}/{{l}}/"
    layers = (
        *block(s, d),
        *norm(f"{s}encoder_attn_layer_norm", f"{d}cross_attention_norm"),
        *attention(f"{s}encoder_attn", f"{d}cross_attention"),
    )
    return expand(top) + expand(layers, flat_stack(config.num_layers))


def to_json(config: WhisperConfig, reader: QueryConnectorConfig) -> dict[str, Any]:
    """A `config.json` of WhisperModel; `reader` gives the decoder's sizes."""
    return {
        "architectures": ["WhisperModel"],
        "model_type": "whisper",
        "d_model": config.hidden_size,
        "encoder_ffn_dim": config.mlp_dim,
        "encoder_layers": config.num_layers,
        "encoder_attention_heads": config.num_heads,
        "num_mel_bins": config.mel_bins,
        "max_source_positions": config.max_positions,
        "decoder_ffn_dim": reader.mlp_dim,
        "decoder_layers": reader.num_layers,
        "decoder_attention_heads": reader.num_heads,
        "max_target_positions": reader.max_positions,
    }
