"""Uni-MoE audio, speech, speech_dp and 8e: decoder, connectors, adapters, routers, experts.

Groups of source tensors, in the order in which the originals load them. A tensor of a later group
overrides the same tensor of an earlier one.

    base                the shards of the base folder
    base_projector      mm_projector of the base folder
    base_aligner        mm_audio_aligner of the base folder
    tuned               non_lora_trainables of the fine-tune's folder
    peft                adapter_model
    aligner             mm_audio_aligner
    gates               mlp_gates
    fm                  fm_adapter
    rank{e}             8e: expert e in {rank}_mlp_experts
    mlp{e}              8e: the file of expert e in the experts folder
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from unimoe_jax.config import DecoderConfig, LoRARule, MoEConfig, RouterConfig
from unimoe_jax.convert.entry import LINEAR, Adapter, Copy, Entry, Excuse, Rounding, expand, linear
from unimoe_jax.convert.reader import ConvertError, Tensors
from unimoe_jax.convert.source_names import PEFT_PREFIX
from unimoe_jax.convert.tables import llama

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# 8e: the file of the experts folder that becomes expert 0, 1, … Two files serve two experts each.
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
    """Excuses of a Uni-MoE: `EXCUSES`, a tied head, and stale tensors of non_lora_trainables.

    non_lora_trainables may hold tensors of files that are loaded after it. They are never used.
    """
    later = [name for group in ("aligner", "gates", "fm") for name in groups.get(group, ())]
    match = "|".join(re.escape(f"tuned:{PEFT_PREFIX}{name}") for name in later)
    earlier = Excuse(match, "an earlier state; a file that is loaded later has its own")
    return [*EXCUSES, earlier, *([llama.TIED] if config.tie_embeddings else [])]


# --------------------------------------------------------------------------------- configs


def placement(layers: Iterable[int], num_layers: int) -> Literal["all", "even"] | tuple[int, ...]:
    """`MoEConfig.layers` for the numbers of the layers with experts: a name if there is one."""
    numbers = tuple(sorted(layers))
    if numbers == tuple(range(num_layers)):
        return "all"
    return "even" if numbers == tuple(range(0, num_layers, 2)) else numbers


def moe_layers(names: Iterable[str]) -> list[int]:
    """Numbers of the layers that have a router among these tensor names.

    8e names routers `…mlp.deepspeed_moe.gate.wg.weight`, the others `…mlp.gate.weight`.
    """
    pattern = re.compile(r"model\.layers\.(\d+)\.mlp\.(?:deepspeed_moe\.gate\.wg|gate)\.weight")
    return sorted(int(match[1]) for name in names if (match := pattern.fullmatch(name)))


def moe_config(
    config: Mapping[str, Any],
    num_experts: int,
    layers: Iterable[int],
    is_8e: bool,
    modality_map: bool,
) -> MoEConfig:
    """Settings of the experts.

    The original of 8e samples the second expert; here the second best is taken, unless
    `RouterConfig.sample_second` is set.
    """
    router = RouterConfig(
        dtype_order="topk_softmax",
        logits_dtype="float32" if is_8e else "compute",
        modality_map=modality_map,
    )
    return MoEConfig(
        num_experts=num_experts,
        top_k=config.get("num_experts_per_tok", 2),
        layers=placement(layers, config["num_hidden_layers"]),
        router=router,
    )


def rounding(is_8e: bool, branch: str) -> Rounding:
    """How the loaders of released inference round every weight, including those of the encoders.

    Models of 4 experts (and dense ones) hold weights in float16, merge adapters into float16, and
    convert to bfloat16 for speech and to float32 for audio. 8e merges in float32 and converts to
    float16, then to bfloat16. RoPE tables are rounded like the weights.

    Args:
        branch: `speech` or `audio`.
    """
    last = "bfloat16" if is_8e or branch == "speech" else "float32"
    rope_table = "float16" if last == "float32" else "float16_bfloat16"
    return Rounding("float32" if is_8e else "float16", ("float16", last), rope_table)


# ----------------------------------------------------------------------------------- copies


def decoder(config: DecoderConfig) -> list[Copy]:
    """Copies of the decoder of a dense or 4-expert model.

    `base` holds everything. `gates` holds the routers again and overrides those of `base`.
    """
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
    """Copies of 8e's decoder, whose experts and routers have DeepSpeed's names.

    Args:
        local: the number of experts in each rank's file, which numbers them from 0.
        builtin_dense: whether the dense layers have built-in adapters, too.
    """
    assert config.moe is not None  # 8e always has experts
    moe, dense = llama.chosen(config, moe=True), llama.chosen(config, moe=False)
    # Attention, norms, embedding, head, and the dense layers.
    copies = llama.trunk(config)
    mlp = llama.swiglu("base:model.layers.{l}.mlp.", "decoder/{l}/mlp/")
    if builtin_dense:
        mlp += builtin("base:model.layers.{l}.mlp.", "decoder/{l}/mlp/")
    copies += expand(mlp, dense)
    # Routers.
    top = "model.layers.{l}.mlp.deepspeed_moe."
    copies += expand(linear(f"gates:{top}gate.wg", ROUTER, bias=False), moe)
    # Experts: each from its rank's file, then from its file of the experts folder, which overrides
    # the matrices but not the built-in adapters.
    for expert in range(config.moe.num_experts):
        in_rank = f"rank{expert}:{top}experts.deepspeed_experts.{expert % local}."
        d = "decoder/{l}/moe/experts/"
        entries = llama.swiglu(in_rank, d) + builtin(in_rank, d)
        entries += llama.swiglu(f"mlp{expert}:model.layers.{{l}}.mlp.", d)
        # Names hold the expert's number within its rank's file, so `expand` cannot know the index.
        for copy in expand(entries, moe):
            copies.append(replace(copy, index=(*copy.index, expert)))
    # One map per modality in front of each router, stored as a convolution of width 1.
    if config.moe.router.modality_map:
        maps = []
        for name in ("text", "image", "video", "audio"):
            d = f"decoder/{{l}}/moe/router/modality_map/{name}"
            maps.append(Entry(f"fm:{top}fm_{name}.weight", f"{d}/kernel", "o i 1 -> i o"))
            maps.append(Entry(f"fm:{top}fm_{name}.bias", f"{d}/bias"))
        copies += expand(maps, moe)
    return copies


def builtin(src: str, dst: str) -> tuple[Entry, ...]:
    """Entries of the adapters that 8e builds into its experts (and perhaps its dense layers)."""
    return tuple(
        Entry(f"{src}{name}_lora_{matrix}.weight", f"{dst}{name}/lora_{matrix.lower()}", LINEAR)
        for name in PROJECTIONS
        for matrix in "AB"
    )


def projector(src: str, dst: str, depth: int, sequential: bool) -> list[Copy]:
    """Copies of a projector of `depth` linear layers.

    If `sequential`, it is a torch Sequential, in which linear layers and GELUs alternate, so that
    the linear layers have the numbers 0, 2, …; else it is one Linear without a number.
    """
    entries: list[Entry] = []
    for layer in range(depth):
        name = f"{src}.{2 * layer}" if sequential else src
        entries += linear(name, f"{dst}/fc{layer + 1}")
    return expand(entries)


def vision_connector(depth: int, sequential: bool) -> list[Copy]:
    """Copies of the image projector from every group that may hold it, in load order."""
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
    """The name that PEFT gives to the torch Linear that this copy reads.

    None if the copy reads something else, or a file that PEFT does not adapt.
    """
    group, name = copy.src.split(":", 1)
    is_kernel = copy.dst.endswith("/kernel") and name.endswith(".weight")
    if group not in ("base", "gates") or not is_kernel:
        return None
    return PEFT_PREFIX + name.removesuffix(".weight")


def with_adapters(
    copies: Sequence[Copy], names: set[str], scale: float, merge: bool, router: bool
) -> list[Copy]:
    """Add PEFT's adapters to the copies: merged into kernels, or as parameters beside them.

    A kernel can have one adapter only. If it has a built-in one, PEFT's is merged in either case.

    Args:
        names: names of the tensors in adapter_model.
        scale: the factor of B A.
        merge: merge the adapters; else keep them as `lora_a` and `lora_b`.
        router: whether the adapters of routers take part.
    """
    builtin_slots = {(copy.dst, copy.index) for copy in copies if copy.dst.endswith("/lora_a")}
    result = []
    for copy in copies:
        name = peft_name(copy)
        is_router = "/router/" in copy.dst
        # Copies without an adapter stay as they are.
        if name is None or f"{name}.lora_A.weight" not in names or (is_router and not router):
            result.append(copy)
            continue
        a, b = f"peft:{name}.lora_A.weight", f"peft:{name}.lora_B.weight"
        module = copy.dst.removesuffix("/kernel")
        if merge or (f"{module}/lora_a", copy.index) in builtin_slots:
            result.append(replace(copy, adapter=Adapter(a, b, scale)))
        else:
            result.append(copy)
            for src, matrix in ((a, "lora_a"), (b, "lora_b")):
                result.append(Copy(src, f"{module}/{matrix}", copy.index, LINEAR, ()))
    return result


def check_adapters(copies: Sequence[Copy], targets: Any = None) -> None:
    """Check that a parameter has merged adapters for all of its layers and experts, or for none.

    A parameter that is adapted in part usually means that tensors of adapter_model are lost.

    Args:
        targets: adapter_config.json's `target_modules`; a list excuses modules that it leaves out.

    Raises:
        ConvertError: a parameter is adapted in part.
    """
    # Path of every adapted parameter -> the name of one of its adapters.
    adapted: dict[str, str] = {}
    for copy in copies:
        if copy.adapter is not None:
            adapted.setdefault(copy.dst, copy.adapter.a)
    for copy in copies:
        example = adapted.get(copy.dst)
        name = peft_name(copy)
        if example and copy.adapter is None and name is not None and _is_target(name, targets):
            raise ConvertError(
                f"adapter_model has {example!r}, but no {name}.lora_A.weight: some layers or "
                "experts of a kind are adapted and others are not; is the file incomplete?"
            )


def _is_target(name: str, targets: Any) -> bool:
    """Whether PEFT adapts the module `name`.

    PEFT matches the entries of a list with whole names or with the ends of names. Anything else
    (a regular expression, or nothing) counts as every module.
    """
    if not isinstance(targets, list) or not targets:
        return True
    return f".{name.removeprefix(PEFT_PREFIX)}".endswith(tuple(f".{target}" for target in targets))


def lora_rules(
    copies: Sequence[Copy], peft: Mapping[str, Any], builtin_lora: tuple[int, float, float] | None
) -> tuple[LoRARule, ...]:
    """Settings of the adapters that the copies fill: built-in ones first, then PEFT's.

    Args:
        peft: adapter_config.json, empty if there is none.
        builtin_lora: rank, alpha and dropout of the adapters inside 8e's experts.
    """
    peft_lora = None
    if peft:
        peft_lora = (peft["r"], peft["lora_alpha"], peft.get("lora_dropout", 0.0))
    rules = []
    for is_peft, settings in ((False, builtin_lora), (True, peft_lora)):
        # A rule is for all layers, so leave the prefix of the stack out.
        modules = {
            re.sub(r"^decoder/run_\d+/block_\d+/", "", copy.dst.removesuffix("/lora_a"))
            for copy in copies
            if copy.dst.endswith("/lora_a") and copy.src.startswith("peft:") == is_peft
        }
        if modules and settings:
            rank, alpha, dropout = settings
            match = rf"decoder/run_\d+/block_\d+/({'|'.join(sorted(modules))})"
            rules.append(LoRARule(match=match, rank=rank, alpha=alpha, dropout=dropout))
    return tuple(rules)
