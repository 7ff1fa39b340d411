"""The summary of a stage: a file beside its result, and the part of it that checkpoints keep."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any

from unimoe_jax.checkpoints.layout import StageLayout
from unimoe_jax.train.run_folder import RunFolderError

KEPT_IN_CHECKPOINTS = ("first_loss", "last_loss", "heldout_before", "upcycled", "seconds")
"""Fields that a resumed stage could not find out again."""


@dataclass
class StageSummary:
    """What a stage reports about itself, in checkpoints/STAGE/summary.json.

    seconds: time of all runs of the stage; of a run that was killed, up to its last checkpoint.
    heldout_before, heldout: exact match per held-out source, at the start and at the end.
    chance: chance level per held-out source, kept because the sources may be gone when a report is
        made.
    samples: how many samples the mixture has, and how many were bad or cut, by reason.
    upcycled: largest difference from the dense model at step 0, if experts were upcycled.
    """

    steps: int
    seconds: float = 0.0
    first_loss: float | None = None
    last_loss: float | None = None
    tokens_per_s: float | None = None
    heldout: dict[str, float] | None = None
    heldout_before: dict[str, float] | None = None
    chance: dict[str, float] | None = None
    samples: dict[str, Any] | None = None
    upcycled: float | None = None

    def restore_fields(self, position: dict[str, Any]) -> None:
        """Take over the fields that a checkpoint kept; an empty `position` resets them."""
        for name in KEPT_IN_CHECKPOINTS:
            setattr(self, name, position.get(name))
        self.seconds = self.seconds or 0.0

    def checkpoint_fields(self, data: dict) -> dict[str, Any]:
        """What a checkpoint keeps beside the state. data: the position of the pipeline."""
        return {"data": data, **{name: getattr(self, name) for name in KEPT_IN_CHECKPOINTS}}


FIELDS = {field.name for field in fields(StageSummary)}


def read_stage_summary(layout: StageLayout) -> dict | None:
    """The summary that `train_stage` has written, or None if the stage has none.

    A run whose stages were finished by several commands reads it, so that its result block shows
    all of them.

    Raises:
        RunFolderError: the file is damaged, or no summary.
    """
    path = layout.summary
    if not path.exists():
        return None
    remedy = "remove it to go on without this summary"
    try:
        summary = json.loads(path.read_text())
        missing = FIELDS - summary.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise RunFolderError(f"{path}: cannot be read ({error}); {remedy}") from error
    if missing:
        raise RunFolderError(f"{path}: lacks {', '.join(sorted(missing))}; {remedy}")
    return summary
