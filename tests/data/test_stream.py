"""Positions, labels and slots of a row; truncation keeps media whole and at least one label."""

from __future__ import annotations

import numpy as np
import pytest

from tests.data.helpers import model_config
from unimoe_jax.config.media import MODALITY
from unimoe_jax.data.batch import batch_spec
from unimoe_jax.data.batch_writer import BatchWriter
from unimoe_jax.data.conversation import Medium, Span
from unimoe_jax.data.records import MediaFile
from unimoe_jax.data.stream import span_length, stream_of, truncate
from unimoe_jax.data.tally import BadSample


def text(*ids, supervised=False) -> Span:
    return Span(tuple(ids), supervised)


def medium(index, modality="image") -> Span:
    return Span(medium=Medium("<image>", MediaFile(modality, ("x",)), index))


BOS, EOS = text(1), text(2, supervised=True)


def test_stream_and_row():
    """An example worked by hand: two samples in one row, image and audio pools, shard 1 of 2."""
    first = [BOS, text(5, 6), medium(0), text(7), text(8, 9, supervised=True), EOS]
    second = [BOS, medium(0, "audio"), medium(1), text(4, supervised=True)]
    one = stream_of(first, {0: 4})
    one.pools = {"image": [np.full((16, 16, 3), 1.0)]}
    two = stream_of(second, {0: 6, 1: 4})
    two.pools = {"audio": [np.zeros((198, 16))] * 2, "image": [np.full((16, 16, 3), 2.0)]}
    two.lengths = {"audio": [32000, 77], "image": [0]}
    capacity = {"image": 2, "audio": 3}
    model = model_config()
    spec = batch_spec(model, rows=2, row_length=25, shards=2, capacity=capacity)
    writer = BatchWriter(spec, capacity, model.tokens_per_medium())
    writer.full_audio(32000)
    writer.row(1, 1, [one, two])
    batch = writer.batch
    row = {name: array[1].tolist() for name, array in batch._asdict().items() if "_BT" in name}
    gap = [0] * 2
    assert row["token_id_BT"] == [1, 5, 6, 0, 0, 0, 0, 7, 8, 9, 2, 1] + [0] * 10 + [4, *gap]
    assert row["target_BT"] == [0] * 7 + [8, 9, 2, 0] + [0] * 10 + [4, 0, *gap]
    assert row["weight_BT"] == [0] * 7 + [1, 1, 1, 0] + [0] * 10 + [1, 0, *gap]
    assert row["segment_BT"] == [1] * 11 + [2] * 12 + gap
    assert row["position_BT"] == [*range(11), *range(12), *gap]
    image, audio = MODALITY["image"], MODALITY["audio"]
    kinds = [0] * 3 + [image] * 4 + [0] * 5 + [audio] * 6 + [image] * 4 + [0, -1, -1]
    assert row["modality_BT"] == kinds
    # The soft-token table holds 2 images of 4 soft tokens, then 3 audio chunks of 3.
    slots = [-1] * 3 + [0, 1, 2, 3] + [-1] * 5 + [*range(8, 14)] + [4, 5, 6, 7] + [-1] * 3
    assert row["slot_BT"] == slots
    assert batch.image_GIHWC[:, :, 0, 0, 0].tolist() == [[0, 0], [1, 2]]
    assert batch.audio_length_GJ.tolist() == [[32000] * 3, [32000, 77, 32000]]
    assert (batch.modality_BT[0] == -1).all()
    assert not batch.segment_BT[0].any()
    assert batch.speech_GJMF is None
    for array, expected in zip(batch, spec, strict=True):
        assert (array is None) == (expected is None)
        assert array is None or (array.shape, array.dtype) == expected


def test_overflowing_a_pool_is_an_error():
    model = model_config()
    spec = batch_spec(model, 1, 9, 1, {"image": 1})
    writer = BatchWriter(spec, {"image": 1}, model.tokens_per_medium())
    stream = stream_of([medium(0), medium(1)], {0: 4, 1: 4})
    stream.pools = {"image": [np.zeros((16, 16, 3))] * 2}
    with pytest.raises(AssertionError, match="image pool of shard 0 overflows"):
        writer.row(0, 0, [stream])


def test_the_end_is_cut_first():
    spans = [BOS, text(*range(10, 20)), medium(0), text(*range(20, 40), supervised=True), EOS]
    cut, was_cut = truncate(spans, {0: 8}, 25)
    assert was_cut
    assert cut[:3] == spans[:3]
    assert cut[3].ids == tuple(range(20, 26))
    assert truncate(spans, {0: 8}, 40) == (spans, False)


def test_a_medium_is_dropped_as_a_whole():
    spans = [
        BOS,
        text(5),
        text(6, supervised=True),
        EOS,
        text(7),
        medium(0),
        text(8, supervised=True),
    ]
    cut, _ = truncate(spans, {0: 8}, 9)
    assert cut == spans[:5]


def test_a_long_prompt_is_shortened_in_its_middle():
    prompt = tuple(range(100, 200))
    spans = [BOS, text(*prompt), medium(0), text(5, 6), text(*range(20, 40), supervised=True), EOS]
    cut, _ = truncate(spans, {0: 8}, 40)
    assert sum(span_length(span, {0: 8}) for span in cut) == 40
    assert cut[2] == spans[2]
    assert cut[3] == spans[3]
    assert cut[4].ids == tuple(range(20, 30))  # a quarter of the row
    kept = cut[1].ids
    half = len(kept) - len(kept) // 2
    assert kept == prompt[:half] + prompt[-(len(kept) // 2) :]
    short = [*spans[:4], text(20, 21, supervised=True), EOS, text(7), text(8, supervised=True)]
    cut, _ = truncate(short, {0: 8}, 40)
    assert sum(span_length(span, {0: 8}) for span in cut) == 40
    assert cut[-2:] == short[4:6]  # a whole answer keeps its end


def test_media_that_fill_the_row_are_refused():
    spans = [BOS, medium(0), text(5, supervised=True), EOS]
    with pytest.raises(BadSample, match="39 soft tokens leave no label in a row of 40"):
        truncate(spans, {0: 39}, 40)
    cut, _ = truncate(spans, {0: 38}, 40)
    assert [span_length(span, {0: 38}) for span in cut] == [1, 38, 1]


def test_any_truncation_keeps_media_whole_and_a_label():
    random = np.random.default_rng(0)
    for _ in range(500):
        spans, tokens = [BOS], {}
        for _ in range(random.integers(1, 4)):
            for _ in range(random.integers(0, 3)):
                tokens[len(tokens)] = int(random.integers(1, 12))
                spans += [text(*range(random.integers(1, 30))), medium(len(tokens) - 1)]
            spans += [text(*range(random.integers(1, 30)))]
            spans += [text(*range(random.integers(1, 30)), supervised=True), EOS]
        length = int(random.integers(8, 80))
        first = next(i for i, span in enumerate(spans) if span.supervised)
        before = sum(tokens[span.medium.index] for span in spans[:first] if span.medium)
        if before + 2 > length:  # no room for bos and a label
            with pytest.raises(BadSample, match="leave no label"):
                truncate(spans, tokens, length)
            continue
        cut, was_cut = truncate(spans, tokens, length)
        size = sum(span_length(span, tokens) for span in cut)
        assert size <= length
        assert was_cut == (sum(span_length(span, tokens) for span in spans) > length)
        stream = stream_of(cut, tokens)
        assert stream.supervised[1:].any()
        assert stream.token_id[0] == 1
        for span in cut:
            if span.medium:
                assert span in spans
