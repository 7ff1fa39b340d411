"""The plan of batches: complete, deterministic, well packed, balanced, within capacities."""

from __future__ import annotations

import pickle
import time

import numpy as np
import pytest

from unimoe_jax.config import LoaderConfig
from unimoe_jax.config.media import MEDIA
from unimoe_jax.data.packing import fill_ends, fill_rows, row_limit
from unimoe_jax.data.plan import BatchPlan, Samples


def samples(number=2000, seed=0, weights=(1.0,), kinds="mixed") -> Samples:
    """Lengths and media like those of LLaVA and Uni-MoE mixtures."""
    random = np.random.default_rng(seed)
    text = np.clip(random.lognormal(4.8, 0.7, number), 20, 1500).astype(np.int64)
    entries = np.zeros((number, 4), np.int64)
    kind = random.choice(4, number, p=[0.2, 0.5, 0.1, 0.2]) if kinds == "mixed" else np.ones(number)
    entries[kind == 1, MEDIA.index("image")] = 1
    entries[kind == 2, MEDIA.index("video")] = 1
    voices = random.geometric(0.6, number).clip(1, 8)
    entries[kind >= 2, MEDIA.index("speech")] = voices[kind >= 2]
    tokens = text + entries @ np.array([576, 576, 50, 50])
    source = np.sort(random.integers(0, len(weights), number))
    record = np.concatenate([np.arange((source == s).sum()) for s in range(len(weights))])
    names = tuple(f"s{i}" for i in range(len(weights)))
    return Samples(source, record, tokens.clip(max=4096), entries, names, weights)


def plan_of(data, rows=16, shards=4, length=4096, shuffle=True, seed=7, **settings) -> BatchPlan:
    loader = LoaderConfig(row_length=length, rows=rows, **settings)
    return BatchPlan(data, loader, seed, shards, shuffle)


def all_samples(plan: BatchPlan, epoch: int) -> np.ndarray:
    part = plan.epoch(epoch)
    rows = part.batches[part.batches >= 0]
    assert len(np.unique(rows)) == len(rows) == len(part.offsets) - 1
    return np.concatenate([part.row(row) for row in rows])


def test_a_rare_large_sample_finds_a_row():
    """Limits for large data are measured on a part of it, which may not contain the sample."""
    number = 20_010
    measured = np.linspace(0, number - 1, 20_000).astype(np.int64)
    record = np.setdiff1d(np.arange(number), measured)[4]
    tokens, entries = np.full(number, 400), np.zeros((number, 4), np.int64)
    entries[:, 0] = 1
    tokens[record], entries[record, 0] = 1800, 12
    limit = row_limit(tokens, entries, 2048)
    assert limit[0] >= 12
    assert [record] in fill_rows(tokens, entries, 2048, limit)


def test_the_digest_of_an_epoch_shows_that_the_number_of_shards_changes_it():
    """Later epochs may need more room in a pool than was planned. Some rows then move, and which
    rows depends on the number of shards, so a resumed run must notice another number."""
    random = np.random.default_rng(2)
    number = 500
    tokens = np.clip(random.lognormal(5.3, 0.5, number), 20, 1024).astype(np.int64)
    entries = np.zeros((number, 4), np.int64)
    entries[:, 0] = 1 + (random.random(number) < 0.15) + 2 * (random.random(number) < 0.05)
    data = Samples(np.zeros(number, int), np.arange(number), tokens, entries, ("a",), (1.0,))
    plans = [plan_of(data, shards=shards, length=1024, seed=2) for shards in (2, 8)]
    differ = []
    for epoch in range(3, 9):
        batches, digests = [], []
        for plan in plans:
            part = plan.epoch(epoch)
            rows = [sorted(row for row in batch if row >= 0) for batch in part.batches]
            samples_of_rows = [[part.row(row) for row in batch] for batch in rows]
            batches.append((plan.start_of(epoch), samples_of_rows))
            digests.append(plan.fingerprint(plan.start_of(epoch)))
        differ.append(batches[0] != batches[1])
        assert differ[-1] == (digests[0] != digests[1])
    assert any(differ)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("grouped", [True, False])
