"""Encoders and connectors against recorded outputs of the original models."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.golden_dir import as_recorded, recorded_systems
from tests.parity import torch_weights as weights
from unimoe_jax.config import BeatsConfig, ClipConfig, QueryConnectorConfig, WhisperConfig
from unimoe_jax.connectors.mlp import MlpConnector
from unimoe_jax.connectors.query import QueryConnector
from unimoe_jax.encoders.beats import BeatsEncoder
from unimoe_jax.encoders.clip import ClipEncoder
from unimoe_jax.encoders.whisper import WhisperEncoder
from unimoe_jax.nn.linear import LayerOptions

ATOL, RTOL = 3e-5, 1e-4
OPTIONS = LayerOptions()


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@partial(jax.jit, static_argnums=(0, 3))
def run(module, params, inputs, static=()):
    """Apply `module` to one batch; modules of the same sizes share a compiled program."""
    return module.apply({"params": params}, *inputs, *static)


@dataclass(frozen=True)
class Golden:
    """One recorded system. All sizes come from the configs in its checkpoint."""

    folder: Path

    @cached_property
    def inputs(self):
        return np.load(self.folder / "inputs.npz")

    @cached_property
    def expected(self):
        return load_file(self.folder / "expected.safetensors")

    @cached_property
    def tuned(self) -> Path:
        return next((self.folder / "checkpoint").rglob("adapter_config.json")).parent

    @cached_property
    def config(self) -> dict:
        return json.loads((self.tuned / "config.json").read_text())

    def tower(self, key: str) -> Path:
        return self.folder / "checkpoint" / self.config[key]

    def state(self, path: Path, prefix: str = "") -> dict[str, np.ndarray]:
        loaded = torch.load(path, weights_only=True, map_location="cpu")
        return weights.numpy_state(loaded.get("model", loaded), prefix)

    def vision(self) -> dict[str, np.ndarray]:
        tower = self.tower("mm_vision_tower")
        source = json.loads((tower / "config.json").read_text())
        source = source.get("vision_config", source)
        config = ClipConfig(
            hidden_size=source["hidden_size"],
            mlp_dim=source["intermediate_size"],
            num_layers=source["num_hidden_layers"],
            num_heads=source["num_attention_heads"],
            image_size=source["image_size"],
            patch_size=source["patch_size"],
            norm_eps=source["layer_norm_eps"],
            select_layer=self.config["mm_vision_select_layer"],
        )
        state = self.state(tower / "pytorch_model.bin", "vision_model.")
        params = weights.nested(weights.clip_params(state, config))
        images, videos = self.inputs["images"], self.inputs["videos"]
        frames = videos.reshape(-1, *videos.shape[2:])
        pixels = np.concatenate([images, frames]).transpose(0, 2, 3, 1)
        features, _ = run(ClipEncoder(config, OPTIONS), params, (pixels,))

        projector = weights.mlp_params(
            self.state(self.tuned / "non_lora_trainables.bin"),
            "base_model.model.model.mm_projector.",
        )
        width = projector["fc1/kernel"].shape[1]
        connector = MlpConnector(len(projector) // 2, width, OPTIONS)
        soft = run(connector, weights.nested(projector), (features,))
        outputs = {}
        for call, part in enumerate((slice(len(images)), slice(len(images), None))):
            outputs[f"vision_tower_features/call{call}"] = features[part]
            outputs[f"mm_projector_out/call{call}"] = soft[part]
        return outputs

    def hearing(self) -> dict[str, np.ndarray]:
        """Outputs for chunks that belong to a file, in batch order; each is a recorded call."""
        used = self.inputs["features_mask"] > 0
        chunks = self.inputs["input_features"][used]
        aligner = self.state(self.tuned / "mm_audio_aligner.bin")
        if "padding_masks" in self.inputs:
            states = self.beats(chunks[:, 0], self.inputs["padding_masks"][used][:, 0])
            config, params = self.qformer(aligner)
        else:
            states = self.whisper(chunks)
            config, params = self.whisper_decoder(aligner)
        projector = weights.modules(aligner, {"fc1": "model.mm_audio_aligner.projector"})
        soft = self.read(config, params, projector, states)
        eye = np.eye(config.hidden_size, dtype=np.float32)
        nothing = {"fc1/kernel": eye, "fc1/bias": np.zeros_like(eye[0])}
        body = self.read(config, params, nothing, states)
        parts = {
            "audio_tower_features": states,
            "audio_aligner_decoder_out": body,
            "audio_aligner_out": soft,
        }
        return {
            f"{part}/call{call}": value[call : call + 1]
            for part, value in parts.items()
            for call in range(len(value))
        }

    def read(self, config, params, projector, states):
        flat = params | {f"projector/{name}": value for name, value in projector.items()}
        module = QueryConnector(config, projector["fc1/kernel"].shape[1], OPTIONS)
        return run(module, weights.nested(flat), (states,))

    def whisper(self, log_mel):
        tower = self.tower("mm_audio_tower")
        source = json.loads((tower / "config.json").read_text())
        config = WhisperConfig(
            hidden_size=source["d_model"],
            mlp_dim=source["encoder_ffn_dim"],
            num_layers=source["encoder_layers"],
            num_heads=source["encoder_attention_heads"],
            mel_bins=source["num_mel_bins"],
            max_positions=source["max_source_positions"],
        )
        state = self.state(tower / "pytorch_model.bin", "model.encoder.")
        flat = weights.whisper_encoder_params(state, config.num_layers)
        return run(WhisperEncoder(config, OPTIONS), weights.nested(flat), (log_mel,))

    def whisper_decoder(self, aligner):
        source = json.loads((self.tower("mm_audio_tower") / "config.json").read_text())
        queries = aligner["model.query_tokens"][0]
        config = QueryConnectorConfig(
            kind="whisper_decoder",
            num_queries=len(queries),
            hidden_size=source["d_model"],
            mlp_dim=source["decoder_ffn_dim"],
            num_layers=source["decoder_layers"],
            num_heads=source["decoder_attention_heads"],
            max_positions=source["max_target_positions"],
        )
        prefix = "model.mm_audio_aligner.decoder.audio_decoder."
        state = {k[len(prefix) :]: v for k, v in aligner.items() if k.startswith(prefix)}
        flat = weights.whisper_decoder_params(state, config.num_layers)
        return config, flat | {"queries": queries}

    def beats(self, fbank, padding):
        path = self.tower("mm_audio_tower")
        cfg = torch.load(path, weights_only=True, map_location="cpu")["cfg"]
        config = BeatsConfig(
            hidden_size=cfg["encoder_embed_dim"],
            embed_size=cfg["embed_dim"],
            mlp_dim=cfg["encoder_ffn_embed_dim"],
            num_layers=cfg["encoder_layers"],
            num_heads=cfg["encoder_attention_heads"],
            patch_size=cfg["input_patch_size"],
            mel_bins=fbank.shape[-1],
            conv_kernel=cfg["conv_pos"],
            conv_groups=cfg["conv_pos_groups"],
            num_buckets=cfg["num_buckets"],
            max_distance=cfg["max_distance"],
        )
        flat = weights.beats_params(self.state(path), config.num_layers)
        length = (padding == 0).sum(axis=1).astype(np.int32)
        module = BeatsEncoder(config, OPTIONS)
        return run(module, weights.nested(flat), (fbank, length), (padding.shape[1],))

    def qformer(self, aligner):
        source = self.config.get("qformer_config", {})
        queries = aligner["model.mm_audio_aligner.query_tokens"][0]
        config = QueryConnectorConfig(
            kind="qformer",
            num_queries=len(queries),
            hidden_size=source.get("hidden_size", 768),
            mlp_dim=source.get("intermediate_size", 3072),
            num_layers=source.get("num_hidden_layers", 12),
            num_heads=source.get("num_attention_heads", 12),
            norm_eps=source.get("layer_norm_eps", 1e-12),
            cross_attention_every=source.get("cross_attention_frequency", 2),
        )
        prefix = "model.mm_audio_aligner.qformer.qformer."
        state = {k[len(prefix) :]: v for k, v in aligner.items() if k.startswith(prefix)}
        return config, weights.qformer_params(state, config) | {"queries": queries}


@functools.cache
def outputs_of(folder: Path, branch: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    golden = Golden(folder)
    outputs = golden.vision() if branch == "vision" else golden.hearing()
    outputs = {f"unmerged/{name}": np.asarray(value) for name, value in outputs.items()}
    return outputs, golden.expected


VISION = ("vision_tower_features", "mm_projector_out")
HEARING = ("audio_tower_features", "audio_aligner_decoder_out", "audio_aligner_out")


def recorded_parts() -> list:
    """(folder, part) for all recorded parts of encoders and connectors."""
    cases = []
    for folder in recorded_systems():
        with safe_open(folder / "expected.safetensors", "np") as file:
            names = file.keys()
        for part in VISION + HEARING:
            if any(name.startswith(f"unmerged/{part}/") for name in names):
                cases.append(pytest.param(folder, part, id=f"{folder.name}-{part}"))
    return cases


@pytest.mark.parametrize(("folder", "part"), recorded_parts())
def test_recorded_outputs(folder: Path, part: str):
    outputs, expected = outputs_of(folder, "vision" if part in VISION else "hearing")
    recorded = {name: value for name, value in expected.items() if f"unmerged/{part}/" in name}
    actual = as_recorded(outputs, recorded)
    assert set(actual) == set(recorded)
    for name, value in recorded.items():
        assert actual[name].shape == value.shape, name
        np.testing.assert_allclose(actual[name], value, atol=ATOL, rtol=RTOL, err_msg=name)
