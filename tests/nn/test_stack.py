"""Runs of periodic layers, where each layer is stored, and scans over layers."""

from __future__ import annotations

from itertools import product
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.config import MoEConfig
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.nn.stack import CPU_UNROLL, Run, layer_runs, scan_layers, where_is

ALL_SMALL = [kinds for length in range(9) for kinds in product((False, True), repeat=length)]


def test_runs_repeat_to_the_layers():
    """Check every pattern of up to eight layers."""
    for kinds in ALL_SMALL:
        repeated = [kind for run in layer_runs(kinds) for kind in run.period * run.repeats]
        assert tuple(repeated) == kinds


def test_every_layer_has_one_place_in_order():
    for kinds in ALL_SMALL:
        runs, places = layer_runs(kinds), where_is(kinds)
        assert len(places) == len(set(places)) == len(kinds)
        for kind, place in zip(kinds, places, strict=True):
            run = runs[place.run]
            assert run.period[place.block] == kind
            assert 0 <= place.index < run.repeats
        assert [(p.run, p.index, p.block) for p in places] == sorted(
            (p.run, p.index, p.block) for p in places
        )


@pytest.mark.parametrize(
    ("layers", "number", "expected"),
    [
        ("all", 6, [Run((True,), 6)]),
        ("even", 6, [Run((True, False), 3)]),
        ("even", 5, [Run((True, False), 2), Run((True,), 1)]),
        ("first_half", 6, [Run((True,), 3), Run((False,), 3)]),
        ("second_half", 5, [Run((False,), 2), Run((True,), 3)]),
        ((1,), 3, [Run((False,), 1), Run((True,), 1), Run((False,), 1)]),
    ],
)
def test_patterns_in_use(layers, number: int, expected):
    moe = MoEConfig(num_experts=2, layers=layers)
    kinds = [moe.is_moe_layer(layer, number) for layer in range(number)]
    assert list(layer_runs(kinds)) == expected


class Scale(nn.Module):
    """A layer that computes carry · weight + input · shared, and outputs the carry it received."""

    start: float
    recomputed: bool
    options: LayerOptions

    @nn.compact
    def __call__(self, carry, layer_input, shared):
        assert self.options.keep_hidden != self.recomputed
        weight = self.param("weight", lambda key: self.start + jax.random.uniform(key))
        return carry * weight + layer_input * shared, carry


@pytest.mark.parametrize("remat", [False, True])
def test_scan_equals_a_loop(remat: bool):
    fields = {"options": LayerOptions(), "start": 1.0, "recomputed": remat}
    stack = scan_layers(Scale, 3, remat, "layers", **fields)
    args = (jnp.float32(2), jnp.arange(3.0), jnp.float32(0.5))
    params = nn.unbox(stack.init(jax.random.key(0), *args))
    weights = np.asarray(params["params"]["weight"])
    assert weights.shape == (3,)
    assert len(set(weights)) == 3  # every layer draws another weight

    carry, carries = 2.0, []
    for layer in range(3):
        carries.append(carry)
        carry = carry * weights[layer] + layer * 0.5
    out, outputs = cast(Any, stack.apply(params, *args))
    np.testing.assert_allclose(out, carry, rtol=1e-6)
    np.testing.assert_allclose(outputs, carries, rtol=1e-6)


@pytest.mark.parametrize(
    ("length", "remat", "loop"),
    [(CPU_UNROLL, False, False), (CPU_UNROLL + 1, False, True), (3, True, True)],
)
def test_short_stacks_are_unrolled_on_cpus(length: int, remat: bool, loop: bool):
    stack = scan_layers(
        Scale, length, remat, "layers", options=LayerOptions(), start=1.0, recomputed=remat
    )
    args = (jnp.float32(2), jnp.arange(float(length)), jnp.float32(0.5))
    params = stack.init(jax.random.key(0), *args)
    program = jax.jit(jax.grad(lambda params: stack.apply(params, *args)[0]))
    assert ("while" in program.lower(params).as_text()) == loop