def test_nothing_is_lost_and_capacities_hold(packing, grouped):
    data = samples()
    plan = plan_of(data, packing=packing, group_by_modality=grouped)
    for epoch in range(5):
        assert sorted(all_samples(plan, epoch)) == list(range(len(data)))
        part = plan.epoch(epoch)
        for batch, number in zip(part.batches, part.signature, strict=True):
            signature = plan.signatures[number]
            capacity = plan.capacity(signature)
            for shard in batch.reshape(4, -1):
                load = np.zeros(4, np.int64)
                for row in shard[shard >= 0]:
                    members = part.row(row)
                    assert data.tokens[members].sum() <= 4096
                    assert packing or len(members) == 1
                    load += data.entries[members].sum(axis=0)
                    for sample in members if grouped else ():
                        media = frozenset(MEDIA[i] for i in np.flatnonzero(data.entries[sample]))
                        assert media == signature or (packing and not media)
                for name, most in zip(MEDIA, load, strict=True):
                    assert most <= capacity.get(name, 0)


def test_padding_of_packed_rows_is_below_three_percent():
    data = samples(20_000)
    start = time.perf_counter()
    plan = plan_of(data, rows=16, shards=4, length=4096)
    part = plan.epoch(0)
    seconds = time.perf_counter() - start
    rows = part.batches.size
    padding = 1 - data.tokens.sum() / (rows * 4096)
    pools = dict.fromkeys(MEDIA, 0)
    for number in part.signature:
        for name, count in plan.capacity(plan.signatures[number]).items():
            pools[name] += 4 * count
    used = data.entries.sum(axis=0)
    waste = {n: 1 - used[i] / pools[n] for i, n in enumerate(MEDIA) if pools[n]}
    print(f"padding {padding:.2%}, pools {waste}, {seconds:.1f} s")
    assert padding < 0.03
    assert max(waste.values()) < 0.25
    assert seconds < 30


def test_order_depends_on_seed_and_epoch_only():
    data = samples()
    one, two = plan_of(data), plan_of(data)
    assert one.fingerprint() == two.fingerprint() != plan_of(data, seed=8).fingerprint()
    for epoch in (0, 3):
        np.testing.assert_array_equal(one.epoch(epoch).members, two.epoch(epoch).members)
        np.testing.assert_array_equal(one.epoch(epoch).batches, two.epoch(epoch).batches)
    assert not np.array_equal(one.epoch(0).members, one.epoch(1).members)
    # Another number of shards deals the same batches differently among the shards.
    other = plan_of(data, shards=2)
    assert other.fingerprint() == one.fingerprint()
    assert other.epoch(0).batches.shape == one.epoch(0).batches.shape
    # Worker processes get a pickled plan, which must continue in the same way.
    copy = pickle.loads(pickle.dumps(one))
    np.testing.assert_array_equal(copy.epoch(4).batches, one.epoch(4).batches)


def test_mixture_weights_count_occurrences_per_epoch():
    data = samples(weights=(1.0, 0.25, 2.0, 1.5))
    plan = plan_of(data)
    sizes = np.bincount(data.source)
    seen = np.zeros(len(data), int)
    for epoch in range(4):
        counts = np.bincount(all_samples(plan, epoch), minlength=len(data))
        assert set(counts[data.source == 0]) == {1}
        assert set(counts[data.source == 1]) <= {0, 1}
        assert abs(counts[data.source == 1].sum() - sizes[1] / 4) <= 1
        assert set(counts[data.source == 2]) == {2}
        assert set(counts[data.source == 3]) <= {1, 2}
        seen += counts
    assert set(seen[data.source == 1]) == {1}  # the quarters rotate over all samples
    assert set(seen[data.source == 3]) == {6}


def test_steps_roll_over_epochs():
    plan = plan_of(samples(300), rows=8)
    size = len(plan.epoch(0))
    assert plan.locate(size - 1) == (0, size - 1)
    assert plan.locate(size) == (1, 0)
    number, rows, part = plan.batch(size)
    np.testing.assert_array_equal(rows, plan.epoch(1).batches[0])
    assert number == part.signature[0]


def test_unshuffled_plan_keeps_every_sample_once():
    data = samples(333)
    plan = plan_of(data, shuffle=False)
    assert sorted(all_samples(plan, 0)) == list(range(333))


