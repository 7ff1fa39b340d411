"""Samples that are bad, too long or too many: left out, cut, counted and reported."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.helpers import LOADER, talk
from unimoe_jax.config import MeshConfig
from unimoe_jax.data.tally import TooManyBadSamples
from unimoe_jax.evaluate.exact_match import exact_match
from unimoe_jax.parallel.sharding import make_mesh


def test_bad_samples_at_load_time_leave_padding(build, folder, tokenizer, caplog):
    folder.image("good.png")
    (folder.root / "bad.png").write_bytes(b"not an image")
    folder.sound("nan.wav", nan=True)
    records = [talk("<image>", image="good.png") for _ in range(8)]
    records += [talk("<image>", image="bad.png"), talk("<audio>", voice="nan.wav")]
    path = folder.write("d.json", records)
    for workers in (0, 2):
        loader = LOADER.model_copy(update={"max_bad_share": 0.2, "workers": workers})
        pipeline = build(path, loader)
        caplog.clear()
        steps = 2 * pipeline.steps_per_epoch
        done = list(pipeline.batches(stop_step=steps))
        assert sum(batch.segment_BT.max(axis=1).sum() for _, _, batch in done) == 2 * 8
        assert pipeline.tally.counts == {("bad", "unreadable_image"): 1, ("bad", "nan_audio"): 1}
        assert sum("bad.png" in record.message for record in caplog.records) == 1
        line = next(i for i, t in enumerate(path.read_text().splitlines(), 1) if "bad.png" in t)
        start = pipeline.readers[0].records.line(8)
        assert f"{path}:{start}" in caplog.text
        assert start < line
    pipeline = build(path, LOADER.model_copy(update={"max_bad_share": 0.1}))
    with pytest.raises(TooManyBadSamples, match=r"2 of 10 samples .*(\n.*)*unreadable_image"):
        list(pipeline.batches(stop_step=steps))
    strict = build(path, LOADER.model_copy(update={"max_bad_share": 0.5, "strict": True}))
    with pytest.raises(TooManyBadSamples, match="strict"):
        list(strict.batches(stop_step=steps))


def test_bad_records_are_left_out_of_the_plan(build, folder, caplog):
    records = [talk() for _ in range(9)] + [talk(answer="")]
    path = folder.write("d.jsonl", records, lines=True)
    with pytest.raises(TooManyBadSamples, match=r"1 of 10 .*\n(.*\n)*bad +empty_answer"):
        build(path)
    pipeline = build(path, LOADER.model_copy(update={"max_bad_share": 0.1}))
    assert len(pipeline.plan.samples) == 9
    assert f"{path}:10" in caplog.text
    with pytest.raises(TooManyBadSamples, match="strict"):
        build(path, LOADER.model_copy(update={"max_bad_share": 0.1, "strict": True}))


def test_a_wrong_file_does_not_fill_the_log(build, folder, caplog):
    path = folder.write("d.json", [talk(), *(talk(answer="") for _ in range(60))])
    pipeline = build(path, LOADER.model_copy(update={"max_bad_share": 1.0}))
    assert pipeline.tally.counts == {("bad", "empty_answer"): 60}
    messages = [text for text in caplog.messages if "empty_answer" in text]
    assert len(messages) == 51
    assert "only counted" in messages[-1]


def test_truncation_and_caps_are_counted(build, folder):
    folder.image("a.png")
    folder.sound("long.wav", 9.0)
    records = [talk("<image>" + " bird" * 400, "yes", image="a.png") for _ in range(3)]
    records += [talk("<audio>", voice="long.wav"), talk()]
    pipeline = build(folder.write("d.json", records))
    assert pipeline.tally.count("truncated") == 3
    assert pipeline.tally.count("capped", "max_chunks") == 1
    assert "5 chunks, the first 3 are used" in pipeline.tally.report()
    for _, signature, batch in pipeline.batches(stop_step=pipeline.steps_per_epoch):
        for row in range(4):
            labels = batch.weight_BT[row].sum()
            assert (labels > 0) == (batch.segment_BT[row].max() > 0)
        if signature == {"image"}:  # full rows, and a row of text in the place that is left
            assert (batch.modality_BT == 1).sum(axis=1).tolist().count(4) == 3


def test_an_answer_that_the_row_cuts_is_never_scored_as_exact(build, folder, devices):
    """A model may predict all that is left of a cut answer, but that answer is not exact. If only
    the prompt was cut, the answer counts."""
    records = [talk("one", "yes"), talk("two", "bird " * 400), talk("bird " * 400, "no")]
    path = folder.write("d.json", records)
    for _ in range(2):  # measured, then read from the cache
        pipeline = build(path, shards=1, shuffle=False)
        steps = range(pipeline.steps_per_epoch)
        rows = [row for step in steps for row in pipeline.segments_at(step)]
        assert sorted(whole for row in rows for _, whole in row) == [False, True, True]

    def all_exact(params, batch):
        exact = np.ones((len(batch.segment_BT), 64), bool)
        return exact, exact

    mesh = make_mesh(MeshConfig(data=1), devices[:1])
    compiled = dict.fromkeys(pipeline.signatures, all_exact)
    assert exact_match({}, pipeline, compiled, mesh) == {"all": pytest.approx(2 / 3)}


def test_a_header_that_understates_the_length_only_loses_the_surplus(build, folder, monkeypatch):
    folder.sound("a.wav", 5.0)
    monkeypatch.setattr("unimoe_jax.data.processors.sound_length", lambda path: 32000)
    pipeline = build(folder.write("d.json", [talk("<audio>", voice="a.wav")]))
    (_, _, batch), *_ = pipeline.batches(stop_step=1)
    assert (batch.modality_BT == 3).sum() == 3
    assert pipeline.tally.count("capped", "header_too_short") == 1


def test_a_surplus_chunk_does_not_shorten_the_answer(build, folder, monkeypatch):
    folder.sound("a.wav", 5.0)
    monkeypatch.setattr("unimoe_jax.data.processors.sound_length", lambda path: 32000)
    records = [talk("<audio>", "a bird " * number, voice="a.wav") for number in (1, 9)]
    reader = build(folder.write("d.json", records)).readers[0]
    for number in range(2):
        size, _ = reader.measure(number)
        stream, events = reader.load(number, size)
        assert (len(stream), stream.supervised.sum()) == (size.tokens, size.labels)
        assert [event.reason for event in events] == ["header_too_short"]
        assert "speech: 3 chunks, but the header said 1" in events[0].message


def test_a_mixture_without_a_good_record_names_the_first_of_each_source(build, folder):
    path = folder.write("d.json", [{"data": []}], lines=True)
    with pytest.raises(ValueError, match=r"in all, 1 bad .*d.json:1: record 1: no `conv.*expected"):
        build(path, LOADER.model_copy(update={"max_bad_share": 1.0}))
