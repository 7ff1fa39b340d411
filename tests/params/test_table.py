"""Rules for parameter paths, the split into trained and frozen, the printed table."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from tests.models.tiny import make_batch, model_config
from unimoe_jax.config import PrecisionConfig, Rule
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params.paths import ParamError, first_match, flatten, nest
from unimoe_jax.params.table import declared, describe, parameter_infos, split

SHAPES = {
    "vision/encoder/kernel": ((3, 4), ("embed", "mlp")),
    "vision/connector/kernel": ((4, 2), ("mlp", None)),
    "decoder/kernel": ((5, 2, 2), ("layers", "embed", "mlp")),
    "decoder/lora_a": ((5, 2, 1), ("layers", "embed", "rank")),
    "scale": ((), ()),
}
RULES = (
    Rule(match=".*/connector/.*", lr=0.5),
    Rule(match=".*/lora_a", lr=2, weight_decay=False),
    Rule(match=".*", lr=None),
)
PRECISION = PrecisionConfig(frozen="bfloat16", trained="float32")


def test_first_rule_that_matches_decides():
    infos = parameter_infos(SHAPES, RULES, PRECISION)
    assert {path: info.lr for path, info in infos.items()} == {
        "vision/encoder/kernel": None,
        "vision/connector/kernel": 0.5,
        "decoder/kernel": None,
        "decoder/lora_a": 2,
        "scale": None,
    }
    assert {path for path, info in infos.items() if info.dtype == "float32"} == {
        path for path, info in infos.items() if info.trained
    }
    assert not infos["decoder/lora_a"].weight_decay
    assert infos["vision/connector/kernel"].axes == ("mlp", None)
    assert infos["decoder/kernel"].nbytes == 20 * 2
    swapped = (RULES[2].model_copy(update={"match": ".*kernel"}), *RULES[:2], RULES[2])
    # The first rule now matches everything that the rule for connectors would match.
    with pytest.raises(ParamError, match="connector"):
        parameter_infos(SHAPES, swapped, PRECISION)


def test_rules_match_whole_paths():
    assert first_match(RULES, "x/lora_a/deeper", lambda rule: rule.match) == 2
    assert first_match(RULES[:2], "connector", lambda rule: rule.match) is None


def test_a_parameter_without_a_rule_is_an_error():
    with pytest.raises(ParamError, match="vision/encoder/kernel"):
        parameter_infos(SHAPES, RULES[:2], PRECISION)


def test_a_rule_without_a_parameter_is_an_error():
    with pytest.raises(ParamError, match="speech"):
        parameter_infos(SHAPES, (Rule(match="speech/.*", lr=1), *RULES), PRECISION)


def test_flatten_and_nest_are_inverse():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert nest(flatten(tree)) == tree


def test_split_is_a_partition():
    infos = parameter_infos(SHAPES, RULES, PRECISION)
    trained, frozen = split(dict.fromkeys(SHAPES, 0), infos)
    assert set(trained) == {"vision/connector/kernel", "decoder/lora_a"}
    assert set(frozen) == set(SHAPES) - set(trained)


def test_printed_table():
    infos = parameter_infos(SHAPES, RULES, PRECISION)
    spec = PartitionSpec(None, "fsdp")
    sharding = {path: type("Sharding", (), {"spec": spec}) for path in infos}
    lines = describe(infos, sharding).splitlines()
    assert lines[0].split() == ["path", "shape", "dtype", "sharding", "lr"]
    assert [line.split()[0] for line in lines[1:-1]] == sorted(SHAPES)
    row = next(line for line in lines if line.startswith("decoder/lora_a"))
    assert row.split() == ["decoder/lora_a", "5×2×1", "float32", "-,", "fsdp", "x2"]
    assert next(line for line in lines if line.startswith("scale")).split()[1] == "scalar"
    assert lines[-1] == "total 51 parameters, trained 18 (35.3%)"


def test_declared_takes_shape_structs():
    config = model_config()
    model = UniMoE(config, LayerOptions())
    batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), make_batch(config, 1, 8, 1)
    )
    shapes = declared(model, batch)
    assert shapes["decoder/run_0/block_0/moe/experts/down_proj/kernel"] == (
        (1, 4, 12, 8),
        ("layers", "expert", "mlp", "expert_embed"),
    )
    assert shapes["embed/embedding"] == ((16, 8), ("vocab", "embed"))


def test_parameters_without_logical_axes_are_refused():
    """flax would silently hold such a parameter whole on every device."""
    with pytest.raises(ParamError, match=r"'(kernel|bias)': shape .* but logical axes \(\)"):
        declared(nn.Dense(4), jnp.zeros((1, 2)))
