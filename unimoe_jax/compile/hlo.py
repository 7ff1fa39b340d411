"""What a compiled program does, read from its optimised HLO text: products and collectives.

XLA's own cost analysis counts the body of a loop once; here it counts as often as the loop runs,
where the compiler knows that. Loops whose number of trips depends on the data are kept apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COLLECTIVE = re.compile(
    r"(all-gather|all-reduce|reduce-scatter|all-to-all|ragged-all-to-all|collective-permute|"
    r"collective-broadcast)(-start)?$"
)
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)


@dataclass(frozen=True)
class Array:
    """dtype, shape and layout of an HLO value, as `1,0:T(8,128)`: dimensions from the fastest."""

    dtype: str
    shape: tuple[int, ...]
    layout: str = field(default="", compare=False)

    @property
    def bytes(self) -> float:
        digits = re.search(r"\d+", self.dtype)
        bits = _BITS.get(self.dtype) if self.dtype in _BITS else int(digits[0])
        return math.prod(self.shape) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of HLO. `arrays`: its result, several for a tuple; `rest`: operands, attributes."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    rest: str

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", _balanced("(" + self.rest))

    def called(self) -> list[str]:
        """Computations that run inside, branches aside."""
        return _CALLED.findall(self.rest)

    def branches(self) -> list[str]:
        """Computations of which one runs."""
        names = []
        for several, one in _BRANCHES.findall(self.rest):
            names += [name.strip(" %") for name in several.split(",")] if several else [one]
        return names

    def attribute(self, name: str) -> str | None:
        """The word after `name=`."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return found[1] if found else None


@dataclass
class Collective:
    """One collective operation of the program.

    bytes: what one device sends or receives in one run of it, as the larger of operand and result;
    count: runs per step; group: devices that take part; conditional: in a branch that may not run.
    """

    op: str
    name: str
    bytes: float
    count: float
    group: int
    conditional: bool


@dataclass
class Stats:
    """flops: of matrix products and convolutions per device and step. flops_unknown: of one trip of
    every loop whose trips depend on the data; they are not in `flops`."""

    flops: float = 0.0
    flops_unknown: float = 0.0
    loops_unknown: int = 0
    collectives: list[Collective] = field(default_factory=list)


def read(text: str) -> Stats:
    """Statistics of the HLO module `text`, as `compiled.as_text()` gives it."""
    computations, entry = parse(text)
    reader = _Reader(computations, Stats())
    reader.walk(entry, 1.0, set(), known=True, conditional=False)
    return reader.stats


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """({computation: {instruction: …}} in the order they run, the name of the first to run)."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" ") and "=" not in line.split("(")[0]:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    left, right = line.split(" = ", 1)
    shape = _balanced(right) if right.startswith("(") else right.split(" ", 1)[0]
    op, _, rest = right[len(shape) :].strip().partition("(")
    arrays = tuple(
        Array(dtype, tuple(int(n.strip("<=")) for n in sizes.split(",") if n), layout)
        for dtype, sizes, layout in _SHAPE.findall(shape)
    )
    return Instruction(left.replace("ROOT", "").strip(" %"), op, arrays, rest)


def _balanced(text: str) -> str:
    """The parenthesis that `text` starts with, to its end."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: at + 1]
    return text


Computations = dict[str, dict[str, Instruction]]


@dataclass
class _Reader:
    computations: Computations
    stats: Stats

    def walk(
        self,
        name: str,
        count: float,
        met: set,
        *,
        known: bool,
        conditional: bool,
        fused: bool = False,
    ) -> None:
        """Add what computation `name` does when it runs `count` times.

        met: collectives in fusions of the enclosing loop body. A TPU compiler spreads one
        collective over several fusions, each of which shows it with the same channel, shape and
        source. Outside of fusions every collective is one of its own; channels do not tell them
        apart, since all that stem from `shard_map` have the same.
        """
        inside = self.computations[name]
        for one in inside.values():
            flops = count * product_flops(one, inside)
            if known:
                self.stats.flops += flops
            else:
                self.stats.flops_unknown += flops
            kind = _COLLECTIVE.match(one.op)
            if kind:
                key = (one.attribute("channel_id"), one.arrays, _source(one)) if fused else one.name
                if key not in met:
                    found = _collective(one, kind[1], inside, count, conditional)
                    self.stats.collectives.append(found)
                met.add(key)
            elif one.op == "while":
                self._loop(one, count, known=known, conditional=conditional)
            elif one.op in ("fusion", "call", "async-start"):
                within = fused or one.op == "fusion"
                for other in one.called():
                    self.walk(other, count, met, known=known, conditional=conditional, fused=within)
            for other in one.branches():
                self.walk(other, count, set(), known=known, conditional=True)

    def _loop(self, one: Instruction, count: float, *, known: bool, conditional: bool) -> None:
        length = trips(one, self.computations)
        self.stats.loops_unknown += length is None
        self.walk(
            one.attribute("body"),
            count * (length or 1),
            set(),
            known=known and length is not None,
            conditional=conditional or length is None,
        )


