"""The parameters of every stage of every run file, compared with recorded tables.

`pytest tests/params/test_param_tables.py --update-golden` rewrites the tables. Review the
difference in git before committing it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from unimoe_jax.config import RunConfig
from unimoe_jax.config.load import resolve_config
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.params.table import ParamInfo
from unimoe_jax.stages.stage import parameter_table

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
RUNS = sorted((ROOT / "configs" / "run").glob("*.yaml"))


@cache
def load(path: Path) -> RunConfig:
    return resolve_config(path, []).config


def stages() -> list:
    return [
        pytest.param(path, stage.name, id=f"{path.stem}_{stage.name}")
        for path in RUNS
        for stage in load(path).stages
    ]


def rendered(infos: Mapping[str, ParamInfo]) -> str:
    """One line per parameter: path, shape, dtype, logical axes, learning-rate multiplier."""
    lines = []
    for path, info in sorted(infos.items()):
        shape = "×".join(map(str, info.shape)) or "scalar"
        axes = ",".join(axis or "-" for axis in info.axes) or "-"
        lr = "frozen" if info.lr is None else f"x{info.lr:g}"
        decay = "" if info.lr is None or info.weight_decay else " no-decay"
        lines.append(f"{path} {shape} {info.dtype} {axes} {lr}{decay}")
    total = sum(info.size for info in infos.values())
    trained = sum(info.size for info in infos.values() if info.trained)
    return "\n".join([*lines, f"total {total:,} trained {trained:,}"]) + "\n"


@pytest.mark.parametrize(("path", "name"), stages())
def test_parameter_table(path: Path, name: str, update_golden: bool):
    run = load(path)
    stage = next(stage for stage in run.stages if stage.name == name)
    text = rendered(parameter_table(resolve_stage(run, stage)))
    golden = GOLDEN / f"{path.stem}_{name}.txt"
    if update_golden:
        GOLDEN.mkdir(exist_ok=True)
        golden.write_text(text)
    assert golden.exists(), f"no {golden.name}; record it with --update-golden"
    assert text.splitlines() == golden.read_text().splitlines()


def test_every_table_belongs_to_a_stage(update_golden: bool):
    expected = {f"{param.id}.txt" for param in stages()}
    found = {path.name for path in GOLDEN.glob("*.txt")}
    if update_golden:
        for name in found - expected:
            (GOLDEN / name).unlink()
        found &= expected
    assert found == expected
