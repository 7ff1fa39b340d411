"""The compiled program of an eight-expert layer: what is exchanged, gathered and multiplied."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from unimoe_jax.compile.hlo import group_size
from unimoe_jax.config import MeshConfig
from unimoe_jax.nn.moe import grouped
from unimoe_jax.nn.moe.dispatch import moe_ffn
from unimoe_jax.nn.moe.exchange import cheapest_form, pair_capacity
from unimoe_jax.nn.moe.experts import MlpExpert, SwiGLUExpert
from unimoe_jax.parallel.sharding import (
    MESH_AXES,
    batch_sharding,
    make_mesh,
    param_sharding,
    use_mesh,
)

EXPERTS, TOP_K, WIDTH, HIDDEN = 8, 2, 128, 192
TOKENS = 2048  # on a device
ITEM = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


@dataclass(frozen=True)
class Collective:
    """One in the program of one device. sent: bytes that leave the device; large: tokens, not
    numbers about them."""

    kind: str
    size: int
    sent: float
    large: bool


def collectives(text: str) -> list[Collective]:
    """From an optimised program, in which every result has its shape and group."""
    kinds = "all-to-all|all-gather|reduce-scatter|all-reduce|collective-permute"
    found = []
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({kinds})(?:-start)?\(", line)
        if match is None:
            continue
        shapes, kind = re.sub(r"/\*.*?\*/", "", match[1]), match[2]
        size = sum(
            ITEM[dtype] * math.prod(int(n) for n in dims.split(",") if n)
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        shards = group_size(line)
        share = {"all-to-all": (shards - 1) / shards, "all-gather": (shards - 1) / shards}
        sent = size * share.get(kind, shards - 1 if kind == "reduce-scatter" else 1)
        large = f",{WIDTH}]" in shapes or f",{2 * WIDTH}]" in shapes
        found.append(Collective(kind, size, sent, large))
    return found


def lowered(
    devices, expert_fn, sizes, form: str, argnums=None, wide: bool = True, keep: bool = False
):
    """The layer on a mesh (data, fsdp, expert, tensor), or its gradient by `argnums`."""
    count = math.prod(sizes)
    mesh = make_mesh(MeshConfig(**dict(zip(MESH_AXES, sizes, strict=False))), devices[:count])
    rows = count if wide else 1
    with use_mesh(mesh):
        weights = {}
        for layer, axes in expert_fn.axes().items():
            shape = (EXPERTS, *({"expert_embed": WIDTH, "mlp": HIDDEN}[axis] for axis in axes))
            sharding = param_sharding(mesh, layer, shape, ("expert", *axes))
            weights[layer] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
        placed = batch_sharding(mesh, 3)
        x, expert, weight = (
            jax.ShapeDtypeStruct((rows, TOKENS, last), dtype, sharding=placed)
            for last, dtype in ((WIDTH, jnp.float32), (TOP_K, jnp.int32), (TOP_K, jnp.float32))
        )

        def layer(weights, x, weight, expert):
            args = (weights, x, expert, weight, np.uint32(0), "grouped", form, keep)
            return moe_ffn(expert_fn, *args)

        def loss(*args):
            return jnp.sum(jnp.sin(layer(*args)))

        function = layer if argnums is None else jax.grad(loss, argnums)
        return jax.jit(function).lower(weights, x, weight, expert).compile()


PLAIN = MlpExpert(jnp.float32)
SWIGLU = SwiGLUExpert(jnp.float32)


@pytest.mark.parametrize("shards", [4, 8])
def test_bounded_exchange_moves_little_more_than_the_minimum(devices, shards: int):
    """Two large exchanges forward. The minimum: each token once to every other device that holds
    one of its experts, and back."""
    program = lowered(devices, PLAIN, (8 // shards, 1, shards, 1), "all_to_all")
    found = collectives(program.as_text())
    assert [c.kind for c in found if c.large] == ["all-to-all"] * 2
    assert {c.kind for c in found} == {"all-to-all", "all-reduce"}
    assert all(c.size == 4 for c in found if c.kind == "all-reduce")  # the number of rounds

    here = EXPERTS // shards
    reached = 1 - math.comb(EXPERTS - here, TOP_K) / math.comb(EXPERTS, TOP_K)
    minimum = 2 * (shards - 1) * reached * TOKENS * WIDTH * 4
    sent = sum(c.sent for c in found)
    assert minimum <= sent <= 1.3 * minimum


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_one_round_for_balanced_routing(shards: int):
    """Pairs of devices of a random balanced router, many times over, fit into the buffers."""
    rng, here = np.random.default_rng(0), EXPERTS // shards
    capacity = pair_capacity(TOKENS, shards, here, TOP_K)
    scores = rng.random((32, TOKENS, EXPERTS))
    expert = np.argsort(scores, axis=-1)[..., :TOP_K]
    loads = [((expert // here) == shard).any(-1).sum(-1) for shard in range(shards)]
    assert np.max(loads) <= capacity


def test_tokens_are_gathered_where_that_is_cheaper():
    """On two devices, or few tokens, or where choices cover most devices anyway."""
    forms = {
        (shards, tokens, top_k): cheapest_form(
            tokens, pair_capacity(tokens, shards, EXPERTS // shards, top_k)
        )
        for shards, tokens, top_k in (
            *((shards, TOKENS, 2) for shards in (2, 4, 8)),
            *((8, 16, 2), (8, TOKENS, 6), (2, TOKENS, 1)),
        )
    }
    assert [key for key, form in forms.items() if form == "gather"] == [
        (2, TOKENS, 2),
        (8, 16, 2),
        (8, TOKENS, 6),
    ]


def test_weights_are_gathered_over_fsdp_alone(devices):
    """Once each; experts and their hidden width stay cut, gradients go straight to their shards."""
    program = lowered(devices, SWIGLU, (1, 2, 2, 2), "all_to_all", argnums=(0, 1))
    found = collectives(program.as_text())
    shard = (EXPERTS // 2) * WIDTH * (HIDDEN // 2) * 4  # whole in width, cut by expert and tensor
    gathered = [c.size for c in found if c.kind == "all-gather"]
    assert gathered == [shard] * 3
    scattered = [c.size for c in found if c.kind == "reduce-scatter"]
    assert scattered == [shard // 2] * 3


def test_frozen_weights_have_no_gradient_in_the_program(devices):
    """Wherever rounds of an exchange would carry it."""
    whole = lowered(devices, PLAIN, (1, 1, 4, 1), "all_to_all", argnums=(0, 1))
    frozen = lowered(devices, PLAIN, (1, 1, 4, 1), "all_to_all", argnums=(1, 2))
    products = [len(re.findall(r" (?:dot|custom-call)\(", p.as_text())) for p in (frozen, whole)]
    # Of forward (2), once more (1), dx (2) and dW (2) in every size of block, the last are gone.
    assert products[0] * 7 == products[1] * 5


@pytest.mark.parametrize(("expert_fn", "products"), [(SWIGLU, 3), (PLAIN, 2)])
def test_products_are_of_rows_routed(devices, expert_fn, products: int):
    """FLOPs of the program, which counts the body of every loop once: blocks of 512, 256, … rows
    through all products forward, and backward all but the last again, and each one's two."""
    sizes = grouped.blocks_for(TOKENS * TOP_K // EXPERTS, "cpu").sizes
    once = sum(sizes) * 2 * WIDTH * HIDDEN
    forward = lowered(devices, expert_fn, (1, 1, 1, 1), "auto", wide=False)
    assert forward.cost_analysis()["flops"] <= 1.05 * products * once
    for argnums, needed in (((1, 2), 3 * products - 1), ((0, 1, 2), 4 * products - 1)):
        program = lowered(devices, expert_fn, (1, 1, 1, 1), "auto", argnums, wide=False)
        assert program.cost_analysis()["flops"] <= 1.05 * needed * once
        kept = lowered(devices, expert_fn, (1, 1, 1, 1), "auto", argnums, wide=False, keep=True)
        saved = program.cost_analysis()["flops"] - kept.cost_analysis()["flops"]
        assert saved >= 0.99 * (products - 1) * once


@pytest.mark.parametrize("tokens", [TOKENS, 4 * TOKENS])
def test_blocks_hold_few_rows_more_than_were_routed(tokens: int):
    """Of random balanced and of skewed loads."""
    rng = np.random.default_rng(0)
    slots = tokens * TOP_K
    sizes = grouped.blocks_for(slots // EXPERTS, "cpu").sizes
    fold = jax.jit(
        lambda count: grouped._over_blocks(sizes, 0, count, lambda sum, at, size: sum + size, 0)
    )
    skewed = np.array([0.34, 0.27, 0.17, 0.11, 0.06, 0.03, 0.015, 0.005])
    for share in (np.full(EXPERTS, 1 / EXPERTS), skewed):
        loads = rng.multinomial(slots, share)
        multiplied = [int(fold(load)) for load in loads]
        assert all(rows >= load for rows, load in zip(multiplied, loads, strict=True))
        assert sum(multiplied) <= 1.05 * slots
