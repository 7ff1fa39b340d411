"""The optimised HLO text of a compiled program -> its computations and instructions.

`compiled.as_text()` returns such a text. A program is a set of computations: the one that it starts
with, bodies and conditions of loops, branches, and fusions.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"(?:branch_computations=\{([^}]*)\}|(?:true|false)_computation=%?([\w.\-]+))"
)


@dataclass(frozen=True)
class Array:
    """An HLO value.

    layout: `1,0:T(8,128)` has the dimensions from the fastest to the slowest, then the tile to
    which a TPU pads the last two.
    """

    dtype: str
    shape: tuple[int, ...]
    layout: str = field(default="", compare=False)

    @property
    def bytes(self) -> float:
        """Size without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            # The first number is the width: 16 of bf16, 8 of f8e4m3fn.
            bits = int(matched_text(r"(\d+)", self.dtype))
        return math.prod(self.shape) * bits / 8


@dataclass(frozen=True)
class Instruction:
    """One line of HLO. arrays: its result, several for a tuple. rest: operands and attributes."""

    name: str
    op: str
    arrays: tuple[Array, ...]
    rest: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it reads."""
        return re.findall(r"%([\w.\-]+)", _balanced("(" + self.rest))

    def called(self) -> list[str]:
        """Names of the computations that run inside, without branches and loop bodies."""
        return _CALLED.findall(self.rest)

    def branches(self) -> list[str]:
        """Names of the computations of which one runs."""
        names = []
        for listed, single in _BRANCHES.findall(self.rest):
            names += [name.strip(" %") for name in listed.split(",")] if listed else [single]
        return names

    def attribute(self, name: str) -> str | None:
        """The word after `name=`."""
        match = re.search(rf"\b{name}=%?([\w.\-]+)", self.rest)
        return match[1] if match else None

    def required(self, name: str) -> str:
        """The value of an attribute that every instruction of this kind has.

        Raises:
            ValueError: this one has not, so the text is not as this module expects.
        """
        value = self.attribute(name)
        if value is None:
            raise ValueError(f"cannot read the compiled program: {self} has no {name}")
        return value


Computation = dict[str, Instruction]
"""{name: instruction} in the order in which they run; the last one is the result."""
Computations = dict[str, Computation]
"""{name: computation}."""


def parse(text: str) -> tuple[Computations, str]:
    """(computations by name, name of the one that the program starts with)."""
    computations: Computations = {}
    entry, current = "", None
    for line in text.splitlines():
        # A computation begins with an unindented line such as `%body.1 (b: f32[]) -> f32[] {`.
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" ") and "=" not in line.split("(")[0]:
            current = computations.setdefault(head[2], {})
            entry = head[2] if head[1] else entry
        elif current is not None and " = " in line:
            instruction = _instruction(line)
            current[instruction.name] = instruction
    return computations, entry


def _instruction(line: str) -> Instruction:
    """Parse a line such as `ROOT %c = f32[4,8]{1,0} dot(%a, %b), lhs_contracting_dims={1}`."""
    left, right = line.split(" = ", 1)
    # A tuple has its shapes in parentheses.
    shape = _balanced(right) if right.startswith("(") else right.split(" ", 1)[0]
    op, _, rest = right[len(shape) :].strip().partition("(")
    arrays = tuple(
        # A dimension whose size depends on the data is written with its bound: f32[<=8].
        Array(dtype, tuple(int(n.strip("<=")) for n in sizes.split(",") if n), layout)
        for dtype, sizes, layout in _SHAPE.findall(shape)
    )
    return Instruction(left.replace("ROOT", "").strip(" %"), op, arrays, rest)


def _balanced(text: str) -> str:
    """The beginning of `text`, from its opening parenthesis to the one that closes it."""
    depth = 0
    for position, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: position + 1]
    return text


def matched_text(pattern: str, text: str) -> str:
    """The group of a pattern that every valid text has.

    Raises:
        ValueError: the text is no HLO that this module can read.
    """
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"cannot read the compiled program: no {pattern} in {text:.200}")
    return match[1]
