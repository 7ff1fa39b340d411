"""Uni-MoE audio, speech, speech_dp and 8e: decoder, connectors, adapters, routers, experts.

Groups, in the originals' load order (a later one overrides an earlier one): `base` (the base
folder's shards), `base_projector`, `base_aligner` (its side files), `tuned` (non_lora_trainables),
`peft` (adapter_model), `aligner`, `gates` (mlp_gates), `fm` (fm_adapter); for 8e also `rank{e}`
({rank}_mlp_experts) and, overriding those, `mlp{e}` (expert e's file of the experts folder).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from unimoe_jax.config import DecoderConfig, LoRARule, MoEConfig, RouterConfig
from unimoe_jax.convert.entry import LINEAR, Adapter, Copy, Entry, Excuse, Rounding, expand, linear
from unimoe_jax.convert.reader import ConvertError, Tensors
from unimoe_jax.convert.source_names import PEFT_PREFIX
from unimoe_jax.convert.tables import llama

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# 8e: which file of the experts folder becomes expert 0, 1, …
EXPERT_FILES = (
    "mlp_audiocap",
    "mlp_basev",
    "mlp_base",
    "mlp_base1",
    "mlp_base4",
    "mlp_base7",
    "mlp_base",
    "mlp_base7",
)
EXCUSES = (
    *llama.EXCUSES,
    Excuse(
        r"\w+:(model\.)?(audio_tower|vision_tower)\..*",
        "encoders come from their own folders; base files may hold unused copies",
    ),
    Excuse(
        r"\w+:.*\.audio_decoder\.embed_tokens\.weight",
        "word embeddings of the Whisper decoder, which reads queries instead",
    ),
    Excuse(
        r"gates:.*\.lora_[AB]\.default\.weight",
        "the router's adapter as in adapter_model; the originals ignore this copy",
    ),
    Excuse(
        r"peft:.*_proj_lora_[AB]\.lora_[AB]\.weight",
        "adapters on the built-in adapters of dense layers; the originals' loader loses them",
    ),
)
EXCUSES_8E = (
    Excuse(
        r"base:model\.layers\.\d+\.mlp\.(gate|experts)\..*",
        "the base's own experts and routers; 8e brings its experts in files of their own",
    ),
)
DROPPED_ROUTER_LORA = Excuse(
    r"peft:.*\.mlp\.gate\.lora_[AB]\.weight",
    "mlp_gates replaces the routers, as in released inference (--router-lora merge keeps them)",
)


def excuses(config: DecoderConfig, groups: Mapping[str, Tensors]) -> list[Excuse]:
    """`EXCUSES`, a tied head, and what non_lora_trainables has of files that are loaded later."""
    later = [name for group in ("aligner", "gates", "fm") for name in groups.get(group, ())]
    match = "|".join(re.escape(f"tuned:{PEFT_PREFIX}{name}") for name in later)
    earlier = Excuse(match, "an earlier state; a file that is loaded later has its own")
    return [*EXCUSES, earlier, *([llama.TIED] if config.tie_embeddings else [])]


# --------------------------------------------------------------------------------- configs


def placement(layers: Iterable[int], num_layers: int) -> str | tuple[int, ...]:
    """`MoEConfig.layers` of these layers, by name where there is one."""
    found = tuple(sorted(layers))
    names = {"all": tuple(range(num_layers)), "even": tuple(range(0, num_layers, 2))}
    return next((name for name, those in names.items() if those == found), found)


def moe_layers(names: Iterable[str]) -> list[int]:
    """Layers with a router among these tensor names (`…layers.{l}.mlp.…gate….weight`)."""
    pattern = re.compile(r"model\.layers\.(\d+)\.mlp\.(?:deepspeed_moe\.gate\.wg|gate)\.weight")
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def moe_config(
    config: Mapping[str, Any], num_experts: int, layers: Iterable[int], is_8e: bool, fm: bool
) -> MoEConfig:
    """The experts of a Uni-MoE. 8e's second expert is taken, not sampled: see `sample_second`."""
    router = RouterConfig(
        dtype_order="topk_softmax",
        logits_dtype="float32" if is_8e else "compute",
        modality_map=fm,
    )
    return MoEConfig(
        num_experts=num_experts,
        top_k=config.get("num_experts_per_tok", 2),
        layers=placement(layers, config["num_hidden_layers"]),
        router=router,
    )


