"""Encoders and connectors against PyTorch classes at tiny sizes: outputs and all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from transformers import Blip2QFormerConfig, Blip2QFormerModel, CLIPVisionConfig, CLIPVisionModel
from transformers import WhisperConfig as TorchWhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperDecoder
from transformers.models.whisper.modeling_whisper import WhisperEncoder as TorchWhisperEncoder

from tests.parity import torch_weights as weights
from unimoe_jax.config import BeatsConfig, ClipConfig, QueryConnectorConfig, WhisperConfig
from unimoe_jax.connectors.query import QueryConnector
from unimoe_jax.encoders.beats import ConvPosition
from unimoe_jax.encoders.clip import ClipEncoder
from unimoe_jax.encoders.whisper import WhisperEncoder
from unimoe_jax.nn.linear import LayerOptions

ATOL, RTOL = 3e-5, 1e-4
GRAD_SHARE = 1e-4  # of the largest gradient of a tensor
OPTIONS = LayerOptions()


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def randomise(module: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter random and trainable, so that no bias is 0 and no scale is 1."""
    torch.manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn_like(parameter) * 0.2
        is_scale = "norm" in name.lower() and name.endswith("weight")
        parameter.data = 1 + noise if is_scale else noise
        parameter.requires_grad_(True)
    return module.eval()


def check(module, convert, torch_parameters: dict, inputs, torch_inputs, torch_output):
    """Compare outputs, and gradients of <output, random> for parameters and inputs."""
    cotangent = np.random.default_rng(1).standard_normal(torch_output.shape).astype(np.float32)
    (torch_output * torch.from_numpy(cotangent)).sum().backward()
    params = weights.nested(convert(weights.numpy_state(torch_parameters)))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def loss(params, inputs):
        output = module.apply({"params": params}, inputs)
        return jnp.sum(output * cotangent), output

    (_, output), (param_grads, input_grad) = loss(params, inputs)
    np.testing.assert_allclose(output, torch_output.detach().numpy(), atol=ATOL, rtol=RTOL)
    grads = {name: parameter.grad for name, parameter in torch_parameters.items()}
    expected = convert(weights.numpy_state(grads)) | {"(input)": torch_inputs.grad.numpy()}
    actual = flatten_dict(param_grads, sep="/") | {"(input)": input_grad}
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        atol = GRAD_SHARE * max(np.abs(value).max(), 1e-2)
        np.testing.assert_allclose(actual[name], value, atol=atol, rtol=0, err_msg=name)


def random_input(*shape: int) -> tuple[np.ndarray, torch.Tensor]:
    values = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
    return values, torch.from_numpy(values.copy()).requires_grad_(True)


@pytest.mark.parametrize("select_layer,activation", [(-2, "quick_gelu"), (-1, "gelu")])
def test_clip_against_torch(select_layer: int, activation: str):
    config = ClipConfig(
        hidden_size=12,
        mlp_dim=20,
        num_layers=3,
        num_heads=3,
        image_size=15,
        patch_size=5,
        select_layer=select_layer,
        activation=activation,
    )
    torch_config = CLIPVisionConfig(
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=15,
        patch_size=5,
        hidden_act=activation,
    )
    model = randomise(CLIPVisionModel(torch_config))
    images, torch_images = random_input(2, 3, 15, 15)
    states = model(torch_images, output_hidden_states=True).hidden_states
    check(
        ChannelsFirst(ClipEncoder(config, OPTIONS)),
        partial(weights.clip_params, config=config),
        {k.removeprefix("vision_model."): p for k, p in model.named_parameters()},
        images,
        torch_images,
        states[select_layer][:, 1:],
    )


@dataclass(frozen=True)
class ChannelsFirst:
    """The encoder on images [B,C,H,W]."""

    encoder: ClipEncoder

    def apply(self, variables, images):
        return self.encoder.apply(variables, images.transpose(0, 2, 3, 1))[0]


def tiny_whisper() -> TorchWhisperConfig:
    return TorchWhisperConfig(
        vocab_size=8,
        d_model=12,
        encoder_layers=2,
        decoder_layers=3,
        encoder_attention_heads=3,
        decoder_attention_heads=2,
        encoder_ffn_dim=20,
        decoder_ffn_dim=28,
        num_mel_bins=7,
        max_source_positions=9,
        max_target_positions=11,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )


