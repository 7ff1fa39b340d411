"""Cycles that a TPU's compiler expects for the hot loops of a step, beside its best product.

    pip install -e '.[tpu]'
    python benchmarks/tpu_cycles.py [--topologies v5e:2x2 v5p:2x2x1 v6e:2x2] [--output FILE]
    python benchmarks/tpu_cycles.py --table

No TPU is needed, because the compiler writes estimated cycles beside every operation. The estimates
ignore that operations run at the same time or wait for each other, so they are only compared with
one another.

- Expert layer: the cycles of one trip of every loop times its trips under random balanced routers,
  plus the cycles outside the loops, divided by the cycles of one dense SwiGLU on as many rows.
- Attention over packed rows: FLOPs per cycle of one visit to a tile, divided by the FLOPs per cycle
  of a product of 4096 x 4096 matrices. On a TPU, a kernel runs instead of the tiles
  (nn/kernels/splash_attention.py). The compiler estimates no cycles for it, so it is compiled and
  only the operations around it are counted.
- Attention of prompts and encoders, forward: the cycles of XLA's attention, and the cycles of the
  operations around the kernel plus the least time that the products of the kernel can take, at the
  speed of the best product.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
from exchange import EXPERTS, TOP_K, random_loads, trips_of_blocks
from jax.sharding import SingleDeviceSharding

from unimoe_jax.compile.hlo import product_flops, trips
from unimoe_jax.compile.hlo_text import Instruction, parse
from unimoe_jax.compile.targets import target_devices
from unimoe_jax.config import MeshConfig
from unimoe_jax.nn.attention.attend import attend
from unimoe_jax.nn.attention.packed import attend_packed, tiles_of
from unimoe_jax.nn.kernels.splash_attention import LANES, attend_all, attend_segments, tile_of
from unimoe_jax.nn.moe import grouped
from unimoe_jax.nn.moe.dispatch import moe_ffn
from unimoe_jax.nn.moe.experts import SwiGLUExpert
from unimoe_jax.parallel.sharding import make_mesh, use_mesh

WIDTH, HIDDEN = 4096, 11008
ROWS, LENGTH, HEADS, SIZE = 2, 4096, 32, 128
PASSES = ("forward", "gradient")
# Products per row of an expert in the forward and in the backward loop. The backward loop has 6 for
# gradients and repeats 2 of the forward loop.
PRODUCTS = {"forward": 3, "backward": 8}


class Costs:
    """FLOPs and estimated cycles of a compiled program."""

    def __init__(self, compiled: jax.stages.Compiled):
        self.computations, self.entry = parse(compiled.as_text())

    def of(self, name: str, fused: bool = False) -> np.ndarray:
        """[FLOPs, cycles] of a computation without its loops of unknown length.

        fused: a fusion has estimated cycles as a whole, so its parts add no cycles.
        """
        inside = self.computations[name]
        total = np.zeros(2)
        for item in inside.values():
            total += product_flops(item, inside), 0 if fused else _cycles(item)
            if item.op == "while":
                total += (trips(item, self.computations) or 0) * self.of(item.attribute("body"))
            elif item.op in ("fusion", "call", "async-start"):
                for other in item.called():
                    total += self.of(other, fused or item.op == "fusion")
        return total

    def loops(self) -> Iterator[np.ndarray]:
        """[FLOPs, cycles] of one trip of every loop of unknown length that has products."""
        for inside in self.computations.values():
            for item in inside.values():
                if item.op == "while" and trips(item, self.computations) is None:
                    cost = self.of(item.attribute("body"))
                    if cost[0]:
                        yield cost


def _cycles(instruction: Instruction) -> int:
    """Cycles that the compiler estimates for an instruction; 0 if it gives no estimate."""
    match = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
    return int(match[1]) if match else 0


def compiled(device: jax.Device, function, *shapes) -> Costs:
    """Compile a function for one device.

    shapes: its arguments as trees of ShapeDtypeStruct, without shardings.
    """
    placed = SingleDeviceSharding(device)
    structs = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=placed), shapes
    )
    with use_mesh(make_mesh(MeshConfig(data=1), [device])):
        return Costs(jax.jit(function).lower(*structs).compile())


def struct(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def best_product(device: jax.Device) -> float:
    """FLOPs per cycle of the product of two matrices of 4096 x 4096 in bfloat16."""
    matrix = struct(4096, 4096)
    costs = compiled(device, lambda a, b: a @ b, matrix, matrix)
    flops, cycles = costs.of(costs.entry)
    return flops / cycles


# ---------------------------------------------------------------------------------- experts


def with_gradients(function, arguments: int):
    """Gradients of the sum of sines of a function with respect to its first arguments."""

    def loss(*values):
        return jnp.sum(jnp.sin(function(*values).astype(jnp.float32)))

    return jax.grad(loss, argnums=tuple(range(arguments)))


def kernels(*leading: int) -> dict:
    """Kernels of a SwiGLU as shapes, after the sizes of leading axes."""
    sizes = {"expert_embed": WIDTH, "mlp": HIDDEN}
    layers = SwiGLUExpert(jnp.bfloat16).axes()
    return {
        layer: {"kernel": struct(*leading, *(sizes[axis] for axis in axes))}
        for layer, axes in layers.items()
    }


def experts(device: jax.Device, tokens: int) -> list[dict]:
    """Compare the expert layer with a dense layer on `tokens` * TOP_K rows."""
    expert_fn = SwiGLUExpert(jnp.bfloat16)

    def layer(weights, x, weight, expert):
        return moe_ffn(expert_fn, weights, x, expert, weight, np.uint32(0), "grouped", "auto")

    def dense(weights, x):
        gate, up, down = (weights[k]["kernel"] for k in ("gate_proj", "up_proj", "down_proj"))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down

    routed = (struct(1, tokens, TOP_K, dtype=t) for t in (jnp.float32, jnp.int32))
    inputs = kernels(EXPERTS), struct(1, tokens, WIDTH), *routed
    blocks = grouped.blocks_for(tokens * TOP_K // EXPERTS, "tpu").sizes
    visits = mean_trips(tokens, blocks)
    rows = []
    for key in PASSES:
        grad = key == "gradient"
        sparse = compiled(device, with_gradients(layer, 3) if grad else layer, *inputs)
        plain = compiled(
            device,
            with_gradients(dense, 2) if grad else dense,
            kernels(),
            struct(tokens * TOP_K, WIDTH),
        )
        outside = sparse.of(sparse.entry)[1]
        inside = sum(cost[1] * visits[_block(cost[0])] for cost in sparse.loops())
        ideal = plain.of(plain.entry)[1]
        rows.append(
            {
                "pass": key,
                "cycles_in_loops": round(inside),
                "cycles_outside": round(outside),
                "cycles_dense": round(ideal),
                "ratio_to_dense": round((inside + outside) / ideal, 3),
            }
        )
    return rows


def _block(flops: float) -> int:
    """Number of rows of a block, from the FLOPs of one trip of the loop over such blocks."""
    for products in PRODUCTS.values():
        rows = flops / (products * 2 * WIDTH * HIDDEN)
        if rows == int(rows) and int(rows) in grouped.ACCELERATOR_BLOCKS:
            return int(rows)
    raise RuntimeError(f"a loop of {flops:.3g} FLOPs per trip does not belong to the experts")


def mean_trips(tokens: int, blocks: tuple[int, ...]) -> dict[int, float]:
    """Trips of the loop over the blocks of every size, for all experts together.

    They are the mean over random balanced routers.
    """
    trips = trips_of_blocks(random_loads(tokens, 1), blocks)
    return {size: float(number.sum(axis=1).mean()) for size, number in trips.items()}


# -------------------------------------------------------------------------------- attention


def attention(device: jax.Device, best: float) -> dict:
    """Compare the tiles with the best product, and count the operations around the kernel."""
    x, segment = struct(ROWS, LENGTH, HEADS, SIZE), struct(ROWS, LENGTH, dtype=jnp.int32)
    mask = struct(ROWS, LENGTH, LENGTH, dtype=jnp.bool_)
    tiles = jax.eval_shape(tiles_of, mask, struct(ROWS, LENGTH, dtype=jnp.bool_))

    def in_tiles(q, k, v, tiles):
        return attend_packed(q, k, v, tiles, scale=SIZE**-0.5)

    def in_kernel(q, k, v, segment):
        return attend_segments(q, k, v, segment, scale=SIZE**-0.5)

    costs = compiled(device, with_gradients(in_tiles, 3), x, x, x, tiles)
    kernel = compiled(device, with_gradients(in_kernel, 3), x, x, x, segment)
    return {
        "tile": int(tiles.visible_CJBST.shape[-1]),
        "visits": [
            {"gflop": flops / 1e9, "cycles": cycles, "share": round(flops / cycles / best, 3)}
            for flops, cycles in costs.loops()
        ],
        "cycles_around_the_kernel": round(kernel.of(kernel.entry)[1]),
    }


class Attended(NamedTuple):
    """An attention: its shape [rows, positions, heads, size]; prompts are causal, encoders not."""

    shape: tuple[int, int, int, int]
    causal: bool

    @property
    def kernel_flops(self) -> float:
        """FLOPs of both products: heads padded to 128, positions to whole tiles.

        A causal attention needs half of them.
        """
        rows, length, heads, size = self.shape
        filled = max(size, LANES) * (length + -length % tile_of(length)) ** 2
        return 4 * rows * heads * filled / (2 if self.causal else 1)


ATTENDED = {
    "prompt": Attended((2, 2048, 32, 128), causal=True),
    "whisper": Attended((4, 1500, 12, 64), causal=False),
    "clip": Attended((8, 577, 16, 64), causal=False),
}


def whole_attention(device: jax.Device, best: float) -> list[dict]:
    """Compare XLA's attention with the kernel, for everything in `ATTENDED`."""
    rows = []
    for name, attended in ATTENDED.items():
        (batch, length, _, size), x = attended.shape, struct(*attended.shape)
        scale, more = size**-0.5, ()
        if attended.causal:  # a mask for XLA and segments for the kernel
            more = (
                struct(batch, length, length, dtype=jnp.bool_),
                struct(batch, length, dtype=jnp.int32),
            )

        def in_xla(q, k, v, mask=None, segment=None, scale=scale):
            return attend(q, k, v, scale=scale, mask_BTS=mask)

        def in_kernel(q, k, v, mask=None, segment=None, scale=scale):
            if segment is None:
                return attend_all(q, k, v, scale=scale)
            return attend_segments(q, k, v, segment, scale=scale)

        plain = compiled(device, in_xla, x, x, x, *more)
        kernel = compiled(device, in_kernel, x, x, x, *more)
        rows.append(
            {
                "of": name,
                "cycles_xla": round(plain.of(plain.entry)[1]),
                "cycles_around_the_kernel": round(kernel.of(kernel.entry)[1]),
                "least_cycles_in_the_kernel": round(attended.kernel_flops / best),
            }
        )
    return rows


