"""The summary of a stage."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from unimoe_jax.train.run_folder import RunFolderError

FROM_THE_START = ("first_loss", "last_loss", "heldout_before", "upcycled", "seconds")


@dataclass
class StageSummary:
    """Goes into summary.json."""

    steps: int
    seconds: float = 0.0  # of all sittings, as far as their steps were saved
    first_loss: float | None = None
    last_loss: float | None = None
    tokens_per_s: float | None = None
    heldout: dict[str, float] | None = None
    heldout_before: dict[str, float] | None = None
    chance: dict[str, float] | None = None  # of `heldout`; the sources may be gone when it is told
    samples: dict[str, Any] | None = None  # the mixture's, and those that were bad or cut by reason
    upcycled: float | None = None  # largest difference from the dense model at step 0

    def resume(self, position: dict[str, Any]) -> None:
        """Take over what `position` gave when the steps were saved; nothing at the beginning."""
        for name in FROM_THE_START:
            setattr(self, name, position.get(name))
        self.seconds = self.seconds or 0.0  # checkpoints of earlier versions do not tell

    def position(self, data: dict) -> dict[str, Any]:
        """What a checkpoint keeps beside the state. data: where the pipeline stands."""
        return {"data": data, **{name: getattr(self, name) for name in FROM_THE_START}}


LATER = {"upcycled", "samples", "chance"}  # summaries of earlier versions lack them
SUMMARIZED = {field.name for field in fields(StageSummary)} - LATER


def read_stage_summary(folder: Path, name: str) -> dict | None:
    """What `train_stage` has written of a stage, so that a run finished in several sittings still
    sums up; None if there is nothing.

    Raises:
        RunFolderError: the file is not that.
    """
    path = folder / "checkpoints" / name / "summary.json"
    if not path.exists():
        return None
    try:
        summary = json.loads(path.read_text())
        missing = SUMMARIZED - summary.keys()
        problem = f"lacks {', '.join(sorted(missing))}" if missing else ""
    except (OSError, ValueError, AttributeError) as error:
        problem = f"cannot be read ({error})"
    if problem:
        raise RunFolderError(f"{path}: {problem}; remove it to go on without this summary")
    return summary
