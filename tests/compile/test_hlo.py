"""FLOPs and collectives of compiled programs, and of texts as TPU and GPU compilers write them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from unimoe_jax.compile.hlo import group_size, read


def stats_of(function, *shapes, **options):
    structs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return read(jax.jit(function, **options).lower(*structs).compile().as_text())


def test_products_count_as_often_as_their_loop_runs():
    def layers(x, w_L):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w_L)[0]

    stats = stats_of(layers, (16, 32), (5, 32, 32))
    assert stats.flops == 5 * 2 * 16 * 32 * 32
    assert stats.loops_unknown == 0


def test_loops_of_unknown_length_are_kept_apart():
    def rows(x, w, n):
        return jax.lax.fori_loop(0, n.astype(int)[0], lambda i, x: jnp.tanh(x @ w) + i, x)

    stats = stats_of(rows, (16, 32), (32, 32), (1,))
    assert (stats.flops, stats.flops_unknown) == (0, 2 * 16 * 32 * 32)
    assert stats.loops_unknown == 1


def test_convolutions_do_not_count_padding():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (2,), [(1, 1)])

    # 8 positions, a kernel of 3 with stride 2 and padding 1: of the 4 windows, the first has one
    # element in the padding.
    stats = stats_of(convolve, (2, 5, 8), (7, 5, 3))
    assert stats.flops == 2 * 2 * 7 * 5 * (2 + 3 + 3 + 3)


def test_collectives_have_bytes_groups_and_runs(devices):
    mesh = Mesh(np.array(devices).reshape(2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def exchange(x):
        def body(x, _):
            return jax.lax.all_to_all(x, "b", 0, 0, tiled=True) + 1, None

        def local(x):
            x, _ = jax.lax.scan(body, x, None, length=3)
            return jax.lax.psum(x, "a")

        return jax.shard_map(
            local, mesh=mesh, in_specs=PartitionSpec("b"), out_specs=PartitionSpec("b")
        )(x)

    sharding = NamedSharding(mesh, PartitionSpec("b"))
    stats = stats_of(exchange, (64, 32), in_shardings=sharding, out_shardings=sharding)
    found = {(c.op, c.bytes, c.group, c.count) for c in stats.collectives}
    local = 16 * 32 * 4
    assert found == {("all-to-all", local, 4, 3), ("all-reduce", local, 2, 1)}
    assert not any(collective.conditional for collective in stats.collectives)


@pytest.mark.parametrize(
    "groups,size",
    [
        ("{{0,2},{1,3},{4,6},{5,7}}", 2),
        ("[2,4]<=[2,2,2]T(1,0,2)", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_1'}", 2),
        ("mesh['a'=2,'b'=4], device_ids=([8]) {'a','b'}", 8),
    ],
)
def test_groups_are_counted_in_every_notation(groups, size):
    assert group_size(f"(%x), channel_id=14, replica_groups={groups}, dimensions={{1}}") == size


# A program as a TPU compiler writes it: products are convolutions, groups name axes of a mesh,
# loops do not say how often they run, and one collective is spread over two fusions.
TPU = """HloModule jit_step

%start.1 (p: bf16[16,64]) -> bf16[32,64] {
  %p = bf16[16,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %g.1 = bf16[32,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}, dimensions={0}
}

%done.1 (q: bf16[16,64]) -> bf16[32,64] {
  %q = bf16[16,64]{1,0} parameter(0)
  ROOT %g.2 = bf16[32,64]{1,0} all-gather(%q), channel_id=7, \
replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0'}, dimensions={0}
}

%body.1 (b: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %b = (s32[]{:T(128)}, bf16[16,64]{1,0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = bf16[16,64]{1,0} get-tuple-element(%b), index=1
  %f.1 = bf16[32,64]{1,0} fusion(%x), kind=kCustom, calls=%start.1
  %f.2 = bf16[32,64]{1,0} fusion(%x), kind=kCustom, calls=%done.1
  %c = bf16[16,32]{1,0} convolution(%x, %f.2), dim_labels=bf_oi->bf
  %more = s32[]{:T(128)} constant(1)
  %k.1 = s32[]{:T(128)} copy(%i)
  %k.2 = s32[]{:T(128)} add(%k.1, %more)
  ROOT %t = (s32[]{:T(128)}, bf16[16,64]{1,0}) tuple(%k.2, %x)
}

%condition.1 (k: (s32[], bf16[16,64])) -> pred[] {
  %n = s32[]{:T(128)} constant(6)
  %k = (s32[]{:T(128)}, bf16[16,64]{1,0}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%k), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %n), direction=LT
}

ENTRY %main (a: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %a = (s32[]{:T(128)}, bf16[16,64]{1,0}) parameter(0)
  ROOT %w = (s32[]{:T(128)}, bf16[16,64]{1,0}) while(%a), condition=%condition.1, body=%body.1
}
"""


# The counter of a loop grows by 2 in a product that passes the parts of an operand round its
# devices and takes two of them in a trip.
@pytest.mark.parametrize(("step", "limit", "trips"), [(1, 6, 6), (2, 6, 3), (2, 5, 3)])
def test_tpu_programs_are_read(step, limit, trips):
    text = TPU.replace("constant(1)", f"constant({step})")
    stats = read(text.replace("constant(6)", f"constant({limit})"))
    assert stats.flops == trips * 2 * 16 * 32 * 64
    (gather,) = stats.collectives
    assert (gather.op, gather.bytes, gather.group, gather.count) == ("all-gather", 4096, 2, trips)


def test_tpu_loops_whose_counter_grows_by_a_variable_are_kept_apart():
    stats = read(TPU.replace("add(%k.1, %more)", "add(%k.1, %k.1)"))
    assert (stats.flops, stats.loops_unknown) == (0, 1)


# A program as a GPU's compiler writes it: a product is a call of a library, whose second result is
# the library's working memory.
GPU = """HloModule jit_step

ENTRY %main (a: bf16[16,64], b: bf16[64,32]) -> bf16[16,32] {
  %a = bf16[16,64]{1,0} parameter(0)
  %b = bf16[64,32]{1,0} parameter(1)
  %gemm.1 = (bf16[16,32]{1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"alpha_real":1,\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  ROOT %c = bf16[16,32]{1,0} get-tuple-element(%gemm.1), index=0
}
"""


def test_gpu_programs_are_read():
    assert read(GPU).flops == 2 * 16 * 32 * 64
