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
    """Shows how far a stage is: one line that changes on a terminal, else a new line now and then.

    With `enabled=False`, as on all processes but process 0, nothing is printed. The remaining time
    is estimated without the time before the first update, because compilation happens then.

    Args:
        every_seconds, every_steps: without a terminal, a line is printed when either of them has
            passed since the line before; None: only seconds count.
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
        self._printed: tuple[float, int] | None = None  # time and step of the last printed line
        self._waiting: tuple[str, float] | None = None  # text and start of an announced wait
        self._live: Live | None = None
        if enabled and self._console.is_terminal:
            self._live = Live(
                get_renderable=self._render, console=self._console, refresh_per_second=4
            )
            self._live.start()

    def announce(self, text: str) -> None:
        """Say what takes long now, e.g. compilation. The next call prints how long it took."""
        if not self.enabled:
            return
        self._end_announcement()
        self._waiting = (text, time.monotonic())
        if self._live is None:
            self._print(f"{self.stage}: {text}")

    def update(self, step: int, values: Mapping[str, Any]) -> None:
        """Show `step` of `total` and those of `values` that `format_progress` knows."""
        if not self.enabled:
            return
        self._end_announcement()
        now = time.monotonic()
        self._first = self._first or (now, step)
        eta = self._eta(self._first, now, step)
        self._line = format_progress(self.stage, step, self.total, values, eta)
        if self._live is None and self._is_due(now, step):
            self._printed = (now, step)
            self._print(self._line)

    def close(self) -> None:
        """Stop and leave the last line on the screen. Safe to call twice."""
        self._end_announcement()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _render(self) -> Text:
        """The line on a terminal; rich calls this several times per second."""
        line = self._line
        if self._waiting:
            text, start = self._waiting
            line = f"{self.stage}: {text} {time.monotonic() - start:.0f} s"
        return Text(line, no_wrap=True, overflow="ellipsis")

    def _end_announcement(self) -> None:
        """Print how long the announced work took, if there was any."""
        if self._waiting:
            text, start = self._waiting
            self._waiting = None
            self._print(f"{self.stage}: {text} done in {time.monotonic() - start:.1f} s")

    def _is_due(self, now: float, step: int) -> bool:
        """Whether to print a line: the first, the last, or when enough time or steps passed."""
        if self._printed is None or step >= self.total:
            return True
        seconds, steps = now - self._printed[0], step - self._printed[1]
        return seconds >= self.every_seconds or steps >= (self.every_steps or math.inf)

    def _eta(self, first: tuple[float, int], now: float, step: int) -> float | None:
        """Remaining seconds at the mean speed since `first`, a time and step; None at that step."""
        started, first_step = first
        if step <= first_step:
            return None
        return (now - started) / (step - first_step) * (self.total - step)

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, soft_wrap=True)


def format_progress(
    stage: str, step: int, total: int, values: Mapping[str, Any], eta: float | None
) -> str:
    """The progress line: stage, step, losses, learning rate, speed, waiting for data, time left.

    Metrics that `values` lacks are left out. eta: remaining seconds, or None.
    """
    formats = {
        "loss": "loss {:.4f}",
        **_router_formats(),
        "lr": "lr {:.2e}",
        "tokens_per_s": "{:,.0f} tok/s",
        "data_wait_share": "data wait {:.0%}",
    }
    # Show dropped slots as a share, because lines cover different numbers of steps.
    shown = dict(values)
    for module in MODULES:
        _, share = dropped_share([{"step": step, **values}], module)
        if len(share):
            shown[metric_name(module, "dropped")] = share.sum()

    cells = [f"{stage} {step:>{len(str(total))}}/{total}"]
    for name, text in formats.items():
        if shown.get(name) is not None:
            cells.append(text.format(float(shown[name])))
    if eta is not None:
        cells.append(f"left {format_seconds(eta)}")
    return "  ".join(cells)


def _router_formats() -> dict[str, str]:
    """{metric: format} of the routers' metrics of all modules.

    The balance loss comes first and names its module, unless that is the decoder. Its other metrics
    follow without the name.
    """
    kinds = {"balance": "balance {:.3g}", "router_z": "z {:.3g}", "dropped": "dropped {:.1%}"}
    formats = {}
    for module in MODULES:
        for kind, text in kinds.items():
            has_name = kind == "balance" and module != "decoder"
            formats[metric_name(module, kind)] = f"{module} {text}" if has_name else text
    return formats


def format_seconds(seconds: float) -> str:
    """A duration as text, for example `4.2 s`, `3 m 20 s` or `2 h 05 m`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes} m {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} m"
    )
