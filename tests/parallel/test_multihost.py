"""Real processes on this machine, joined by gloo: one run that is killed, told to stop, and goes on
with two, one and four processes must equal a run of one process that was never disturbed.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
import sentencepiece
from PIL import Image

from unimoe_jax.checkpoints.checksums import verify
from unimoe_jax.checkpoints.final import load_final
from unimoe_jax.parallel import distributed
from unimoe_jax.parallel.distributed import lost_peer
from unimoe_jax.parallel.processes import DistributedError, Processes, find_processes
from unimoe_jax.runtime.cpu import settle_cpu

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 120, 20
BAD_SAMPLE = "`conversations` is missing or empty (bad: malformed_record)"
BROKEN = "picture33.png"
JOIN = """
import argparse, time
from unimoe_jax import distributed
parser = argparse.ArgumentParser()
distributed.add_arguments(parser)
distributed.initialize(parser.parse_args())
print("joined")
time.sleep(60)
"""
COLOURS = {"red": (200, 30, 30), "green": (30, 180, 40), "blue": (40, 60, 210)}


# ------------------------------------------------------------------------------------- the run


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with data, a tokenizer and the run file that names them."""
    folder = tmp_path_factory.mktemp("multihost")
    rng = np.random.default_rng(0)
    for name, count in (("picture", 90), ("heldout", 20)):
        records = []
        for number in range(count):
            colour = list(COLOURS)[number % 3]
            noise = rng.integers(-20, 20, (48, 48, 3))
            pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}{number}.png")
            question = "<image>\nWhich colour is it?" if number % 4 else "Say red."
            answer = colour if number % 4 else "red"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            media = {"image": f"{name}{number}.png"} if number % 4 else {}
            records.append({**media, "conversations": turns})
        if name == "heldout":
            records.append({"image": "heldout0.png", "conversations": []})
        (folder / f"{name}.json").write_text(json.dumps(records))
    broken = folder / BROKEN
    broken.write_bytes(broken.read_bytes()[:300])
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER: Which colour is it? Say red green blue ASSISTANT:"] * 50),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    text = (
        (ROOT / "tests/parallel/multihost.yaml")
        .read_text()
        .replace("../../configs", str(ROOT / "configs"))
    )
    text = text.replace("{tokenizer}", str(folder / "tokenizer.model"))
    (folder / "run.yaml").write_text(text.replace("{data}", str(folder)))
    return folder


@dataclass
class Outcome:
    """How the processes of one launch ended."""

    codes: list[int]
    printed: list[str]
    seconds: float
    steps: list[int]


def arguments(place: Path, name: str, mesh: str) -> list[str]:
    return [
        *("--config", str(place / "run.yaml"), "--resume", f"mesh={mesh}"),
        *(f"output={place / name}", f"data.cache={place / 'cache'}"),
    ]


def environment() -> dict[str, str]:
    own = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHON": sys.executable,
        # Most of the time is compilation: optimise little.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    return {**os.environ, **own}


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(count: int, command: list[str]) -> list[subprocess.Popen]:
    """`count` processes of the training program that find each other by flags."""
    address = free_address()
    found = [
        ["--coordinator", address, "--processes", str(count), "--process", str(index)]
        if count > 1
        else []
        for index in range(count)
    ]
    return [
        subprocess.Popen(
            [sys.executable, "-m", "unimoe_jax.train", *command, *flags],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
        )
        for flags in found
    ]


def logged(folder: Path) -> list[dict]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def saved(folder: Path) -> list[int]:
    steps = folder / "checkpoints/tune/steps"
    return sorted(int(path.name) for path in steps.glob("*") if path.name.isdigit())


