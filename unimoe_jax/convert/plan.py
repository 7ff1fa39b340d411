"""A conversion plan: which source tensor fills which slice of which parameter.

`resolve_plan` checks everything that can be checked from names and shapes, before any tensor is
read. `read_slice` then reads one tensor at a time.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
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
    """The model that the source folders make, and the copies that fill it.

    Attributes:
        family: name of the family, for messages and the manifest.
        model: declares the parameters. Modules outside of `parts` may be placeholders.
        parts: prefixes of the paths of the parameters that are converted.
        groups: group name -> tensors of that group.
        copies: in load order; a later copy overrides an earlier one into the same slice. Copies
            whose source tensor does not exist are allowed.
        excuses: source tensors that may stay unused.
        config: content of model.yaml.
        files: name -> tokenizer or processor file that is copied.
        notes: decisions that the manifest records.
        rounding: how numbers are rounded; None keeps them as they are.
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
        """The source tensor `group:name`, or None if there is no such tensor."""
        group, name = src.split(":", 1)
        return self.groups.get(group, {}).get(name)

    def existing(self, src: str) -> Tensor:
        """The source tensor `group:name`.

        Raises:
            ConvertError: there is no such tensor.
        """
        tensor = self.tensor(src)
        if tensor is None:
            raise ConvertError(f"{self.family}: source tensor {src!r} is missing")
        return tensor


@dataclass(frozen=True)
class Target:
    """One parameter and, by leading index, the copies that fill it (`fills`)."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    fills: Mapping[tuple[int, ...], Copy]

    @property
    def nbytes(self) -> int:
        """Size of the parameter in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * np_dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Resolution:
    """A plan that has passed all checks.

    Attributes:
        targets: path -> parameter.
        overridden: source tensor -> the later one that fills its slice instead.
        excused: unused source tensor -> the reason why nothing is lost without it.
    """

    plan: ConversionPlan
    targets: Mapping[str, Target]
    overridden: Mapping[str, str]
    excused: Mapping[str, str]


# Weights of other dtypes (integers, float8) may be quantised, and no table reads their scales.
FLOATS = ("float32", "bfloat16", "float16", "float64")