def trips(one: Instruction, computations: Computations) -> int | None:
    """How often a `while` runs; None where that depends on the data."""
    known = re.search(r"known_trip_count\D*(\d+)", one.rest)
    if known:
        return int(known[1])
    # A scan counts from 0 up to a constant. So does a product that passes the parts of an operand
    # round its devices, but it may take several of them in a trip.
    inside = computations[one.attribute("condition")]
    last = list(inside.values())[-1]
    if last.op != "compare" or last.attribute("direction") != "LT":
        return None
    counter, limit = (_copied(inside, name) for name in last.operands)
    if limit.op != "constant" or counter.op != "get-tuple-element":
        return None
    step = _step(computations[one.attribute("body")], int(counter.attribute("index")))
    return None if step is None else -(-_integer(limit) // step)


def _step(body: dict[str, Instruction], index: int) -> int | None:
    """What a loop's body adds to element `index` of what it carries; None if it is no constant."""
    root = list(body.values())[-1]
    if root.op != "tuple":
        return None
    new = _copied(body, root.operands[index])
    parts = [_copied(body, name) for name in new.operands] if new.op == "add" else []
    steps = [_integer(part) for part in parts if part.op == "constant"]
    old = [part for part in parts if part.op == "get-tuple-element"]
    if len(steps) != 1 or not old or int(old[0].attribute("index")) != index:
        return None
    return steps[0]


def _copied(inside: dict[str, Instruction], name: str) -> Instruction:
    """Where a value comes from, copies aside."""
    one = inside[name]
    return _copied(inside, one.operands[0]) if one.op in ("copy", "bitcast") else one


def _integer(constant: Instruction) -> int:
    return int(constant.rest.partition(")")[0])


def _source(one: Instruction) -> str:
    """Where in the traced program an instruction comes from, as far as the text says."""
    metadata = re.search(r"metadata=\{([^}]*)\}", one.rest)
    return metadata[1] if metadata else ""


def _collective(
    one: Instruction, op: str, inside: dict[str, Instruction], count: float, conditional: bool
) -> Collective:
    operands = [inside[name] for name in one.operands if name in inside]
    sent = sum(array.bytes for operand in operands for array in operand.arrays)
    # A start's result holds the operands again, beside what will be received.
    received = sum(array.bytes for array in one.arrays) - (sent if "-start" in one.op else 0)
    return Collective(op, one.name, max(sent, received), count, group_size(one.rest), conditional)


def group_size(rest: str) -> int:
    """Devices per group: `[4,2]<=[8]` is 4 groups of 2, `{{0,1},{2,3}}` lists them, and
    `mesh['a'=2,'b'=4] {'b'}` names the axes of a mesh, whose devices may stand in an order of their
    own (`, device_ids=(…)` before the axes); without groups all devices, as 0."""
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\S+)? ?\{([^}]*)\}", rest)
    if mesh:
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", mesh[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", mesh[2]))
    short = re.search(r"replica_groups=\[(\d+),(\d+)\]", rest)
    if short:
        return int(short[2])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", rest)
    return len(listed[1].split(",")) if listed else 0


# -------------------------------------------------------------------------------- products


def product_flops(one: Instruction, inside: dict[str, Instruction]) -> float:
    """Of one instruction, if it is a matrix product or a convolution; else 0."""
    library = one.op == "custom-call" and "__cublas$" in one.rest  # a GPU's matrix products
    if one.op not in ("dot", "convolution") and not library:
        return 0.0
    left, right = (inside[name].arrays[0].shape for name in one.operands[:2])
    result = one.arrays[0].shape
    if one.op == "convolution":
        return _convolution(left, right, result, one.rest)
    contracted = re.search(r"lhs_contracting_dim(?:s=|ensions\":)[{\[]([^}\]]*)", one.rest)[1]
    depth = math.prod(left[int(number)] for number in re.findall(r"\d+", contracted))
    return 2.0 * math.prod(result) * depth


def _convolution(left: tuple, right: tuple, result: tuple, rest: str) -> float:
    """Multiply-adds with elements that exist, twice; TPU compilers write products this way."""
    lhs, kernel, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", rest).groups()
    features = result[out.index("f")] * right[kernel.index("i")]
    total = 2.0 * result[out.index("b")] * features
    for number, window in enumerate(_windows(rest, sum(letter.isdigit() for letter in lhs))):
        sizes = (left[lhs.index(str(number))], result[out.index(str(number))])
        total *= _positions(*sizes, **window)
    return total


def _windows(rest: str, dimensions: int) -> Iterator[dict[str, int]]:
    text = re.search(r"window=\{([^}]*)\}", rest)
    parts = dict(part.split("=") for part in text[1].split()) if text else {}

    def values(name: str, default: str) -> list[str]:
        return parts[name].split("x") if name in parts else [default] * dimensions

    columns = ("size", "1"), ("stride", "1"), ("lhs_dilate", "1"), ("rhs_dilate", "1")
    rows = zip(*(values(*column) for column in columns), values("pad", "0_0"), strict=True)
    for size, stride, base, dilation, pad in rows:
        yield {
            "size": int(size),
            "stride": int(stride),
            "base": int(base),
            "dilation": int(dilation),
            "low": int(pad.split("_")[0]),
        }


def _positions(
    length: int, outputs: int, *, size: int, stride: int, base: int, dilation: int, low: int
) -> int:
    """Pairs of an output and a kernel element that meet an element of the input."""
    if outputs * size > 1 << 22:  # long plain convolutions: all but the rims meet
        return outputs * size // base
    last = (length - 1) * base
    count = 0
    for k in range(size):
        for o in range(outputs):
            at = o * stride + k * dilation - low
            count += 0 <= at <= last and at % base == 0
    return count
