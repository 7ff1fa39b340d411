"""A program for tests: several processes save a result together and start a stage from it.

    python -m tests.stages.start_worker FOLDER --coordinator HOST:PORT --processes N --process I

Every process prints JSON with three numbers of bytes for every parameter: how many it has read from
files, how many its devices hold (a part on several devices counts once), and the whole size.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax
import numpy as np
import tensorstore as ts

from unimoe_jax.checkpoints.final import open_source, save_final
from unimoe_jax.checkpoints.origins import start_of
from unimoe_jax.config import MeshConfig, Take
from unimoe_jax.parallel import distributed
from unimoe_jax.parallel.placement import place
from unimoe_jax.parallel.sharding import make_mesh, param_sharding, use_mesh
from unimoe_jax.stages.initial_params import read_start

EXPERTS = "decoder/run_0/block_0/moe/experts/up_proj/kernel"
# Parameters that are saved: path -> shape and logical axes.
SAVED = {
    EXPERTS: ((2, 4, 128, 64), ("layers", "expert", "expert_embed", "mlp")),
    "embed/embedding": ((512, 128), ("vocab", "embed")),
    "vision/connector/fc1/kernel": ((128, 256), ("embed", "mlp")),
}
# A parameter that is started by copying a dense layer to every expert.
COPIED = "vision/connector/moe/experts/fc1/kernel"
STARTED = {**SAVED, COPIED: ((4, 128, 256), ("expert", "expert_embed", "mlp"))}
NAME = "before"


def values() -> dict[str, np.ndarray]:
    """The saved parameters as whole arrays, the same on every process."""
    generator = np.random.default_rng(0)
    return {
        path: generator.standard_normal(shape, np.float32) for path, (shape, _) in SAVED.items()
    }


def bytes_read() -> int:
    """Number of bytes that this process has read from files so far."""
    metrics = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])


def main(arguments: list[str] | None = None) -> int:
    """Join the other processes, print the report, and return the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    distributed.add_arguments(parser)
    args = parser.parse_args(arguments)
    distributed.initialize(args)
    mesh = make_mesh(MeshConfig(data=1, fsdp=jax.process_count(), expert=-1))
    with use_mesh(mesh):
        print(json.dumps(save_and_start(mesh, args.folder)), flush=True)
    return 0


def save_and_start(mesh: jax.sharding.Mesh, folder: Path) -> dict[str, dict[str, int]]:
    """Save the result, start from it, and compare every value; return the numbers of bytes."""
    shardings = {
        path: param_sharding(mesh, path, shape, axes) for path, (shape, axes) in STARTED.items()
    }
    known = values()
    manifest = {
        "shapes": {path: list(value.shape) for path, value in known.items()},
        "moe_layers": [True, True],
    }
    save_final(
        folder, {path: place(value, shardings[path]) for path, value in known.items()}, manifest
    )
    source = open_source(NAME, folder)
    source.check()
    known[COPIED] = np.stack([known["vision/connector/fc1/kernel"]] * 4)
    report = {}
    for path, (shape, _) in STARTED.items():
        origin = {"upcycle": NAME} if path == COPIED else {"source": NAME}
        start = start_of(path, shape, Take(match=".*", **origin), {NAME: source}, (True, True))
        before, parts = bytes_read(), {}
        array = read_start(start, "float32", shardings[path])
        read = bytes_read() - before
        for part in array.addressable_shards:
            np.testing.assert_array_equal(part.data, known[path][part.index])
            parts[str(part.index)] = part.data.nbytes  # copies have the same index
        report[path] = {"read": read, "held": sum(parts.values()), "whole": known[path].nbytes}
    return report


if __name__ == "__main__":
    sys.exit(main())
