"""generation_config.json -> end tokens and default settings, with notes on ignored keys."""

from __future__ import annotations

from typing import Any

from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.found import GENERATION_FILE, Found

FOLLOWED = {"eos_token_id", "do_sample", "temperature", "top_p", "top_k", "max_new_tokens"}
SILENT = {
    "bos_token_id",
    "pad_token_id",
    "decoder_start_token_id",
    "max_length",  # transformers ignores it as well if max_new_tokens is known
    "transformers_version",
    "early_stopping",
    "renormalize_logits",
    "return_dict_in_generate",
    "use_cache",
    "cache_implementation",
}
"""Keys that change no answer, so ignoring them needs no note."""
NEUTRAL = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "repetition_penalty": 1.0,
    "encoder_repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
    "guidance_scale": 1.0,
    "num_return_sequences": 1,
}
"""Values with which a key that is not implemented has no effect. The neutral value of every other
key is 0, false or empty."""


def generation_settings(found: Found) -> tuple[tuple[int, ...], Sampling, tuple[str, ...]]:
    """(ids of the end tokens, default sampling, notes on keys that are not followed).

    Raises:
        GenerationError: a value in generation_config.json is not allowed.
    """
    # transformers writes null for keys that nobody has set.
    values = {key: value for key, value in found.generation.items() if value is not None}
    eos = _end_tokens(values.get("eos_token_id", found.tokenizer.eos_id))
    do_sample = values.get("do_sample", False)
    if not isinstance(do_sample, bool):
        raise GenerationError(
            f"{GENERATION_FILE}: do_sample = {do_sample!r}; allowed: true or false"
        )
    defaults = Sampling(
        # The default temperature of transformers is 1 if it samples.
        temperature=values.get("temperature", 1.0) if do_sample else 0.0,
        top_p=values.get("top_p"),
        top_k=values.get("top_k"),
        max_new_tokens=values.get("max_new_tokens"),
    )
    try:
        defaults.checked()
    except GenerationError as error:
        raise GenerationError(f"{found.folder / GENERATION_FILE}: {error}") from error
    return eos, defaults, _notes(values, do_sample)


def _end_tokens(value: Any) -> tuple[int, ...]:
    """The ids of one end token or of a list of them."""
    eos = tuple(value) if isinstance(value, list) else (value,)
    # Check the exact type: in Python true is 1, which is a token of every vocabulary.
    if not all(type(token) is int and abs(token) < 2**31 for token in eos):
        raise GenerationError(
            f"{GENERATION_FILE}: eos_token_id = {value!r}; allowed: the id of a token, or a list "
            "of ids"
        )
    return eos


def _notes(values: dict[str, Any], do_sample: bool) -> tuple[str, ...]:
    """One line per key that would change answers but is not followed."""
    notes = [
        f"{GENERATION_FILE}: {key} = {values[key]!r:.60} is not followed"
        for key in sorted(set(values) - FOLLOWED - SILENT)
        # transformers begins the names of internal keys with an underscore.
        if not key.startswith("_") and _has_effect(key, values[key])
    ]
    temperature = values.get("temperature", 1)
    if not do_sample and temperature not in (0, 1):
        notes.append(
            f"{GENERATION_FILE}: temperature = {temperature!r:.60} has no effect without do_sample"
        )
    return tuple(notes)


def _has_effect(key: str, value: Any) -> bool:
    """Whether transformers would do something for this value of a key."""
    return value != NEUTRAL[key] if key in NEUTRAL else bool(value)
