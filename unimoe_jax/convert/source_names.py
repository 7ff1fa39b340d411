"""Side files' tensors under the names of the tables, whatever prefixes they were saved with.

The originals' loaders strip prefixes or match a part of each name, so files differ in them.
"""

from __future__ import annotations

from collections.abc import Mapping

from unimoe_jax.convert.reader import ConvertError, Tensors

PROJECTOR, ALIGNER, NON_LORA = "mm_projector", "mm_audio_aligner", "non_lora_trainables"
PEFT_PREFIX = "base_model.model."


def tensors_by_table(stem: str, tensors: Tensors) -> Tensors:
    """The tensors of the file `{stem}.*`, renamed as far as its loader is lenient.

    Raises:
        ConvertError: two tensors have one name without what stands before it.
    """
    rule = RULES.get(stem)
    if rule is None:
        return tensors
    renamed: Tensors = {}
    for name, new in rule(tensors).items():
        if new in renamed:
            raise ConvertError(
                f"{tensors[name].file}: tensors {renamed[new].name!r} and {name!r} differ in their "
                "prefixes only; remove one of them"
            )
        renamed[new] = tensors[name]
    return renamed


def _from_mark(stem: str, name: str) -> str:
    """`…{stem}.x` -> `model.{stem}.x`; other names stay."""
    _, mark, rest = name.partition(f"{stem}.")
    return f"model.{mark}{rest}" if mark else name


def _projector_names(tensors: Tensors) -> Mapping[str, str]:
    return {name: _from_mark(PROJECTOR, name) for name in tensors}


def _aligner_names(tensors: Tensors) -> Mapping[str, str]:
    """Speech keeps its queries outside the aligner: the first such tensor, whatever its name."""
    names = {name: _from_mark(ALIGNER, name) for name in tensors}
    outside = next((name for name in tensors if f"{ALIGNER}." not in name), None)
    return names if outside is None else names | {outside: "model.query_tokens"}


def _non_lora_names(tensors: Tensors) -> Mapping[str, str]:
    """The loaders strip `base_model.`, then one `model.` if any name begins with two.

    The table knows the names as PEFT saves them, with both.
    """
    bare = {name: name.removeprefix("base_model.") for name in tensors}
    if any(name.startswith("model.model.") for name in bare.values()):
        bare = {name: short.removeprefix("model.") for name, short in bare.items()}
    return {name: PEFT_PREFIX + short for name, short in bare.items()}


RULES = {
    PROJECTOR: _projector_names,
    ALIGNER: _aligner_names,
    NON_LORA: _non_lora_names,
}
