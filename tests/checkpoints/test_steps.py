"""Checkpoints of steps and results of stages: round trips, other meshes, damage."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from unimoe_jax.checkpoints.checksums import SUMS, CheckpointError, check_files, seal, verify
from unimoe_jax.checkpoints.final import load_final, open_source, save_final
from unimoe_jax.checkpoints.manifest import MANIFEST, read_manifest
from unimoe_jax.checkpoints.steps import StepCheckpoints
from unimoe_jax.config import MeshConfig
from unimoe_jax.parallel.sharding import make_mesh
from unimoe_jax.params.layer_parts import LayerPart
from unimoe_jax.runtime.files import WriteError, raising_write_errors
from unimoe_jax.stages.train_step import TrainState

KERNEL = np.arange(32, dtype=np.float32).reshape(8, 4)


def state_on(mesh, spec: PartitionSpec, step: int) -> TrainState:
    """A training state whose values depend on its step, with the kernels sharded by `spec`."""

    def put(value, spec=PartitionSpec()):
        return jax.device_put(value, NamedSharding(mesh, spec))

    return TrainState(
        step=put(jnp.int32(step)),
        trained={"a/kernel": put(KERNEL + step, spec)},
        optimizer=({"a/kernel": put(KERNEL * step, spec)}, put(jnp.int32(step))),
        seed=put(jnp.uint32(7)),
        bad_steps=put(jnp.int32(0)),
    )


def template_of(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), state
    )


@pytest.fixture
def mesh(devices):
    return make_mesh(MeshConfig(data=4, fsdp=2), devices)


@pytest.fixture
def saved(tmp_path, mesh):
    """Checkpoints in which steps 1, 2 and 3 were saved and the last two are kept."""
    checkpoints = StepCheckpoints(tmp_path / "steps", keep=2)
    for step in (1, 2, 3):
        state = state_on(mesh, PartitionSpec("fsdp"), step)
        checkpoints.save(step, state, {"row": 10 * step, "source": "text"})
    checkpoints.finish()
    yield checkpoints
    checkpoints.close()


def flip_a_byte(folder: Path) -> Path:
    """Change one bit in the middle of the largest file, which holds array data; return the file."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != SUMS]
    path = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def no_message(text: str) -> None:
    """An `announce` for cases in which nothing may be announced."""
    raise AssertionError(text)


def test_the_newest_step_is_restored(saved, mesh):
    expected = state_on(mesh, PartitionSpec("fsdp"), 3)
    step, state, position = saved.restore_latest(template_of(expected), announce=no_message)
    assert step == 3
    assert position == {"row": 30, "source": "text"}
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert isinstance(state, TrainState)
    assert state.trained["a/kernel"].sharding == expected.trained["a/kernel"].sharding


def test_only_the_newest_are_kept_and_all_are_sealed(saved):
    names = sorted(path.name for path in saved.folder.iterdir() if path.name.isdigit())
    assert names == ["2", "3"]
    for name in names:
        verify(saved.folder / name)


