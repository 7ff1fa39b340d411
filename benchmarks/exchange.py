"""What the expert layer exchanges and multiplies on TPUs: their compiler's word, without one.

    pip install -e '.[tpu]'
    python benchmarks/exchange.py [--topologies v5e:2x4 v5p:2x2x2 v6e:2x4] [--output FILE] [--again]
    python benchmarks/exchange.py --table

For every topology, form of exchange and size of the expert axis, the layer is compiled ahead of
time, forward and with all gradients. Bytes are what one device sends to others; the minimum is each
token once to every other device that holds one of its experts, and its result back (and in training
the gradients the same way). Padded buffers are counted whole; of ragged ones the rows that a random
balanced router sends. Products per row: of the layer's three matrices, 3 are needed forward, and 6
more for all gradients, while 2 are repeated backward instead of keeping their results. Of these,
`weight_products_per_row` are the gradients of weights: 3 are needed. `rows_to_needed` is the mean
over random balanced routers of the rows multiplied, the padding of an expert's last block among
them, divided by the rows routed. Programs that FILE holds for the same sizes and the same source of
the layer are not compiled again.
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
# Rows of tokens exchanged, in widths of a token: x and y; x, g and dx.
LARGE = {"forward": 2, "gradient": 5}
# Of those, what no form can do without: x and y; in training g and dx as well.
NEEDED = {"forward": 2, "gradient": 4}
PRODUCTS = {"forward": 3, "gradient": 11}


def compiled(args: argparse.Namespace, topology: str, shards: int, form: str, key: str):
    """The layer for the devices of a topology, with `shards` of them on the expert axis."""
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
        placed = batch_sharding(mesh, 3)
        lasts = ((args.width, jnp.bfloat16), (TOP_K, jnp.float32), (TOP_K, jnp.int32))
        x, weight, expert = (
            jax.ShapeDtypeStruct((len(devices), args.tokens, last), dtype, sharding=placed)
            for last, dtype in lasts
        )

        def layer(weights, x, weight, expert):
            return moe_ffn(expert_fn, weights, x, expert, weight, np.uint32(0), "grouped", form)

        def loss(*values):
            return jnp.sum(jnp.sin(layer(*values).astype(jnp.float32)))

        function = layer if key == "forward" else jax.grad(loss, argnums=(0, 1, 2))
        return jax.jit(function).lower(weights, x, weight, expert).compile()


def reached(shards: int) -> float:
    """Share of tokens that a balanced router sends to a given device of the expert axis."""
    outside = EXPERTS - EXPERTS // shards
    return 1 - math.comb(outside, TOP_K) / math.comb(EXPERTS, TOP_K)


def sent_by_random_router(tokens: int, shards: int) -> float:
    """Rows that one device sends to others, the mean over those of a random balanced router."""
    rng, here = np.random.default_rng(0), EXPERTS // shards
    expert = np.argsort(rng.random((shards, tokens, EXPERTS)), axis=-1)[..., :TOP_K]
    goes = ((expert // here)[..., None] == np.arange(shards)).any(axis=2)
    goes[np.arange(shards), :, np.arange(shards)] = False
    return float(goes.sum() / shards)


def trips_of_blocks(loads: np.ndarray, sizes: tuple[int, ...]) -> dict[int, np.ndarray]:
    """Blocks of every size that cover the loads of experts, shaped like `loads`."""
    left, trips = loads.astype(np.int64), {}
    for size in sizes:
        trips[size] = grouped.block_trips(left, size, sizes[-1])
        left = np.maximum(left - trips[size] * size, 0)
    return trips


def rows_to_needed(loads: np.ndarray, sizes: tuple[int, ...]) -> float:
    """Rows of the blocks that cover the loads of experts, in relation to the rows routed."""
    trips = trips_of_blocks(loads, sizes)
    rows = sum(size * np.sum(number) for size, number in trips.items())
    return float(rows / np.sum(loads))


def random_loads(tokens: int, shards: int, draws: int = 20) -> np.ndarray:
    """Rows of every expert, of the tokens of `shards` devices, under random balanced routers."""
    rng = np.random.default_rng(0)
    chosen = np.argsort(rng.random((draws, shards * tokens, EXPERTS)), axis=-1)[..., :TOP_K]
    return (chosen[..., None] == np.arange(EXPERTS)).sum(axis=(1, 2))


def weight_products(text: str, width: int, hidden: int) -> float:
    """FLOPs of the products in an optimised program whose result has the shape of an expert's
    matrix, one trip of every loop over rows."""
    total = 0.0
    for inside in parse_hlo(text)[0].values():
        for one in inside.values():
            if one.op in ("dot", "convolution") and sorted(
                size for size in one.arrays[0].shape if size > 1
            ) == sorted((width, hidden)):
                total += product_flops(one, inside)
    return total


class Collective(NamedTuple):
    """One in the program of a device, with the bytes of its result and the size of its groups."""

    op: str
    bytes: float
    group: int


def collectives(text: str) -> list[Collective]:
    """All in an optimised program."""
    ops = "ragged-all-to-all|all-to-all|all-gather|reduce-scatter|all-reduce"
    found = []
    for line in text.splitlines():
        match = re.search(rf" = (.*?) ({ops})(-start)?\(", line)
        if match is None:
            continue
        arrays = re.findall(r"([a-z]+)(\d+)\[([\d,]*)\]", re.sub(r"/\*.*?\*/", "", match[1]))
        if match[3]:  # operands, then results
            arrays = arrays[len(arrays) // 2 :]
        size = sum(
            int(bits) / 8 * math.prod(int(n) for n in sizes.split(",") if n)
            for _, bits, sizes in arrays
        )
        listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
        short = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
        group = int(short[1]) if short else len(listed[1].split(","))
        found.append(Collective(match[2], size, group))
    return found


def sent(found: list[Collective]) -> float:
    """Bytes that leave a device in dense exchanges."""
    total = 0.0
    for one in found:
        if one.op in ("all-to-all", "all-gather"):
            total += one.bytes * (one.group - 1) / one.group
        elif one.op == "reduce-scatter":
            total += one.bytes * (one.group - 1)
    return total


def measure(args: argparse.Namespace, topology: str, shards: int, form: str, key: str) -> dict:
    """One program."""
    started = time.perf_counter()
    program = compiled(args, topology, shards, form, key)
    seconds = time.perf_counter() - started
    text = program.as_text()
    stats, exchanged = read(text), collectives(text)
    here = EXPERTS // shards
    platform = "cpu" if topology.startswith("cpu") else "tpu"
    blocks = grouped.blocks_for(args.tokens * TOP_K // here, platform).sizes
    loads = random_loads(args.tokens, shards)
    once = here * sum(blocks) * 2 * args.width * args.hidden
    row = args.width * ITEM
    ragged = [one for one in exchanged if one.op == "ragged-all-to-all"]
    moved = sent(exchanged)
    if ragged:
        moved += LARGE[key] * sent_by_random_router(args.tokens, shards) * row
    minimum = NEEDED[key] * (shards - 1) * reached(shards) * args.tokens * row
    capacity = pair_capacity(args.tokens, shards, here, TOP_K)
    large = [one for one in exchanged if one.bytes >= args.tokens * row / 2]
    return {
        "topology": topology,
        "expert_axis": shards,
        "form": form,
        "pass": key,
        "chosen_by_auto": cheapest_form(args.tokens, capacity) == form,
        "large_exchanges": sum(one.op != "all-reduce" for one in large),
        "gathers_of_weights": sum(
            one.op == "all-gather" and one.bytes >= args.width * args.hidden * ITEM
            for one in exchanged
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
            {"op": one.op, "mib": round(one.bytes / 2**20, 3), "group": one.group}
            for one in exchanged
        ],
    }


def source() -> str:
    """What the layer's program depends on here, as a short sum."""
    files = sorted((common.ROOT / "unimoe_jax/nn").glob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]


