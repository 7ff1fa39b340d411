"""Verify that two checkpoints are equal: their parameters and their logits."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from unimoe_jax.checkpoints.locate import is_checkpoint
from unimoe_jax.config import ModelConfig
from unimoe_jax.convert.inspecting import chunks
from unimoe_jax.convert.opening import Checkpoint
from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.data.batch import Batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params.paths import nest

ROWS, LENGTH, TOP = 2, 32, 5
TEXT_PARTS = ("embed/", "decoder/", "lm_head/")


def text_batch(vocab_size: int) -> Batch:
    """Random ids, one segment per row."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (ROWS, LENGTH)).astype(np.int32)
    zeros = np.zeros_like(ids)
    position = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    return Batch(ids, zeros, zeros.astype(np.float32), zeros + 1, position, zeros, zeros - 1)


def logits_in_jax(checkpoint: Checkpoint, batch: Batch) -> np.ndarray:
    """Text logits [B,T,V] of a checkpoint with a decoder, float32."""
    config = {
        key: checkpoint.config[key] for key in ("decoder", "lora") if key in checkpoint.config
    }
    model_config = ModelConfig.model_validate(config)
    params = {
        path: jnp.asarray(parameter.read(()), jnp.float32)
        for path, parameter in checkpoint.params.items()
        if path.startswith(TEXT_PARTS)
    }
    model = UniMoE(model_config, LayerOptions(lora=model_config.lora))
    with jax.default_matmul_precision("highest"):
        return np.asarray(model.apply({"params": nest(params)}, batch).logits_BTV)


def logits_in_torch(checkpoint: Checkpoint, batch: Batch) -> np.ndarray | None:
    """The same from the transformers class, where torch and the class exist."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    folder = checkpoint.manifest["parents"].get("decoder")
    if folder is None:  # no class of transformers reads it
        return None
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model.config, "num_local_experts") and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # torch's grouped product refuses most widths
    with torch.no_grad():
        return model.eval()(torch.from_numpy(batch.token_id_BT).long()).logits.numpy()


def compare_logits(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Lines with the largest difference, KL divergence and top-k agreement of text logits.

    Raises:
        ConvertError: the decoders' vocabularies differ.
    """
    sizes = {c.config["decoder"]["vocab_size"] for c in (a, b) if "decoder" in c.config}
    if not all("decoder" in checkpoint.config for checkpoint in (a, b)):
        yield "logits: not compared, one of them has no decoder"
        return
    if len(sizes) > 1:
        raise ConvertError(f"the vocabularies differ: {sorted(sizes)}")
    batch = text_batch(sizes.pop())
    found = []
    for checkpoint in (a, b):
        logits = None
        if not is_checkpoint(checkpoint.path):
            logits = logits_in_torch(checkpoint, batch)
        yield f"logits of {checkpoint.path}: {'JAX' if logits is None else 'transformers'}"
        found.append(logits_in_jax(checkpoint, batch) if logits is None else logits)
    yield describe(*found)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def describe(a: np.ndarray, b: np.ndarray) -> str:
    """Largest difference, mean KL(a ‖ b), and how often the top-k sets agree."""
    log_a, log_b = (_log_softmax(x.astype(np.float64)) for x in (a, b))
    kl = float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean())
    top = [np.sort(np.argsort(-x, axis=-1)[..., :TOP], axis=-1) for x in (a, b)]
    agree = float((top[0] == top[1]).all(-1).mean())
    worst = float(np.abs(a - b).max())
    return f"logits: largest difference {worst:.3g}, KL {kl:.3g}, top-{TOP} agreement {agree:.1%}"


def compare(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """One line per difference; nothing when both hold the same numbers under the same paths."""
    for path in sorted(set(a.params) | set(b.params)):
        if path not in a.params or path not in b.params:
            yield f"{path}: only in {a.path if path in a.params else b.path}"
            continue
        left, right = a.params[path], b.params[path]
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            yield f"{path}: {left.shape} {left.dtype} against {right.shape} {right.dtype}"
        if left.shape != right.shape:
            continue
        worst = 0.0
        for index in chunks(left):
            x, y = (p.read(index) for p in (left, right))
            if x.dtype == y.dtype and x.tobytes() == y.tobytes():
                continue
            difference = np.abs(x.astype(np.float64) - y.astype(np.float64))
            worst = max(worst, float(np.nan_to_num(difference, nan=np.inf).max()))
        if worst:
            yield f"{path}: largest difference {worst:.3g}"
