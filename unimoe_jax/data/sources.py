"""Data settings to files: the embedded data set, the cache folder, the tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from unimoe_jax.config import ConfigError, DataConfig, RunConfig, StageConfig, cache
from unimoe_jax.data import embedded
from unimoe_jax.data.tokenizer import Tokenizer

PREFIX = "embedded:"


def cache_folder(data: DataConfig) -> Path:
    """Where generated data and indices lie: `data.cache`, else the user's cache folder."""
    return cache.cache_folder(data.cache)


@contextlib.contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    """What is made on first use lies in the cache."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.cache {folder}: cannot be written ({error.strerror or error}); set data.cache, "
            "or XDG_CACHE_HOME, to a folder that can"
        ) from error


def resolve_sources(data: DataConfig) -> DataConfig:
    """`embedded:SPLIT/NAME` paths become files on disk; the set is built on first use."""
    folder, sources = cache_folder(data), {}
    for name, source in data.sources.items():
        if source.path.startswith(PREFIX):
            with _cache_errors(folder):
                path = Path(embedded.resolve(source.path, folder, size=data.embedded_size))
            root = str(path.parent.parent)
            source = source.model_copy(update={"path": str(path), "root": root})
        sources[name] = source
    return data.model_copy(update={"sources": sources, "cache": str(folder)})


def check_sources(run: RunConfig, stages: Iterable[StageConfig]) -> None:
    """The files of everything that `stages` read or are scored on must be there.

    Raises:
        ConfigError: one is missing; its key and the stage are named.
    """
    for stage in stages:
        for name in (*stage.mixture, *stage.evaluate):
            path = run.data.sources[name].path
            if not path.startswith(PREFIX) and not Path(path).is_file():
                raise ConfigError(
                    f"data.sources.{name}.path = {path!r} (stage {stage.name}): no such file"
                )


def load_tokenizer(run: RunConfig) -> tuple[Tokenizer, Path]:
    """The run's tokenizer and the file it came from.

    Raises:
        ConfigError: there is none, it cannot be read, or it has pieces that the model does not.
    """
    path = run.tokenizer
    if path == "embedded":
        folder = cache_folder(run.data)
        with _cache_errors(folder):
            path = embedded.tokenizer_path(folder, size=run.data.embedded_size)
    file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
    try:
        tokenizer = Tokenizer.load(file)
    except (OSError, RuntimeError, ValueError, AttributeError) as error:  # also SentencePiece's
        problem = " ".join(str(error).split())
        raise ConfigError(
            f"tokenizer = {run.tokenizer!r}: {problem}; allowed: `embedded`, a SentencePiece "
            ".model file, or a folder with tokenizer.model"
        ) from error
    size = run.model.decoder.vocab_size
    if tokenizer.vocab_size > size:  # looked up, the rest would all be the last row
        raise ConfigError(
            f"tokenizer = {run.tokenizer!r} has {tokenizer.vocab_size} pieces, but "
            f"model.decoder.vocab_size = {size}; allowed: {tokenizer.vocab_size} or more, or the "
            "tokenizer that belongs to the model"
        )
    return tokenizer, file
