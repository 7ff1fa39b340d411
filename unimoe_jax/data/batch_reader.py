"""Read the batch of one step, in a thread or in a worker process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unimoe_jax.config import ModelConfig
from unimoe_jax.data.batch import Batch, Signature, batch_spec
from unimoe_jax.data.batch_writer import BatchWriter
from unimoe_jax.data.index import SampleIndex
from unimoe_jax.data.plan import BatchPlan
from unimoe_jax.data.samples import SampleReader
from unimoe_jax.data.tally import BadSample, pack_events

EVENTS = "events"


class BatchReader:
    """Reads the batch of a step for some of the shards. Picklable: worker processes get a copy."""

    def __init__(
        self,
        plan: BatchPlan,
        readers: list[SampleReader],
        indices: list[SampleIndex],
        model: ModelConfig,
    ):
        self.plan, self.readers, self.model = plan, readers, model
        self.indices = [SampleIndex(*_bare(index)) for index in indices]

    def spec(self, signature: Signature, parts: int = 1, of: int = 1) -> Batch:
        """`ArraySpec`s of a batch, or of `parts` of its `of` equal parts."""
        loader, shards = self.plan.loader, self.plan.shards
        return batch_spec(
            self.model,
            loader.rows * parts // of,
            loader.row_length,
            shards * parts // of,
            self.plan.capacity(signature),
        )

    def read(self, step: int, parts: Sequence[int] = (0,), of: int = 1) -> tuple[Batch, np.ndarray]:
        """(`parts` of the batch of `step` when cut into `of`, packed events).

        A bad sample leaves its positions as padding.
        """
        number, rows, epoch = self.plan.batch(step)
        signature = self.plan.signatures[number]
        writer = BatchWriter(
            self.spec(signature, len(parts), of),
            self.plan.capacity(signature),
            self.model.tokens_per_medium(),
        )
        if self.model.audio:
            writer.full_audio(self.model.audio.num_samples)
        own = rows.reshape(of, -1)[list(parts)].ravel()
        per_shard = len(rows) // self.plan.shards
        events, loaded = [], 0
        for position, row in enumerate(own.tolist()):
            streams = []
            for sample in epoch.row(row) if row >= 0 else ():
                loaded += 1
                stream, news = self._load(sample)
                events += news
                streams.append(stream)
            writer.row(position, position // per_shard, streams)
        return writer.batch, pack_events(events, loaded)

    def _load(self, sample: int):
        samples = self.plan.samples
        source, record = int(samples.source[sample]), int(samples.record[sample])
        reader = self.readers[source]
        try:
            return reader.load(record, self.indices[source].size(record))
        except BadSample as bad:
            return None, [reader.event(record, "bad", bad.reason, bad.message)]


def _bare(index: SampleIndex) -> tuple:
    sizes = index.tokens, index.labels, index.entries, index.whole
    return index.good, *sizes, [], index.digest


class StepDataSource:
    """A grain source: item i is the batch of step `start + i`, as a dict of arrays."""

    def __init__(self, reader: BatchReader, start: int, stop: int, parts: Sequence[int], of: int):
        self.reader, self.start, self.stop = reader, start, stop
        self.parts, self.of = tuple(parts), of

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, item) -> dict[str, np.ndarray]:
        batch, events = self.reader.read(self.start + int(item), self.parts, self.of)
        arrays = {name: array for name, array in batch._asdict().items() if array is not None}
        return arrays | {EVENTS: events}

    def __repr__(self) -> str:
        return f"_Steps({self.start}, {self.stop})"
