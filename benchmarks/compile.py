"""Compile every run file of published size with `unimoe_jax.compile`, each for a fitting TPU slice.

python benchmarks/compile.py [NAME …] [--effort full]   compile (extra [tpu], no TPU; minutes each)
python benchmarks/compile.py --table                    print the tables of the stored results

`expert_products` is added to the report of the program. It holds the FLOPs of one trip of every
loop over the rows of an expert, by module and pass. The backward FLOPs divided by the forward FLOPs
are a sum of three parts: 1 for the gradients of inputs, 1 for the gradients of weights (where
experts train), and the share of the forward products that are repeated instead of being kept. That
share is 1 of the 2 matrices of an encoder's or connector's expert, and 2 of the 3 matrices of the
decoder's.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from common import ROOT

from unimoe_jax.compile.hlo import product_flops, trips
from unimoe_jax.compile.hlo_text import parse

RESULTS = ROOT / "benchmarks/results/compile"
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """The last stage of a run on a TPU slice.

    mesh: the name of a file in configs/mesh/.
    media: the argument of `unimoe_jax.compile --media`, for example `image=5`.
    """

    run: str
    topology: str
    mesh: str
    overrides: tuple[str, ...] = ()
    media: str | None = None

    @property
    def name(self) -> str:
        return f"{self.run}_{self.topology.replace(':', '_')}"


CASES = (
    Case("cumo_mistral_7b", "v5p:2x2x2", "tpu_v5p_16", media="image=5"),
    Case("cumo_mixtral_8x7b", "v5p:2x2x4", "tpu_v5p_32", media="image=5"),
    Case("unimoe_8e", "v5p:2x2x2", "tpu_v5p_16"),
    Case("unimoe_union", "v5p:2x2x2", "tpu_v5p_16"),
    Case("unimoe_speech", "v5p:2x2x1", "tpu_v5p_8", ("data.loader.rows=4",)),
    Case("unimoe_audio", "v5p:2x2x1", "tpu_v5p_8", ("data.loader.rows=4",)),
    Case("unimoe_speech_dp", "v6e:2x4", "tpu_v6e_8", ("data.loader.rows=8",)),
)


def compile_case(case: Case, more: list[str]) -> int:
    """Write the JSON of a case with `more` arguments of the program, and return its exit code."""
    mesh = yaml.safe_load((ROOT / "configs/mesh" / f"{case.mesh}.yaml").read_text())["mesh"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{case.name}.json"
    with tempfile.TemporaryDirectory() as folder:
        hlo = Path(folder) / "program.hlo"
        command = [
            *(sys.executable, "-m", "unimoe_jax.compile", "--topology", case.topology),
            *("--config", f"configs/run/{case.run}.yaml", *more),
            *("--json", str(path), "--hlo", str(hlo)),
            *(["--media", case.media] if case.media else []),
            *(f"mesh.{axis}={size}" for axis, size in mesh.items()),
            *case.overrides,
        ]
        print("+", " ".join(command), flush=True)
        code = subprocess.run(command, cwd=ROOT).returncode
        # There is no program to read if the compilation failed.
        if hlo.exists():
            report = json.loads(path.read_text())
            report["expert_products"] = expert_products(hlo.read_text())
            path.write_text(json.dumps(report, indent=2) + "\n")
    return code


def expert_products(text: str) -> dict[str, dict[str, float]]:
    """FLOPs of one trip of the loops over the rows of experts: {module: {forward, backward}}.

    The number of rows depends on the data, so these are the loops of unknown length.
    """
    computations, entry = parse(text)
    found: dict[str, dict[str, float]] = {}

    def walk(name: str, count: float, in_loop: bool) -> None:
        """Add the products of a computation that runs `count` times."""
        for instruction in computations[name].values():
            flops = count * product_flops(instruction, computations[name])
            if flops and in_loop:
                source = re.search(r'op_name="([^"]*)"', instruction.rest)[1]
                if re.search(r"/attention/|\.loss/", source):  # loops of unknown length as well
                    continue
                module = re.search(r"encoder(?=/)|connector|decoder", source)
                key = "backward" if "transpose(" in source else "forward"
                sums = found.setdefault(module[0], {"forward": 0.0, "backward": 0.0})
                sums[key] += flops
            if instruction.op == "while":
                length = trips(instruction, computations)
                body = instruction.attribute("body")
                walk(body, count * (length or 1), in_loop or length is None)
            elif instruction.op in ("fusion", "call", "async-start"):
                for other in instruction.called():
                    walk(other, count, in_loop)
            for other in instruction.branches():
                walk(other, count, in_loop)

    walk(entry, 1.0, False)
    return found


def table() -> str:
    """Markdown table with a line for every result."""
    lines = [
        "| run, stage | slice, mesh | rows × length | parameters | optimizer | activations "
        "| temporaries | verdict | FLOPs ÷ needed | processor time |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        sizes = {name: size / GIB for name, size in report["memory"].items()}
        sizes["parameters"] = sizes["frozen parameters"] + sizes["trained parameters"]
        columns = ("parameters", "optimizer", "activations", "temporaries")
        mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1)
        lines.append(
            f"| {report['config']}, {report['stage']} | {report['topology']}, {mesh} "
            f"| {report['rows']} × {report['row_length']} | "
            + " | ".join(f"{sizes[name]:.1f} GiB" if name in sizes else "" for name in columns)
            + f" | {report['verdict']} | {report.get('flops_ratio', float('nan')):.2f} "
            f"| {report.get('compile_processor_seconds', float('nan')):.0f} s |"
        )
    return "\n".join(lines)


def expert_table() -> str:
    """Markdown table with a line for every result and module with experts."""
    lines = [
        "| run | module | kernels of experts | cut over | on a device "
        "| backward ÷ forward products |",
        "|---|---|---|---|---|---|",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        report = json.loads(path.read_text())
        for module, sums in report["expert_products"].items():
            kernels = {p: k for p, k in report["experts"].items() if module in p.split("/")}
            # The first kernel serves as the example for its module.
            kernel = next(iter(kernels.values()))
            shape, part = ("×".join(map(str, kernel[key])) for key in ("shape", "per_device"))
            cut = ", ".join(str(axis or "-") for axis in kernel["cut_over"])
            ratio = sums["backward"] / sums["forward"]
            lines.append(
                f"| {report['config']} | {module} | {len(kernels)}, as {shape} | {cut} | {part} "
                f"| {ratio:.3f} |"
            )
    return "\n".join(lines)


def main() -> int:
    """Compile the chosen cases and print both tables; return 1 if a case does not fit or fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="run names; default: all")
    parser.add_argument(
        "--table", action="store_true", help="print the tables of the stored results only"
    )
    args, more = parser.parse_known_args()  # `more` goes to unimoe_jax.compile
    failed = 0
    if not args.table:
        for case in CASES:
            if not args.names or case.run in args.names:
                failed |= compile_case(case, more) != 0
    print(table())
    print()
    print(expert_table())
    return failed


if __name__ == "__main__":
    sys.exit(main())
