"""How a stage treats every parameter: trained or frozen, dtype, learning rate, sharding.

Parameters are flat dictionaries with `/`-joined paths. So the split into trained and frozen ones,
the shardings, a checkpoint and the parameters for the next stage all have the same form.
`paths.nest` makes the tree that flax needs.
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
    """One parameter and how this stage treats it.

    Attributes:
        axes: one logical axis per dimension; None: the dimension is never sharded.
        lr: multiplier of the learning rate; None: frozen.
        weight_decay: whether the optimizer decays the parameter.
        dtype: the dtype in which it is held.
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    lr: float | None
    weight_decay: bool
    dtype: str

    @property
    def trained(self) -> bool:
        """Whether the stage trains the parameter."""
        return self.lr is not None

    @property
    def size(self) -> int:
        """The number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes of the whole parameter, on all devices together."""
        return self.size * jnp.dtype(self.dtype).itemsize


def declared(model: nn.Module, batch: Any) -> dict[str, tuple[tuple[int, ...], tuple]]:
    """{path: (shape, logical axes)} of every parameter, without computing anything.

    Args:
        batch: arrays or shape structs. It holds every pool, because an encoder whose pool is
            missing is not declared.

    Raises:
        ParamError: a parameter has not one logical axis per dimension. flax would hold it whole on
            every device.
    """
    # Trace the initialisation: shapes and axes are known then, and no array is made.
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
    """Apply a stage's rules to every parameter; the first rule that matches a path decides.

    Args:
        shapes: {path: (shape, logical axes)}, as from `declared`.
        precision: gives the dtype of trained and of frozen parameters.

    Raises:
        ParamError: no rule matches a parameter, or a rule is the first match of no parameter.
    """
    infos: dict[str, ParamInfo] = {}
    used: set[int] = set()
    for path, (shape, axes) in shapes.items():
        index = first_match(rules, path, lambda rule: rule.match)
        if index is None:
            raise ParamError(
                f"train: no rule matches {path!r}; end the rules with "
                '{match: ".*", lr: null}, which freezes all other parameters'
            )
        used.add(index)
        rule = rules[index]
        dtype = precision.frozen if rule.lr is None else precision.trained
        infos[path] = ParamInfo(path, shape, tuple(axes), rule.lr, rule.weight_decay, dtype)
    # A rule without effect is mostly a misspelt path, or it stands behind a broader rule.
    idle = [rule.match for index, rule in enumerate(rules) if index not in used]
    if idle:
        raise ParamError(
            f"train: rules {idle} are the first match of no parameter; correct or remove them"
        )
    return infos


def split(
    flat: Mapping[str, T], infos: Mapping[str, ParamInfo]
) -> tuple[dict[str, T], dict[str, T]]:
    """Split leaves into (trained, frozen). Gradients are taken for the trained leaves only."""
    trained = {path: leaf for path, leaf in flat.items() if infos[path].trained}
    frozen = {path: leaf for path, leaf in flat.items() if not infos[path].trained}
    return trained, frozen


def describe(infos: Mapping[str, ParamInfo], sharding: Mapping[str, Any]) -> str:
    """The parameter table as text: a line per parameter, and the totals in the last line.

    The columns are path, shape, dtype, the mesh axes of every dimension, and the multiplier of the
    learning rate or `frozen`.
    """
    rows = [("path", "shape", "dtype", "sharding", "lr")]
    for path, info in sorted(infos.items()):
        shape = "×".join(map(str, info.shape)) or "scalar"
        spec = ", ".join("-" if part is None else str(part) for part in sharding[path].spec)
        lr = "frozen" if info.lr is None else f"x{info.lr:g}"
        rows.append((path, shape, info.dtype, spec or "-", lr))
    # Pad every column to its widest cell.
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    total = sum(info.size for info in infos.values())
    trained = sum(info.size for info in infos.values() if info.trained)
    lines.append(f"total {total:,} parameters, trained {trained:,} ({trained / total:.1%})")
    return "\n".join(lines) + "\n"
