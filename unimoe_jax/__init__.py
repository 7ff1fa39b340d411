"""unimoe_jax: multimodal mixture-of-experts language models in JAX."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimoe_jax.generation.errors import GenerationError
    from unimoe_jax.generation.loader import Settings, load
    from unimoe_jax.generation.model import Model
    from unimoe_jax.generation.request import Answer, Media, Message, Request, Sampling, ask

__version__ = "0.1.0"

_PLACES = {
    "errors": ("GenerationError",),
    "loader": ("Settings", "load"),
    "model": ("Model",),
    "request": ("Answer", "Media", "Message", "Request", "Sampling", "ask"),
}
__all__ = [
    "Answer",
    "GenerationError",
    "Media",
    "Message",
    "Model",
    "Request",
    "Sampling",
    "Settings",
    "ask",
    "load",
]


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: a data worker needs no model."""
    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"unimoe_jax.generation.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