def parameter_shapes(model: ModelConfig, parts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Path -> shape of the model's parameters whose path begins with one of `parts`.

    Raises:
        ConvertError: the settings give sizes that no array can have.
    """
    # Flax declares the parameters without allocating them; only absurd sizes overflow.
    try:
        shapes = declared(UniMoE(model, LayerOptions(lora=model.lora)), full_batch(model))
    except OverflowError as error:
        raise ConvertError(f"config.json: sizes beyond any model: {error}") from error
    return {
        path: shape for path, (shape, _) in sorted(shapes.items()) if path.startswith(tuple(parts))
    }


def resolve_plan(plan: ConversionPlan, dtype: str = "source") -> Resolution:
    """Match copies with source tensors and parameters, and check that nothing is left over.

    Args:
        dtype: dtype of the parameters. "source" keeps the dtype of the source tensors; a parameter
            whose tensors have different dtypes becomes float32.

    Raises:
        ConvertError: a tensor has the wrong shape or dtype, a parameter is not filled completely,
            or a source tensor is neither used nor excused.
    """
    if plan.rounding is not None:
        if dtype != "source":
            raise ConvertError(
                f"--dtype {dtype} and --numerics released exclude each other; leave one of them out"
            )
        dtype = plan.rounding.after[-1]
    # Fill the slices in load order; a later copy replaces an earlier one.
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
                f"{tensor.file}: tensor {copy.src!r} belongs to parameter {copy.dst!r}, which the "
                "model does not have"
            )
        _check_shape(plan, copy, tensor, shapes[copy.dst])
        earlier = fills[copy.dst].get(copy.index)
        if earlier is not None and earlier.src != copy.src:
            overridden[earlier.src] = copy.src
        fills[copy.dst][copy.index] = copy
    # A tensor that is overridden in one slice may still fill another one.
    for slots in fills.values():
        for copy in slots.values():
            used |= {copy.src, *_adapter_sources(copy)}
    overridden = {src: by for src, by in overridden.items() if src not in used}
    # Every slice needs a tensor, and every tensor a slice or an excuse.
    _check_filled(plan, shapes, fills)
    excused = _unused(plan, used, overridden)
    targets = {
        path: Target(path, shape, _dtype(plan, fills[path], dtype), fills[path])
        for path, shape in shapes.items()
    }
    return Resolution(plan, targets, overridden, excused)


def _adapter_sources(copy: Copy) -> tuple[str, ...]:
    """Source tensors of a copy's adapter, if it has one."""
    return (copy.adapter.a, copy.adapter.b) if copy.adapter else ()


def _check_shape(plan: ConversionPlan, copy: Copy, tensor: Tensor, target: tuple[int, ...]) -> None:
    """Check dtype and shape of a source tensor and of its adapter.

    target: shape of the whole parameter.
    """
    if tensor.dtype not in FLOATS:
        raise ConvertError(
            f"{tensor.file}: tensor {tensor.name!r} of shape {tensor.shape} is {tensor.dtype}; "
            f"weights must be {', '.join(FLOATS)}"
        )
    expected = copy.source_shape(target)
    if tensor.shape != expected:
        raise ConvertError(
            f"{tensor.file}: tensor {tensor.name!r} has shape {tensor.shape}, but parameter "
            f"{copy.dst!r} of shape {target} needs {expected}"
        )
    if copy.adapter is None:
        return
    # An adapter is A [R, in] and B [out, R] for a matrix [out, in].
    a, b = plan.tensor(copy.adapter.a), plan.tensor(copy.adapter.b)
    if a is None or b is None:
        missing = copy.adapter.a if a is None else copy.adapter.b
        raise ConvertError(
            f"{plan.family}: source tensor {missing!r} is missing, but the other half of the "
            "adapter is there"
        )
    if a.shape[1:] != expected[1:] or b.shape != (expected[0], a.shape[0]):
        raise ConvertError(
            f"{a.file}: adapters {a.name!r} {a.shape} and {b.name!r} {b.shape} do not fit "
            f"{tensor.name!r} of shape {tensor.shape}"
        )


def _check_filled(plan: ConversionPlan, shapes: Mapping, fills: Mapping) -> None:
    """Check that every slice of every parameter has a copy."""
    for path, shape in shapes.items():
        # All copies of a parameter have leading indices of one length: layer, expert, or both.
        num_leading = len(next(iter(fills[path]), ()))
        slots = set(itertools.product(*(range(size) for size in shape[:num_leading])))
        missing = sorted(slots - set(fills[path]))
        if missing:
            candidates = sorted({copy.src for copy in plan.copies if copy.dst == path})
            absent = [src for src in candidates if plan.tensor(src) is None]
            raise ConvertError(
                f"{plan.family}: parameter {path!r} of shape {shape} is not filled at {missing[:4]}"
                f"; missing source tensors: {absent[:4]}"
            )


def _unused(plan: ConversionPlan, used: set[str], overridden: Mapping[str, str]) -> dict[str, str]:
    """Unused source tensor -> its excuse.

    Raises:
        ConvertError: an unused tensor has no excuse, so a weight would silently be lost.
    """
    excused, without_excuse = {}, []
    for group, tensors in plan.groups.items():
        for name, tensor in tensors.items():
            src = f"{group}:{name}"
            if src in used or src in overridden:
                continue
            # The first excuse that fits gives the reason.
            reason = next((e.reason for e in plan.excuses if re.fullmatch(e.match, src)), None)
            if reason is None:
                without_excuse.append(f"{tensor.file}: {name!r} of shape {tensor.shape}")
            else:
                excused[src] = reason
    if without_excuse:
        raise ConvertError(
            f"{plan.family}: {len(without_excuse)} source tensors are not used: "
            + "; ".join(without_excuse[:4])
        )
    return excused


def _dtype(plan: ConversionPlan, fills: Mapping[Any, Copy], dtype: str) -> str:
    """dtype of a parameter; `dtype` and the rule for "source" are those of `resolve_plan`."""
    if dtype != "source":
        return dtype
    dtypes = {plan.existing(copy.src).dtype for copy in fills.values()}
    return dtypes.pop() if len(dtypes) == 1 else "float32"


# ---------------------------------------------------------------------------------- reading


def read_slice(plan: ConversionPlan, copy: Copy) -> np.ndarray:
    """One source tensor in the layout of its slice, with its adapter added.

    Adapters are added in float32, then the sum is rounded to the source's dtype, as PEFT does.
    Without adapters and rounding the result is a view of the file.

    Returns:
        An array of the source tensor's dtype or, with rounding, of the last dtype of the rounding.
    """
    value = plan.existing(copy.src).read()
    if plan.rounding is not None:
        value = value.astype(np_dtype(plan.rounding.before))
    if copy.adapter is not None:
        # PEFT: W + scale · B A, in place, so that one float32 matrix is allocated.
        a, b = (plan.existing(name).read() for name in (copy.adapter.a, copy.adapter.b))
        update = b.astype(np.float32) @ a.astype(np.float32)
        update *= copy.adapter.scale
        update += value
        value = update.astype(value.dtype, copy=False)
    for dtype in plan.rounding.after if plan.rounding is not None else ():
        value = value.astype(np_dtype(dtype))
    return copy.forward(value)


def release_slice(plan: ConversionPlan, copy: Copy) -> None:
    """Give the pages that `read_slice` has read back to the system."""
    for src in (copy.src, *_adapter_sources(copy)):
        plan.existing(src).release()
