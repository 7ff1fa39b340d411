"""What a run leaves behind while it trains: metrics.jsonl, TensorBoard, progress line, env.json.

`metrics.jsonl` has one JSON object per logged step. Numbers JSON cannot hold are the strings "nan",
"inf" and "-inf", which `float()` reads back.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from unimoe_jax.config import MODULES
from unimoe_jax.disk import named
from unimoe_jax.metric_series import dropped_share, metric_name

METRICS_FILE = "metrics.jsonl"
PACKAGES = (
    *("unimoe-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy"),
    *("transformers", "tokenizers", "safetensors", "pydantic", "PyYAML", "rich", "matplotlib"),
    *("tensorboardX", "pillow", "ml_dtypes", "torch", "libtpu"),
)
XLA_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_PLATFORMS", "JAX_DEFAULT_MATMUL_PRECISION")


# ------------------------------------------------------------------------------------- JSON


def jsonable(value: Any) -> Any:
    """`value` with arrays as lists, NaN and infinities as strings. TypeError for anything odd."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): jsonable(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(child) for child in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if hasattr(value, "__array__"):  # numpy and jax arrays and scalars, bfloat16 too
        array = np.asarray(value)
        return jsonable(
            array.tolist() if array.dtype.kind in "biuf" else array.astype(float).tolist()
        )
    raise TypeError(f"{type(value).__name__} cannot be logged: {value!r}")


def write_json_atomic(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as JSON to `path`; readers see the old file or the new one, never half."""
    write_text_atomic(Path(path), json.dumps(jsonable(value), indent=2, allow_nan=False) + "\n")


def write_text_atomic(path: Path, text: str) -> None:
    """Writes `text` as UTF-8 beside `path`, syncs it to disk and renames it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with named(path), temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """All records of `run_dir`/metrics.jsonl, without a last line that a crash cut short.

    Raises FileNotFoundError without the file, ValueError where an earlier line is no record.
    """
    path = Path(run_dir) / METRICS_FILE
    return list(_records(path, path.read_bytes()))


def _records(path: Path, content: bytes) -> Iterator[dict]:
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number} is not JSON ({error}); delete that line or move the file"
            ) from error
        if not isinstance(record, dict) or not {"stage", "step"} <= record.keys():
            raise ValueError(
                f"{path}: line {number} is no JSON object with `stage` and `step`; delete that line"
            )
        yield record


# ----------------------------------------------------------------------------------- writing


class MetricsWriter:
    """Appends the records of one stage to metrics.jsonl and, if wanted, to `tb/STAGE`.

    Resuming after `resumed_step` removes this stage's later records, so that no step occurs twice.
    With `enabled=False` (hosts other than 0) nothing is touched.
    Raises ModuleNotFoundError if TensorBoard is wanted and tensorboardX is not installed.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike,
        stage: str,
        total: int,
        *,
        resumed_step: int = 0,
        tensorboard: bool = False,
        enabled: bool = True,
    ):
        self.stage, self.total, self.enabled = stage, total, enabled
        self._file = self._board = None
        if not enabled:
            return
        run_dir = Path(run_dir)
        if tensorboard:
            self._board = _summary_writer(run_dir / "tb" / stage, resumed_step)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        _truncate(path, stage, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Logs `values` (numbers, text, arrays, nested mappings) for `step`, and flushes."""
        if not self.enabled:
            return
        head = {"time": time.time(), "stage": self.stage, "step": int(step), "total": self.total}
        clash = sorted(head.keys() & values.keys())
        if clash:
            raise ValueError(f"metrics may not be called {clash}: every record has these already")
        record = head | jsonable(values)
        with named(self._file.name):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for tag, number in _scalars(record):
                self._board.add_scalar(tag, number, record["step"])
            self._board.flush()

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            with named(self._file.name):  # what could not be written is tried again
                self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _truncate(path: Path, stage: str, resumed_step: int) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    kept = [
        json.dumps(record, allow_nan=False) + "\n"
        for record in _records(path, content)
        if record.get("stage") != stage or record["step"] <= resumed_step
    ]
    if "".join(kept).encode() != content:
        write_text_atomic(path, "".join(kept))