def finish(
    processes: list[subprocess.Popen],
    folder: Path,
    until: int | None = None,
    interfere: Callable[[], None] = lambda: None,
) -> Outcome:
    """Wait for the end; `interfere()` after step `until` has been logged."""
    deadline = time.monotonic() + 300
    try:
        while until is not None and not any(r["step"] >= until for r in logged(folder)):
            for process in processes:
                assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        started = time.monotonic()
        interfere()
        printed = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    codes = [process.returncode for process in processes]
    return Outcome(codes, printed, time.monotonic() - started, saved(folder))


@pytest.fixture(scope="module")
def undisturbed(place) -> Outcome:
    """One process, from beginning to end."""
    return finish(start(1, arguments(place, "one", "{data: 1}")), place / "one")


@pytest.fixture(scope="module")
def killed(place) -> Outcome:
    """Two processes with parameters cut between them; the second is killed."""
    processes = start(2, arguments(place, "many", "{data: 1, fsdp: 2}"))
    return finish(processes, place / "many", EVERY + 5, processes[1].kill)


@pytest.fixture(scope="module")
def stopped(place, killed) -> Outcome:
    """The same again, by launch/local.sh; one of the two is told to stop."""
    command = ["launch/local.sh", "--processes", "2"]
    launcher = subprocess.Popen(
        [*command, *arguments(place, "many", "{data: 1, fsdp: 2}")],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
    )

    def stop_the_second() -> None:
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGTERM)  # a third may be what the script waits with

    folder = place / "many"
    return finish([launcher], folder, logged(folder)[-1]["step"] + 5, stop_the_second)


@pytest.fixture(scope="module")
def alone(place, stopped) -> Outcome:
    """On one process, which is told to stop."""
    processes = start(1, arguments(place, "many", "{data: 1}"))
    until = stopped.steps[-1] + 5
    return finish(processes, place / "many", until, processes[0].terminate)


@pytest.fixture(scope="module")
def four(place, alone) -> Outcome:
    """On four processes with parameters cut between them, to the end."""
    processes = start(4, arguments(place, "many", "{data: 1, fsdp: 4}"))
    return finish(processes, place / "many")


# ----------------------------------------------------------------------------------- what holds


def test_the_others_stop_when_one_is_killed(killed):
    assert killed.codes[1] == -signal.SIGKILL
    assert killed.codes[0] not in (0, 2)
    assert killed.seconds < 60
    # Ours where the broken connection is seen in a collective, jax's where its service sees it.
    assert re.search("another process is gone|another task died", killed.printed[0])
    assert killed.steps[0] == EVERY


def test_all_save_the_same_step_when_one_is_told_to_stop(place, stopped):
    assert stopped.codes == [0], stopped.printed
    assert "a signal to another process: saved" in stopped.printed[0]
    verify(place / "many/checkpoints/tune/steps" / str(stopped.steps[-1]))
    assert EVERY < stopped.steps[-1] < STEPS


def test_only_process_0_prints(stopped, four):
    assert stopped.printed[0].count("saved; the same command continues") == 1
    assert four.printed[0].count(BAD_SAMPLE) == 1
    for text in four.printed[1:]:
        # From C++; and what only the process that loads it can know.
        known = ("[Gloo]", f"{BROKEN}: image file is truncated")
        assert [line for line in text.splitlines() if not any(k in line for k in known)] == []


def test_resumed_on_one_and_on_four_processes(alone, four):
    assert alone.codes == [0]
    assert "SIGTERM: saved" in alone.printed[0]
    assert four.codes == [0] * 4, four.printed
    assert "multihost: finished" in four.printed[0]


def test_losses_equal_those_of_one_process(place, undisturbed, four):
    assert undisturbed.codes == [0], undisturbed.printed
    one, many = logged(place / "one"), logged(place / "many")
    assert [record["step"] for record in many] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "balance"):
        expected = [record[name] for record in one]
        np.testing.assert_allclose([r[name] for r in many], expected, rtol=1e-4, err_msg=name)
    assert [r["expert_load"] for r in many] == [r["expert_load"] for r in one]


