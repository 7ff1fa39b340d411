"""Compare the expert layer with dense layers, other formulations and PyTorch, in one run.

    python benchmarks/moe.py [--sizes 512 1024] [--experts 4 8] [--rounds 7] [--output FILE]

Training shapes: T tokens, top-2 of E experts, SwiGLU; forward, and forward with all gradients. Each
variant takes turns (A B A B …) with a dense layer of the same active FLOPs: two feed-forwards per
token, no router. Its ratio is to the mean of the two dense runs around it, so that a machine that
changes its speed changes it for both. The PyTorch side runs in a separate process with a separate
dense layer. Decode shapes: 1 to 16 tokens, compared with the time of reading each chosen expert
once. Every variant is checked against a reference before it is timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import common
import numpy as np

TOP_K = 2
# Width -> feed-forward width.
HIDDEN = {512: 1376, 1024: 2816, 4096: 11008}
# Shares of the slots per expert under a router that has lost its balance.
SKEWED = (0.34, 0.27, 0.17, 0.11, 0.06, 0.03, 0.015, 0.005)
DECODE_TOKENS = (1, 2, 4, 8, 16)
TOLERANCE = {"float32": 1e-4, "bfloat16": 4e-2}


# --------------------------------------------------------------------------------- the case


def hidden_size(width: int) -> int:
    """Feed-forward width of a layer with LLaMA's proportions: about 8/3 of the width."""
    return HIDDEN.get(width, 32 * round(width / 12))


