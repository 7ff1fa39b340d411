"""The sorted path of dispatch equals the dense reference, in values and gradients."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from tests.close import assert_close, relative_error
from tests.nn.compiled import flops_of, text_of
from tests.nn.moe.dispatch_cases import (
    EXPERTS,
    MLP,
    ROUTINGS,
    SWIGLU,
    WIDTH,
    inputs_of,
    routing,
    values_and_gradients,
    weights_of,
)
from unimoe_jax.config import MoEConfig
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.nn.moe import grouped
from unimoe_jax.nn.moe.dispatch import limit_load, moe_ffn
from unimoe_jax.nn.moe.experts import ExpertFunction, SwiGLUExpert, SwiGLUForm
from unimoe_jax.nn.moe.layer import MoE

ROWS, LENGTH = 2, 13
TOLERANCE = 1e-6


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Use blocks of 8, 4 and 2 rows: 26 tokens then fill several blocks and leave tails."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(grouped.BLOCKS, "cpu", (8, 4, 2))
        yield


@pytest.fixture(scope="module")
def programs(small_blocks):
    """Return jitted functions, which are compiled on first use; routings are data."""
    return {
        (expert_fn, method): values_and_gradients(expert_fn, method)
        for expert_fn in (MLP, SWIGLU)
        for method in ("grouped", "dense")
    }


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_grouped_equals_dense(programs, top_k: int):
    """One program serves all routings; the weights have biases and adapters."""
    weights, x = weights_of(MLP), inputs_of(ROWS, LENGTH)
    for name in ROUTINGS:
        expert, weight = routing(name, ROWS, LENGTH, top_k)
        actual = programs[MLP, "grouped"](weights, x, expert, weight)
        expected = programs[MLP, "dense"](weights, x, expert, weight)
        assert_close(actual, expected, TOLERANCE)


def test_grouped_equals_dense_swiglu(programs):
    weights, x = weights_of(SWIGLU), inputs_of(ROWS, LENGTH)
    expert, weight = routing("skewed", ROWS, LENGTH, 2)
    actual = programs[SWIGLU, "grouped"](weights, x, expert, weight)
    assert_close(actual, programs[SWIGLU, "dense"](weights, x, expert, weight), TOLERANCE)


@pytest.mark.parametrize("expert_fn", [MLP, SWIGLU])
def test_kept_hidden_rows_give_the_same_gradients(programs, expert_fn):
    weights, x = weights_of(expert_fn), inputs_of(ROWS, LENGTH)
    keeping = values_and_gradients(replace(expert_fn, train=True), "grouped", keep=True)
    recomputing = values_and_gradients(replace(expert_fn, train=True), "grouped")
    for name in ("skewed", "empty", "some_none"):
        args = (weights, x, *routing(name, ROWS, LENGTH, 2))
        assert_close(keeping(*args), recomputing(*args), TOLERANCE)


def test_weights_read_in_place_give_the_same(programs, monkeypatch):
    """On TPUs every block reads its expert's weights from the stack."""
    monkeypatch.setattr(grouped, "IN_PLACE", ("cpu",))
    weights, x = weights_of(MLP), inputs_of(ROWS, LENGTH)
    run = values_and_gradients(MLP, "grouped")
    for name in ROUTINGS:
        args = (weights, x, *routing(name, ROWS, LENGTH, 2))
        assert_close(run(*args), programs[MLP, "grouped"](*args), TOLERANCE)


@pytest.mark.parametrize("loads", [(0, 1, 2, 3), (8, 7, 9, 2), (16, 0, 0, 10), (5, 11, 1, 9)])
def test_loads_around_block_sizes(programs, loads):
    expert = np.repeat(np.arange(EXPERTS + 1), [*loads, ROWS * LENGTH - sum(loads)])
    expert = np.random.default_rng(0).permutation(expert).reshape(ROWS, LENGTH, 1)
    weights, x = weights_of(MLP), inputs_of(ROWS, LENGTH)
    _, weight = routing("balanced", ROWS, LENGTH, 1)
    args = (weights, x, expert.astype(np.int32), weight)
    assert_close(programs[MLP, "grouped"](*args), programs[MLP, "dense"](*args), TOLERANCE)