def test_results_equal_those_of_one_process(place, undisturbed, four):
    one, many = (load_final(place / name / "checkpoints/tune/final") for name in ("one", "many"))
    assert one.keys() == many.keys()
    for path, value in one.items():
        np.testing.assert_allclose(many[path], value, rtol=1e-3, atol=1e-4, err_msg=path)
    scores = [json.loads((place / name / "summary.json").read_text()) for name in ("one", "many")]
    assert scores[0]["heldout"] == scores[1]["heldout"]
    found = [score["stages"]["tune"]["samples"] for score in scores]
    assert found == [{"total": 90, "bad": {"unreadable_image": 1}}] * 2


@pytest.mark.parametrize(
    ("mesh", "more", "code", "message"),
    [
        ("{data: 3}", [], 2, "error: mesh.data=3"),
        # What stops process 0 is to the other that process 0 has stopped.
        ("{data: 2}", ["--strict"], 1, "stopped: "),
    ],
)
def test_failures_of_all_are_told_once(place, mesh, more, code, message):
    outcome = finish(start(2, [*arguments(place, "bad", mesh), *more]), place / "bad")
    assert outcome.codes == [code, code]
    told = [text for text in outcome.printed if message in text]
    assert len(told) == 1
    assert "Traceback" not in "".join(outcome.printed)


