"""Tiny checkpoints of stages, and the commands that read them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import yaml

from unimoe_jax.checkpoints.final import save_final
from unimoe_jax.config import ModelConfig, RunConfig
from unimoe_jax.config.load import dump_config
from unimoe_jax.convert.__main__ import main as convert_main
from unimoe_jax.convert.plan import parameter_shapes
from unimoe_jax.experts.__main__ import main

RUN = Path(__file__).parents[2] / "configs/run/cumo_tiny.yaml"
FFN = "decoder/run_0/block_0/mlp/up_proj/kernel"
EXPERTS = "decoder/run_0/block_0/moe/experts/up_proj/kernel"
ENCODER = "vision/encoder/layers/moe/experts/fc1/kernel"
UNREAD = "vision/encoder/unread_layers/moe/experts/fc1/kernel"
CONNECTOR = "vision/connector/moe/experts/fc1/kernel"


def run(*arguments) -> int:
    return main([str(argument) for argument in arguments])


def convert(*arguments) -> int:
    return convert_main([str(argument) for argument in arguments])


def write_stage(folder: Path, settings: RunConfig, stage_name: str, seed: int) -> Path:
    """Write a run with the checkpoint of one stage, random numbers, and return the checkpoint."""
    stage = next(stage for stage in settings.stages if stage.name == stage_name)
    model = settings.stage_model(stage)
    generator = np.random.default_rng(seed)
    shapes = parameter_shapes(model, [""])
    params = {path: generator.standard_normal(s).astype("f4") for path, s in shapes.items()}
    final = folder / "checkpoints" / stage_name / "final"
    manifest = {
        "stage": stage_name,
        "moe_layers": list(model.decoder.moe_layers()),
        "init": [take.model_dump(exclude_none=True) for take in stage.init],
        "shapes": {path: list(shape) for path, shape in shapes.items()},
    }
    save_final(final, params, manifest)
    (folder / "config.yaml").write_text(dump_config(settings))
    return final


def model_of(folder: Path) -> ModelConfig:
    return ModelConfig.model_validate(yaml.safe_load((folder / "model.yaml").read_text())["model"])
