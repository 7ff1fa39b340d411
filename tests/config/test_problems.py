"""The first problem that pydantic finds in settings, as one line of an error message."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from unimoe_jax.config import DecoderConfig, ModelConfig
from unimoe_jax.config.problems import first_problem

DECODER = {
    "vocab_size": 11,
    "hidden_size": 8,
    "mlp_dim": 12,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
}


class Named(BaseModel):
    name: str

    @field_validator("name")
    @classmethod
    def has_letters(cls, name: str) -> str:
        raise ValueError("name has no letters")


def problem_of(kind: type[BaseModel], settings: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate(settings)
    return first_problem(caught.value)


def test_the_key_is_dotted():
    line = problem_of(ModelConfig, {"decoder": DECODER | {"hidden_size": "eight"}})
    assert line.startswith("decoder.hidden_size: Input should be a valid integer")


def test_a_validator_of_a_whole_class_has_no_key():
    line = problem_of(DecoderConfig, DECODER | {"num_heads": 3})
    assert line.startswith("hidden_size = 8 is not a multiple of num_heads = 3")


def test_the_prefix_of_pydantic_is_removed():
    # pydantic puts "Value error, " before the words of a validator that raises ValueError.
    assert problem_of(Named, {"name": "7"}) == "name: name has no letters"


def test_only_the_first_of_several_problems_is_named():
    line = problem_of(DecoderConfig, DECODER | {"vocab_size": "many", "mlp_dim": "wide"})
    assert line.startswith("vocab_size: ")
    assert "mlp_dim" not in line
    assert "\n" not in line