def test_value_against_numpy(programs):
    """Both paths equal the sum over choices, written out token by token in numpy."""
    weights, x = weights_of(SWIGLU), inputs_of(1, 5)
    expert, weight = routing("some_none", 1, 5, 2)

    def linear(e, name, v):
        w = weights[name]
        y = v @ w["kernel"][e]
        if "lora_a" in w:  # alpha 3, rank 2
            y = y + 3.0 / 2 * (v @ w["lora_a"][e] @ w["lora_b"][e])
        return y

    expected = np.zeros_like(x)
    for t in range(5):
        for e, share in zip(expert[0, t], weight[0, t], strict=True):
            if e < EXPERTS:
                gate = linear(e, "gate_proj", x[0, t])
                hidden = gate / (1 + np.exp(-gate)) * linear(e, "up_proj", x[0, t])
                expected[0, t] += share * linear(e, "down_proj", hidden)
    for method in ("dense", "grouped"):
        y, _ = programs[SWIGLU, method](weights, x, expert, weight)
        assert relative_error(y, expected) < TOLERANCE


def test_single_token(programs):
    weights, x = weights_of(MLP), inputs_of(1, 1)
    expert, weight = routing("balanced", 1, 1, 2)
    actual = programs[MLP, "grouped"](weights, x, expert, weight)
    assert_close(actual, programs[MLP, "dense"](weights, x, expert, weight), TOLERANCE)


def test_unused_experts_and_slots_are_exactly_zero(programs):
    weights, x = weights_of(MLP), inputs_of(ROWS, LENGTH)
    expert, weight = routing("empty", ROWS, LENGTH, 2)
    _, (dweights, _, _) = programs[MLP, "grouped"](weights, x, expert, weight)
    for leaf in jax.tree.leaves(dweights):
        assert not np.any(leaf[1::2])
        assert all(np.any(leaf[e]) for e in (0, 2))

    expert, weight = routing("none", ROWS, LENGTH, 2)
    outputs = programs[MLP, "grouped"](weights, x, expert, weight)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(outputs))


def test_bfloat16():
    low = replace(SWIGLU, dtype=jnp.bfloat16)
    weights, x = weights_of(SWIGLU), inputs_of(ROWS, LENGTH)
    expert, weight = routing("skewed", ROWS, LENGTH, 2)
    args = (weights, jnp.asarray(x, jnp.bfloat16), expert, weight)
    actual = values_and_gradients(low, "grouped")(*args)
    expected = values_and_gradients(SWIGLU, "dense")(weights, x, expert, weight)
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(actual))
    assert_close(actual, expected, 2e-2)
    assert actual[0].dtype == jnp.bfloat16


def test_no_expert_sees_the_numbers_of_another():
    """The rows of expert 1 would overflow float16 in expert 0, whose last block reaches into them.

    The overflow must not show, not even as 0 · inf in a gradient.
    """
    expert = np.repeat([0, 1], LENGTH // 2 + 1)[None, :LENGTH]
    x = inputs_of(1, LENGTH)
    x[0, :, 0] = np.where(expert == 1, 3e3, 1.0)
    weights = jax.tree.map(np.array, weights_of(SWIGLU))
    for name in ("gate_proj", "up_proj"):
        weights[name]["kernel"][0, 0], weights[name]["kernel"][1, 0] = 1, 0
    weight = np.ones((1, LENGTH, 1), np.float32)
    low = replace(SWIGLU, dtype=jnp.float16, adapters=())
    run = values_and_gradients(low, "grouped")
    results = run(weights, jnp.asarray(x, jnp.float16), expert[..., None], weight)
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in jax.tree.leaves(results))


@pytest.mark.parametrize("number", [0, 1])
def test_dropout_is_the_same_in_both_paths(number: int):
    expert_fn, seed = replace(SWIGLU, train=True), np.uint32(number)
    weights, x = weights_of(expert_fn), inputs_of(ROWS, LENGTH)
    expert, weight = routing("skewed", ROWS, LENGTH, 2)
    jitted = jax.jit(moe_ffn, static_argnums=(0, 6))

    def run(expert_fn: ExpertFunction, seed: np.uint32, method: str) -> jax.Array:
        return jitted(expert_fn, weights, x, expert, weight, seed, method)

    grouped, dense = run(expert_fn, seed, "grouped"), run(expert_fn, seed, "dense")
    assert relative_error(grouped, dense) < TOLERANCE
    without_dropout = run(SWIGLU, seed, "dense")
    assert relative_error(grouped, without_dropout) > 1e-2
    other_seed = run(expert_fn, seed + np.uint32(1), "grouped")
    assert relative_error(other_seed, grouped) > 1e-2


