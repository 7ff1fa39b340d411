"""The loader: sources, a mixture and a seed -> batches of numpy arrays, in an order that neither
hosts nor workers change. Its whole state is the number of the next step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    samples occur per epoch; shards: data shards G of the mesh. With `shuffle` off every epoch has
    one fixed order, as held-out evaluation wants.

    Attributes: `tally` (bad, truncated and capped samples), `signatures` (signature -> shapes of
    its batches), `steps_per_epoch`, `plan`. Raises ValueError for an unknown source, rows that do
    not divide among the shards or no usable sample at all, and `TooManyBadSamples`.
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
        longest = min(loader.row_length, model.decoder.max_positions)
        self.readers = [
            SampleReader(
                _record_reader(name, data, model), tokenizer, processors, data.template, longest
            )
            for name in self.names
        ]
        self.indices = [build_index(reader, data.cache, loader.threads) for reader in self.readers]
        total = sum(map(len, self.readers))
        self.tally = Tally(total, loader.max_bad_share, loader.strict)
        self.tally.add([event for index in self.indices for event in index.events])
        samples = _good_samples(self.names, self.indices, tuple(mixture.values()))
        if not len(samples):
            raise ValueError(none_usable(self.readers, self.indices))
        if any(reader.blank is not None for reader in self.readers):
            samples.entries[~samples.entries.any(axis=1), MEDIA.index("image")] = 1
        self.plan = BatchPlan(samples, loader, seed, shards, shuffle)
        self._reader = BatchReader(self.plan, self.readers, self.indices, model)

    # ------------------------------------------------------------------------- what comes

    @property
    def steps_per_epoch(self) -> int:
        """Batches of the first epoch; others may differ by a few, see `steps`."""
        return len(self.plan.epoch(0))

    def steps(self, epochs: float) -> int:
        """Batches of the first `epochs` epochs, which may be a fraction."""
        whole = int(epochs)
        rest = epochs - whole
        extra = round(rest * len(self.plan.epoch(whole))) if rest else 0
        return self.plan.start_of(whole) + extra

    @property
    def signatures(self) -> dict[Signature, Batch]:
        """Every signature that can occur, with the `ArraySpec`s of its global batches."""
        return {name: self.spec(name) for name in self.plan.signatures}

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
        """For every row of the global batch of `step`, what each of its segments is: (source,
        whether its answers are whole, none of their tokens cut to fit the row)."""
        _, rows, epoch = self.plan.batch(step)
        source, record = self.plan.samples.source, self.plan.samples.record

        def told(sample: int) -> tuple[str, bool]:
            at = source[sample]
            return self.names[at], bool(self.indices[at].whole[record[sample]])

        return [
            [told(sample) for sample in (epoch.row(row) if row >= 0 else ())]
            for row in rows.tolist()
        ]

    # ---------------------------------------------------------------------------- batches

    def batches(
        self,
        start_step: int = 0,
        parts: Sequence[int] = (0,),
        of: int = 1,
        stop_step: int | None = None,
    ) -> Iterator[tuple[int, Signature, Batch]]:
        """(step, signature, `parts` of the batch when cut into `of`) from `start_step` on.

        Epochs follow one another without end unless `stop_step` is given. Read ahead by threads,
        or by `loader.workers` processes. Raises `TooManyBadSamples`, ChildProcessError. Close the
        generator (or exhaust it) to end the threads or processes.
        """
        if self.plan.shards % of:
            raise ValueError(f"{self.plan.shards} pool groups do not divide into {of} parts")
        stop = start_step + 2**31 if stop_step is None else stop_step
        if stop <= start_step:
            return
        steps = StepDataSource(self._reader, start_step, stop, parts, of)
        iterator = iter(self._dataset(steps))
        try:
            for step in range(start_step, stop):
                with explaining_killed_workers():
                    arrays = dict(next(iterator))
                self.tally.add(*unpack_events(arrays.pop(EVENTS)))
                yield step, self.signature_at(step), Batch(**arrays)
        finally:
            iterator.close()

    def _dataset(self, steps: StepDataSource):
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
        """What a checkpoint keeps of the data: the next step, and digests to recognise them."""
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
        """The step to go on with; raises ValueError if the batches would not be the same.

        Keys of `state` that `Pipeline.state` does not set are ignored.
        """
        now = self.state(state["step"])
        if all(state[key] == value for key, value in now.items()):
            return state["step"]
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
                "(loader.groups, set from the start, keeps batches alike on any number of shards)"
            )
        raise ValueError(
            f"the data differ from the checkpoint's: {'; '.join(reasons)}; take the change back, "
            "or remove the stage's folder `steps` to start it again"
        )

    # ----------------------------------------------------------------------------- report

    def padding(self) -> dict[str, float]:
        """Shares of the first epoch that are padding: "rows", and every medium's pool."""
        plan, part = self.plan, self.plan.epoch(0)
        samples = plan.samples
        chosen = part.members
        slots = part.batches.size * self.loader.row_length
        shares = {"rows": 1 - samples.tokens[chosen].sum() / max(slots, 1)}
        used = samples.entries[chosen].sum(axis=0)
        for position, name in enumerate(MEDIA):
            room = sum(
                plan.shards * plan.capacity(plan.signatures[number]).get(name, 0)
                for number in part.signature
            )
            if room:
                shares[name] = 1 - used[position] / room
        return {name: float(share) for name, share in shares.items()}

    def imbalance(self, step: int, parts: int) -> dict[str, float]:
        """How uneven a batch lies on `parts` data shards: the largest share over the mean, of
        "tokens" and of every medium in it. 1 is even; the devices wait for the largest."""
        loads = self.plan.loads(step).reshape(parts, -1, 1 + len(MEDIA)).sum(axis=1)
        names = ("tokens", *MEDIA)
        return {
            name: float(loads[:, at].max() / loads[:, at].mean())
            for at, name in enumerate(names)
            if loads[:, at].any()
        }

    def token_budget(self) -> dict[str, int]:
        """Positions of the first epoch: "text", each medium, and "labels" among the text."""
        samples, chosen = self.plan.samples, self.plan.epoch(0).members
        per_entry = self.model.tokens_per_medium()
        entries, labels = np.zeros(len(MEDIA), np.int64), 0
        for source, index in enumerate(self.indices):
            records = samples.record[chosen[samples.source[chosen] == source]]
            entries += index.entries[records].sum(axis=0)
            labels += int(index.labels[records].sum())
        media = {
            name: int(entries[position]) * per_entry[name]
            for position, name in enumerate(MEDIA)
            if name in per_entry
        }
        text = int(samples.tokens[chosen].sum()) - sum(media.values())
        return {"text": text, **media, "labels": labels}

    def preview(self, number: int) -> list[str]:
        """Samples of the first epoch as text, one of each combination of media in turn (see
        `render`)."""
        part, entries = self.plan.epoch(0), self.plan.samples.entries
        queues: dict[tuple[bool, ...], list[int]] = {}
        for row in part.batches[part.batches >= 0]:
            for sample in part.row(row):
                queues.setdefault(tuple(entries[sample] > 0), []).append(sample)
        turns = zip_longest(*queues.values())
        samples = (sample for turn in turns for sample in turn if sample is not None)
        return [self.render(sample) for sample in islice(samples, number)]

    def render(self, sample: int) -> str:
        """One sample (its number in `plan.samples`) as text (see `SampleReader.render`)."""
        samples = self.plan.samples
        return self.readers[samples.source[sample]].render(int(samples.record[sample]))


def _record_reader(name: str, data: DataConfig, model: ModelConfig) -> RecordReader:
    source = data.sources[name]
    accepts = frozenset(model.tokens_per_medium())
    voice = source.voice
    heard = accepts & {"speech", "audio"}
    if voice is None and len(heard) == 1:
        (voice,) = heard
    root = source.root or Path(source.path).parent
    return RecordReader(name, RecordFile(source.path), root, voice, accepts)


def _good_samples(
    names: tuple[str, ...], indices: list[SampleIndex], weights: tuple[float, ...]
) -> Samples:
    records = [np.flatnonzero(index.good) for index in indices]
    return Samples(
        source=np.repeat(np.arange(len(names)), [len(part) for part in records]),
        record=np.concatenate(records),
        tokens=np.concatenate(
            [index.tokens[part] for index, part in zip(indices, records, strict=True)]
        ).astype(np.int64),
        entries=np.concatenate(
            [index.entries[part] for index, part in zip(indices, records, strict=True)]
        ).astype(np.int64),
        names=names,
        weights=weights,
    )


def _mark_flags_parsed() -> None:
    """Grain's worker processes read absl flags, which only `absl.app` would have parsed."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
