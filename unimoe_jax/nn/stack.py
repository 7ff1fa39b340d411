"""Stacks of layers: scans with parameters stacked on a leading `layers` axis.

A model may mix kinds of layers (experts in every second one). `layer_runs` cuts the list of kinds
into runs of a repeated period, each run is one scan over its period, and `where_is` tells where a
layer's parameters lie, for conversion, upcycling and inspection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn

from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.sharding import current_platform

CPU_UNROLL = 8
"""Longest stack whose layers follow one another in a CPU's program, see `scan_layers`."""


@dataclass(frozen=True)
class Run:
    """`repeats` times the kinds in `period`."""

    period: tuple[bool, ...]
    repeats: int


def layer_runs(kinds: Sequence[bool]) -> tuple[Run, ...]:
    """Cut `kinds` (one flag per layer) into as few periodic runs as a greedy search finds.

    All equal: one run of period 1. Alternating: one run of period 2 (plus a run for an odd tail).
    """
    runs: list[Run] = []
    rest = tuple(kinds)
    while rest:
        best = (1, Run(rest[:1], 1))
        for period in (1, 2, 3, 4):
            pattern = rest[:period]
            if len(pattern) < period:
                break
            repeats = 1
            while rest[repeats * period : (repeats + 1) * period] == pattern:
                repeats += 1
            covered = repeats * period
            if covered > best[0] and (repeats > 1 or period == 1):
                best = (covered, Run(pattern, repeats))
        runs.append(best[1])
        rest = rest[best[0] :]
    return tuple(runs)


@dataclass(frozen=True)
class Place:
    """Layer `index` of the stacked parameters under `run_{run}/block_{block}`."""

    run: int
    block: int
    index: int

    @property
    def prefix(self) -> str:
        return f"run_{self.run}/block_{self.block}"


def where_is(kinds: Sequence[bool]) -> tuple[Place, ...]:
    """The place of every layer, in layer order."""
    places = []
    for number, run in enumerate(layer_runs(kinds)):
        for repeat in range(run.repeats):
            places += [Place(number, block, repeat) for block in range(len(run.period))]
    return tuple(places)


def scan_layers(
    block: type[nn.Module],
    length: int,
    remat: bool,
    name: str,
    *,
    options: LayerOptions,
    **fields: Any,
) -> nn.Module:
    """`length` copies of `block(options=…, **fields)` with parameters stacked under `name`.

    remat: the backward pass computes each layer again.

    A loop over layers copies each layer's weights out of their stack and what the backward pass
    keeps into one: 7 to 15 % of a train step on CPUs, where short stacks therefore are no loop.
    With remat they stay one, or the compiler would find the layers computed again in the first
    computation and keep that; on accelerators the program of each layer would take compile time.

    `block.__call__(carry, layer_input, *shared) -> (carry, output)`: `layer_input` is scanned over
    its leading axis (or None), `shared` goes to every layer, outputs are stacked.
    """
    if remat:
        block = nn.remat(block, prevent_cse=False)
    unrolled = not remat and length <= CPU_UNROLL and current_platform() == "cpu"
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True, "router": True},
        in_axes=(0, nn.broadcast),
        out_axes=0,
        length=length,
        unroll=length if unrolled else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(options=replace(options, keep_hidden=not remat), **fields, name=name)
