"""What all stages of a run share."""

from __future__ import annotations

from dataclasses import dataclass

from jax.sharding import Mesh
from rich.console import Console

from unimoe_jax.checkpoints.layout import RunLayout
from unimoe_jax.config import DataConfig, RunConfig
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.parallel.distributed import is_writer
from unimoe_jax.train.stop import StopSignal


@dataclass
class RunContext:
    """What all stages of a run share.

    layout: the run directory, which this process has claimed.
    data: the run's sources, resolved to files.
    """

    run: RunConfig
    layout: RunLayout
    mesh: Mesh
    data: DataConfig
    tokenizer: Tokenizer
    stop: StopSignal

    @property
    def is_writer(self) -> bool:
        """Whether this is process 0, which writes files and prints."""
        return is_writer()

    def announce(self, text: str) -> None:
        """Print a line on process 0; the other processes print nothing."""
        if self.is_writer:
            Console(highlight=False, soft_wrap=True).print(text, markup=False)
