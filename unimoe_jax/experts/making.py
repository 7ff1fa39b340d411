"""What each command makes: {member: {inner index: part}}. Nothing is read here but routers' shapes.

An inner index is `(e,)` in parameters that stack experts, else `()`.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from unimoe_jax.config import ModuleName, MoEConfig
from unimoe_jax.convert.reader import ConvertError, np_dtype
from unimoe_jax.experts.opening import Opened, Part
from unimoe_jax.params.layer_parts import ROUTER, LayerPart

Content = dict[LayerPart, dict[tuple[int, ...], Part]]
FIRST_LAYERS = ("up_proj/kernel", "fc1/kernel")
"""The linear layer of an expert that reads what its router reads."""


@dataclass(frozen=True)
class Made:
    """A checkpoint to be: content, decoder layers with experts, model settings, expert origins."""

    content: Content
    moe_layers: tuple[bool, ...]
    config: Mapping[str, Any]
    experts: Mapping[str, Sequence[str]]


def place_experts(
    base: Opened,
    experts: Sequence[Opened],
    moe: Mapping[ModuleName, MoEConfig],
    seed: int,
) -> Made:
    """Experts in the modules of `moe`: expert e of each layer is that layer of `experts[e]`.

    Everything else comes from `base`; routers start at random. With `base` as every expert this is
    sparse upcycling.

    Raises:
        ConvertError: the base has experts there, or no such layers, or the seed is negative;
            ParamError: an expert's checkpoint lacks a layer.
    """
    if seed < 0:
        raise ConvertError(f"--seed {seed}: allowed: 0 or more")
    kinds = _kinds(base, moe)
    content: Content = {}
    for member in base.members:
        place = member.module in moe and (member.module != "decoder" or kinds[member.layer])
        if not place or member.experts is None:
            content[member] = {(): base.part(member)}
            continue
        parts = {(e,): source.part(member) for e, source in enumerate(experts)}
        _check_shapes(member, base, parts)
        content[member.experts] = parts
        if member.experts.expert in FIRST_LAYERS:
            router, part = _fresh_router(member, base, moe[member.module], seed)
            content[router] = {(): part}
    for module in moe:
        if not any(m.module == module and m.expert is not None for m in content):
            raise ConvertError(f"{base.where}: has no feed-forward layers in its {module}")
    settings = {module: config.model_dump(mode="json") for module, config in moe.items()}
    names = [source.name for source in experts]
    return Made(content, kinds, _with_moe(base.config, settings), dict.fromkeys(moe, names))


def _kinds(base: Opened, moe: Mapping[ModuleName, MoEConfig]) -> tuple[bool, ...]:
    for module in moe:
        if base.num_experts(module):
            raise ConvertError(
                f"{base.where}: its {module} has {base.num_experts(module)} experts already; "
                "`split` makes one of them dense, `prune` removes some"
            )
    if "decoder" not in moe:
        return base.moe_layers
    count = len(base.moe_layers)
    return tuple(moe["decoder"].is_moe_layer(layer, count) for layer in range(count))


def _check_shapes(member: LayerPart, base: Opened, parts: Mapping[Any, Part]) -> None:
    wanted = base.part(member).shape
    for part in parts.values():
        if part.shape != wanted:
            raise ConvertError(
                f"{part.origin}: {member} has shape {part.shape}, {base.where} has {wanted}"
            )


def _fresh_router(
    member: LayerPart, base: Opened, moe: MoEConfig, seed: int
) -> tuple[LayerPart, Part]:
    """A router for the layer of `member`, as `nn.moe.Router` would start it."""
    dense = base.part(member)
    shape = (dense.shape[0], moe.num_experts)
    # The seed belongs to the layer: what else the checkpoint holds does not change its router.
    key = (seed, *str(member._replace(rest="")).encode())

    def read() -> np.ndarray:
        generator = np.random.default_rng(key)
        if moe.router.init == "fan_in":
            value = generator.uniform(-1, 1, shape) / np.sqrt(shape[0])
        else:
            value = generator.normal(0, moe.router.init_std, shape)
        return value.astype(np_dtype(dense.dtype))

    router = member._replace(rest=ROUTER + "linear/kernel")
    return router, Part(shape, dense.dtype, f"fresh, seed {seed}", read)


def one_expert(base: Opened, modules: Collection[ModuleName], expert: int, whole: bool) -> Made:
    """Expert `expert` of every layer as a dense layer; `whole`: with the rest of the model.

    Raises:
        ConvertError: a module without experts, or without this one.
    """
    for module in modules:
        _check_choice(base, module, [expert])
    content: Content = {}
    for member in base.members:
        if member.module not in modules:
            if whole:
                content[member] = {(): base.part(member)}
        elif member.expert is not None:
            content[member.dense] = {(): base.part(member, expert)}
        elif not member.is_router and (whole or member.experts is not None):
            content[member] = {(): base.part(member)}
    kinds = base.moe_layers
    if "decoder" in modules:
        kinds = (False,) * len(kinds)
    config = _with_moe(base.config, dict.fromkeys(modules))
    return Made(content, kinds, config, {})


def fewer_experts(
    base: Opened, modules: Collection[ModuleName], keep: Sequence[int], top_k: int | None
) -> Made:
    """Only the experts `keep`, in that order, with their rows of the router.

    Raises:
        ConvertError: a module without one of them, or `top_k` above their number.
    """
    for module in modules:
        _check_choice(base, module, keep)
    if top_k is not None and not 1 <= top_k <= len(keep):
        raise ConvertError(f"--top-k {top_k}: allowed with {len(keep)} experts: 1..{len(keep)}")
    content: Content = {}
    for member in base.members:
        if member.module in modules and member.expert is not None:
            content[member] = {(new,): base.part(member, old) for new, old in enumerate(keep)}
        elif member.module in modules and member.is_router and "modality_map" not in member.rest:
            content[member] = {
                (): _columns(base.part(member), keep, base.num_experts(member.module))
            }
        else:
            content[member] = {(): base.part(member)}
    settings = {}
    for module in modules:
        before = moe_of(base.config, module) or {}
        chosen = min(top_k or before.get("top_k", 2), len(keep))
        settings[module] = before | {"num_experts": len(keep), "top_k": chosen}
    names = [f"{base.name} expert {old}" for old in keep]
    config = _with_moe(base.config, settings)
    return Made(content, base.moe_layers, config, dict.fromkeys(modules, names))


def _columns(part: Part, keep: Sequence[int], count: int) -> Part:
    """The kept experts' outputs of a router; what does not end in experts stays as it is."""
    if part.shape[-1] != count:
        return part
    shape = (*part.shape[:-1], len(keep))
    return Part(shape, part.dtype, part.origin, lambda: part.read()[..., list(keep)])


