"""Settings of the data: sources, loader, template."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unimoe_jax.config.base import Config, Fraction, NonNegative, Positive


class SourceConfig(Config):
    """One JSON file of records in the LLaVA/Uni-MoE schema, and where its media lie."""

    path: str = Field(description="JSON list or JSON lines; may be `embedded:SPLIT/NAME`")
    root: str | None = Field(None, description="media folder; default: the JSON's own folder")
    voice: Literal["speech", "audio"] | None = Field(
        None, description="which encoder hears `voice` files; default: the only one there is"
    )


class LoaderConfig(Config):
    """How records become batches."""

    row_length: Positive = Field(description="T: positions per row, soft tokens included")
    rows: Positive = Field(description="rows of one global batch")
    groups: Positive | None = Field(
        None,
        description="media pools that a batch is cut into, a multiple of the data shards; set it "
        "to get the same batches on any mesh (default: one per data shard)",
    )
    packing: bool = True
    group_by_modality: bool = Field(
        True,
        description="each batch holds one combination of media; with packing, samples of text "
        "alone fill what its rows leave",
    )
    workers: NonNegative = Field(0, description="processes; 0 reads with threads")
    threads: Positive = 4
    prefetch: Positive = 4
    strict: bool = Field(False, description="stop at the first bad sample")
    max_bad_share: Fraction = 0.01
    max_image_pixels: Positive = 89_478_485
    max_aspect_ratio: Positive = 200


TemplateName = Literal[
    "vicuna_v1", "vicuna_turns", "plain", "mistral_instruct_system", "mistral_instruct"
]


class DataConfig(Config):
    sources: dict[str, SourceConfig]
    loader: LoaderConfig
    template: TemplateName = "vicuna_v1"
    embedded_size: Positive = Field(1, description="scale of the embedded data set")
    cache: str | None = Field(None, description="folder of the embedded data set and the indices")