def _summary_writer(folder: Path, resumed_step: int):
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "log.tensorboard is on, but tensorboardX is not installed; "
            "`pip install tensorboardX` or set log.tensorboard=false"
        ) from error
    # TensorBoard then hides what an earlier attempt wrote for the steps to come.
    return SummaryWriter(os.fspath(folder), purge_step=resumed_step + 1)


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, number) of all scalars and short lists; bigger arrays stay in metrics.jsonl."""
    for name, value in record.items():
        if name in ("time", "stage", "step", "total", "signature"):
            continue
        if isinstance(value, Mapping):
            yield from ((f"{name}/{tag}", number) for tag, number in _scalars(value))
        elif isinstance(value, list):
            if not any(isinstance(item, list | Mapping) for item in value):
                yield from _scalars({f"{name}/{i:02d}": item for i, item in enumerate(value)})
        elif isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
            yield name, float(value)


# ---------------------------------------------------------------------------------- progress


class Progress:
    """One line that says how a stage is going: live on a terminal, else a line now and then.

    `enabled=False` (hosts other than 0) prints nothing. Speed and ETA ignore the time before the
    first update, which is compilation.
    """

    def __init__(
        self,
        stage: str,
        total: int,
        *,
        enabled: bool = True,
        every_seconds: float = 10.0,
        every_steps: int | None = None,
        console: Console | None = None,
    ):
        self.stage, self.total, self.enabled = stage, total, enabled
        self.every_seconds, self.every_steps = every_seconds, every_steps
        self._console = console or Console(highlight=False, soft_wrap=True)
        self._line = f"{stage} 0/{total}"
        self._first: tuple[float, int] | None = None  # time and step of the first update
        self._printed: tuple[float, int] | None = None
        self._waiting: tuple[str, float] | None = None
        self._live: Live | None = None
        if enabled and self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )
            self._live.start()

    def announce(self, text: str) -> None:
        """Says what is about to take long, e.g. compilation; the next update says how long."""
        if not self.enabled:
            return
        self._settle()
        self._waiting = (text, time.monotonic())
        if self._live is None:
            self._print(f"{self.stage}: {text}")

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Shows `step` of `total` and the well-known names in `values` that are present."""
        if not self.enabled:
            return
        self._settle()
        now = time.monotonic()
        self._first = self._first or (now, step)
        self._line = format_progress(self.stage, step, self.total, values, self._eta(now, step))
        if self._live is None and self._is_due(now, step):
            self._printed = (now, step)
            self._print(self._line)

    def close(self) -> None:
        """Leaves the last line on the screen. Safe to call twice."""
        self._settle()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _render(self) -> Text:
        line = self._line
        if self._waiting:
            text, start = self._waiting
            line = f"{self.stage}: {text} {time.monotonic() - start:.0f} s"
        return Text(line, no_wrap=True, overflow="ellipsis")

    def _settle(self) -> None:
        """Ends an announcement."""
        if self._waiting:
            text, start = self._waiting
            self._waiting = None
            self._print(f"{self.stage}: {text} done in {time.monotonic() - start:.1f} s")

    def _is_due(self, now: float, step: int) -> bool:
        if self._printed is None or step >= self.total:
            return True
        seconds, steps = now - self._printed[0], step - self._printed[1]
        return seconds >= self.every_seconds or steps >= (self.every_steps or math.inf)

    def _eta(self, now: float, step: int) -> float | None:
        started, first_step = self._first
        if step <= first_step:
            return None
        return (now - started) / (step - first_step) * (self.total - step)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def format_progress(
    stage: str, step: int, total: int, values: Mapping[str, Any], eta: float | None
) -> str:
    """The progress line: stage, step, loss, aux losses, lr, tokens/s, data wait, time left."""
    parts = [f"{stage} {step:>{len(str(total))}}/{total}"]
    shapes = {
        "loss": "loss {:.4f}",
        **_router_shapes(),
        "lr": "lr {:.2e}",
        "tokens_per_s": "{:,.0f} tok/s",
        "data_wait_share": "data wait {:.0%}",
    }
    shares = {m: dropped_share([{"step": step, **values}], m)[1] for m in MODULES}
    values = {**values, **{metric_name(m, "dropped"): s.sum() for m, s in shares.items() if len(s)}}
    for name, shape in shapes.items():
        if values.get(name) is not None:
            parts.append(shape.format(float(values[name])))
    if eta is not None:
        parts.append(f"left {format_seconds(eta)}")
    return "  ".join(parts)


def _router_shapes() -> dict[str, str]:
    kinds = {"balance": "balance {:.3g}", "router_z": "z {:.3g}", "dropped": "dropped {:.1%}"}
    shapes = {}
    for module in MODULES:
        for kind, shape in kinds.items():
            named = kind == "balance" and module != "decoder"
            shapes[metric_name(module, kind)] = f"{module} {shape}" if named else shape
    return shapes


def format_seconds(seconds: float) -> str:
    """`4.2 s`, `3 m 20 s`, `2 h 05 m`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} m {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"
    )


# ------------------------------------------------------------------------------- environment


def env_info() -> dict[str, Any]:
    """For env.json: versions, platform, devices, git commit, command line, XLA settings."""
    import jax  # here, so that a report can be written without it

    devices = jax.devices()
    kinds = {d.device_kind: 0 for d in devices}
    for device in devices:
        kinds[device.device_kind] += 1
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": kinds,
        "processes": jax.process_count(),
        "git_commit": git_commit(Path(__file__).parent),
        "command": [sys.executable, *sys.orig_argv[1:]],
        "settings": {name: os.environ[name] for name in XLA_SETTINGS if name in os.environ},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_commit(folder: Path) -> str | None:
    """The commit of the checkout that tracks `folder`, with `+changes`; None outside of one.

    A package installed somewhere below an unrelated checkout is not tracked by it: None.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", os.fspath(folder), *arguments],
                capture_output=True,
                text=True,
                timeout=20,
            )
        except (OSError, subprocess.TimeoutExpired):  # no git on this machine
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if git("ls-files", ".") else None
    if commit and git("status", "--porcelain", "--untracked-files=no", "."):
        commit += "+changes"
    return commit
