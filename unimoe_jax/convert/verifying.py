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
from unimoe_jax.convert.opening import Checkpoint, Parameter
from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.data.batch import Batch
from unimoe_jax.models.unimoe import UniMoE
from unimoe_jax.nn.linear import LayerOptions
from unimoe_jax.params.paths import nest

ROWS, LENGTH = 2, 32
"""Size of the batch of random text for which logits are compared."""
TOP = 5
"""Number of the most likely tokens that are compared at every position."""
TEXT_PARTS = ("embed/", "decoder/", "lm_head/")


def text_batch(vocab_size: int) -> Batch:
    """A batch of random token ids [ROWS, LENGTH] without media, one segment per row."""
    ids = np.random.default_rng(0).integers(0, vocab_size, (ROWS, LENGTH)).astype(np.int32)
    zeros = np.zeros_like(ids)
    position = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    return Batch(
        token_id_BT=ids,
        target_BT=zeros,
        weight_BT=zeros.astype(np.float32),
        segment_BT=zeros + 1,
        position_BT=position,
        modality_BT=zeros,
        slot_BT=zeros - 1,  # -1: the position reads no media
    )


def logits_in_jax(checkpoint: Checkpoint, batch: Batch) -> np.ndarray:
    """Text logits [B, T, V] in float32 of a checkpoint with a decoder, computed by this package."""
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
    # Other precisions would round products on accelerators and hide small differences.
    with jax.default_matmul_precision("highest"):
        output: Any = model.apply({"params": nest(params)}, batch)
        return np.asarray(output.logits_BTV)


def logits_in_torch(checkpoint: Checkpoint, batch: Batch) -> np.ndarray | None:
    """Text logits [B, T, V] in float32 of a PyTorch folder, computed by transformers.

    Returns None if torch is not installed or the folder has no decoder that transformers can read.
    """
    if importlib.util.find_spec("torch") is None:
        return None
    import torch
    from transformers import AutoModelForCausalLM

    folder = checkpoint.manifest["parents"].get("decoder")
    if folder is None:  # a family whose decoder transformers has no class for
        return None
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if hasattr(model.config, "num_local_experts") and hasattr(model, "set_experts_implementation"):
        # torch's grouped product of matrices refuses most widths.
        model.set_experts_implementation("eager")
    with torch.no_grad():
        return model.eval()(torch.from_numpy(batch.token_id_BT).long()).logits.numpy()


def compare_logits(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Yield which program computed the logits of each checkpoint, then how much they differ.

    transformers computes the logits of PyTorch folders, if it can; this package computes the rest.

    Raises:
        ConvertError: the vocabularies of the decoders differ.
    """
    if not all("decoder" in checkpoint.config for checkpoint in (a, b)):
        yield "logits: not compared, because at least one checkpoint has no decoder"
        return
    sizes = {checkpoint.config["decoder"]["vocab_size"] for checkpoint in (a, b)}
    if len(sizes) > 1:
        raise ConvertError(f"the vocabularies differ: {sorted(sizes)}")
    batch = text_batch(sizes.pop())
    all_logits = []
    for checkpoint in (a, b):
        logits = None
        if not is_checkpoint(checkpoint.path):
            logits = logits_in_torch(checkpoint, batch)
        yield f"logits of {checkpoint.path}: {'JAX' if logits is None else 'transformers'}"
        all_logits.append(logits_in_jax(checkpoint, batch) if logits is None else logits)
    yield describe(*all_logits)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    # Subtracting the maximum keeps exp() finite and cancels in the result.
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def describe(a: np.ndarray, b: np.ndarray) -> str:
    """Describe how far logits [B, T, V] differ.

    The line has the largest difference, the mean of KL(a ‖ b) over positions, and the share of
    positions at which both have the same set of the TOP most likely tokens.
    """
    log_a, log_b = (_log_softmax(logits.astype(np.float64)) for logits in (a, b))
    kl = float((np.exp(log_a) * (log_a - log_b)).sum(-1).mean())
    top_a, top_b = (np.sort(np.argsort(-logits, axis=-1)[..., :TOP], axis=-1) for logits in (a, b))
    agreement = float((top_a == top_b).all(-1).mean())
    largest = float(np.abs(a - b).max())
    return (
        f"logits: largest difference {largest:.3g}, KL {kl:.3g}, "
        f"top-{TOP} agreement {agreement:.1%}"
    )


def compare(a: Checkpoint, b: Checkpoint) -> Iterator[str]:
    """Compare parameters: yield one line per difference, and nothing if all are equal.

    Equal means the same paths, shapes, dtypes and numbers.
    """
    for path in sorted(set(a.params) | set(b.params)):
        if path not in a.params or path not in b.params:
            yield f"{path}: only in {a.path if path in a.params else b.path}"
            continue
        left, right = a.params[path], b.params[path]
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            yield f"{path}: {left.shape} {left.dtype} against {right.shape} {right.dtype}"
        if left.shape != right.shape:
            continue
        largest = _largest_difference(left, right)
        if largest:
            yield f"{path}: largest difference {largest:.3g}"


def _largest_difference(a: Parameter, b: Parameter) -> float:
    """Largest difference of two parameters of the same shape, read one matrix at a time.

    A matrix with a NaN counts as infinitely different, unless both sides have the same bits.
    """
    largest = 0.0
    for index in chunks(a):
        x, y = a.read(index), b.read(index)
        if x.dtype == y.dtype and x.tobytes() == y.tobytes():
            continue
        difference = np.abs(x.astype(np.float64) - y.astype(np.float64))
        largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max()))
    return largest
