"""The BEATs checkpoint (`{"cfg": …, "model": …}`), and BLIP-2's Q-Former as its connector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimoe_jax.config import BeatsConfig, QueryConnectorConfig
from unimoe_jax.connectors.query import cross_layers, qformer_places
from unimoe_jax.convert.entry import Copy, Entry, Excuse, expand, flat_stack, linear, norm
from unimoe_jax.convert.reader import ConvertError, require

EXCUSES = (
    Excuse(
        r"beats:encoder\.layers\.[1-9]\d*\.self_attn\.relative_attention_bias\.weight",
        "layer 0 owns the position bias; the other layers repeat it",
    ),
    Excuse(r"beats:predictor\..*", "the classification head of a fine-tuned BEATs"),
)
MEL_BINS = 128  # a constant of the original's front end; the checkpoint does not contain it
# Key of `cfg` -> (default of the original, the only value that this encoder implements).
SWITCHES: dict[str, tuple[Any, Any]] = {
    "deep_norm": (False, True),
    "layer_norm_first": (False, False),
    "relative_position_embedding": (False, True),
    "gru_rel_pos": (False, True),
    "conv_bias": (False, False),
    "activation_fn": ("gelu", "gelu"),
}


def beats_config(cfg: Mapping[str, Any]) -> BeatsConfig:
    """Settings of the encoder, from the `cfg` of a BEATs checkpoint.

    Raises:
        ConvertError: the checkpoint has an option that this encoder does not implement.
    """
    for key, (default, supported) in SWITCHES.items():
        if (value := cfg.get(key, default)) != supported:
            raise ConvertError(
                f"BEATs with {key}={value} is not supported; {key} must be {supported}"
            )
    return BeatsConfig(
        hidden_size=cfg["encoder_embed_dim"],
        embed_size=cfg["embed_dim"],
        mlp_dim=cfg["encoder_ffn_embed_dim"],
        num_layers=cfg["encoder_layers"],
        num_heads=cfg["encoder_attention_heads"],
        patch_size=cfg["input_patch_size"],
        mel_bins=MEL_BINS,
        conv_kernel=cfg["conv_pos"],
        conv_groups=cfg["conv_pos_groups"],
        num_buckets=cfg["num_buckets"],
        max_distance=cfg["max_distance"],
    )


def encoder_copies(config: BeatsConfig, dst: str) -> list[Copy]:
    """Copies of the encoder, from group `beats`; `dst` is its path."""
    # Patches, the convolution over positions (weight-normalised: g and v), the position bias.
    patch = (("p", config.patch_size), ("q", config.patch_size))
    pos = "beats:encoder.pos_conv.0."
    top = (
        Entry(
            "beats:patch_embedding.weight",
            f"{dst}/patch_embedding/kernel",
            "e 1 p q -> (p q) e",
            patch,
        ),
        *norm("beats:layer_norm", f"{dst}/patch_norm"),
        *(linear("beats:post_extract_proj", f"{dst}/embed_proj") if config.projects else ()),
        Entry(f"{pos}weight_v", f"{dst}/conv_position/weight_v", "o i k -> k i o"),
        Entry(f"{pos}weight_g", f"{dst}/conv_position/weight_g", "1 1 k -> k"),
        Entry(f"{pos}bias", f"{dst}/conv_position/bias"),
        *norm("beats:encoder.layer_norm", f"{dst}/embed_norm"),
        Entry(
            "beats:encoder.layers.0.self_attn.relative_attention_bias.weight",
            f"{dst}/relative_attention_bias",
        ),
    )
    # One layer, with the gates of its relative positions (grep_linear, grep_a).
    s, d = "beats:encoder.layers.{l}.", f"{dst}/{{l}}/"
    layers = (
        *norm(f"{s}self_attn_layer_norm", f"{d}attention_norm"),
        *linear(f"{s}self_attn.q_proj", f"{d}attention/q_proj"),
        *linear(f"{s}self_attn.k_proj", f"{d}attention/k_proj"),
        *linear(f"{s}self_attn.v_proj", f"{d}attention/v_proj"),
        *linear(f"{s}self_attn.out_proj", f"{d}attention/o_proj"),
        *linear(f"{s}self_attn.grep_linear", f"{d}attention/grep_linear"),
        Entry(f"{s}self_attn.grep_a", f"{d}attention/grep_a", "1 n 1 1 -> n"),
        *norm(f"{s}final_layer_norm", f"{d}mlp_norm"),
        *linear(f"{s}fc1", f"{d}mlp/fc1"),
        *linear(f"{s}fc2", f"{d}mlp/fc2"),
    )
    return expand(top) + expand(layers, flat_stack(config.num_layers))


def qformer_config(
    config: Mapping[str, Any], num_queries: int, projector_depth: int
) -> QueryConnectorConfig:
    """Settings of the connector, from the options of BLIP-2's Q-Former.

    Missing options get BLIP-2's defaults, as in the originals.

    Raises:
        ConvertError: an activation that this connector does not have.
    """
    require("config.json: qformer_config", config, hidden_act="gelu")
    return QueryConnectorConfig(
        kind="qformer",
        num_queries=num_queries,
        hidden_size=config.get("hidden_size", 768),
        mlp_dim=config.get("intermediate_size", 3072),
        num_layers=config.get("num_hidden_layers", 12),
        num_heads=config.get("num_attention_heads", 12),
        norm_eps=config.get("layer_norm_eps", 1e-12),
        cross_attention_every=config.get("cross_attention_frequency", 2),
        projector_depth=projector_depth,
    )


def _bert_attention(src: str, dst: str) -> tuple[Entry, ...]:
    """Entries of one attention block with BERT's names, and of the norm behind it."""
    names = (("query", "q"), ("key", "k"), ("value", "v"))
    projections = [linear(f"{src}.attention.{s}", f"{dst}/{d}_proj") for s, d in names]
    return (
        *(entry for projection in projections for entry in projection),
        *linear(f"{src}.output.dense", f"{dst}/o_proj"),
        *norm(f"{src}.output.LayerNorm", f"{dst}_norm"),
    )


