"""The loader: sources, a mixture and a seed -> batches of numpy arrays.

The order of the batches does not depend on the number of hosts or workers. The whole state of the
loader is the number of the next step.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import grain
import numpy as np

from unimoe_jax.config import DataConfig, LoaderConfig, MediaName, ModelConfig
from unimoe_jax.config.media import MEDIA
from unimoe_jax.data.batch import Batch, Signature
from unimoe_jax.data.batch_reader import EVENTS, BatchReader, StepDataSource
from unimoe_jax.data.index import SampleIndex, build_index, none_usable
from unimoe_jax.data.media.images import ImageLimits
from unimoe_jax.data.plan import BatchPlan, Samples
from unimoe_jax.data.processors import Processors
from unimoe_jax.data.record_files import RecordFile
from unimoe_jax.data.records import RecordReader
from unimoe_jax.data.samples import SampleReader
from unimoe_jax.data.tally import Tally, unpack_events
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.data.workers import explaining_killed_workers, stay_with_parent


class Pipeline:
    """Batches of a mixture of sources.

    data: `sources` whose `path` is a real file; mixture: source -> weight, the number of times its
    samples occur per epoch; shards: pool groups G of a batch, as many as the mesh has data shards
    or a multiple of that (`loader.groups`). With `shuffle` off every epoch has the same fixed
    order, as held-out evaluation wants.

    Attributes: `tally` (bad, truncated and capped samples), `signatures` (signature -> shapes of
    its batches), `steps_per_epoch`, `plan`. Raises ValueError for an unknown source, for rows that
    do not divide among the shards, and if there is no usable sample at all; raises
    `TooManyBadSamples` if too many records are bad.
    """

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        mixture: dict[str, float],
        tokenizer: Tokenizer,
        loader: LoaderConfig,
        seed: int,
        shards: int,
        shuffle: bool = True,
    ):
        unknown = set(mixture) - set(data.sources)
        if unknown or not mixture:
            raise ValueError(f"no such source {sorted(unknown)}; there are {sorted(data.sources)}")
        self.model, self.loader = model, loader
        self.names = tuple(mixture)
        self.seed = seed
        processors = Processors(
            model, ImageLimits(loader.max_image_pixels, loader.max_aspect_ratio)
        )
        # A sample may fill a whole row, unless the model has fewer positions.
        max_length = min(loader.row_length, model.decoder.max_positions)
        self.readers = [
            SampleReader(
                _record_reader(name, data, model), tokenizer, processors, data.template, max_length
            )
            for name in self.names
        ]
        # Measure all records and count the bad ones.
        self.indices = [build_index(reader, data.cache, loader.threads) for reader in self.readers]
        total = sum(map(len, self.readers))
        self.tally = Tally(total, loader.max_bad_share, loader.strict)
        self.tally.add([event for index in self.indices for event in index.events])
        samples = _good_samples(self.names, self.indices, tuple(mixture.values()))
        if not len(samples):
            raise ValueError(none_usable(self.readers, self.indices))
        if any(reader.blank is not None for reader in self.readers):
            # A sample without media is loaded with an image of zeros, which takes a pool entry.
            samples.entries[~samples.entries.any(axis=1), MEDIA.index("image")] = 1
        self.plan = BatchPlan(samples, loader, seed, shards, shuffle)
        self._reader = BatchReader(self.plan, self.readers, self.indices, model)

    # -------------------------------------------------------------------- steps and shapes

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the first epoch; other epochs may differ by a few, see `steps`."""
        return len(self.plan.epoch(0))

    def steps(self, epochs: float) -> int:
        """Batches of the first `epochs` epochs; a fraction counts a part of the last epoch.

        Example: with 10 batches in every epoch, 2.5 epochs are 25 steps.
        """
        whole = int(epochs)
        rest = epochs - whole
        extra = round(rest * len(self.plan.epoch(whole))) if rest else 0
        return self.plan.start_of(whole) + extra

    @property
    def signatures(self) -> dict[Signature, Batch]:
        """Every signature that can occur, with the `ArraySpec`s of its global batches."""
        return {signature: self.spec(signature) for signature in self.plan.signatures}

    def capacity(self, signature: Signature) -> dict[MediaName, int]:
        """Pool entries per shard for each medium of a signature."""
        return self.plan.capacity(signature)

    def spec(self, signature: Signature) -> Batch:
        """Shapes and dtypes of a global batch, as `ArraySpec`s."""
        return self._reader.spec(signature)

    def signature_at(self, step: int) -> Signature:
        """The signature of a step, without reading data."""
        return self.plan.signatures[self.plan.batch(step)[0]]

    def segments_at(self, step: int) -> list[list[tuple[str, bool]]]:
        """The segments of every row of the global batch of `step`: (name of the source, whether
        the answers are whole, so that none of their tokens was cut to fit the row)."""
        _, rows, epoch = self.plan.batch(step)
        samples = self.plan.samples

        def segment(sample: int) -> tuple[str, bool]:
            source, record = samples.source[sample], samples.record[sample]
            return self.names[source], bool(self.indices[source].whole[record])

        return [
            [segment(sample) for sample in (epoch.row(row) if row >= 0 else ())]
            for row in rows.tolist()
        ]

    # ---------------------------------------------------------------------------- batches

    def batches(
        self,
        start_step: int = 0,
        shards: Sequence[int] = (0,),
        num_shards: int = 1,
        stop_step: int | None = None,
    ) -> Generator[tuple[int, Signature, Batch], None, None]:
        """Yield (step, signature, the data shards `shards` of the batch) from `start_step` on.

        num_shards: data shards of the mesh; a batch is cut into so many equal parts of its rows and
        pool groups. The default reads the whole batch as one shard.

        Epochs follow one another without end unless `stop_step` is given. Threads read ahead, or
        `loader.workers` processes. Raises `TooManyBadSamples` and ChildProcessError. Close the
        generator (or exhaust it) to end the threads or processes.
        """
        if self.plan.shards % num_shards:
            raise ValueError(
                f"{self.plan.shards} pool groups do not divide among {num_shards} data shards"
            )
        # Grain needs a finite number of steps; no run takes 2^31.
        stop = start_step + 2**31 if stop_step is None else stop_step
        if stop <= start_step:
            return
        steps = StepDataSource(self._reader, start_step, stop, shards, num_shards)
        iterator = iter(self._dataset(steps))
        try:
            for step in range(start_step, stop):
                with explaining_killed_workers():
                    arrays = dict(next(iterator))
                # The tally of this process counts the events of all threads and workers.
                events, loaded = unpack_events(arrays.pop(EVENTS))
                self.tally.add(events, loaded)
                yield step, self.signature_at(step), Batch(**arrays)
        finally:
            iterator.close()

    def _dataset(self, steps: StepDataSource) -> grain.IterDataset:
        """The batches of `steps` in order, read ahead in threads or in worker processes."""
        loader = self.loader
        options = grain.ReadOptions(
            num_threads=loader.threads, prefetch_buffer_size=max(loader.prefetch, 1)
        )
        dataset = grain.MapDataset.source(steps).to_iter_dataset(options)
        if not loader.workers:
            return dataset
        _mark_flags_parsed()
        return dataset.mp_prefetch(
            grain.MultiprocessingOptions(
                num_workers=loader.workers, per_worker_buffer_size=max(loader.prefetch, 1)
            ),
            stay_with_parent,
        )

    # ------------------------------------------------------------------------------ state

    def state(self, step: int) -> dict[str, Any]:
        """The part of a checkpoint that describes the data: the next step, and digests by which
        `check_state` recognises the data."""
        return {
            "step": step,
            "seed": self.seed,
            "plan": self.plan.fingerprint(step),
            "sources": {
                name: {"sha256": index.digest, "good": int(index.good.sum())}
                for name, index in zip(self.names, self.indices, strict=True)
            },
        }

    def check_state(self, state: dict[str, Any]) -> int:
        """Return the step to continue with; raise ValueError if the batches would be different.

        Keys of `state` that `Pipeline.state` does not set are ignored.
        """
        now = self.state(state["step"])
        if all(state[key] == value for key, value in now.items()):
            return state["step"]
        # Find out what has changed: the seed, a source, or a setting that only the plan shows.
        reasons = []
        if state["seed"] != now["seed"]:
            reasons.append(f"seed was {state['seed']}, is {now['seed']}")
        for name in sorted(set(state["sources"]) | set(now["sources"])):
            before, after = state["sources"].get(name), now["sources"].get(name)
            if before is None or after is None:
                reasons.append(f"source {name!r} was {'added' if before is None else 'removed'}")
            elif before["sha256"] != after["sha256"]:
                reasons.append(f"source {name!r}: its JSON file has changed")
            elif before["good"] != after["good"]:
                reasons.append(
                    f"source {name!r}: {before['good']} usable samples then, {after['good']} now"
                )
        if not reasons:
            reasons.append(
                "mixture weights, row_length, rows, optim.accumulate, packing, group_by_modality, "
                "template, tokenizer or number of data shards changed which samples form a batch "
                "(set loader.groups from the start to get the same batches on any number of shards)"
            )
        raise ValueError(
            f"the data differ from the checkpoint's: {'; '.join(reasons)}; take the change back, "
            "or remove the stage's folder `steps` to start the stage again"
        )

    # ----------------------------------------------------------------------------- report

    def padding(self) -> dict[str, float]:
        """Shares of the first epoch that are padding: "rows", and the pool of every medium.

        Example: samples that fill 900 of the 1000 positions of all rows give "rows" 0.1; 30 images
        in pools with room for 40 give "image" 0.25.
        """
        plan, epoch, samples = self.plan, self.plan.epoch(0), self.plan.samples
        # Rows: positions of all samples over positions of all rows.
        positions = epoch.batches.size * self.loader.row_length
        shares = {"rows": 1 - samples.tokens[epoch.members].sum() / max(positions, 1)}
        # Pools: entries of all samples over the capacity of the pools of all batches.
        used = samples.entries[epoch.members].sum(axis=0)
        for position, name in enumerate(MEDIA):
            capacity = sum(
                plan.shards * plan.capacity(plan.signatures[number]).get(name, 0)
                for number in epoch.signature
            )
            if capacity:
                shares[name] = 1 - used[position] / capacity
        return {name: float(share) for name, share in shares.items()}

    def imbalance(self, step: int, num_shards: int) -> dict[str, float]:
        """How unevenly a batch is distributed over `num_shards` data shards: the largest load
        divided by the mean, of "tokens" and of every medium in the batch. 1 is even; all devices
        wait for the one with the largest load.

        Example: shards with 300 and 100 tokens give "tokens" 300 / 200 = 1.5.
        """
        loads = self.plan.loads(step).reshape(num_shards, -1, 1 + len(MEDIA)).sum(axis=1)
        names = ("tokens", *MEDIA)
        return {
            name: float(loads[:, column].max() / loads[:, column].mean())
            for column, name in enumerate(names)
            if loads[:, column].any()
        }

    def token_budget(self) -> dict[str, int]:
        """Positions of the first epoch: "text", each medium, and "labels" among the text."""
        samples, chosen = self.plan.samples, self.plan.epoch(0).members
        tokens_per_entry = self.model.tokens_per_medium()
        # Count entries and labels in the index: the plan also counts blank images, which have no
        # position.
        entries, labels = np.zeros(len(MEDIA), np.int64), 0
        for source, index in enumerate(self.indices):
            records = samples.record[chosen[samples.source[chosen] == source]]
            entries += index.entries[records].sum(axis=0)
            labels += int(index.labels[records].sum())
        media = {
            name: int(entries[position]) * tokens_per_entry[name]
            for position, name in enumerate(MEDIA)
            if name in tokens_per_entry
        }
        # Every position that is not a soft token is text.
        text = int(samples.tokens[chosen].sum()) - sum(media.values())
        return {"text": text, **media, "labels": labels}

    def preview(self, number: int) -> list[str]:
        """Samples of the first epoch as text, one of each combination of media in turn (see
        `render`)."""
        epoch, entries = self.plan.epoch(0), self.plan.samples.entries
        # One queue of samples per combination of media, in the order of the batches.
        queues: dict[tuple[bool, ...], list[int]] = {}
        for row in epoch.batches[epoch.batches >= 0]:
            for sample in epoch.row(row):
                queues.setdefault(tuple(entries[sample] > 0), []).append(sample)
        # Take one sample from each queue in turn, until all queues are empty.
        rounds = zip_longest(*queues.values())
        samples = (sample for members in rounds for sample in members if sample is not None)
        return [self.render(sample) for sample in islice(samples, number)]

    def render(self, sample: int) -> str:
        """One sample (its number in `plan.samples`) as text (see `SampleReader.render`)."""
        samples = self.plan.samples
        return self.readers[samples.source[sample]].render(int(samples.record[sample]))


