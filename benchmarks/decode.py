"""Generation speed beside PyTorch's `generate` of transformers: same weights, machine and run.

    python benchmarks/decode.py [--size small] [--batches 1 8 32] [--rounds 3] [--output FILE]

The benchmark runs the decoder alone: random prompts of one length, greedy decoding, no end token.
Two processes, one per side, take turns (A B A B …) while the other one waits, so that a machine
that changes its speed changes it for both. Before that, both sides compute the logits of one
prompt, and the logits must agree. The PyTorch side is `MixtralForCausalLM`, which has the same
layers. Compilation is reported, but not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import numpy as np

SIDES = ("jax", "torch")
TOLERANCE = 1e-3
PROMPT, NEW = 128, 64


def prepare(folder: Path, size: str) -> dict:
    """Write random weights and settings of the decoder to `folder`; return `bytes_per_token`."""
    from unimoe_jax.config import ModelConfig
    from unimoe_jax.config.load import load_config
    from unimoe_jax.models.declare import full_batch
    from unimoe_jax.models.unimoe import UniMoE
    from unimoe_jax.nn.linear import LayerOptions
    from unimoe_jax.params.table import declared

    run = load_config(common.ROOT / common.RUN_FILES[size])
    config = ModelConfig(decoder=run.model.decoder)
    random = np.random.default_rng(0)
    arrays = {}
    for path, (shape, _) in declared(UniMoE(config, LayerOptions()), full_batch(config)).items():
        is_scale = path.endswith("/scale")
        arrays[path] = (
            np.ones(shape, np.float32)
            if is_scale
            else random.standard_normal(shape, np.float32) / np.sqrt(shape[-2])
        )
    np.savez(folder / "params.npz", **arrays)
    (folder / "model.json").write_text(config.model_dump_json())
    return bytes_per_token(config.decoder)


def bytes_per_token(decoder) -> dict:
    """Bytes in float32 that one token reads at batch 1: {weights, cache}.

    Only the chosen experts count. The cache holds the prompt and half of the new tokens, which is
    its mean length.
    """
    width, size = decoder.hidden_size, decoder.head_size
    attention = width * size * (2 * decoder.num_heads + 2 * decoder.num_kv_heads)
    expert = 3 * width * decoder.mlp_dim
    total = decoder.vocab_size * width + width
    for is_moe in decoder.moe_layers():
        total += attention + 2 * width
        total += expert * decoder.moe.top_k + width * decoder.moe.num_experts if is_moe else expert
    cache = 2 * decoder.num_layers * decoder.num_kv_heads * size * (PROMPT + NEW // 2)
    return {"weights": 4 * total, "cache": 4 * cache}


def bandwidth() -> float:
    """Bytes per second that all cores together read from memory: the best of several passes."""
    cores = len(os.sched_getaffinity(0))
    parts = [np.ones(2**27 // cores, np.float32) for _ in range(cores)]  # 512 MiB together
    best = 0.0
    with ThreadPoolExecutor(cores) as pool:
        for _ in range(7):
            started = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            seconds = time.perf_counter() - started
            best = max(best, sum(part.nbytes for part in parts) / seconds)
    return best


# -------------------------------------------------------------------------------- the sides


def prompts(vocabulary: int, batch: int) -> np.ndarray:
    """Random token ids [batch, PROMPT], the same on both sides."""
    return np.random.default_rng(batch).integers(3, vocabulary, (batch, PROMPT), dtype=np.int32)


def jax_side(folder: Path, precision: str):
    """Build the engine of this package.

    Returns three functions: logits of one prompt; measure(batch), the seconds to the first tokens
    and to all tokens; and the seconds that compilation has taken so far.
    """
    import jax
    import jax.numpy as jnp

    from unimoe_jax.config import MeshConfig, ModelConfig
    from unimoe_jax.generate.engine.decoding_programs import DecodingPrograms
    from unimoe_jax.generate.engine.engine import Engine
    from unimoe_jax.generate.engine.program_cache import ProgramCache
    from unimoe_jax.generate.engine.sequence import Sequence
    from unimoe_jax.generate.engine.settings import Sampling
    from unimoe_jax.generate.loader import logical_axes
    from unimoe_jax.models.inference_decoder import InferenceDecoder, inference_weights
    from unimoe_jax.parallel.sharding import make_mesh

    config = ModelConfig.model_validate_json((folder / "model.json").read_text())
    dtype = jnp.dtype(precision)
    with np.load(folder / "params.npz") as arrays:
        params = dict(arrays)

    def place(path, value, names):
        del names
        # Routers keep float32 whatever the precision of the other weights is.
        return jnp.asarray(value, "float32" if "/router/" in path else dtype)

    weights = inference_weights(config.decoder, params, logical_axes(config), "separate", place)
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    decoder, keep_logits = InferenceDecoder(config.decoder, dtype), frozenset({"logits"})
    program_cache = ProgramCache(mesh)
    engine = Engine(DecodingPrograms(decoder, weights, program_cache, eos=()))
    traced = Engine(DecodingPrograms(decoder, weights, ProgramCache(mesh), (), keep_logits))
    soft = np.zeros((0, config.decoder.hidden_size), dtype)

    def sequences(batch: int, new: int) -> list[Sequence]:
        sampling = Sampling(max_new_tokens=new).checked()
        ids = prompts(config.decoder.vocab_size, batch)
        return [Sequence(row, 0 * row, 0 * row - 1, soft, sampling) for row in ids]

    def logits() -> np.ndarray:
        batch = sequences(1, 4)
        list(traced.run(batch, 1, greedy=True))
        return np.stack(batch[0].logits)

    def measure(batch: int) -> tuple[float, float]:
        batch_sequences = sequences(batch, NEW)
        started = time.perf_counter()
        running = engine.run(batch_sequences, batch, greedy=True)
        # Prompts are read in groups, so the first tokens do not all come in the same step.
        while not all(sequence.tokens for sequence in batch_sequences):
            next(running)
        first = time.perf_counter() - started
        for _ in running:
            pass
        assert all(len(sequence.tokens) == NEW for sequence in batch_sequences)
        return first, time.perf_counter() - started

    return logits, measure, lambda: sum(program_cache.compiled.values())


class Clock:
    """A streamer for transformers that records when tokens come; it receives the prompt first."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value) -> None:
        del value
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def torch_side(folder: Path, precision: str, experts: str | None):
    """Build the PyTorch model; returns the same three functions as `jax_side`.

    experts: the experts implementation of transformers, or None for its default.
    """
    import torch
    from transformers import MixtralForCausalLM

    config = json.loads((folder / "model.json").read_text())["decoder"]
    model = MixtralForCausalLM(mixtral_config(config)).eval()
    if experts:
        model.config._experts_implementation = experts
    with np.load(folder / "params.npz") as arrays:
        load_mixtral(model, dict(arrays), config)
    model = model.to(getattr(torch, precision))

    def generate(batch: int, new: int, **more):
        ids = torch.from_numpy(prompts(config["vocab_size"], batch)).long()
        with torch.inference_mode():
            return model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new,
                min_new_tokens=new,
                **more,
            )

    def logits() -> np.ndarray:
        out = generate(1, 4, output_logits=True, return_dict_in_generate=True)
        return torch.cat(out.logits).float().numpy()

    def measure(batch: int) -> tuple[float, float]:
        started = time.perf_counter()
        if batch == 1:
            # times[0] belongs to the prompt, so times[1] is the first new token.
            clock = Clock()
            generate(batch, NEW, streamer=clock)
            return clock.times[1] - started, time.perf_counter() - started
        # Without a streamer, a separate run for one token gives the time of the first tokens.
        generate(batch, 1)
        first = time.perf_counter() - started
        started = time.perf_counter()
        generate(batch, NEW)
        return first, time.perf_counter() - started

    return logits, measure, lambda: 0.0