def rounding(is_8e: bool, sense: str) -> Rounding:
    """What the loaders of released inference do to every weight, encoders included.

    Four experts: float16, merged into float16, then bfloat16 for speech and float32 for audio. 8e:
    merged in float32, then float16, then bfloat16. RoPE tables go the same way.
    """
    last = "bfloat16" if is_8e or sense == "speech" else "float32"
    rope_table = "float16" if last == "float32" else "float16_bfloat16"
    return Rounding("float32" if is_8e else "float16", ("float16", last), rope_table)


# ----------------------------------------------------------------------------------- copies


def decoder(config: DecoderConfig) -> list[Copy]:
    """Trunk, dense layers and (4-expert) routers and experts from `base`; routers from `gates`."""
    moe = llama.chosen(config, moe=True)
    dense = llama.swiglu("base:model.layers.{l}.mlp.", "decoder/{l}/mlp/")
    copies = llama.trunk(config) + expand(dense, llama.chosen(config, moe=False))
    if config.moe is None:
        return copies
    experts = llama.swiglu("base:model.layers.{l}.mlp.experts.{e}.", "decoder/{l}/moe/experts/")
    copies += expand(experts, moe, range(config.moe.num_experts))
    for group in ("base", "gates"):
        router = linear(f"{group}:model.layers.{{l}}.mlp.gate", ROUTER, bias=False)
        copies += expand(router, moe)
    return copies


ROUTER = "decoder/{l}/moe/router/linear"


def decoder_8e(config: DecoderConfig, local: int, builtin_dense: bool) -> list[Copy]:
    """As `decoder`, with DeepSpeed's names; `local` experts lie in each rank's file."""
    moe, dense = llama.chosen(config, moe=True), llama.chosen(config, moe=False)
    copies = llama.trunk(config)
    mlp = llama.swiglu("base:model.layers.{l}.mlp.", "decoder/{l}/mlp/")
    if builtin_dense:
        mlp += builtin("base:model.layers.{l}.mlp.", "decoder/{l}/mlp/")
    copies += expand(mlp, dense)
    top = "model.layers.{l}.mlp.deepspeed_moe."
    copies += expand(linear(f"gates:{top}gate.wg", ROUTER, bias=False), moe)
    for expert in range(config.moe.num_experts):
        slot = f"rank{expert}:{top}experts.deepspeed_experts.{expert % local}."
        d = "decoder/{l}/moe/experts/"
        entries = llama.swiglu(slot, d) + builtin(slot, d)
        entries += llama.swiglu(f"mlp{expert}:model.layers.{{l}}.mlp.", d)
        for copy in expand(entries, moe):
            copies.append(replace(copy, index=(*copy.index, expert)))
    if config.moe.router.modality_map:
        maps = []
        for name in ("text", "image", "video", "audio"):
            d = f"decoder/{{l}}/moe/router/modality_map/{name}"
            maps.append(Entry(f"fm:{top}fm_{name}.weight", f"{d}/kernel", "o i 1 -> i o"))
            maps.append(Entry(f"fm:{top}fm_{name}.bias", f"{d}/bias"))
        copies += expand(maps, moe)
    return copies


def builtin(src: str, dst: str) -> tuple[Entry, ...]:
    """8e's adapters inside each expert."""
    return tuple(
        Entry(f"{src}{name}_lora_{part}.weight", f"{dst}{name}/lora_{part.lower()}", LINEAR)
        for name in PROJECTIONS
        for part in "AB"
    )


def projector(src: str, dst: str, depth: int, sequential: bool) -> list[Copy]:
    """A torch Sequential of linear layers and GELUs (numbers 0, 2, …), or one bare Linear."""
    entries: list[Entry] = []
    for layer in range(depth):
        name = f"{src}.{2 * layer}" if sequential else src
        entries += linear(name, f"{dst}/fc{layer + 1}")
    return expand(entries)


