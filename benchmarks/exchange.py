"""Count what the expert layer exchanges and multiplies on TPUs, by compiling it without a TPU.

    pip install -e '.[tpu]'
    python benchmarks/exchange.py [--topologies v5e:2x4 v5p:2x2x2 v6e:2x4] [--output FILE] [--again]
    python benchmarks/exchange.py --table

For every topology, form of exchange and size of the expert axis, the layer is compiled ahead of
time: once forward, and once with all gradients. The result has these numbers:

- Bytes: what one device sends to others. In the minimum, each token goes once to every other device
  that holds one of its experts, and its result comes back (in training, the gradients move the same
  way). Padded buffers are counted whole. Ragged buffers are counted with the rows that a random
  balanced router sends.
- Products per row: the layer has three matrices, so 3 products are needed forward and 6 more for
  all gradients. Another 2 are repeated backward instead of keeping their results.
- `weight_products_per_row`: those products that are gradients of weights; 3 are needed.
- `rows_to_needed`: the rows multiplied (with the padding of an expert's last block) divided by the
  rows routed, the mean over random balanced routers.

A program is not compiled again if FILE holds its result for the same sizes and the same source code
of the layer.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import time
from pathlib import Path
from typing import NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.compile.__main__ import EFFORT, set_effort
from unimoe_jax.compile.hlo import product_flops, read
from unimoe_jax.compile.hlo_text import parse as parse_hlo
from unimoe_jax.compile.targets import target_devices
from unimoe_jax.config import MeshConfig
from unimoe_jax.nn.moe import grouped
from unimoe_jax.nn.moe.dispatch import moe_ffn
from unimoe_jax.nn.moe.exchange import cheapest_form, pair_capacity
from unimoe_jax.nn.moe.experts import SwiGLUExpert
from unimoe_jax.parallel.sharding import batch_sharding, make_mesh, param_sharding, use_mesh

EXPERTS, TOP_K, ITEM = 8, 2, 2
# Buffers of tokens that a pass exchanges: forward x and y; with gradients also x, g and dx, because
# the backward pass sends x again. g is the gradient of y, dx that of x.
LARGE = {"forward": 2, "gradient": 5}
# The exchanges that no form can avoid: x and y, and with gradients g and dx as well.
NEEDED = {"forward": 2, "gradient": 4}
# Products per row: 3 forward; with gradients 3 + 6 + 2 repeated ones.
PRODUCTS = {"forward": 3, "gradient": 11}


def compiled(args: argparse.Namespace, topology: str, shards: int, form: str, key: str):
    """Compile the layer for the devices of a topology, with `shards` devices on the expert axis."""
    devices = target_devices(topology)
    mesh = make_mesh(MeshConfig(data=len(devices) // shards, expert=shards), devices)
    expert_fn = SwiGLUExpert(jnp.bfloat16)
    sizes = {"expert_embed": args.width, "mlp": args.hidden}
    with use_mesh(mesh):
        weights = {}
        for layer, axes in expert_fn.axes().items():
            shape = (EXPERTS, *(sizes[axis] for axis in axes))
            placed = param_sharding(mesh, layer, shape, ("expert", *axes))
            weights[layer] = {"kernel": jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=placed)}
        placed = batch_sharding(mesh, 3)  # one row of tokens per device
        lasts = ((args.width, jnp.bfloat16), (TOP_K, jnp.float32), (TOP_K, jnp.int32))
        x, weight, expert = (
            jax.ShapeDtypeStruct((len(devices), args.tokens, last), dtype, sharding=placed)
            for last, dtype in lasts
        )

        def layer(weights, x, weight, expert):
            return moe_ffn(expert_fn, weights, x, expert, weight, np.uint32(0), "grouped", form)

        # The sine gives every output a different gradient.
        def loss(*values):
            return jnp.sum(jnp.sin(layer(*values).astype(jnp.float32)))

        function = layer if key == "forward" else jax.grad(loss, argnums=(0, 1, 2))
        return jax.jit(function).lower(weights, x, weight, expert).compile()


def reached(shards: int) -> float:
    """Share of tokens that a balanced router sends to a given device of the expert axis.

    It is 1 minus the share of tokens whose experts all belong to other devices. With 8 experts on 4
    devices and 2 experts per token it is 1 - C(6, 2) / C(8, 2) = 13 / 28.
    """
    outside = EXPERTS - EXPERTS // shards
    return 1 - math.comb(outside, TOP_K) / math.comb(EXPERTS, TOP_K)


def sent_by_random_router(tokens: int, shards: int) -> float:
    """Rows that a device sends to others under a random balanced router, the mean over devices."""
    rng, here = np.random.default_rng(0), EXPERTS // shards
    expert = np.argsort(rng.random((shards, tokens, EXPERTS)), axis=-1)[..., :TOP_K]
    goes = ((expert // here)[..., None] == np.arange(shards)).any(axis=2)
    # Rows for the experts of the device itself are not sent.
    goes[np.arange(shards), :, np.arange(shards)] = False
    return float(goes.sum() / shards)


def trips_of_blocks(loads: np.ndarray, sizes: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Number of blocks of every size that cover the loads of experts, shaped like `loads`."""
    remaining, trips = loads.astype(np.int64), {}
    for size in sizes:  # from the largest block to the smallest
        trips[size] = grouped.block_trips(remaining, size, sizes[-1])
        remaining = np.maximum(remaining - trips[size] * size, 0)
    return trips