def mixtral_config(decoder: dict):
    """The settings of the decoder under the names of transformers."""
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=decoder["vocab_size"],
        hidden_size=decoder["hidden_size"],
        intermediate_size=decoder["mlp_dim"],
        num_hidden_layers=decoder["num_layers"],
        num_attention_heads=decoder["num_heads"],
        num_key_value_heads=decoder["num_kv_heads"],
        head_dim=decoder["head_dim"],
        num_local_experts=decoder["moe"]["num_experts"],
        num_experts_per_tok=decoder["moe"]["top_k"],
        max_position_embeddings=decoder["max_positions"],
        rms_norm_eps=decoder["norm_eps"],
        rope_theta=decoder["rope_theta"],
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )


def load_mixtral(model, params: dict[str, np.ndarray], decoder: dict) -> None:
    """Load the parameters of this package into the modules of transformers, without a gap.

    Every layer of the decoder must have experts.
    """
    import torch

    stacked = "decoder/run_0/block_0/"
    state = {
        "model.embed_tokens.weight": params["embed/embedding"],
        "model.norm.weight": params["decoder/final_norm/scale"],
        "lm_head.weight": params["lm_head/kernel"].T,
    }
    for layer in range(decoder["num_layers"]):
        weights = {
            path.removeprefix(stacked): value[layer]
            for path, value in params.items()
            if path.startswith(stacked)
        }
        to = f"model.layers.{layer}."
        state[to + "input_layernorm.weight"] = weights["attention_norm/scale"]
        state[to + "post_attention_layernorm.weight"] = weights["mlp_norm/scale"]
        for name in "qkvo":
            state[f"{to}self_attn.{name}_proj.weight"] = weights[f"attention/{name}_proj/kernel"].T
        state[to + "mlp.gate.weight"] = weights["moe/router/linear/kernel"].T
        gate, up, down = (
            weights[f"moe/experts/{name}_proj/kernel"].swapaxes(1, 2)
            for name in ("gate", "up", "down")
        )
        state[to + "mlp.experts.gate_up_proj"] = np.concatenate([gate, up], axis=1)
        state[to + "mlp.experts.down_proj"] = down
    tensors = {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in state.items()}
    model.load_state_dict(tensors, strict=True)


