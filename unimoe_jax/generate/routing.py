"""Which experts were chosen for a prompt's text, its media and the answer, layer by layer."""

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
"""The group of generated tokens; all other groups are modalities of the prompt."""
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
    """The routing of one answer, ready to be written as JSON.

    `layers`: numbers of the decoder layers with experts.
    `groups`: for text and each medium of the prompt and for the answer, the number of `tokens` and
        the `share` [layer][expert] of all choices that an expert got.
    `tokens`: for every position its group, its text (null for soft tokens) and its experts in
        every layer.

    The last token of an answer is never fed to the model, so it has no experts.

    Raises:
        GenerationError: the decoder has no experts, or they were not traced.
    """
    layers, moe = routed_layers(model), model.config.decoder.moe
    if answer.expert_LTK is None or moe is None:
        raise GenerationError(
            "experts were not traced; load(path, LoadOptions(trace=frozenset({'experts'}))) keeps "
            "them"
        )
    expert_LTK = np.asarray(answer.expert_LTK)
    # The group of every position that was fed to the model.
    groups = [NAMES[int(modality)] for modality in answer.modality_T]
    groups += [ANSWER] * (expert_LTK.shape[1] - len(groups))
    # Shares of the experts: count every choice of the group's positions once.
    summary = {}
    for group in dict.fromkeys(groups):
        members_T = np.array([name == group for name in groups])
        chosen_LTKE = expert_LTK[:, members_T, :, None] == np.arange(moe.num_experts)
        share_LE = chosen_LTKE.mean(axis=(1, 2))
        summary[group] = {"tokens": int(members_T.sum()), "share": np.round(share_LE, 6).tolist()}
    # Every position with its experts.
    texts = [None] * len(answer.modality_T)
    texts += [model.tokenizer.decode([token]) for token in answer.tokens]
    tokens = [
        {"group": group, "text": texts[number], "experts": expert_LTK[:, number].tolist()}
        for number, group in enumerate(groups)
    ]
    return {"answer": answer.text, "layers": layers, "groups": summary, "tokens": tokens}


def report_lines(report: dict[str, Any]) -> Iterator[str]:
    """A table of the report: one block per group, one line per layer, one column per expert."""
    num_experts = len(next(iter(report["groups"].values()))["share"][0])
    for name, group in report["groups"].items():
        yield f"{name} ({group['tokens']} tokens)"
        yield "  layer " + "".join(f"{f'e{number}':>6}" for number in range(num_experts))
        for layer, shares in zip(report["layers"], group["share"], strict=True):
            yield f"  {layer:>5} " + "".join(f"{share:>6.0%}" for share in shares)


def save_report(report: dict[str, Any], path: Path) -> None:
    """Write the report as JSON.

    Raises:
        GenerationError: the file cannot be written.
    """
    try:
        path.write_text(json.dumps(report) + "\n")
    except OSError as error:
        raise GenerationError(f"{path}: cannot be written: {error.strerror}") from error