def vision_connector(depth: int, sequential: bool) -> list[Copy]:
    """The image projector from every place it may stand in."""
    places = (
        "base:model.mm_projector",
        "base_projector:model.mm_projector",
        f"tuned:{PEFT_PREFIX}model.mm_projector",
    )
    return [
        copy for src in places for copy in projector(src, "vision/connector", depth, sequential)
    ]


# --------------------------------------------------------------------------------- adapters


def peft_name(copy: Copy) -> str | None:
    """The name under which PEFT adapts the torch Linear that this copy reads, if it is one."""
    group, name = copy.src.split(":", 1)
    is_kernel = copy.dst.endswith("/kernel") and name.endswith(".weight")
    if group not in ("base", "gates") or not is_kernel:
        return None
    return PEFT_PREFIX + name.removesuffix(".weight")


def with_adapters(
    copies: Sequence[Copy], names: set[str], scale: float, merge: bool, router: bool
) -> list[Copy]:
    """Add PEFT's adapters to the copies: merged into kernels, or as parameters beside them.

    A kernel that has a built-in adapter already takes PEFT's merged in either case. With `router`
    false, adapters of routers are left out.
    """
    taken = {(copy.dst, copy.index) for copy in copies if copy.dst.endswith("/lora_a")}
    result = []
    for copy in copies:
        name = peft_name(copy)
        is_router = "/router/" in copy.dst
        if name is None or f"{name}.lora_A.weight" not in names or (is_router and not router):
            result.append(copy)
            continue
        a, b = f"peft:{name}.lora_A.weight", f"peft:{name}.lora_B.weight"
        module = copy.dst.removesuffix("/kernel")
        if merge or (f"{module}/lora_a", copy.index) in taken:
            result.append(replace(copy, adapter=Adapter(a, b, scale)))
        else:
            result.append(copy)
            for src, part in ((a, "lora_a"), (b, "lora_b")):
                result.append(Copy(src, f"{module}/{part}", copy.index, LINEAR, ()))
    return result


def check_adapters(copies: Sequence[Copy], targets: Any = None) -> None:
    """Merged adapters must be there for every layer and expert of a parameter, or for none.

    Args:
        targets: adapter_config.json's `target_modules`; a list excuses modules that it leaves out.

    Raises:
        ConvertError: a parameter is adapted in part.
    """
    with_one: dict[str, list[Copy]] = {}
    for copy in copies:
        if copy.adapter is not None:
            with_one.setdefault(copy.dst, []).append(copy)
    for copy in copies:
        others = with_one.get(copy.dst)
        name = peft_name(copy)
        if others and copy.adapter is None and name is not None and _is_target(name, targets):
            raise ConvertError(
                f"adapter_model has no {name}.lora_A.weight, but {others[0].adapter.a!r}: some "
                "layers or experts of a kind are adapted and others are not"
            )


def _is_target(name: str, targets: Any) -> bool:
    """Whether PEFT adapts the module: a list holds whole names or ends of names."""
    if not isinstance(targets, list) or not targets:
        return True
    return f".{name.removeprefix(PEFT_PREFIX)}".endswith(tuple(f".{target}" for target in targets))


def lora_rules(
    copies: Sequence[Copy], peft: Mapping[str, Any], builtin_lora: tuple[int, float, float] | None
) -> tuple[LoRARule, ...]:
    """Rules for the adapters that the copies fill: built-in ones first, then PEFT's.

    Args:
        peft: adapter_config.json.
        builtin_lora: rank, alpha, dropout of 8e's experts.
    """
    rules = []
    for group, settings in (
        ("own", builtin_lora),
        ("peft", peft and (peft["r"], peft["lora_alpha"], peft.get("lora_dropout", 0.0))),
    ):
        modules = {
            re.sub(r"^decoder/run_\d+/block_\d+/", "", copy.dst.removesuffix("/lora_a"))
            for copy in copies
            if copy.dst.endswith("/lora_a") and copy.src.startswith("peft:") == (group == "peft")
        }
        if modules and settings:
            rank, alpha, dropout = settings
            match = rf"decoder/run_\d+/block_\d+/({'|'.join(sorted(modules))})"
            rules.append(LoRARule(match=match, rank=rank, alpha=alpha, dropout=dropout))
    return tuple(rules)
