"""A conversion worked out before any tensor is read: which source fills which slice of what.

`resolve` checks everything that can be checked from names and shapes; `read_param` and
`read_slice` then read one tensor at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_jax.config import ModelConfig
from unimoe_jax.convert.entry import Copy, Excuse, Rounding
from unimoe_jax.convert.reader import ConvertError, Tensor, Tensors, np_dtype
from unimoe_jax.models.declare import full_batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params.table import declared


@dataclass(frozen=True)
class ConversionPlan:
    """What a family's table makes of the given folders.

    Attributes:
        family: for messages and the manifest.
        model: declares the parameters. Parts of it may be placeholders, see `parts`.
        parts: prefixes of the parameters that are converted.
        groups: group name -> its tensors.
        copies: in load order; a later copy into the same slice overrides.
        excuses: source tensors that may stay unused.
        config: what goes to model.yaml.
        files: name -> tokenizer or processor file to be copied.
        notes: decisions worth a line in the manifest.
        rounding: None: numbers stay as they are.
    """

    family: str
    model: ModelConfig
    parts: tuple[str, ...]
    groups: Mapping[str, Tensors]
    copies: Sequence[Copy]
    excuses: Sequence[Excuse]
    config: Mapping[str, Any]
    files: Mapping[str, Path] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rounding: Rounding | None = None

    def tensor(self, src: str) -> Tensor | None:
        """The source tensor `group:name`, if there is one."""
        group, name = src.split(":", 1)
        return self.groups.get(group, {}).get(name)


@dataclass(frozen=True)
class Target:
    """One parameter and the copies that fill it, by leading index."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    fills: Mapping[tuple[int, ...], Copy]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Resolution:
    """A plan found complete: targets by path, and why other source tensors are not used."""

    plan: ConversionPlan
    targets: Mapping[str, Target]
    overridden: Mapping[str, str]
    excused: Mapping[str, str]


FLOATS = ("float32", "bfloat16", "float16", "float64")


