"""Make a small copy of a recorded system: python -m tests.parity.golden_reduce SYSTEM TARGET

What no import uses, and recorded values that repeat what others show, are left out; everything else
is kept bit for bit, so the copy is checked like the whole.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors.numpy import load_file, save_file

from tests.parity.golden_system import System

DROPPED = (
    r"unmerged/audio_tower_features/.*",
    r"unmerged/layer\d+/(moe_out|hidden_out)",
    r"unmerged/(logits|vision_tower_features/call0|mm_projector_out/call0)",
    r"\w+/final_norm_out",
    r"noisy/layer\d+/combine_weights",
    r"merged/logits(_sample0)?",
)
SIDE_FILES = ("data.json", "generate_queries.json", "grad_norms.json", "info.json", "inputs.npz")


def used_tensors(system: System) -> set[tuple[Path, str]]:
    """(file, name) of every source tensor that ends up in a parameter of either form."""
    used = set()
    for form in ("unmerged", "merged"):
        resolution = system.resolution(form)
        for target in resolution.targets.values():
            for copy in target.fills.values():
                halves = (copy.adapter.a, copy.adapter.b) if copy.adapter else ()
                for src in (copy.src, *halves):
                    tensor = resolution.plan.tensor(src)
                    used.add((tensor.file, tensor.name))
    return used


def reduce_checkpoint(system: System, target: Path) -> None:
    """The same folders and files with the used tensors only; shards become one file."""
    used = used_tensors(system)
    for path in sorted((system.folder / "checkpoint").rglob("*")):
        out = target / path.relative_to(system.folder)
        if not path.is_file() or path.name.endswith(".index.json"):
            continue
        out.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix not in (".bin", ".pt"):
            shutil.copyfile(path, out)
            continue
        content = torch.load(path, weights_only=True)
        state = content.get("model", content)
        kept = {name: value for name, value in state.items() if (path, name) in used}
        if path.name.startswith("pytorch_model-"):
            out = out.with_name("pytorch_model.bin")
            kept |= torch.load(out, weights_only=True) if out.is_file() else {}
        if kept:
            torch.save({**content, "model": kept} if "model" in content else kept, out)


def main(system: System, target: Path) -> None:
    reduce_checkpoint(system, target)
    for name in SIDE_FILES:
        shutil.copyfile(system.folder / name, target / name)
    shutil.copytree(system.folder / "media", target / "media")
    expected = load_file(system.folder / "expected.safetensors")
    if "unmerged/logits" in expected:
        expected["unmerged/logits_sample0"] = expected["unmerged/logits"][:1].copy()
    kept = {k: v for k, v in expected.items() if not any(re.fullmatch(d, k) for d in DROPPED)}
    save_file(kept, target / "expected.safetensors")


if __name__ == "__main__":
    main(System(Path(sys.argv[1])), Path(sys.argv[2]))
