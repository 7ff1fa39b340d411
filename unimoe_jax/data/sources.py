"""Settings -> files: the embedded data set, the cache folder, the tokenizer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from unimoe_jax.config import ConfigError, DataConfig, RunConfig, StageConfig, cache
from unimoe_jax.data import embedded
from unimoe_jax.data.tokenizer import Tokenizer

PREFIX = "embedded:"
"""Paths of sources in the embedded data set begin with this."""


def cache_folder(data: DataConfig) -> Path:
    """Return the folder of generated data and indices: `data.cache`, else the user's cache
    folder."""
    return cache.cache_folder(data.cache)


@contextlib.contextmanager
def _naming_cache(folder: Path) -> Iterator[None]:
    """Turn an OSError while the cache is written into a ConfigError that names the setting."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"data.cache {folder}: cannot be written ({error.strerror or error}); set data.cache, "
            "or XDG_CACHE_HOME, to a folder that can be written"
        ) from error


def resolve_sources(data: DataConfig) -> DataConfig:
    """Replace `embedded:SPLIT/NAME` paths by files on disk; the data set is built on first use."""
    folder, sources = cache_folder(data), {}
    for name, source in data.sources.items():
        if source.path.startswith(PREFIX):
            with _naming_cache(folder):
                path = Path(embedded.resolve(source.path, folder, size=data.embedded_size))
            # Media paths are relative to the folder of the data set, which holds SPLIT/NAME.json.
            root = str(path.parent.parent)
            source = source.model_copy(update={"path": str(path), "root": root})
        sources[name] = source
    return data.model_copy(update={"sources": sources, "cache": str(folder)})


def check_sources(run: RunConfig, stages: Iterable[StageConfig]) -> None:
    """Check that every file exists which `stages` read or are scored on.

    Raises:
        ConfigError: a file is missing; its key and the stage are named.
    """
    for stage in stages:
        for name in (*stage.mixture, *stage.evaluate):
            path = run.data.sources[name].path
            if not path.startswith(PREFIX) and not Path(path).is_file():
                raise ConfigError(
                    f"data.sources.{name}.path = {path!r} (stage {stage.name}): no such file"
                )


def load_tokenizer(run: RunConfig) -> tuple[Tokenizer, Path]:
    """Return the run's tokenizer and the file it came from.

    Raises:
        ConfigError: there is no tokenizer, it cannot be read, or it has more pieces than the model
            has vocabulary entries.
    """
    path = run.tokenizer
    if path == "embedded":
        folder = cache_folder(run.data)
        with _naming_cache(folder):
            path = embedded.tokenizer_path(folder, size=run.data.embedded_size)
    file = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
    try:
        tokenizer = Tokenizer.load(file)
    # SentencePiece raises RuntimeError. A tokenizer_config.json that is not JSON, or not an object,
    # raises ValueError or AttributeError.
    except (OSError, RuntimeError, ValueError, AttributeError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(
            f"tokenizer = {run.tokenizer!r}: {problem}; allowed: `embedded`, a SentencePiece "
            ".model file, or a folder with tokenizer.model"
        ) from error
    size = run.model.decoder.vocab_size
    if has_too_many_pieces(tokenizer, size):
        raise ConfigError(
            f"tokenizer = {run.tokenizer!r} has {tokenizer.vocab_size} pieces, but "
            f"model.decoder.vocab_size = {size}; allowed: {tokenizer.vocab_size} or more, or the "
            "tokenizer that belongs to the model"
        )
    return tokenizer, file


def has_too_many_pieces(tokenizer: Tokenizer, vocab_size: int) -> bool:
    """Whether the tokenizer has more pieces than an embedding table of `vocab_size` rows.

    JAX clamps indices that are out of range, so every id beyond the table would silently read its
    last row. A table with more rows than pieces is fine.
    """
    return tokenizer.vocab_size > vocab_size
