"""From recognised source folders to a `ConversionPlan`: one function per family of models.

A family is a set of folders that make a model together: Uni-MoE (`unimoe_plan.plan_unimoe`), CuMo
(`plan_cumo`), or separate encoders and decoders (`plan_parts`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType

from pydantic import ValidationError

from unimoe_jax.config import DecoderConfig, ModelConfig
from unimoe_jax.config.problems import first_problem
from unimoe_jax.convert.branches import ENCODERS, PLACEHOLDER, Sources, encoder_excuses
from unimoe_jax.convert.entry import Copy, Excuse
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.plan import ConversionPlan
from unimoe_jax.convert.processor_checks import check_processor
from unimoe_jax.convert.reader import ConvertError, Tensors
from unimoe_jax.convert.recognise import SourceFolder, copied_files
from unimoe_jax.convert.tables import cumo, llama, mixtral
from unimoe_jax.convert.unimoe_plan import plan_unimoe


def plan_of(sources: Sequence[SourceFolder], options: Options = Options()) -> ConversionPlan:
    """The plan for a set of source folders, of which each role occurs once.

    Raises:
        ConvertError: the folders do not make a model together.
    """
    for source in sources:
        _check_depth(source, sum(len(g) for s in sources for g in s.groups.values()))
        check_processor(source)
    by_role = {source.role: source for source in sources}
    # These roles occur in one family only; without any of them the folders are separate parts.
    family_of_role = {"cumo": "cumo", "base": "unimoe", "tuned": "unimoe"}
    family = next((name for role, name in family_of_role.items() if role in by_role), "parts")
    if options.numerics == "released" and family != "unimoe":
        raise ConvertError("--numerics released can be used with Uni-MoE only; leave it out")
    try:
        return FAMILIES[family](by_role, options)
    except ValidationError as error:
        # The title is the settings class, which says whether a decoder or an encoder is meant.
        message = f"{error.title}: {first_problem(error)}"
    except (TypeError, ValueError, AttributeError, ArithmeticError) as error:
        # A config.json may hold anything: a list instead of a number, text instead of a mapping.
        message = str(error)
    where = ", ".join(str(source.path) for source in sources)
    raise ConvertError(f"the configuration in {where} describes no model: {message}")


def _check_depth(source: SourceFolder, num_tensors: int) -> None:
    """Refuse more layers than there are tensors, before a list of all layers fills the memory."""
    for key, value in source.config.items():
        if key.endswith("layers") and isinstance(value, int) and value > num_tensors:
            raise ConvertError(
                f"{source.path}: {key} is {value:,}, but the sources hold only {num_tensors:,} "
                "tensors"
            )


# ------------------------------------------------------------------------- separate folders


def plan_parts(sources: Sources, options: Options) -> ConversionPlan:
    """Encoders and a text decoder from separate folders. Connectors start untrained."""
    unknown = set(sources) - {"clip", "whisper", "beats", "decoder"}
    if unknown:
        raise ConvertError(
            f"sources {sorted(unknown)} belong to a Uni-MoE: add its base and fine-tune folders "
            "with --from"
        )
    copies: list[Copy] = []
    excuses: list[Excuse] = []
    parts: list[str] = []
    groups: dict[str, Tensors] = {}
    # `model` declares the parameters and needs placeholders; `config`, which becomes model.yaml,
    # holds only the modules that there are.
    model, config = ModelConfig(decoder=PLACEHOLDER), {}
    # The text decoder.
    if source := sources.get("decoder"):
        table, decoder = _decoder_of(source)
        model = model.model_copy(update={"decoder": decoder})
        copies += table.copies(decoder)
        excuses += table.EXCUSES
        if decoder.tie_embeddings:
            excuses.append(llama.TIED)
        parts += ["embed/", "decoder/", "lm_head/"]
        config["decoder"] = decoder.model_dump(mode="json")
    # The encoders, without connectors.
    for role, name, build in ENCODERS:
        if source := sources.get(role):
            branch, branch_copies = build(source, options)
            model = model.model_copy(update={name: branch})
            copies += branch_copies
            parts.append(f"{name}/encoder/")
            config[name] = {"encoder": branch.encoder.model_dump(mode="json")}
    for source in sources.values():
        groups |= source.groups
    excuses += encoder_excuses(sources, model)
    files = copied_files(
        [sources[role] for role in ("clip", "whisper", "decoder") if role in sources]
    )
    return ConversionPlan(
        family="+".join(sources),
        model=model,
        parts=tuple(parts),
        groups=groups,
        copies=copies,
        excuses=excuses,
        config=config,
        files=files,
    )


def _decoder_of(source: SourceFolder) -> tuple[ModuleType, DecoderConfig]:
    """(the table of a text decoder, its settings): Mixtral, or a LLaMA-shaped decoder."""
    kind = source.config["model_type"]
    if kind == "mixtral":
        return mixtral, mixtral.mixtral_config(source.config)
    return llama, llama.decoder_config(source.config, kind=kind)


# ------------------------------------------------------------------------------------- CuMo


def plan_cumo(sources: Sources, options: Options) -> ConversionPlan:
    """The result of one stage of CuMo.

    It is a connector only, or dense parts in three files, or a whole model. A decoder folder and a
    CLIP folder provide the parts that the stage did not save.
    """
    del options  # CuMo has no adapters, and it always keeps CLIP's unread layers
    source, config = sources["cumo"], sources["cumo"].config
    if others := set(sources) - {"cumo", "clip", "decoder"}:
        raise ConvertError(
            f"CuMo consists of its folder, a CLIP and a decoder; leave out the sources "
            f"{sorted(others)}"
        )
    # CuMo's files override a CLIP or decoder folder with the same group.
    groups = {group: tensors for s in sources.values() for group, tensors in s.groups.items()}
    groups["clip"] = cumo.named_as_in_file(groups.get("clip", {}))
    groups |= source.groups
    # Settings. Tensor names say which parts are there and whether they have experts.
    named = cumo.part_names(groups)
    tower = sources["clip"].config if "clip" in sources else cumo.tower_json(source.path, config)
    encoder = cumo.clip_config(tower, named["encoder"], config)
    decoder = cumo.decoder_config(config)
    vision = cumo.vision_config(encoder, named["connector"], config)
    model = ModelConfig(decoder=decoder, vision=vision)
    # Only the parts that the sources hold are converted.
    parts = [f"vision/{part}/" for part in named if named[part]]
    dumped = model.model_dump(mode="json", exclude_none=True)
    if "model.embed_tokens.weight" in groups.get("base", ()):
        parts += ["embed/", "decoder/", "lm_head/"]
    else:
        del dumped["decoder"]
    return ConversionPlan(
        family="cumo",
        model=model,
        parts=tuple(parts),
        groups=groups,
        copies=[
            *cumo.decoder_copies(decoder),
            *cumo.vision_in_shards(vision),
            *cumo.vision_in_files(vision),
        ],
        excuses=[*cumo.EXCUSES, *([llama.TIED] if decoder.tie_embeddings else [])],
        config=dumped,
        files=copied_files([sources[r] for r in ("clip", "decoder", "cumo") if r in sources]),
    )


# Name of a family -> the function that makes its plan.
FAMILIES: dict[str, Callable[[Sources, Options], ConversionPlan]] = {
    "cumo": plan_cumo,
    "parts": plan_parts,
    "unimoe": plan_unimoe,
}
