"""Recorded systems, from their files to losses and gradients.

    GOLDEN_DIR=DIR pytest tests/parity/test_golden.py

checks every Uni-MoE and CuMo system in DIR. Recorded keys that are not checked are listed in
`golden_unchecked.json` with the reason, and the test prints them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.golden_dir import golden_dir, recorded_cumo
from tests.parity import golden_checks, golden_cumo
from tests.parity.golden_cumo import CumoSystem
from tests.parity.golden_gradients import copies_by_name, plain, stage_3
from tests.parity.golden_system import System, training_batch
from unimoe_jax.data.processors import Processors
from unimoe_jax.data.record_files import RecordFile
from unimoe_jax.data.records import RecordReader
from unimoe_jax.data.samples import SampleReader
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.params.paths import first_match

UNCHECKED = json.loads(Path(__file__).with_name("golden_unchecked.json").read_text())
NORM_RTOL = 1e-3
SILENT = 1e-5  # gradients that vanish in exact arithmetic (biases of keys) are rounding noise
POOL_TOLERANCE = {"image": 1e-5, "video": 1e-5, "speech": 1e-4, "audio": 5e-3}


def whole_unimoe() -> list[Path]:
    """Folders of complete recorded Uni-MoE systems; a system with routers is complete."""
    return sorted({path.parents[2] for path in golden_dir().glob("*/checkpoint/*/mlp_gates.bin")})


UNIMOE = [System(path) for path in whole_unimoe()]
CUMO = [CumoSystem(path) for path in recorded_cumo()]
SYSTEMS = [*UNIMOE, *CUMO]


def name_of(given: System | str) -> str:
    return given if isinstance(given, str) else given.folder.name


def groups(system: System) -> dict[str, Callable]:
    """Group of keys -> the function that computes it, for the groups that a system has."""
    return golden_cumo.groups(system) if system in CUMO else golden_checks.COMPUTE


on_all = pytest.mark.parametrize("system", SYSTEMS, ids=name_of)
on_unimoe = pytest.mark.parametrize("system", UNIMOE, ids=name_of)


@cache
def computed(system: System, group: str) -> dict[str, np.ndarray]:
    return golden_checks.compute(system, groups(system)[group])


def test_there_are_systems():
    assert UNIMOE, f"no recorded Uni-MoE system in {golden_dir()}"
    assert CUMO


@pytest.mark.parametrize(
    "system, group", [(s, group) for s in SYSTEMS for group in groups(s)], ids=name_of
)
def test_recorded_values(system: System, group: str):
    failures, worst = [], (0.0, "")
    for key, value in sorted(computed(system, group).items()):
        try:
            worst = max(worst, (golden_checks.check(system, key, value), key))
        except AssertionError as error:
            failures.append(str(error).strip())
    print(f"{system.folder.name} {group}: largest difference {worst[0]:.3g} at {worst[1]}")
    assert not failures, "\n\n".join(failures)


@on_all
def test_every_recorded_key_is_checked_or_excused(system: System):
    checked = {key for group in groups(system) for key in computed(system, group)}
    left = sorted(set(system.expected) - checked)
    reasons = {
        key: next((entry["reason"] for entry in UNCHECKED if re.fullmatch(entry["match"], key)), "")
        for key in left
    }
    for key, reason in reasons.items():
        print(f"not checked: {system.folder.name} {key}: {reason or 'NO REASON'}")
    print(f"{system.folder.name}: {len(checked)} of {len(system.expected)} recorded keys checked")
    assert not [key for key, reason in reasons.items() if not reason]
    assert len(checked) > len(left)


# ------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "system, run", [(s, run) for s in SYSTEMS for run in s.grad_norms], ids=name_of
)
def test_gradient_norms(system: System, run: str):
    if system in CUMO:
        actual = golden_cumo.all_gradients(system, run)
    else:
        actual = golden_checks.all_gradients(system)
    norms = system.grad_norms[run]
    missing = sorted(set(norms) - set(actual))
    assert not missing, missing[:4]
    for name, norm in norms.items():
        found = np.linalg.norm(actual[name].astype(np.float64))
        np.testing.assert_allclose(found, norm, rtol=NORM_RTOL, atol=SILENT, err_msg=name)


@on_unimoe
def test_trainable_set(system: System):
    """The rules of stage 3 train exactly the parameters with gradients in the recorded stage 3."""
    resolution = system.resolution("unmerged")
    copies = copies_by_name(resolution)
    recorded = {
        copies[plain(name)].dst for name in system.grad_norms["stage3"] if plain(name) in copies
    }
    rules = stage_3(resolution.plan.family)
    matched = {path: first_match(rules, path, lambda r: r.match) for path in resolution.targets}
    trained = {path for path, rule in matched.items() if rules[rule].lr is not None}
    assert trained == recorded


# -------------------------------------------------------------------------- from raw media


@on_unimoe
def test_raw_records_give_the_recorded_batch(system: System):
    """Compare ids, labels and media that are made from data.json and media files."""
    model = system.resolution("merged").plan.model
    spliced, pools = training_batch(system, model.tokens_per_medium())
    reader = sample_reader(system, model)
    found: dict[str, list[np.ndarray]] = {}
    lengths: list[int] = []
    for row in range(len(reader)):
        size, _ = reader.measure(row)
        stream, _ = reader.load(row, size)
        used = slice(spliced.attended[row])
        np.testing.assert_array_equal(stream.token_id, spliced.token_id[row, used])
        np.testing.assert_array_equal(stream.modality, spliced.modality[row, used])
        labels = np.where(stream.supervised, stream.token_id, -100)
        if not reader.tokenizer.legacy and (spliced.labels[row] == -100).all():
            print(f"row {row}: the reference lost all labels to a count of tokens (spec, I-17)")
        else:
            np.testing.assert_array_equal(labels, spliced.labels[row, used])
        for name, arrays in stream.pools.items():
            found.setdefault(name, []).extend(arrays)
        lengths += stream.lengths.get("audio", [])
    recorded = {"image": pools.image, "video": pools.video, system.voice: pools.sound}
    assert set(found) == {name for name, pool in recorded.items() if pool is not None}
    for name, arrays in found.items():
        atol = POOL_TOLERANCE[name]
        np.testing.assert_allclose(np.stack(arrays), recorded[name][0], atol=atol, rtol=0)
    if pools.sound_length is not None:
        np.testing.assert_array_equal(lengths, pools.sound_length[0])


def sample_reader(system: System, model) -> SampleReader:
    """The package's reader of the recorded data.json."""
    accepts = frozenset(model.tokens_per_medium())
    data = system.folder / "data.json"
    records = RecordReader("golden", RecordFile(data), system.folder, system.voice, accepts)
    tuned = next(source.path for source in system.sources if source.role == "tuned")
    # config.json of the fine-tune says whether training padded images. The imported model crops
    # them, as inference does.
    aspect = system.config.get("image_aspect_ratio") or "square"
    vision = model.vision.model_copy(update={"aspect": aspect})
    processors = Processors(model.model_copy(update={"vision": vision}))
    return SampleReader(records, Tokenizer.load(tuned), processors, "vicuna_v1", 4096)