def parameter_shapes(model: ModelConfig, parts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the model's parameters below `parts`.

    Raises:
        ConvertError: sizes that no array can have.
    """
    try:
        shapes = declared(UniMoE(model, LayerOptions(lora=model.lora)), full_batch(model))
    except OverflowError as error:
        raise ConvertError(f"config.json: sizes beyond any model: {error}") from error
    return {
        path: shape for path, (shape, _) in sorted(shapes.items()) if path.startswith(tuple(parts))
    }


def resolve_plan(plan: ConversionPlan, dtype: str = "source") -> Resolution:
    """Match copies with tensors and parameters.

    Args:
        dtype: of the parameters; "source" keeps it where all parts of a parameter agree, and
            takes float32 where they do not.

    Raises:
        ConvertError: a tensor of the wrong shape, an unfilled parameter, an unused tensor.
    """
    if plan.rounding is not None:
        if dtype != "source":
            raise ConvertError(f"--dtype {dtype} and --numerics released exclude each other")
        dtype = plan.rounding.after[-1]
    shapes = parameter_shapes(plan.model, plan.parts)
    fills: dict[str, dict[tuple[int, ...], Copy]] = {path: {} for path in shapes}
    used: set[str] = set()
    overridden: dict[str, str] = {}
    for copy in plan.copies:
        tensor = plan.tensor(copy.src)
        if tensor is None:
            continue
        if copy.dst not in shapes:
            raise ConvertError(
                f"{tensor.file}: tensor {copy.src!r} goes to {copy.dst!r}, which the model lacks"
            )
        _check_shape(plan, copy, tensor, shapes[copy.dst])
        before = fills[copy.dst].get(copy.index)
        if before is not None and before.src != copy.src:
            overridden[before.src] = copy.src
        fills[copy.dst][copy.index] = copy
    for slots in fills.values():
        for copy in slots.values():
            used |= {copy.src, *((copy.adapter.a, copy.adapter.b) if copy.adapter else ())}
    overridden = {src: by for src, by in overridden.items() if src not in used}
    _check_filled(plan, shapes, fills)
    excused = _unused(plan, used, overridden)
    targets = {
        path: Target(path, shape, _dtype(plan, fills[path], dtype), fills[path])
        for path, shape in shapes.items()
    }
    return Resolution(plan, targets, overridden, excused)


def _check_shape(plan: ConversionPlan, copy: Copy, tensor: Tensor, target: tuple[int, ...]) -> None:
    if tensor.dtype not in FLOATS:
        raise ConvertError(
            f"{tensor.file}: tensor {tensor.name!r} of shape {tensor.shape} is {tensor.dtype}; "
            f"weights are {', '.join(FLOATS)}"
        )
    expected = copy.source_shape(target)
    if tensor.shape != expected:
        raise ConvertError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, but {copy.dst!r} of "
            f"shape {target} needs {expected}"
        )
    if copy.adapter is None:
        return
    a, b = (plan.tensor(name) for name in (copy.adapter.a, copy.adapter.b))
    for name, found in ((copy.adapter.a, a), (copy.adapter.b, b)):
        if found is None:
            raise ConvertError(f"{plan.family}: {name!r} is missing, half of an adapter")
    if a.shape[1:] != expected[1:] or b.shape != (expected[0], a.shape[0]):
        raise ConvertError(
            f"{a.file}: adapters {a.name!r} {a.shape} and {b.name!r} {b.shape} do not fit "
            f"{tensor.name!r} of shape {tensor.shape}"
        )


def _check_filled(plan: ConversionPlan, shapes: Mapping, fills: Mapping) -> None:
    for path, shape in shapes.items():
        tried = sorted({copy.src for copy in plan.copies if copy.dst == path})
        rank = len(next(iter(fills[path]), ()))
        slots = set(itertools.product(*(range(size) for size in shape[:rank])))
        missing = sorted(slots - set(fills[path]))
        if missing:
            lacking = [src for src in tried if plan.tensor(src) is None]
            raise ConvertError(
                f"{plan.family}: parameter {path!r} of shape {shape} is not filled at {missing[:4]}"
                f"; missing source tensors: {lacking[:4]}"
            )


def _unused(plan: ConversionPlan, used: set[str], overridden: Mapping[str, str]) -> dict[str, str]:
    excused, idle = {}, []
    for group, tensors in plan.groups.items():
        for name, tensor in tensors.items():
            src = f"{group}:{name}"
            if src in used or src in overridden:
                continue
            reason = next((e.reason for e in plan.excuses if re.fullmatch(e.match, src)), None)
            if reason is None:
                idle.append(f"{tensor.file}: {name!r} of shape {tensor.shape}")
            else:
                excused[src] = reason
    if idle:
        raise ConvertError(
            f"{plan.family}: {len(idle)} source tensors are not used: " + "; ".join(idle[:4])
        )
    return excused


def _dtype(plan: ConversionPlan, fills: Mapping[Any, Copy], dtype: str) -> str:
    if dtype != "source":
        return dtype
    found = {plan.tensor(copy.src).dtype for copy in fills.values()}
    return found.pop() if len(found) == 1 else "float32"


# ---------------------------------------------------------------------------------- reading


def read_slice(plan: ConversionPlan, copy: Copy) -> np.ndarray:
    """One source tensor in the layout of its slice, of its own dtype, adapters added.

    The sum is taken in float32 and rounded to the source's dtype, as PEFT merges. Without adapters
    and rounding this is a view of the file.
    """
    value = plan.tensor(copy.src).read()
    if plan.rounding is not None:
        value = value.astype(np_dtype(plan.rounding.before))
    if copy.adapter is not None:
        a, b = (plan.tensor(name).read() for name in (copy.adapter.a, copy.adapter.b))
        update = b.astype(np.float32) @ a.astype(np.float32)
        update *= copy.adapter.scale
        update += value
        value = update.astype(value.dtype, copy=False)
    for dtype in plan.rounding.after if plan.rounding is not None else ():
        value = value.astype(np_dtype(dtype))
    return copy.forward(value)


def release_slice(plan: ConversionPlan, copy: Copy) -> None:
    """Give back the pages of what `read_slice` has read."""
    for src in (copy.src, *((copy.adapter.a, copy.adapter.b) if copy.adapter else ())):
        plan.tensor(src).release()


def slices(plan: ConversionPlan, target: Target) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
    """(leading index, slice) of a parameter, one at a time, in the order of the index."""
    for index in sorted(target.fills):
        yield index, read_slice(plan, target.fills[index]).astype(np_dtype(target.dtype))


def read_param(plan: ConversionPlan, target: Target) -> np.ndarray:
    """A whole parameter."""
    value = np.empty(target.shape, np_dtype(target.dtype))
    for index, part in slices(plan, target):
        value[index] = part
    return value


def read_all(resolution: Resolution) -> dict[str, np.ndarray]:
    """Every parameter, in memory: for small models and tests."""
    return {path: read_param(resolution.plan, t) for path, t in resolution.targets.items()}