@pytest.mark.parametrize("method", ["grouped", "dense"])
def test_every_expert_drops_other_entries(method: str):
    """Equal experts give the same results without dropout, and different results with it."""
    expert_fn = replace(SWIGLU, train=True)
    weights = jax.tree.map(lambda w: np.repeat(w[:1], EXPERTS, axis=0), weights_of(expert_fn))
    x, weight = inputs_of(ROWS, LENGTH), np.ones((ROWS, LENGTH, 1), np.float32)
    run = jax.jit(moe_ffn, static_argnums=(0, 6))

    def result(fn: ExpertFunction, expert: int) -> jax.Array:
        chosen = np.full(weight.shape, expert, np.int32)
        return run(fn, weights, x, chosen, weight, np.uint32(3), method)

    assert relative_error(result(SWIGLU, 0), result(SWIGLU, 1)) < TOLERANCE
    results = [result(expert_fn, expert) for expert in range(EXPERTS)]
    for first, second in itertools.combinations(results, 2):
        assert relative_error(first, second) > 1e-2


# ------------------------------------------------------------------------------- capacity


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_capacity_limits_every_row_of_the_batch(factor: float):
    """The result equals a loop over slots: first choices come first, then earlier tokens."""
    expert, weight = routing("skewed", ROWS, LENGTH, 2)
    expert[0, 5] = EXPERTS  # padding takes no place
    capacity = np.ceil(factor * LENGTH * 2 / EXPERTS)
    kept, dropped = expert.copy(), 0
    for row in range(ROWS):
        load = np.zeros(EXPERTS)
        for k in range(2):
            for t in range(LENGTH):
                e = expert[row, t, k]
                if e < EXPERTS:
                    load[e] += 1
                    if load[e] > capacity:
                        kept[row, t, k] = EXPERTS
                        dropped += 1
    actual, weights, count = limit_load(expert, weight, EXPERTS, factor)
    np.testing.assert_array_equal(actual, kept)
    np.testing.assert_array_equal(weights, np.where(kept == expert, weight, 0))
    assert int(count) == dropped
    assert (dropped > 0) == (factor < 4)


def test_capacity_uses_the_decimal_value_of_the_factor():
    """1.1 · 50 · 2 / 10 is 11. In floating point it is above 11, and would be rounded up to 12."""
    expert = jnp.stack([jnp.zeros((1, 50)), jnp.ones((1, 50))], axis=-1).astype(jnp.int32)
    kept, _, dropped = limit_load(expert, jnp.ones(expert.shape, jnp.float32), 10, 1.1)
    assert [int(np.sum(kept == e)) for e in (0, 1)] == [11, 11]
    assert int(dropped) == 100 - 22


def test_the_layer_counts_what_it_drops():
    """It counts only if a capacity is set, and statistics of routing include all choices."""
    x, valid = inputs_of(ROWS, LENGTH), np.ones((ROWS, LENGTH), bool)
    outputs = {}
    for factor in (None, 0.5):
        config = MoEConfig(num_experts=EXPERTS, capacity_factor=factor)
        layer = MoE(config, SwiGLUForm(WIDTH), LayerOptions())
        run = jax.jit(layer.init_with_output)
        outputs[factor], _ = run(jax.random.key(0), x, 0 * valid, valid)
    (y, aux), (limited, limited_aux) = outputs.values()
    assert aux.dropped is None
    choices = (aux.expert_BTK, aux.weight_BTK)
    assert int(limited_aux.dropped) == int(limit_load(*choices, EXPERTS, 0.5)[2]) > 0
    np.testing.assert_array_equal(aux.load_ME, limited_aux.load_ME)
    assert relative_error(limited, y) > 1e-2


# --------------------------------------------------------------- the custom gradient