def qformer_copies(config: QueryConnectorConfig, src: str, dst: str) -> list[Copy]:
    """Copies of the Q-Former as a connector, without its queries.

    Args:
        src: group and prefix of every source name.
        dst: path of the connector.
    """
    s, d = f"{src}encoder.layer.{{l}}.", f"{dst}/{{l}}/"
    # Queries use the `…_query` branch of the feed-forward layer; the other branch is for text.
    layers = (
        *_bert_attention(f"{s}attention", f"{d}attention"),
        *linear(f"{s}intermediate_query.dense", f"{d}mlp/fc1"),
        *linear(f"{s}output_query.dense", f"{d}mlp/fc2"),
        *norm(f"{s}output_query.LayerNorm", f"{d}mlp_norm"),
    )
    places = dict(enumerate(qformer_places(config)))
    # Only some layers attend to the encoder.
    crossing = {layer: places[layer] for layer, yes in enumerate(cross_layers(config)) if yes}
    return (
        expand(norm(f"{src}layernorm", f"{dst}/query_norm"))
        + expand(layers, places)
        + expand(_bert_attention(f"{s}crossattention", f"{d}cross_attention"), crossing)
    )


def to_cfg(config: BeatsConfig) -> dict[str, Any]:
    """The `cfg` of a BEATs checkpoint, for an export."""
    return {
        "encoder_embed_dim": config.hidden_size,
        "embed_dim": config.embed_size,
        "encoder_ffn_embed_dim": config.mlp_dim,
        "encoder_layers": config.num_layers,
        "encoder_attention_heads": config.num_heads,
        "input_patch_size": config.patch_size,
        "conv_pos": config.conv_kernel,
        "conv_pos_groups": config.conv_groups,
        "conv_bias": False,
        "num_buckets": config.num_buckets,
        "max_distance": config.max_distance,
        "activation_fn": "gelu",
        "relative_position_embedding": True,
        "gru_rel_pos": True,
        "deep_norm": True,
        "layer_norm_first": False,
        # An export has no classification head.
        "finetuned_model": False,
    }


def to_qformer_json(config: QueryConnectorConfig) -> dict[str, Any]:
    """The options of BLIP-2's Q-Former, for an export; `qformer_config` reads them back."""
    return {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "layer_norm_eps": config.norm_eps,
        "cross_attention_frequency": config.cross_attention_every,
    }