def test_media_are_balanced_over_shards():
    data = samples(5000)
    plan = plan_of(data, rows=32, shards=4)
    part = plan.epoch(0)
    for number, signature in enumerate(plan.signatures):
        for name in signature:
            column = data.entries[:, MEDIA.index(name)]
            loads = np.array(
                [
                    [
                        sum(column[part.row(row)].sum() for row in shard if row >= 0)
                        for shard in batch
                    ]
                    for batch in part.batches[part.signature == number].reshape(-1, 4, 8)
                ]
            )
            print(sorted(signature), name, loads.mean(), np.ptp(loads, axis=1).mean())
            # Shards differ by about one row at most, because a batch may lack a row.
            assert np.ptp(loads, axis=1).mean() < loads.mean() / 6


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match=r"loader.rows = 16 is not a multiple of the 5"):
        plan_of(samples(10), shards=5)


def test_loads_of_the_shards_of_a_step():
    data = samples(8000)
    plan = plan_of(data, shards=8, rows=32, group_by_modality=False)
    ratios = []
    for step in range(len(plan.epoch(0))):
        loads = plan.loads(step)
        _, rows, part = plan.batch(step)
        members = [sample for row in rows[rows >= 0] for sample in part.row(row)]
        assert loads.shape == (8, 5)
        expected = [data.tokens[members].sum(), *data.entries[members].sum(axis=0)]
        assert loads.sum(axis=0).tolist() == expected
        ratios.append(loads[:, 0].max() / loads[:, 0].mean())
    assert 1 <= np.mean(ratios) < 1.05  # rows are full, so tokens are even


# ------------------------------------------------------------------- text beside other media


def of_kinds(numbers: dict[tuple[str, ...], int], seed=0) -> Samples:
    """Samples with the given media. A sample with media takes 126 to 134 positions, so that five of
    them leave much of a row of 720 free; a sample of text alone takes 15 to 60 positions."""
    random = np.random.default_rng(seed)
    tokens, entries = [], []
    for media, number in numbers.items():
        low, high = (126, 134) if media else (15, 60)
        tokens.append(random.integers(low, high, number, endpoint=True))
        entries.append(np.tile([name in media for name in MEDIA], (number, 1)).astype(np.int64))
    tokens, entries = np.concatenate(tokens), np.concatenate(entries)
    order = random.permutation(len(tokens))
    source, record = np.zeros(len(tokens), np.int64), np.arange(len(tokens))
    return Samples(source, record, tokens[order], entries[order], ("s",), (1.0,))


def padding_of(plan: BatchPlan, epoch: int) -> float:
    part = plan.epoch(epoch)
    slots = part.batches.size * plan.loader.row_length
    return 1 - plan.samples.tokens[part.members].sum() / slots


def rows_by_signature(plan: BatchPlan, epoch: int) -> dict[frozenset, list[list[int]]]:
    part = plan.epoch(epoch)
    rows = {signature: [] for signature in plan.signatures}
    for batch, number in zip(part.batches, part.signature, strict=True):
        rows[plan.signatures[number]] += [part.row(row) for row in batch[batch >= 0]]
    return rows


SAMPLES_WITH = {("image",): 803, ("speech",): 411, ("image", "speech"): 290, ("video",): 150}
TEXT = {(): 2000}


def test_text_fills_rows_with_media():
    data = of_kinds(SAMPLES_WITH | TEXT)
    plan = plan_of(data, rows=8, shards=2, length=720)
    without = of_kinds(SAMPLES_WITH)
    alone = plan_of(without, rows=8, shards=2, length=720)
    for epoch in range(5):
        assert sorted(all_samples(plan, epoch)) == list(range(len(data)))
        rows = rows_by_signature(plan, epoch)
        for signature, members in rows.items():
            kinds = [[bool(data.entries[sample].any()) for sample in row] for row in members]
            for row, has_media in zip(members, kinds, strict=True):
                assert data.tokens[row].sum() <= 720
                # The text comes last, and the samples with media have the media of the batch.
                assert has_media == sorted(has_media, reverse=True)
                for sample in np.array(row)[has_media]:
                    media = frozenset(MEDIA[i] for i in np.flatnonzero(data.entries[sample]))
                    assert media == signature
            if signature:
                mixed = [any(has_media) and not all(has_media) for has_media in kinds]
                assert np.mean(mixed) > 0.5
        assert len(rows[frozenset()]) > 8
        # No batch has a free place, except the last batch of text alone.
        part = plan.epoch(epoch)
        assert (part.batches[part.signature > 0] >= 0).all()
        assert padding_of(plan, epoch) < 0.03
        assert padding_of(alone, epoch) > 0.05
    # Text needs no room in the pools.
    for signature in alone.signatures:
        assert plan.capacity(signature).keys() == alone.capacity(signature).keys() == signature


