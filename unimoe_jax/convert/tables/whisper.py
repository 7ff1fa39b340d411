"""Whisper of transformers: its encoder, and its text decoder as a connector.

The connector feeds learned queries to the text decoder in place of word embeddings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimoe_jax.config import QueryConnectorConfig, WhisperConfig
from unimoe_jax.convert.entry import Copy, Entry, Excuse, expand, flat_stack, linear, norm
from unimoe_jax.convert.reader import require

# A Whisper folder holds a whole model; the encoder needs only a part of it.
EXCUSES = (
    Excuse(
        r"whisper:((model\.)?decoder\..*|proj_out\.weight)",
        "Whisper's own text decoder; the connector brings its own",
    ),
)


def whisper_config(config: Mapping[str, Any]) -> WhisperConfig:
    """Settings of the encoder, from a `config.json` of WhisperModel.

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
        # The last two keys have the defaults of transformers.
        mel_bins=config.get("num_mel_bins", 80),
        max_positions=config.get("max_source_positions", 1500),
    )


def reader_config(
    config: Mapping[str, Any], num_queries: int, projector_depth: int
) -> QueryConnectorConfig:
    """Settings of the connector, from the decoder's sizes in a `config.json` of WhisperModel."""
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
    """Entries of one attention block. Whisper's projection of keys has no bias."""
    return (
        *linear(f"{src}.q_proj", f"{dst}/q_proj"),
        *linear(f"{src}.k_proj", f"{dst}/k_proj", bias=False),
        *linear(f"{src}.v_proj", f"{dst}/v_proj"),
        *linear(f"{src}.out_proj", f"{dst}/o_proj"),
    )


def block(s: str, d: str) -> tuple[Entry, ...]:
    """Entries that encoder and decoder layers share; `s` and `d` are prefixes of a layer."""
    return (
        *norm(f"{s}self_attn_layer_norm", f"{d}attention_norm"),
        *attention(f"{s}self_attn", f"{d}attention"),
        *norm(f"{s}final_layer_norm", f"{d}mlp_norm"),
        *linear(f"{s}fc1", f"{d}mlp/fc1"),
        *linear(f"{s}fc2", f"{d}mlp/fc2"),
    )


def encoder_copies(config: WhisperConfig, dst: str, prefix: str = "model.encoder.") -> list[Copy]:
    """Copies of the encoder, from group `whisper`; `dst` is its path."""
    src = f"whisper:{prefix}"
    # Before and after the layers: positions, two convolutions over time, the final norm.
    top = [Entry(f"{src}embed_positions.weight", f"{dst}/position_embedding")]
    for name, inputs in (("conv1", config.mel_bins), ("conv2", config.hidden_size)):
        # A convolution becomes a matrix that multiplies flattened windows of k frames.
        kernel = Entry(
            f"{src}{name}.weight", f"{dst}/{name}/kernel", "o i k -> (k i) o", (("i", inputs),)
        )
        top += [kernel, Entry(f"{src}{name}.bias", f"{dst}/{name}/bias")]
    top += norm(f"{src}layer_norm", f"{dst}/final_norm")
    layers = block(f"{src}layers.{{l}}.", f"{dst}/{{l}}/")
    return expand(top) + expand(layers, flat_stack(config.num_layers))


def reader_copies(config: QueryConnectorConfig, src: str, dst: str) -> list[Copy]:
    """Copies of the text decoder as a connector, without its queries.

    Args:
        src: group and prefix of every source name.
        dst: path of the connector.
    """
    top = (
        Entry(f"{src}embed_positions.weight", f"{dst}/position_embedding"),
        *norm(f"{src}layer_norm", f"{dst}/final_norm"),
    )
    # A decoder layer is an encoder layer with a second attention, which reads the encoder.
    s, d = f"{src}layers.{{l}}.", f"{dst}/{{l}}/"
    layers = (
        *block(s, d),
        *norm(f"{s}encoder_attn_layer_norm", f"{d}cross_attention_norm"),
        *attention(f"{s}encoder_attn", f"{d}cross_attention"),
    )
    return expand(top) + expand(layers, flat_stack(config.num_layers))


def to_json(config: WhisperConfig, reader: QueryConnectorConfig) -> dict[str, Any]:
    """The `config.json` of a WhisperModel, for an export; `reader` gives the decoder's sizes."""
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
