"""The doctor as a program: every failure is put into the environment of the real command."""

import json
import os
import subprocess
import sys

import pytest

from tests.doctor.fake_environment import REPOSITORY

# ----------------------------------------------------------------------------- nothing is wrong


def test_this_environment_is_healthy(tmp_path):
    """Nothing is faked here: the tests themselves need everything that the doctor checks."""
    done = subprocess.run(
        [sys.executable, "-m", "unimoe_jax.doctor", "--json", "--cache", str(tmp_path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    content = json.loads(done.stdout)
    assert [c for c in content["checks"] if c["status"] == "failure"] == []
    assert done.returncode == 0 and content["ok"]
    names = [check["name"] for check in content["checks"]]
    assert names[:4] == ["python", "unimoe_jax", "jax", "jaxlib"]
    assert {"flax", "backend", "devices", "CPU", "memory", "torch", "cache", "runs"} <= set(names)


def test_a_healthy_environment_in_plain_text(fake):
    done = fake.run()
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line and not line.startswith(" ")] == [
        *("versions", "devices", "machine", "optional parts", "folders"),
        "Everything that is needed works.",
    ]
    assert "\x1b" not in done.stdout
    (einops,) = [line for line in lines if " einops " in line]
    assert einops.split()[0] == "ok" and einops.endswith("(0.8 or later)")
    assert f"{fake.work / 'runs'} can be written" in done.stdout
    # The doctor leaves nothing behind.
    assert not list(fake.work.iterdir()) and not os.path.exists(fake.variables["XDG_CACHE_HOME"])


def test_devices_are_counted_with_their_memory(fake):
    fake.jax(kind="TPU v5p", memory=3 * 2**35, backend="tpu")
    code, checks = fake.checks()
    assert code == 0
    assert checks["backend"]["value"] == "tpu"
    assert checks["devices"]["value"] == "2 × TPU v5p with 96.0 GiB"


def test_a_reader_who_has_gone(fake):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "unimoe_jax.doctor"]
    with open(writer, "w") as out:
        done = subprocess.run(
            command, cwd=fake.work, env=fake.environment(), stdout=out, stderr=subprocess.PIPE
        )
    assert done.returncode == 141 and not done.stderr


# ------------------------------------------------------------------------------------- versions


def test_a_missing_package(fake):
    fake.requires("einops>=0.8", "no-such-package>=1.5")
    code, checks = fake.checks()
    assert code == 1
    missing = checks["no-such-package"]
    assert (missing["status"], missing["value"]) == ("failure", "is not installed")
    assert missing["remedy"] == "pip install --upgrade 'no-such-package>=1.5'"
    text = fake.run().stdout
    assert "FAILED  no-such-package  is not installed\n" in text
    assert text.endswith("1 check has failed: no-such-package. The arrows say what to do.\n")


def test_a_package_that_is_too_old(fake):
    fake.metadata("einops", "0.7.9")
    code, checks = fake.checks()
    assert code == 1 and checks["einops"]["value"] == "0.7.9 is older than 0.8"
    assert checks["einops"]["remedy"] == "pip install --upgrade 'einops>=0.8'"


def test_a_python_that_is_too_old(fake):
    fake.requires("einops", python=">=99.1")
    code, checks = fake.checks()
    assert code == 1 and checks["python"]["value"].endswith("is older than 99.1")
    assert "new environment" in checks["python"]["remedy"]


def test_packages_that_cannot_be_imported(fake):
    """One raises, one ends the process, one does not finish; those after them are still checked."""
    fake.package("raises", "1", "raise OSError('libsndfile.so not found\\nsecond line')")
    fake.package("crashes", "1", "import os; os.abort()")
    fake.package("hangs", "1", "import time; time.sleep(600)")
    fake.package("noisy", "1", "print('hello')")
    fake.requires("raises", "crashes", "hangs", "noisy")
    code, checks = fake.checks("--timeout", "3")
    assert code == 1
    assert checks["raises"]["value"].endswith("imported: OSError: libsndfile.so not found")
    assert checks["crashes"]["value"].endswith("ended the Python process with SIGABRT")
    assert checks["hangs"]["value"].endswith("did not finish within 3 s")
    assert "reinstall it" in checks["raises"]["remedy"]
    assert checks["noisy"]["status"] == "ok"


# -------------------------------------------------------------------------------------- devices


def test_a_backend_that_does_not_start(fake):
    fake.jax(first="raise RuntimeError('no TPU driver')")
    code, checks = fake.checks()
    assert code == 1 and checks["backend"]["value"] == "RuntimeError: no TPU driver"
    assert "JAX_PLATFORMS=cpu" in checks["backend"]["remedy"]
    fake.variables["JAX_PLATFORMS"] = "tpu"
    _, checks = fake.checks()
    assert checks["backend"]["remedy"].startswith("JAX_PLATFORMS=tpu is set: unset it")


def test_devices_that_another_process_holds(fake):
    fake.jax(first="import time; time.sleep(600)")
    code, checks = fake.checks("--timeout", "3")
    assert code == 1 and checks["backend"]["value"] == "jax did not finish within 3 s"
    assert "another process may be using the devices" in checks["backend"]["remedy"]


@pytest.mark.parametrize(
    ("plugin", "kind", "advice"),
    [("jax-cuda13-plugin", "GPU", "nvidia-smi"), ("libtpu", "TPU", "TPU VM")],
)
def test_a_plugin_without_a_device(fake, plugin, kind, advice):
    fake.metadata(plugin, "0.10")
    code, checks = fake.checks()
    check = checks[f"{kind} plugin"]
    assert code == 0 and check["status"] == "warning"
    assert check["value"] == f"{plugin} is installed, but jax has found no {kind}"
    assert advice in check["remedy"]
    fake.variables["JAX_PLATFORMS"] = "cpu"
    _, checks = fake.checks()
    assert "JAX_PLATFORMS=cpu keeps jax from looking" in checks[f"{kind} plugin"]["remedy"]


@pytest.mark.parametrize(("hardware", "extra"), [("NVIDIA GPU", "gpu"), ("Google TPU", "tpu")])
def test_a_device_without_a_plugin(fake, hardware, extra):
    """jax warns about it in these words."""
    warning = f"A {hardware} may be present on this machine, but"
    fake.jax(first=f"print({warning!r}, file=sys.stderr)")
    code, checks = fake.checks()
    assert code == 0 and checks[hardware]["status"] == "warning"
    assert checks[hardware]["remedy"] == f"pip install 'unimoe_jax[{extra}]'"


# ------------------------------------------------------------------------------- optional parts


def test_optional_parts_name_the_command_that_installs_them(fake):
    fake.requires(
        "einops>=0.8",
        'torch>=2.10; extra == "convert"',
        'no-such-package>=1; extra == "plots"',
        'jax[cuda13]; extra == "gpu"',
        'jax[tpu]; extra == "tpu"',
        'unimoe_jax[plots]; extra == "all"',
        'no-such-linter; extra == "test"',
    )
    fake.metadata("libtpu", "0.0.1")
    code, checks = fake.checks()
    assert code == 0
    assert checks["torch"]["status"] == "ok"
    assert checks["no-such-package"]["status"] == "absent"
    assert checks["no-such-package"]["remedy"] == "pip install 'unimoe_jax[plots]'"
    assert checks["jax for GPUs"]["remedy"] == "pip install 'unimoe_jax[gpu]'"
    assert checks["jax for TPUs"]["value"] == "libtpu 0.0.1"
    assert "no-such-linter" not in checks


def test_an_optional_package_that_is_too_old_is_a_note(fake):
    fake.requires("einops", 'torch>=100.1; extra == "convert"')
    code, checks = fake.checks()
    assert code == 0 and checks["torch"]["status"] == "warning"
    assert checks["torch"]["value"].startswith("99 is older than 100.1")
    assert checks["torch"]["remedy"] == "pip install --upgrade 'torch>=100.1'"


@pytest.mark.parametrize("name", ["torchvision", "torchaudio"])
@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("raise RuntimeError('operator nms does not exist')", "operator nms does not exist"),
        ("import os; os.abort()", "SIGABRT"),
    ],
)
def test_a_package_that_does_not_fit_torch(fake, name, code, error):
    fake.package(name, "0.1", code)
    exit_code, checks = fake.checks()
    check = checks[name]
    assert exit_code == 1 and check["status"] == "failure"
    assert "cannot be imported with torch 99" in check["value"] and error in check["value"]
    assert "transformers" in check["value"]
    assert f"pip uninstall {name}" in check["remedy"]
    assert f"pip install --upgrade --force-reinstall torch {name}" in check["remedy"]