@pytest.mark.parametrize("text", [1, 40, 150])
def test_little_text_is_spread_over_the_signatures(text):
    """All text may fit into rows with media; then there is no batch of text alone."""
    plan = plan_of(of_kinds(SAMPLES_WITH | {(): text}), rows=8, shards=2, length=720)
    assert frozenset() in plan.signatures and plan.capacity(frozenset()) == {}
    for epoch in range(3):
        assert len(all_samples(plan, epoch)) == len(plan.samples)
        rows = rows_by_signature(plan, epoch)
        assert not rows[frozenset()]
        held = {
            signature: sum(
                not plan.samples.entries[sample].any() for row in group_rows for sample in row
            )
            for signature, group_rows in rows.items()
        }
        assert sum(held.values()) == text
        if text == 150:
            assert all(number >= 5 for signature, number in held.items() if signature)
    assert plan.locate(len(plan.epoch(0))) == (1, 0)


def test_text_read_twice_fills_twice():
    data = of_kinds(SAMPLES_WITH | {(): 100})
    is_text = ~data.entries.any(axis=1)
    source = is_text.astype(np.int64)
    data = Samples(source, data.record, data.tokens, data.entries, ("media", "text"), (1.0, 2.5))
    plan = plan_of(data, rows=8, shards=2, length=720)
    for epoch in range(3):
        counts = np.bincount(all_samples(plan, epoch), minlength=len(data))
        assert (counts[~is_text] == 1).all()
        assert set(counts[is_text]) == {2, 3} and counts[is_text].sum() == 250


@pytest.mark.parametrize("kinds", [SAMPLES_WITH, TEXT, {("image",): 500}])
@pytest.mark.parametrize("shuffle", [True, False])
def test_without_text_or_without_media_every_signature_is_packed_by_itself(kinds, shuffle):
    data = of_kinds(kinds)
    plan = plan_of(data, rows=8, shards=2, length=720, shuffle=shuffle)
    rows = rows_by_signature(plan, 0)
    for signature, members in rows.items():
        packed = {sample for row in members for sample in row}
        wanted = (data.entries > 0) == [name in signature for name in MEDIA]
        assert packed == set(np.flatnonzero(wanted.all(axis=1)))
    if not shuffle:
        numbers = [np.sort(np.concatenate(group)) for group in rows.values()]
        limits = [row_limit(data.tokens[group], data.entries[group], 720) for group in numbers]
        for group, limit, members in zip(numbers, limits, rows.values(), strict=True):
            packed = fill_rows(data.tokens[group], data.entries[group], 720, limit)
            assert sorted(members) == sorted(group[row].tolist() for row in packed)


def test_shards_do_not_change_which_samples_fill_a_batch():
    data = of_kinds(SAMPLES_WITH | TEXT)
    plans = [plan_of(data, rows=8, shards=shards, length=720) for shards in (1, 2, 8)]
    assert len({plan.fingerprint() for plan in plans}) == 1
    for epoch in (1, 2):
        batches = [
            [
                sorted(tuple(plan.epoch(epoch).row(row)) for row in batch if row >= 0)
                for batch in plan.epoch(epoch).batches
            ]
            for plan in plans
        ]
        assert batches[0] == batches[1] == batches[2]


def test_without_packing_text_fills_no_rows():
    data = of_kinds({("image",): 21, (): 30})
    plan = plan_of(data, rows=8, shards=2, length=720, packing=False)
    rows = rows_by_signature(plan, 0)
    assert {signature: len(group_rows) for signature, group_rows in rows.items()} == {
        frozenset(): 30,
        frozenset({"image"}): 21,
    }
    assert all(len(row) == 1 for group_rows in rows.values() for row in group_rows)


def test_ends_are_filled_with_samples_that_fit():
    tokens = np.array([40, 10, 25, 7, 30, 7])
    room = np.array([5, 17, 65, 0, 33])
    added = fill_ends(tokens, room)
    used = [sample for more in added for sample in more]
    assert len(used) == len(set(used))
    left = room - [tokens[more].sum() for more in added]
    assert (left >= 0).all() and not added[0] and not added[3]
    assert left[[1, 2]].tolist() == [0, 0]
    assert fill_ends(np.zeros(0, np.int64), room) == [[]] * 5
    assert fill_ends(tokens, np.zeros(0, np.int64)) == []
