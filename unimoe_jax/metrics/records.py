"""The records of a run: metrics.jsonl and TensorBoard.

`metrics.jsonl` has one JSON object per logged step. JSON has no form for NaN and infinities, so
they are the strings "nan", "inf" and "-inf", which `float()` reads back.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unimoe_jax.runtime.files import jsonable, with_filename, write_text_atomic

METRICS_FILE = "metrics.jsonl"
BOARD_FOLDER = "tb"


# ----------------------------------------------------------------------------------- reading


def read_metrics(run_dir: str | os.PathLike) -> list[dict]:
    """All records of `run_dir`/metrics.jsonl. A last line that a crash cut short is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another line is not a record; the message names the line.
    """
    path = Path(run_dir) / METRICS_FILE
    return list(_records(path, path.read_bytes()))


def _records(path: Path, content: bytes) -> Iterator[dict]:
    """The records of a metrics.jsonl with this content; `path` is for messages.

    Raises:
        ValueError: a line is not a record.
    """
    # A record ends with a newline, so the text after the last newline is not a whole record.
    lines = content.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
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
    """Appends the records of one stage to metrics.jsonl and, with TensorBoard, to `tb/STAGE`.

    Records of this stage after `resumed_step` are removed, so that no step occurs twice. With
    `enabled=False`, as on all processes but process 0, nothing is read or written.

    Raises:
        ModuleNotFoundError: `tensorboard` is set and tensorboardX is not installed.
        ValueError: metrics.jsonl has a line that is not a record.
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
            self._board = _summary_writer(run_dir / BOARD_FOLDER / stage, resumed_step)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / METRICS_FILE
        _truncate(path, stage, resumed_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write `values` (numbers, text, arrays, nested mappings) as the record of `step`.

        Raises:
            ValueError: a value has the name of a field that every record has.
            TypeError: a value has no form in JSON.
            OSError: the file cannot be written; the error names it.
        """
        if self._file is None:
            return
        head = {"time": time.time(), "stage": self.stage, "step": int(step), "total": self.total}
        clash = sorted(head.keys() & values.keys())
        if clash:
            raise ValueError(f"metrics may not be called {clash}: every record has these fields")
        record = head | jsonable(values)
        with with_filename(self._file.name):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        if self._board is not None:
            for tag, number in _scalars(record):
                self._board.add_scalar(tag, number, record["step"])
            self._board.flush()

    def close(self) -> None:
        """Close the files. Safe to call twice."""
        if self._board is not None:
            self._board.close()
        if self._file is not None:
            # Closing tries once more to write text that could not be written, so it may fail.
            with with_filename(self._file.name):
                self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _truncate(path: Path, stage: str, resumed_step: int) -> None:
    """Remove the stage's records after `resumed_step`, and a last line that is cut short."""
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
    """TensorBoard's writer for `folder`, which continues after `resumed_step`."""
    try:
        from tensorboardX import SummaryWriter
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "log.tensorboard is on, but tensorboardX is not installed; "
            "`pip install tensorboardX` or set log.tensorboard=false"
        ) from error
    # With purge_step, TensorBoard hides what an earlier attempt wrote for later steps.
    return SummaryWriter(os.fspath(folder), purge_step=resumed_step + 1)


def _scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, number) of all scalars and of the items of plain lists, for TensorBoard.

    {"loss": 1.0, "router_entropy": [0.2, 0.5]} gives loss, router_entropy/00 and router_entropy/01.
    Arrays with more than one axis are only in metrics.jsonl.
    """
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