def test_a_crash_before_a_step_is_sealed_keeps_the_step_before(tmp_path, mesh, monkeypatch):
    checkpoints = StepCheckpoints(tmp_path / "steps", keep=1)
    state = state_on(mesh, PartitionSpec("fsdp"), 1)
    checkpoints.save(1, state, {})
    checkpoints.finish()

    def crash(folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("unimoe_jax.checkpoints.steps.seal", crash)
        checkpoints.save(2, state, {})
        with pytest.raises(WriteError, match=r"steps/2: cannot be written \(No space left on"):
            checkpoints.finish()
    with StepCheckpoints(tmp_path / "steps", keep=1) as checkpoints:
        step, *_ = checkpoints.restore_latest(template_of(state), announce=lambda text: None)
    assert step == 1


# A message of tensorstore about a full disk, followed by one of two forms of its error code.
TENSORSTORE = "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 4: No space left on device "


@pytest.mark.parametrize("sign", ["[os_error_code='28']", "[OS error 28: ENOSPC]"])
def test_a_full_disk_is_reported_in_one_line(tmp_path, monkeypatch, sign):
    """Tensorstore raises ValueError for it; other ValueErrors stay as they are."""

    def save(*args, **settings):
        raise ValueError(TENSORSTORE + sign)

    monkeypatch.setattr("orbax.checkpoint.StandardCheckpointer.save", save)
    with pytest.raises(
        WriteError, match=r"^/.*/final: cannot be written \(No space left on device"
    ):
        save_final(tmp_path / "final", {"a": KERNEL}, {})
    with pytest.raises(ValueError, match="another error"), raising_write_errors(tmp_path):
        raise ValueError("another error")


def test_half_written_steps_are_removed(tmp_path, mesh):
    unfinished = tmp_path / "steps" / "7.orbax-checkpoint-tmp" / "state"
    unfinished.mkdir(parents=True)
    with StepCheckpoints(tmp_path / "steps", keep=1) as checkpoints:
        checkpoints.save(8, state_on(mesh, PartitionSpec("fsdp"), 8), {})
    assert [path.name for path in (tmp_path / "steps").iterdir()] == ["8"]


def test_restore_on_another_mesh(saved, devices):
    other = make_mesh(MeshConfig(data=1, fsdp=4), devices[:4])
    expected = state_on(other, PartitionSpec(None, "fsdp"), 3)
    _, state, _ = saved.restore_latest(template_of(expected))
    kernel = state.trained["a/kernel"]
    np.testing.assert_array_equal(kernel, KERNEL + 3)
    assert kernel.sharding == expected.trained["a/kernel"].sharding


def test_a_damaged_step_is_named_and_the_step_before_is_restored(saved, mesh):
    damaged = flip_a_byte(saved.folder / "3")
    with pytest.raises(CheckpointError, match=damaged.name):
        verify(saved.folder / "3")
    messages = []
    template = template_of(state_on(mesh, PartitionSpec("fsdp"), 0))
    step, state, position = saved.restore_latest(template, announce=messages.append)
    assert (step, int(state.step), position["row"]) == (2, 2, 20)
    assert len(messages) == 1
    assert "step 3" in messages[0]

    (saved.folder / "2" / SUMS).unlink()
    assert saved.restore_latest(template, announce=messages.append) is None
    assert "incomplete" in messages[-1]


def test_a_damaged_step_is_moved_aside_and_can_be_written_again(saved, mesh):
    flip_a_byte(saved.folder / "3")
    messages = []
    template = template_of(state_on(mesh, PartitionSpec("fsdp"), 0))
    assert saved.restore_latest(template, announce=messages.append)[0] == 2
    aside = saved.folder.with_name("unusable") / "3"
    assert aside.is_dir()
    assert not (saved.folder / "3").exists()
    assert messages[0].endswith(f"moved to {aside}")

    saved.save(3, state_on(mesh, PartitionSpec("fsdp"), 3), {"row": 30})
    saved.finish()
    assert saved.restore_latest(template, announce=no_message)[0] == 3


def test_the_shapes_of_the_newest_step_are_read_from_its_metadata(saved, tmp_path):
    """A step whose metadata cannot be read is left out."""
    assert StepCheckpoints.newest(saved.folder) == (3, {"a/kernel": (8, 4)})
    (saved.folder / "3" / "state" / "_METADATA").write_text("{")
    assert StepCheckpoints.newest(saved.folder)[0] == 2
    assert StepCheckpoints.newest(tmp_path / "nothing") is None


def test_a_state_of_another_structure_is_refused_in_one_line(saved, mesh):
    template = template_of(state_on(mesh, PartitionSpec("fsdp"), 0))
    template.trained["b/kernel"] = template.trained["a/kernel"]
    with pytest.raises(CheckpointError, match="does not fit what trains now") as caught:
        saved.restore_latest(template)
    assert "\n" not in str(caught.value)


def test_restoring_without_a_checkpoint_returns_none(tmp_path, mesh):
    checkpoints = StepCheckpoints(tmp_path / "steps", keep=2)
    assert checkpoints.restore_latest(template_of(state_on(mesh, PartitionSpec(), 0))) is None
    checkpoints.close()


@pytest.fixture
def sealed(tmp_path) -> Path:
    """A sealed folder: parameters in a folder, and other files beside it."""
    (tmp_path / "params").mkdir()
    for name in ("params/a", "tokenizer.model", "generation_config.json"):
        (tmp_path / name).write_text(name)
    seal(tmp_path)
    verify(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", ["NOTES.txt", "notes/today", "generation_config.json"])
def test_files_of_users_are_not_damage(sealed, name):
    """Users may add files, and edit or remove generation_config.json."""
    (sealed / name).parent.mkdir(exist_ok=True)
    (sealed / name).write_text("mine")
    verify(sealed)
    (sealed / "generation_config.json").unlink()
    verify(sealed)


def test_a_file_that_differs_is_named_with_its_remedy(sealed):
    (sealed / "params" / "b").write_text("")
    with pytest.raises(CheckpointError, match="params/b: is no part of this checkpoint; remove it"):
        verify(sealed)
    (sealed / "params" / "b").unlink()
    (sealed / "tokenizer.model").write_text("x")
    for check in (verify, check_files):
        with pytest.raises(CheckpointError, match=r"tokenizer.model: .*copy this file again"):
            check(sealed)
    (sealed / "params" / "a").unlink()
    with pytest.raises(CheckpointError, match="params/a: damaged or missing"):
        verify(sealed)


@pytest.mark.parametrize("text", ["{", "[]", ""])
def test_a_broken_list_of_checksums_is_damage(sealed, text):
    (sealed / SUMS).write_text(text)
    with pytest.raises(CheckpointError, match=f"{SUMS}: damaged"):
        verify(sealed)


# ------------------------------------------------------------------------- stage results

PARAMS = {
    "embed/embedding": KERNEL,
    "decoder/run_0/block_0/mlp/up_proj/kernel": np.stack([KERNEL, -KERNEL]),
    "low": KERNEL.astype(ml_dtypes.bfloat16),
}
RECORD = {
    "shapes": {path: list(leaf.shape) for path, leaf in PARAMS.items()},
    "moe_layers": [False, False],
    "parents": ["base"],
}


@pytest.fixture
def final(tmp_path, mesh) -> Path:
    """The result of a stage, saved from arrays on a mesh."""
    sharding = NamedSharding(mesh, PartitionSpec())
    folder = tmp_path / "stage" / "final"
    save_final(folder, jax.device_put(PARAMS, sharding), RECORD)
    return folder


def test_the_result_of_a_stage_is_loaded_as_saved(final):
    loaded = load_final(final)
    assert set(loaded) == set(PARAMS)
    for path, leaf in PARAMS.items():
        assert loaded[path].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(loaded[path]), leaf)
    assert read_manifest(final) == RECORD
    assert not final.with_name("final.partial").exists()


def test_the_result_of_a_stage_is_a_source(final):
    """Any part of a parameter can be read, also one layer of a stack."""
    source = open_source("base", final)
    assert source.shapes["embed/embedding"] == (8, 4)
    np.testing.assert_array_equal(source.load("embed/embedding", ()), KERNEL)
    np.testing.assert_array_equal(source.load("low", (3, slice(1, 3))), PARAMS["low"][3, 1:3])
    piece = source.piece(LayerPart("decoder", 1, "mlp/up_proj/kernel"))
    np.testing.assert_array_equal(piece.read((slice(2, 8),)), -KERNEL[2:8])


def test_a_damaged_stage_is_refused(final):
    flip_a_byte(final)
    source = open_source("base", final)  # this reads the manifest alone
    with pytest.raises(CheckpointError, match="damaged"):
        source.check()


def test_a_changed_manifest_is_refused(final):
    record = json.loads((final / MANIFEST).read_text())
    (final / MANIFEST).write_text(json.dumps(record | {"parents": []}))
    with pytest.raises(CheckpointError, match=MANIFEST):
        load_final(final)


@pytest.mark.parametrize("text", ["{", "[]", "", "5"])
def test_a_broken_manifest_is_refused_before_it_is_parsed(final, text):
    (final / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: damaged"):
        read_manifest(final)
    seal(final)  # the checksum fits now, and the text is still no manifest
    with pytest.raises(CheckpointError, match=f"{MANIFEST}: "):
        read_manifest(final)


def test_saving_again_replaces_the_result(final):
    save_final(
        final, {"embed/embedding": -KERNEL}, RECORD | {"shapes": {"embed/embedding": [8, 4]}}
    )
    loaded = load_final(final)
    assert set(loaded) == {"embed/embedding"}
    np.testing.assert_array_equal(loaded["embed/embedding"], -KERNEL)


def test_an_unfinished_stage_is_no_source(tmp_path):
    with pytest.raises(CheckpointError, match="not a finished stage"):
        open_source("base", tmp_path)
