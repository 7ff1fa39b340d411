"""The index of sizes: cached, measured again where needed, and named if it cannot be written."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest

from tests.data.helpers import LOADER, data_config, talk


def test_an_index_that_cannot_be_written_is_named(build, mixed, monkeypatch, tmp_path):
    def full(*_, **arrays):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    data = data_config(mixed, voice="speech").model_copy(update={"cache": str(tmp_path / "cache")})
    with pytest.raises(OSError, match=r"No space left on device: '.*/cache/index-.*\.npz'"):
        build(data)
    assert not list((tmp_path / "cache").iterdir())


def test_the_index_is_cached_and_only_bad_records_are_measured_again(
    build, mixed, folder, monkeypatch
):
    cache = folder.root / "cache"
    records = [talk("<image>", image="late.png"), *json.loads(mixed.read_text())]
    mixed.write_text(json.dumps(records))
    data = data_config(mixed, voice="speech").model_copy(update={"cache": str(cache)})
    loader = LOADER.model_copy(update={"max_bad_share": 0.5})
    first = build(data, loader)
    assert first.tally.bad == 1
    measured = []
    from unimoe_jax.data.samples import SampleReader

    measure = SampleReader.measure
    monkeypatch.setattr(
        SampleReader, "measure", lambda self, n: (measured.append(n), measure(self, n))[1]
    )
    again = build(data, loader)
    assert measured == [0]
    assert again.plan.fingerprint() == first.plan.fingerprint()
    folder.image("late.png")
    assert build(data, loader).tally.bad == 0
    measured.clear()
    assert len(build(data, loader).plan.samples) == 41
    assert measured == []


@pytest.mark.parametrize("damage", ["empty", "cut", "garbage", "shorter"])
def test_a_damaged_index_is_measured_again(build, folder, caplog, damage):
    cache = folder.root / "cache"
    path = folder.write("d.json", [talk(f"say {i}") for i in range(4)])
    data = data_config(path).model_copy(update={"cache": str(cache)})
    whole = build(data)
    (file,) = cache.glob("index-*.npz")
    content = file.read_bytes()
    if damage == "shorter":
        with np.load(file) as arrays:
            np.savez(file, **{name: arrays[name][:-1] for name in arrays})
    else:
        file.write_bytes({"empty": b"", "cut": content[:-99], "garbage": b"?" * 500}[damage])
    caplog.clear()
    assert build(data).plan.fingerprint() == whole.plan.fingerprint()
    (message,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"{file}: damaged index (" in message
    assert "source all is measured again" in message
    caplog.clear()
    build(data)
    assert not caplog.records
