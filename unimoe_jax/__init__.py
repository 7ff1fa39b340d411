"""Multimodal mixture-of-experts language models in JAX: train, convert, run and study them.

Every command `python -m unimoe_jax.VERB` is a folder with a `__main__.py`; the other folders are
the libraries below them. The names listed here are the public Python API of generation.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unimoe_jax.generate.errors import GenerationError
    from unimoe_jax.generate.loader import LoadOptions, load
    from unimoe_jax.generate.model import Model
    from unimoe_jax.generate.request import Answer, Media, Message, Request, Sampling, ask

__version__ = "0.1.0"

_MODULE_OF = {
    "Answer": "request",
    "GenerationError": "errors",
    "LoadOptions": "loader",
    "Media": "request",
    "Message": "request",
    "Model": "model",
    "Request": "request",
    "Sampling": "request",
    "ask": "request",
    "load": "loader",
}
__all__ = [
    "Answer",
    "GenerationError",
    "LoadOptions",
    "Media",
    "Message",
    "Model",
    "Request",
    "Sampling",
    "ask",
    "load",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, because data workers need no model code."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"unimoe_jax.generate.{_MODULE_OF[name]}"), name)
