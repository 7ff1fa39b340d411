"""The folder for files that the package makes once and uses again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(cache: str | None = None) -> Path:
    """`cache` (the setting `data.cache`) if it is given, else the user's cache folder.

    That is `$XDG_CACHE_HOME/unimoe_jax`, by default `~/.cache/unimoe_jax`. It holds the embedded
    data set, indices of data files, and compiled programs.
    """
    users_folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "unimoe_jax"
    return Path(cache or users_folder).expanduser()
