"""The embedded data set: small, real files in every modality, generated from a seed.

It makes training, evaluation and tests possible without a download. Sources are named
`embedded:SPLIT/NAME`, with SPLIT `train` or `heldout` and NAME one of `SOURCES`. Imports nothing
else of the package.

images      pictures of one coloured shape
sounds      six classes of short sound events
speech      spoken vowels, and pseudo-words that ask a question
videos      a swaying shape, steady or blinking, with a sound event as its sound track
media       which media files there are: paths, labels, and the keys that seed their parameters
phrases     all wording: questions, answers, scenes
tasks       the records of every source: which questions are asked about which media
tokenizer   a SentencePiece model of these words
dataset     writes the folder, once, and finds files in it
"""

from unimoe_jax.data.embedded.dataset import build, made, resolve, tokenizer_path
from unimoe_jax.data.embedded.media import VERSION, Counts
from unimoe_jax.data.embedded.tasks import NAMES as SOURCES

__all__ = ["SOURCES", "VERSION", "Counts", "build", "made", "resolve", "tokenizer_path"]
