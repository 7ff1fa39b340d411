"""Which keys of a generation_config.json are followed."""

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
    "max_length",  # where max_new_tokens is known, transformers does not follow it either
    "transformers_version",
    "early_stopping",
    "renormalize_logits",
    "return_dict_in_generate",
    "use_cache",
    "cache_implementation",
}
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


def generation_settings(found: Found) -> tuple[tuple[int, ...], Sampling, tuple[str, ...]]:
    """(end tokens, default sampling, notes on keys that are not followed).

    Raises:
        GenerationError: a value in generation_config.json that makes no sense.
    """
    # transformers writes null for what nobody set.
    given = {key: value for key, value in found.generation.items() if value is not None}
    eos = given.get("eos_token_id", found.tokenizer.eos_id)
    eos = tuple(eos) if isinstance(eos, list) else (eos,)
    # In Python true is 1, which is a token of every vocabulary.
    if not all(type(token) is int and abs(token) < 2**31 for token in eos):
        raise GenerationError(
            f"{GENERATION_FILE}: eos_token_id = {given['eos_token_id']!r}; allowed: the id of a "
            "token, or a list of ids"
        )
    drawn = given.get("do_sample", False)
    if not isinstance(drawn, bool):
        raise GenerationError(f"{GENERATION_FILE}: do_sample = {drawn!r}; allowed: true or false")
    defaults = Sampling(
        # transformers draws with temperature 1 and the best 50 unless it is told otherwise.
        temperature=given.get("temperature", 1.0) if drawn else 0.0,
        top_p=given.get("top_p"),
        top_k=given.get("top_k"),
        max_new_tokens=given.get("max_new_tokens"),
    )
    try:
        defaults.checked()
    except GenerationError as error:
        raise GenerationError(f"{found.folder / GENERATION_FILE}: {error}") from error
    notes = [
        f"{GENERATION_FILE}: {key} = {given[key]!r:.60} is not followed"
        for key in sorted(set(given) - FOLLOWED - SILENT)
        if not key.startswith("_") and _asks(key, given[key])
    ]
    if not drawn and given.get("temperature", 1) not in (0, 1):
        hot = given["temperature"]
        notes.append(f"{GENERATION_FILE}: temperature = {hot!r:.60} says nothing without do_sample")
    return eos, defaults, tuple(notes)


def _asks(key: str, value: Any) -> bool:
    return value != NEUTRAL[key] if key in NEUTRAL else bool(value)
