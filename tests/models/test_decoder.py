"""The decoder: which position sees which, packing, placements of experts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.close import assert_close, relative_error
from tests.models.tiny import MOE, WIDTH, decoder_config, random_params
from tests.sources import array_source, gather
from unimoe_jax.config import Take
from unimoe_jax.models.decoder import Block, Context, Decoder, causal_mask
from unimoe_jax.nn.attention.packed import tiles_of
from unimoe_jax.nn.attention.rope import rope_tables
from unimoe_jax.nn.kernels.splash_attention import attend_segments
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.nn.stack import where_is
from unimoe_jax.params.paths import nest

OPTIONS = LayerOptions()
DENSE_DISPATCH = MOE.model_copy(update={"dispatch": "dense"})
LENGTH = 8
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0]])


@partial(jax.jit, static_argnums=0)
def run(decoder: Decoder, params, x_BTD, segment_BT, position_BT):
    modality_BT = jnp.where(segment_BT > 0, 0, -1)
    return decoder.apply(
        {"params": nest(params)},
        x_BTD,
        position_BT,
        causal_mask(segment_BT, position_BT),
        modality_BT,
        segment_BT > 0,
    )


def build(**changes):
    decoder = Decoder(decoder_config(**changes), OPTIONS)
    x = stream()
    mask = causal_mask(SEGMENTS, POSITIONS)
    return decoder, random_params(decoder, x, POSITIONS, mask, SEGMENTS * 0, SEGMENTS > 0)


def stream(seed: int = 0, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, LENGTH, WIDTH), np.float32)


@pytest.fixture(scope="module")
def mixed():
    """A decoder with experts in layers 0 and 2 and a dense layer in between, and its parameters."""
    return build()


def test_packed_segments_equal_separate_rows(mixed):
    decoder, params = mixed
    x = stream()
    packed = run(decoder, params, x, SEGMENTS, POSITIONS).hidden_BTD[0]
    for number, (start, size) in enumerate([(0, 4), (4, 3)]):
        alone = np.zeros_like(x)
        alone[0, :size] = x[0, start : start + size]
        segments = (np.arange(LENGTH) < size).astype(int)[None]
        positions = np.where(segments > 0, np.arange(LENGTH), 0)
        separate = run(decoder, params, alone, segments, positions).hidden_BTD[0]
        part = packed[start : start + size]
        assert relative_error(part, separate[:size]) < 2e-6, f"segment {number}"


def test_padding_changes_nothing(mixed):
    decoder, params = mixed
    x, changed = stream(), stream()
    changed[0, -1] = 50.0
    before, after = (run(decoder, params, value, SEGMENTS, POSITIONS) for value in (x, changed))
    np.testing.assert_array_equal(before.hidden_BTD[0, :-1], after.hidden_BTD[0, :-1])
    for name in ("balance", "router_z", "entropy", "load_ME"):
        a, b = (getattr(out.aux, name) for out in (before, after))
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)
    assert before.aux.load_ME.sum() == 2 * 2 * 7  # layers · top_k · tokens
    assert (before.aux.expert_BTK[:, 0, -1] == 4).all()  # the padding has no expert


def test_a_position_sees_all_earlier_positions_of_its_segment():
    """Gradients reach exactly the position itself and the earlier ones of the same segment."""
    decoder, params = build(moe=DENSE_DISPATCH)

    def outputs(x):
        return jnp.sum(jnp.sin(run(decoder, params, x, SEGMENTS, POSITIONS).hidden_BTD[0]), -1)

    jacobian = jax.jit(jax.jacrev(outputs))(stream())[:, 0]  # [T, T, D]
    reach = np.abs(jacobian).max(axis=-1) > 0
    same = SEGMENTS[0][:, None] == SEGMENTS[0][None, :]
    np.testing.assert_array_equal(reach, np.tril(np.ones((LENGTH, LENGTH), bool)) & same)


# ------------------------------------------------------------------- placement of experts


@partial(jax.jit, static_argnums=(0, 1))
def one_block(config, is_moe: bool, params, x, context):
    return Block(config, is_moe, OPTIONS).apply({"params": nest(params)}, x, context)


@pytest.mark.parametrize(
    ("layers", "num_layers"),
    [("all", 2), ("even", 4), ("even", 5), ("first_half", 4), ("second_half", 5), ((1, 3, 4), 5)],
)
def test_scans_equal_a_loop_over_layers(layers, num_layers: int):
    moe = DENSE_DISPATCH.model_copy(update={"layers": layers})
    decoder, params = build(moe=moe, num_layers=num_layers)
    config = decoder.config
    output = run(decoder, params, stream(), SEGMENTS, POSITIONS)

    cos, sin = rope_tables(POSITIONS, config.head_size, config.rope_theta)
    mask = causal_mask(SEGMENTS, POSITIONS)
    tiles = tiles_of(mask, SEGMENTS > 0)
    context = Context(cos, sin, tiles, jnp.where(SEGMENTS > 0, 0, -1), SEGMENTS > 0)
    x, statistics = stream(), []
    # Blocks do not depend on where other layers have experts: one program for all placements.
    block_config = config.model_copy(update={"num_layers": 1, "moe": DENSE_DISPATCH})
    for place, is_moe in zip(where_is(config.moe_layers()), config.moe_layers(), strict=True):
        prefix = place.prefix + "/"
        layer = {
            path.removeprefix(prefix): leaf[place.index]
            for path, leaf in params.items()
            if path.startswith(prefix)
        }
        x, aux = one_block(block_config, is_moe, layer, x, context)
        statistics += [aux] if is_moe else []
    x = x / np.sqrt(np.mean(x**2, -1, keepdims=True) + config.norm_eps)
    assert relative_error(output.hidden_BTD, x * params["final_norm/scale"][None, None]) < 5e-6
    stacked = jax.tree.map(lambda *a: np.stack(a), *statistics)
    assert_close(output.aux, stacked, 5e-6)


def test_equal_experts_are_a_dense_layer(mixed):
    """With experts that are copies of a dense layer, the model equals the dense one.

    The weights of a token's experts sum to one.
    """
    sparse, sparse_params = mixed
    dense, dense_params = build(moe=None)
    dense_arrays = {f"decoder/{path}": np.asarray(leaf) for path, leaf in dense_params.items()}
    sources = {"dense": array_source("dense", dense_arrays, (False,) * 3)}
    copies = Take(match=".*/moe/experts/.*", experts=("dense",) * MOE.num_experts)
    params = {}
    for path, leaf in sparse_params.items():
        take = copies if "/moe/experts/" in path else Take(match=".*", source="dense")
        moe_layers = sparse.config.moe_layers()
        params[path] = (
            leaf
            if "/router/" in path
            else gather(f"decoder/{path}", leaf.shape, take, sources, moe_layers)
        )
    args = (stream(), SEGMENTS, POSITIONS)
    actual, expected = run(sparse, params, *args), run(dense, dense_params, *args)
    # Leave the padding out, because it goes to no expert.
    assert relative_error(actual.hidden_BTD[:, :-1], expected.hidden_BTD[:, :-1]) < 5e-6
    assert expected.aux is None


def test_remat_changes_nothing(mixed):
    decoder, params = mixed
    with_remat = Decoder(decoder_config(remat=True), OPTIONS)

    def loss(params, x, decoder):
        return jnp.sum(jnp.sin(run(decoder, params, x, SEGMENTS, POSITIONS).hidden_BTD))

    gradient = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=2)
    expected = gradient(params, stream(), decoder)
    assert_close(gradient(params, stream(), with_remat), expected, 1e-5)


def test_the_kernel_of_tpus_changes_nothing(monkeypatch):
    """The kernel, interpreted step by step, gives the tiles' hidden states and gradients."""
    decoder, params = build(num_layers=2)
    weight = np.random.default_rng(1).standard_normal((1, LENGTH, WIDTH), np.float32)
    weight[SEGMENTS == 0] = 0

    @partial(jax.jit, static_argnums=0)
    def gradient(decoder: Decoder, x):
        def total(x):
            mask, modality = causal_mask(SEGMENTS, POSITIONS), jnp.where(SEGMENTS > 0, 0, -1)
            arguments = (x, POSITIONS, mask, modality, SEGMENTS > 0, None, SEGMENTS)
            return jnp.sum(weight * decoder.apply({"params": nest(params)}, *arguments).hidden_BTD)

        return jax.value_and_grad(total)(x)

    tiles = gradient(decoder, stream())
    calls = []

    def attend_here(*arguments, **settings):
        calls.append(arguments)
        return attend_segments(*arguments, **settings, interpret=True)

    monkeypatch.setattr("unimoe_jax.models.decoder.suits", lambda setting, *size: setting == "auto")
    monkeypatch.setattr("unimoe_jax.models.decoder.attend_segments", attend_here)
    without_kernel = Decoder(decoder.config, replace(OPTIONS, attention="xla"))
    assert_close(gradient(without_kernel, stream()), tiles, 0)
    assert not calls
    # Trace the decoder again, this time with the kernel.
    jax.clear_caches()
    assert_close(gradient(decoder, stream()), tiles, 1e-5)
    assert calls
