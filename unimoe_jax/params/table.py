"""Parameters as flat dictionaries of `/`-joined paths: what trains, dtypes, the parameter table.

Flat dictionaries make a stage's split, its sharding, its checkpoint and its hand-over the same kind
of object; `nest` makes the tree that the model applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.config import PrecisionConfig, Rule
from unimoe_jax.params.paths import ParamError, T, first_match, flatten


@dataclass(frozen=True)
class ParamInfo:
    """One parameter: shape, logical axes, and how this stage treats it."""

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    lr: float | None
    weight_decay: bool
    dtype: str

    @property
    def trained(self) -> bool:
        return self.lr is not None

    @property
    def size(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        return self.size * jnp.dtype(self.dtype).itemsize


def declared(model: nn.Module, batch: Any) -> dict[str, tuple[tuple[int, ...], tuple]]:
    """{path: (shape, logical axes)} of every parameter, without computing anything.

    `batch` holds arrays or shape structs for every pool, so that every encoder is declared.

    Raises:
        ParamError: a parameter without a logical axis for every dimension; flax would replicate it.
    """
    keys = {name: jax.random.key(0) for name in ("params", "dropout", "router")}
    boxed = jax.eval_shape(model.init, keys, batch)["params"]
    specs = flatten(nn.get_partition_spec(boxed))
    shapes = flatten(nn.meta.unbox(boxed))
    for path, leaf in shapes.items():
        if len(specs[path]) != leaf.ndim:
            raise ParamError(f"{path!r}: shape {leaf.shape}, but logical axes {tuple(specs[path])}")
    return {path: (leaf.shape, tuple(specs[path])) for path, leaf in shapes.items()}


def parameter_infos(
    shapes: Mapping[str, tuple[tuple[int, ...], tuple]],
    rules: Sequence[Rule],
    precision: PrecisionConfig,
) -> dict[str, ParamInfo]:
    """What happens to every parameter in a stage.

    Raises:
        ParamError: a parameter that no rule covers, or a rule that is the first match of nothing.
    """
    infos: dict[str, ParamInfo] = {}
    used: set[int] = set()
    for path, (shape, axes) in shapes.items():
        index = first_match(rules, path, lambda rule: rule.match)
        if index is None:
            raise ParamError(
                f'train: no rule matches {path!r}; end the rules with {{match: ".*", lr: null}}'
            )
        used.add(index)
        rule = rules[index]
        dtype = precision.frozen if rule.lr is None else precision.trained
        infos[path] = ParamInfo(path, shape, tuple(axes), rule.lr, rule.weight_decay, dtype)
    idle = [rule.match for index, rule in enumerate(rules) if index not in used]
    if idle:
        raise ParamError(f"train: rules {idle} are the first match of no parameter")
    return infos


def split(
    flat: Mapping[str, T], infos: Mapping[str, ParamInfo]
) -> tuple[dict[str, T], dict[str, T]]:
    """(trained, frozen) leaves. Gradients are taken for the first part only."""
    trained = {path: leaf for path, leaf in flat.items() if infos[path].trained}
    frozen = {path: leaf for path, leaf in flat.items() if not infos[path].trained}
    return trained, frozen


def describe(infos: Mapping[str, ParamInfo], sharding: Mapping[str, Any]) -> str:
    """The parameter table as text: path, shape, dtype, sharding, multiplier or frozen, totals."""
    rows = [("path", "shape", "dtype", "sharding", "lr")]
    for path, info in sorted(infos.items()):
        shape = "×".join(map(str, info.shape)) or "scalar"
        spec = ", ".join("-" if part is None else str(part) for part in sharding[path].spec)
        lr = "frozen" if info.lr is None else f"x{info.lr:g}"
        rows.append((path, shape, info.dtype, spec or "-", lr))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = sum(info.size for info in infos.values())
    trained = sum(info.size for info in infos.values() if info.trained)
    lines.append(f"total {total:,} parameters, trained {trained:,} ({trained / total:.1%})")
    return "\n".join(lines) + "\n"
