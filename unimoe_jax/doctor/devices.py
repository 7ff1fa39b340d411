"""The backend and the devices that jax finds."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from unimoe_jax.doctor.checks import Check, format_bytes
from unimoe_jax.doctor.packages import PLUGINS
from unimoe_jax.doctor.probing import Outcome

DEVICES = "devices"
_UNUSED_HARDWARE = re.compile(r"(NVIDIA GPU|Google TPU) may be present")
"""How jax warns about a device for which it has no plugin."""


def check_devices(outcome: Outcome, plugins: Sequence[str]) -> list[Check]:
    """The backend, its devices, and what hides others. `plugins` are the installed packages."""
    result: dict[str, Any] = {"error": f"jax {outcome.end}"}
    if outcome.results:
        result = outcome.results[0]
    if "error" in result:
        return [Check(DEVICES, "backend", "failure", result["error"], _remedy_of_error(outcome))]
    backend = result["backend"]
    counts = Counter((device["kind"], device["memory"]) for device in result["devices"])
    shown = ", ".join(
        f"{count} × {kind}" + (f" with {format_bytes(memory)}" if memory else "")
        for (kind, memory), count in counts.items()
    )
    checks = [Check(DEVICES, "backend", "ok", backend), Check(DEVICES, "devices", "ok", shown)]
    if backend == "cpu":
        checks += [_check_idle_plugin(plugin) for plugin in plugins]
        if match := _UNUSED_HARDWARE.search(outcome.log):
            checks.append(_check_unused_hardware(match[1]))
    return checks


def _remedy_of_error(outcome: Outcome) -> str:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return f"JAX_PLATFORMS={platforms} is set: unset it, and jax chooses a backend that works"
    if "did not finish" in outcome.end:
        return (
            "another process may be using the devices: end it; on several TPU hosts jax waits for "
            "all of them, so run this on all at once, or with JAX_PLATFORMS=cpu"
        )
    return "repair the driver or the plugin of the device, or set JAX_PLATFORMS=cpu to go without"


def _check_idle_plugin(plugin: str) -> Check:
    """A plugin is installed, but jax runs on the CPU."""
    kind = "TPU" if plugin in PLUGINS["tpu"] else "GPU"
    value = f"{plugin} is installed, but jax has found no {kind}"
    if platforms := os.environ.get("JAX_PLATFORMS"):
        remedy = f"JAX_PLATFORMS={platforms} keeps jax from looking for one: unset it"
    elif kind == "GPU":
        remedy = (
            "run `nvidia-smi` (`rocm-smi`): if it shows no GPU, install the driver, and start a "
            "container with `--gpus all`; no GPU is needed to `compile` for one"
        )
    else:
        remedy = (
            "check that this is a TPU VM and that no other process holds the TPU (`sudo lsof "
            "/dev/accel* /dev/vfio/*`); no TPU is needed to `compile` for one"
        )
    return Check(DEVICES, f"{kind} plugin", "warning", value, remedy)


def _check_unused_hardware(hardware: str) -> Check:
    """jax has noticed a device for which no plugin is installed."""
    extra = "tpu" if "TPU" in hardware else "gpu"
    value = "seems to be present, but jax has no plugin for it"
    return Check(DEVICES, hardware, "warning", value, f"pip install 'unimoe_jax[{extra}]'")
