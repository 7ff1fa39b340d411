"""A model that answers: requests -> answers, all at once or piece by piece."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from typing import Literal, cast

import numpy as np

from unimoe_jax.config import ModelConfig
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.generate.engine.engine import Engine
from unimoe_jax.generate.engine.sequence import ProgramSize, Sequence
from unimoe_jax.generate.engine.settings import CheckedSampling, Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.media_encoder import MediaEncoder
from unimoe_jax.generate.prompt import Prompt, make_prompt
from unimoe_jax.generate.request import Answer, Request

INCOMPLETE = "\ufffd"
"""Decoded in place of a character of which only the first bytes were generated."""
BATCH = 32
"""Requests that are answered side by side unless the caller says otherwise."""


@dataclass(frozen=True)
class Prepared:
    """A request that was checked, its media not decoded yet.

    soft_tokens: how many soft tokens each file of the prompt has.
    """

    prompt: Prompt
    sampling: CheckedSampling
    soft_tokens: tuple[int, ...]

    @property
    def size(self) -> ProgramSize:
        """The sizes that decide which programs the request needs."""
        length = len(self.prompt.stream(self.soft_tokens))
        return ProgramSize(
            prompt_length=length,
            full_length=length + self.sampling.max_new_tokens,
            greedy=self.sampling.greedy,
        )


@dataclass(frozen=True)
class Model:
    """A loaded model, made by `load`.

    defaults: sampling settings for requests that set none. notes: lines that a user should read,
    such as ignored settings. checksums: of the checkpoint's files; two models with the same
    checksums have the same parameters.
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
        """Answers in the order of the requests. All requests are checked before any is answered.

        Raises:
            GenerationError: a request cannot be answered, or batch_size is below 1.
        """
        _check_batch_size(batch_size)
        if isinstance(requests, str) or not isinstance(requests, Iterable):
            raise GenerationError(f"expected a list of requests, got {requests!r:.60}; see ask")
        prepared = [self.prepare(request) for request in requests]
        answers: dict[int, Answer] = {}
        for number, answer in self.answers(prepared, batch_size):
            if isinstance(answer, GenerationError):
                raise answer
            answers[number] = answer
        return [answers[number] for number in range(len(prepared))]

    def stream(self, request: Request) -> Generator[str, None, Answer]:
        """Yield the answer piece by piece. The generator returns the whole `Answer`.

        Raises:
            GenerationError: the request cannot be answered.
        """
        prepared = self.prepare(request)
        # Encode media first, so that a bad file is reported before the decoder is compiled.
        sequence = self.sequence(prepared)
        self.warm_up([prepared], 1)
        shown = ""
        for _ in self.engine.run([sequence], 1, steps=1, greedy=prepared.size.greedy):
            text = self.tokenizer.decode(sequence.tokens).lstrip()
            # Hold back an incomplete character, and spaces, which the whole answer does not end
            # with. Hold everything back while the text does not continue what was shown.
            complete = text if sequence.stop else text.rstrip(INCOMPLETE)
            if complete.rstrip() != shown and complete.startswith(shown):
                piece, shown = complete.rstrip()[len(shown) :], complete.rstrip()
                yield piece
        return self._answer(sequence)

    def prepare(self, request: Request) -> Prepared:
        """Check a request without decoding its media.

        Raises:
            GenerationError: see `Request.checked`, `make_prompt`, `MediaEncoder.count`,
                `Engine.check_fits`.
        """
        if not isinstance(request, Request):
            raise GenerationError(f"expected a Request, got {request!r:.60}; see ask")
        request.checked()
        sampling = request.sampling.over(self.defaults).checked()
        accepts = frozenset(self.config.tokens_per_medium())
        prompt = make_prompt(request, self.template, self.tokenizer, accepts)
        soft_tokens = tuple(self.media.count(file) for file in prompt.media)
        prepared = Prepared(prompt, sampling, soft_tokens)
        self.engine.check_fits(prepared.size.prompt_length, sampling)
        return prepared

    def warm_up(self, prepared: Collection[Prepared], batch_size: int) -> None:
        """Compile every program that these requests need in batches of up to `batch_size`."""
        self.media.warm_up(file for p in prepared for file in p.prompt.media)
        self.engine.warm_up([p.size for p in prepared], min(batch_size, len(prepared)))

    def answers(
        self, prepared: Collection[Prepared], batch_size: int = BATCH
    ) -> Iterator[tuple[int, Answer | GenerationError]]:
        """Yield (number of the request, answer) in the order in which answers are finished.

        A file whose fault only shows when it is decoded gives an error in place of the answer, and
        the other requests go on.

        Raises:
            GenerationError: batch_size is below 1.
        """
        _check_batch_size(batch_size)
        self.warm_up(prepared, batch_size)
        number_of: dict[int, int] = {}
        failed: list[tuple[int, GenerationError]] = []

        def sequences() -> Iterator[Sequence]:
            # The engine reads this generator as rows become free, so media are decoded then.
            for number, request in enumerate(prepared):
                try:
                    sequence = self.sequence(request)
                except GenerationError as error:
                    failed.append((number, error))
                    continue
                number_of[id(sequence)] = number
                yield sequence

        greedy = all(request.sampling.greedy for request in prepared)
        rows = max(1, min(batch_size, len(prepared)))
        for changed in self.engine.run(sequences(), rows, greedy=greedy):
            while failed:
                yield failed.pop()
            for sequence in changed:
                if sequence.stop and id(sequence) in number_of:
                    yield number_of.pop(id(sequence)), self._answer(sequence)
        yield from failed

    # ----------------------------------------------------------------- requests and sequences

    def sequence(self, prepared: Prepared) -> Sequence:
        """The request as the engine takes it, with its media encoded.

        Raises:
            GenerationError: a file cannot be decoded, or it has more soft tokens than its header
                announced and the prompt no longer fits.
        """
        soft = self.media.encode(prepared.prompt.media)
        stream = prepared.prompt.stream([len(tokens) for tokens in soft])
        self.engine.check_fits(len(stream), prepared.sampling)
        width, dtype = self.config.decoder.hidden_size, self.engine.programs.decoder.dtype
        table = np.concatenate(soft) if soft else np.zeros((0, width), dtype)
        return Sequence(stream.token_id, stream.modality, stream.slot, table, prepared.sampling)

    def _answer(self, sequence: Sequence) -> Answer:
        """The answer of a finished sequence."""
        # Traces of the prompt and of every call of the decoding program, along the positions.
        experts = np.concatenate(sequence.experts, axis=1) if sequence.experts else None
        return Answer(
            text=self.tokenizer.decode(sequence.tokens).strip(),
            tokens=tuple(sequence.tokens),
            stop=cast(Literal["eos", "length"], sequence.stop),  # set, as it is finished
            modality_T=sequence.modality,
            expert_LTK=experts,
            logits_TV=np.stack(sequence.logits) if sequence.logits else None,
        )


def _check_batch_size(size: int) -> None:
    """Refuse a batch size that is not a whole number from 1 up."""
    if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
        raise GenerationError(f"batch_size = {size!r}; allowed: a whole number >= 1")
