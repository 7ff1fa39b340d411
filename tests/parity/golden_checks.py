"""How every recorded key is computed here, and its tolerance.

The tolerances are those of the READMEs of the recorded systems. `compute` returns {key: value} for
a group of keys; a key of no group must be listed in `golden_unchecked.json` with a reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import contextmanager
from functools import cache
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tests.golden_dir import as_recorded, split_key
from tests.parity.golden_gradients import recorded_gradients
from tests.parity.golden_model import Golden, loss_and_gradients
from tests.parity.golden_system import Spliced, System, query_batch, training_batch
from unimoe_jax.nn.moe.layer import MoEAux
from unimoe_jax.nn.stack import where_is
from unimoe_jax.params.paths import nest

TIE = 5e-4  # router logits that are closer may change their order
EXACT = (0.0, 0.0)

# (pattern of the key, atol, rtol); the first match counts.
TOLERANCES = (
    (r".*/spliced/(labels|attention_mask)", *EXACT),
    (r".*/(selected_experts|new_tokens)", *EXACT),
    (r".*/spliced/inputs_embeds", 3e-5, 0.0),
    (r".*/(vision_tower_features|mm_projector_out|audio_tower_features)/.*", 3e-5, 1e-4),
    (r".*/(audio_aligner_decoder_out|audio_aligner_out)/.*", 3e-5, 1e-4),
    (r".*/(router_logits|router_logits_returned|gate_input|moe_out)", 2e-4, 1e-4),
    (r".*/(hidden_out|final_norm_out|combine_weights)", 2e-4, 1e-4),
    (r".*/(logits|logits_sample0)", 3e-4, 0.0),
    (r".*/(loss|loss_total|loss_language)", 2e-5, 0.0),
    (r".*/(l_aux|aux_\w+_loss_scaled)", 0.0, 1e-5),
    (r".*/(step_logits|step_top2_margin)", 5e-4, 0.0),
    (r"meta/min_topk_margin", 2e-4, 0.0),
)


# Keys that only the recordings of CuMo have.
CUMO_TOLERANCES = (
    (r".*/selected_experts/call\d+", *EXACT),
    (r".*/pixel_values/call\d+", 1e-5, 0.0),
    (r".*/(vision_tower_features|connector_out)", 3e-5, 1e-4),
    (r".*/clip/(layer\d+/router_logits|hidden)/call\d+", 2e-4, 1e-4),
    (r".*/(balance_loss|z_loss)(/call\d+)?", 0.0, 1e-5),
    (r".*/aux_unscaled/\w+", 0.0, 1e-5),
)


def check(system: System, key: str, actual: np.ndarray) -> float:
    """Assert that `actual` agrees with the recorded `key`; returns the largest difference."""
    expected = system.expected[key]
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, f"{key}: {actual.shape}, recorded {expected.shape}"
    if key.startswith("grad_"):
        atol, rtol = 1e-3 * float(np.abs(expected).max()), 0.0
    else:
        name, _ = split_key(key)
        known = (*TOLERANCES, *CUMO_TOLERANCES)
        atol, rtol = next(t[1:] for t in known if re.fullmatch(t[0], name))
    if key.endswith("_scaled"):
        # The recorded value is a difference of two float32 totals and has both rounding errors.
        total = system.expected[key.split("/")[0] + "/loss_total"]
        atol += 2 * float(np.spacing(np.float32(total)))
    if "/selected_experts" in key:
        actual = np.where(_tied(system, key)[..., None], expected, actual)
    np.testing.assert_allclose(actual, expected, atol=atol, rtol=rtol, err_msg=key)
    return float(np.max(np.abs(actual - expected), initial=0.0))


def _tied(system: System, key: str) -> np.ndarray:
    """Tokens whose experts are decided by less than `TIE` in the recorded router logits."""
    top_k = system.expected[key].shape[-1]
    logits = system.expected[key.replace("selected_experts", "router_logits")]
    ordered = -np.sort(-logits, axis=-1)
    return (ordered[..., :top_k] - ordered[..., 1 : top_k + 1] < TIE).any(-1)


def compute(system: System, compute_group: Callable) -> dict[str, np.ndarray]:
    """Recorded keys of one group -> the values that this package computes."""
    with jax.default_matmul_precision("highest"):
        values = compute_group(system)
    return as_recorded(jax.tree.map(np.asarray, values), system.expected)


# ------------------------------------------------------------------------------ one forward


def _batch(golden: Golden):
    return training_batch(golden.system, golden.config.tokens_per_medium())


def encoders(system: System) -> dict[str, np.ndarray]:
    outputs = Golden(system, "unmerged").encoder_outputs()
    return {f"unmerged/{name}": value for name, value in outputs.items()}


def unmerged(system: System) -> dict[str, np.ndarray]:
    golden = Golden(system, "unmerged")
    out, _ = forward_backward(system)
    return {
        "unmerged/spliced/inputs_embeds": out.stream_BTD,
        **_spliced(_batch(golden)[0]),
        **_outputs("unmerged", golden, out),
    }


def _spliced(spliced: Spliced) -> dict[str, np.ndarray]:
    at = np.arange(spliced.labels.shape[1])
    return {
        "unmerged/spliced/labels": spliced.labels,
        "unmerged/spliced/attention_mask": (at[None] < spliced.attended[:, None]).astype(int),
    }


@cache
def forward_backward(system: System):
    """(outputs, gradients) of the unmerged form, from one compiled program."""
    golden = Golden(system, "unmerged")
    return loss_and_gradients(golden, *_batch(golden))


@cache
def forward_merged(system: System):
    """Outputs of the merged form."""
    golden = Golden(system, "merged")
    spliced, pools = _batch(golden)
    return jax.jit(lambda flat: golden.run(flat, spliced, pools))(golden.flat)


def merged(system: System) -> dict[str, np.ndarray]:
    return _outputs("merged", Golden(system, "merged"), forward_merged(system))


def _outputs(form: str, golden: Golden, out) -> dict[str, np.ndarray]:
    values = {
        f"{form}/logits": out.logits_BTV,
        f"{form}/logits_sample0": out.logits_BTV[:1],
        f"{form}/final_norm_out": out.decoder.hidden_BTD,
        f"{form}/loss": out.losses["loss_language"],
        **{f"{form}/{name}": value for name, value in out.losses.items()},
        **_router(form, golden, out.decoder.aux),
    }
    for layer, hidden in enumerate(_hidden(golden, out.decoder.layers)):
        values[f"{form}/layer{layer}/hidden_out"] = hidden
    return values


def _hidden(golden: Golden, layers) -> list[np.ndarray]:
    places = where_is(golden.config.decoder.moe_layers())
    return [layers[place.run][place.block].hidden[place.index] for place in places]


def _router(form: str, golden: Golden, aux: MoEAux | None) -> dict[str, np.ndarray]:
    values = {}
    for index, layer in enumerate(np.flatnonzero(golden.config.decoder.moe_layers())):
        logits, expert, weight = (
            np.asarray(field[index]).reshape(-1, field.shape[-1])
            for field in (aux.logits_BTE, aux.expert_BTK, aux.weight_BTK)
        )
        combine = np.zeros_like(logits)
        np.put_along_axis(combine, expert, weight, axis=-1)
        values |= {
            f"{form}/layer{layer}/router_logits": logits,
            f"{form}/layer{layer}/router_logits_returned": logits,
            f"{form}/layer{layer}/selected_experts": expert,
            f"{form}/layer{layer}/combine_weights": combine,
            f"{form}/layer{layer}/l_aux": aux.balance[index],
        }
    return values


def margins(system: System) -> dict[str, np.ndarray]:
    """Smallest distance between the last chosen router logit and the next one, for both forms."""
    found = []
    top_k = Golden(system, "merged").config.decoder.moe.top_k
    for out in (forward_backward(system)[0], forward_merged(system)):
        ordered = -np.sort(-np.asarray(out.decoder.aux.logits_BTE), axis=-1)
        found.append((ordered[..., top_k - 1] - ordered[..., top_k]).min())
    return {"meta/min_topk_margin": np.array(found)}


# -------------------------------------------------------------------------- layer by layer


@contextmanager
def _drawing(noise):
    """Make routers draw this Gumbel noise; None does not change the routers."""
    if noise is None:
        yield
        return
    with mock.patch.object(jax.random, "gumbel", return_value=jnp.asarray(noise)):
        yield


def _stream(golden: Golden):
    spliced, pools = _batch(golden)
    soft = jax.jit(lambda flat: golden.soft_tokens(nest(flat), pools))(golden.flat)
    return golden.stream(nest(golden.flat), spliced, soft), spliced


def layers(system: System) -> dict[str, np.ndarray]:
    """Inputs of the router and outputs of the experts in each block."""
    golden = Golden(system, "unmerged")
    stream, spliced = _stream(golden)
    values = {}
    for layer, (_, aux, seen) in enumerate(golden.layers(stream, spliced, {}, _drawing)):
        if aux is None:
            continue
        values[f"unmerged/layer{layer}/moe_out"] = seen["moe"]["__call__"][0][0]
        router = seen["moe"].get("router", {})
        read = router["modality_map"] if "modality_map" in router else seen["mlp_norm"]
        gate = np.asarray(read["__call__"][0])
        values[f"unmerged/layer{layer}/gate_input"] = gate.reshape(-1, gate.shape[-1])
    return values


def noisy(system: System) -> dict[str, np.ndarray]:
    """Values of routers that draw the second expert with the recorded noise."""
    pattern = re.compile(r"noisy/layer(\d+)/gumbel_noise")
    noise = {int(m[1]): system.expected[k] for k in system.expected if (m := pattern.fullmatch(k))}
    if not noise:
        return {}
    golden = Golden(system, "unmerged")
    stream, spliced = _stream(golden)
    steps = golden.layers(stream, spliced, noise, _drawing)
    aux = jax.tree.map(lambda *a: jnp.stack(a), *(step[1] for step in steps if step[1] is not None))
    logits = golden.head(steps[-1][0])
    return {
        "noisy/logits": logits,
        "noisy/logits_sample0": logits[:1],
        **{f"noisy/{name}": value for name, value in golden.losses(logits, aux, spliced).items()},
        **_router("noisy", golden, aux),
    }


# ------------------------------------------------------------------------------ generation


def generate(system: System) -> dict[str, np.ndarray]:
    """Greedy decoding of the merged form."""
    return greedy(Golden(system, "merged"))


def greedy(golden: Golden) -> dict[str, np.ndarray]:
    """Greedy decoding of the recorded queries by a full forward pass for every token."""
    system = golden.system
    steps = {k: len(v) for k, v in system.expected.items() if k.endswith("/new_tokens")}
    if not steps:
        return {}
    spliced, pools = query_batch(system, golden.config.tokens_per_medium())
    count = max(steps.values())
    wider = [np.pad(getattr(spliced, n), ((0, 0), (0, count))) for n in ("token_id", "modality")]
    slot = np.pad(spliced.slot, ((0, 0), (0, count)), constant_values=-1)
    labels = np.pad(spliced.labels, ((0, 0), (0, count)), constant_values=-100)
    zero = np.pad(spliced.zero, ((0, 0), (0, count)))
    rows, last = np.arange(len(slot)), spliced.attended - 1
    token_id, chosen, logits = wider[0], [], []
    # Attention is causal, so the next token changes no earlier position.
    everything = np.full(len(slot), slot.shape[1])

    soft = jax.jit(lambda flat: golden.soft_tokens(nest(flat), pools))(golden.flat)

    @jax.jit
    def forward(flat, token_id, soft):
        row = Spliced(token_id, wider[1], slot, labels, everything, np.zeros_like(zero))
        return golden.run(flat, row, pools, soft).logits_BTV

    for step in range(count):
        logits.append(np.asarray(forward(golden.flat, token_id, soft))[rows, last + step])
        chosen.append(logits[-1].argmax(-1))
        token_id = token_id.copy()
        token_id[rows, last + step + 1] = chosen[-1]
    logits, chosen = np.stack(logits, axis=1), np.stack(chosen, axis=1)
    best = -np.sort(-logits, axis=-1)
    values = {}
    for number in rows:
        length = steps[f"generate/{number}/new_tokens"]
        values |= {
            f"generate/{number}/new_tokens": chosen[number, :length],
            f"generate/{number}/step_logits": logits[number, :length],
            f"generate/{number}/step_top2_margin": (best[..., 0] - best[..., 1])[number, :length],
        }
    return values


# ------------------------------------------------------------------------------- gradients


def gradients(system: System) -> dict[str, np.ndarray]:
    """Recorded gradient tensors. The encoders are frozen in both recorded runs."""
    all_of = all_gradients(system)
    values = {}
    for key in system.expected:
        match = re.fullmatch(r"grad_(stage3|all)/(.+)", key)
        if match and match[2] in all_of:
            values[key] = all_of[match[2]]
    return values


@cache
def all_gradients(system: System) -> dict[str, np.ndarray]:
    """Recorded name -> gradient in torch layout, for every recorded name."""
    names = set().union(*system.grad_norms.values())
    names |= {k.split("/", 1)[1] for k in system.expected if k.startswith("grad_")}
    _, grads = forward_backward(system)
    return recorded_gradients(Golden(system, "unmerged").resolution, grads, names)


COMPUTE = {
    "encoders": encoders,
    "unmerged": unmerged,
    "merged": merged,
    "margins": margins,
    "layers": layers,
    "noisy": noisy,
    "generate": generate,
    "gradients": gradients,
}
