"""Run the package's modules as the reference runs them, padding included.

The reference embeds padding, routes it and counts it in the balance loss, but no position attends
to it. The whole model of this package leaves padding out, so it has no values at those positions.
The modules of which it consists can compute them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.golden_system import Pools, Spliced, System, read_params
from tests.reference import cross_entropy
from unimoe_jax.config import ModelConfig
from unimoe_jax.connectors.mlp import MlpConnector
from unimoe_jax.connectors.query import QueryConnector
from unimoe_jax.convert.plan import Resolution
from unimoe_jax.encoders.beats import BeatsEncoder
from unimoe_jax.encoders.clip import ClipEncoder
from unimoe_jax.encoders.whisper import WhisperEncoder
from unimoe_jax.models.branches import Audio, Pictures, Speech, Vision
from unimoe_jax.models.decoder import Block, Context, Decoder, DecoderOutput
from unimoe_jax.models.token_stream import token_stream
from unimoe_jax.nn.attention.packed import tiles_of
from unimoe_jax.nn.attention.rope import rope_tables
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.nn.norm import RMSNorm
from unimoe_jax.nn.stack import where_is
from unimoe_jax.params.paths import nest
from unimoe_jax.stages import losses

INSPECTED = ("mlp_norm", "modality_map", "moe")


class Text(nn.Module):
    """The decoder on an embedded stream, with the name that it has in the whole model."""

    config: ModelConfig
    options: LayerOptions

    @nn.compact
    def __call__(self, x_BTD, position_BT, mask_BTS, modality_BT):
        decoder = Decoder(self.config.decoder, self.options, frozenset({"hidden"}), name="decoder")
        valid_BT = jnp.ones(modality_BT.shape, bool)
        return decoder(x_BTD, position_BT, mask_BTS, modality_BT, valid_BT)


class Outputs(NamedTuple):
    stream_BTD: jax.Array
    logits_BTV: jax.Array
    decoder: DecoderOutput
    losses: dict[str, jax.Array]


def positions_and_mask(attended_B: np.ndarray, length: int) -> tuple[jax.Array, jax.Array]:
    """Positions 0, 1, … of every row, and a causal mask of the attended prefix."""
    at = jnp.arange(length)
    attended_B11 = jnp.asarray(attended_B)[:, None, None]
    mask = (at[None, :, None] >= at[None, None]) & (at[None, None] < attended_B11)
    return jnp.broadcast_to(at, (len(attended_B), length)), mask


@dataclass(frozen=True)
class Golden:
    """One form (unmerged or merged) of a recorded system."""

    system: System
    form: str

    @cached_property
    def resolution(self) -> Resolution:
        return self.system.resolution(self.form)

    @cached_property
    def config(self) -> ModelConfig:
        return self.resolution.plan.model

    @cached_property
    def flat(self) -> dict[str, np.ndarray]:
        return read_params(self.resolution)

    @cached_property
    def options(self) -> LayerOptions:
        return LayerOptions(lora=self.config.lora)

    @property
    def width(self) -> int:
        return self.config.decoder.hidden_size

    # ------------------------------------------------------------------ encoders, connectors

    def soft_tokens(self, params: dict, pools: Pools) -> jax.Array | None:
        """The soft-token table [1,S,D]."""
        tables = []
        if pools.image is not None or pools.video is not None:
            vision = Vision(self.config.vision, self.width, self.options)
            pictures = Pictures(pools.image, pools.video)
            tables += vision.apply({"params": params["vision"]}, pictures)[0]
        if pools.sound is not None and self.system.voice == "speech":
            speech = Speech(self.config.speech, self.width, self.options)
            tables.append(speech.apply({"params": params["speech"]}, pools.sound))
        elif pools.sound is not None:
            audio = Audio(self.config.audio, self.width, self.options)
            lengths = pools.sound_length
            tables.append(audio.apply({"params": params["audio"]}, pools.sound, lengths))
        return jnp.concatenate(tables, axis=1) if tables else None

    def encoder_outputs(self) -> dict[str, np.ndarray]:
        """All recorded values of encoders and connectors, by recorded name."""
        outputs = jax.jit(lambda flat: self._encoder_outputs(nest(flat)))(self.flat)
        return jax.tree.map(np.asarray, outputs)

    def _encoder_outputs(self, params: dict) -> dict[str, jax.Array]:
        inputs = self.system.inputs
        pixels = np.concatenate([inputs["images"], *inputs["videos"]]).transpose(0, 2, 3, 1)
        images = len(inputs["images"])
        config = self.config.vision
        features, _ = ClipEncoder(config.encoder, self.options).apply(
            {"params": params["vision"]["encoder"]}, pixels
        )
        connector = MlpConnector(config.connector.depth, self.width, self.options)
        soft = connector.apply({"params": params["vision"]["connector"]}, features)
        out = {}
        for call, part in enumerate((slice(images), slice(images, None))):
            out[f"vision_tower_features/call{call}"] = features[part]
            out[f"mm_projector_out/call{call}"] = soft[part]
        if not (inputs["features_mask"] > 0).any():
            return out
        for name, value in self._sound_outputs(params[self.system.voice]).items():
            out |= {f"{name}/call{call}": value[call : call + 1] for call in range(len(value))}
        return out

    def _sound_outputs(self, params: dict) -> dict[str, jax.Array]:
        inputs = self.system.inputs
        used = inputs["features_mask"] > 0
        chunks, config = inputs["input_features"][used], getattr(self.config, self.system.voice)
        if self.system.voice == "speech":
            encoder, given = WhisperEncoder(config.encoder, self.options), (chunks,)
        else:
            padding = inputs["padding_masks"][used][:, 0]
            length = (padding == 0).sum(-1).astype(np.int32)
            encoder = BeatsEncoder(config.encoder, self.options)
            given = (chunks[:, 0], length, padding.shape[-1])
        states = encoder.apply({"params": params["encoder"]}, *given)
        # Record the reader without its projector: an identity replaces the projector.
        eye = np.eye(config.connector.hidden_size, dtype=np.float32)
        bare = {"projector": {"fc1": {"kernel": eye, "bias": np.zeros_like(eye[0])}}}
        bare_config = config.connector.model_copy(update={"projector_depth": 1})
        connector = params["connector"]
        read = QueryConnector(bare_config, len(eye), self.options)
        whole = QueryConnector(config.connector, self.width, self.options)
        return {
            "audio_tower_features": states,
            "audio_aligner_decoder_out": read.apply({"params": connector | bare}, states),
            "audio_aligner_out": whole.apply({"params": connector}, states),
        }

    # ------------------------------------------------------------------------------ the whole

    def stream(self, params: dict, spliced: Spliced, soft: jax.Array | None) -> jax.Array:
        text = jnp.asarray(params["embed"]["embedding"])[spliced.token_id]
        stream = token_stream(text, soft, jnp.asarray(spliced.slot))
        return jnp.where(jnp.asarray(spliced.zero)[..., None], 0.0, stream)

    def run(
        self, flat: dict[str, Any], spliced: Spliced, pools: Pools, soft: Any = None
    ) -> Outputs:
        """The forward pass, padding included. `soft` replaces the soft tokens of the pools."""
        params = nest(flat)
        soft = self.soft_tokens(params, pools) if soft is None else soft
        stream, logits, out = self.decode(params, spliced, soft)
        return Outputs(stream, logits, out, self.losses(logits, out.aux, spliced))

    def decode(
        self, params: dict, spliced: Spliced, soft: jax.Array | None
    ) -> tuple[jax.Array, jax.Array, DecoderOutput]:
        """(embedded stream, logits, output of the decoder)."""
        stream = self.stream(params, spliced, soft)
        position, mask = positions_and_mask(spliced.attended, stream.shape[1])
        out = Text(self.config, self.options).apply(
            {"params": {"decoder": params["decoder"]}},
            stream,
            position,
            mask,
            jnp.asarray(spliced.modality),
        )
        return stream, self.logits(params, out.hidden_BTD), out

    def logits(self, params: dict, hidden_BTD: jax.Array) -> jax.Array:
        """Logits [B,T,V], from the head or, if it is tied, from the embedding."""
        if self.config.decoder.tie_embeddings:
            return hidden_BTD @ params["embed"]["embedding"].T
        return hidden_BTD @ params["lm_head"]["kernel"]

    def losses(self, logits: jax.Array, aux: Any, spliced: Spliced) -> dict[str, jax.Array]:
        """The language loss and, if config.json asks for them, the three losses of 8e."""
        parts = {"loss_language": language_loss(logits, spliced)}
        config, modality = self.system.config, jnp.asarray(spliced.modality)
        if config.get("aux_balance_loss"):
            balance = config["aux_balance_loss_coef"] * jnp.sum(aux.balance)
            parts["aux_balance_loss_scaled"] = balance
        if config.get("aux_multimodal_loss"):
            names = ("image", "video", "audio")
            experts = {name: config[f"{name}_expert_indices"] for name in names}
            parts["aux_multimodal_loss_scaled"] = config[
                "aux_multimodal_loss_coef"
            ] * losses.modality_expert_loss(aux.logits_BTE, modality, experts)
        if config.get("aux_kl_loss"):
            kl = losses.modality_kl_loss(aux.logits_BTE, modality)
            parts["aux_kl_loss_scaled"] = config["aux_kl_loss_coef"] * kl
        parts["loss_total"] = sum(parts.values())
        return parts

    # -------------------------------------------------------------------------- layer by layer

    def layers(self, stream: jax.Array, spliced: Spliced, noise: dict[int, np.ndarray], patch):
        """Run every block: [(hidden, aux, intermediates)], the final hidden state, logits.

        `noise` holds Gumbel noise [X,E] of MoE layers; `patch(layer_noise)` is a context in which
        the router draws this noise.
        """
        decoder, config = nest(self.flat)["decoder"], self.config.decoder
        if noise:
            router = config.moe.router.model_copy(update={"sample_second": True})
            moe = config.moe.model_copy(update={"router": router})
            config = config.model_copy(update={"moe": moe})
        prefix = re.escape(r"decoder/run_\d+/block_\d+/")
        rules = tuple(
            rule.model_copy(update={"match": re.sub(prefix, "", rule.match)})
            for rule in self.config.lora
        )
        options = replace(self.options, lora=rules)
        position, mask = positions_and_mask(spliced.attended, stream.shape[1])
        cos, sin = rope_tables(position, config.head_size, config.rope_theta)
        modality = jnp.asarray(spliced.modality)
        valid = jnp.ones(modality.shape, bool)
        context = Context(cos, sin, tiles_of(mask, valid), modality, valid)
        x, steps = stream, []
        for layer, place in enumerate(where_is(config.moe_layers())):
            stacked = decoder[f"run_{place.run}"][f"block_{place.block}"]
            params = jax.tree.map(lambda leaf, at=place.index: leaf[at], stacked)
            block = Block(config, config.moe_layers()[layer], options)
            run = partial(
                block.apply,
                rngs={"router": jax.random.key(0)},
                capture_intermediates=lambda module, _: module.name in INSPECTED,
                mutable=["intermediates"],
            )
            with patch(noise.get(layer)):
                (x, aux), seen = jax.jit(run)({"params": params}, x, context)
            steps.append((x, aux, seen["intermediates"]))
        return steps

    def head(self, hidden: jax.Array) -> jax.Array:
        """Logits from the final norm and the head."""
        norm = RMSNorm(self.config.decoder.norm_eps, self.options)
        normed = norm.apply({"params": {"scale": self.flat["decoder/final_norm/scale"]}}, hidden)
        return self.logits(nest(self.flat), normed)


def language_loss(logits: jax.Array, spliced: Spliced) -> jax.Array:
    """Mean cross-entropy over all labels of the batch."""
    target = spliced.labels[:, 1:]
    total, count = cross_entropy(
        logits[:, :-1], np.maximum(target, 0), (target != -100).astype(np.float32)
    )
    return total / count


def encoder_free(flat: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split parameters into (all but the encoders, the encoders)."""
    encoders = {path: leaf for path, leaf in flat.items() if re.match(r"\w+/encoder/", path)}
    return {path: leaf for path, leaf in flat.items() if path not in encoders}, encoders


def loss_and_gradients(golden: Golden, spliced: Spliced, pools: Pools):
    """Outputs, and gradients of the total loss with respect to all but the encoders."""
    trained, fixed = encoder_free(golden.flat)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def run(trained, fixed):
        out = golden.run(trained | fixed, spliced, pools)
        return out.losses["loss_total"], out

    (_, out), grads = run(trained, fixed)
    return jax.tree.map(np.asarray, (out, grads))
