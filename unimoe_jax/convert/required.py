"""Settings of the originals that this package computes in one way only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unimoe_jax.convert.reader import ConvertError


def require(where: str, config: Mapping[str, Any], **only: Any) -> None:
    """Refuse a setting with another value than the `only` one; one that is not there, or null, is
    that one.

    Raises:
        ConvertError: naming `where`, the setting and both values.
    """
    for key, value in only.items():
        if (given := config.get(key)) not in (None, value):
            raise ConvertError(f"{where}: {key} {given!r} is not supported; it must be {value}")