def test_whisper_encoder_against_torch():
    model = randomise(TorchWhisperEncoder(tiny_whisper()))
    config = WhisperConfig(
        hidden_size=12, mlp_dim=20, num_layers=2, num_heads=3, mel_bins=7, max_positions=9
    )
    mel, torch_mel = random_input(2, 7, 18)
    check(
        WhisperEncoder(config, OPTIONS),
        partial(weights.whisper_encoder_params, num_layers=2),
        dict(model.named_parameters()),
        mel,
        torch_mel,
        model(torch_mel).last_hidden_state,
    )


def query_parameters(model, queries: torch.nn.Parameter, projector: torch.nn.Sequential) -> dict:
    return {
        **dict(model.named_parameters()),
        "queries": queries,
        **{f"projector.{name}": p for name, p in projector.named_parameters()},
    }


def convert_query(state, body) -> dict:
    """`body` converts the reader; queries and projector are the same for both kinds."""
    projector = weights.mlp_params(state, "projector.")
    return (
        body(state)
        | {"queries": state["queries"]}
        | {f"projector/{name}": value for name, value in projector.items()}
    )


def test_whisper_queries_against_torch():
    model = randomise(WhisperDecoder(tiny_whisper()))
    projector = randomise(torch.nn.Sequential(torch.nn.Linear(12, 10)))
    queries = torch.nn.Parameter(torch.randn(4, 12))
    states, torch_states = random_input(2, 9, 12)
    out = model(inputs_embeds=queries[None].repeat(2, 1, 1), encoder_hidden_states=torch_states)
    config = QueryConnectorConfig(
        kind="whisper_decoder",
        num_queries=4,
        hidden_size=12,
        mlp_dim=28,
        num_layers=3,
        num_heads=2,
        max_positions=11,
    )
    check(
        QueryConnector(config, 10, OPTIONS),
        partial(convert_query, body=partial(weights.whisper_decoder_params, num_layers=3)),
        query_parameters(model, queries, projector),
        states,
        torch_states,
        projector(out.last_hidden_state),
    )


def test_qformer_against_torch():
    """Five layers, of which every second reads the encoder: two pairs and one layer more."""
    torch_config = Blip2QFormerConfig(
        vocab_size=8,
        hidden_size=12,
        num_hidden_layers=5,
        num_attention_heads=3,
        intermediate_size=20,
        encoder_hidden_size=14,
        cross_attention_frequency=2,
    )
    model = randomise(Blip2QFormerModel(torch_config))
    projector = randomise(
        torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.GELU(), torch.nn.Linear(10, 10))
    )
    queries = torch.nn.Parameter(torch.randn(4, 12))
    states, torch_states = random_input(2, 9, 14)
    out = model(query_embeds=queries[None].repeat(2, 1, 1), encoder_hidden_states=torch_states)
    config = QueryConnectorConfig(
        kind="qformer",
        num_queries=4,
        hidden_size=12,
        mlp_dim=20,
        num_layers=5,
        num_heads=3,
        norm_eps=torch_config.layer_norm_eps,
        projector_depth=2,
    )
    check(
        QueryConnector(config, 10, OPTIONS),
        partial(convert_query, body=partial(weights.qformer_params, config=config)),
        query_parameters(model, queries, projector),
        states,
        torch_states,
        projector(out.last_hidden_state),
    )


@pytest.mark.parametrize("taps", [6, 5])
def test_beats_position_convolution_against_torch(taps: int):
    """Weight norm is over dimension 2, and an even kernel's extra last step is dropped."""
    conv = torch.nn.Conv1d(12, 12, taps, padding=taps // 2, groups=3)
    conv = torch.nn.utils.parametrizations.weight_norm(conv, dim=2)
    randomise(conv)
    x, torch_x = random_input(2, 8, 12)
    out = torch.nn.functional.gelu(conv(torch_x.transpose(1, 2))[:, :, :8]).transpose(1, 2)
    config = BeatsConfig(
        hidden_size=12,
        embed_size=8,
        mlp_dim=16,
        num_layers=1,
        num_heads=2,
        conv_kernel=taps,
        conv_groups=3,
    )
    renamed = {
        "bias": conv.bias,
        "weight_g": conv.parametrizations.weight.original0,
        "weight_v": conv.parametrizations.weight.original1,
    }

    def convert(state):
        return {
            "bias": state["bias"],
            "weight_g": state["weight_g"].reshape(-1),
            "weight_v": state["weight_v"].transpose(2, 1, 0),
        }

    check(ConvPosition(config, OPTIONS), convert, renamed, x, torch_x, out)