@dataclass(frozen=True)
class Tanh(ExpertFunction):
    """A float64 expert, for finite differences; the experts of the package sum in float32."""

    def first_layers(self, weights: Any, x_RD, row_R, seed):
        return (x_RD @ weights["kernel"],)

    def later_layers(self, weights, pre_activations, row_R, seed, scale_R=None):
        y = jnp.tanh(pre_activations[0])
        return y if scale_R is None else scale_R[:, None] * y


def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        expert, weight = routing("some_none", 1, 5, 2)
        rng = np.random.default_rng(0)
        weights = {"kernel": rng.standard_normal((EXPERTS, WIDTH, WIDTH))}

        def f(weights, x, weight):
            return moe_ffn(Tanh(jnp.float64), weights, x, expert, weight, jnp.uint32(0))

        args = (weights, rng.standard_normal((1, 5, WIDTH)), np.asarray(weight, np.float64))
        check_grads(jax.jit(f), args, 1, modes=["rev"], atol=1e-3, rtol=1e-3, eps=2e-3)


def test_under_vmap_scan_and_remat():
    """Run two groups in parallel, each two layers deep and recomputed in the backward pass."""
    weights = jax.tree.map(lambda *a: np.stack(a), weights_of(SWIGLU, 0), weights_of(SWIGLU, 1))
    weights = jax.tree.map(lambda w: 0.5 * w, weights)  # keeps rounding from being amplified
    x = np.stack([inputs_of(1, 7, seed) for seed in (1, 2)])
    routings = [routing("skewed", 1, 7, 2, seed) for seed in (1, 2)]
    expert, weight = (np.stack(a) for a in zip(*routings, strict=True))

    def loss(weights, x, method):
        def layers(x, expert, weight):
            @jax.checkpoint
            def layer(x, w):
                return x + moe_ffn(SWIGLU, w, x, expert, weight, jnp.uint32(0), method), None

            return jax.lax.scan(layer, x, weights)[0]

        return jnp.sum(jnp.sin(jax.vmap(layers)(x, expert, weight)))

    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    assert_close(run(weights, x, "grouped"), run(weights, x, "dense"), 3e-6)


# ------------------------------------------------------------------ the compiled program


INNER, OUTER = 24, 40  # wide enough for the products to be most of the work


def _compiled(method: Literal["grouped", "dense"], argnums) -> jax.stages.Compiled:
    """Compile the gradient of a layer of SwiGLU experts without adapters."""
    plain = SwiGLUExpert(jnp.float32)
    wide, narrow = (
        jax.ShapeDtypeStruct((EXPERTS, *s), jnp.float32) for s in ((INNER, OUTER), (OUTER, INNER))
    )
    weights = {
        "gate_proj": {"kernel": wide},
        "up_proj": {"kernel": wide},
        "down_proj": {"kernel": narrow},
    }
    x = jax.ShapeDtypeStruct((4, 16, INNER), jnp.float32)
    expert, weight = map(jnp.asarray, routing("balanced", 4, 16, 2))

    def loss(weights, x):
        return jnp.sum(jnp.sin(moe_ffn(plain, weights, x, expert, weight, jnp.uint32(0), method)))

    return jax.jit(jax.grad(loss, argnums)).lower(weights, x).compile()


def _dot_sizes(compiled: jax.stages.Compiled) -> list[int]:
    """Return the number of elements of every matrix product in the optimised program."""
    shapes = re.findall(r"= f32\[([\d,]*)\]\S* (?:dot|custom-call)\(", text_of(compiled))
    return [int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes]


def test_program_multiplies_routed_rows_only():
    """The optimised program has no product over all experts, and none over all tokens."""
    largest = INNER * OUTER  # the gradient of a kernel; a block of rows is smaller
    full, reference = _compiled("grouped", (0, 1)), _compiled("dense", (0, 1))
    sizes = _dot_sizes(full)
    assert sizes
    assert max(sizes) <= largest
    assert max(_dot_sizes(reference)) >= 64 * OUTER  # the dense path has what the check looks for

    frozen = _compiled("grouped", 1)
    # The program has the products of forward, forward again, dx and dW; frozen weights need no dW.
    assert flops_of(frozen) < 0.8 * flops_of(full)
    assert len(_dot_sizes(frozen)) < len(sizes)
