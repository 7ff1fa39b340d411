"""The multimodal model: encoders and connectors make soft tokens, the decoder reads the stream.

Parameters: `{vision,speech,audio}/{encoder,connector}`, `embed`, `decoder`, `lm_head`. Only the
pools that a batch holds are encoded: an encoder that is not needed is not in the compiled program.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from unimoe_jax.config import AudioConfig, ModelConfig, SpeechConfig, VisionConfig
from unimoe_jax.connectors.mlp import MlpConnector
from unimoe_jax.connectors.query import QueryConnector
from unimoe_jax.data.batch import Batch
from unimoe_jax.encoders.beats import BeatsEncoder
from unimoe_jax.encoders.clip import ClipEncoder
from unimoe_jax.encoders.whisper import WhisperEncoder
from unimoe_jax.models.decoder import Decoder, DecoderOutput, causal_mask
from unimoe_jax.models.token_stream import token_stream
from unimoe_jax.nn.linear import LayerOptions, Linear, declare
from unimoe_jax.nn.moe import MoEAux
from unimoe_jax.sharding import shard


class Vision(nn.Module):
    """Images and videos -> soft tokens [G, I·P, D]; a video is the mean of its frames' tokens."""

    config: VisionConfig
    features: int
    options: LayerOptions

    @nn.compact
    def __call__(
        self, image_GIHWC: jax.Array | None, video_GIFHWC: jax.Array | None
    ) -> list[jax.Array]:
        pools, frames = [], self.config.frames
        if image_GIHWC is not None:
            pools.append(image_GIHWC)
        if video_GIFHWC is not None:
            pools.append(rearrange(video_GIFHWC, "g i f h w c -> g (i f) h w c"))
        # One call for both: the encoder is compiled once.
        pixels = jnp.concatenate(pools, axis=1)
        shards = pixels.shape[0]
        pixels = shard(rearrange(pixels, "g i h w c -> (g i) h w c"), "batch", None, None, None)
        features = ClipEncoder(self.config.encoder, self.options, name="encoder")(pixels)
        connector = MlpConnector(
            self.config.connector.depth, self.features, self.options, name="connector"
        )
        soft = rearrange(connector(features), "(g i) p d -> g i p d", g=shards)
        tables = []
        if image_GIHWC is not None:
            images, soft = jnp.split(soft, [image_GIHWC.shape[1]], axis=1)
            tables.append(rearrange(images, "g i p d -> g (i p) d"))
        if video_GIFHWC is not None:
            mean = reduce(
                soft.astype(jnp.float32), "g (i f) p d -> g i p d", "mean", f=frames
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


class Embedding(nn.Module):
    """The table [V,D] in the compute dtype."""

    vocab_size: int
    width: int
    options: LayerOptions

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(0.02)
        axes = ("vocab", "embed")
        table = declare(self, "embedding", init, (self.vocab_size, self.width), axes)
        return table.astype(self.options.dtype)


class Output(NamedTuple):
    """logits_BTV float32; aux of the MoE layers or None; the stream that the decoder read;
    hidden_BTD after the final norm; `layers` as in DecoderOutput."""

    logits_BTV: jax.Array
    aux: MoEAux | None
    stream_BTD: jax.Array
    decoder: DecoderOutput


class UniMoE(nn.Module):
    """`model.apply({"params": params}, batch)` -> Output. See ModelConfig."""

    config: ModelConfig
    options: LayerOptions
    keep: frozenset[str] = frozenset()

    @nn.compact
    def __call__(self, batch: Batch) -> Output:
        config, options = self.config, self.options
        width = config.decoder.hidden_size
        embedding_VD = Embedding(config.decoder.vocab_size, width, options, name="embed")()
        text_BTD = embedding_VD[batch.token_id_BT]
        stream = token_stream(text_BTD, self.soft_tokens(batch), batch.slot_BT)
        stream = shard(stream, "batch", "tokens", None)
        decoded = Decoder(config.decoder, options, self.keep, name="decoder")(
            stream,
            batch.position_BT,
            causal_mask(batch.segment_BT, batch.position_BT),
            batch.modality_BT,
            batch.segment_BT > 0,
        )
        if config.decoder.tie_embeddings:
            logits = jnp.einsum("btd,vd->btv", decoded.hidden_BTD, embedding_VD)
        else:
            head = Linear(
                config.decoder.vocab_size, options, axes=("embed", "vocab"), name="lm_head"
            )
            logits = head(decoded.hidden_BTD)
        return Output(logits.astype(jnp.float32), decoded.aux, stream, decoded)

    def soft_tokens(self, batch: Batch) -> jax.Array | None:
        """The soft-token table [G,S,D] of each shard: image, video, speech, audio; or None."""
        config, width, options = self.config, self.config.decoder.hidden_size, self.options
        tables: list[jax.Array] = []
        if batch.image_GIHWC is not None or batch.video_GIFHWC is not None:
            vision = Vision(config.vision, width, options, name="vision")
            tables += vision(batch.image_GIHWC, batch.video_GIFHWC)
        if batch.speech_GJMF is not None:
            speech = Speech(config.speech, width, options, name="speech")
            tables.append(speech(batch.speech_GJMF))
        if batch.audio_GJFM is not None:
            audio = Audio(config.audio, width, options, name="audio")
            tables.append(audio(batch.audio_GJFM, batch.audio_length_GJ))
        return jnp.concatenate(tables, axis=1) if tables else None
