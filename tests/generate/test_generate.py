"""Answers of a whole model: batches, meshes, sampling, and the programs that are compiled."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest

from tests.generate.conftest import TRACED
from unimoe_jax.config import MeshConfig
from unimoe_jax.generate.engine.decoding_programs import DecodingPrograms
from unimoe_jax.generate.engine.engine import Engine
from unimoe_jax.generate.engine.program_cache import ProgramCache
from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.loader import LoadOptions, load
from unimoe_jax.generate.request import Answer, Message, Request, ask


def tokens(answers: list[Answer]) -> list[tuple[int, ...]]:
    return [answer.tokens for answer in answers]


@pytest.fixture(scope="module")
def singles(model, mixed) -> list[Answer]:
    """The answer to each request, generated alone."""
    return [model.generate([request])[0] for request in mixed]


def test_the_answers_differ(singles):
    """If all answers were the same, the tests below could not fail."""
    assert len({answer.tokens[:4] for answer in singles}) == len(singles)
    assert len({token for answer in singles for token in answer.tokens}) > 10


@pytest.mark.parametrize("rows", [4, 2])
def test_a_mixed_batch_equals_single_runs(model, mixed, singles, rows):
    """With two rows, later requests take rows that became free, while the cursor has moved on."""
    batch = model.generate(mixed, batch_size=rows)
    assert tokens(batch) == tokens(singles)
    for answer, single in zip(batch, singles, strict=True):
        np.testing.assert_allclose(answer.logits_TV, single.logits_TV, atol=1e-4)
        np.testing.assert_array_equal(answer.expert_LTK, single.expert_LTK)


def test_streaming_gives_the_same_answer(model, mixed, singles):
    pieces = []
    stream = model.stream(mixed[3])
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            answer = end.value
            break
    assert answer.tokens == singles[3].tokens
    assert "".join(pieces) == answer.text == singles[3].text


def test_eight_devices_equal_one(checkpoint, mixed, singles, devices):
    """Experts are split over four devices, prompts and rows over all eight."""
    assert len(devices) == 8
    many = load(checkpoint, LoadOptions(mesh=MeshConfig(expert=4)))
    assert many.engine.programs.program_cache.data_shards == 8
    assert tokens(many.generate(mixed)) == tokens(singles)


def test_bfloat16_runs_and_is_close(checkpoint, mixed, singles):
    """Rounding changes which experts are chosen, so logits are only compared by correlation."""
    half = load(checkpoint, replace(TRACED, precision="bfloat16"))
    (answer,) = half.generate(mixed[:1])
    assert answer.logits_TV.dtype == np.float32
    pair = np.stack([answer.logits_TV[0], singles[0].logits_TV[0]])
    assert np.corrcoef(pair)[0, 1] > 0.9


def test_nothing_is_compiled_after_warm_up(model, mixed):
    prepared = [model.prepare(request) for request in mixed]
    model.warm_up(prepared, 2)
    compiled = list(model.engine.programs.program_cache.compiled)
    with _no_compilation():
        for _ in model.answers(prepared, 2):
            pass
    assert list(model.engine.programs.program_cache.compiled) == compiled


def test_prompts_are_prefilled_together(model, mixed, singles):
    """Three prompts fill more than half of a program of four rows. No answer changes."""
    three = model.generate([mixed[2], mixed[0], mixed[1]], batch_size=4)
    assert tokens(three) == [tokens(singles)[number] for number in (2, 0, 1)]
    assert any(
        name.startswith("prefill 4 x ") for name in model.engine.programs.program_cache.compiled
    )


class _no_compilation:
    """Fails if JAX compiles anything inside the block."""

    def __enter__(self):
        self.seen: list[str] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def _listen(self, event: str, duration: float, **_) -> None:
        if "backend_compile" in event:
            self.seen.append(event)

    def __exit__(self, *error):
        jax.monitoring.unregister_event_duration_listener(self._listen)
        if error[0] is None:
            assert not self.seen, self.seen


def test_rings_grow(model, mixed):
    """An answer that outgrows its ring goes on as if the ring had been long from the start."""
    prompt = model.prepare(mixed[1])
    length = 256 - prompt.size.prompt_length + 20
    sampling = Sampling(max_new_tokens=length)
    longer = [replace(request, sampling=sampling) for request in mixed[:2]]
    both = model.generate(longer)
    again = [model.generate([request])[0] for request in longer]
    assert tokens(both) == tokens(again)
    # Prefill the prompt with the whole answer: the last logits must be the same without a cache.
    sequence = model.sequence(model.prepare(mixed[1]))
    text = np.array(both[1].tokens[:-1], np.int32)
    sequence.token_id = np.append(sequence.token_id, text)
    sequence.modality = np.append(sequence.modality, np.zeros_like(text))
    sequence.slot = np.append(sequence.slot, np.full_like(text, -1))
    sequence.sampling = Sampling(max_new_tokens=1).checked()
    list(model.engine.run([sequence], 1, greedy=True))
    assert len(both[1].tokens) == length or both[1].stop == "eos"
    np.testing.assert_allclose(sequence.logits[0], both[1].logits_TV[-1], atol=1e-4)


# -------------------------------------------------------------------------------- sampling


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(model, mixed):
    sampled = [
        replace(request, sampling=Sampling(1.5, 0.9, 20, seed, 8))
        for seed, request in enumerate(mixed)
    ]
    batch = tokens(model.generate(sampled))
    assert batch == [model.generate([request])[0].tokens for request in sampled]
    other = replace(sampled[0], sampling=replace(sampled[0].sampling, seed=99))
    assert model.generate([other])[0].tokens != batch[0]


def test_greedy_and_sampled_rows_share_a_batch(model, mixed, singles):
    sampled = replace(mixed[0], sampling=Sampling(1.5, seed=3, max_new_tokens=9))
    answers = model.generate([sampled, *mixed[1:]])
    assert tokens(answers[1:]) == tokens(singles[1:])
    assert answers[0].tokens != singles[0].tokens


# ---------------------------------------------------------------------------- conversations


def test_history_is_part_of_the_prompt(model, mixed, singles):
    first = mixed[1].messages[0]
    turns = (first, Message("assistant", "A fox."), Message("user", "Where is the fox?"))
    answer = model.generate([Request(turns, Sampling(max_new_tokens=9))])[0]
    assert answer.prompt_tokens > singles[1].prompt_tokens
    assert answer.tokens not in tokens(singles)


def test_media_are_encoded_once(model, mixed, monkeypatch):
    model.generate([mixed[1]])
    monkeypatch.setattr(model.media.processors, "load", None)
    model.generate([mixed[1]])


def test_answers_of_one_token_come_one_after_another(model, mixed):
    """They are finished when they are prefilled, so their row is free for the next one at once."""
    read = []

    def sequences():
        for number in range(5):
            read.append(number)
            request = replace(mixed[0], sampling=Sampling(max_new_tokens=1))
            yield model.sequence(model.prepare(request))

    steps = model.engine.run(sequences(), 1, greedy=True)
    for number, (sequence,) in enumerate(steps):
        assert sequence.stop
        assert read == list(range(number + 1))
    assert len(read) == 5


def test_eos_stops(model, mixed, singles, checkpoint):
    """If a token of the answer is made the end token, the answer ends with it."""
    answer = singles[0]
    # A token that is not in the answer before.
    place = next(i for i, token in enumerate(answer.tokens) if answer.tokens.index(token) == i > 1)
    programs = model.engine.programs
    ends_there = DecodingPrograms(
        programs.decoder,
        programs.weights,
        ProgramCache(programs.program_cache.mesh),
        eos=(answer.tokens[place],),
    )
    (stopped,) = replace(model, engine=Engine(ends_there)).generate([mixed[0]])
    assert stopped.stop == "eos"
    assert stopped.tokens == answer.tokens[: place + 1]
    assert ask("x").sampling == Sampling()
