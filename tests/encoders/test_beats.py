"""BEATs: masks, position bias, chunked attention, padding invariance, gradients."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from tests.close import assert_close
from unimoe_jax.config import BeatsConfig
from unimoe_jax.convert.tables.beats import encoder_copies
from unimoe_jax.encoders.beats import (
    QUERY_CHUNK,
    BeatsEncoder,
    attend_biased,
    grouped_conv,
    relative_bias,
    relative_buckets,
    visible_tokens,
)
from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.linear import LayerOptions

CONFIG = BeatsConfig(
    hidden_size=8,
    embed_size=6,
    mlp_dim=16,
    num_layers=2,
    num_heads=2,
    patch_size=4,
    mel_bins=8,
    conv_kernel=6,
    conv_groups=2,
    num_buckets=16,
    max_distance=40,
)
SAMPLES, FRAMES = 3300, 18  # a chunk of about 0.2 s


def test_no_projection_between_equal_widths():
    """The original then has no layer post_extract_proj, so the conversion must not expect one."""
    config = CONFIG.model_copy(update={"embed_size": CONFIG.hidden_size})
    fbank, length = jnp.zeros((1, FRAMES, config.mel_bins)), jnp.array([SAMPLES])
    shapes = jax.eval_shape(
        lambda key: BeatsEncoder(config, LayerOptions()).init(key, fbank, length, SAMPLES),
        jax.random.key(0),
    )
    assert "embed_proj" not in shapes["params"]
    names = {copy.src for copy in encoder_copies(config, "audio/encoder")}
    assert not any("post_extract_proj" in name for name in names)
    assert "beats:layer_norm.weight" in names


@pytest.mark.parametrize(
    "samples,tokens", [(160_000, 500), (16_000, 50), (100, 1), (480_000, 1496)]
)
def test_visible_tokens_of_a_30_s_chunk(samples: int, tokens: int):
    visible = visible_tokens(jnp.array([samples]), 480_000, 2998, 1496)
    assert visible.shape == (1, 1496) and int(visible.sum()) == tokens
    assert bool(visible[0, :tokens].all())


@pytest.mark.parametrize("num_samples,num_frames,num_tokens", [(32_000, 198, 96), (3300, 18, 8)])
def test_visible_tokens_equal_two_rounds_of_grouping(
    num_samples: int, num_frames: int, num_tokens: int
):
    """The original groups samples to frames and frames to tokens, as `coarser` does."""

    def coarser(masked: np.ndarray, parts: int) -> np.ndarray:
        """Drop the remainder and cut into equal parts; a part is masked if all of it is."""
        return np.all(masked[: len(masked) - len(masked) % parts].reshape(parts, -1), axis=1)

    lengths = np.linspace(1, num_samples, 40).astype(int)
    visible = visible_tokens(jnp.asarray(lengths), num_samples, num_frames, num_tokens)
    for row, length in zip(np.asarray(visible), lengths, strict=True):
        masked = np.arange(num_samples) >= length
        np.testing.assert_array_equal(~row, coarser(coarser(masked, num_frames), num_tokens))


def test_more_tokens_than_frames_are_refused():
    with pytest.raises(ValueError, match="9 tokens of 8 frames"):
        visible_tokens(jnp.array([5]), 1600, 8, 9)


def test_buckets_of_all_offsets_of_a_30_s_chunk():
    offset = np.arange(-1495, 1496)
    bucket = relative_buckets(offset, 320, 800)
    for o, b in zip(offset, bucket, strict=True):
        n = abs(o)
        logarithmic = 80 + math.floor(80 * math.log(max(n, 1) / 80) / math.log(10))
        assert b == (160 if o > 0 else 0) + (n if n < 80 else min(159, logarithmic))


def test_relative_bias_is_the_bucket_of_key_minus_query():
    table = jax.random.normal(jax.random.key(0), (16, 3))
    bias = relative_bias(table, 9, 40)
    offset = np.arange(9)[None, :] - np.arange(9)[:, None]
    expected = np.asarray(table)[relative_buckets(offset, 16, 40)].transpose(2, 0, 1)
    np.testing.assert_array_equal(bias, expected)


def test_chunks_of_queries_change_nothing():
    length = QUERY_CHUNK + 17
    keys = jax.random.split(jax.random.key(0), 5)
    q, k, v = (jax.random.normal(key, (2, length, 2, 4)) for key in keys[:3])
    gate = jax.random.normal(keys[3], (2, 2, length))
    bias = jax.random.normal(keys[4], (2, length, length))
    visible = jnp.arange(length)[None] < jnp.array([[length], [40]])
    expected = attend(
        q,
        k,
        v,
        scale=0.5,
        mask_BTS=visible[:, None],
        bias_BNTS=gate[..., None] * bias[None],
    )
    actual = attend_biased(q, k, v, gate, bias, visible)
    np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.fixture(scope="module")
def encoder():
    fbank = jax.random.normal(jax.random.key(0), (2, FRAMES, 8))
    module = BeatsEncoder(CONFIG, LayerOptions())
    length = jnp.array([1500, SAMPLES])
    init = partial(module.init, num_samples=SAMPLES)
    variables = nn.unbox(jax.eval_shape(init, jax.random.key(1), fbank, length))
    # Make all parameters random, norms and biases too, so that each has an effect.
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), variables)
    return module, variables, fbank, length


@partial(jax.jit, static_argnums=0)
def run(module: BeatsEncoder, variables, fbank: jax.Array, length: jax.Array) -> jax.Array:
    return module.apply(variables, fbank, length, SAMPLES)


@partial(jax.jit, static_argnums=0)
@partial(jax.grad, argnums=(1, 2))
def gradients(module: BeatsEncoder, variables, fbank: jax.Array, length: jax.Array):
    return jnp.sum(jnp.sin(module.apply(variables, fbank, length, SAMPLES)))


@pytest.mark.parametrize(("taps", "groups"), [(6, 2), (5, 1)])
def test_gradients_of_the_grouped_convolution(taps: int, groups: int):
    """The gradients equal those of the same sum, written out tap by tap."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((2, 9, 4)), rng.standard_normal((taps, 4 // groups, 4))

    def written_out(x, w):
        padded = jnp.pad(x, ((0, 0), (taps // 2, (taps - 1) // 2), (0, 0)))
        x_BTGI = padded.reshape(2, -1, groups, 4 // groups)
        w_KIGO = w.reshape(taps, 4 // groups, groups, -1)
        terms = [jnp.einsum("btgi,igo->btgo", x_BTGI[:, k : k + 9], w_KIGO[k]) for k in range(taps)]
        return jnp.sum(jnp.stack(terms), axis=0).reshape(2, 9, 4)

    def both(x, w):
        out, gradients = jax.vjp(lambda x, w: grouped_conv(x, w, groups), x, w)
        expected_out, expected_gradients = jax.vjp(written_out, x, w)
        cotangent = jnp.sin(expected_out)
        return (out, *gradients(cotangent)), (expected_out, *expected_gradients(cotangent))

    actual, expected = jax.jit(both)(x.astype("f4"), w.astype("f4"))
    assert_close(actual, expected, 1e-6)


def test_padding_changes_no_token(encoder):
    """Of 18 frames, 9 begin within 1500 samples, so 5 of 8 tokens in the patches 0..2 are valid."""
    module, variables, fbank, length = encoder
    visible = visible_tokens(length, SAMPLES, FRAMES, 8)
    assert int(visible[0].sum()) == 5

    # In row 0, time patch 3 holds only masked tokens. Frames 16 and 17 are beyond the last patch.
    _, slope = gradients(module, variables, fbank, length)
    touched = np.abs(np.asarray(slope)).max(axis=2) > 0
    np.testing.assert_array_equal(touched[0], np.arange(FRAMES) < 12)
    np.testing.assert_array_equal(touched[1], np.arange(FRAMES) < 16)
    # Token 5 (patch 2, second band) is masked although token 4 of the same patch is not.
    assert np.abs(slope[0, 8:12, :4]).max() > 0 and np.abs(slope[0, 8:12, 4:]).max() == 0


def test_every_parameter_gets_a_finite_gradient(encoder):
    module, variables, fbank, length = encoder
    by_parameter, _ = gradients(module, variables, fbank, length)
    for path, grad in jax.tree.leaves_with_path(by_parameter):
        assert np.isfinite(grad).all(), path
        # A bias of the keys adds the same number to all scores of a query, so softmax cancels it.
        assert np.abs(grad).max() > 0 or "k_proj" in jax.tree_util.keystr(path), path


def test_bfloat16_and_rows_without_samples_stay_finite(encoder):
    module, variables, fbank, _ = encoder
    low = BeatsEncoder(CONFIG, LayerOptions(dtype=jnp.bfloat16))
    lengths = jnp.array([0, SAMPLES])
    out = run(low, variables, fbank, lengths)
    assert out.shape == (2, 8, 8) and out.dtype == jnp.bfloat16
    assert bool(jnp.isfinite(out).all())
    full = run(module, variables, fbank, lengths)
    np.testing.assert_allclose(out[1].astype(jnp.float32), full[1], atol=0.15)


def test_released_size_has_90_million_parameters():
    """The original has 90.31 M parameters with its AS2M configuration."""
    config = BeatsConfig(hidden_size=768, embed_size=512, mlp_dim=3072, num_layers=12, num_heads=12)
    module = BeatsEncoder(config, LayerOptions())
    params = jax.eval_shape(
        lambda: module.init(jax.random.key(0), jnp.zeros((1, 64, 128)), jnp.array([9]), 10_400)
    )
    count = sum(x.size for x in jax.tree.leaves(params))
    assert round(count / 1e6, 2) == 90.31
