"""Make the content of a new checkpoint for each command: which slices it has, from where.

Nothing is read here: a `Part` reads its value when it is written.
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
"""Layer part -> the slices that it consists of, by index: (e,) for expert e of a part that stacks
experts, () for the single slice of any other part."""
FIRST_LAYERS = ("up_proj/kernel", "fc1/kernel")
"""A linear layer of every expert that reads the same input as the router: SwiGLU has the first, an
MLP the second."""


@dataclass(frozen=True)
class Made:
    """A checkpoint that will be written.

    Attributes:
        content: all its slices.
        moe_layers: one flag per decoder layer: True if the layer has experts.
        config: model settings as in model.yaml; empty if they are unknown.
        experts: module -> where each of its experts comes from.
    """

    content: Content
    moe_layers: tuple[bool, ...]
    config: Mapping[str, Any]
    experts: Mapping[str, Sequence[str]]


# ------------------------------------------------------------------------- upcycle, assemble


def place_experts(
    base: Opened,
    experts: Sequence[Opened],
    moe: Mapping[ModuleName, MoEConfig],
    seed: int,
) -> Made:
    """Put experts into the modules of `moe`: expert e of a layer is that layer of `experts[e]`.

    Everything else comes from `base`, and routers start at random. If `base` is every expert, this
    is sparse upcycling.

    Args:
        base: the dense checkpoint.
        experts: one checkpoint per expert.
        moe: module -> settings of its experts.
        seed: of the routers.

    Raises:
        ConvertError: the base has experts or no feed-forward layers in such a module, an expert's
            layer has another shape, or the seed is negative.
        ParamError: the checkpoint of an expert lacks a layer.
    """
    if seed < 0:
        raise ConvertError(f"--seed {seed}: allowed: 0 or more")
    moe_layers = _new_moe_layers(base, moe)
    content: Content = {}
    for layer_part in base.layer_parts:
        settings = _moe_of_layer(layer_part, moe, moe_layers)
        expert_part = layer_part.experts
        # Norms, attention, and layers that stay dense come from the base.
        if settings is None or expert_part is None:
            content[layer_part] = {(): base.part(layer_part)}
            continue
        parts = {(e,): source.part(layer_part) for e, source in enumerate(experts)}
        _check_shapes(layer_part, base, parts)
        content[expert_part] = parts
        # One linear layer per expert gives the input width of the router.
        if expert_part.expert in FIRST_LAYERS:
            router, part = _fresh_router(layer_part, base, settings, seed)
            content[router] = {(): part}
    for module in moe:
        if not any(part.module == module and part.expert is not None for part in content):
            raise ConvertError(f"{base.where}: has no feed-forward layers in its {module}")
    new_settings: dict[ModuleName, Mapping[str, Any] | None] = {
        module: settings.model_dump(mode="json") for module, settings in moe.items()
    }
    names = [source.name for source in experts]
    config = _with_moe(base.config, new_settings)
    return Made(content, moe_layers, config, dict.fromkeys(moe, names))


def _new_moe_layers(base: Opened, moe: Mapping[ModuleName, MoEConfig]) -> tuple[bool, ...]:
    """Which decoder layers will have experts.

    Raises:
        ConvertError: a module of `moe` has experts already.
    """
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


def _moe_of_layer(
    layer_part: LayerPart, moe: Mapping[ModuleName, MoEConfig], moe_layers: Sequence[bool]
) -> MoEConfig | None:
    """Settings of the experts that the layer will have; None if it stays dense."""
    module, layer = layer_part.module, layer_part.layer
    if module is None or module not in moe:
        return None
    # In the decoder a setting chooses layers; encoder and connector have experts in all layers.
    if module == "decoder" and layer is not None and not moe_layers[layer]:
        return None
    return moe[module]


def _check_shapes(layer_part: LayerPart, base: Opened, parts: Mapping[Any, Part]) -> None:
    expected = base.part(layer_part).shape
    for part in parts.values():
        if part.shape != expected:
            raise ConvertError(
                f"{part.origin}: {layer_part} has shape {part.shape}, but {base.where} has "
                f"{expected}"
            )


def _fresh_router(
    layer_part: LayerPart, base: Opened, moe: MoEConfig, seed: int
) -> tuple[LayerPart, Part]:
    """A router [D, E] for the layer of `layer_part`, initialised as `nn.moe.Router` does it."""
    dense = base.part(layer_part)
    shape = (dense.shape[0], moe.num_experts)
    # The generator is seeded with the name of the layer, so other layers and modules of the
    # checkpoint do not change its router.
    key = (seed, *str(layer_part._replace(rest="")).encode())

    def read() -> np.ndarray:
        generator = np.random.default_rng(key)
        if moe.router.init == "fan_in":
            value = generator.uniform(-1, 1, shape) / np.sqrt(shape[0])
        else:
            value = generator.normal(0, moe.router.init_std, shape)
        return value.astype(np_dtype(dense.dtype))

    router = layer_part._replace(rest=ROUTER + "linear/kernel")
    return router, Part(shape, dense.dtype, f"fresh, seed {seed}", read)


# ----------------------------------------------------------------------------- split, prune


def one_expert(base: Opened, modules: Collection[ModuleName], expert: int, whole: bool) -> Made:
    """Make one expert of every layer a dense layer.

    Args:
        base: a checkpoint with experts.
        modules: the modules whose experts are meant.
        expert: number of the expert.
        whole: add the rest of the model; otherwise the result has only the feed-forward layers of
            `modules`.

    Raises:
        ConvertError: a module has no experts, or not this one.
    """
    for module in modules:
        _check_choice(base, module, [expert])
    content: Content = {}
    for layer_part in base.layer_parts:
        if layer_part.module not in modules:
            if whole:
                content[layer_part] = {(): base.part(layer_part)}
        elif layer_part.expert is not None:
            content[layer_part.dense] = {(): base.part(layer_part, expert)}
        # A dense layer between layers with experts is the same for every expert.
        elif not layer_part.is_router and (whole or layer_part.experts is not None):
            content[layer_part] = {(): base.part(layer_part)}
    moe_layers = base.moe_layers
    if "decoder" in modules:
        moe_layers = (False,) * len(moe_layers)
    config = _with_moe(base.config, dict.fromkeys(modules))
    return Made(content, moe_layers, config, {})


def fewer_experts(
    base: Opened, modules: Collection[ModuleName], keep: Sequence[int], top_k: int | None
) -> Made:
    """Keep some experts and their outputs of the routers.

    Args:
        base: a checkpoint with experts.
        modules: the modules whose experts are meant.
        keep: numbers of the experts, in their new order.
        top_k: experts per token; None keeps the setting, but at most as many as are left.

    Raises:
        ConvertError: a module lacks one of the experts, or `top_k` exceeds their number.
    """
    for module in modules:
        _check_choice(base, module, keep)
    if top_k is not None and not 1 <= top_k <= len(keep):
        raise ConvertError(f"--top-k {top_k}: allowed with {len(keep)} experts: 1..{len(keep)}")
    content: Content = {}
    for layer_part in base.layer_parts:
        module = layer_part.module
        if module is None or module not in modules:
            content[layer_part] = {(): base.part(layer_part)}
        elif layer_part.expert is not None:
            content[layer_part] = {
                (new,): base.part(layer_part, old) for new, old in enumerate(keep)
            }
        # A modality map transforms tokens before the router's linear layer, so its size does not
        # depend on the experts.
        elif layer_part.is_router and "modality_map" not in layer_part.rest:
            count = base.num_experts(module)
            content[layer_part] = {(): _kept_columns(base.part(layer_part), keep, count)}
        else:
            content[layer_part] = {(): base.part(layer_part)}
    # Settings and origins of the experts that are left.
    settings = {}
    for module in modules:
        old_settings = moe_of(base.config, module) or {}
        new_top_k = min(top_k or old_settings.get("top_k", 2), len(keep))
        settings[module] = old_settings | {"num_experts": len(keep), "top_k": new_top_k}
    names = [f"{base.name} expert {old}" for old in keep]
    config = _with_moe(base.config, settings)
    return Made(content, base.moe_layers, config, dict.fromkeys(modules, names))


def _kept_columns(part: Part, keep: Sequence[int], count: int) -> Part:
    """The outputs of a router for the kept experts.

    A parameter whose last axis has another length than `count`, the number of experts, stays as it
    is.
    """
    if part.shape[-1] != count:
        return part
    shape = (*part.shape[:-1], len(keep))
    return Part(shape, part.dtype, part.origin, lambda: part.read()[..., list(keep)])


def _check_choice(base: Opened, module: ModuleName, chosen: Sequence[int]) -> None:
    """Raises ConvertError unless the module has every chosen expert, and none is named twice."""
    count = base.num_experts(module)
    if not count:
        raise ConvertError(f"{base.where}: its {module} has no experts")
    missing = [expert for expert in chosen if not 0 <= expert < count]
    if missing:
        raise ConvertError(
            f"{base.where}: no expert {missing[0]} in its {module}; allowed: 0..{count - 1}"
        )
    if len(set(chosen)) < len(chosen):
        raise ConvertError(f"experts {list(chosen)}: an expert is named twice; name each once")


# ------------------------------------------------------------------------------------ settings


_SETTINGS_KEYS: dict[ModuleName, tuple[str, ...]] = {
    "decoder": ("decoder",),
    "encoder": ("vision", "encoder"),
    "connector": ("vision", "connector"),
}


def moe_of(config: Mapping[str, Any], module: ModuleName) -> dict[str, Any] | None:
    """The `moe` settings of a module; None if the module is dense or missing."""
    for key in _SETTINGS_KEYS[module]:
        config = config.get(key) or {}
    return config.get("moe")


def _with_moe(
    config: Mapping[str, Any], settings: Mapping[ModuleName, Mapping[str, Any] | None]
) -> dict[str, Any]:
    """Copy the model settings and replace `moe` of some modules; empty settings stay empty."""
    changed = copy.deepcopy(dict(config))
    if not changed:
        return changed
    for module, moe in settings.items():
        section = changed
        for key in _SETTINGS_KEYS[module]:
            section = section.setdefault(key, {})
        section["moe"] = dict(moe) if moe else None
    return changed
