"""The progress line of a stage."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

from unimoe_jax.config import MODULES
from unimoe_jax.metrics.series import dropped_share, metric_name


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