def _check_choice(base: Opened, module: ModuleName, chosen: Sequence[int]) -> None:
    count = base.num_experts(module)
    if not count:
        raise ConvertError(f"{base.where}: its {module} has no experts")
    wrong = [expert for expert in chosen if not 0 <= expert < count]
    if wrong:
        raise ConvertError(f"{base.where}: no expert {wrong[0]} in its {module}; 0..{count - 1}")
    if len(set(chosen)) < len(chosen):
        raise ConvertError(f"experts {list(chosen)}: one is named twice")


# ------------------------------------------------------------------------------------ settings


_WHERE: dict[ModuleName, tuple[str, ...]] = {
    "decoder": ("decoder",),
    "encoder": ("vision", "encoder"),
    "connector": ("vision", "connector"),
}


def moe_of(config: Mapping[str, Any], module: ModuleName) -> dict[str, Any] | None:
    """The `moe` settings of a module in model settings; None: dense, or not there."""
    for key in _WHERE[module]:
        config = config.get(key) or {}
    return config.get("moe")


def _with_moe(
    config: Mapping[str, Any], settings: Mapping[ModuleName, Mapping[str, Any] | None]
) -> dict[str, Any]:
    """`config` with `moe` of some modules replaced; empty settings stay empty."""
    changed = copy.deepcopy(dict(config))
    for module, moe in settings.items() if changed else ():
        at = changed
        for key in _WHERE[module]:
            at = at.setdefault(key, {})
        at["moe"] = dict(moe) if moe else None
    return changed