def test_a_process_that_has_nothing_to_save_ends_when_told():
    """jax would take SIGTERM as a note to itself from the moment that processes are joined."""
    found = ["--coordinator", free_address(), "--processes", "1", "--process", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", JOIN, *found], env=environment(), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "joined\n"
    time.sleep(0.5)  # jax would do so in a thread
    process.terminate()
    try:
        process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("index", ["0", "1"])
def test_processes_do_not_wait_for_ever_for_one_that_never_comes(index):
    """jax would abort, and print a stack."""
    imported = "import distributed\n"
    program = JOIN.replace(imported, f"{imported}distributed.JOIN_SECONDS = 2\n")
    found = ["--coordinator", free_address(), "--processes", "2", "--process", index]
    done = subprocess.run(
        [sys.executable, "-c", program, *found],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    told = done.stderr.splitlines()
    assert len(told) == 1
    assert f"not all processes have come to process 0 ({found[1]}) within 2 s" in told[0]


def test_a_port_in_use_is_said(monkeypatch):
    """jax would crash without a word of its own."""
    monkeypatch.setattr(distributed, "settle_cpu", lambda several: None)
    with socket.create_server(("", 0)) as other:
        address = f"localhost:{other.getsockname()[1]}"
        found = flags(coordinator=address, processes=2, process=0)
        with pytest.raises(DistributedError, match=rf"{address}'.* cannot listen .*in use"):
            distributed.initialize(found)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: Gloo: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_a_fault_of_its_own_is_no_lost_peer(error, lost, monkeypatch):
    assert not lost_peer(error)  # alone
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert lost_peer(error) == lost


def test_an_interrupted_program_leaves_at_once():
    """Threads that compile end in their own time, and Python waits for them."""
    program = (
        "import signal, sys, threading, time; from unimoe_jax import distributed; "
        "threading.Thread(target=time.sleep, args=(600,)).start(); "
        "sys.exit(distributed.guard(lambda: signal.raise_signal(signal.SIGINT)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,  # a busy machine may take half a minute to import jax
    )
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


# -------------------------------------------------------------------------- finding each other


def flags(**given) -> argparse.Namespace:
    empty = {"coordinator": None, "processes": None, "process": None, "cluster": "auto"}
    return argparse.Namespace(**{**empty, **given})


JOBSET = {
    "JOBSET_NAME": "run",
    "REPLICATED_JOB_NAME": "workers",
    "PROCESSES": "4",
    "JOB_COMPLETION_INDEX": "3",
}


SRUN = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "7"}
SRUN |= {"SLURM_NTASKS": "8", "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}


@pytest.mark.parametrize(
    ("given", "env", "found"),
    [
        ({}, {}, None),
        (
            {"coordinator": "a:1", "processes": 2, "process": 0},
            {},
            Processes("flags", "a:1", 2, 0),
        ),
        (
            {"process": 1},
            {"JAX_COORDINATOR_ADDRESS": "b:2", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"},
            Processes("flags", "b:2", 2, 1),
        ),
        ({}, JOBSET, Processes("jobset", "run-workers-0-0.run:8476", 4, 3)),
        ({}, SRUN, Processes("slurm")),
        ({"cluster": "slurm"}, {**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, Processes("slurm")),
        ({}, {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, None),  # a script without srun
        ({}, {"TPU_WORKER_HOSTNAMES": "h0,h1"}, Processes("tpu")),
        ({}, {"TPU_WORKER_HOSTNAMES": "h0"}, None),
        ({"cluster": "tpu"}, {}, Processes("tpu")),
        ({"cluster": "none"}, JOBSET, None),
    ],
)
def test_processes_are_found(given, env, found):
    assert find_processes(flags(**given), env) == found


@pytest.mark.parametrize(
    ("flags_given", "several", "expected"),
    [
        ("", False, None),
        ("--xla_force_host_platform_device_count=1", False, None),
        ("", True, "64"),
        ("--xla_force_host_platform_device_count=8", False, "64"),
        ("--xla_force_host_platform_device_count=16", False, "128"),
    ],
)
def test_cpu_collectives_get_threads_and_an_order(flags_given, several, expected, monkeypatch):
    changed = {}
    monkeypatch.setattr(jax.config, "update", changed.__setitem__)
    monkeypatch.setenv("XLA_FLAGS", flags_given)
    for name in ("NPROC", "JAX_CPU_ENABLE_ASYNC_DISPATCH"):
        monkeypatch.delenv(name, raising=False)
    settle_cpu(several)
    assert os.environ.get("NPROC") == expected
    assert changed == ({} if expected is None else {"jax_cpu_enable_async_dispatch": False})
    scheduler = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
    assert scheduler in os.environ["XLA_FLAGS"]

    monkeypatch.setenv("XLA_FLAGS", f"{flags_given} {scheduler.replace('false', 'true')}")
    monkeypatch.setenv("NPROC", "3")
    settle_cpu(several)  # what the user has set stays
    assert os.environ["NPROC"] == "3"
    assert scheduler not in os.environ["XLA_FLAGS"]


@pytest.mark.parametrize(
    ("given", "env", "message"),
    [
        ({"processes": 2}, {}, r"--coordinator .*--process .*not given"),
        ({"coordinator": "a", "processes": 2, "process": 0}, {}, "not HOST:PORT"),
        ({"coordinator": ":1", "processes": 2, "process": 0}, {}, "not HOST:PORT"),
        ({"coordinator": "a:65536", "processes": 2, "process": 0}, {}, "port from 1 to 65535"),
        ({"coordinator": "a:1", "processes": 2, "process": 2}, {}, "process 2 of 2"),
        ({}, {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES='two'"),
        ({}, {"JOBSET_NAME": "run"}, "REPLICATED_JOB_NAME, PROCESSES"),
        ({"cluster": "SLURM"}, {}, "UNIMOE_CLUSTER='SLURM': allowed: auto, slurm"),
        ({"cluster": "slurm"}, {"SLURM_JOB_ID": "7"}, "SLURM_STEP_NODELIST, .* start with srun"),
        ({}, {**SRUN, "SLURM_STEP_NUM_TASKS": "8(x2)"}, r"SLURM_STEP_NUM_TASKS='8\(x2\)'"),
        ({}, {**SRUN, "SLURM_PROCID": ""}, "SLURM_PROCID=''"),
    ],
)
def test_incomplete_settings_are_named(given, env, message):
    with pytest.raises(DistributedError, match=message):
        find_processes(flags(**given), env)
