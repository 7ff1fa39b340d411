"""The vision, speech and audio branches: a pool of media to soft tokens."""

from __future__ import annotations

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


class Pictures(NamedTuple):
    """The pools of a vision encoder, G shards: images, videos, and which entries are in use.

    image_GIHWC, video_GIFHWC: float or None. used_GI, used_GV: bool, entries that tokens refer to.
    """

    image_GIHWC: jax.Array | None
    video_GIFHWC: jax.Array | None
    used_GI: jax.Array | None = None
    used_GV: jax.Array | None = None


class Vision(nn.Module):
    """Images and videos -> soft tokens [G, I·P, D]; a video is the mean of its frames' tokens.

    Returns ([images' table, videos' table], router statistics of "encoder" and "connector", as far
    as they carry experts).
    """

    config: VisionConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, pictures: Pictures) -> tuple[list[jax.Array], dict[str, MoEAux]]:
        # One call for both: the encoder is compiled once.
        pixels_GIHWC, rows = self.joined(pictures)
        shards = pixels_GIHWC.shape[0]
        pixels = shard(rearrange(pixels_GIHWC, "g i h w c -> (g i) h w c"), "batch", *[None] * 3)
        features, encoder_aux = self.encode(pixels.astype(self.options.dtype), rows)
        config, options = self.config.connector, self.options
        if config.moe is None:
            connector = MlpConnector(config.depth, self.features, options, name="connector")
            soft, connector_aux = connector(features), None
        else:
            connector = MoEConnector(config, self.features, options, name="connector")
            soft, connector_aux = connector(features, rows)
        aux = {"encoder": encoder_aux, "connector": connector_aux}
        tables = self.tables(rearrange(soft, "(g i) p d -> g i p d", g=shards), pictures)
        return tables, {name: found for name, found in aux.items() if found is not None}

    def joined(self, pictures: Pictures) -> tuple[jax.Array, ImageRows]:
        """All pictures of each shard, videos as frames, and what the routers' statistics need."""
        frames, pools, used, kinds = self.config.frames, [], [], []
        if pictures.image_GIHWC is not None:
            pools.append(pictures.image_GIHWC)
            used.append(pictures.used_GI)
            kinds.append(MODALITY["image"])
        if pictures.video_GIFHWC is not None:
            pools.append(rearrange(pictures.video_GIFHWC, "g i f h w c -> g (i f) h w c"))
            known = pictures.used_GV is not None
            used.append(jnp.repeat(pictures.used_GV, frames, axis=1) if known else None)
            kinds.append(MODALITY["video"])
        modality, weight = [], []
        for pool, mask, kind in zip(pools, used, kinds, strict=True):
            modality.append(jnp.full(pool.shape[:2], kind, jnp.int32))
            counted = mask is None or self.config.unused_images == "count"
            weight.append(jnp.ones(pool.shape[:2]) if counted else mask.astype(jnp.float32))
        flat = [jnp.concatenate(parts, axis=1).reshape(-1) for parts in (modality, weight)]
        return jnp.concatenate(pools, axis=1), ImageRows(*flat)

    def encode(self, pixels_BHWC: jax.Array, rows: ImageRows) -> tuple[jax.Array, MoEAux | None]:
        """[B,P,D·scales], and the encoder's statistics, in which all scales count the same."""
        config = self.config.encoder
        encoder = ClipEncoder(config, self.options, name="encoder")
        steps = self.config.scales
        if steps == (1,):
            return encoder(pixels_BHWC, rows)
        count = scales.num_views(steps)
        views = scales.views(pixels_BHWC, steps)
        weight = rows.weight_B[:, None] * scales.view_weights(steps)[None]
        views = shard(rearrange(views, "b s h w c -> (b s) h w c"), "batch", *[None] * 3)
        view_rows = ImageRows(jnp.repeat(rows.modality_B, count), weight.reshape(-1))
        features, aux = encoder(views, view_rows)
        features = rearrange(features, "(b s) p d -> b s p d", s=count)
        return scales.merge(features, steps, config.image_size // config.patch_size), aux

    def tables(self, soft: jax.Array, pictures: Pictures) -> list[jax.Array]:
        """Soft tokens [G,I,P,D] of images and frames -> one table for each kind there is."""
        tables = []
        if pictures.image_GIHWC is not None:
            images, soft = jnp.split(soft, [pictures.image_GIHWC.shape[1]], axis=1)
            tables.append(rearrange(images, "g i p d -> g (i p) d"))
        if pictures.video_GIFHWC is not None:
            mean = reduce(
                soft.astype(jnp.float32),
                "g (i f) p d -> g i p d",
                "mean",
                f=self.config.frames,
            ).astype(soft.dtype)
            tables.append(rearrange(mean, "g i p d -> g (i p) d"))
        return tables


class Speech(nn.Module):
    """Log-mel chunks [G,J,M,F] -> soft tokens [G, J·Q, D]."""

    config: SpeechConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, speech_GJMF: jax.Array) -> jax.Array:
        shards = speech_GJMF.shape[0]
        mel = shard(rearrange(speech_GJMF, "g j m f -> (g j) m f"), "batch", None, None)
        states = WhisperEncoder(self.config.encoder, self.options, name="encoder")(mel)
        connector = QueryConnector(
            self.config.connector, self.features, self.options, name="connector"
        )
        return rearrange(connector(states), "(g j) q d -> g (j q) d", g=shards)


class Audio(nn.Module):
    """Fbank chunks [G,J,F,M] with their valid samples [G,J] -> soft tokens [G, J·Q, D]."""

    config: AudioConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(self, audio_GJFM: jax.Array, length_GJ: jax.Array) -> jax.Array:
        shards = audio_GJFM.shape[0]
        fbank = shard(rearrange(audio_GJFM, "g j f m -> (g j) f m"), "batch", None, None)
        encoder = BeatsEncoder(self.config.encoder, self.options, name="encoder")
        states = encoder(fbank, length_GJ.reshape(-1), self.config.num_samples)
        connector = QueryConnector(
            self.config.connector, self.features, self.options, name="connector"
        )
        return rearrange(connector(states), "(g j) q d -> g (j q) d", g=shards)
