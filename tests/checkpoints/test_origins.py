"""Where parameters start from: layers move between placements of experts, experts have sources."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from pydantic import ValidationError

from tests.sources import array_source, gather
from unimoe_jax.checkpoints.origins import needed_sources, origin_of, start_of
from unimoe_jax.checkpoints.sources import ParamSource
from unimoe_jax.config import MoEConfig, Take
from unimoe_jax.nn.stack import layer_runs, where_is
from unimoe_jax.params.layer_parts import LayerPart, layer_parts, locate_part
from unimoe_jax.params.paths import ParamError

LAYERS = 5
DENSE = (False,) * LAYERS
PLACEMENTS = ("all", "even", "first_half", "second_half", (1, 4))


def kinds_of(layers) -> tuple[bool, ...]:
    """Whether each decoder layer has experts, for a setting of `moe.layers`."""
    moe = MoEConfig(num_experts=2, layers=layers)
    return tuple(moe.is_moe_layer(layer, LAYERS) for layer in range(LAYERS))


def source(name: str, mark: float, kinds=DENSE, rest: str = "mlp/up_proj/kernel") -> ParamSource:
    """A source in which layer n of `rest` holds 100·mark + n, and the embedding holds 100·mark."""
    arrays = {"embed/embedding": np.full((3, 2), 100 * mark)}
    for run_number, run in enumerate(layer_runs(kinds)):
        for block in range(len(run.period)):
            layers = [
                n
                for n, place in enumerate(where_is(kinds))
                if (place.run, place.block) == (run_number, block)
            ]
            stack = np.stack([np.full((2, 4), 100 * mark + layer) for layer in layers])
            arrays[f"decoder/run_{run_number}/block_{block}/{rest}"] = stack
    return array_source(name, arrays, kinds)


def collect(
    kinds, rest: str, tail: tuple[int, ...], take: Take, sources, wanted
) -> dict[int, np.ndarray]:
    """Gather `rest` in every target layer for which `wanted(kind)`: {layer: value}."""
    values = {}
    for layer, place in enumerate(where_is(kinds)):
        if wanted(kinds[layer]):
            repeats = layer_runs(kinds)[place.run].repeats
            path = f"decoder/{place.prefix}/{rest}"
            values[layer] = gather(path, (repeats, *tail), take, sources, kinds)[place.index]
    return values


@pytest.mark.parametrize("layers", PLACEMENTS)
def test_experts_from_several_dense_sources(layers):
    """Expert e of layer n starts as layer n of source e, for every placement of experts."""
    kinds = kinds_of(layers)
    sources = {name: source(name, mark) for mark, name in enumerate("abc", start=1)}
    take = Take(match=".*", experts=("b", "a", "c", "a"))
    values = collect(kinds, "moe/experts/up_proj/kernel", (4, 2, 4), take, sources, bool)
    assert set(values) == {layer for layer in range(LAYERS) if kinds[layer]}
    for layer, value in values.items():
        np.testing.assert_array_equal(
            value[:, 0, 0], [200 + layer, 100 + layer, 300 + layer, 100 + layer]
        )


@pytest.mark.parametrize("before", PLACEMENTS)
@pytest.mark.parametrize("after", PLACEMENTS)
def test_layers_keep_their_number(before, after):
    """Attention, which every layer has, moves from any placement of experts to any other."""
    rest = "attention/q_proj/kernel"
    sources = {"a": source("a", 1, kinds_of(before), rest)}
    take = Take(match=".*", source="a")
    values = collect(kinds_of(after), rest, (2, 4), take, sources, lambda kind: True)
    assert {layer: value[0, 0] for layer, value in values.items()} == {
        layer: 100 + layer for layer in range(LAYERS)
    }


def test_dense_layers_of_a_mixed_model():
    kinds = kinds_of("even")
    values = collect(
        kinds,
        "mlp/up_proj/kernel",
        (2, 4),
        Take(match=".*", source="a"),
        {"a": source("a", 1)},
        lambda kind: not kind,
    )
    assert {layer: value[0, 0] for layer, value in values.items()} == {1: 101, 3: 103}


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
        (
            "embed/embedding",
            (3, 2),
            {"experts": ("a",)},
            "makes experts, but this is no parameter of experts",
        ),
        (
            "decoder/run_0/block_0/mlp/down_proj/kernel",
            (5, 2, 4),
            {"source": "a"},
            "a has no .*down_proj.*layer 0",
        ),
        (
            "vision/encoder/layers/moe/experts/fc1/kernel",
            (3, 4, 2, 4),
            {"upcycle": "a"},
            "a has 2 layers in 'vision/encoder/layers/mlp/fc1/kernel', layer 2 is wanted",
        ),
        (
            "vision/connector/moe/router/linear/kernel",
            (2, 4),
            {"upcycle": "a"},
            "is no parameter of experts",
        ),
        (
            "decoder/run_0/block_0/mlp/up_proj/kernel",
            (5, 1, 2, 4),
            {"experts": ("a",)},
            "is no parameter of experts",
        ),
        (
            "decoder/run_0/block_0/moe/experts/up_proj/kernel",
            (5, 3, 2, 4),
            {"experts": ("a", "a")},
            r"needs shape \(5, 3, 2, 4\), a a has \(5, 2, 2, 4\)",
        ),
    ],
)
def test_a_parameter_that_does_not_fit_is_named(path: str, shape, take, message: str):
    with pytest.raises(ParamError, match=message):
        gather(path, shape, Take(match=".*", **take), {"a": with_vision("a", 1)}, DENSE)


# ------------------------------------------------------------------------ encoder, connector


def with_vision(name: str, mark: float) -> ParamSource:
    """`source` with an encoder and a connector.

    Layer n of the encoder, which has two, holds 100·mark + 10 + n; the connector 100·mark + 20.
    """
    layers = source(name, mark)
    arrays = {path: layers.load(path, ()) for path in layers.shapes} | {
        "vision/encoder/layers/mlp/fc1/kernel": np.stack(
            [np.full((2, 4), 100 * mark + 10 + layer) for layer in range(2)]
        ),
        "vision/connector/fc2/bias": np.full(3, 100 * mark + 20),
    }
    return array_source(name, arrays, DENSE)


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("vision/encoder/layers/moe/experts/fc1/kernel", (2, 3, 2, 4), [[110] * 3, [111] * 3]),
        ("vision/connector/moe/experts/fc2/bias", (3, 3), [120, 120, 120]),
        (
            "decoder/run_0/block_0/moe/experts/up_proj/kernel",
            (5, 3, 2, 4),
            [[100 + layer] * 3 for layer in range(5)],
        ),
    ],
)
def test_every_expert_starts_as_the_dense_layer(path, shape, expected):
    """`upcycle` makes as many copies as the target has experts, layer by layer, in every module."""
    kinds = (True,) * 5
    value = gather(path, shape, Take(match=".*", upcycle="a"), {"a": with_vision("a", 1)}, kinds)
    assert value.shape == shape
    marks = np.asarray(expected, float)
    expanded = marks.reshape(marks.shape + (1,) * (len(shape) - marks.ndim))
    np.testing.assert_array_equal(value, np.broadcast_to(expanded, shape))


@pytest.mark.parametrize(
    ("take", "reads"),
    [
        # Expert 1 of layer 3 reads one source. If all experts are copies, the layer is read once.
        ({"experts": ("b", "a", "c")}, [("a", 3)]),
        ({"upcycle": "a"}, [("a", 3)]),
    ],
)
def test_only_the_requested_part_is_read(take, reads):
    """A request is one layer, some experts, and one row of the kernel."""
    loaded = []

    def watched(name: str, mark: float) -> ParamSource:
        plain = source(name, mark)

        def load(path: str, index) -> np.ndarray:
            loaded.append((name, *index))
            return plain.load(path, index)

        return replace(plain, load=load)

    sources = {name: watched(name, mark) for mark, name in enumerate("abc", start=1)}
    path, shape = "decoder/run_0/block_0/moe/experts/up_proj/kernel", (5, 3, 2, 4)
    start = start_of(path, shape, Take(match=".*", **take), sources, (True,) * 5)
    assert loaded == []
    index = (slice(3, 4), slice(1, 3) if "upcycle" in take else slice(1, 2), slice(1, 2), slice(4))
    part = start.read(index, np.dtype("f4"))
    assert part.dtype == np.float32
    assert (part == 103).all() and part.shape == (1, index[1].stop - 1, 1, 4)
    assert loaded == [(*read, slice(1, 2), slice(4)) for read in reads]


def test_named_experts_of_a_connector():
    take = Take(match=".*", experts=("b", "a"))
    sources = {name: with_vision(name, mark) for mark, name in enumerate("ab", start=1)}
    value = gather("vision/connector/moe/experts/fc2/bias", (2, 3), take, sources, DENSE)
    np.testing.assert_array_equal(value[:, 0], [220, 120])


@pytest.mark.parametrize("kinds", [DENSE, kinds_of("even"), kinds_of((1, 4))])
@pytest.mark.parametrize(
    "path",
    [
        "embed/embedding",
        "decoder/run_0/block_0/attention/q_proj/kernel",
        "vision/encoder/layers/moe/experts/fc1/kernel",
        "vision/encoder/unread_layers/mlp/fc1/kernel",
        "vision/encoder/pre_norm/scale",
        "vision/connector/fc1/kernel",
    ],
)
def test_locate_part_undoes_layer_parts(path, kinds):
    for index, part in layer_parts(path, (3, 2), kinds):
        assert locate_part(part, kinds) == (path, index)


def test_experts_and_dense_layers_name_each_other():
    """`experts` of a dense layer and `dense` of its experts are inverse; other parts have none."""
    for dense in (
        LayerPart("decoder", 2, "mlp/up_proj/kernel"),
        LayerPart("encoder", 0, "mlp/fc1/bias", "layers"),
        LayerPart("connector", None, "fc2/kernel"),
    ):
        assert dense.experts.dense == dense
        assert not dense.experts.is_router
    for other in (
        LayerPart("decoder", 2, "attention/q_proj/kernel"),
        LayerPart("encoder", 0, "mlp_norm/scale", "unread_layers"),
        LayerPart(None, None, "embed/embedding"),
        LayerPart("connector", None, "moe/router/linear/kernel"),
    ):
        assert other.experts is None


def test_a_take_has_exactly_one_origin():
    for wrong in ({}, {"source": "a", "upcycle": "b"}, {"upcycle": "fresh"}, {"experts": ()}):
        with pytest.raises(ValidationError):
            Take(match=".*", **wrong)


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