def arrays(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Random arrays of a case, float32 but for `expert`.

    gate, up: [E,D,F]. down: [E,F,D]. x: tokens [T,D]. expert: chosen experts, int32 [T,2].
    weight: their combine weights [T,2].
    """
    rng = np.random.default_rng(0)
    width, hidden, experts = args.width, hidden_size(args.width), args.num_experts
    share = np.full(experts, 1 / experts)
    if args.routing == "skewed":
        share = np.array(SKEWED[:experts]) / sum(SKEWED[:experts])
    # The top-k of log-shares plus Gumbel noise is a choice of k experts without replacement.
    score = np.log(share) + rng.gumbel(size=(args.tokens, experts))
    expert = np.argsort(-score, axis=1)[:, :TOP_K].astype(np.int32)
    weight = rng.uniform(0.2, 0.8, (args.tokens, 1)).astype(np.float32)
    normal = partial(rng.standard_normal, dtype=np.float32)
    return {
        "gate": normal((experts, width, hidden)) / width**0.5,
        "up": normal((experts, width, hidden)) / width**0.5,
        "down": normal((experts, hidden, width)) / hidden**0.5,
        "x": normal((args.tokens, width)),
        "expert": expert,
        "weight": np.concatenate([weight, 1 - weight], axis=1),
    }


# ----------------------------------------------------------------------------------- JAX side


def jax_variants(case: dict, dtype: str):
    """The variants by name: {name: f(gate, up, down, x, weight) -> y}.

    "dense" is the layer that all others are compared with: two feed-forwards per token. Products
    accumulate in float32, which bfloat16 needs on a CPU.
    """
    import jax
    import jax.numpy as jnp

    from unimoe_jax.nn.moe.dispatch import moe_ffn
    from unimoe_jax.nn.moe.experts import SwiGLUExpert

    expert, experts = case["expert"], len(case["gate"])
    kind = jnp.dtype(dtype)

    def product(a, b):
        return jnp.matmul(a, b, preferred_element_type=jnp.float32).astype(kind)

    def swiglu(gate, up, down, x, product=product):
        return product(jax.nn.silu(product(x, gate)) * product(x, up), down)

    def dense(gate, up, down, x, weight):
        del weight
        return swiglu(gate[0], up[0], down[0], x) + swiglu(gate[1], up[1], down[1], x)

    def layer(method, gate, up, down, x, weight):
        names = zip(("gate_proj", "up_proj", "down_proj"), (gate, up, down), strict=True)
        weights = {name: {"kernel": w} for name, w in names}
        args = (x[None], expert[None], weight[None], np.uint32(0))
        return moe_ffn(SwiGLUExpert(kind), weights, *args, method)[0]

    def ragged(gate, up, down, x, weight):
        # Sort the slots by expert, multiply each group by its expert, and undo the sorting.
        order = jnp.argsort(expert.reshape(-1), stable=True)
        sizes = jnp.bincount(expert.reshape(-1), length=experts).astype(jnp.int32)
        y = swiglu(gate, up, down, x[order // TOP_K], partial(ragged_product, sizes))
        y = jnp.zeros_like(y).at[order].set(y).reshape(*expert.shape, -1)
        return jnp.sum(y * weight[..., None], axis=1).astype(kind)

    def ragged_product(sizes, a, b):
        return jax.lax.ragged_dot(a, b, sizes, preferred_element_type=jnp.float32).astype(kind)

    return {
        "dense": dense,
        "ours": partial(layer, "grouped"),
        "all experts": partial(layer, "dense"),
        "lax.ragged_dot": ragged,
    }


def jax_side(args: argparse.Namespace):
    """Compile all variants of the JAX side.

    Returns the relative error of every variant, functions to time as {variant: {pass: run}}, and
    bytes of temporaries as {variant: {pass: bytes}}.
    """
    import jax
    import jax.numpy as jnp

    case = arrays(args)
    kind = jnp.dtype(args.dtype)
    values = [jnp.asarray(case[name], kind) for name in ("gate", "up", "down", "x")]
    values.append(jnp.asarray(case["weight"]))
    runs, temporaries, outputs = {}, {}, {}
    for name, function in jax_variants(case, args.dtype).items():

        def loss(*values, function=function):
            # The cosines give every output a different gradient.
            y = function(*values).astype(jnp.float32)
            return jnp.sum(y * jnp.cos(jnp.arange(y.size, dtype=jnp.float32)).reshape(y.shape))

        programs = {"forward": function, "gradient": jax.grad(loss, argnums=(0, 1, 2, 3, 4))}
        compiled = {key: jax.jit(f).lower(*values).compile() for key, f in programs.items()}
        outputs[name] = [compiled[key](*values) for key in compiled]
        runs[name] = {key: partial(blocked, f, values) for key, f in compiled.items()}
        temporaries[name] = {
            key: f.memory_analysis().temp_size_in_bytes for key, f in compiled.items()
        }
    # "dense" computes another function, so its output is not compared.
    checks = {
        name: worst(output, outputs["all experts"])
        for name, output in outputs.items()
        if name != "dense"
    }
    return checks, runs, temporaries


def blocked(function, values) -> None:
    """Run a program and wait for its results."""
    import jax

    jax.block_until_ready(function(*values))


def worst(actual, expected) -> float:
    """Largest relative error over the arrays of two trees."""
    import jax

    pairs = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    both = ((np.asarray(a, np.float64), np.asarray(b, np.float64)) for a, b in pairs)
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in both)


def decode_side(args: argparse.Namespace) -> dict:
    """Time the layer with few tokens beside reading the chosen experts: {tokens: result}."""
    import jax
    import jax.numpy as jnp

    from unimoe_jax.nn.moe import decode as decode_experts

    case, kind, results = arrays(args), jnp.dtype(args.dtype), {}
    stacked = [jnp.asarray(case[name], kind) for name in ("gate", "up", "down")]
    # Decoding takes a separate set of transposed kernels for every expert.
    separate = [
        decode_experts.Expert(*(jax.device_put(np.asarray(w[e]).T.copy()) for w in stacked))
        for e in range(args.num_experts)
    ]
    for tokens in DECODE_TOKENS:
        few = {name: case[name][:tokens] for name in ("expert", "weight")}
        x, weight = jnp.asarray(case["x"][:tokens], kind), jnp.asarray(few["weight"])
        chosen = sorted(set(few["expert"].reshape(-1).tolist()))
        layer = jax_variants({**case, **few}, args.dtype)
        decode = jax.jit(lambda e, x, w, few=few: decode_experts.apply(e, x.T, few["expert"], w))
        dense = jax.jit(layer["dense"])
        ours = jax.jit(layer["ours"])
        # A sum reads every weight once and writes a single number.
        read = jax.jit(lambda e: [jnp.sum(w, dtype=jnp.float32) for w in jax.tree.leaves(e)])
        runs = {
            "dense": partial(blocked, dense, (*stacked, x, weight)),
            "ours": partial(blocked, decode, (separate, x, weight)),
            "blocks of rows": partial(blocked, ours, (*stacked, x, weight)),
            "read once": partial(blocked, read, ([separate[e] for e in chosen],)),
        }
        error = worst(decode(separate, x, weight).T, layer["all experts"](*stacked, x, weight))
        agree("decode", error, args.dtype)
        times = take_turns(runs, args.rounds * 5)
        seconds = {name: statistics.median(taken) for name, taken in times.items()}
        results[tokens] = {
            "experts_chosen": len(chosen),
            "seconds": {name: round(value, 6) for name, value in seconds.items()},
            "ratio_to_reading": round(seconds["ours"] / seconds["read once"], 3),
        }
    return results


# ---------------------------------------------------------------------------------- measuring


def agree(name: str, error: float, dtype: str) -> None:
    """Raise an error if a variant does not compute the same as the reference."""
    if not error <= TOLERANCE[dtype]:
        raise RuntimeError(
            f"{name}: the relative error against the reference is {error:.1e}, "
            f"more than {TOLERANCE[dtype]}"
        )


def take_turns(runs: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round by name; the runs take turns, after one round to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if number:  # round 0 warms up
                times[name].append(time.perf_counter() - started)
    return times


def bracketed(runs: dict, key: str, rounds: int) -> dict[str, dict]:
    """Time every variant between two runs of "dense"; its ratio is to the mean of those two."""

    def timed(name: str) -> float:
        started = time.perf_counter()
        runs[name][key]()
        return time.perf_counter() - started

    for name in runs:  # warm up
        timed(name)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    ratio: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        before = timed("dense")
        for name in runs:
            taken, after = timed(name), timed("dense")
            seconds[name].append(taken)
            ratio[name].append(2 * taken / (before + after))
            before = after
    return {
        name: {
            "ratio": round(statistics.median(ratio[name]), 3),
            "ratio_range": [round(min(ratio[name]), 3), round(max(ratio[name]), 3)],
            "milliseconds": round(1e3 * statistics.median(seconds[name]), 2),
            "best_milliseconds": round(1e3 * min(seconds[name]), 2),
        }
        for name in runs
    }


def worker(args: argparse.Namespace) -> None:
    """Run one side of one case in this process and print its result as JSON."""
    if args.worker == "decode":
        print(json.dumps(decode_side(args)))
        return
    if args.worker == "jax":
        checks, runs, temporaries = jax_side(args)
    else:
        from torch_moe import torch_side

        (checks, runs), temporaries = torch_side(arrays(args), args.dtype), {}
    for name, error in checks.items():
        agree(name, error, args.dtype)
    result: dict = {name: {"relative_error": error} for name, error in checks.items()}
    for key in ("forward", "gradient"):
        for name, times in bracketed(runs, key, args.rounds).items():
            memory = temporaries.get(name, {}).get(key)
            times |= {} if memory is None else {"temporary_mib": round(memory / 2**20, 1)}
            result.setdefault(name, {})[key] = times
    print(json.dumps(result))


def side(name: str, args: argparse.Namespace, case: dict) -> dict:
    """Run one side in a fresh process, so that no library sees the other's threads and memory."""
    command = [sys.executable, __file__, "--worker", name, "--rounds", str(args.rounds)]
    for key, value in case.items():
        command += [f"--{key.replace('_', '-')}", str(value)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def training_cases(args: argparse.Namespace):
    """The cases of training shapes, as command-line settings of `worker`."""
    for width, experts, dtype, routing in itertools.product(
        args.sizes, args.experts, args.dtypes, args.routings
    ):
        yield {
            "width": width,
            "num_experts": experts,
            "dtype": dtype,
            "routing": routing,
            "tokens": args.tokens,
        }


def report(case: dict, sides: dict) -> None:
    """Print a line for every variant of a case."""
    head = f"d={case['width']} E={case['num_experts']} {case['dtype']} {case['routing']}"
    for label, variants in sides.items():
        for name, values in variants.items():
            line = " ".join(
                f"{key} {values[key]['ratio']:.2f} ({values[key]['milliseconds']:.1f} ms)"
                for key in ("forward", "gradient")
            )
            print(f"{head:<32} {label:<6} {name:<24} {line}", flush=True)


def parse() -> argparse.Namespace:
    """Read the command line; hidden options are for the worker processes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=[512, 1024])
    parser.add_argument("--experts", nargs="+", type=int, default=[4, 8])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=TOLERANCE)
    parser.add_argument(
        "--routings", nargs="+", default=["uniform", "skewed"], choices=["uniform", "skewed"]
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch side out")
    parser.add_argument("--no-decode", action="store_true", help="leave the decode shapes out")
    parser.add_argument("--output", type=Path, default=common.ROOT / "benchmarks/results/moe.json")
    hidden = {"help": argparse.SUPPRESS}
    parser.add_argument("--worker", choices=("jax", "torch", "decode"), **hidden)
    parser.add_argument("--width", type=int, **hidden)
    parser.add_argument("--num-experts", type=int, **hidden)
    parser.add_argument("--dtype", **hidden)
    parser.add_argument("--routing", **hidden)
    return parser.parse_args()


def main() -> None:
    """Run every case in worker processes, and save the result after each of them."""
    args = parse()
    if args.worker:
        return worker(args)
    result = {"machine": common.machine(), "rounds": args.rounds, "training": [], "decode": []}
    labels = ("jax",) if args.no_torch else ("jax", "torch")
    for case in training_cases(args):
        sides = {label: side(label, args, case) for label in labels}
        report(case, sides)
        result["training"].append(case | {"hidden": hidden_size(case["width"])} | sides)
        result["load_average_after"] = common.machine()["load_average"]
        common.save(args.output, result)
    for width, experts in () if args.no_decode else itertools.product(args.sizes, args.experts):
        case = {"width": width, "num_experts": experts, "dtype": "float32", "routing": "uniform"}
        results = side("decode", args, case | {"tokens": max(DECODE_TOKENS)})
        for tokens, values in results.items():
            print(f"decode d={width} E={experts} T={tokens}: {values}", flush=True)
        result["decode"].append(case | {"tokens": results})
        common.save(args.output, result)
    return None


if __name__ == "__main__":
    main()
