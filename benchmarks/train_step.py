"""Compare training speed and memory with PyTorch eager: same model, same machine, same run.

    python benchmarks/train_step.py [--sizes tiny small] [--rounds 5] [--output FILE]

Samples either have equal lengths and are packed on both sides, which compares the same positions;
or they have varied lengths, and are packed here and put one to a row on PyTorch's side, as the
originals collate them. Only the tokens of samples count, not padding.

Each case runs three processes, which start from the same weights and batch: this library as
`unimoe_jax.train` runs it, PyTorch with default settings, and PyTorch with the allocator settings
that `unimoe_jax.train` makes for itself (see `unimoe_jax/runtime/memory.py`). They take turns (A B
C A B C …) while the others wait, so that a machine that changes its speed changes it for all. The
first step of a turn is not counted, because a virtual machine may have returned free memory to its
host in the meantime. Before the turns, all processes compute the loss and the gradient norm without
dropout, and the numbers must agree. Everything is float32. Compilation is reported, but not
counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import common
import numpy as np
import train_case

from unimoe_jax.runtime.memory import HUGE_PAGES

SIDES = ("jax", "torch", "torch_kept")
TOLERANCE = 1e-4


# -------------------------------------------------------------------------------- the sides


def jax_side(folder: Path, size: str, name: str):
    """Build the train step of this library on one device.

    Returns the numbers of the check, a function that runs a step, and the compile seconds.
    """
    import jax

    from unimoe_jax.config import MeshConfig
    from unimoe_jax.config.stage_settings import resolve_stage
    from unimoe_jax.data.batch import Batch
    from unimoe_jax.parallel.placement import place
    from unimoe_jax.parallel.sharding import make_mesh, use_mesh
    from unimoe_jax.params.table import split
    from unimoe_jax.runtime.cpu import settle_cpu
    from unimoe_jax.runtime.memory import keep_freed_memory
    from unimoe_jax.stages.stage import build_stage
    from unimoe_jax.stages.train_step import init_state, make_train_step

    settle_cpu()
    keep_freed_memory()
    run, stage = train_case.make_stage(size, name)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with use_mesh(mesh):
        built = build_stage(resolve_stage(run, stage), mesh, 10_000)
    with np.load(folder / "params.npz") as arrays:
        params = {path: place(arrays[path], built.shardings[path]) for path in arrays}
    with np.load(folder / "batch.npz") as arrays:
        batch = jax.device_put(Batch(**{name: arrays[name] for name in arrays}))
    trained, frozen = split(params, built.infos)
    state = init_state(trained, built.optimizer, 0)

    def compiled(model, donate: bool):
        step = make_train_step(model, built.optimizer, built.schedule, stage.aux, 1, 1)
        jitted = jax.jit(step, donate_argnums=(0,) if donate else ())
        with use_mesh(mesh):
            return jitted.lower(state, frozen, batch).compile()

    def check():
        _, metrics = compiled(built.scorer, donate=False)(state, frozen, batch)
        return {key: float(metrics[key]) for key in ("loss", "aux", "grad_norm")}

    # The check runs without dropout (`scorer`) and keeps its arguments.
    checked = check()
    started = time.perf_counter()
    fn = compiled(built.model, donate=True)
    seconds = time.perf_counter() - started
    held = [state]  # every step donates its state and leaves the next one here

    def step() -> float:
        held[0], metrics = fn(held[0], frozen, batch)
        jax.block_until_ready(held[0])
        return float(metrics["loss"])

    return checked, step, seconds


def torch_side(folder: Path, attention: str, keep: bool):
    """Build the same step in PyTorch eager.

    Returns the numbers of the check, a function that runs a step, and 0 compile seconds.
    keep: whether to use the allocator settings of `unimoe_jax.train`.
    """
    if keep:  # before PyTorch allocates anything
        from unimoe_jax.runtime.memory import keep_freed_memory

        keep_freed_memory()
    import torch
    from torch_model import Model

    case = json.loads((folder / "case.json").read_text())
    model = Model(case["model"], case["places"], case["lora"], attention)
    with np.load(folder / "params.npz") as arrays:
        model.load(arrays, set(case["trained"]))
    with np.load(folder / "batch.npz") as arrays:
        batch = train_case.one_per_row(dict(arrays)) if case["one_per_row"] else dict(arrays)
    batch = {key: torch.from_numpy(value) for key, value in batch.items()}
    for key in ("token_id_BT", "target_BT", "slot_BT"):
        batch[key] = batch[key].long()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=train_case.LEARNING_RATE, weight_decay=0.0)

    def gradient():
        optimizer.zero_grad(set_to_none=True)
        loss, balance, z = model(batch)
        decoder = case["aux"]["decoder"]
        aux = decoder["balance"] * balance + decoder["router_z"] * z
        (loss + aux).backward()
        # Parameters of absent media have no gradient on this side and zero on the other.
        norm = torch.nn.utils.clip_grad_norm_(trained, train_case.CLIP_NORM)
        return {"loss": loss.item(), "aux": aux.item(), "grad_norm": norm.item()}

    model.eval()
    checked = gradient()
    model.train()

    def step() -> float:
        loss = gradient()["loss"]
        optimizer.step()
        return loss

    return checked, step, 0.0


def worker(args: argparse.Namespace) -> None:
    """Run one side as a child process that answers in lines of JSON on stdout.

    The first answer holds the check. Afterwards the process reads numbers of steps from stdin, runs
    one step more than that, and answers with the seconds of all but the first.
    """
    if args.worker == "jax":
        checked, step, seconds = jax_side(args.folder, args.sizes[0], args.stages[0])
    else:
        checked, step, seconds = torch_side(
            args.folder, args.attention, args.worker == "torch_kept"
        )
    # Reset the peak of the resident size, so that the memory of the check and of compilation does
    # not count from here on.
    Path("/proc/self/clear_refs").write_text("5")
    before = common.resident_mib()
    answer(check=checked, compile_seconds=seconds, resident_mib=before)
    for line in sys.stdin:
        times, cpu, loss = [], [], 0.0
        step()
        for _ in range(int(line)):
            started, used = time.perf_counter(), time.process_time()
            loss = step()
            times.append(time.perf_counter() - started)
            cpu.append(time.process_time() - used)
        answer(
            times=times,
            cpu=cpu,
            loss=loss,
            peak_mib=peak_since_reset(),
            whole_peak_mib=common.peak_mib(),
        )


def peak_since_reset() -> float:
    """Peak of the resident size in MiB since `clear_refs` was written: VmHWM.

    ru_maxrss is not reset by it.
    """
    status = Path("/proc/self/status").read_text()
    return float(next(line for line in status.splitlines() if "VmHWM" in line).split()[1]) / 1024


def answer(**values) -> None:
    """Print a line of JSON for the parent process."""
    print(json.dumps(values), flush=True)


# -------------------------------------------------------------------------------- measuring


class Side:
    """A child process of one side; `steps(n)` runs n counted steps there and returns its answer."""

    def __init__(self, side: str, folder: Path, size: str, stage: str, attention: str):
        command = [sys.executable, __file__, "--worker", side, "--folder", str(folder)]
        command += ["--sizes", size, "--stages", stage, "--attention", attention]
        # These variables must be set before a process starts. `unimoe_jax.train` sets them for
        # itself.
        huge = {} if side == "torch" else HUGE_PAGES
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, env=os.environ | huge, **pipes)
        self.first = self.read()

    def read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"one side ended with code {self.process.wait()}; see its error message above"
            )
        return json.loads(line)

    def steps(self, number: int) -> dict:
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        return self.read()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def measure(size: str, stage: str, signature: str, samples: str, args: argparse.Namespace) -> dict:
    """Measure one case: prepare its files, check that the sides agree, warm up, and take turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Another process prepares the files, so its memory is free again before the measurement.
        subprocess.run(
            [sys.executable, __file__, "--prepare", "--folder", name, "--sizes", size]
            + ["--stages", stage, "--signatures", signature, "--samples", samples],
            check=True,
        )
        case = json.loads((folder / "case.json").read_text())
        sides = {side: Side(side, folder, size, stage, args.attention) for side in SIDES}
        try:
            checks = {side: sides[side].first["check"] for side in SIDES}
            agree(checks)
            for side in SIDES:
                sides[side].steps(1)
            turns: dict[str, list[dict]] = {side: [] for side in SIDES}
            for _ in range(args.rounds):
                for side in SIDES:
                    turns[side].append(sides[side].steps(args.steps))
        finally:
            for side in sides.values():
                side.close()
    result = {"size": size, "stage": stage, "signature": signature, "lengths": samples}
    result |= {key: case[key] for key in ("parameters", "samples", "tokens", "longest")}
    result |= {"attention": args.attention, "check": checks}
    for side in SIDES:
        result[side] = summary(turns[side], sides[side].first, case["tokens"])
    for side in SIDES[1:]:
        result[f"to_{side}"] = ratios(turns["jax"], turns[side])
    return result


