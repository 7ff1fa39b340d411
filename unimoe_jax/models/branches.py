"""The vision, speech and audio branches: a pool of media -> soft tokens for the decoder."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from unimoe_jax.config import AudioConfig, SpeechConfig, VisionConfig
from unimoe_jax.config.media import MODALITY
from unimoe_jax.connectors.mlp import MlpConnector, MoEConnector
from unimoe_jax.connectors.query import QueryConnector
from unimoe_jax.encoders import scales
from unimoe_jax.encoders.beats import BeatsEncoder
from unimoe_jax.encoders.clip import ClipEncoder
from unimoe_jax.encoders.whisper import WhisperEncoder
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.nn.moe.layer import ImageRows, MoEAux
from unimoe_jax.parallel.sharding import shard

# ------------------------------------------------------------------------------------- vision


class Pictures(NamedTuple):
    """The pools of a vision encoder on G data shards.

    image_GIHWC, video_GIFHWC: float pixels of images and videos, or None.
    used_GI, used_GV: bool, True for entries that tokens of the batch refer to; None: all of them.
    """

    image_GIHWC: jax.Array | None
    video_GIFHWC: jax.Array | None
    used_GI: jax.Array | None = None
    used_GV: jax.Array | None = None


class Vision(nn.Module):
    """Map images and videos to soft tokens [G, I·P, D]; a video is the mean of its frames' tokens.

    Returns a list of the images' and the videos' tokens, and the router statistics of "encoder" and
    "connector" if these have experts.
    """

    config: VisionConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, pictures: Pictures) -> tuple[list[jax.Array], dict[str, MoEAux]]:
        # Encode images and videos in one call, so that the encoder is compiled once.
        pixels_GIHWC, rows = self.joined(pictures)
        shards = pixels_GIHWC.shape[0]
        pixels = rearrange(pixels_GIHWC, "g i h w c -> (g i) h w c")
        pixels = shard(pixels, "batch", None, None, None)
        features, encoder_aux = self.encode(pixels.astype(self.options.dtype), rows)

        config, options = self.config.connector, self.options
        if config.moe is None:
            connector = MlpConnector(config.depth, self.features, options, name="connector")
            soft, connector_aux = connector(features), None
        else:
            connector = MoEConnector(config, self.features, options, name="connector")
            soft, connector_aux = connector(features, rows)

        tables = self.tables(rearrange(soft, "(g i) p d -> g i p d", g=shards), pictures)
        aux = {"encoder": encoder_aux, "connector": connector_aux}
        return tables, {name: value for name, value in aux.items() if value is not None}

    def joined(self, pictures: Pictures) -> tuple[jax.Array, ImageRows]:
        """Join images and videos' frames: (pixels [G,I,H,W,C], rows for the router statistics)."""
        pools, modalities, weights = [], [], []

        def add(pool_GIHWC: jax.Array, used_GI: jax.Array | None, modality: int) -> None:
            pools.append(pool_GIHWC)
            shape = pool_GIHWC.shape[:2]
            modalities.append(jnp.full(shape, modality, jnp.int32))
            # An entry that no token refers to has weight 0, unless the settings count all entries.
            if used_GI is None or self.config.unused_images == "count":
                weights.append(jnp.ones(shape))
            else:
                weights.append(used_GI.astype(jnp.float32))

        if pictures.image_GIHWC is not None:
            add(pictures.image_GIHWC, pictures.used_GI, MODALITY["image"])
        if pictures.video_GIFHWC is not None:
            # Every frame is a picture, and it is used if its video is.
            frames_GIHWC = rearrange(pictures.video_GIFHWC, "g i f h w c -> g (i f) h w c")
            used_GI = pictures.used_GV
            if used_GI is not None:
                used_GI = jnp.repeat(used_GI, self.config.frames, axis=1)
            add(frames_GIHWC, used_GI, MODALITY["video"])
        rows = ImageRows(
            modality_B=jnp.concatenate(modalities, axis=1).reshape(-1),
            weight_B=jnp.concatenate(weights, axis=1).reshape(-1),
        )
        return jnp.concatenate(pools, axis=1), rows

    def encode(self, pixels_BHWC: jax.Array, rows: ImageRows) -> tuple[jax.Array, MoEAux | None]:
        """Encode pictures at all scales: ([B,P,D·scales], router statistics or None).

        In the statistics all scales count the same, however many tiles they have.
        """
        config = self.config.encoder
        encoder = ClipEncoder(config, self.options, name="encoder")
        steps = self.config.scales
        if steps == (1,):
            return encoder(pixels_BHWC, rows)
        # Every tile of every scale is one input of the encoder, with its share of the weight.
        count = scales.num_views(steps)
        views = scales.views(pixels_BHWC, steps)
        weight = rows.weight_B[:, None] * scales.view_weights(steps)[None]
        views = rearrange(views, "b s h w c -> (b s) h w c")
        views = shard(views, "batch", None, None, None)
        view_rows = ImageRows(jnp.repeat(rows.modality_B, count), weight.reshape(-1))
        features, aux = encoder(views, view_rows)
        features = rearrange(features, "(b s) p d -> b s p d", s=count)
        return scales.merge(features, steps, config.image_size // config.patch_size), aux

    def tables(self, soft_GIPD: jax.Array, pictures: Pictures) -> list[jax.Array]:
        """Split soft tokens [G,I,P,D] of images and frames into one table [G, I·P, D] per kind."""
        tables = []
        if pictures.image_GIHWC is not None:
            images = pictures.image_GIHWC.shape[1]
            image_GIPD, soft_GIPD = jnp.split(soft_GIPD, [images], axis=1)
            tables.append(rearrange(image_GIPD, "g i p d -> g (i p) d"))
        if pictures.video_GIFHWC is not None:
            # The mean over frames is taken in float32.
            mean_GIPD = reduce(
                soft_GIPD.astype(jnp.float32),
                "g (i f) p d -> g i p d",
                "mean",
                f=self.config.frames,
            ).astype(soft_GIPD.dtype)
            tables.append(rearrange(mean_GIPD, "g i p d -> g (i p) d"))
        return tables


# --------------------------------------------------------------------------- speech and audio


def encode_pool(pool_GJXY: jax.Array, encode: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Encode all chunks of a pool as one batch: [G,J,X,Y] -> soft tokens [G, J·Q, D].

    Example: 2 data shards with 3 chunks each, [2,3,80,3000]. `encode` receives [6,80,3000] and
    returns 50 tokens per chunk, [6,50,D]. The result is [2,150,D].
    """
    shards = pool_GJXY.shape[0]
    chunks = shard(rearrange(pool_GJXY, "g j x y -> (g j) x y"), "batch", None, None)
    return rearrange(encode(chunks), "(g j) q d -> g (j q) d", g=shards)


class Speech(nn.Module):
    """Map log-mel chunks [G,J,M,F] to soft tokens [G, J·Q, D]."""

    config: SpeechConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, speech_GJMF: jax.Array) -> jax.Array:
        config, options = self.config, self.options

        def encode(mel: jax.Array) -> jax.Array:
            states = WhisperEncoder(config.encoder, options, name="encoder")(mel)
            return QueryConnector(config.connector, self.features, options, name="connector")(
                states
            )

        return encode_pool(speech_GJMF, encode)


class Audio(nn.Module):
    """Map filter-bank chunks [G,J,F,M] to soft tokens [G, J·Q, D].

    length_GJ: int, the number of valid samples of each chunk.
    """

    config: AudioConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, audio_GJFM: jax.Array, length_GJ: jax.Array) -> jax.Array:
        config, options = self.config, self.options

        def encode(fbank: jax.Array) -> jax.Array:
            encoder = BeatsEncoder(config.encoder, options, name="encoder")
            states = encoder(fbank, length_GJ.reshape(-1), config.num_samples)
            return QueryConnector(config.connector, self.features, options, name="connector")(
                states
            )

        return encode_pool(audio_GJFM, encode)
