"""The tiny and small models in PyTorch eager: the same architecture and weights, to compare with.

CLIP and an MLP connector feed a LLaMA decoder. Its experts run in a loop, each on the tokens that
chose it (`torch.where`, then an indexed addition), as in the original Uni-MoE. Linear layers carry
LoRA where the stage has it. Only text and image batches are supported. A kernel here is [out, in].
"""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


class Linear(nn.Module):
    """x Wᵀ (+ b) (+ alpha/rank · dropout(x) A B)."""

    def __init__(self, inputs: int, features: int, path: str, rules: list[dict], bias=False):
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(features, inputs))
        self.bias = nn.Parameter(torch.empty(features)) if bias else None
        rule = next((rule for rule in rules if re.fullmatch(rule["match"], path)), None)
        self.scale = None
        if rule:
            self.scale, self.rate = rule["alpha"] / rule["rank"], rule["dropout"]
            self.lora_a = nn.Parameter(torch.empty(rule["rank"], inputs))
            self.lora_b = nn.Parameter(torch.empty(features, rule["rank"]))

    def forward(self, x):
        y = F.linear(x, self.kernel, self.bias)
        if self.scale is not None:
            down = F.linear(F.dropout(x, self.rate, self.training), self.lora_a)
            y = y + self.scale * F.linear(down, self.lora_b)
        return y


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.scale, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.scale


class LayerNorm(nn.Module):
    def __init__(self, width: int, eps: float):
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.empty(width)), nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x):
        return F.layer_norm(x, self.scale.shape, self.scale, self.bias, self.eps)


def attend(q, k, v, mask, method: str):
    """Attention of q, k, v [B,N,T,H] with equal numbers of heads.

    method: `eager` computes it as the original does, `sdpa` uses PyTorch's fused kernel.
    """
    if method == "sdpa":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -1e30)
    return torch.softmax(scores, dim=-1) @ v


# ------------------------------------------------------------------------------------ vision