def _record_reader(name: str, data: DataConfig, model: ModelConfig) -> RecordReader:
    """The reader of one source, which accepts the media that the model has encoders for."""
    source = data.sources[name]
    accepts = frozenset(model.tokens_per_medium())
    voice = source.voice
    # A model with one sound encoder leaves no choice for `voice` files.
    sounds = accepts & {"speech", "audio"}
    if voice is None and len(sounds) == 1:
        (voice,) = sounds
    root = source.root or Path(source.path).parent
    return RecordReader(name, RecordFile(source.path), root, voice, accepts)


def _good_samples(
    names: tuple[str, ...], indices: list[SampleIndex], weights: tuple[float, ...]
) -> Samples:
    """The good records of all sources, source by source."""
    records = [np.flatnonzero(index.good) for index in indices]
    tokens = [index.tokens[good] for index, good in zip(indices, records, strict=True)]
    entries = [index.entries[good] for index, good in zip(indices, records, strict=True)]
    return Samples(
        source=np.repeat(np.arange(len(names)), [len(good) for good in records]),
        record=np.concatenate(records),
        tokens=np.concatenate(tokens).astype(np.int64),
        entries=np.concatenate(entries).astype(np.int64),
        names=names,
        weights=weights,
    )


def _mark_flags_parsed() -> None:
    """Mark absl's flags as parsed: grain's worker processes read them, and only `absl.app` would
    have parsed them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
