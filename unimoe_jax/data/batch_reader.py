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
from unimoe_jax.data.stream import Stream
from unimoe_jax.data.tally import BadSample, Event, pack_events

EVENTS = "events"
"""Key of the packed events beside the arrays of a batch."""


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
        # The events of indexing have been counted already; copies for workers need only the sizes.
        self.indices = [index.without_events() for index in indices]

    def spec(self, signature: Signature, shards: int = 1, num_shards: int = 1) -> Batch:
        """Return the `ArraySpec`s of a batch, or of `shards` of its `num_shards` data shards."""
        loader = self.plan.loader
        return batch_spec(
            self.model,
            rows=loader.rows * shards // num_shards,
            row_length=loader.row_length,
            shards=self.plan.shards * shards // num_shards,
            capacity=self.plan.capacity(signature),
        )

    def read(
        self, step: int, shards: Sequence[int] = (0,), num_shards: int = 1
    ) -> tuple[Batch, np.ndarray]:
        """Read the data shards `shards` of the batch of `step`: (batch, packed events).

        num_shards: data shards into which the whole batch is cut. A bad sample leaves its positions
        as padding.

        Example: a batch of 8 rows over num_shards=4 has 2 rows per shard; shards=(1, 3) reads the
        rows 2, 3, 6 and 7, in this order.
        """
        number, rows, epoch = self.plan.batch(step)
        signature = self.plan.signatures[number]
        # Begin with empty arrays for these shards.
        writer = BatchWriter(
            self.spec(signature, len(shards), num_shards),
            self.plan.capacity(signature),
            self.model.tokens_per_medium(),
        )
        if self.model.audio:
            writer.full_audio(self.model.audio.num_samples)
        # A data shard holds one or more pool groups, each of which has the same number of rows.
        local_rows = rows.reshape(num_shards, -1)[list(shards)].ravel()
        rows_per_group = len(rows) // self.plan.shards
        # Load the samples row by row. An empty row is -1.
        events: list[Event] = []
        loaded = 0
        for position, row in enumerate(local_rows.tolist()):
            streams = []
            for sample in epoch.row(row) if row >= 0 else ():
                loaded += 1
                stream, sample_events = self._load(sample)
                events += sample_events
                streams.append(stream)
            writer.row(position, position // rows_per_group, streams)
        return writer.batch, pack_events(events, loaded)

    def _load(self, sample: int) -> tuple[Stream | None, list[Event]]:
        """Load one sample of the plan; a bad one is None and an event."""
        samples = self.plan.samples
        source, record = int(samples.source[sample]), int(samples.record[sample])
        reader = self.readers[source]
        try:
            return reader.load(record, self.indices[source].size(record))
        except BadSample as bad:
            return None, [reader.event(record, "bad", bad.reason, bad.message)]


class StepDataSource:
    """A grain source: item i is the batch of step `start + i`, as a dict of arrays."""

    def __init__(
        self, reader: BatchReader, start: int, stop: int, shards: Sequence[int], num_shards: int
    ):
        self.reader, self.start, self.stop = reader, start, stop
        self.shards, self.num_shards = tuple(shards), num_shards

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        step = self.start + int(index)
        batch, events = self.reader.read(step, self.shards, self.num_shards)
        # Grain moves arrays between processes, so pools that the batch lacks are left out.
        arrays = {name: array for name, array in batch._asdict().items() if array is not None}
        return arrays | {EVENTS: events}

    def __repr__(self) -> str:
        return f"StepDataSource({self.start}, {self.stop})"
