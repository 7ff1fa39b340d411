"""FLOPs and collectives of a compiled program, read from its optimised HLO text.

XLA's own cost analysis counts the body of a loop once. Here a body counts as often as the loop
runs, if the compiler knows that; loops whose number of trips depends on the data are summed apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from unimoe_jax.compile.hlo_text import (
    Computation,
    Computations,
    Instruction,
    matched_text,
    parse,
)

_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
    r"collective-broadcast)(-start)?$"
)


@dataclass
class Collective:
    """One collective operation of the program.

    bytes: what one device sends or receives in one run, whichever of operand and result is larger.
    count: runs per step. group: devices that take part, 0 for all. conditional: whether the
    operation is in a branch that may not run.
    """

    op: str
    name: str
    bytes: float
    count: float
    group: int
    conditional: bool


@dataclass
class Stats:
    """What one device does in one step.

    flops: of matrix products and convolutions. flops_unknown: of one trip of every loop whose
    number of trips depends on the data, which `flops` leaves out. loops_unknown: how many such
    loops there are.
    """

    flops: float = 0.0
    flops_unknown: float = 0.0
    loops_unknown: int = 0
    collectives: list[Collective] = field(default_factory=list)


def read(text: str) -> Stats:
    """Statistics of the HLO module `text`, which is the result of `compiled.as_text()`."""
    computations, entry = parse(text)
    reader = _Reader(computations, Stats())
    reader.walk(entry, 1.0, set(), known=True, conditional=False)
    return reader.stats


# ------------------------------------------------------------------------------------ walking


@dataclass
class _Reader:
    """Walks from computation to computation and adds up statistics."""

    computations: Computations
    stats: Stats

    def walk(
        self,
        name: str,
        count: float,
        seen: set[Hashable],
        *,
        known: bool,
        conditional: bool,
        fused: bool = False,
    ) -> None:
        """Add everything that a computation does when it runs `count` times per step.

        seen: collectives in fusions of the enclosing loop body, see `_add_collective`. known:
        whether `count` is the real number of runs. conditional: whether it may not run at all.
        fused: whether it is part of a fusion.
        """
        inside = self.computations[name]
        for instruction in inside.values():
            flops = count * product_flops(instruction, inside)
            if known:
                self.stats.flops += flops
            else:
                self.stats.flops_unknown += flops
            if _COLLECTIVE.match(instruction.op):
                self._add_collective(instruction, inside, count, seen, conditional, fused)
            elif instruction.op == "while":
                self._walk_loop(instruction, count, known=known, conditional=conditional)
            # Follow calls into other computations.
            elif instruction.op in ("fusion", "call", "async-start"):
                within = fused or instruction.op == "fusion"
                for other in instruction.called():
                    self.walk(
                        other, count, seen, known=known, conditional=conditional, fused=within
                    )
            for other in instruction.branches():
                self.walk(other, count, set(), known=known, conditional=True)

    def _add_collective(
        self,
        instruction: Instruction,
        inside: Computation,
        count: float,
        seen: set[Hashable],
        conditional: bool,
        fused: bool,
    ) -> None:
        """Add a collective, unless it is another part of one that was added before.

        A TPU compiler spreads one collective over several fusions, each of which shows it with the
        same channel, shape and source. Outside of fusions every collective counts. Its channel
        would not identify it, since all collectives of one `shard_map` share a channel.
        """
        key: Hashable = instruction.name
        if fused:
            channel, source = instruction.attribute("channel_id"), _source(instruction)
            key = (channel, instruction.arrays, source)
        if key not in seen:
            self.stats.collectives.append(_collective(instruction, inside, count, conditional))
        seen.add(key)

    def _walk_loop(
        self, loop: Instruction, count: float, *, known: bool, conditional: bool
    ) -> None:
        """Add everything that a loop does; one trip of it if its number of trips is unknown."""
        length = trips(loop, self.computations)
        self.stats.loops_unknown += length is None
        self.walk(
            loop.required("body"),
            count * (length or 1),
            set(),
            known=known and length is not None,
            conditional=conditional or length is None,
        )


# -------------------------------------------------------------------------------- loop trips


def trips(loop: Instruction, computations: Computations) -> int | None:
    """How often a `while` runs; None if that depends on the data.

    Example: a counter that starts at 0, grows by 2 and must stay below 5 gives 3 trips.
    """
    known = re.search(r"known_trip_count\D*(\d+)", loop.rest)
    if known:
        return int(known[1])
    # TPU programs carry no count, but a scan compares a counter that starts at 0 with a constant. A
    # product that passes the parts of an operand round its devices does the same, and its counter
    # may grow by more than 1, because a trip may take several parts.
    inside = computations[loop.required("condition")]
    last = list(inside.values())[-1]
    if last.op != "compare" or last.attribute("direction") != "LT":
        return None
    counter, limit = (_origin(inside, name) for name in last.operands)
    if limit.op != "constant" or counter.op != "get-tuple-element":
        return None
    body = computations[loop.required("body")]
    step = _counter_step(body, int(counter.required("index")))
    return None if step is None else -(-_integer(limit) // step)


def _counter_step(body: Computation, index: int) -> int | None:
    """The constant that a loop's body adds to element `index` of its state; None without one."""
    root = list(body.values())[-1]
    if root.op != "tuple":
        return None
    new = _origin(body, root.operands[index])
    summands = [_origin(body, name) for name in new.operands] if new.op == "add" else []
    steps = [_integer(summand) for summand in summands if summand.op == "constant"]
    old = [summand for summand in summands if summand.op == "get-tuple-element"]
    if len(steps) != 1 or not old or int(old[0].required("index")) != index:
        return None
    return steps[0]