def test_a_broken_torch(fake):
    fake.package("torch", "99", "raise ImportError('libcudart.so.12')")
    code, checks = fake.checks()
    assert code == 1
    assert "99 cannot be imported (ImportError: libcudart.so.12)" in checks["torch"]["value"]
    assert "pip uninstall torch " in checks["torch"]["remedy"]


def test_a_torchvision_that_works_is_no_failure(fake):
    fake.package("torchvision", "0.1")
    code, checks = fake.checks()
    assert code == 0 and checks["torchvision"]["status"] == "ok"


# -------------------------------------------------------------------------------------- folders


def test_a_file_in_the_way_of_the_cache(fake, tmp_path):
    (tmp_path / "cache").touch()
    code, checks = fake.checks()
    assert code == 1 and f"{tmp_path / 'cache'} is not a folder" in checks["cache"]["value"]
    assert "XDG_CACHE_HOME" in checks["cache"]["remedy"]
    code, checks = fake.checks("--cache", str(tmp_path / "other"))
    assert code == 0 and checks["cache"]["value"].startswith(str(tmp_path / "other"))


def test_a_file_in_the_way_of_runs(fake):
    (fake.work / "runs").touch()
    code, checks = fake.checks()
    assert code == 1 and f"{fake.work / 'runs'} is not a folder" in checks["runs"]["value"]
    assert "output=FOLDER/{name}" in checks["runs"]["remedy"]
    code, checks = fake.checks("--output", "elsewhere/runs")
    assert code == 0 and checks["runs"]["value"].startswith(str(fake.work / "elsewhere/runs"))


def test_a_folder_without_permission(fake, tmp_path):
    """/proc refuses files from everybody, root included."""
    code, checks = fake.checks("--output", "/proc/runs")
    assert code == 1 and "/proc/runs cannot be written (" in checks["runs"]["value"]


def test_settings_that_cannot_be_imported_hide_no_other_check(fake):
    fake.package("pydantic", "99", "raise ImportError('pydantic_core')")
    fake.requires("pydantic>=2")
    code, checks = fake.checks()
    assert code == 1 and checks["pydantic"]["status"] == "failure"
    assert checks["cache"]["status"] == "warning" and "pydantic_core" in checks["cache"]["value"]
    assert checks["runs"]["status"] == "ok"
