"""Settings of the data: sources, loader, template."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from unimoe_jax.config.base import Config, Fraction, NonNegative, Positive


class SourceConfig(Config):
    """One JSON file of records in the LLaVA/Uni-MoE schema, and the folder of its media."""

    path: str = Field(description="JSON list or JSON lines; may be `embedded:SPLIT/NAME`")
    root: str | None = Field(
        default=None, description="media folder; default: the JSON's own folder"
    )
    voice: Literal["speech", "audio"] | None = Field(
        default=None,
        description="which encoder reads `voice` files; default: the only one that the model has",
    )


class LoaderConfig(Config):
    """How records become batches."""

    row_length: Positive = Field(description="T: positions per row, soft tokens included")
    rows: Positive = Field(description="rows of one global batch")
    groups: Positive | None = Field(
        default=None,
        description="media pools that a batch is cut into, a multiple of the data shards; set it "
        "to get the same batches on any mesh (default: one per data shard)",
    )
    packing: bool = Field(default=True, description="several samples share a row")
    group_by_modality: bool = Field(
        default=True,
        description="each batch holds one combination of media; with packing, samples without "
        "media fill the positions that its rows have left",
    )
    workers: NonNegative = Field(
        default=0, description="reading processes; 0: threads read instead"
    )
    threads: Positive = Field(default=4, description="reading threads, per process")
    prefetch: Positive = Field(default=4, description="batches that are read ahead")
    strict: bool = Field(default=False, description="stop at the first bad sample")
    max_bad_share: Fraction = Field(
        default=0.01, description="stop when more than this share of the samples is bad"
    )
    max_image_pixels: Positive = Field(
        default=89_478_485, description="larger images are bad samples; the default is Pillow's"
    )
    max_aspect_ratio: Positive = Field(
        default=200,
        description="images whose longer side is more than this times the shorter are bad",
    )


TemplateName = Literal[
    "vicuna_v1", "vicuna_turns", "plain", "mistral_instruct_system", "mistral_instruct"
]


class DataConfig(Config):
    """The data of a run."""

    sources: dict[str, SourceConfig] = Field(description="data files by name")
    loader: LoaderConfig
    template: TemplateName = Field(default="vicuna_v1", description="how turns become a prompt")
    embedded_size: Positive = Field(default=1, description="scale of the embedded data set")
    cache: str | None = Field(
        default=None,
        description="folder of the embedded data set, sample sizes and compiled programs; default: "
        "unimoe_jax in the user's cache folder",
    )