def rows_to_needed(loads: np.ndarray, sizes: tuple[int, ...]) -> float:
    """Rows of the blocks that cover the loads of experts, divided by the rows routed."""
    trips = trips_of_blocks(loads, sizes)
    rows = sum(size * np.sum(number) for size, number in trips.items())
    return float(rows / np.sum(loads))


def random_loads(tokens: int, shards: int, draws: int = 20) -> np.ndarray:
    """Rows of every expert for the tokens of `shards` devices under random balanced routers.

    Returns int [draws, experts].
    """
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((draws, shards * tokens, EXPERTS)), axis=-1)[..., :TOP_K]
    return (chosen[..., None] == np.arange(EXPERTS)).sum(axis=(1, 2))


def weight_products(text: str, width: int, hidden: int) -> float:
    """FLOPs of products whose result has the shape of an expert's matrix, in an optimised program.

    Every loop over rows counts as one trip.
    """
    total = 0.0
    for inside in parse_hlo(text)[0].values():
        for instruction in inside.values():
            if instruction.op in ("dot", "convolution") and sorted(
                size for size in instruction.arrays[0].shape if size > 1
            ) == sorted((width, hidden)):
                total += product_flops(instruction, inside)
    return total


class Collective(NamedTuple):
    """A collective in the program of a device: bytes of its result, and devices in a group."""

    op: str
    bytes: float
    group: int


