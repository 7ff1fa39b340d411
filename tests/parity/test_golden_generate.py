"""Recorded greedy decoding, from checkpoint folders and raw media to tokens and logits.

Every system in the golden directory is imported as a user would import it. The loaded model answers
the recorded questions one by one, all in one batch, and without a cache.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.golden_dir import golden_dir
from unimoe_jax.config.media import TEXT
from unimoe_jax.convert.importing import import_checkpoint
from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.loader import LoadOptions, load
from unimoe_jax.generate.model import Model
from unimoe_jax.generate.request import Answer, Media, Request, ask

LOGITS_ATOL = 5e-4  # README of the recorded systems: step logits
PLACEHOLDER_IDS = {"image": -200, "voice": -300, "video": -400}


@dataclass(frozen=True)
class Recorded:
    """A folder of recorded data with questions."""

    folder: Path

    @property
    def sources(self) -> list[Path]:
        """What to import: the fine-tuned model where the folder holds several stages of it."""
        folder = self.folder / "checkpoint"
        if not any(folder.glob("*/clip.bin")):
            return [folder]
        configs = folder.glob("*/config.json")
        models = [path.parent for path in configs if "mm_projector_type" in path.read_text()]
        return [path for path in models if not path.name.endswith(("-pft", "-upcycled"))]

    def requests(self, model: Model) -> list[Request]:
        kinds = {"image": "image", "video": "video"}
        kinds["voice"] = "audio" if model.config.audio else "speech"
        requests = []
        inputs = np.load(self.folder / "inputs.npz")
        queries = json.loads((self.folder / "generate_queries.json").read_text())
        for number, query in enumerate(queries):
            media, ids = [], inputs[f"generate/{number}/input_ids"]
            for key, token in PLACEHOLDER_IDS.items():
                # The released programs write one placeholder for all files of a kind, so they
                # ignore all files after the first.
                for file in np.atleast_1d(query.get(key) or [])[: np.sum(ids == token)]:
                    path = self.folder / file
                    path = path if path.exists() else self.folder / "media" / file
                    media.append(Media(kinds[key], (str(path),)))
            requests.append(ask(query.get("query", query.get("q")), media))
        return requests

    def check(self, number: int, answer: Answer) -> None:
        """Compare an answer: tokens exactly, logits within the tolerance."""
        key = f"generate/{number}"
        np.testing.assert_array_equal(answer.tokens, self.expected[f"{key}/new_tokens"], key)
        np.testing.assert_allclose(
            answer.logits_TV, self.expected[f"{key}/step_logits"], atol=LOGITS_ATOL, rtol=0
        )

    @property
    def expected(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / "expected.safetensors")

    @property
    def new_tokens(self) -> int:
        lengths = {len(v) for k, v in self.expected.items() if k.endswith("/new_tokens")}
        return max(lengths)


def recorded_models() -> list[Recorded]:
    """Systems that have questions and the whole model that answered them."""
    whole = [
        path.parents[2]
        for name in ("mlp_gates.bin", "clip.bin")
        for path in golden_dir().glob(f"*/checkpoint/*/{name}")
    ]
    return [Recorded(path) for path in sorted(whole) if (path / "generate_queries.json").is_file()]


RECORDED = recorded_models()


def test_there_are_systems():
    assert RECORDED, f"no recorded questions in {golden_dir()}"


@pytest.fixture(scope="module", params=RECORDED, ids=lambda recorded: recorded.folder.name)
def recorded(request) -> Recorded:
    return request.param


@pytest.fixture(scope="module")
def model(recorded, tmp_path_factory) -> Model:
    folder = tmp_path_factory.mktemp("imported") / "model"
    import_checkpoint(recorded.sources, folder, tell=lambda line: None)
    with jax.default_matmul_precision("highest"):
        return load(folder, LoadOptions(trace=frozenset({"logits"})))


@pytest.fixture(scope="module")
def asked(recorded, model) -> list[Request]:
    settings = Sampling(max_new_tokens=recorded.new_tokens)
    return [Request(r.messages, settings) for r in recorded.requests(model)]


def test_prompts(recorded, model, asked):
    """Compare the token ids and the places of media."""
    inputs = np.load(recorded.folder / "inputs.npz")
    for number, request in enumerate(asked):
        prompt = model.prepare(request)
        stream = prompt.prompt.stream([1] * len(prompt.soft_tokens))
        ids = inputs[f"generate/{number}/input_ids"][0]
        np.testing.assert_array_equal(stream.token_id[stream.modality == TEXT], ids[ids >= 0])
        np.testing.assert_array_equal(stream.modality != TEXT, ids < 0)


def test_one_by_one(recorded, model, asked):
    for number, request in enumerate(asked):
        (answer,) = model.generate([request])
        recorded.check(number, answer)


def test_in_a_batch(recorded, model, asked):
    for number, answer in enumerate(model.generate(asked, batch_size=len(asked))):
        recorded.check(number, answer)


def test_without_a_cache(recorded, model, asked):
    """Compute every token by a prefill of all tokens before it."""
    for number, request in enumerate(asked):
        tokens, logits = [], []
        for _ in range(recorded.new_tokens):
            sequence = model.sequence(model.prepare(request))
            fed = np.array(tokens, np.int32)
            sequence.token_id = np.append(sequence.token_id, fed)
            sequence.modality = np.append(sequence.modality, np.zeros_like(fed))
            sequence.slot = np.append(sequence.slot, np.full_like(fed, -1))
            sequence.sampling = Sampling(max_new_tokens=1).checked()
            list(model.engine.run([sequence], 1, greedy=True))
            tokens += sequence.tokens
            logits += sequence.logits
            if tokens[-1] in model.engine.programs.eos:
                break  # the recorded run stops here as well, possibly before new_tokens
        recorded.check(number, Answer("", tuple(tokens), "length", logits_TV=np.stack(logits)))
