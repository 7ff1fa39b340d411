"""Several real processes on this machine, joined by gloo.

One run is killed and stopped, and it continues with two, one and four processes. It must equal a
run of one process that is never interrupted.
"""

from __future__ import annotations

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
from unimoe_jax.parallel.distributed import lost_peer

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 120, 20
BAD_SAMPLE = "`conversations` is missing or empty (bad: malformed_record)"
BROKEN = "picture33.png"
JOIN = """
import argparse, time
from unimoe_jax.parallel import distributed
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
    """A folder with data, a tokenizer and the run file that uses them."""
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
    # One image file is cut short; every process that loads it reports a bad sample.
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
    """The end of the processes of one launch.

    codes: exit codes. printed: standard output and errors. seconds: time since `interfere` of
    `finish`. steps: saved checkpoints.
    """

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
    """Environment of the programs that the tests start."""
    changes = {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "PYTHON": sys.executable,
        # Most of the time is compilation, so XLA optimises little.
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    return {**os.environ, **changes}


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(count: int, command: list[str]) -> list[subprocess.Popen]:
    """Start `count` processes of the training program that find each other by flags."""
    address = free_address()
    flags_of_processes = [
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
        for flags in flags_of_processes
    ]


def logged(folder: Path) -> list[dict]:
    """The records of metrics.jsonl, without a last line that is still being written."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def saved(folder: Path) -> list[int]:
    """The steps of which a checkpoint is saved."""
    steps = folder / "checkpoints/tune/steps"
    return sorted(int(path.name) for path in steps.glob("*") if path.name.isdigit())


def finish(
    processes: list[subprocess.Popen],
    folder: Path,
    until: int | None = None,
    interfere: Callable[[], None] = lambda: None,
) -> Outcome:
    """Wait for the end of the processes; call `interfere` once step `until` has been logged."""
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
def uninterrupted(place) -> Outcome:
    """A run of one process from beginning to end."""
    return finish(start(1, arguments(place, "one", "{data: 1}")), place / "one")


@pytest.fixture(scope="module")
def killed(place) -> Outcome:
    """Two processes with parameters sharded between them; the second one is killed."""
    processes = start(2, arguments(place, "many", "{data: 1, fsdp: 2}"))
    return finish(processes, place / "many", EVERY + 5, processes[1].kill)


@pytest.fixture(scope="module")
def stopped(place, killed) -> Outcome:
    """The run continues, started by launch/local.sh; one of the two processes gets SIGTERM."""
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
        # A third child may be the command with which the script waits.
        os.kill(int(children[1]), signal.SIGTERM)

    folder = place / "many"
    return finish([launcher], folder, logged(folder)[-1]["step"] + 5, stop_the_second)


@pytest.fixture(scope="module")
def alone(place, stopped) -> Outcome:
    """The run continues on one process, which gets SIGTERM."""
    processes = start(1, arguments(place, "many", "{data: 1}"))
    until = stopped.steps[-1] + 5
    return finish(processes, place / "many", until, processes[0].terminate)


@pytest.fixture(scope="module")
def four(place, alone) -> Outcome:
    """The run continues on four processes with parameters sharded between them, to the end."""
    processes = start(4, arguments(place, "many", "{data: 1, fsdp: 4}"))
    return finish(processes, place / "many")


# --------------------------------------------------------------------------- tests of that run


def test_the_others_stop_when_one_is_killed(killed):
    assert killed.codes[1] == -signal.SIGKILL
    assert killed.codes[0] not in (0, 2)
    assert killed.seconds < 60
    # The first message is ours, if a collective notices the broken connection. The second one is
    # jax's, if its coordination service notices it first.
    assert re.search("another process is gone|another task died", killed.printed[0])
    assert killed.steps[0] == EVERY


def test_all_save_the_same_step_when_one_gets_sigterm(place, stopped):
    assert stopped.codes == [0], stopped.printed
    assert "a signal to another process: saved" in stopped.printed[0]
    verify(place / "many/checkpoints/tune/steps" / str(stopped.steps[-1]))
    assert EVERY < stopped.steps[-1] < STEPS


