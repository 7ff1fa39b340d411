"""The whole model: the order of pools in the table, unused entries, tied embeddings, losses."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.close import relative_error
from tests.models.tiny import (
    SOFT_TOKENS,
    VOCAB,
    build,
    decoder_config,
    make_batch,
    model_config,
)
from tests.reference import cross_entropy
from unimoe_jax.config import AuxLossConfig, RouterLossConfig
from unimoe_jax.models.branches import Audio, Pictures, Speech, Vision
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params.paths import nest
from unimoe_jax.stages.losses import router_losses

CONFIG = model_config(media=True, decoder=decoder_config(num_layers=1, moe=None))
LENGTH = 20
AUX = AuxLossConfig(decoder=RouterLossConfig(balance=0.1, router_z=0.01))


@partial(jax.jit, static_argnums=0)
def run(model: UniMoE, params, batch):
    return model.apply({"params": nest(params)}, batch)


@partial(jax.jit, static_argnums=0)
def one_medium(module: nn.Module, params, *inputs):
    return module.apply({"params": params}, *inputs)


@pytest.fixture(scope="module")
def full():
    batch = make_batch(CONFIG, 2, LENGTH, 1, media=True)
    return (*build(CONFIG, batch), batch)


def test_stream_holds_soft_tokens_in_the_order_of_the_pools(full):
    model, params, batch = full
    count, tree = sum(SOFT_TOKENS.values()), nest(params)
    width, options = CONFIG.decoder.hidden_size, model.options
    pictures = Pictures(batch.image_GIHWC, batch.video_GIFHWC)
    vision, _ = one_medium(Vision(CONFIG.vision, width, options), tree["vision"], pictures)
    speech = one_medium(Speech(CONFIG.speech, width, options), tree["speech"], batch.speech_GJMF)
    audio = one_medium(
        Audio(CONFIG.audio, width, options),
        tree["audio"],
        batch.audio_GJFM,
        batch.audio_length_GJ,
    )
    table = np.concatenate([*vision, speech, audio], axis=1)[0]
    assert table.shape == (count, width)
    out = run(model, params, batch)
    assert relative_error(out.stream_BTD[0, :count], table) < 1e-6
    words = params["embed/embedding"][batch.token_id_BT[0, count:]]
    np.testing.assert_array_equal(out.stream_BTD[0, count:], words)
    assert out.logits_BTV.shape == (2, LENGTH, VOCAB)
    assert out.logits_BTV.dtype == jnp.float32


def test_a_video_of_equal_frames_has_the_tokens_of_the_frame(full):
    model, params, batch = full
    module = Vision(CONFIG.vision, CONFIG.decoder.hidden_size, model.options)
    frames = np.repeat(batch.image_GIHWC[:, :, None], CONFIG.vision.frames, axis=2)
    tree = nest(params)["vision"]
    (image, video), _ = one_medium(module, tree, Pictures(batch.image_GIHWC, frames))
    assert relative_error(video, image) < 1e-6
    pictures = Pictures(batch.image_GIHWC, batch.video_GIFHWC)
    (image, video), _ = one_medium(module, tree, pictures)
    assert relative_error(video, image) > 1e-2
    (alone,), _ = one_medium(module, tree, Pictures(batch.image_GIHWC, None))
    assert relative_error(alone, image) < 1e-6


def test_text_needs_no_encoder(full):
    model, params, _batch = full
    text = make_batch(CONFIG, 2, LENGTH, 1)
    needed = {
        path: leaf for path, leaf in params.items() if path.startswith(("embed", "decoder", "lm"))
    }
    np.testing.assert_array_equal(
        run(model, needed, text).logits_BTV, run(model, params, text).logits_BTV
    )


def test_unused_entries_have_no_effect(full):
    """A pool entry to which no position refers has no gradient."""
    model, params, batch = full
    slots = np.where(batch.slot_BT >= SOFT_TOKENS["image"], -1, batch.slot_BT)
    others = dict.fromkeys(("video_GIFHWC", "audio_GJFM", "audio_length_GJ"))
    unused = batch._replace(slot_BT=slots, **others)

    @jax.jit
    def loss(speech, image):
        changed = unused._replace(speech_GJMF=speech, image_GIHWC=image)
        return jnp.sum(jnp.sin(model.apply({"params": nest(params)}, changed).logits_BTV))

    gradients = jax.grad(loss, argnums=(0, 1))(batch.speech_GJMF, batch.image_GIHWC)
    assert not np.any(gradients[0])
    assert np.any(gradients[1])


def test_tied_embeddings():
    config = model_config(decoder=decoder_config(num_layers=1, moe=None, tie_embeddings=True))
    batch = make_batch(config, 1, 8, 1)
    model, params = build(config, batch)
    assert not any(path.startswith("lm_head") for path in params)
    out = run(model, params, batch)
    expected = out.decoder.hidden_BTD @ params["embed/embedding"].T
    np.testing.assert_allclose(out.logits_BTV, expected, rtol=1e-5, atol=1e-6)
    low = UniMoE(config, LayerOptions(dtype=jnp.bfloat16))
    assert run(low, params, batch).logits_BTV.dtype == jnp.float32


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_equals_that_of_the_logits(tied):
    """`want="loss"` gives the loss, gradients and router statistics that the logits give.

    The experts of the last layer leave out the positions without a target.
    """
    config = model_config(decoder=decoder_config(tie_embeddings=tied))
    batch = make_batch(config, 2, LENGTH, 1)
    weight = np.array(batch.weight_BT) * (np.arange(LENGTH) % 3 > 0)
    batch = batch._replace(weight_BT=weight)
    model, params = build(config, batch)

    def loss_of_logits(params):
        out = model.apply({"params": nest(params)}, batch)
        loss = cross_entropy(out.logits_BTV, batch.target_BT, weight)[0]
        return loss + router_losses(out.aux, AUX), out

    def loss_without_logits(params):
        out = model.apply({"params": nest(params)}, batch, "loss")
        return out.loss.total + router_losses(out.aux, AUX), out

    def value_and_gradients(loss):
        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (expected, full), gradients = value_and_gradients(loss_of_logits)
    (loss, out), actual = value_and_gradients(loss_without_logits)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for path, gradient in gradients.items():
        assert relative_error(actual[path], gradient) < 1e-5, path
    for statistic, right in zip(out.aux["decoder"], full.aux["decoder"], strict=True):
        if right is not None:
            np.testing.assert_allclose(statistic, right, atol=1e-6)
    assert out.logits_BTV is None
    same = np.abs(out.decoder.hidden_BTD - full.decoder.hidden_BTD).max(-1) < 1e-5
    # The hidden states agree where there is a target, and at padding, which goes to no expert.
    np.testing.assert_array_equal(same, (weight > 0) | (batch.segment_BT == 0))
