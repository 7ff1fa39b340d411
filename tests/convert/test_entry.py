"""Entries of tables: the source shape follows from the target, and every entry has an inverse."""

from __future__ import annotations

import numpy as np
import pytest

from unimoe_jax.convert.entry import LINEAR, Copy, Entry, expand
from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.nn.stack import where_is

CASES = [
    (LINEAR, (), (), (3, 5), (5, 3)),
    (LINEAR, (), (4, 2), (3, 5), (4, 2, 5, 3)),
    ("", (), (2,), (7,), (2, 7)),
    ("1 q d -> q d", (), (), (1, 3, 4), (3, 4)),
    ("d c p q -> (p q c) d", (("p", 2), ("q", 2)), (), (5, 3, 2, 2), (12, 5)),
    ("o i k -> (k i) o", (("i", 4),), (), (6, 4, 3), (12, 6)),
    ("e 1 p q -> (p q) e", (("p", 2), ("q", 3)), (), (5, 1, 2, 3), (6, 5)),
    ("o i 1 -> i o", (), (3,), (4, 2, 1), (3, 2, 4)),
    ("1 n 1 1 -> n", (), (2,), (1, 4, 1, 1), (2, 4)),
]


@pytest.mark.parametrize(("pattern", "sizes", "lead", "source", "target"), CASES)
def test_inverse_and_source_shape(pattern, sizes, lead, source, target):
    copy = Copy("g:x", "y", (0,) * len(lead), pattern, sizes)
    assert copy.source_shape(target) == source
    value = np.random.default_rng(0).standard_normal(source)
    there = copy.forward(value)
    assert there.shape == target[len(lead) :]
    back = copy.backward(there)
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, value)


def test_layers_and_experts_become_leading_indices():
    places = dict(enumerate(where_is((True, False, True, False))))
    entry = Entry("base:l.{l}.e.{e}.weight", "decoder/{l}/kernel", LINEAR)
    copies = expand([entry], {layer: places[layer] for layer in (0, 2)}, range(2))
    assert [(c.src, c.dst, c.index) for c in copies] == [
        ("base:l.0.e.0.weight", "decoder/run_0/block_0/kernel", (0, 0)),
        ("base:l.0.e.1.weight", "decoder/run_0/block_0/kernel", (0, 1)),
        ("base:l.2.e.0.weight", "decoder/run_0/block_0/kernel", (1, 0)),
        ("base:l.2.e.1.weight", "decoder/run_0/block_0/kernel", (1, 1)),
    ]


def test_a_pattern_of_another_rank_is_refused():
    with pytest.raises(ConvertError, match="does not fit"):
        Copy("g:x", "y", (), LINEAR, ()).source_shape((2, 3, 4))
