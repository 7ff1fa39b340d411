"""The embedded data set: small, real files in every modality, generated from a seed.

It makes training, evaluation and tests possible without a download. Sources are named
`embedded:SPLIT/NAME`, with SPLIT `train` or `heldout` and NAME one of `SOURCES`.
"""

from unimoe_jax.data.embedded.dataset import build, made, resolve, tokenizer_path
from unimoe_jax.data.embedded.media import VERSION, Counts
from unimoe_jax.data.embedded.tasks import NAMES as SOURCES

__all__ = ["SOURCES", "VERSION", "Counts", "build", "made", "resolve", "tokenizer_path"]
