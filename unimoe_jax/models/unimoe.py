"""The multimodal model: encoders and connectors make soft tokens, the decoder reads the stream.

Parameters: `{vision,speech,audio}/{encoder,connector}`, `embed`, `decoder`, `lm_head`. Only the
pools that a batch holds are encoded, so a program contains no encoder that its batches do not need.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from unimoe_jax.config import ModelConfig
from unimoe_jax.data.batch import Batch
from unimoe_jax.models.branches import Audio, Pictures, Speech, Vision
from unimoe_jax.models.decoder import Decoder, DecoderOutput, causal_mask
from unimoe_jax.models.token_stream import token_stream
from unimoe_jax.nn.head import HeadWeights, TokenLoss, tied_head, token_loss
from unimoe_jax.nn.linear import LayerOptions, Linear, declare
from unimoe_jax.nn.moe.layer import MoEAux
from unimoe_jax.parallel.sharding import shard


class Embedding(nn.Module):
    """Declares the table of token embeddings and returns it, [V,D] in the compute dtype."""

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
"""What `UniMoE` computes from the hidden states, see there."""


class Output(NamedTuple):
    """The result of the model.

    logits_BTV: float32, or None if a loss was wanted.
    aux: router statistics of those of `encoder`, `connector` and `decoder` that have experts and
        were run.
    stream_BTD: the stream that the decoder read, in the compute dtype.
    decoder: the result of the decoder.
    loss: the loss of the batch's targets, or None if logits were wanted.
    """

    logits_BTV: jax.Array | None
    aux: dict[str, MoEAux]
    stream_BTD: jax.Array
    decoder: DecoderOutput
    loss: TokenLoss | None


class UniMoE(nn.Module):
    """`model.apply({"params": params}, batch, want)` -> Output. See ModelConfig.

    want: "logits": logits of all positions. "loss": the loss of the batch's targets, computed in
        blocks, so that the logits of the whole batch are never in memory. "exact": the loss, and
        which targets are the most likely tokens.

    Attributes:
        keep: with "hidden", `Output.decoder.layers` holds the stream after every layer.
    """

    config: ModelConfig
    options: LayerOptions
    keep: frozenset[str] = frozenset()

    @property
    def layer_options(self) -> LayerOptions:
        """The options of all layers, with the attention program of the model's settings."""
        return replace(self.options, attention=self.config.attention)

    @nn.compact
    def __call__(self, batch: Batch, want: Wanted = "logits") -> Output:
        config, options = self.config, self.layer_options
        width = config.decoder.hidden_size
        # Embed the text and put the soft tokens of media into the stream.
        embedding_VD = Embedding(config.decoder.vocab_size, width, options, name="embed")()
        text_BTD = embedding_VD[batch.token_id_BT]
        soft_GSD, aux = self.encode(batch)
        stream = token_stream(text_BTD, soft_GSD, batch.slot_BT)
        stream = shard(stream, "batch", "tokens", None)
        # For a loss, only the hidden states of positions with a target are read.
        decoded = Decoder(config.decoder, options, self.keep, name="decoder")(
            stream,
            position_BT=batch.position_BT,
            mask_BTS=causal_mask(batch.segment_BT, batch.position_BT),
            modality_BT=batch.modality_BT,
            valid_BT=batch.segment_BT > 0,
            read_BT=None if want == "logits" else batch.weight_BT > 0,
            segment_BT=batch.segment_BT,
        )
        # Compute logits of all positions, or only the loss.
        if decoded.aux is not None:
            aux["decoder"] = decoded.aux
        logits, loss = None, None
        if want == "logits":
            logits = self.logits(decoded.hidden_BTD, embedding_VD)
        else:
            loss = self.loss(decoded.hidden_BTD, embedding_VD, batch, exact=want == "exact")
        return Output(logits, aux, stream, decoded, loss)

    def logits(self, hidden_BTD: jax.Array, embedding_VD: jax.Array) -> jax.Array:
        """Logits [B,T,V] in float32 under the head, or under the embedding if the two are tied."""
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
        """The loss of the batch's targets under the same head. exact: see `TokenLoss.exact_BT`."""
        decoder, options = self.config.decoder, self.options
        if decoder.tie_embeddings:
            head, weights, seed = tied_head(embedding_VD, options)
        else:
            axes = ("embed", "vocab")
            declared = HeadWeights(decoder.vocab_size, options, axes=axes, name="lm_head")
            head, weights, seed = declared(hidden_BTD.shape[-1])
        return token_loss(head, weights, hidden_BTD, batch.target_BT, batch.weight_BT, seed, exact)

    def encode(self, batch: Batch) -> tuple[jax.Array | None, dict[str, MoEAux]]:
        """Run the branches of the pools that the batch holds.

        Returns:
            The soft-token table [G,S,D] of each data shard (image, video, speech and audio, in this
            order) or None without media, and the router statistics of the vision branch.
        """
        config, width, options = self.config, self.config.decoder.hidden_size, self.layer_options
        tables: list[jax.Array] = []
        aux: dict[str, MoEAux] = {}
        if batch.image_GIHWC is not None or batch.video_GIFHWC is not None:
            assert config.vision is not None
            vision = Vision(config.vision, width, options, name="vision")
            tables, aux = vision(self.pictures(batch))
        if batch.speech_GJMF is not None:
            assert config.speech is not None
            speech = Speech(config.speech, width, options, name="speech")
            tables.append(speech(batch.speech_GJMF))
        if batch.audio_GJFM is not None:
            assert config.audio is not None
            audio = Audio(config.audio, width, options, name="audio")
            tables.append(audio(batch.audio_GJFM, batch.audio_length_GJ))
        return jnp.concatenate(tables, axis=1) if tables else None, aux

    def pictures(self, batch: Batch) -> Pictures:
        """The batch's images and videos, and which of them its tokens refer to.

        Example: two images of 4 soft tokens each have the slots 0..3 and 4..7 of the table. If the
        slots of a shard's rows contain 4 but not 0, only the second image is used.
        """
        assert self.config.vision is not None
        image, video, size = batch.image_GIHWC, batch.video_GIFHWC, self.config.vision.num_tokens
        images = 0 if image is None else image.shape[1]

        def used(pool: jax.Array | None, start: int) -> jax.Array | None:
            """bool [G,I]: True for entries whose first soft token is in a row of their shard.

            start: the slot of the pool's first soft token.
            """
            if pool is None:
                return None
            # Compare every slot of the shard's rows with the first slot of every entry.
            first_I = start + size * jnp.arange(pool.shape[1])
            slot_GN = batch.slot_BT.reshape(pool.shape[0], -1)
            return (slot_GN[..., None] == first_I[None, None]).any(axis=1)

        return Pictures(image, video, used(image, 0), used(video, images * size))