def _origin(inside: Computation, name: str) -> Instruction:
    """The instruction that made a value, behind all copies."""
    instruction = inside[name]
    if instruction.op in ("copy", "bitcast"):
        return _origin(inside, instruction.operands[0])
    return instruction


def _integer(constant: Instruction) -> int:
    """The value of `constant(6)`."""
    return int(constant.rest.partition(")")[0])


# ------------------------------------------------------------------------------- collectives


def _source(instruction: Instruction) -> str:
    """The place in the traced program that made an instruction; empty if the text has none."""
    metadata = re.search(r"metadata=\{([^}]*)\}", instruction.rest)
    return metadata[1] if metadata else ""


def _collective(
    instruction: Instruction, inside: Computation, count: float, conditional: bool
) -> Collective:
    operands = [inside[name] for name in instruction.operands if name in inside]
    sent = sum(array.bytes for operand in operands for array in operand.arrays)
    received = sum(array.bytes for array in instruction.arrays)
    op = instruction.op
    if "-start" in op:
        # The result of an asynchronous start holds the operands again, beside what is received.
        op, received = op.removesuffix("-start"), received - sent
    group = group_size(instruction.rest)
    return Collective(op, instruction.name, max(sent, received), count, group, conditional)


def group_size(rest: str) -> int:
    """Devices per group of a collective; 0 if no groups are written, which means all devices.

    HLO has three notations: `[4,2]<=[8]` is 4 groups of 2; `{{0,1},{2,3}}` lists the groups;
    `mesh['a'=2,'b'=4] {'b'}` is one group along axis b of a mesh, here of 4 devices. An order of
    the mesh's devices, `, device_ids=(…)`, may come before the axes.
    """
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? ?\{([^}]*)\}", rest)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    short = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if short:
        return int(short[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 0


# ----------------------------------------------------------------------------------- products


def product_flops(instruction: Instruction, inside: Computation) -> float:
    """FLOPs of a matrix product or a convolution, two per multiply-add; 0 for anything else."""
    # GPU programs call a library for their matrix products.
    is_library_call = instruction.op == "custom-call" and "__cublas$" in instruction.rest
    if instruction.op not in ("dot", "convolution") and not is_library_call:
        return 0.0
    left, right = (inside[name].arrays[0].shape for name in instruction.operands[:2])
    result = instruction.arrays[0].shape
    if instruction.op == "convolution":
        return _convolution_flops(left, right, result, instruction.rest)
    # `lhs_contracting_dims={1}` of a dot, `"lhs_contracting_dimensions":["1"]` of a library call.
    pattern = r"lhs_contracting_dim(?:s=|ensions\":)[{\[]([^}\]]*)"
    contracted = matched_text(pattern, instruction.rest)
    depth = math.prod(left[int(number)] for number in re.findall(r"\d+", contracted))
    return 2.0 * math.prod(result) * depth


def _convolution_flops(left: tuple, right: tuple, result: tuple, rest: str) -> float:
    """FLOPs of a convolution, without multiplications by padding and by the gaps of dilation.

    A TPU compiler writes matrix products as convolutions, where only such a count is right.
    left, right, result: shapes. rest: says which of their dimensions are batch, features and space,
    as `dim_labels=b0f_0io->b0f`.
    """
    lhs, kernel, out = (
        matched_text(rf"dim_labels={pattern}", rest)
        for pattern in (r"(\w+)_\w+->\w+", r"\w+_(\w+)->\w+", r"\w+_\w+->(\w+)")
    )
    features = result[out.index("f")] * right[kernel.index("i")]
    total = 2.0 * result[out.index("b")] * features
    # Along every dimension of space, count the pairs of output and kernel elements that multiply an
    # element of the input.
    for number, window in enumerate(_windows(rest, sum(letter.isdigit() for letter in lhs))):
        length, outputs = left[lhs.index(str(number))], result[out.index(str(number))]
        total *= _pairs(length, outputs, window)
    return total


@dataclass(frozen=True)
class _Window:
    """How a kernel moves along one dimension.

    size: elements of the kernel. stride: distance of neighbouring outputs. input_dilation,
    kernel_dilation: distance of neighbouring elements. padding: elements before the input.
    """

    size: int
    stride: int
    input_dilation: int
    kernel_dilation: int
    padding: int


def _windows(rest: str, dimensions: int) -> Iterator[_Window]:
    """The window of every dimension, from text such as `window={size=3x5 stride=2x1}`."""
    text = re.search(r"window=\{([^}]*)\}", rest)
    fields = dict(part.split("=") for part in text[1].split()) if text else {}

    def values(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * dimensions

    for size, stride, input_dilation, kernel_dilation, padding in zip(
        values("size", "1"),
        values("stride", "1"),
        values("lhs_dilate", "1"),
        values("rhs_dilate", "1"),
        values("pad", "0_0"),
        strict=True,
    ):
        yield _Window(
            size=int(size),
            stride=int(stride),
            input_dilation=int(input_dilation),
            kernel_dilation=int(kernel_dilation),
            padding=int(padding.split("_")[0]),
        )


def _pairs(length: int, outputs: int, window: _Window) -> int:
    """Pairs of an output and a kernel element that multiply an element of the input.

    Example: 8 inputs, a kernel of 3, stride 2 and padding 1 give 4 outputs. The first one uses 2
    inputs, because its first kernel element is in the padding, and the others use 3: 11 pairs.
    """
    if outputs * window.size > 1 << 22:
        # In a long convolution only the outputs at the ends reach padding, so ignore that.
        return outputs * window.size // window.input_dilation
    last = (length - 1) * window.input_dilation
    count = 0
    for element in range(window.size):
        for output in range(outputs):
            place = output * window.stride + element * window.kernel_dilation - window.padding
            count += 0 <= place <= last and place % window.input_dilation == 0
    return count
