"""The multimodal model: encoders and connectors make soft tokens, the decoder reads the stream.

Parameters: `{vision,speech,audio}/{encoder,connector}`, `embed`, `decoder`, `lm_head`. Only the
pools that a batch holds are encoded: an encoder that is not needed is not in the compiled program.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange, reduce

from unimoe_jax.config import AudioConfig, ModelConfig, SpeechConfig, VisionConfig
from unimoe_jax.connectors.mlp import MlpConnector, MoEConnector
from unimoe_jax.connectors.query import QueryConnector
from unimoe_jax.data.batch import MODALITY, Batch
from unimoe_jax.encoders import scales
from unimoe_jax.encoders.beats import BeatsEncoder
from unimoe_jax.encoders.clip import ClipEncoder
from unimoe_jax.encoders.whisper import WhisperEncoder
from unimoe_jax.models.decoder import Decoder, DecoderOutput, causal_mask
from unimoe_jax.models.token_stream import token_stream
from unimoe_jax.nn.head import HeadWeights, TokenLoss, tied_head, token_loss
from unimoe_jax.nn.linear import LayerOptions, Linear, declare
from unimoe_jax.nn.moe import MoEAux, Rows
from unimoe_jax.sharding import shard


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

    def joined(self, pictures: Pictures) -> tuple[jax.Array, Rows]:
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
        return jnp.concatenate(pools, axis=1), Rows(*flat)

    def encode(self, pixels_BHWC: jax.Array, rows: Rows) -> tuple[jax.Array, MoEAux | None]:
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
        view_rows = Rows(jnp.repeat(rows.modality_B, count), weight.reshape(-1))
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


Wanted = Literal["logits", "loss", "exact"]


class Output(NamedTuple):
    """logits_BTV float32, or None; aux: router statistics of `encoder`, `connector` and `decoder`,
    as far as they carry experts and ran; the stream that the decoder read, what came of it, and the
    loss of the batch's targets, where that was wanted instead of logits."""

    logits_BTV: jax.Array | None
    aux: dict[str, MoEAux]
    stream_BTD: jax.Array
    decoder: DecoderOutput
    loss: TokenLoss | None


class UniMoE(nn.Module):
    """`model.apply({"params": params}, batch, want)` -> Output. See ModelConfig.

    want: "logits"; "loss" of the batch's targets, for which no logits of the whole batch are made;
    "exact", the same and which targets are the most likely tokens.
    """

    config: ModelConfig
    options: LayerOptions
    keep: frozenset[str] = frozenset()

    @property
    def layer_options(self) -> LayerOptions:
        return replace(self.options, attention=self.config.attention)

    @nn.compact
    def __call__(self, batch: Batch, want: Wanted = "logits") -> Output:
        config, options = self.config, self.layer_options
        width = config.decoder.hidden_size
        embedding_VD = Embedding(config.decoder.vocab_size, width, options, name="embed")()
        text_BTD = embedding_VD[batch.token_id_BT]
        soft_GSD, aux = self.encode(batch)
        stream = token_stream(text_BTD, soft_GSD, batch.slot_BT)
        stream = shard(stream, "batch", "tokens", None)
        decoded = Decoder(config.decoder, options, self.keep, name="decoder")(
            stream,
            batch.position_BT,
            causal_mask(batch.segment_BT, batch.position_BT),
            batch.modality_BT,
            batch.segment_BT > 0,
            None if want == "logits" else batch.weight_BT > 0,
            batch.segment_BT,
        )
        if decoded.aux is not None:
            aux["decoder"] = decoded.aux
        logits, loss = None, None
        if want == "logits":
            logits = self.logits(decoded.hidden_BTD, embedding_VD)
        else:
            loss = self.loss(decoded.hidden_BTD, embedding_VD, batch, exact=want == "exact")
        return Output(logits, aux, stream, decoded, loss)

    def logits(self, hidden_BTD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        """[B,T,V] float32."""
        decoder = self.config.decoder
        if decoder.tie_embeddings:
            logits = jnp.einsum("btd,vd->btv", hidden_BTD, embedding_VD)
        else:
            axes = ("embed", "vocab")
            head = Linear(decoder.vocab_size, self.options, axes=axes, name="lm_head")
            logits = head(hidden_BTD)
        return logits.astype(jnp.float32)

    def loss(
        self, hidden_BTD: jax.Array, embedding_VD: jax.Array, batch: Batch, *, exact: bool
    ) -> TokenLoss:
        """Of the batch's targets under the same head."""
        decoder, options = self.config.decoder, self.options
        if decoder.tie_embeddings:
            head, weights, seed = tied_head(embedding_VD, options)
        else:
            axes = ("embed", "vocab")
            declared = HeadWeights(decoder.vocab_size, options, axes=axes, name="lm_head")
            head, weights, seed = declared(hidden_BTD.shape[-1])
        return token_loss(head, weights, hidden_BTD, batch.target_BT, batch.weight_BT, seed, exact)

    def soft_tokens(self, batch: Batch) -> jax.Array | None:
        """The soft-token table [G,S,D] of each shard: image, video, speech, audio; or None."""
        return self.encode(batch)[0]

    def encode(self, batch: Batch) -> tuple[jax.Array | None, dict[str, MoEAux]]:
        """`soft_tokens`, and the router statistics of what made them."""
        config, width, options = self.config, self.config.decoder.hidden_size, self.layer_options
        tables: list[jax.Array] = []
        aux: dict[str, MoEAux] = {}
        if batch.image_GIHWC is not None or batch.video_GIFHWC is not None:
            vision = Vision(config.vision, width, options, name="vision")
            tables, aux = vision(self.pictures(batch))
        if batch.speech_GJMF is not None:
            speech = Speech(config.speech, width, options, name="speech")
            tables.append(speech(batch.speech_GJMF))
        if batch.audio_GJFM is not None:
            audio = Audio(config.audio, width, options, name="audio")
            tables.append(audio(batch.audio_GJFM, batch.audio_length_GJ))
        return jnp.concatenate(tables, axis=1) if tables else None, aux

    def pictures(self, batch: Batch) -> Pictures:
        """The batch's images and videos, and which of them its tokens refer to."""
        image, video, size = batch.image_GIHWC, batch.video_GIFHWC, self.config.vision.num_tokens
        images = 0 if image is None else image.shape[1]

        def used(pool: jax.Array | None, start: int) -> jax.Array | None:
            if pool is None:
                return None
            first_I = start + size * jnp.arange(pool.shape[1])
            slot_GN = batch.slot_BT.reshape(pool.shape[0], -1)
            return (slot_GN[..., None] == first_I[None, None]).any(axis=1)

        return Pictures(image, video, used(image, 0), used(video, images * size))
