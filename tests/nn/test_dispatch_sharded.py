"""Dispatch on meshes of eight devices: the same values, gradients and dropout as on one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.close import assert_close
from tests.nn.dispatch_cases import (
    SWIGLU,
    inputs_of,
    routing,
    values_and_gradients,
    weights_of,
)
from unimoe_jax.config import MeshConfig
from unimoe_jax.nn import dispatch
from unimoe_jax.sharding import make_mesh, use_mesh

EXPERT_FN = replace(SWIGLU, train=True)  # with adapter dropout
ROWS, LENGTH = 8, 3
DATA_ONLY = {"batch": ("data",)}


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "LARGEST_BLOCK", 8)
        patch.setattr(dispatch, "SMALLEST_BLOCK", 4)
        yield


@pytest.fixture(scope="module")
def expected(small_blocks):
    run = values_and_gradients(EXPERT_FN, "grouped")
    return {name: run(*_arguments(name)) for name in ("skewed", "some_none", "one")}


def _arguments(name: str):
    return weights_of(EXPERT_FN), inputs_of(ROWS, LENGTH), *routing(name, ROWS, LENGTH, 2)


@pytest.mark.parametrize(
    ("data", "fsdp", "expert", "tensor", "rules", "method"),
    [
        (8, 1, 1, 1, None, "grouped"),
        (1, 1, 4, 1, None, "grouped"),
        (2, 1, 2, 2, None, "grouped"),
        (1, 2, 4, 1, None, "grouped"),
        (2, 1, 4, 1, DATA_ONLY, "grouped"),
        (2, 2, 2, 1, None, "dense"),
    ],
)
def test_equals_one_device(devices, expected, data, fsdp, expert, tensor, rules, method):
    config = MeshConfig(data=data, fsdp=fsdp, expert=expert, tensor=tensor)
    mesh = make_mesh(config, devices[: data * fsdp * expert * tensor])
    with use_mesh(mesh, rules):
        run = values_and_gradients(EXPERT_FN, method)
        for name, value in expected.items():
            assert_close(run(*_arguments(name)), value, 2e-6)
