"""Stacks of layers: scans over parameters that are stacked on a leading `layers` axis.

A model may mix kinds of layers, for example experts in every second layer. `layer_runs` cuts the
list of kinds into runs of a repeated pattern, and each run becomes one scan over its repetitions.
`where_is` computes where the parameters of a layer are stored, for conversion, upcycling and
inspection.

Example: five layers of the kinds (moe, dense, moe, dense, moe) become a run of (moe, dense)
repeated twice and a run of (moe) repeated once. Layer 3 is dense; it is stored in run 0, block 1,
at index 1: `run_0/block_1`, second row of every stacked array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import flax.linen as nn

from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.parallel.sharding import current_platform

CPU_UNROLL = 8
"""On CPUs a stack of at most so many layers is unrolled and is no loop, see `scan_layers`."""

LONGEST_PERIOD = 4
"""The longest repeated pattern of layers that `layer_runs` looks for."""


@dataclass(frozen=True)
class Run:
    """A sequence of layers: the kinds in `period`, `repeats` times."""

    period: tuple[bool, ...]
    repeats: int


def layer_runs(kinds: Sequence[bool]) -> tuple[Run, ...]:
    """Cut `kinds` (one flag per layer) into few periodic runs, by a greedy search.

    Layers that are all of one kind become one run of period 1. Alternating layers become one run of
    period 2, and a second run for the last layer if their number is odd.
    """
    runs: list[Run] = []
    rest = tuple(kinds)
    while rest:
        # Without any repetition the next layer becomes a run of its single kind.
        best_run, best_length = Run(rest[:1], 1), 1
        for period in range(1, LONGEST_PERIOD + 1):
            pattern = rest[:period]
            if len(pattern) < period:
                break
            # Count how often the pattern follows itself from here on.
            repeats = 1
            while rest[repeats * period : (repeats + 1) * period] == pattern:
                repeats += 1
            length = repeats * period
            if length > best_length and (repeats > 1 or period == 1):
                best_run, best_length = Run(pattern, repeats), length
        runs.append(best_run)
        rest = rest[best_length:]
    return tuple(runs)


@dataclass(frozen=True)
class Place:
    """Where a layer is stored: row `index` of the parameters under `run_{run}/block_{block}`."""

    run: int
    block: int
    index: int

    @property
    def prefix(self) -> str:
        """The path of the block, which holds this layer and others of its kind."""
        return f"run_{self.run}/block_{self.block}"


def where_is(kinds: Sequence[bool]) -> tuple[Place, ...]:
    """Return the place of every layer, in layer order."""
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
    """Return `length` copies of `block(options=…, **fields)`, with parameters stacked under `name`.

    `block.__call__(carry, layer_input, *shared)` returns (carry, output). `layer_input` is scanned
    over its leading axis (or is None), every layer receives all of `shared`, and the outputs are
    stacked.

    Whether the layers become a loop depends on the platform. A loop copies each layer's weights out
    of their stack, and copies what the backward pass keeps into a stack. On CPUs these copies take
    7 to 15 % of a train step, so short stacks are unrolled there. Stacks with `remat` stay loops,
    because the compiler would otherwise recognise that the recomputed layers equal the first
    computation, and would keep the results of the first computation in memory. On accelerators
    stacks stay loops as well, because compiling a separate program for every layer takes long.

    Args:
        block: the module class of one layer.
        length: the number of layers.
        remat: whether the backward pass computes each layer again instead of keeping its results.
        name: the name of the stack inside the calling module.
        options: the settings of the run; `keep_hidden` is replaced by `not remat`.
        fields: the other attributes of `block`.
    """
    if remat:
        block = nn.remat(block, prevent_cse=False)
    unrolled = not remat and length <= CPU_UNROLL and current_platform() == "cpu"
    # `nn.scan` takes one entry per argument here, although its annotation allows a single int only.
    in_axes: Any = (0, nn.broadcast)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True, "router": True},
        in_axes=in_axes,
        out_axes=0,
        length=length,
        unroll=length if unrolled else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(options=replace(options, keep_hidden=not remat), **fields, name=name)
