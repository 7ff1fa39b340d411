"""Settings of a model, put together from its parts. See config.py."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

from pydantic import Field, model_validator

from unimoe_jax.config.base import MODULES, AttentionProgram, Config, ModuleName, Positive
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
    encoder: ClipConfig
    connector: MlpConnectorConfig = MlpConnectorConfig()
    frames: Positive = Field(8, description="frames of a video; their soft tokens are averaged")
    aspect: Literal["square", "pad"] = Field(
        "square", description="square: centre crop; pad: paste on a square of the mean colour"
    )
    scales: tuple[Positive, ...] = Field(
        (1,),
        description="side lengths, in images, at which an image is read, tile by tile; features "
        "of all scales lie side by side in the channels",
    )
    unused_images: Literal["skip", "count"] = Field(
        "skip",
        description="pool entries that no token refers to: skip them in experts and router "
        "statistics, or count them as the black images that CuMo gives to text-only samples",
    )

    @model_validator(mode="after")
    def _first_scale_is_one(self):
        if self.scales[:1] != (1,):
            raise ValueError(f"scales = {list(self.scales)}: the first must be 1, the image itself")
        return self

    @property
    def num_tokens(self) -> int:
        return self.encoder.num_patches


class SpeechConfig(Config):
    encoder: WhisperConfig
    connector: QueryConnectorConfig
    chunk_seconds: Positive = 30
    chunk_stride: Literal["exact", "reference"] = Field(
        "exact", description="reference: advance by one sample more and lose it, as Uni-MoE does"
    )
    max_chunks: Positive = 20

    @property
    def num_tokens(self) -> int:
        return self.connector.num_queries

    @property
    def num_frames(self) -> int:
        return self.chunk_seconds * 100

    @model_validator(mode="after")
    def _frames_fit(self):
        if self.num_frames != 2 * self.encoder.max_positions:
            raise ValueError(
                f"chunk_seconds = {self.chunk_seconds} gives {self.num_frames} mel frames, but "
                f"encoder.max_positions = {self.encoder.max_positions} needs twice that many"
            )
        return self


class AudioConfig(Config):
    encoder: BeatsConfig
    connector: QueryConnectorConfig
    chunk_seconds: Positive = 30
    max_chunks: Positive = 20

    @property
    def num_tokens(self) -> int:
        return self.connector.num_queries

    @property
    def num_samples(self) -> int:
        return self.chunk_seconds * 16000

    @property
    def num_frames(self) -> int:
        return 1 + (self.num_samples - 400) // 160

    @property
    def num_patches(self) -> int:
        patch = self.encoder.patch_size
        return (self.num_frames // patch) * (self.encoder.mel_bins // patch)


class ModelConfig(Config):
    """A multimodal decoder. Absent encoders are simply not there."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None
    speech: SpeechConfig | None = None
    audio: AudioConfig | None = None
    lora: tuple[LoRARule, ...] = ()
    attention: AttentionProgram = Field(
        "auto",
        description="auto: on TPUs jax's kernel, for rows and prompts from 256 positions and for "
        "encoders from 1024 without bias; xla: products of XLA everywhere",
    )

    def experts(self) -> dict[ModuleName, MoEConfig]:
        """The modules that carry experts: vision encoder, vision connector, decoder."""
        found = {"decoder": self.decoder.moe}
        if self.vision:
            found["encoder"] = self.vision.encoder.moe
            found["connector"] = self.vision.connector.moe
        return {name: found[name] for name in MODULES if found.get(name) is not None}

    def with_experts(self, modules: Collection[ModuleName]) -> ModelConfig:
        """The same model with experts in `modules` only; elsewhere dense layers."""
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
        """The same model with its decoder as generation holds it, see `MoEConfig.answering`."""
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
