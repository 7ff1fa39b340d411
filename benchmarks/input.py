"""Speed of the input pipeline alone, and how much of a batch is padding.

    python benchmarks/input.py [--samples 600] [--output FILE]

The benchmark reads the embedded data set with the settings of configs/run/tiny.yaml: JSON, image,
sound and video files go in, packed batches come out, and nothing is trained. Padding is also
computed for made-up samples with the lengths of instruction data, in rows as long as those of the
published runs. The ways of reading take turns several times, so that a machine that changes its
speed changes it for all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import common
import numpy as np

from unimoe_jax.config import LoaderConfig, RunConfig
from unimoe_jax.config.load import load_config
from unimoe_jax.config.media import MEDIA
from unimoe_jax.config.stage_settings import resolve_stage
from unimoe_jax.data.pipeline import Pipeline
from unimoe_jax.data.plan import BatchPlan, Samples
from unimoe_jax.data.sources import load_tokenizer, resolve_sources
from unimoe_jax.stages.data import stage_pipeline

# Ways of reading that are compared: name -> settings of the loader.
WAYS = {
    "1 thread": {"threads": 1, "workers": 0},
    "2 threads": {"threads": 2, "workers": 0},
    "4 threads": {"threads": 4, "workers": 0},
    "1 process": {"threads": 1, "workers": 1},
    "2 processes": {"threads": 1, "workers": 2},
}

# Ways of making batches whose padding is compared.
BATCHES = {
    "by modality": {"group_by_modality": True},
    "by modality, one row of 2048": {"group_by_modality": True, "row_length": 2048, "rows": 1},
    "mixed": {"group_by_modality": False},
    "one sample per row": {"group_by_modality": True, "packing": False},
}


def pipeline_for(run: RunConfig, stage_name: str, **changes) -> Pipeline:
    """The pipeline of a stage with other loader settings, on one data shard."""
    stage = next(stage for stage in run.stages if stage.name == stage_name)
    loader = resolve_stage(run, stage).loader.model_copy(update=changes)
    LoaderConfig.model_validate(loader.model_dump())  # model_copy does not check its changes
    data = resolve_sources(run.data)
    tokenizer, _ = load_tokenizer(run)
    changed = stage.model_copy(update={"loader": loader})
    return stage_pipeline(resolve_stage(run, changed), data, tokenizer, 1)


def samples_in(pipeline: Pipeline, step: int) -> int:
    """Number of samples in the batch of a step."""
    _, rows, epoch = pipeline.plan.batch(step)
    return sum(len(epoch.row(row)) for row in rows.tolist() if row >= 0)  # -1 is an empty row


def samples_per_s(pipeline: Pipeline, samples: int, start: int) -> tuple[float, int]:
    """Samples per second over at least `samples` samples from step `start`, and the next step.

    The first batches are not counted, because threads or processes start and read ahead meanwhile.
    """
    loader = pipeline.loader
    warmup = 2 * (loader.threads + loader.workers + loader.prefetch)
    counted, started, step = 0, 0.0, start
    batches = pipeline.batches(start_step=start)
    try:
        for step, _, _ in batches:
            if step == start + warmup:
                started = time.perf_counter()
            elif step > start + warmup:
                counted += samples_in(pipeline, step)
                if counted >= samples:
                    break
        seconds = time.perf_counter() - started
    finally:
        batches.close()
    return counted / seconds, step + 1


def reading_cost(pipeline: Pipeline, number: int) -> dict[str, float]:
    """Milliseconds to read one sample of each source, the median of samples read one by one."""
    costs = {}
    for position, name in enumerate(pipeline.names):
        reader, index = pipeline.readers[position], pipeline.indices[position]
        times = []
        for record in range(min(number, len(reader))):
            started = time.perf_counter()
            reader.load(record, index.size(record))
            times.append(time.perf_counter() - started)
        costs[name] = round(1000 * statistics.median(times), 2)
    return costs


def padding(run: RunConfig, stage: str) -> dict[str, dict[str, float]]:
    """Share of an epoch that is padding, in rows and in every pool, for each way of batching."""
    shares = {}
    for batching, changes in BATCHES.items():
        padding_shares = pipeline_for(run, stage, **changes).padding()
        shares[batching] = {name: round(share, 4) for name, share in padding_shares.items()}
    return shares


def long_samples(number: int, longest: int) -> Samples:
    """Made-up samples, cut to `longest` positions.

    A fifth are text alone, half have an image of 576 positions, a tenth have a video and speech,
    and a fifth have speech. The text is log-normal around 120 tokens.
    """
    random = np.random.default_rng(0)
    text = common.text_lengths(random, number, 1500)
    kind = random.choice(4, number, p=[0.2, 0.5, 0.1, 0.2])
    speech = np.where(kind >= 2, random.geometric(0.6, number).clip(1, 8), 0)
    entries = np.zeros((number, len(MEDIA)), np.int64)
    for name, column in (("image", kind == 1), ("video", kind == 2), ("speech", speech)):
        entries[:, MEDIA.index(name)] = column
    tokens = text + 576 * ((kind == 1) | (kind == 2)) + 50 * speech
    source, record = np.zeros(number, np.int64), np.arange(number)
    return Samples(source, record, tokens.clip(max=longest), entries, ("made up",), (1.0,))


def long_padding(number: int = 20_000) -> dict[str, dict[str, float]]:
    """Share of the positions of an epoch that are padding, by row length and way of batching."""
    shares: dict[str, dict[str, float]] = {}
    for length in (2048, 4096):
        samples = long_samples(number, length)
        for batching, grouped in (("by modality", True), ("mixed", False)):
            loader = LoaderConfig(row_length=length, rows=16, group_by_modality=grouped)
            positions = BatchPlan(samples, loader, 0, 4, True).epoch(0).batches.size * length
            share = 1 - float(samples.tokens.sum()) / positions
            shares.setdefault(f"rows of {length}", {})[batching] = round(share, 4)
    return shares


def main() -> None:
    """Compute the padding, measure the ways of reading in turns, and save the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=600, help="samples in each turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each way of reading")
    parser.add_argument(
        "--stages", nargs="+", default=["base", "tune"], help="stages whose padding is computed"
    )
    parser.add_argument(
        "--output", type=Path, default=common.ROOT / "benchmarks/results/input.json"
    )
    args = parser.parse_args()
    run = load_config(common.ROOT / common.RUN_FILES["tiny"])
    result = {"machine": common.machine(), "padding": {}}
    for stage in args.stages:
        result["padding"][stage] = shares = padding(run, stage)
        for batching, values in shares.items():
            text = ", ".join(f"{name} {share:.1%}" for name, share in values.items())
            print(f"{stage}: padding, {batching}: {text}")
    result["padding"]["long samples"] = long_padding()
    print(f"padding, long samples: {result['padding']['long samples']}")
    pipelines = {way: pipeline_for(run, "tune", **changes) for way, changes in WAYS.items()}
    speeds: dict[str, list[float]] = {way: [] for way in WAYS}
    starts = dict.fromkeys(WAYS, 0)
    for _ in range(args.rounds):
        for way, pipeline in pipelines.items():
            # Every turn goes on where the last turn of this way has ended.
            speed, starts[way] = samples_per_s(pipeline, args.samples, starts[way])
            speeds[way].append(speed)
    result["samples_per_s"] = {way: round(statistics.median(s), 1) for way, s in speeds.items()}
    result["milliseconds_per_sample"] = reading_cost(pipelines["1 thread"], 40)
    for way, speed in result["samples_per_s"].items():
        print(f"{way}: {speed:,.0f} samples/s")
    print(f"milliseconds to read one sample: {result['milliseconds_per_sample']}")
    common.save(args.output, result)
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
