"""The PyTorch side of moe.py.

It has the loop over experts of the original Uni-MoE, and the unchanged expert layer of
`transformers`, once with its loop and once with `grouped_mm`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch.nn.functional import silu
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts


def torch_side(case: dict[str, np.ndarray], dtype_name: str):
    """Build the variants for the arrays of a case.

    Returns the relative error of every variant against the loop, and functions to time as
    {variant: {pass: run}}.
    """
    dtype = getattr(torch, dtype_name)
    tensors = {key: torch.from_numpy(value) for key, value in case.items()}
    names = ("gate", "up", "down", "x")
    values = [tensors[name].to(dtype).requires_grad_() for name in names]
    weight = tensors["weight"].to(dtype).requires_grad_()
    expert = tensors["expert"].long()
    variants = torch_variants(values, expert)
    # The gradient of the outputs, the same as on the JAX side.
    pull = torch.cos(torch.arange(case["x"].size, dtype=torch.float32)).reshape(case["x"].shape)
    runs, outputs = {}, {}

    for name, function in variants.items():

        def forward(function=function):
            with torch.no_grad():
                return function(*values, weight)

        def gradient(function=function):
            for value in (*values, weight):
                value.grad = None
            (function(*values, weight).float() * pull).sum().backward()

        runs[name] = {"forward": forward, "gradient": gradient}
        outputs[name] = forward()
    reference = outputs["loop"].double()
    checks = {
        name: float((y.double() - reference).norm() / reference.norm())
        for name, y in outputs.items()
        if name != "dense"
    }
    return checks, runs


def torch_variants(values: list[torch.Tensor], expert: torch.Tensor):
    """The variants {name: f(gate, up, down, x, weight) -> y}; "dense" is two feed-forwards."""

    def swiglu(gate, up, down, x):
        return (silu(x @ gate) * (x @ up)) @ down

    def dense(gate, up, down, x, weight):
        del weight
        return swiglu(gate[0], up[0], down[0], x) + swiglu(gate[1], up[1], down[1], x)

    def loop(gate, up, down, x, weight):
        y = torch.zeros_like(x)
        for e in range(len(gate)):
            token, choice = torch.where(expert == e)
            out = swiglu(gate[e], up[e], down[e], x[token]) * weight[token, choice, None]
            y.index_add_(0, token, out)
        return y

    def library(implementation: str):
        config = MixtralConfig(
            hidden_size=values[3].shape[1],
            intermediate_size=values[0].shape[2],
            num_local_experts=len(values[0]),
            experts_implementation=implementation,
        )
        layer = MixtralExperts(config)
        # Its weights are [E, 2F, D] and [E, D, F], laid out once before anything is timed.
        joined = torch.cat([values[0], values[1]], dim=2).detach().transpose(1, 2).contiguous()
        layer.gate_up_proj = torch.nn.Parameter(joined)
        layer.down_proj = torch.nn.Parameter(values[2].detach().transpose(1, 2).contiguous())

        def run(gate, up, down, x, weight):
            del gate, up, down
            for parameter in layer.parameters():
                parameter.grad = None
            return layer(x, expert, weight)

        return run

    return {
        "dense": dense,
        "loop": loop,
        "transformers eager": library("eager"),
        "transformers grouped_mm": library("grouped_mm"),
    }