def summary(turns: list[dict], first: dict, tokens: int) -> dict:
    """The medians over all steps of one side, and its memory."""
    seconds = statistics.median(time for turn in turns for time in turn["times"])
    return {
        "seconds": round(seconds, 4),
        "cpu_seconds": round(statistics.median(t for turn in turns for t in turn["cpu"]), 4),
        "tokens_per_s": round(tokens / seconds, 1),
        "peak_mib": round(turns[-1]["peak_mib"]),
        "peak_mib_with_check_and_compile": round(turns[-1]["whole_peak_mib"]),
        "resident_mib_before": round(first["resident_mib"]),
        "compile_seconds": round(first["compile_seconds"], 1),
    }


def ratios(ours: list[dict], theirs: list[dict]) -> dict:
    """How many times faster this library is than another side.

    The result has the median and the range over the turns, and the median by processor time, which
    depends less on other programs on the machine.
    """

    def ratio_per_turn(key: str) -> list[float]:
        return [
            statistics.median(b[key]) / statistics.median(a[key])
            for a, b in zip(ours, theirs, strict=True)
        ]

    speed = ratio_per_turn("times")
    return {
        "speed_ratio": round(statistics.median(speed), 3),
        "speed_ratio_range": [round(min(speed), 3), round(max(speed), 3)],
        "cpu_ratio": round(statistics.median(ratio_per_turn("cpu")), 3),
    }


