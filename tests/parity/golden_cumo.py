"""Recorded CuMo systems from their files to losses and gradients: dense, just upcycled, and final.

The reference runs the encoder once per scale and records the values of each router. The same calls
are made here one by one. Features, losses and gradients come from the package's `Vision`, which
reads all scales at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from tests.parity.golden_checks import _hidden, greedy
from tests.parity.golden_gradients import recorded_gradients
from tests.parity.golden_model import Golden, Outputs, language_loss
from tests.parity.golden_system import Pools, Spliced, System, splice
from unimoe_jax.config import AuxLossConfig, ModelConfig, RouterLossConfig
from unimoe_jax.convert.family_plans import plan_of
from unimoe_jax.convert.plan import Resolution, resolve_plan
from unimoe_jax.convert.reader import open_file, read_json
from unimoe_jax.convert.recognise import recognise
from unimoe_jax.encoders import scales
from unimoe_jax.encoders.clip import ClipEncoder
from unimoe_jax.models.branches import Pictures, Vision
from unimoe_jax.nn.moe.layer import MoEAux
from unimoe_jax.params.paths import nest
from unimoe_jax.stages import losses

FORMS = {"dense": "-pft", "upcycled": "-upcycled", "final": ""}
GATES = "_gates.safetensors"


@dataclass(frozen=True)
class CumoSystem(System):
    """One folder of recorded data, with the forms `dense`, `upcycled` and `final`."""

    voice = "audio"  # CuMo has no sound; the shared code needs a name

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Form -> its checkpoint. The upcycled form may consist of the routers' weights only."""
        checkpoint, found = self.folder / "checkpoint", {}
        configs = [path.parent for path in checkpoint.glob("*/config.json")]
        folders = [path for path in configs if "clip_smoe" in read_json(path / "config.json")]
        for path in [*folders, *checkpoint.glob(f"*{GATES}")]:
            name = path.name.removesuffix(GATES)
            form = next(form for form, end in FORMS.items() if name.endswith(end))
            found[form] = path
        return found

    def settings(self, form: str) -> dict[str, Any]:
        """config.json of a form."""
        path = self.paths[form]
        beside = path.with_name(path.name.removesuffix(GATES) + "_config.json")
        return read_json(path / "config.json" if path.is_dir() else beside)

    @cached_property
    def grad_norms(self) -> dict[str, dict[str, float]]:
        return super().grad_norms if self.is_whole else {}

    @property
    def is_whole(self) -> bool:
        """Whether the decoder was recorded, too, and not the vision side alone."""
        return (self.folder / "grad_norms.json").is_file()

    def resolution(self, form: str) -> Resolution:
        return resolved(self.paths[form])


@cache
def resolved(path: Path) -> Resolution:
    """The import of one checkpoint."""
    return resolve_plan(plan_of(recognise([path])))