def collectives(text: str) -> list[Collective]:
    """All collectives of an optimised program."""
    ops = "ragged-all-to-all|all-to-all|all-gather|reduce-scatter|all-reduce"
    found = []
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({ops})(-start)?\(", line)
        if match is None:
            continue
        arrays = re.findall(r"([a-z]+)(\d+)\[([\d,]*)\]", re.sub(r"/\*.*?\*/", "", match[1]))
        if match[3]:  # A -start operation lists its operands and then its results.
            arrays = arrays[len(arrays) // 2 :]
        size = sum(
            int(bits) / 8 * math.prod(int(n) for n in sizes.split(",") if n)
            for _, bits, sizes in arrays
        )
        # Groups are either listed, {{0,1},{2,3}}, or given by their shape, [2,2].
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
        short = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
        group = int(short[1]) if short else len(listed[1].split(","))
        found.append(Collective(match[2], size, group))
    return found


def sent(exchanged: list[Collective]) -> float:
    """Bytes that leave a device in dense exchanges."""
    total = 0.0
    for collective in exchanged:
        others = collective.group - 1
        if collective.op in ("all-to-all", "all-gather"):
            total += collective.bytes * others / collective.group
        elif collective.op == "reduce-scatter":  # its result is one part, its operand a whole
            total += collective.bytes * others
    return total


def measure(args: argparse.Namespace, topology: str, shards: int, form: str, key: str) -> dict:
    """Compile one program and return its line of the result."""
    started = time.perf_counter()
    program = compiled(args, topology, shards, form, key)
    seconds = time.perf_counter() - started
    text = program.as_text()
    stats, exchanged = read(text), collectives(text)
    here = EXPERTS // shards
    platform = "cpu" if topology.startswith("cpu") else "tpu"
    blocks = grouped.blocks_for(args.tokens * TOP_K // here, platform).sizes
    loads = random_loads(args.tokens, shards)
    # FLOPs of item product in item trip of the loops over all block sizes, for all experts here.
    once = here * sum(blocks) * 2 * args.width * args.hidden
    row = args.width * ITEM
    ragged = [item for item in exchanged if item.op == "ragged-all-to-all"]
    moved = sent(exchanged)
    if ragged:
        moved += LARGE[key] * sent_by_random_router(args.tokens, shards) * row
    minimum = NEEDED[key] * (shards - 1) * reached(shards) * args.tokens * row
    capacity = pair_capacity(args.tokens, shards, here, TOP_K)
    large = [item for item in exchanged if item.bytes >= args.tokens * row / 2]
    return {
        "topology": topology,
        "expert_axis": shards,
        "form": form,
        "pass": key,
        "chosen_by_auto": cheapest_form(args.tokens, capacity) == form,
        "large_exchanges": sum(item.op != "all-reduce" for item in large),
        "gathers_of_weights": sum(
            item.op == "all-gather" and item.bytes >= args.width * args.hidden * ITEM
            for item in exchanged
        ),
        "sent_mib": round(moved / 2**20, 2),
        "minimum_mib": round(minimum / 2**20, 2),
        "sent_to_minimum": round(moved / minimum, 3),
        "products_per_row": round((stats.flops + stats.flops_unknown) / once, 3),
        "products_expected": PRODUCTS[key],
        "weight_products_per_row": round(
            weight_products(text, args.width, args.hidden) * here / once, 3
        ),
        "rows_to_needed": round(rows_to_needed(loads, blocks), 4),
        "blocks": blocks,
        "temporary_mib": round(program.memory_analysis().temp_size_in_bytes / 2**20, 1),
        "compile_seconds": round(seconds, 1),
        "effort": args.effort,
        "source": source(),
        "jax": jax.__version__,
        "collectives": [
            {"op": item.op, "mib": round(item.bytes / 2**20, 3), "group": item.group}
            for item in exchanged
        ],
    }


def source() -> str:
    """A short checksum of the source files that the program of the layer depends on."""
    files = sorted((common.ROOT / "unimoe_jax/nn").rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def table(programs: list[dict]) -> str:
    """Markdown table with a line for every program."""
    lines = [
        "| topology | expert axis | form | pass | large exchanges | gathers of weights "
        "| sent ÷ minimum | products per row (of them for weights) | rows ÷ needed | temporaries |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for program in sorted(programs, key=_key):
        mark = " (auto)" if program["chosen_by_auto"] else ""
        lines.append(
            f"| {program['topology']} | {program['expert_axis']} | {program['form']}{mark} "
            f"| {program['pass']} "
            f"| {program['large_exchanges']} | {program['gathers_of_weights']} "
            f"| {program['sent_to_minimum']:.3f} "
            f"| {program['products_per_row']:.2f} ({program['weight_products_per_row']:.2f}) "
            f"| {program['rows_to_needed']:.3f} | {program['temporary_mib']:.0f} MiB |"
        )
    return "\n".join(lines)


def _key(program: dict) -> tuple:
    """Order of the table: by topology, then the larger expert axis first, then form and pass."""
    return program["topology"], -program["expert_axis"], program["form"], program["pass"]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
    parser.add_argument(
        "--forms",
        nargs="+",
        default=["all_to_all", "ragged"],
        choices=["all_to_all", "ragged", "gather"],
    )
    parser.add_argument("--shards", nargs="+", type=int, default=[8, 4])
    parser.add_argument("--passes", nargs="+", default=list(LARGE), choices=LARGE)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=11008)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens on a device")
    parser.add_argument(
        "--output", type=Path, default=common.ROOT / "benchmarks/results/exchange.json"
    )
    parser.add_argument("--effort", choices=EFFORT, default="quick", help="effort of the compiler")
    parser.add_argument(
        "--again", action="store_true", help="compile programs that FILE holds already again"
    )
    parser.add_argument("--table", action="store_true", help="print the table of FILE only")
    return parser.parse_args()


def already(args: argparse.Namespace, sizes: dict) -> list[dict]:
    """Programs in the output file that need not be compiled again.

    These have the same sizes, source code, version of JAX and effort.
    """
    if args.again or not args.output.exists():
        return []
    result = json.loads(args.output.read_text())
    same = {"source": source(), "jax": jax.__version__, "effort": args.effort}
    programs = result["programs"] if result["sizes"] == sizes else []
    return [program for program in programs if all(program.get(key) == same[key] for key in same)]


def main() -> None:
    """Compile all programs that are missing in the result, and save after every program."""
    args = parse()
    if args.table:
        print(table(json.loads(args.output.read_text())["programs"]))
        return
    set_effort(args.effort)
    sizes = {"experts": EXPERTS, "top_k": TOP_K, "dtype": "bfloat16"}
    sizes |= {"width": args.width, "hidden": args.hidden, "tokens_per_device": args.tokens}
    programs = already(args, sizes)
    result = {"machine": common.machine(), "sizes": sizes, "programs": programs}
    cases = itertools.product(args.topologies, args.shards, args.forms, args.passes)
    for case in cases:
        topology, shards, form, key = case
        if (topology, -shards, form, key) in map(_key, programs):
            continue
        found = measure(args, topology, shards, form, key)
        programs.append(found)
        print(
            f"{topology:<10} expert={shards} {form:<11}{key:<9} sent {found['sent_mib']:8.1f} MiB, "
            f"{found['sent_to_minimum']:.3f} of the minimum; {found['products_per_row']:.2f} "
            f"products per row; {found['large_exchanges']} large exchanges; "
            f"{found['temporary_mib']} MiB of temporaries",
            flush=True,
        )
        common.save(args.output, result)


if __name__ == "__main__":
    main()