class ClipAttention(nn.Module):
    def __init__(self, width: int, heads: int, method: str):
        super().__init__()
        self.heads, self.method = heads, method
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, Linear(width, width, "", [], bias=True))

    def forward(self, x):
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.o_proj(attend(q, k, v, None, self.method).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.fc1 = Linear(width, hidden, "", [], bias=True)
        self.fc2 = Linear(hidden, width, "", [], bias=True)

    def forward(self, x):
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class ClipBlock(nn.Module):
    def __init__(self, config: dict, method: str):
        super().__init__()
        width, eps = config["hidden_size"], config["norm_eps"]
        self.attention_norm, self.mlp_norm = LayerNorm(width, eps), LayerNorm(width, eps)
        self.attention = ClipAttention(width, config["num_heads"], method)
        self.mlp = Mlp(width, config["mlp_dim"])

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Clip(nn.Module):
    """CLIP up to the selected hidden state, without the class token: [B,P,D]."""

    def __init__(self, config: dict, method: str):
        super().__init__()
        width, self.patch = config["hidden_size"], config["patch_size"]
        patches = (config["image_size"] // self.patch) ** 2
        used = config["select_layer"] % (config["num_layers"] + 1)
        self.patch_embedding = Linear(3 * self.patch**2, width, "", [])
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.position_embedding = nn.Parameter(torch.empty(1 + patches, width))
        self.pre_norm = LayerNorm(width, config["norm_eps"])
        self.layers = nn.ModuleList(ClipBlock(config, method) for _ in range(used))

    def forward(self, image):
        p, (batch, side, _, _) = self.patch, image.shape
        patches = image.reshape(batch, side // p, p, side // p, p, 3).transpose(2, 3)
        x = self.patch_embedding(patches.reshape(batch, -1, 3 * p * p))
        first = self.class_embedding.expand(batch, 1, -1)
        x = self.pre_norm(torch.cat([first, x], dim=1) + self.position_embedding)
        for layer in self.layers:
            x = layer(x)
        return x[:, 1:]


class Connector(nn.Module):
    def __init__(self, inputs: int, features: int, depth: int):
        super().__init__()
        self.depth = depth
        for number in range(depth):
            layer = Linear(features if number else inputs, features, "", [], bias=True)
            setattr(self, f"fc{number + 1}", layer)

    def forward(self, x):
        for number in range(self.depth):
            x = getattr(self, f"fc{number + 1}")(F.gelu(x) if number else x)
        return x


class Vision(nn.Module):
    def __init__(self, config: dict, features: int, method: str):
        super().__init__()
        self.encoder = Clip(config["encoder"], method)
        width = config["encoder"]["hidden_size"]
        self.connector = Connector(width, features, config["connector"]["depth"])

    def forward(self, image):
        return self.connector(self.encoder(image))


# ----------------------------------------------------------------------------------- decoder


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int, path: str, rules: list[dict]):
        super().__init__()
        self.gate_proj = Linear(width, hidden, f"{path}/gate_proj", rules)
        self.up_proj = Linear(width, hidden, f"{path}/up_proj", rules)
        self.down_proj = Linear(hidden, width, f"{path}/down_proj", rules)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    def __init__(self, width: int, experts: int):
        super().__init__()
        self.linear = Linear(width, experts, "", [])

    def forward(self, x):
        return self.linear(x)


class MoE(nn.Module):
    """Top-k experts; returns the output, the balance loss and the router z-loss.

    Padding goes through the experts too, as in the original. The losses leave padding out, so that
    they can be compared with those of this package.
    """

    def __init__(self, config: dict, width: int, hidden: int, path: str, rules: list[dict]):
        super().__init__()
        self.top_k = config["top_k"]
        self.router = Router(width, config["num_experts"])
        self.experts = nn.ModuleList(
            SwiGLU(width, hidden, f"{path}/experts", rules) for _ in range(config["num_experts"])
        )

    def forward(self, x, valid):
        shape, x, valid = x.shape, x.reshape(-1, x.shape[-1]), valid.flatten()
        logits = self.router(x)
        top, chosen = torch.topk(logits, self.top_k)
        weights = torch.softmax(top, dim=-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(chosen == number)
            y[token] += weights[token, choice, None] * expert(x[token])
        logits, chosen = logits[valid], chosen[valid]
        share = F.one_hot(chosen[:, 0], len(self.experts)).to(x.dtype).mean(0)
        balance = len(self.experts) * (torch.softmax(logits, -1).mean(0) * share).sum()
        z = torch.logsumexp(logits, -1).pow(2).mean()
        return y.reshape(shape), balance, z


class Attention(nn.Module):
    def __init__(self, config: dict, path: str, rules: list[dict], method: str):
        super().__init__()
        width, self.method = config["hidden_size"], method
        self.heads, self.kv_heads = config["num_heads"], config["num_kv_heads"]
        self.size = config["head_dim"] or width // self.heads
        sizes = {"q_proj": self.heads, "k_proj": self.kv_heads, "v_proj": self.kv_heads}
        for name, heads in sizes.items():
            setattr(self, name, Linear(width, heads * self.size, f"{path}/{name}", rules))
        self.o_proj = Linear(self.heads * self.size, width, f"{path}/o_proj", rules)

    def forward(self, x, cos, sin, mask):
        def heads(y, number):
            return y.unflatten(-1, (number, self.size)).transpose(1, 2)

        def rotate(y):
            first, second = y.chunk(2, dim=-1)
            return y * cos + torch.cat([-second, first], dim=-1) * sin

        q = rotate(heads(self.q_proj(x), self.heads))
        k = rotate(heads(self.k_proj(x), self.kv_heads))
        v = heads(self.v_proj(x), self.kv_heads)
        groups = self.heads // self.kv_heads
        k, v = (a.repeat_interleave(groups, dim=1) for a in (k, v))
        return self.o_proj(attend(q, k, v, mask, self.method).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, config: dict, is_moe: bool, path: str, rules: list[dict], method: str):
        super().__init__()
        width, eps, hidden = config["hidden_size"], config["norm_eps"], config["mlp_dim"]
        self.attention_norm, self.mlp_norm = RMSNorm(width, eps), RMSNorm(width, eps)
        self.attention = Attention(config, f"{path}/attention", rules, method)
        self.is_moe = is_moe
        if is_moe:
            self.moe = MoE(config["moe"], width, hidden, f"{path}/moe", rules)
        else:
            self.mlp = SwiGLU(width, hidden, f"{path}/mlp", rules)

    def forward(self, x, cos, sin, mask, valid):
        x = x + self.attention(self.attention_norm(x), cos, sin, mask)
        h = self.mlp_norm(x)
        if not self.is_moe:
            return x + self.mlp(h), None
        h, balance, z = self.moe(h, valid)
        return x + h, (balance, z)


class Decoder(nn.Module):
    def __init__(self, config: dict, places: list, rules: list[dict], method: str):
        super().__init__()
        self.layers = nn.ModuleList(
            Block(config, is_moe, f"decoder/{prefix}", rules, method)
            for prefix, _, is_moe in places
        )
        self.final_norm = RMSNorm(config["hidden_size"], config["norm_eps"])


class Model(nn.Module):
    """The whole model.

    places: for every decoder layer its prefix in the flat parameters, its index there, and whether
    it has experts. rules: the LoRA rules of the stage as dicts.
    """

    def __init__(self, config: dict, places: list, rules: list[dict], method: str):
        super().__init__()
        self.config, self.places = config["decoder"], places
        width, vocab = self.config["hidden_size"], self.config["vocab_size"]
        self.vision = Vision(config["vision"], width, method)
        self.embed = nn.Module()
        self.embed.embedding = nn.Parameter(torch.empty(vocab, width))
        self.decoder = Decoder(self.config, places, rules, method)
        self.lm_head = Linear(width, vocab, "lm_head", rules)

    def forward(self, batch: dict[str, torch.Tensor]):
        """Mean cross-entropy over targets, Σ of balance losses and mean of z-losses over layers."""
        x = F.embedding(batch["token_id_BT"], self.embed.embedding)
        if "image_GIHWC" in batch:
            soft = self.vision(batch["image_GIHWC"][0]).flatten(0, 1)
            slot = batch["slot_BT"]
            x = torch.where((slot >= 0)[..., None], soft[slot.clamp(min=0)], x)
        position, segment = batch["position_BT"], batch["segment_BT"]
        half = torch.arange(0, self.decoder.layers[0].attention.size, 2).float()
        rate = self.config["rope_theta"] ** (-half / self.decoder.layers[0].attention.size)
        angle = torch.cat([position[..., None] * rate] * 2, dim=-1)[:, None]
        cos, sin = angle.cos(), angle.sin()
        same = segment[:, :, None] == segment[:, None, :]
        mask = (same & (position[:, :, None] >= position[:, None, :]))[:, None]
        aux = []
        for layer in self.decoder.layers:
            x, losses = layer(x, cos, sin, mask, segment > 0)
            if losses is not None:
                aux.append(torch.stack(losses))
        logits = self.lm_head(self.decoder.final_norm(x))
        nll = F.cross_entropy(logits.flatten(0, 1), batch["target_BT"].flatten(), reduction="none")
        weight = batch["weight_BT"].flatten()
        balance, z = torch.stack(aux).unbind(1) if aux else (torch.zeros(1), torch.zeros(1))
        return (nll * weight).sum() / weight.sum(), balance.sum(), z.mean()

    def place(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Map a parameter name to a path in the flat parameters and an index into its leading axes.

        For example, `vision.encoder.layers.1.mlp.fc1.kernel` is index (1,) of the stacked layers
        in `vision/encoder/layers/mlp/fc1/kernel`.
        """
        parts, index = name.split("."), []
        if parts[:2] == ["decoder", "layers"]:
            prefix, number, _ = self.places[int(parts[2])]
            parts, index = ["decoder", *prefix.split("/"), *parts[3:]], [number]
        elif parts[:3] == ["vision", "encoder", "layers"]:
            index = [int(parts.pop(3))]
        if "experts" in parts:
            index.append(int(parts.pop(parts.index("experts") + 1)))
        return "/".join(parts), tuple(index)

    def load(self, flat: Any, trained: set[str]) -> None:
        """Copy the weights, and switch gradients off for parameters that do not train."""
        for name, parameter in self.named_parameters():
            path, index = self.place(name)
            value = np.asarray(flat[path])[index]
            # A kernel of this package is [in, out].
            if path.endswith(("/kernel", "/lora_a", "/lora_b")):
                value = value.T
            parameter.data = torch.from_numpy(np.ascontiguousarray(value))
            parameter.requires_grad_(path in trained)
