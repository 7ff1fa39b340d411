"""What the stages of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from jax.sharding import Mesh
from rich.console import Console

from unimoe_jax.config import DataConfig, RunConfig
from unimoe_jax.data.tokenizer import Tokenizer
from unimoe_jax.parallel.distributed import is_writer
from unimoe_jax.train.stop import StopSignal


@dataclass
class RunContext:
    """What all stages of a run share."""

    run: RunConfig
    folder: Path
    mesh: Mesh
    data: DataConfig
    tokenizer: Tokenizer
    stop: StopSignal

    @property
    def is_writer(self) -> bool:
        return is_writer()

    def tell(self, text: str) -> None:
        """Only process 0 speaks."""
        if self.is_writer:
            Console(highlight=False, soft_wrap=True).print(text, markup=False)
