"""The loss without logits has the values and gradients of the loss of all logits, on any mesh."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.nn.compiled import text_of
from tests.reference import cross_entropy
from unimoe_jax.compile.hlo import read
from unimoe_jax.compile.hlo_text import parse
from unimoe_jax.config import LoRARule, MeshConfig
from unimoe_jax.nn import head as head_module
from unimoe_jax.nn.head import Head, token_loss
from unimoe_jax.parallel.sharding import make_mesh, use_mesh

ROWS, LENGTH, WIDTH, VOCAB, RANK = 8, 11, 12, 24, 2
RULE = LoRARule(match="lm_head", rank=RANK, alpha=3.0)
BLOCK = 4


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Make blocks so small that a batch has several, of which the last is partly empty."""
    monkeypatch.setitem(head_module.BLOCKS, "cpu", BLOCK)


@pytest.fixture(scope="module")
def case() -> dict:
    """Weights with bias and adapter, hidden states and targets.

    Row 0 has a target everywhere, row 1 has none, and the other rows have some.
    """
    rng = np.random.default_rng(0)
    normal = partial(rng.standard_normal, dtype=np.float32)
    weight = (rng.random((ROWS, LENGTH)) < 0.4).astype(np.float32)
    weight[0], weight[1] = 1, 0
    weight[2, 3] = 0.5
    weights = {
        "kernel": normal((WIDTH, VOCAB)),
        "bias": normal(VOCAB),
        "lora_a": normal((WIDTH, RANK)),
        "lora_b": normal((RANK, VOCAB)),
    }
    target = rng.integers(0, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    hidden = normal((ROWS, LENGTH, WIDTH))
    return {"weights": weights, "hidden": hidden, "target": target, "weight": weight}


def logits_of(weights, hidden):
    merged = weights["kernel"] + 1.5 * weights["lora_a"] @ weights["lora_b"]
    return hidden @ merged + weights["bias"][None, None]


def reference(weights, hidden, case):
    """Return 1.7 times the loss: the factor shows that the gradient from above is applied."""
    logits = logits_of(jax.tree.map(jnp.asarray, weights), hidden)
    return 1.7 * cross_entropy(logits, case["target"], case["weight"])[0]


def ours(weights, hidden, case, dtype=jnp.float32, **options):
    """Return 1.7 times the loss as `reference` does, and all results."""
    loss = token_loss(Head(dtype, RULE), weights, hidden, case["target"], case["weight"], **options)
    return 1.7 * loss.total, loss


def close(actual, expected):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        scale = np.abs(b).max()
        np.testing.assert_allclose(a / scale, b / scale, atol=1e-6)


def test_values_and_gradients(case):
    args = case["weights"], case["hidden"]
    expected, gradients = jax.value_and_grad(reference, (0, 1))(*args, case)
    grad = jax.jit(jax.value_and_grad(partial(ours, case=case), (0, 1), has_aux=True))
    (total, loss), actual = grad(*args)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    close(actual, gradients)
    np.testing.assert_allclose(1.7 * loss.nll_BT.sum(), expected, rtol=1e-6)
    np.testing.assert_array_equal(loss.nll_BT != 0, case["weight"] > 0)
    assert loss.exact_BT is None
    # The value is the same if no gradient is asked for.
    assert jax.jit(partial(ours, case=case))(*args)[0] == total


def test_frozen_weights_get_no_gradient_and_no_products(case):
    """A block has two products: the logits, and the gradient of hidden states. A third computes the
    gradient of the kernel, if the kernel is trained.
    """
    kernel, hidden = case["weights"]["kernel"], case["hidden"]

    def loss(kernel, hidden, *targets):
        return token_loss(Head(jnp.float32), {"kernel": kernel}, hidden, *targets).total

    targets, flops = (case["target"], case["weight"]), {}
    for name, argnums in {"hidden": 1, "both": (0, 1)}.items():
        compiled = jax.jit(jax.grad(loss, argnums)).lower(kernel, hidden, *targets).compile()
        stats = read(text_of(compiled))
        assert stats.flops == 0 and stats.loops_unknown == 1
        flops[name] = stats.flops_unknown / (2 * BLOCK * WIDTH * VOCAB)
    assert flops == {"hidden": 2, "both": 3}


def test_no_array_of_all_logits(case):
    kernel = case["weights"]["kernel"]

    def loss(kernel, hidden):
        return token_loss(
            Head(jnp.float32), {"kernel": kernel}, hidden, case["target"], case["weight"]
        ).total

    compiled = jax.jit(jax.grad(loss, (0, 1))).lower(kernel, case["hidden"]).compile()
    computations, _ = parse(text_of(compiled))
    instructions = [i for computation in computations.values() for i in computation.values()]
    shapes = {array.shape for instruction in instructions for array in instruction.arrays}
    assert any(shape[-2:] == (BLOCK, VOCAB) for shape in shapes)
    assert max(np.prod(shape) for shape in shapes if shape[-1:] == (VOCAB,)) < ROWS * LENGTH * VOCAB


def test_a_batch_without_targets_has_zero_loss_and_gradients(case):
    empty = {**case, "weight": np.zeros((ROWS, LENGTH), np.float32)}
    grad = jax.value_and_grad(partial(ours, case=empty), (0, 1), has_aux=True)
    (total, loss), gradients = grad(case["weights"], case["hidden"])
    assert total == 0 and not loss.nll_BT.any()
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_exact(case):
    """Positions are exact where the most likely token is the target, and where there is none."""
    best = np.argmax(logits_of(case["weights"], case["hidden"]), -1)
    target = np.where(np.arange(LENGTH) % 2, best, case["target"]).astype(np.int32)
    loss = ours(case["weights"], case["hidden"], {**case, "target": target}, exact=True)[1]
    np.testing.assert_array_equal(loss.exact_BT, (best == target) | (case["weight"] == 0))
    assert 0 < np.asarray(loss.exact_BT)[case["weight"] > 0].mean() < 1


def test_a_loss_whose_total_is_not_used_passes_no_gradient(case):
    """The backward pass then receives a symbolic zero instead of an array."""

    def other(hidden):
        loss = ours(case["weights"], hidden, case)[1]
        return jnp.sum(hidden**2) + 0 * jnp.sum(loss.nll_BT)

    np.testing.assert_allclose(jax.grad(other)(case["hidden"]), 2 * case["hidden"])


def test_bf16(case):
    weights = jax.tree.map(lambda a: jnp.asarray(a, jnp.bfloat16), case["weights"])
    hidden = jnp.asarray(case["hidden"], jnp.bfloat16)
    loss = jax.value_and_grad(partial(ours, case=case, dtype=jnp.bfloat16), (0, 1), has_aux=True)
    (total, _), gradients = loss(weights, hidden)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(total, reference(case["weights"], case["hidden"], case), rtol=0.02)


def test_adapter_dropout_depends_on_the_position_alone(case):
    """A position drops the same features, whichever other positions have targets."""
    rule = RULE.model_copy(update={"dropout": 0.5})
    head, seed = Head(jnp.float32, rule), jnp.uint32(7)
    some = case["weight"] * (np.arange(LENGTH) % 3 > 0)

    def nll(weight):
        return token_loss(
            head, case["weights"], case["hidden"], case["target"], weight, seed
        ).nll_BT

    nll_all, nll_some = nll(case["weight"]), nll(some)
    np.testing.assert_allclose(nll_some, np.where(some > 0, nll_all, 0), rtol=1e-6)
    without_dropout = ours(case["weights"], case["hidden"], case)[1].nll_BT
    assert not np.allclose(nll_all, without_dropout)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_on_a_mesh(case, devices, sizes):
    """Values and gradients are those of one device, and the loop exchanges little.

    If a mesh axis cuts the vocabulary, a trip of the loop exchanges arrays of the size of a block
    of hidden states; otherwise it exchanges nothing.
    """
    args = case["weights"], case["hidden"]
    grad = jax.value_and_grad(partial(ours, case=case, exact=True), (0, 1), has_aux=True)
    (expected, loss), gradients = jax.jit(grad)(*args)
    with use_mesh(make_mesh(MeshConfig(**sizes), devices)):
        compiled = jax.jit(grad).lower(*args).compile()
        (total, sharded), actual = compiled(*args)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    close(actual, gradients)
    np.testing.assert_array_equal(sharded.exact_BT, loss.exact_BT)
    in_loop = [c for c in read(text_of(compiled)).collectives if c.conditional]
    assert all(c.bytes <= 4 * BLOCK * (WIDTH + RANK) for c in in_loop), in_loop
    assert bool(in_loop) == ("tensor" in sizes)
