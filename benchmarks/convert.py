"""Memory and speed of an import: python benchmarks/convert.py [--gib 1] [--files safetensors]

The program makes a sharded checkpoint of random weights in the shape of LLaMA, copies its files
with `cp`, and imports it in a separate process. It prints JSON: seconds, processor seconds and MB/s
of the copy and of the import (both end when the data are on disk), their ratio, and the largest
resident memory of the import.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

LAYERS, VOCAB = 16, 32000
SHARD_BYTES = 1 << 30


def sizes(total: int, itemsize: int) -> tuple[int, int]:
    """Width and feed-forward width of a model of about `total` bytes with LLaMA's proportions."""
    width = 256
    while True:
        hidden = int(width * 2.6875) // 256 * 256
        layer = 4 * width * width + 3 * width * hidden
        if (LAYERS * layer + 2 * VOCAB * width) * itemsize >= total:
            return width, hidden
        width += 256


def shapes(width: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Tensors of LlamaForCausalLM by name: {name: shape}."""
    names = {"model.embed_tokens.weight": (VOCAB, width), "lm_head.weight": (VOCAB, width)}
    names["model.norm.weight"] = (width,)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for part in "qkvo":
            names[f"{prefix}self_attn.{part}_proj.weight"] = (width, width)
        names[f"{prefix}mlp.gate_proj.weight"] = (hidden, width)
        names[f"{prefix}mlp.up_proj.weight"] = (hidden, width)
        names[f"{prefix}mlp.down_proj.weight"] = (width, hidden)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            names[f"{prefix}{norm}.weight"] = (width,)
    return names


def make(folder: Path, total: int, dtype: np.dtype, kind: str) -> int:
    """Write the checkpoint to `folder` and return its size in bytes."""
    from unimoe_jax.convert import exporting
    from unimoe_jax.convert.exporting import Piece

    width, hidden = sizes(total, dtype.itemsize)
    # Every tensor is cut from one block of noise at another offset, because drawing 8 GB of random
    # numbers would take longer than the test.
    noise = np.random.default_rng(0).standard_normal(1 << 22, np.float32).astype(dtype)

    def reader(shape: tuple[int, ...], seed: int):
        def read() -> np.ndarray:
            count = int(np.prod(shape))
            return np.resize(np.roll(noise, seed), count).reshape(shape)

        return read

    pieces = [
        Piece(name, shape, dtype.name, reader(shape, seed))
        for seed, (name, shape) in enumerate(shapes(width, hidden).items())
    ]
    exporting.SHARD_BYTES = SHARD_BYTES
    exporting.write_file(folder / "WEIGHTS", pieces, kind, lambda line: None, None)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // 128,
        "rms_norm_eps": 1e-5,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return sum(piece.nbytes for piece in pieces)


def to_disk(path: Path) -> None:
    """Wait until the data of a file are on disk and not only in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def processor() -> float:
    """Processor seconds that finished child processes have used, user and system together."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Run a command; return the seconds until its files are on disk, and its processor seconds."""
    before, start = processor(), time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    used = processor() - before
    # Wait for all files at the same time: one after the other, many files would take longer.
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(to_disk, [path for path in folder.rglob("*") if path.is_file()]))
    return time.perf_counter() - start, used


def main() -> None:
    """Make the checkpoint, copy and import it, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--files", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--folder", help="where to work; default: a temporary folder")
    args = parser.parse_args()
    dtype = np.dtype(getattr(ml_dtypes, args.dtype, args.dtype))
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        root = Path(name)
        size = make(root / "source", int(args.gib * 2**30), dtype, args.files)
        os.sync()  # so that writing the source back does not slow the copy down
        (root / "copy").mkdir()
        copied, copied_cpu = timed(
            ["cp", "-r", str(root / "source"), str(root / "copy")], root / "copy"
        )
        subprocess.run(["rm", "-r", str(root / "copy")], check=True)
        os.sync()
        command = [sys.executable, "-m", "unimoe_jax.convert", "import"]
        command += ["--from", str(root / "source"), "--to", str(root / "target")]
        converted, converted_cpu = timed(command, root / "target")
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    result = {
        "bytes": size,
        "cp_seconds": round(copied, 2),
        "cp_cpu_seconds": round(copied_cpu, 2),
        "cp_MB_s": round(size / copied / 1e6),
        "import_seconds": round(converted, 2),
        "import_cpu_seconds": round(converted_cpu, 2),
        "import_MB_s": round(size / converted / 1e6),
        "share_of_cp": round(copied / converted, 3),
        "peak_resident_bytes": peak,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
