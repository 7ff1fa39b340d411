"""The smallest models with all kinds of modules, random parameters, and batches for them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from unimoe_jax.config import DecoderConfig, ModelConfig, MoEConfig
from unimoe_jax.data.batch import Batch, batch_spec
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params.paths import Flat, flatten

WIDTH, VOCAB = 8, 16
MOE = MoEConfig(num_experts=4, top_k=2, layers="even")
SOFT_TOKENS = {"image": 4, "video": 4, "speech": 2, "audio": 2}


def decoder_config(**changes) -> DecoderConfig:
    """A decoder with three layers, two heads that share one key head, experts in layers 0 and 2."""
    fields = dict(vocab_size=VOCAB, hidden_size=WIDTH, mlp_dim=12, num_layers=3)
    fields |= dict(num_heads=2, num_kv_heads=1, remat=False, moe=MOE)
    return DecoderConfig(**{**fields, **changes})


def model_config(media: bool = False, **changes) -> ModelConfig:
    """A text model; with `media`, it has every encoder and connector in miniature."""
    fields: dict = {"decoder": decoder_config(), **changes}
    sizes = dict(hidden_size=8, mlp_dim=8, num_heads=2)
    if media:
        clip = dict(num_layers=2, image_size=8, patch_size=4, **sizes)
        reader = dict(kind="whisper_decoder", num_queries=2, num_layers=1, max_positions=4, **sizes)
        former = dict(kind="qformer", num_queries=2, num_layers=2, **sizes)
        whisper = dict(num_layers=1, mel_bins=4, max_positions=50, **sizes)
        beats = dict(num_layers=1, embed_size=6, mel_bins=16, conv_kernel=4, conv_groups=2, **sizes)
        fields["vision"] = {"encoder": clip, "frames": 2}
        fields["speech"] = {"encoder": whisper, "connector": reader, "chunk_seconds": 1}
        fields["audio"] = {"encoder": beats, "connector": former, "chunk_seconds": 1}
    return ModelConfig(**fields)


def make_batch(
    config: ModelConfig, rows: int, length: int, shards: int, media: bool = False, seed: int = 0
) -> Batch:
    """A random batch: two segments and two positions of padding per row.

    With `media`, every pool holds one entry per shard, and the first row of a shard begins with the
    soft tokens of all entries.
    """
    rng = np.random.default_rng(seed)
    capacity = dict.fromkeys(config.tokens_per_medium(), 1) if media else {}
    spec = batch_spec(config, rows, length, shards, capacity)
    arrays = {
        name: rng.standard_normal(field.shape).astype(field.dtype)
        for name, field in spec._asdict().items()
        if field is not None
    }
    # The second segment has the three positions from `start` to `end`.
    start, end = length - 5, length - 2
    index = np.arange(length)
    text = {
        "token_id_BT": rng.integers(0, VOCAB, (rows, length)),
        "target_BT": rng.integers(0, VOCAB, (rows, length)),
        "segment_BT": np.tile(np.where(index < start, 1, np.where(index < end, 2, 0)), (rows, 1)),
        "position_BT": np.tile(np.where(index < start, index, index - start), (rows, 1)),
        "slot_BT": np.full((rows, length), -1),
    }
    modality = np.where(text["segment_BT"] > 0, 0, -1)
    if media:
        kinds = np.repeat([1, 2, 3, 4], list(SOFT_TOKENS.values()))
        text["slot_BT"][:: rows // shards, : len(kinds)] = np.arange(len(kinds))
        modality[:: rows // shards, : len(kinds)] = kinds
        full_chunk = config.audio.num_samples
        arrays["audio_length_GJ"] = np.full((shards, 1), full_chunk, np.int32)
    text["modality_BT"] = modality
    # Rows have different numbers of targets, as in real batches.
    counted = (text["segment_BT"] > 0) & (rng.random((rows, length)) < rng.random((rows, 1)))
    arrays |= {name: value.astype(np.int32) for name, value in text.items()}
    arrays["weight_BT"] = (counted & (text["slot_BT"] < 0)).astype(np.float32)
    return Batch(**arrays)


def random_params(model: nn.Module, *args, scale: float = 0.4) -> Flat:
    """{path: random values}; adapters and biases are not zero, so all parameters have an effect."""
    keys = {name: jax.random.key(0) for name in ("params", "dropout", "router")}
    shapes = flatten(nn.unbox(jax.eval_shape(model.init, keys, *args))["params"])
    rng = np.random.default_rng(0)
    return {
        path: jnp.asarray(scale * rng.standard_normal(leaf.shape, np.float32))
        for path, leaf in sorted(shapes.items())
    }


def build(config: ModelConfig, batch: Batch, **options) -> tuple[UniMoE, Flat]:
    """The model of these settings, and random parameters for the pools of `batch`."""
    model = UniMoE(config, LayerOptions(lora=config.lora, **options))
    return model, random_params(model, batch)
