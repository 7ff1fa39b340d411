"""What the forward pass keeps for the backward pass, read from a program's optimised HLO text.

A compiler plans one heap for everything that a program computes and only reports its total size.
Part of the heap are the activations: results of forward operations that backward operations read.
All of them exist at the moment when the backward pass begins.

JAX names forward operations `…/jvp(…)/…` and backward operations `…/transpose(jvp(…))/…`. An
operation with neither name belongs to the backward pass if it depends on a backward operation.
"""

from __future__ import annotations

import re

from unimoe_jax.compile.hlo_text import Array, Computation, Computations, Instruction, parse

_BACKWARD = "transpose("
_FORWARD = "jvp("
# Operations that only rename a value or a part of it and allocate nothing.
_RENAMES = ("get-tuple-element", "tuple", "bitcast", "opt-barrier")
_COPIES = ("copy", "copy-start", "copy-done")
# Operations whose result is constant if their operands are: initial sums, empty buffers.
_CONSTANT_IF_OPERANDS_ARE = (
    "constant",
    "iota",
    "broadcast",
    "fusion",
    "convert",
    *_COPIES,
    *_RENAMES,
)
# Operations that may hold both passes.
_HOLDERS = ("while", "call", "conditional")

Value = tuple[str, int]
"""(name of an instruction, which of its arrays)."""


def activation_bytes(text: str) -> int:
    """Bytes per device that forward operations write and backward operations read.

    text: HLO, as `compiled.as_text()` returns it. Details of the count:
    - Arguments of the program, such as weights and the batch, do not count. A copy of the weights
      in another dtype counts if both passes read the same copy.
    - Sizes include the padding of the layout: TPUs pad the last dimensions.
    - Results of a rematerialised layer that are computed again in the backward pass do not count.
    - A loop over micro-batches holds the activations of one micro-batch.
    - A program without a backward pass has none, and the result is 0.
    """
    computations, entry = parse(text)
    return _Reader(computations).kept_bytes(entry)