def agree(checks: dict[str, dict[str, float]]) -> None:
    """Raise an error unless all sides have computed the same numbers."""
    for side, key in itertools.product(SIDES[1:], checks["jax"]):
        value, other = checks["jax"][key], checks[side][key]
        if abs(value - other) > TOLERANCE * max(1.0, abs(value)):
            raise RuntimeError(
                f"{key} is {value} for jax and {other} for {side}; the sides run different models"
            )


def parse() -> argparse.Namespace:
    """Read the command line; hidden options are for the child processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", default=["tiny", "small"], choices=common.RUN_FILES)
    parser.add_argument("--stages", nargs="+", default=["tune", "full"], choices=["tune", "full"])
    parser.add_argument(
        "--signatures", nargs="+", default=["text", "image"], choices=["text", "image"]
    )
    parser.add_argument(
        "--samples",
        nargs="+",
        default=list(train_case.SAMPLES),
        choices=train_case.SAMPLES,
        help="equal: packed on both sides; varied: one per row in PyTorch, as in the originals",
    )
    parser.add_argument(
        "--attention",
        default="eager",
        choices=["eager", "sdpa"],
        help="attention of PyTorch: eager as in the original, or its fused kernel (sdpa)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn")
    parser.add_argument(
        "--output", type=Path, default=common.ROOT / "benchmarks/results/train_step.json"
    )
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every case, print a line for it, and save the result after each of them."""
    args = parse()
    if args.worker:
        return worker(args)
    if args.prepare:
        return train_case.prepare(
            args.folder, args.sizes[0], args.stages[0], args.signatures[0], args.samples[0]
        )
    result = {"machine": common.machine(), "rounds": args.rounds, "steps": args.steps, "cases": []}
    cases = (args.sizes, args.stages, args.signatures, args.samples)
    for size, stage, signature, samples in itertools.product(*cases):
        case = measure(size, stage, signature, samples, args)
        speeds = " ".join(
            f"{side} {case[side]['tokens_per_s']:,.0f} tokens/s {case[side]['peak_mib']:,} MiB;"
            for side in SIDES
        )
        faster = ", ".join(
            f"{case[f'to_{side}']['speed_ratio']:.2f} times {side}" for side in SIDES[1:]
        )
        print(f"{size:<6}{stage:<5}{signature:<6}{samples:<7}{speeds} {faster}", flush=True)
        result["cases"].append(case)
        result["load_average_after"] = common.machine()["load_average"]
        common.save(args.output, result)
    return None


if __name__ == "__main__":
    main()
