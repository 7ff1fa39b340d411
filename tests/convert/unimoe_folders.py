"""Write tiny Uni-MoE checkpoints with the original names, file by file, without torch.

A model of four experts has a base, a fine-tune and encoders. An 8e model with `moe_type: sparse`
has a base whose dense layers have built-in adapters, a folder of experts, and a fine-tune with one
file of expert adapters per rank.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.convert.folders import write_file

WIDTH, HIDDEN, LAYERS, VOCAB = 8, 12, 4, 11
SMALL, QUERIES, RANK, OWN_RANK = 4, 3, 2, 2
EXPERT_FILES = ("mlp_audiocap", "mlp_basev", "mlp_base", "mlp_base1", "mlp_base4", "mlp_base7")
FILE_OF_EXPERT = (*EXPERT_FILES, "mlp_base", "mlp_base7")
MLP = {"gate_proj": (HIDDEN, WIDTH), "up_proj": (HIDDEN, WIDTH), "down_proj": (WIDTH, HIDDEN)}
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"],
    "model_type": "llava",
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "rms_norm_eps": 1e-5,
    "moe": True,
    "num_experts_per_tok": 2,
    "mm_vision_tower": "clip",
    "mm_audio_tower": "whisper",
    "mm_vision_select_layer": -2,
}

Tensors = dict[str, np.ndarray]
Files = dict[str, Tensors]


class Maker:
    """Makes random tensors, which depend on the order of the calls."""

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def __call__(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(np.float32)

    def linear(self, name: str, out: int, inputs: int, bias: bool = True) -> Tensors:
        weight = {f"{name}.weight": self(out, inputs)}
        return weight | ({f"{name}.bias": self(out)} if bias else {})

    def norm(self, name: str, width: int, bias: bool = True) -> Tensors:
        return {f"{name}.weight": self(width)} | ({f"{name}.bias": self(width)} if bias else {})

    def attention(self, name: str, out: str = "out_proj", no_bias: str = "k_proj") -> Tensors:
        made: Tensors = {}
        for part in ("q_proj", "k_proj", "v_proj", out):
            made |= self.linear(f"{name}.{part}", SMALL, SMALL, bias=part != no_bias)
        return made

    def whisper_layer(self, name: str, crossing: bool) -> Tensors:
        made = self.attention(f"{name}.self_attn") | self.norm(
            f"{name}.self_attn_layer_norm", SMALL
        )
        if crossing:
            made |= self.attention(f"{name}.encoder_attn")
            made |= self.norm(f"{name}.encoder_attn_layer_norm", SMALL)
        made |= self.linear(f"{name}.fc1", 6, SMALL) | self.linear(f"{name}.fc2", SMALL, 6)
        return made | self.norm(f"{name}.final_layer_norm", SMALL)

    def whisper_encoder(self) -> Tensors:
        made = {f"model.encoder.conv{n}.weight": self(SMALL, SMALL, 3) for n in (1, 2)}
        made |= {f"model.encoder.conv{n}.bias": self(SMALL) for n in (1, 2)}
        made["model.encoder.embed_positions.weight"] = self(50, SMALL)
        made |= self.whisper_layer("model.encoder.layers.0", crossing=False)
        return made | self.norm("model.encoder.layer_norm", SMALL)

    def clip(self) -> Tensors:
        top = "vision_model."
        made = {
            f"{top}embeddings.patch_embedding.weight": self(SMALL, 3, 2, 2),
            f"{top}embeddings.class_embedding": self(SMALL),
            f"{top}embeddings.position_embedding.weight": self(5, SMALL),
            **self.norm(f"{top}pre_layrnorm", SMALL),
            **self.norm(f"{top}post_layernorm", SMALL),
        }
        for layer in range(2):
            name = f"{top}encoder.layers.{layer}"
            made |= self.attention(f"{name}.self_attn", no_bias="")
            made |= self.norm(f"{name}.layer_norm1", SMALL) | self.norm(
                f"{name}.layer_norm2", SMALL
            )
            made |= self.linear(f"{name}.mlp.fc1", 6, SMALL)
            made |= self.linear(f"{name}.mlp.fc2", SMALL, 6)
        return made

    def trunk(self) -> Tensors:
        made = {"model.embed_tokens.weight": self(VOCAB, WIDTH), "model.norm.weight": self(WIDTH)}
        made["lm_head.weight"] = self(VOCAB, WIDTH)
        for layer in range(LAYERS):
            name = f"model.layers.{layer}"
            made[f"{name}.self_attn.rotary_emb.inv_freq"] = self(WIDTH // 4)
            for part in "qkvo":
                made |= self.linear(f"{name}.self_attn.{part}_proj", WIDTH, WIDTH, bias=False)
            for part in ("input_layernorm", "post_attention_layernorm"):
                made[f"{name}.{part}.weight"] = self(WIDTH)
        return made

    def mlp(self, name: str) -> Tensors:
        return {f"{name}.{part}.weight": self(*shape) for part, shape in MLP.items()}

    def builtin(self, name: str) -> Tensors:
        made = {}
        for part, (out, inputs) in MLP.items():
            made[f"{name}.{part}_lora_A.weight"] = self(OWN_RANK, inputs)
            made[f"{name}.{part}_lora_B.weight"] = self(out, OWN_RANK)
        return made

    def peft(self, modules: dict[str, tuple[int, int]]) -> Tensors:
        made = {}
        for name, (out, inputs) in modules.items():
            made[f"base_model.model.{name}.lora_A.weight"] = self(RANK, inputs)
            made[f"base_model.model.{name}.lora_B.weight"] = self(out, RANK)
        return made

    def aligner(self) -> Tensors:
        top = "model.mm_audio_aligner.decoder.audio_decoder."
        return {
            "model.query_tokens": self(1, QUERIES, SMALL),
            f"{top}embed_tokens.weight": self(7, SMALL),
            f"{top}embed_positions.weight": self(5, SMALL),
            **self.whisper_layer(f"{top}layers.0", crossing=True),
            **self.norm(f"{top}layer_norm", SMALL),
            **self.linear("model.mm_audio_aligner.projector", WIDTH, SMALL),
        }

    def projector(self, prefix: str) -> Tensors:
        first = self.linear(f"{prefix}model.mm_projector.0", WIDTH, SMALL)
        return first | self.linear(f"{prefix}model.mm_projector.2", WIDTH, WIDTH)


def four_experts(maker: Maker) -> tuple[Files, dict]:
    """Four experts in every second layer; adapters on attention, experts, dense layers, routers."""
    base, gates = maker.trunk(), {}
    modules = {
        f"model.layers.{n}.self_attn.{p}_proj": (WIDTH, WIDTH) for n in range(4) for p in "qv"
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp"
        if layer % 2:
            base |= maker.mlp(name)
            continue
        base |= maker.linear(f"{name}.gate", 4, WIDTH, bias=False)
        gates |= maker.linear(f"{name}.gate", 4, WIDTH, bias=False)
        modules[f"{name}.gate"] = (4, WIDTH)
        for expert in range(4):
            base |= maker.mlp(f"{name}.experts.{expert}")
            modules[f"{name}.experts.{expert}.up_proj"] = MLP["up_proj"]
    files = {
        "base/model": base,
        "tuned/mlp_gates": gates,
        "tuned/adapter_model": maker.peft(modules),
    }
    return files, {"num_experts": 4}


def eight_experts(maker: Maker, ranks: int) -> tuple[Files, dict]:
    """8e's sparse layout: experts in every second layer, dense layers with built-in adapters."""
    base, gates = maker.trunk(), {}
    for layer in range(1, LAYERS, 2):
        base |= maker.mlp(f"model.layers.{layer}.mlp")
        base |= maker.builtin(f"model.layers.{layer}.mlp")
    # The released base of 8e also has tensors of the 4-expert model.
    base |= maker.linear("model.layers.0.mlp.gate", 4, WIDTH, bias=False)
    base |= maker.mlp("model.layers.0.mlp.experts.0")
    modules = {
        f"model.layers.{n}.self_attn.{p}_proj": (WIDTH, WIDTH) for n in range(4) for p in "qv"
    }
    dense = "model.layers.1.mlp.gate_proj"
    files: Files = {"base/model": base, "tuned/adapter_model": maker.peft(modules)}
    files["tuned/adapter_model"] |= maker.peft({f"{dense}_lora_A": (OWN_RANK, WIDTH)})
    for name in EXPERT_FILES:
        files[f"experts/{name}"] = {}
        for layer in range(LAYERS):
            files[f"experts/{name}"] |= maker.mlp(f"model.layers.{layer}.mlp")
    for layer in range(0, LAYERS, 2):
        gates |= maker.linear(
            f"model.layers.{layer}.mlp.deepspeed_moe.gate.wg", 8, WIDTH, bias=False
        )
        for expert in range(8):
            rank, slot = divmod(expert, 8 // ranks)
            name = f"model.layers.{layer}.mlp.deepspeed_moe.experts.deepspeed_experts.{slot}"
            file = files.setdefault(f"tuned/{rank}_mlp_experts", {})
            file |= maker.builtin(name) | maker.mlp(name)
    files["tuned/mlp_gates"] = gates
    settings = {"model_type": "llava_llama", "num_experts": 8, "ep_size": 8}
    settings |= {"moe_type": "sparse", "moe_stride": 2}
    return files, settings | {"lora_r": OWN_RANK, "lora_alpha": 6, "lora_dropout": 0.05}


def write(root: Path, experts: int, ranks: int = 8, dtype: str = "float32") -> Files:
    """Write a whole system below `root`; returns {file: tensors}."""
    maker = Maker()
    files, settings = four_experts(maker) if experts == 4 else eight_experts(maker, ranks)
    files["tuned/mm_audio_aligner"] = maker.aligner()
    files["tuned/non_lora_trainables"] = maker.projector("base_model.model.")
    files["clip/model"], files["whisper/model"] = maker.clip(), maker.whisper_encoder()
    whisper = {"model_type": "whisper", "d_model": SMALL, "num_mel_bins": SMALL}
    whisper |= {"max_source_positions": 50, "max_target_positions": 5}
    for side in ("encoder", "decoder"):
        whisper |= {f"{side}_layers": 1, f"{side}_ffn_dim": 6, f"{side}_attention_heads": 2}
    clip = {"model_type": "clip_vision_model", "hidden_size": SMALL, "intermediate_size": 6}
    clip |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 4, "patch_size": 2}
    configs = {
        "base/config": CONFIG | settings,
        "tuned/config": CONFIG | settings,
        "clip/config": clip,
    }
    configs["whisper/config"] = whisper
    configs["tuned/adapter_config"] = {"r": RANK, "lora_alpha": 4, "lora_dropout": 0.05}
    files = {f: {n: v.astype(dtype) for n, v in tensors.items()} for f, tensors in files.items()}
    for name in (*files, *configs):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
    for name, tensors in files.items():
        write_file(root / f"{name}.safetensors", tensors)
    for name, content in configs.items():
        (root / f"{name}.json").write_text(json.dumps(content))
    return files
