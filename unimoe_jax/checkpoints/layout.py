"""The names inside a run directory. Every other module asks here instead of spelling them.

RUN/config.yaml, env.json, metrics.jsonl, summary.json, report.html, plots/, tb/
RUN/params/STAGE.txt                    the parameter table of a stage
RUN/checkpoints/STAGE/steps/N           training state after N steps
RUN/checkpoints/STAGE/unusable/N        a damaged step that was moved out of the way
RUN/checkpoints/STAGE/summary.json      what the stage reports about itself
RUN/checkpoints/STAGE/final             what the stage leaves behind, once it has finished
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unimoe_jax.metrics.records import BOARD_FOLDER, METRICS_FILE


@dataclass(frozen=True)
class StageLayout:
    """Files of one stage; `folder` is RUN/checkpoints/STAGE."""

    folder: Path

    @property
    def steps(self) -> Path:
        """Numbered training states."""
        return self.folder / "steps"

    @property
    def final(self) -> Path:
        """What the finished stage leaves behind; it exists only when it is complete."""
        return self.folder / "final"

    @property
    def summary(self) -> Path:
        """Losses, scores and times of the stage."""
        return self.folder / "summary.json"


@dataclass(frozen=True)
class RunLayout:
    """Files of a run; `folder` is the run directory."""

    folder: Path

    @property
    def config(self) -> Path:
        """The resolved settings, which are a run file as well."""
        return self.folder / "config.yaml"

    @property
    def environment(self) -> Path:
        """Versions, devices and git commit of the last start."""
        return self.folder / "env.json"

    @property
    def metrics(self) -> Path:
        """One JSON record per log line."""
        return self.folder / METRICS_FILE

    @property
    def summary(self) -> Path:
        """The result block as JSON."""
        return self.folder / "summary.json"

    @property
    def report(self) -> Path:
        """The report as one HTML page."""
        return self.folder / "report.html"

    @property
    def plots(self) -> Path:
        """Figures of the report as files."""
        return self.folder / "plots"

    @property
    def tensorboard(self) -> Path:
        """Event files, one folder per stage."""
        return self.folder / BOARD_FOLDER

    @property
    def params(self) -> Path:
        """Parameter tables, one text file per stage."""
        return self.folder / "params"

    @property
    def checkpoints(self) -> Path:
        """One folder per stage."""
        return self.folder / "checkpoints"

    def stage(self, name: str) -> StageLayout:
        """Files of the stage `name`."""
        return StageLayout(self.checkpoints / name)

    def parameter_table(self, name: str) -> Path:
        """The parameter table of the stage `name`."""
        return self.params / f"{name}.txt"

    def saved(self) -> list[Path]:
        """Everything that was saved by any stage: steps and results, sorted."""
        return sorted(self.checkpoints.glob("*/*/*"))

    @property
    def entries(self) -> frozenset[str]:
        """Names of everything that a run writes into its directory."""
        paths = (
            self.config,
            self.environment,
            self.metrics,
            self.summary,
            self.report,
            self.plots,
            self.tensorboard,
            self.params,
            self.checkpoints,
        )
        return frozenset(path.name for path in paths)


def unusable_step(steps: Path, step: int) -> Path:
    """Where the damaged step `step` of the folder `steps` is moved to."""
    return steps.with_name("unusable") / str(step)


def run_around(final: Path) -> RunLayout:
    """The run directory around RUN/checkpoints/STAGE/final, whether or not there is one."""
    return RunLayout(final.parent.parent.parent)
