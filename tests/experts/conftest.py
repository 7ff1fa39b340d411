"""Checkpoints that the tests of this folder read and never change."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.experts.stages import RUN, run, write_stage
from unimoe_jax.config import RunConfig
from unimoe_jax.config.load import resolve_config


@pytest.fixture(scope="session")
def settings() -> RunConfig:
    """CuMo's tiny run with even smaller layers."""
    decoder = ["vocab_size=16", "hidden_size=8", "mlp_dim=6", "num_heads=2", "num_kv_heads=1"]
    encoder = ["hidden_size=8", "mlp_dim=6", "num_heads=2", "num_layers=3"]
    overrides = [f"model.decoder.{text}" for text in decoder]
    overrides += [f"model.vision.encoder.{text}" for text in encoder]
    return resolve_config(RUN, overrides).config


@pytest.fixture(scope="session")
def dense(tmp_path_factory, settings) -> Path:
    """The checkpoint of a stage without experts."""
    return write_stage(tmp_path_factory.mktemp("run"), settings, "pft", 1)


@pytest.fixture(scope="session")
def other(tmp_path_factory, settings) -> Path:
    """The same with other numbers."""
    return write_stage(tmp_path_factory.mktemp("other"), settings, "pft", 2)


@pytest.fixture(scope="session")
def upcycled(tmp_path_factory, dense) -> Path:
    """`dense` with three experts in encoder, connector and decoder."""
    out = tmp_path_factory.mktemp("up") / "moe"
    modules = ("--module", "encoder", "--module", "connector", "--module", "decoder")
    assert run("upcycle", "--from", dense, "--to", out, "--num-experts", 3, *modules) == 0
    return out
