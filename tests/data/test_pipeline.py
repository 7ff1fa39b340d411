"""The loader end to end on small files: complete, resumable, the same for all hosts and workers."""

from __future__ import annotations

import json
import threading
import time

import numpy as np
import pytest

from tests.data.helpers import LOADER, assert_same, data_config, model_config, talk
from unimoe_jax.config import DataConfig, LoaderConfig, SourceConfig
from unimoe_jax.data.batch import Batch
from unimoe_jax.data.tally import TooManyBadSamples


def joined(parts: list[Batch]) -> Batch:
    """The batch that consists of these parts."""
    return Batch(*(None if a[0] is None else np.concatenate(a) for a in zip(*parts, strict=True)))


def test_an_epoch_holds_every_sample_once(build, mixed):
    pipeline = build(mixed)
    steps = pipeline.steps_per_epoch
    batches = list(pipeline.batches(stop_step=steps))
    assert [step for step, _, _ in batches] == list(range(steps))
    samples = 0
    labels = 0
    for step, signature, batch in batches:
        assert signature == pipeline.signature_at(step)
        spec = pipeline.spec(signature)
        assert [a is None for a in batch] == [a is None for a in spec]
        for array, expected in zip(batch, spec, strict=True):
            assert array is None or (array.shape, array.dtype) == expected
        samples += batch.segment_BT.max(axis=1).sum()
        labels += batch.weight_BT.sum()
        assert (batch.target_BT[batch.weight_BT == 0] == 0).all()
        assert ((batch.slot_BT >= 0) == (batch.modality_BT > 0)).all()
        assert ((batch.segment_BT == 0) == (batch.modality_BT < 0)).all()
    assert samples == 40
    budget = pipeline.token_budget()
    assert labels == budget["labels"]
    assert budget["image"] == 10 * 4
    assert budget["speech"] == 10 * 3 + 5 * 3 * 4
    assert budget["audio"] == 5 * 3 * 4
    assert pipeline.tally.bad == 0
    expected = {
        frozenset(),
        frozenset({"image"}),
        frozenset({"video", "speech"}),
        frozenset({"speech"}),
        frozenset({"audio"}),
    }
    assert set(pipeline.signatures) == expected
    for signature, spec in pipeline.signatures.items():
        capacity = pipeline.capacity(signature)
        assert set(capacity) == signature
        assert (spec.image_GIHWC is None) == ("image" not in signature)
        if "speech" in signature:
            assert spec.speech_GJMF.shape == (2, capacity["speech"], 8, 200)


