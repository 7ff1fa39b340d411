"""What a PATH that a user gives stands for: one rule for asking, converting and measuring.

a checkpoint (an import, or what a stage left)   itself
a stage's folder                                 its `final`
a run directory                                  what its last finished stage left, of those
                                                 that leave a whole model
anything else, such as a PyTorch folder          itself, and it is no checkpoint of this package
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from unimoe_jax.checkpoints.checksums import SUMS, CheckpointError
from unimoe_jax.checkpoints.layout import RunLayout, StageLayout
from unimoe_jax.checkpoints.manifest import MANIFEST, NAME_A_RESULT, read_run_file


@dataclass(frozen=True)
class Located:
    """folder: what the path stands for. is_checkpoint: whether this package has written it."""

    folder: Path
    is_checkpoint: bool


def is_checkpoint(path: Path) -> bool:
    """Whether this package has written `path`.

    Files may be missing: a list of checksums is enough, or a manifest beside parameters, so that a
    damaged checkpoint is recognised and then reported as damaged.
    """
    described = (path / MANIFEST).is_file() and (path / "params").is_dir()
    return described or (path / SUMS).is_file()


def locate(path: Path) -> Located:
    """The folder that `path` stands for; see the module's docstring.

    Raises:
        CheckpointError: a run without a finished stage that leaves a whole model, a folder that
            holds several checkpoints, or the inside of a checkpoint.
    """
    if is_checkpoint(path):
        return Located(path, True)
    if not path.is_dir():
        return Located(path, False)
    final = StageLayout(path).final
    if is_checkpoint(final):
        return Located(final, True)
    if is_run(path):
        return Located(_last_whole_result(RunLayout(path)), True)
    finals = [StageLayout(member).final for member in path.iterdir()]
    several = sorted(final for final in finals if is_checkpoint(final))
    if several:
        raise CheckpointError(f"{path}: holds several checkpoints; name one, e.g. {several[-1]}")
    # The path may be the `params` of a checkpoint, or a folder inside of that.
    if any(map(is_checkpoint, path.absolute().parents[:2])):
        raise CheckpointError(
            f"{path}: is the inside of a checkpoint; name the folder around params"
        )
    return Located(path, False)


def is_run(path: Path) -> bool:
    """Whether `path` is a run directory: it has settings, and something that a run wrote."""
    run = RunLayout(path)
    return run.config.is_file() and (run.checkpoints.is_dir() or run.environment.is_file())


def _last_whole_result(run: RunLayout) -> Path:
    for stage in reversed(read_run_file(run.config)["stages"]):
        final = run.stage(stage["name"]).final
        if stage.get("leaves") == "all" and is_checkpoint(final):
            return final
    raise CheckpointError(
        f"{run.folder}: no finished stage of this run leaves a whole model; {NAME_A_RESULT}"
    )