def test_only_process_0_prints(stopped, four):
    assert stopped.printed[0].count("saved; the same command continues") == 1
    assert four.printed[0].count(BAD_SAMPLE) == 1
    for text in four.printed[1:]:
        # Gloo prints from C++, and only the process that loads a broken file can report it.
        known = ("[Gloo]", f"{BROKEN}: image file is truncated")
        assert [line for line in text.splitlines() if not any(k in line for k in known)] == []


def test_resumed_on_one_and_on_four_processes(alone, four):
    assert alone.codes == [0]
    assert "SIGTERM: saved" in alone.printed[0]
    assert four.codes == [0] * 4, four.printed
    assert "multihost: finished" in four.printed[0]


def test_losses_equal_those_of_one_process(place, uninterrupted, four):
    assert uninterrupted.codes == [0], uninterrupted.printed
    one, many = logged(place / "one"), logged(place / "many")
    assert [record["step"] for record in many] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "balance"):
        expected = [record[name] for record in one]
        np.testing.assert_allclose([r[name] for r in many], expected, rtol=1e-4, err_msg=name)
    assert [r["expert_load"] for r in many] == [r["expert_load"] for r in one]


def test_results_equal_those_of_one_process(place, uninterrupted, four):
    one, many = (load_final(place / name / "checkpoints/tune/final") for name in ("one", "many"))
    assert one.keys() == many.keys()
    for path, value in one.items():
        np.testing.assert_allclose(many[path], value, rtol=1e-3, atol=1e-4, err_msg=path)
    scores = [json.loads((place / name / "summary.json").read_text()) for name in ("one", "many")]
    assert scores[0]["heldout"] == scores[1]["heldout"]
    samples = [score["stages"]["tune"]["samples"] for score in scores]
    assert samples == [{"total": 90, "bad": {"unreadable_image": 1}}] * 2


@pytest.mark.parametrize(
    ("mesh", "more", "code", "message"),
    [
        ("{data: 3}", [], 2, "error: mesh.data=3"),
        # Process 0 prints the reason; the other process fails only because process 0 has stopped.
        ("{data: 2}", ["--strict"], 1, "stopped: "),
    ],
)
def test_a_failure_of_all_processes_is_printed_once(place, mesh, more, code, message):
    outcome = finish(start(2, [*arguments(place, "bad", mesh), *more]), place / "bad")
    assert outcome.codes == [code, code]
    reports = [text for text in outcome.printed if message in text]
    assert len(reports) == 1
    assert "Traceback" not in "".join(outcome.printed)


def test_a_process_that_has_nothing_to_save_ends_at_sigterm():
    """With jax's preemption service, SIGTERM would only be noted once the processes are joined."""
    command_flags = ["--coordinator", free_address(), "--processes", "1", "--process", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", JOIN, *command_flags],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "joined\n"
    time.sleep(0.5)  # jax would install its handler in a thread
    process.terminate()
    try:
        process.communicate(timeout=15)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM


@pytest.mark.parametrize("index", ["0", "1"])
def test_processes_do_not_wait_for_ever_for_one_that_never_comes(index):
    """jax would abort and print a stack trace."""
    import_line = "import distributed\n"
    program = JOIN.replace(import_line, f"{import_line}distributed.JOIN_SECONDS = 2\n")
    command_flags = ["--coordinator", free_address(), "--processes", "2", "--process", index]
    done = subprocess.run(
        [sys.executable, "-c", program, *command_flags],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    address = command_flags[1]
    assert f"not all processes have joined process 0 ({address}) within 2 s" in lines[0]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (jax.errors.JaxRuntimeError("INTERNAL: Gloo: Connection closed by peer"), True),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), False),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection reset by peer"), True),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_only_errors_of_connections_are_lost_peers(error, lost, monkeypatch):
    assert not lost_peer(error)  # a single process has no peers
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert lost_peer(error) == lost


def test_an_interrupted_program_leaves_at_once():
    """Python would wait for all threads at exit, also for threads that compile."""
    program = (
        "import signal, sys, threading, time; from unimoe_jax.parallel import distributed; "
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