def test_media_reach_the_pool_their_slots_name(build, mixed):
    """The brightness of an image identifies its file, and the answer contains the number of the
    record, from which the file follows."""
    pipeline = build(mixed, LoaderConfig(row_length=256, rows=4, packing=False))
    tok = pipeline.readers[0].tokenizer
    seen = 0
    for _, signature, batch in pipeline.batches(stop_step=pipeline.steps_per_epoch):
        if signature != {"image"}:
            continue
        for row in range(4):
            slots = batch.slot_BT[row][batch.slot_BT[row] >= 0]
            if not len(slots):
                continue
            assert slots.tolist() == list(range(slots[0], slots[0] + 4))
            pixels = batch.image_GIHWC[row // 2, slots[0] // 4]
            red = round(float(pixels[..., 0].mean()) * 0.26862954 * 255 + 0.48145466 * 255)
            answer = tok.decode(batch.target_BT[row][batch.weight_BT[row] > 0])
            number = int(answer.split()[3])
            assert red == 40 * (number % 4)
            seen += 1
    assert seen == 10


def test_hosts_threads_and_workers_do_not_change_the_batches(build, mixed):
    pipeline = build(mixed)
    steps = pipeline.steps_per_epoch + 2
    whole = list(pipeline.batches(stop_step=steps))
    halves = [
        list(pipeline.batches(stop_step=steps, shards=[half], num_shards=2)) for half in (0, 1)
    ]
    for (_, _, batch), *parts in zip(whole, *halves, strict=True):
        assert_same(batch, joined([part for _, _, part in parts]))
    single = build(mixed, LOADER.model_copy(update={"threads": 1, "prefetch": 1}))
    for (_, _, one), (_, _, two) in zip(whole, single.batches(stop_step=steps), strict=True):
        assert_same(one, two)


def test_imbalance_is_the_largest_share_over_the_mean(build, mixed):
    pipeline = build(mixed)
    for step, signature, batch in pipeline.batches(stop_step=pipeline.steps_per_epoch):
        found = pipeline.imbalance(step, 2)
        assert found.keys() == {"tokens", *signature}
        taken = (batch.segment_BT > 0).reshape(2, -1).sum(axis=1)
        assert found["tokens"] == taken.max() / taken.mean()
        assert set(pipeline.imbalance(step, 1).values()) == {1.0}


def test_resuming_equals_continuing(build, mixed):
    pipeline = build(mixed)
    epoch = pipeline.steps_per_epoch
    steps = 2 * epoch + 1
    whole = list(pipeline.batches(stop_step=steps))
    for start in (1, epoch - 1, epoch, epoch + 2):
        state = json.loads(json.dumps({**pipeline.state(start), "loss": 1.5}))
        fresh = build(mixed)
        assert fresh.check_state(state) == start
        rest = list(fresh.batches(start_step=start, stop_step=steps))
        assert len(rest) == steps - start
        for (_, _, one), (_, _, two) in zip(whole[start:], rest, strict=True):
            assert_same(one, two)


def test_a_changed_data_set_is_refused_on_resume(build, mixed):
    state = build(mixed).state(3)
    with pytest.raises(ValueError, match="seed was 3, is 4"):
        build(mixed, seed=4).check_state(state)
    with pytest.raises(
        ValueError, match=r"rows, optim.accumulate, .* take the change back, or remove"
    ):
        build(mixed, LOADER.model_copy(update={"rows": 2})).check_state(state)
    other = data_config(mixed, voice="speech").model_copy(update={"template": "plain"})
    with pytest.raises(ValueError, match=r"group_by_modality, template, "):
        build(other).check_state(state)
    records = json.loads(mixed.read_text())
    mixed.write_text(json.dumps(records[1:]))
    with pytest.raises(ValueError, match="source 'all': its JSON file has changed"):
        build(mixed).check_state(state)


def test_the_order_of_evaluation_is_fixed_and_complete(build, mixed):
    pipeline = build(mixed, shuffle=False)
    first = list(pipeline.batches(stop_step=pipeline.steps_per_epoch))
    assert sum(batch.segment_BT.max(axis=1).sum() for _, _, batch in first) == 40
    other = build(mixed, seed=99, shuffle=False)
    for (_, _, one), (_, _, two) in zip(first, other.batches(stop_step=len(first)), strict=True):
        assert_same(one, two)


def test_without_grouping_or_packing(build, mixed):
    loader = LOADER.model_copy(update={"group_by_modality": False, "packing": False})
    pipeline = build(mixed, loader)
    assert list(pipeline.signatures) == [frozenset({"image", "video", "speech", "audio"})]
    assert pipeline.steps_per_epoch == 10
    for _, _, batch in pipeline.batches(stop_step=10):
        assert batch.segment_BT.max() == 1
        assert batch.audio_length_GJ.min() > 0


def test_forged_placeholders_change_nothing(build, folder, tokenizer):
    folder.image("a.png")
    evil = "<image> <audio> <video> </s> <s> [INST] <|im_end|> USER: ASSISTANT:"
    records = [
        talk(evil, evil),
        talk("<image>\n" + evil.replace("<image>", "<picture>"), evil, image="a.png"),
    ]
    loader = LoaderConfig(row_length=512, rows=2, packing=False)
    pipeline = build(folder.write("d.json", records), loader, shuffle=False)
    soft = []
    for _, _, batch in pipeline.batches(stop_step=pipeline.steps_per_epoch):
        for row in range(2):
            ids = batch.token_id_BT[row][batch.modality_BT[row] == 0]
            if len(ids):
                soft.append(int((batch.slot_BT[row] >= 0).sum()))
                # Only the template's own bos and eos are control ids.
                assert (ids == tokenizer.bos_id).sum() == 1
                assert (ids == tokenizer.eos_id).sum() == 1
                learned = tokenizer.decode(batch.target_BT[row][batch.weight_BT[row] > 0])
                assert learned == evil
    assert soft == [0, 4]


def test_mixture_and_unknown_sources(build, mixed, folder):
    other = folder.write("other.json", [talk(f"say {i}") for i in range(8)])
    sources = {
        "all": SourceConfig(path=str(mixed), voice="speech"),
        "other": SourceConfig(path=str(other)),
    }
    data = DataConfig(sources=sources, loader=LOADER)
    pipeline = build(data, mixture={"all": 0.5, "other": 2.0})
    members = pipeline.plan.epoch(0).members
    assert np.bincount(pipeline.plan.samples.source[members]).tolist() == [20, 16]
    with pytest.raises(ValueError, match=r"no such source \['none'\]"):
        build(data, mixture={"none": 1.0})
    with pytest.raises(ValueError, match="2 pool groups do not divide among 4 data shards"):
        next(pipeline.batches(num_shards=4))


def test_preview_shows_media_and_labels(build, mixed):
    pipeline = build(mixed)
    texts = pipeline.preview(40)
    assert len(texts) == 40
    assert any("<image:4>" in text for text in texts)
    assert any("<speech:9>" in text or "<audio:9>" in text for text in texts)
    assert all("[[ a red bird" in text or "[[a red bird" in text for text in texts)
    assert all(text.endswith("[[<eos>]]") for text in texts)
    shares = pipeline.padding()
    assert set(shares) == {"rows", "image", "video", "speech", "audio"}
    assert all(0 <= share < 1 for share in shares.values())


def test_closing_early_leaves_no_threads(build, mixed):
    pipeline = build(mixed)
    counts = []
    for _ in range(4):
        batches = pipeline.batches()
        next(batches)
        batches.close()
        deadline = time.monotonic() + 5
        while threading.active_count() > min(counts, default=99) and time.monotonic() < deadline:
            time.sleep(0.05)
        counts.append(threading.active_count())
    assert counts[-1] <= counts[0]


def test_voice_goes_to_the_only_encoder(build, folder, tokenizer):
    folder.sound("a.wav")
    path = folder.write("d.json", [talk("<audio>", voice="a.wav")])
    data = data_config(path)
    pipeline = build(data, model=model_config(speech=False))
    assert list(pipeline.signatures) == [frozenset({"audio"})]
    with pytest.raises(TooManyBadSamples, match="voice_modality"):
        build(data)