def occupied(array: Array) -> int:
    """Bytes in the device's main memory, padding included; 0 for an array in another memory.

    Example: f32[3,5,1] in the layout `2,1,0:T(8,128)` is padded to [3,8,128] and takes 12288 bytes.
    A memory other than the main one, such as a TPU's vector memory, is written as `S(1)`.
    """
    order, _, rest = array.layout.partition(":")
    if re.search(r"S\([1-9]\d*\)", rest):
        return 0
    shape = list(array.shape)
    tile = re.search(r"T\(([\d,]+)\)", rest)
    if tile and order:
        # The layout begins with the fastest dimension, the tile ends with it.
        dimensions = [int(number) for number in order.split(",")]
        for dimension, size in zip(dimensions, reversed(tile[1].split(",")), strict=False):
            shape[dimension] = -(-shape[dimension] // int(size)) * int(size)
    return round(Array(array.dtype, tuple(shape)).bytes)


class _Reader:
    """Answers questions about the computations of one program."""

    def __init__(self, computations: Computations):
        self.computations = computations
        self._passes: dict[str, frozenset[str]] = {}

    def kept_bytes(self, name: str) -> int:
        """Bytes that the forward operations of a computation keep for its backward operations.

        If a loop inside holds both passes, such as the loop over micro-batches, its bytes are
        added.
        """
        inside = self.computations[name]
        constant: set[str] = set()  # belong to neither pass, whatever their names say
        backward: set[str] = set()
        kept: set[Value] = set()
        nested_bytes = 0
        for instruction in inside.values():  # operands come before the operations that read them
            operands = [operand for operand in instruction.operands if operand in inside]
            if _is_buffer(instruction) or (
                instruction.op in _CONSTANT_IF_OPERANDS_ARE and constant.issuperset(operands)
            ):
                constant.add(instruction.name)
                continue
            passes = self.passes(instruction)
            if len(passes) == 2 and instruction.op in _HOLDERS:
                nested_bytes += sum(self.kept_bytes(other) for other in self.called(instruction))
            # An operation without a name is a backward one if it depends on one. A name decides
            # before that: combined collectives make forward operations depend on backward ones.
            depends = bool(backward.intersection(operands))
            if _BACKWARD not in passes and (passes or not depends):
                continue
            backward.add(instruction.name)
            if instruction.op not in _RENAMES:
                kept.update(*(self.values(inside, operand) for operand in operands))
        kept = {value for value in kept if value[0] not in backward | constant}
        return nested_bytes + sum(occupied(inside[name].arrays[index]) for name, index in kept)

    def called(self, instruction: Instruction) -> list[str]:
        """Names of the computations that run inside an instruction."""
        names = (*instruction.called(), *instruction.branches(), instruction.attribute("body"))
        return [name for name in names if name in self.computations]

    def passes(self, instruction: Instruction) -> frozenset[str]:
        """The passes that an instruction belongs to: by its name, else by everything it calls.

        The name of a loop decides first, because the compiler may have shared constants inside of
        it with the other pass.
        """
        found = _pass_of(instruction)
        if found:
            return found
        return frozenset().union(*(self._passes_inside(name) for name in self.called(instruction)))

    def _passes_inside(self, name: str) -> frozenset[str]:
        """The passes of all instructions of a computation."""
        if name not in self._passes:
            inside = self.computations[name].values()
            self._passes[name] = frozenset().union(*(self.passes(one) for one in inside))
        return self._passes[name]

    # ----------------------------------------------------------------------------- origins

    def values(self, inside: Computation, name: str) -> list[Value]:
        """The values behind the arrays of an instruction, without arguments of the computation."""
        origins = (self.origin(inside, name, index) for index in range(len(inside[name].arrays)))
        return [value for value in origins if value and inside[value[0]].op != "parameter"]

    def origin(self, inside: Computation, name: str, index: int) -> Value | None:
        """The instruction that wrote array `index` of instruction `name`.

        Goes back through tuples, renamings, loops that pass the array on unchanged, and copies into
        other memories. None if the text does not show it.
        """
        while name in inside:
            instruction = inside[name]
            operands = [operand for operand in instruction.operands if operand in inside]
            in_other_memory = all(not occupied(array) for array in instruction.arrays)
            if instruction.op == "tuple":
                name, index = _tuple_element(inside, operands, index)
            elif instruction.op == "get-tuple-element":
                name, index = operands[0], _offset(instruction, inside[operands[0]])
            elif instruction.op == "opt-barrier" or self.is_unchanged(instruction, index):
                name = operands[0]
            elif instruction.op == "bitcast" or (instruction.op in _COPIES and in_other_memory):
                name, index = operands[0], 0
            else:
                return name, index
        return None

    def is_unchanged(self, instruction: Instruction, index: int) -> bool:
        """Whether an instruction is a loop that passes array `index` of its state on as it is."""
        if instruction.op != "while":
            return False
        body = self.computations[instruction.required("body")]
        root = list(body.values())[-1]
        if root.op != "tuple" or index >= len(root.operands):
            return False
        element = body.get(root.operands[index])
        if element is None or element.op != "get-tuple-element":
            return False
        is_same = element.attribute("index") == str(index)
        return is_same and body[element.operands[0]].op == "parameter"


def _pass_of(instruction: Instruction) -> frozenset[str]:
    """The pass that an instruction's name says; empty if it says none."""
    name = re.search(r'op_name="([^"]*)"', instruction.rest)
    if name is None:
        return frozenset()
    # Backward names contain the forward one: transpose(jvp(…)).
    if _BACKWARD in name[1]:
        return frozenset([_BACKWARD])
    return frozenset([_FORWARD] if _FORWARD in name[1] else [])


def _is_buffer(instruction: Instruction) -> bool:
    """Whether an instruction only reserves memory, which a later one fills."""
    return instruction.op == "custom-call" and '"AllocateBuffer"' in instruction.rest


def _tuple_element(inside: Computation, operands: list[str], index: int) -> Value:
    """The operand of a tuple, and which of its arrays, that array `index` of the tuple is.

    A tuple holds all arrays of its operands, one after the other. Example: with operands of 1 and 2
    arrays, array 2 of the tuple is array 1 of the second operand.
    """
    for operand in operands[:-1]:
        count = len(inside[operand].arrays)
        if index < count:
            return operand, index
        index -= count
    return operands[-1], index


def _offset(instruction: Instruction, operand: Instruction) -> int:
    """Which of the operand's arrays a get-tuple-element begins with.

    The index counts elements, and an element that is a tuple itself has several arrays. This only
    occurs with asynchronous operations, whose arrays are all of one kind, so any of them will do.
    """
    return min(int(instruction.required("index")), len(operand.arrays) - 1)