@dataclass(frozen=True)
class CumoGolden(Golden):
    """One form of a recorded system."""

    @property
    def is_upcycled_here(self) -> bool:
        """Whether only the routers of this form were recorded."""
        return not self.system.paths[self.form].is_dir()

    @cached_property
    def resolution(self) -> Resolution:
        return self.system.resolution("final" if self.is_upcycled_here else self.form)

    @cached_property
    def flat(self) -> dict[str, np.ndarray]:
        if self.is_upcycled_here:
            return upcycled(self)
        return Golden(self.system, self.form).flat

    @cached_property
    def coefficients(self) -> AuxLossConfig:
        """Coefficients of the losses as the reference adds them.

        It adds the decoder's losses only if encoder or connector has losses, too.
        """
        settings = self.system.settings(self.form)
        own = {"balance": settings["balance_loss_coef"], "router_z": settings["router_z_loss_coef"]}
        on = {"encoder": settings["clip_smoe"], "connector": settings["mlp_smoe"]}
        on["decoder"] = any(on.values())
        return AuxLossConfig(**{name: RouterLossConfig(**own) for name in on if on[name]})

    def vision(self, params: dict, pools: Pools) -> tuple[jax.Array, dict[str, MoEAux]]:
        """The soft-token table [1,S,D] and the router statistics over all images."""
        vision = Vision(self.config.vision, self.width, self.options)
        pictures = Pictures(pools.image, None)
        tables, aux = vision.apply({"params": params["vision"]}, pictures)
        return tables[0], aux

    def soft_tokens(self, params: dict, pools: Pools) -> jax.Array:
        return self.vision(params, pools)[0]

    def run(self, flat, spliced: Spliced, pools: Pools, soft: Any = None) -> Outputs:
        params, aux = nest(flat), {}
        if soft is None:
            soft, aux = self.vision(params, pools)
        stream, logits, out = self.decode(params, spliced, soft)
        if out.aux is not None:
            aux["decoder"] = out.aux
        parts = {"loss_language": language_loss(logits, spliced)}
        parts["loss_total"] = parts["loss_language"] + losses.router_losses(aux, self.coefficients)
        return Outputs(stream, logits, out, parts)

    # ----------------------------------------------------------------------- call by call

    def calls(self, params: dict, image_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Inputs and outputs of each call of the encoder, one per scale, and of the connector."""
        config, steps = self.config.vision, self.config.vision.scales
        views, states, values, start = scales.views(image_BHWC, steps), [], {}, 0
        encoder = ClipEncoder(config.encoder, self.options)
        hidden = partial(encoder.apply, method="hidden_state")
        for call, scale in enumerate(steps):
            tiles = views[:, start : start + scale**2]
            start += scale**2
            # The reference puts the first tiles of all images before the second tiles.
            pixels = rearrange(tiles, "b s h w c -> (s b) h w c")
            state, aux = hidden({"params": params["vision"]["encoder"]}, pixels)
            values[f"clip/pixel_values/call{call}"] = rearrange(pixels, "b h w c -> b c h w")
            values[f"clip/hidden/call{call}"] = state
            states.append(rearrange(state[:, 1:], "(s b) p d -> b s p d", s=scale**2))
            if aux is not None:
                values |= encoder_values(aux, call)
        grid = config.encoder.image_size // config.encoder.patch_size
        features = scales.merge(jnp.concatenate(states, axis=1), steps, grid)
        soft, aux = self.vision(params, Pools(image_BHWC[None], None, None, None))
        if "connector" in aux:
            values |= module_values("mlp", jax.tree.map(lambda a: a[0], aux["connector"]))
        return (
            values
            | unscaled(aux)
            | {
                "vision_tower_features": features,
                "connector_out": soft.reshape(len(image_BHWC), -1, soft.shape[-1]),
            }
        )


def unscaled(aux: dict[str, MoEAux]) -> dict[str, jax.Array]:
    """Losses of encoder and connector without coefficients, by recorded name."""
    values = {}
    for name, kind in (("encoder", "clip"), ("connector", "mlp")):
        if name in aux:
            values[f"aux_unscaled/{kind}_balance_loss"] = jnp.mean(aux[name].balance)
            values[f"aux_unscaled/{kind}_z_loss"] = jnp.mean(aux[name].router_z)
    return values


def encoder_values(aux: MoEAux, call: int) -> dict[str, jax.Array]:
    """Statistics of one call of the encoder, by recorded name."""
    values = {
        f"clip/balance_loss/call{call}": aux.balance.mean(),
        f"clip/z_loss/call{call}": aux.router_z.mean(),
    }
    for layer in range(len(aux.balance)):
        name = f"clip/layer{layer}"
        values |= {
            f"{name}/router_logits/call{call}": aux.logits_BTE[layer],
            f"{name}/selected_experts/call{call}": aux.expert_BTK[layer],
            f"{name}/balance_loss/call{call}": aux.balance[layer],
            f"{name}/z_loss/call{call}": aux.router_z[layer],
        }
    return values


def upcycled(golden: CumoGolden) -> dict[str, np.ndarray]:
    """Parameters of the upcycled form: copies of the dense layer, and recorded routers."""
    system, final = golden.system, golden.resolution
    dense = Golden(system, "dense").flat
    gates = open_file(system.paths["upcycled"])
    flat = {}
    for path, target in final.targets.items():
        if path in dense:
            flat[path] = dense[path]
        elif "/router/" in path:
            flat[path] = np.empty(target.shape, np.float32)
            for index, copy in target.fills.items():
                flat[path][index] = copy.forward(gates[copy.src.split(":")[1]].read())
        else:
            count = target.shape[path.startswith("vision/encoder/")]
            source = re.sub(r"moe/experts/", "mlp/" if "/encoder/" in path else "", path)
            axis = 1 if path.startswith("vision/encoder/") else 0
            flat[path] = np.stack([dense[source]] * count, axis=axis)
    return flat


# --------------------------------------------------------------------------------- inputs


def batch(system: System, config: ModelConfig) -> tuple[Spliced, Pools]:
    """The collated batch of inputs.npz. Padding is cut off before images are inserted."""
    inputs, lengths = system.inputs, system.inputs["attention_mask"].sum(1)
    cut = [
        [row[:length].tolist() for row, length in zip(inputs[name], lengths, strict=True)]
        for name in ("input_ids", "labels")
    ]
    tokens = config.tokens_per_medium()
    files = [[] for _ in lengths]
    counts = (len(inputs["images"]), 0)
    spliced = splice(*cut, lengths, files, tokens, system.voice, counts, blank=True)
    return spliced, Pools(inputs["images"].transpose(0, 2, 3, 1)[None], None, None, None)


# ------------------------------------------------------------------------------- the groups


@cache
def forward_backward(system: CumoSystem, form: str):
    """(outputs, values by recorded name, gradients of all parameters)."""
    golden, final = CumoGolden(system, form), CumoGolden(system, "final")
    # Forms that differ only in their numbers share one compiled program.
    same = golden.config == final.config and golden.coefficients == final.coefficients
    learn, look = programs(system, "final" if same else form)
    (_, out), grads = learn(golden.flat)
    return jax.tree.map(np.asarray, (out, look(golden.flat), grads))


@cache
def programs(system: CumoSystem, form: str):
    """Compiled programs: the loss with outputs and gradients, and the calls of the encoder."""
    golden = CumoGolden(system, form)
    spliced, pools = batch(system, golden.config)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def learn(flat):
        out = golden.run(flat, spliced, pools)
        return out.losses["loss_total"], out

    return learn, jax.jit(lambda flat: golden.calls(nest(flat), pools.image[0]))


def values_of(form: str, system: CumoSystem) -> dict[str, np.ndarray]:
    """All recorded values of one forward pass."""
    golden = CumoGolden(system, form)
    spliced, _ = batch(system, golden.config)
    out, calls, _ = forward_backward(system, form)
    at = np.arange(spliced.labels.shape[1])
    values = calls | {
        "spliced/inputs_embeds": out.stream_BTD,
        "spliced/labels": spliced.labels,
        "spliced/attention_mask": (at[None] < spliced.attended[:, None]).astype(int),
        "logits": out.logits_BTV,
        "logits_sample0": out.logits_BTV[:1],
        "final_norm_out": out.decoder.hidden_BTD,
        **out.losses,
    }
    for layer, hidden in enumerate(_hidden(golden, out.decoder.layers)):
        values[f"layer{layer}/hidden_out"] = hidden
    for layer in range(golden.config.decoder.num_layers if out.decoder.aux else 0):
        one = jax.tree.map(lambda a, at=layer: a[at], out.decoder.aux)
        found = module_values(f"layer{layer}", one)
        flat = ("router_logits", "selected_experts")  # recorded over flattened tokens
        values |= {
            name: value.reshape(-1, value.shape[-1]) if name.endswith(flat) else value
            for name, value in found.items()
        }
    return {f"{form}/{name}": value for name, value in values.items()}


def module_values(name: str, aux: MoEAux) -> dict[str, jax.Array]:
    """Statistics of one MoE layer, by recorded name."""
    return {
        f"{name}/router_logits": aux.logits_BTE,
        f"{name}/selected_experts": aux.expert_BTK,
        f"{name}/balance_loss": aux.balance,
        f"{name}/z_loss": aux.router_z,
    }


def vision(system: CumoSystem) -> dict[str, np.ndarray]:
    """Recorded values of the vision side of the final form, without its decoder."""
    golden = CumoGolden(system, "final")
    image = system.inputs["images"].transpose(0, 2, 3, 1)
    values = jax.jit(lambda flat: golden.calls(nest(flat), image))(golden.flat)
    return {f"final/{name}": value for name, value in values.items()}


def generate(system: CumoSystem) -> dict[str, np.ndarray]:
    """Greedy decoding of the final form."""
    return greedy(CumoGolden(system, "final"))


def all_gradients(system: CumoSystem, run: str) -> dict[str, np.ndarray]:
    """Recorded name -> gradient in torch layout, for all gradients of a run."""
    names = set(system.grad_norms[run])
    resolution = CumoGolden(system, run).resolution
    return recorded_gradients(resolution, forward_backward(system, run)[2], names)


def gradients(system: CumoSystem) -> dict[str, np.ndarray]:
    """Recorded gradient tensors."""
    values = {}
    for key in system.expected:
        match = re.fullmatch(r"grad_(\w+)/(.+)", key)
        if match and match[2] in (found := all_gradients(system, match[1])):
            values[key] = found[match[2]]
    return values


WHOLE = {form: partial(values_of, form) for form in FORMS} | {
    "generate": generate,
    "gradients": gradients,
}


def groups(system: CumoSystem) -> dict[str, Callable]:
    """Group of keys -> the function that computes it, for the groups that a system has."""
    return WHOLE if system.is_whole else {"vision": vision}
