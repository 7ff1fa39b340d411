"""Rename the tensors of a fine-tune's files to the names that the conversion tables use.

The originals' loaders strip prefixes or look for a part of each name, so the same tensor has
different prefixes in different files. The rules here accept what those loaders accept.
"""

from __future__ import annotations

from collections.abc import Mapping

from unimoe_jax.convert.reader import ConvertError, Tensors

# Names of files, without suffix.
PROJECTOR, ALIGNER, NON_LORA = "mm_projector", "mm_audio_aligner", "non_lora_trainables"
PEFT_PREFIX = "base_model.model."


def tensors_by_table(stem: str, tensors: Tensors) -> Tensors:
    """Rename the tensors of the file `{stem}.*` as the original loader of that file does.

    Raises:
        ConvertError: two tensors have the same name once their prefixes are gone.
    """
    rule = RULES.get(stem)
    if rule is None:
        return tensors
    renamed: Tensors = {}
    for name, new_name in rule(tensors).items():
        # Nothing says which of the two is the trained tensor.
        if new_name in renamed:
            raise ConvertError(
                f"{tensors[name].file}: tensors {renamed[new_name].name!r} and {name!r} differ in "
                "their prefixes only; remove one of them"
            )
        renamed[new_name] = tensors[name]
    return renamed


def _from_stem(stem: str, name: str) -> str:
    """`…{stem}.x` -> `model.{stem}.x`; other names stay."""
    # The original's loader looks for the stem anywhere in a name.
    _, stem_and_dot, rest = name.partition(f"{stem}.")
    return f"model.{stem_and_dot}{rest}" if stem_and_dot else name


def _projector_names(tensors: Tensors) -> Mapping[str, str]:
    """Old name -> new name in mm_projector."""
    return {name: _from_stem(PROJECTOR, name) for name in tensors}


def _aligner_names(tensors: Tensors) -> Mapping[str, str]:
    """Old name -> new name in mm_audio_aligner.

    A speech model keeps its queries outside the aligner. Its loader takes the first tensor whose
    name does not contain the aligner's, so that tensor becomes the queries whatever its name.
    """
    names = {name: _from_stem(ALIGNER, name) for name in tensors}
    queries = next((name for name in tensors if f"{ALIGNER}." not in name), None)
    return names if queries is None else names | {queries: "model.query_tokens"}


def _non_lora_names(tensors: Tensors) -> Mapping[str, str]:
    """Old name -> new name in non_lora_trainables.

    The loaders strip `base_model.`, then one `model.` if any name begins with two of them. The
    tables use the names that PEFT saves, which have `base_model.model.` in front.
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
