"""Hand-over of decoder layers between placements of experts, and experts from several sources."""

from __future__ import annotations

import numpy as np
import pytest

from unimoe_jax.config import MoEConfig, Take
from unimoe_jax.nn.stack import layer_runs, where_is
from unimoe_jax.params import ParamError
from unimoe_jax.upcycle import Source, gather, needed_sources, origin_of

LAYERS = 5
DENSE = (False,) * LAYERS
PLACEMENTS = ("all", "even", "first_half", "second_half", (1, 4))


def kinds_of(layers) -> tuple[bool, ...]:
    moe = MoEConfig(num_experts=2, layers=layers)
    return tuple(moe.is_moe_layer(layer, LAYERS) for layer in range(LAYERS))


def source(name: str, mark: float, kinds=DENSE, rest: str = "mlp/up_proj/kernel") -> Source:
    """Layer n of `rest` holds 100·mark + n; so does everything outside the decoder."""
    arrays = {"embed/embedding": np.full((3, 2), 100 * mark)}
    for run_number, run in enumerate(layer_runs(kinds)):
        for block in range(len(run.period)):
            layers = [
                n
                for n, at in enumerate(where_is(kinds))
                if (at.run, at.block) == (run_number, block)
            ]
            stack = np.stack([np.full((2, 4), 100 * mark + layer) for layer in layers])
            arrays[f"decoder/run_{run_number}/block_{block}/{rest}"] = stack
    shapes = {path: array.shape for path, array in arrays.items()}
    return Source(name, shapes, arrays.__getitem__, kinds)


def collect(
    kinds, rest: str, tail: tuple[int, ...], take: Take, sources, wanted
) -> dict[int, np.ndarray]:
    """{layer: value} of `rest` in every target layer for which `wanted(kind)`."""
    found = {}
    for layer, at in enumerate(where_is(kinds)):
        if wanted(kinds[layer]):
            repeats = layer_runs(kinds)[at.run].repeats
            path = f"decoder/{at.prefix}/{rest}"
            found[layer] = gather(path, (repeats, *tail), take, sources, kinds)[at.index]
    return found


@pytest.mark.parametrize("layers", PLACEMENTS)
def test_experts_from_several_dense_sources(layers):
    """Expert e of layer n is layer n of source e, for every placement."""
    kinds = kinds_of(layers)
    sources = {name: source(name, mark) for mark, name in enumerate("abc", start=1)}
    take = Take(match=".*", experts=("b", "a", "c", "a"))
    found = collect(kinds, "moe/experts/up_proj/kernel", (4, 2, 4), take, sources, bool)
    assert set(found) == {layer for layer in range(LAYERS) if kinds[layer]}
    for layer, value in found.items():
        np.testing.assert_array_equal(
            value[:, 0, 0], [200 + layer, 100 + layer, 300 + layer, 100 + layer]
        )


@pytest.mark.parametrize("before", PLACEMENTS)
@pytest.mark.parametrize("after", PLACEMENTS)
def test_layers_keep_their_number(before, after):
    """What every layer has moves from any placement to any other."""
    rest = "attention/q_proj/kernel"
    sources = {"a": source("a", 1, kinds_of(before), rest)}
    take = Take(match=".*", source="a")
    found = collect(kinds_of(after), rest, (2, 4), take, sources, lambda kind: True)
    assert {layer: value[0, 0] for layer, value in found.items()} == {
        layer: 100 + layer for layer in range(LAYERS)
    }


def test_dense_layers_of_a_mixed_model():
    kinds = kinds_of("even")
    found = collect(
        kinds,
        "mlp/up_proj/kernel",
        (2, 4),
        Take(match=".*", source="a"),
        {"a": source("a", 1)},
        lambda kind: not kind,
    )
    assert {layer: value[0, 0] for layer, value in found.items()} == {1: 101, 3: 103}


def test_outside_the_decoder():
    value = gather(
        "embed/embedding", (3, 2), Take(match=".*", source="a"), {"a": source("a", 1)}, DENSE
    )
    np.testing.assert_array_equal(value, np.full((3, 2), 100))


@pytest.mark.parametrize(
    ("path", "shape", "take", "message"),
    [
        ("lm_head/kernel", (2,), {"source": "a"}, "a has no 'lm_head/kernel'"),
        (
            "embed/embedding",
            (9, 2),
            {"source": "a"},
            r"embedding' needs shape \(9, 2\), a .*\(3, 2\)",
        ),
        ("embed/embedding", (3, 2), {"experts": ("a",)}, "no decoder layer"),
        (
            "decoder/run_0/block_0/mlp/down_proj/kernel",
            (5, 2, 4),
            {"source": "a"},
            "a has no .*down_proj.*layer 0",
        ),
        (
            "decoder/run_0/block_0/mlp/up_proj/kernel",
            (5, 1, 2, 4),
            {"experts": ("a",)},
            "matches 'mlp/up_proj/kernel' as well",
        ),
        (
            "decoder/run_0/block_0/moe/experts/up_proj/kernel",
            (5, 3, 2, 4),
            {"experts": ("a", "a")},
            r"needs shape \(5, 3, 2, 4\), \['a', 'a'\] has \(5, 2, 2, 4\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(path: str, shape, take, message: str):
    with pytest.raises(ParamError, match=message):
        gather(path, shape, Take(match=".*", **take), {"a": source("a", 1)}, DENSE)


def test_a_source_with_fewer_layers_is_named():
    small = source("small", 1, DENSE[:3])
    path, take = "decoder/run_0/block_0/mlp/up_proj/kernel", Take(match=".*", source="small")
    with pytest.raises(ParamError, match="small has 3 decoder layers"):
        gather(path, (5, 2, 4), take, {"small": small}, DENSE)


def test_takes_are_tried_in_order():
    takes = (
        Take(match=".*/router/.*", source="fresh"),
        Take(match=".*/experts/.*", experts=("b", "c", "b")),
        Take(match=".*", source="a"),
    )
    assert origin_of("x/router/kernel", takes) is takes[0]
    assert origin_of("x/experts/router/kernel", takes) is takes[0]
    assert origin_of("embed/embedding", takes) is takes[2]
    with pytest.raises(ParamError, match="embed/embedding"):
        origin_of("embed/embedding", takes[:2])
    assert needed_sources(takes) == ["b", "c", "a"]
