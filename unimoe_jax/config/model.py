"""Settings of a whole model: a decoder, and a branch of encoder and connector per medium."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from unimoe_jax.config.base import MODULES, AttentionProgram, Config, ModuleName, Positive, invalid
from unimoe_jax.config.media import MediaName
from unimoe_jax.config.modules import (
    BeatsConfig,
    ClipConfig,
    DecoderConfig,
    LoRARule,
    MlpConnectorConfig,
    MoEConfig,
    QueryConnectorConfig,
    WhisperConfig,
)


class VisionConfig(Config):
    """The branch of images and videos."""

    encoder: ClipConfig
    connector: MlpConnectorConfig = MlpConnectorConfig()
    frames: Positive = Field(
        default=8, description="frames taken from a video; their soft tokens are averaged"
    )
    aspect: Literal["square", "pad"] = Field(
        default="square",
        description="square: centre crop; pad: paste on a square of the mean colour",
    )
    scales: tuple[Positive, ...] = Field(
        default=(1,),
        description="an image is read at each of these multiples of image_size, in tiles of "
        "image_size; the features of all scales are concatenated along the channels",
    )
    unused_images: Literal["skip", "count"] = Field(
        default="skip",
        description="what becomes of pool entries that no token refers to; skip: experts and "
        "router statistics leave them out; count: they count like the black images that CuMo "
        "gives to text-only samples",
    )

    @model_validator(mode="after")
    def _first_scale_is_one(self):
        if self.scales[:1] != (1,):
            raise invalid(
                f"scales = {list(self.scales)}: the first must be 1, the image itself", "scales"
            )
        return self

    @property
    def num_tokens(self) -> int:
        """Soft tokens of an image or a video."""
        return self.encoder.num_patches


class SpeechConfig(Config):
    """The branch of speech."""

    encoder: WhisperConfig
    connector: QueryConnectorConfig
    chunk_seconds: Positive = Field(default=30, description="length of a chunk")
    chunk_stride: Literal["exact", "reference"] = Field(
        default="exact",
        description="reference: skip one sample between two chunks, as Uni-MoE does",
    )
    max_chunks: Positive = Field(
        default=20, description="chunks of a file that are read; the rest is cut"
    )

    @property
    def num_tokens(self) -> int:
        """Soft tokens of a chunk."""
        return self.connector.num_queries

    @property
    def num_frames(self) -> int:
        """Mel frames of a chunk, 100 a second."""
        return self.chunk_seconds * 100

    @model_validator(mode="after")
    def _frames_fit(self):
        if self.num_frames != 2 * self.encoder.max_positions:
            raise invalid(
                f"chunk_seconds = {self.chunk_seconds} gives {self.num_frames} mel frames, but "
                f"encoder.max_positions = {self.encoder.max_positions} needs twice that many",
                "chunk_seconds",
                "encoder.max_positions",
            )
        return self


class AudioConfig(Config):
    """The branch of sounds that are not speech."""

    encoder: BeatsConfig
    connector: QueryConnectorConfig
    chunk_seconds: Positive = Field(default=30, description="length of a chunk")
    max_chunks: Positive = Field(
        default=20, description="chunks of a file that are read; the rest is cut"
    )

    @property
    def num_tokens(self) -> int:
        """Soft tokens of a chunk."""
        return self.connector.num_queries

    @property
    def num_samples(self) -> int:
        """Samples of a chunk at 16 kHz."""
        return self.chunk_seconds * 16000

    @property
    def num_frames(self) -> int:
        """Filter-bank frames of a chunk: windows of 25 ms every 10 ms."""
        return 1 + (self.num_samples - 400) // 160

    @property
    def num_patches(self) -> int:
        """Patches of a chunk."""
        patch = self.encoder.patch_size
        return (self.num_frames // patch) * (self.encoder.mel_bins // patch)


class ModelConfig(Config):
    """A multimodal decoder. A model takes the media for which it has a branch."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None
    speech: SpeechConfig | None = None
    audio: AudioConfig | None = None
    lora: tuple[LoRARule, ...] = Field(default=(), description="adapters; a stage sets its own")
    attention: AttentionProgram = Field(
        default="auto",
        description="auto: on TPUs, jax's kernel for rows and prompts of 256 positions or more, "
        "and for encoders without bias of 1024 positions or more; xla: XLA everywhere",
    )

    def experts(self) -> dict[ModuleName, MoEConfig]:
        """The modules that carry experts: vision encoder, vision connector, decoder."""
        settings: dict[ModuleName, MoEConfig | None] = {"decoder": self.decoder.moe}
        if self.vision:
            settings["encoder"] = self.vision.encoder.moe
            settings["connector"] = self.vision.connector.moe
        found: dict[ModuleName, MoEConfig] = {}
        for name in MODULES:
            moe = settings.get(name)
            if moe is not None:
                found[name] = moe
        return found

    def with_experts(self, modules: Collection[ModuleName]) -> ModelConfig:
        """The same model with experts in `modules` only and dense layers elsewhere."""
        update: dict = {}
        if "decoder" not in modules:
            update["decoder"] = self.decoder.model_copy(update={"moe": None})
        if self.vision:
            parts = {}
            for name in ("encoder", "connector"):
                if name not in modules:
                    part = getattr(self.vision, name)
                    parts[name] = part.model_copy(update={"moe": None})
            update["vision"] = self.vision.model_copy(update=parts)
        return self.model_copy(update=update)

    @property
    def answering(self) -> ModelConfig:
        """The same model for answering and scoring, see `MoEConfig.answering`."""
        if self.decoder.moe is None:
            return self
        decoder = self.decoder.model_copy(update={"moe": self.decoder.moe.answering})
        return self.model_copy(update={"decoder": decoder})

    def tokens_per_medium(self) -> dict[MediaName, int]:
        """Soft tokens of one image, one video, one speech chunk, one audio chunk."""
        sizes: dict[MediaName, int] = {}
        if self.vision:
            sizes |= {"image": self.vision.num_tokens, "video": self.vision.num_tokens}
        if self.speech:
            sizes["speech"] = self.speech.num_tokens
        if self.audio:
            sizes["audio"] = self.audio.num_tokens
        return sizes
