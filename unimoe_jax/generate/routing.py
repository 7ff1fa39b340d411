"""Which experts a prompt's text, its media and the answer went to, layer by layer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unimoe_jax.config.media import MODALITY
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.model import Model
from unimoe_jax.generate.request import Answer

ANSWER = "answer"
NAMES = {number: name for name, number in MODALITY.items()}


def routed_layers(model: Model) -> list[int]:
    """Numbers of the decoder layers with experts.

    Raises:
        GenerationError: there are none.
    """
    layers = [number for number, is_moe in enumerate(model.config.decoder.moe_layers()) if is_moe]
    if not layers:
        raise GenerationError("this model's decoder has no experts: there is no routing to show")
    return layers


def routing_report(model: Model, answer: Answer) -> dict[str, Any]:
    """`layers`: decoder layers with experts. `groups`: for text and each medium of the prompt and
    for the answer, its tokens and the share [layer][expert] of their choices. `tokens`: for every
    position its group, its text (null for soft tokens) and its experts per layer.

    The last token of an answer is never fed to the model, so it has no experts.

    Raises:
        GenerationError: the model has no experts in its decoder, or they were not traced.
    """
    decoder, layers = model.config.decoder, routed_layers(model)
    if answer.expert_LTK is None:
        raise GenerationError(
            'experts were not traced; load(path, Settings(trace={"experts"})) keeps them'
        )
    expert_LTK = np.asarray(answer.expert_LTK)
    names = [NAMES[int(modality)] for modality in answer.modality_T]
    names += [ANSWER] * (expert_LTK.shape[1] - len(names))
    groups = {}
    for name in dict.fromkeys(names):
        at = np.array([own == name for own in names])
        chosen = expert_LTK[:, at, :, None] == np.arange(decoder.moe.num_experts)
        share_LE = chosen.mean(axis=(1, 2))
        groups[name] = {"tokens": int(at.sum()), "share": np.round(share_LE, 6).tolist()}
    pieces = [None] * len(answer.modality_T)
    pieces += [model.tokenizer.decode([token]) for token in answer.tokens]
    tokens = [
        {"group": name, "text": pieces[number], "experts": expert_LTK[:, number].tolist()}
        for number, name in enumerate(names)
    ]
    return {"answer": answer.text, "layers": layers, "groups": groups, "tokens": tokens}


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """A table: a block per group, a line per layer, the share of choices per expert."""
    experts = range(len(next(iter(report["groups"].values()))["share"][0]))
    for name, group in report["groups"].items():
        yield f"{name} ({group['tokens']} tokens)"
        yield "  layer " + "".join(f"{f'e{number}':>6}" for number in experts)
        for layer, shares in zip(report["layers"], group["share"], strict=True):
            yield f"  {layer:>5} " + "".join(f"{share:>6.0%}" for share in shares)


def save_report(report: dict[str, Any], path: Path) -> None:
    """As JSON.

    Raises:
        GenerationError: it cannot be written.
    """
    try:
        path.write_text(json.dumps(report) + "\n")
    except OSError as error:
        raise GenerationError(f"{path}: cannot be written: {error.strerror}") from error
