"""A model that answers: requests -> answers, all at once or piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from unimoe_jax.config import ModelConfig
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.generate.engine.engine import Engine
from unimoe_jax.generate.engine.sequence import ProgramSize, Sequence
from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.media_encoder import MediaEncoder
from unimoe_jax.generate.prompt import Prompt, make_prompt
from unimoe_jax.generate.request import Answer, Request

BROKEN = "\ufffd"
BATCH = 32


@dataclass(frozen=True)
class Prepared:
    """A request that was checked: its prompt, complete sampling, and positions of the prompt."""

    prompt: Prompt
    sampling: Sampling
    soft_tokens: tuple[int, ...]

    @property
    def size(self) -> ProgramSize:
        stream = len(self.prompt.stream(self.soft_tokens))
        return ProgramSize(
            stream, stream + self.sampling.max_new_tokens, self.sampling.temperature == 0
        )


@dataclass(frozen=True)
class Model:
    """Made by `load`.

    notes: what a user should know about how it was loaded. checksums: of its files; they tell
    models apart.
    """

    config: ModelConfig
    tokenizer: Tokenizer
    template: str
    defaults: Sampling
    engine: Engine
    media: MediaEncoder
    notes: tuple[str, ...] = ()
    checksums: str = ""

    # ------------------------------------------------------------------------------ asking

    def generate(self, requests: Iterable[Request], batch_size: int = BATCH) -> list[Answer]:
        """Answers, in the order of the requests.

        Raises:
            GenerationError: a request that cannot be answered, or a batch of less than one; nothing
                is decoded then.
        """
        _check_batch_size(batch_size)
        if isinstance(requests, str) or not isinstance(requests, Iterable):
            raise GenerationError(f"expected a list of requests, got {requests!r:.60}; see ask")
        prepared = [self.prepare(request) for request in requests]
        answers: list[Answer | None] = [None] * len(prepared)
        for number, answer in self.answers(prepared, batch_size):
            if isinstance(answer, GenerationError):
                raise answer
            answers[number] = answer
        return answers

    def stream(self, request: Request) -> Iterator[str]:
        """The answer piece by piece; the generator returns the whole `Answer`.

        Raises:
            GenerationError: the request cannot be answered.
        """
        prepared = self.prepare(request)
        # Bad files are found before anything is compiled for the answer.
        sequence = self.sequence(prepared)
        self.warm_up([prepared], 1)
        shown = ""
        for _ in self.engine.run([sequence], 1, steps=1, greedy=prepared.size.greedy):
            text = self.tokenizer.decode(sequence.tokens).lstrip()
            # The end may be part of a character or a space that is never followed by anything.
            whole = text if sequence.stop else text.rstrip(BROKEN)
            if whole.rstrip() != shown and whole.startswith(shown):
                new, shown = whole.rstrip()[len(shown) :], whole.rstrip()
                yield new
        return self._answer(sequence)

    def prepare(self, request: Request) -> Prepared:
        """Check a request without decoding media.

        Raises:
            GenerationError: see `Request.checked`, `make_prompt`, `MediaEncoder.count`,
                `Engine.check`.
        """
        if not isinstance(request, Request):
            raise GenerationError(f"expected a Request, got {request!r:.60}; see ask")
        request.checked()
        sampling = request.sampling.over(self.defaults).checked()
        accepts = frozenset(self.config.tokens_per_medium())
        prompt = make_prompt(request, self.template, self.tokenizer, accepts)
        soft_tokens = tuple(self.media.count(file) for file in prompt.media)
        prepared = Prepared(prompt, sampling, soft_tokens)
        self.engine.check(prepared.size.prompt, sampling)
        return prepared

    def warm_up(self, prepared: Collection[Prepared], batch_size: int) -> None:
        """Compile everything these need."""
        self.media.warm_up(file for p in prepared for file in p.prompt.media)
        self.engine.warm_up([p.size for p in prepared], min(batch_size, len(prepared)))

    def answers(
        self, prepared: Collection[Prepared], batch_size: int = BATCH
    ) -> Iterator[tuple[int, Answer | GenerationError]]:
        """(number, answer) as they are finished; an error where only decoding a file shows it.

        Raises:
            GenerationError: a batch of less than one.
        """
        _check_batch_size(batch_size)
        self.warm_up(prepared, batch_size)
        numbers: dict[int, int] = {}
        failed: list[tuple[int, GenerationError]] = []

        def sequences() -> Iterator[Sequence]:
            for number, one in enumerate(prepared):
                try:
                    sequence = self.sequence(one)
                except GenerationError as error:
                    failed.append((number, error))
                    continue
                numbers[id(sequence)] = number
                yield sequence

        greedy = all(p.sampling.temperature == 0 for p in prepared)
        rows = max(1, min(batch_size, len(prepared)))
        for changed in self.engine.run(sequences(), rows, greedy=greedy):
            while failed:
                yield failed.pop()
            for sequence in changed:
                if sequence.stop and id(sequence) in numbers:
                    yield numbers.pop(id(sequence)), self._answer(sequence)
        yield from failed

    # ----------------------------------------------------------------------------- between

    def sequence(self, prepared: Prepared) -> Sequence:
        """The prompt as the engine takes it, media encoded."""
        soft = self.media.encode(prepared.prompt.media)
        stream = prepared.prompt.stream([len(part) for part in soft])
        self.engine.check(len(stream), prepared.sampling)
        width = self.config.decoder.hidden_size
        table = np.concatenate(soft) if soft else np.zeros((0, width), self.engine.decoder.dtype)
        return Sequence(stream.token_id, stream.modality, stream.slot, table, prepared.sampling)

    def _answer(self, sequence: Sequence) -> Answer:
        experts = np.concatenate(sequence.experts, axis=1) if sequence.experts else None
        return Answer(
            self.tokenizer.decode(sequence.tokens).strip(),
            tuple(sequence.tokens),
            sequence.stop,
            sequence.modality,
            experts,
            np.stack(sequence.logits) if sequence.logits else None,
        )


def _check_batch_size(size: int) -> None:
    if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
        raise GenerationError(f"batch_size = {size!r}; allowed: a whole number >= 1")