def serve_side(args: argparse.Namespace) -> None:
    """Run one side as a child process: it reads batch sizes from stdin, one per line.

    It answers every line with a line of JSON: seconds to the first tokens, and tokens per second
    after them.
    """
    folder = Path(args.folder)
    if args.side == "jax":
        logits, measure, compiled = jax_side(folder, args.precision)
    else:
        logits, measure, compiled = torch_side(folder, args.precision, args.torch_experts)
    np.save(folder / f"{args.side}.npy", logits())
    # Warm up: the first run of a batch size compiles its programs.
    for batch in args.batches:
        measure(batch)
    print(json.dumps({"compile_seconds": compiled()}), flush=True)
    for line in sys.stdin:
        batch = int(line)
        first, total = measure(batch)
        rate = batch * (NEW - 1) / (total - first)
        print(json.dumps({"first": first, "tokens_per_s": rate}), flush=True)


# ------------------------------------------------------------------------------ the program


def main() -> None:
    """Print a line for every case and write the result."""
    top = argparse.ArgumentParser(description=__doc__)
    top.add_argument("--size", choices=sorted(common.RUN_FILES), default="small")
    top.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    top.add_argument("--rounds", type=int, default=3)
    top.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    top.add_argument(
        "--torch-experts",
        help="experts implementation of transformers; default: the choice of transformers",
    )
    top.add_argument("--output", type=Path)
    top.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    top.add_argument("--folder", help=argparse.SUPPRESS)
    args = top.parse_args()
    if args.side:
        serve_side(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        result = compare(args, Path(folder))
    name = f"decode_{args.size}_{args.precision}.json"
    common.save(args.output or common.ROOT / "benchmarks/results" / name, result)


def compare(args: argparse.Namespace, folder: Path) -> dict:
    """Start both sides, check that they agree, and measure every batch size in turns."""
    needed = prepare(folder, args.size)  # counted in float32
    width = 4 if args.precision == "float32" else 2
    needed = {name: size * width // 4 for name, size in needed.items()}
    result = {"machine": common.machine(), "prompt": PROMPT, "new_tokens": NEW, "cases": []}
    result |= {"precision": args.precision, "bytes_per_token": needed}
    command = [sys.executable, __file__, "--folder", str(folder), "--precision", args.precision]
    command += ["--batches", *map(str, args.batches)]
    command += ["--torch-experts", args.torch_experts] if args.torch_experts else []
    pipe = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = {side: subprocess.Popen([*command, "--side", side], **pipe) for side in SIDES}
    try:
        for side, child in children.items():
            result[f"{side}_start"] = answer(child)
        check(folder, args.precision)
        result["bandwidth_bytes_per_s"] = bandwidth()
        for batch in args.batches:
            result["cases"].append(case(children, batch, args.rounds, result))
    finally:
        for child in children.values():
            child.stdin.close()
            child.wait()
    return result


def answer(child: subprocess.Popen) -> dict:
    """Read the next line of a child process."""
    line = child.stdout.readline()
    if not line:
        sys.exit("one side ended without an answer; see its error message above")
    return json.loads(line)


def check(folder: Path, precision: str) -> None:
    """Exit unless both sides have computed the same logits."""
    ours, theirs = (np.load(folder / f"{side}.npy") for side in SIDES)
    worst = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    limit = TOLERANCE if precision == "float32" else 0.1
    print(f"logits differ by at most {worst:.1e} of the largest logit")
    if worst > limit:
        sys.exit(f"the two sides do not compute the same logits: {worst:.1e} is more than {limit}")


def case(children: dict, batch: int, rounds: int, result: dict) -> dict:
    """Measure one batch size in turns and print the medians over the turns."""
    turns: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(rounds):
        for side, child in children.items():
            child.stdin.write(f"{batch}\n")
            child.stdin.flush()
            turns[side].append(answer(child))
    pairs = zip(turns["jax"], turns["torch"], strict=True)
    ratios = [ours["tokens_per_s"] / theirs["tokens_per_s"] for ours, theirs in pairs]
    medians = {"batch": batch, "ratio": statistics.median(ratios), "turns": turns}
    for side in SIDES:
        for name in ("first", "tokens_per_s"):
            medians[f"{side}_{name}"] = statistics.median(turn[name] for turn in turns[side])
    if batch == 1:
        needed = sum(result["bytes_per_token"].values())
        medians["bandwidth_share"] = (
            medians["jax_tokens_per_s"] * needed / result["bandwidth_bytes_per_s"]
        )
    print(
        f"batch {batch:>2}: jax {medians['jax_tokens_per_s']:8.1f} tokens/s, first after "
        f"{medians['jax_first'] * 1e3:7.1f} ms; torch {medians['torch_tokens_per_s']:8.1f}, "
        f"{medians['torch_first'] * 1e3:7.1f} ms; ratio {medians['ratio']:.2f}"
        + (f"; {medians['bandwidth_share']:.0%} of the bandwidth" if batch == 1 else ""),
        flush=True,
    )
    return medians


if __name__ == "__main__":
    main()