def table(programs: list[dict]) -> str:
    """Markdown, a line per program."""
    lines = [
        "| topology | expert axis | form | pass | large exchanges | gathers of weights "
        "| sent ÷ minimum | products per row (of them for weights) | rows ÷ needed | temporaries |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(programs, key=_key):
        mark = " (auto)" if one["chosen_by_auto"] else ""
        lines.append(
            f"| {one['topology']} | {one['expert_axis']} | {one['form']}{mark} | {one['pass']} "
            f"| {one['large_exchanges']} | {one['gathers_of_weights']} "
            f"| {one['sent_to_minimum']:.3f} "
            f"| {one['products_per_row']:.2f} ({one['weight_products_per_row']:.2f}) "
            f"| {one['rows_to_needed']:.3f} | {one['temporary_mib']:.0f} MiB |"
        )
    return "\n".join(lines)


def _key(one: dict) -> tuple:
    return one["topology"], -one["expert_axis"], one["form"], one["pass"]


def parse() -> argparse.Namespace:
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
    parser.add_argument("--tokens", type=int, default=2048, help="on a device")
    parser.add_argument(
        "--output", type=Path, default=common.ROOT / "benchmarks/results/exchange.json"
    )
    parser.add_argument("--effort", choices=EFFORT, default="quick", help="of the compiler")
    parser.add_argument("--again", action="store_true", help="also what FILE holds already")
    parser.add_argument("--table", action="store_true", help="print FILE as a table, no more")
    return parser.parse_args()


def already(args: argparse.Namespace, sizes: dict) -> list[dict]:
    """Programs in the output file that need not be compiled again."""
    if args.again or not args.output.exists():
        return []
    result = json.loads(args.output.read_text())
    same = {"source": source(), "jax": jax.__version__, "effort": args.effort}
    programs = result["programs"] if result["sizes"] == sizes else []
    return [one for one in programs if all(one.get(key) == same[key] for key in same)]


def main() -> None:
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
