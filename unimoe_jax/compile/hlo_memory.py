"""What the forward pass keeps for the backward pass, read from a program's optimised HLO text.

A compiler plans one heap for everything that a program makes on the way and says its size only. In
it lie the activations: what operations of the forward pass make and operations of the backward pass
read. JAX names the former `…/jvp(…)/…`, the latter `…/transpose(jvp(…))/…`; what has neither name
belongs to the latter if it depends on one of them. All of it exists at the moment when the backward
pass begins.
"""

from __future__ import annotations

import re

from unimoe_jax.compile.hlo import Array, Computations, Instruction, parse

_BACKWARD = "transpose("
_FORWARD = "jvp("
# Names for values or parts of them, which take no memory of their own.
_NAMES = ("get-tuple-element", "tuple", "bitcast", "opt-barrier")
_COPIES = ("copy", "copy-start", "copy-done")
# Results that are the same in every run where operands are: room for sums, or what starts them.
_FILLED = ("constant", "iota", "broadcast", "fusion", "convert", *_COPIES, *_NAMES)

_HOLDERS = ("while", "call", "conditional")

Value = tuple[str, int]  # an instruction, and which of its arrays


def activation_bytes(text: str) -> int:
    """Bytes per device of what forward operations make and backward ones read.

    Weights and the batch, which a program is given, are not among them; copies of weights in
    another dtype are, where both passes read the same one. Sizes are those of the layout: TPUs pad
    the last dimensions. What a rematerialised layer makes anew inside the backward pass does not
    count. A loop over micro-batches holds those of one micro-batch. 0 without a backward pass.
    """
    computations, entry = parse(text)
    return _Reader(computations).kept(entry)


def occupied(array: Array) -> int:
    """Bytes in the device's main memory; 0 for what lies in another, as a TPU's vector memory."""
    order, _, rest = array.layout.partition(":")
    if re.search(r"S\([1-9]\d*\)", rest):
        return 0
    shape = list(array.shape)
    tile = re.search(r"T\(([\d,]+)\)", rest)
    if tile and order:
        dimensions = [int(number) for number in order.split(",")]
        for dimension, size in zip(dimensions, reversed(tile[1].split(",")), strict=False):
            shape[dimension] = -(-shape[dimension] // int(size)) * int(size)
    return round(Array(array.dtype, tuple(shape)).bytes)


class _Reader:
    def __init__(self, computations: Computations):
        self.computations = computations
        self.names: dict[str, frozenset[str]] = {}

    def kept(self, name: str) -> int:
        """Of the passes in computation `name`, or of those in a loop of it that holds both."""
        inside = self.computations[name]
        filled: set[str] = set()  # with constants: whatever the names say, of neither pass
        backward: set[str] = set()
        kept: set[Value] = set()
        nested = 0
        for one in inside.values():  # operands come before what reads them
            operands = [other for other in one.operands if other in inside]
            if _is_room(one) or (one.op in _FILLED and filled.issuperset(operands)):
                filled.add(one.name)
                continue
            held = self.passes(one)
            if len(held) == 2 and one.op in _HOLDERS:
                nested += sum(self.kept(other) for other in self.called(one))
            # A forward operation may depend on a backward one, where collectives were combined.
            if _BACKWARD not in held and (held or not backward.intersection(operands)):
                continue
            backward.add(one.name)
            if one.op not in _NAMES:
                kept.update(*(self.values(inside, operand) for operand in operands))
        kept = {value for value in kept if value[0] not in backward | filled}
        return nested + sum(occupied(inside[name].arrays[index]) for name, index in kept)

    def called(self, one: Instruction) -> list[str]:
        """Computations that run inside of an instruction."""
        names = (*one.called(), *one.branches(), one.attribute("body"))
        return [name for name in names if name in self.computations]

    def passes(self, one: Instruction) -> frozenset[str]:
        """Which of the two passes an instruction belongs to: by its name, else by what it calls.

        A loop's own name goes first: constants in it may have been shared with the other pass.
        """
        found = _pass_of(one)
        return found or frozenset().union(*(self.passes_inside(name) for name in self.called(one)))

    def passes_inside(self, name: str) -> frozenset[str]:
        """The same of a computation."""
        if name not in self.names:
            inside = self.computations[name].values()
            self.names[name] = frozenset().union(*(self.passes(one) for one in inside))
        return self.names[name]

    def values(self, inside: dict[str, Instruction], name: str) -> list[Value]:
        """What instruction `name` stands for, without what the program was given."""
        found = (self.origin(inside, name, index) for index in range(len(inside[name].arrays)))
        return [value for value in found if value and inside[value[0]].op != "parameter"]

    def origin(self, inside: dict[str, Instruction], name: str, index: int) -> Value | None:
        """Where array `index` of an instruction was made."""
        while name in inside:
            one = inside[name]
            operands = [other for other in one.operands if other in inside]
            elsewhere = all(not occupied(array) for array in one.arrays)
            if one.op == "tuple":
                # Arrays of the operands, one after the other.
                for operand in operands:
                    if index < len(inside[operand].arrays):
                        break
                    index -= len(inside[operand].arrays)
                name = operand
            elif one.op == "get-tuple-element":
                name, index = operands[0], _offset(one, inside[operands[0]])
            elif one.op == "while" and self.unchanged(one, index):
                name = operands[0]
            elif one.op in ("bitcast", "opt-barrier") or (one.op in _COPIES and elsewhere):
                name, index = operands[0], index if one.op == "opt-barrier" else 0
            else:
                return name, index
        return None

    def unchanged(self, loop: Instruction, index: int) -> bool:
        """Whether a loop hands array `index` on as it is."""
        body = self.computations[loop.attribute("body")]
        root = list(body.values())[-1]
        if root.op != "tuple" or index >= len(root.operands):
            return False
        one = body.get(root.operands[index])
        if one is None or one.op != "get-tuple-element" or one.attribute("index") != str(index):
            return False
        return body[one.operands[0]].op == "parameter"


def _pass_of(one: Instruction) -> frozenset[str]:
    name = re.search(r'op_name="([^"]*)"', one.rest)
    if name is None:
        return frozenset()
    backward, forward = _BACKWARD in name[1], _FORWARD in name[1]
    return frozenset([_BACKWARD] if backward else [_FORWARD] if forward else [])


def _is_room(one: Instruction) -> bool:
    return one.op == "custom-call" and '"AllocateBuffer"' in one.rest


def _offset(one: Instruction, operand: Instruction) -> int:
    """Which of the operand's arrays a get-tuple-element begins with."""
    # Tuples in tuples occur with asynchronous operations only, whose parts are of one kind.
    return min(int(one.attribute("index")), len(operand.arrays) - 1)
