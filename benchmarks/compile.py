"""All run files at published size through `unimoe_jax.compile`, each for a TPU slice that suits it.

python benchmarks/compile.py [NAME …] [--effort full]   compile (extra [tpu], no TPU; minutes each)
python benchmarks/compile.py --table                    the table of the results that are there
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass

import yaml
from common import ROOT

RESULTS = ROOT / "benchmarks/results/compile"
GIB = 2**30


@dataclass(frozen=True)
class Case:
    """A run's last stage on a slice; `mesh` is a file of configs/mesh/."""

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
    """Write the JSON of a case; `more` goes to the program, whose exit code this returns."""
    mesh = yaml.safe_load((ROOT / "configs/mesh" / f"{case.mesh}.yaml").read_text())["mesh"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "unimoe_jax.compile", "--topology", case.topology),
        *("--config", f"configs/run/{case.run}.yaml", "--json", str(RESULTS / f"{case.name}.json")),
        *(["--media", case.media] if case.media else []),
        *more,
        *(f"mesh={json.dumps(mesh)}", *case.overrides),
    ]
    print("+", " ".join(command), flush=True)
    return subprocess.run(command, cwd=ROOT).returncode


def table() -> str:
    """Markdown, a line per result."""
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


def main() -> int:
    """Returns 1 if a case does not fit or fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="run names; default: all")
    parser.add_argument("--table", action="store_true")
    args, more = parser.parse_known_args()  # the rest goes to unimoe_jax.compile
    failed = 0
    if not args.table:
        for case in CASES:
            if not args.names or case.run in args.names:
                failed |= compile_case(case, more) != 0
    print(table())
    return failed


if __name__ == "__main__":
    sys.exit(main())