# ------------------------------------------------------------------------------------- all


def table(result: dict) -> str:
    """Markdown table with a line for every topology."""
    lines = [
        "| topology | best product, FLOPs per cycle | experts ÷ dense, forward / with gradients "
        "| attention in tiles ÷ best product, forward / backward "
        "| least of the kernel ÷ XLA's attention, " + " / ".join(ATTENDED) + " |",
        "|---|---|---|---|---|",
    ]
    for name, numbers in result["topologies"].items():
        ratios = " / ".join(f"{row['ratio_to_dense']:.2f}" for row in numbers["experts"])
        shares = " / ".join(f"{visit['share']:.3f}" for visit in numbers["attention"]["visits"])
        kernel = " / ".join(f"{_least(row):.2f}" for row in numbers["whole_attention"])
        lines.append(
            f"| {name} | {numbers['best_product']:,.0f} | {ratios} | {shares} | {kernel} |"
        )
    return "\n".join(lines)


def _least(row: dict) -> float:
    """The least cycles of attention with the kernel, divided by the cycles of XLA's attention."""
    parts = row["cycles_around_the_kernel"] + row["least_cycles_in_the_kernel"]
    return parts / row["cycles_xla"]


def main() -> None:
    """Compile everything for every topology, and save after each of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of the expert layer")
    parser.add_argument(
        "--output", type=Path, default=common.ROOT / "benchmarks/results/tpu_cycles.json"
    )
    parser.add_argument("--table", action="store_true", help="print the table of FILE only")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.output.read_text())))
        return
    sizes = {"experts": EXPERTS, "top_k": TOP_K, "width": WIDTH, "hidden": HIDDEN}
    sizes |= {"tokens": args.tokens, "rows": ROWS, "length": LENGTH, "heads": HEADS, "head": SIZE}
    result = {"machine": common.machine(), "sizes": sizes, "topologies": {}}
    for name in args.topologies:
        device = target_devices(name)[0]
        best = best_product(device)
        result["topologies"][name] = {
            "best_product": round(best),
            "attention": attention(device, best),
            "whole_attention": whole_attention(device, best),
            "experts": experts(device, args.tokens),
        }
        common.save(args.output, result)
        print(table(result).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
