"""Bytes that the forward pass keeps for the backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from unimoe_jax.compile.hlo_memory import activation_bytes, occupied
from unimoe_jax.compile.hlo_text import Array

LAYERS, ROWS, WIDTH = 5, 16, 64


def layers_loss(remat: bool, w_L, x):
    def layer(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w.T)

    def one(x, w):
        return (jax.checkpoint(layer) if remat else layer)(x, w), None

    return jnp.sum(jax.lax.scan(one, x, w_L)[0] ** 2)


def activations_of(function, *shapes) -> int:
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return activation_bytes(jax.jit(function).lower(*structs).compile().as_text())


def test_activations_are_what_layers_keep_for_the_backward_pass():
    def found(remat: bool) -> int:
        grad = jax.grad(lambda w_L, x: layers_loss(remat, w_L, x))
        return activations_of(grad, (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH))

    one = ROWS * WIDTH * 4
    # The input of every layer, and the array that the gradient of the loss starts from.
    assert LAYERS * one <= found(True) <= (LAYERS + 1) * one + 64
    # Without recomputation, also the results of both tanh.
    assert found(False) >= 3 * LAYERS * one


def test_micro_batches_need_the_activations_of_one():
    def step(w_L, x_M):
        def one(total, x):
            return total + jax.grad(lambda w_L: layers_loss(True, w_L, x))(w_L), None

        return jax.lax.scan(one, jnp.zeros_like(w_L), x_M)[0]

    found = activations_of(step, (LAYERS, WIDTH, WIDTH), (3, ROWS, WIDTH))
    assert LAYERS * ROWS * WIDTH * 4 <= found <= (LAYERS + 1) * ROWS * WIDTH * 4 + 64


# Two loops as a TPU compiler writes them: buffers that hold no value yet, one constant that both
# passes share, and a combined collective that makes a forward operation depend on a backward one.
LOOPS = """HloModule jit_step

%fill.1 (a: f32[4,16]) -> f32[4,16] {
  ROOT %a = f32[4,16]{1,0} parameter(0)
}

%body.1 (b: (f32[16], f32[4,16])) -> (f32[16], f32[4,16]) {
  %b = (f32[16]{0}, f32[4,16]{1,0}) parameter(0)
  %z = f32[] constant(0), metadata={op_name="jit(step)/transpose(jvp(M))/zeros"}
  %x = f32[16]{0} get-tuple-element(%b), index=0
  %s = f32[4,16]{1,0} get-tuple-element(%b), index=1
  %f = f32[4,16]{1,0} fusion(%s), kind=kLoop, calls=%fill.1, metadata={op_name="jit(step)/jvp(M)/d"}
  ROOT %t = (f32[16]{0}, f32[4,16]{1,0}) tuple(%x, %f)
}

%condition.1 (c: (f32[16], f32[4,16])) -> pred[] {
  %c = (f32[16]{0}, f32[4,16]{1,0}) parameter(0)
  ROOT %no = pred[] constant(false)
}

ENTRY %main (w: f32[16]) -> f32[16] {
  %w = f32[16]{0} parameter(0)
  %room = f32[4,16]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %sums = f32[64,64]{1,0} custom-call(), custom_call_target="AllocateBuffer"
  %early = f32[16]{0} negate(%w), metadata={op_name="jit(step)/transpose(jvp(M))/neg"}
  %both = f32[16]{0} all-reduce(%early), metadata={op_name="jit(step)/jvp(M)/pmax"}
  %t.1 = (f32[16]{0}, f32[4,16]{1,0}) tuple(%both, %room)
  %w.1 = (f32[16]{0}, f32[4,16]{1,0}) while(%t.1), condition=%condition.1, body=%body.1, \
metadata={op_name="jit(step)/jvp(M)/while"}
  %kept = f32[4,16]{1,0} get-tuple-element(%w.1), index=1
  %same = f32[16]{0} get-tuple-element(%w.1), index=0
  %back = f32[64,64]{1,0} fusion(%kept, %sums, %w), kind=kLoop, calls=%fill.1, \
metadata={op_name="jit(step)/transpose(jvp(M))/while"}
  ROOT %out = f32[16]{0} add(%back, %w)
}
"""


def test_activations_of_tpu_programs():
    assert activation_bytes(LOOPS) == 4 * 16 * 4


def test_no_activations_without_a_backward_pass():
    shapes = (LAYERS, WIDTH, WIDTH), (ROWS, WIDTH)
    assert activations_of(lambda w_L, x: layers_loss(True, w_L, x), *shapes) == 0


def test_arrays_of_tpus_are_padded_to_tiles():
    assert occupied(Array("f32", (3, 5, 1), "2,1,0:T(8,128)")) == 3 * 8 * 128 * 4
    assert occupied(Array("bf16", (3, 1, 5), "1,2,0:T(8,128)(2,1)")) == 3 * 128 * 8 * 2
    assert occupied(Array("bf16", (3, 5, 1), "2,1,0:T(8,128)(2,1)S(1)")) == 0
