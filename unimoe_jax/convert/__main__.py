"""python -m unimoe_jax.convert {import,export,inspect,verify}: see --help of each."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from unimoe_jax.convert import exporting, importing, inspecting, opening, verifying
from unimoe_jax.convert.options import Options
from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.convert.verifying import compare
from unimoe_jax.runtime.pipes import exit_quietly_on_closed_pipe
from unimoe_jax.runtime.program import program_name


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog=program_name("convert"), description=__doc__)
    commands = top.add_subparsers(dest="command", required=True)
    _import_arguments(
        commands.add_parser("import", help="PyTorch folders -> a checkpoint of this package")
    )
    out = commands.add_parser("export", help="a checkpoint of this package -> PyTorch folders")
    out.add_argument(
        "--from",
        dest="source",
        required=True,
        type=Path,
        help="an import, what a stage left, or a run directory (its last whole stage)",
    )
    out.add_argument("--to", dest="target", required=True, type=Path)
    out.add_argument("--format", choices=("unimoe", "cumo", "hf"), required=True)
    out.add_argument("--files", choices=("safetensors", "bin"), default="safetensors")
    out.add_argument("--model", type=Path, help="model.yaml, for a checkpoint without one")
    look = commands.add_parser("inspect", help="tree of parameters, totals, active parameters")
    look.add_argument("folder", type=Path)
    same = commands.add_parser(
        "verify",
        help="compare two checkpoints of any supported format: ours, a folder of the originals, or "
        "a folder that holds all folders of one model",
    )
    same.add_argument("a", type=Path)
    same.add_argument("b", type=Path)
    return top


def _import_arguments(add: argparse.ArgumentParser) -> None:
    add.add_argument("--from", dest="sources", action="append", required=True, type=Path)
    add.add_argument("--to", dest="target", required=True, type=Path)
    add.add_argument("--lora", choices=("merge", "keep"), default="merge")
    add.add_argument(
        "--router-lora",
        choices=("override", "merge"),
        help="override: mlp_gates replaces merged routers, so their adapters are lost, as in "
        "released inference (default where adapters are merged); merge: they take part, as in "
        "training (default with --lora keep)",
    )
    add.add_argument(
        "--numerics",
        choices=("exact", "released"),
        default="exact",
        help="released: round weights and RoPE tables through float16 (and bfloat16), as the "
        "loaders of released Uni-MoE inference do",
    )
    add.add_argument(
        "--vision-layer",
        type=int,
        default=-2,
        help="selected hidden state of a CLIP imported on its own",
    )
    add.add_argument(
        "--unread-layers",
        choices=("drop", "keep"),
        default="drop",
        help="its layers after that one; CuMo's run files need them",
    )
    add.add_argument("--dtype", choices=("source", "float32", "bfloat16"), default="source")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0: done, and for `verify` equal; 1: `verify` found a difference; 2: refused;
    130: interrupted; 141: who reads what is printed has gone."""
    given = parser().parse_args(arguments)
    try:
        return exit_quietly_on_closed_pipe(lambda: COMMANDS[given.command](given))
    except (ConvertError, ValidationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _import(given: argparse.Namespace) -> int:
    options = Options(
        given.lora, given.router_lora, given.vision_layer, given.numerics, given.unread_layers
    )
    importing.import_checkpoint(given.sources, given.target, options, given.dtype)
    return 0


def _export(given: argparse.Namespace) -> int:
    checkpoint = opening.with_tokenizer(opening.open_checkpoint(given.source, given.model))
    exporting.export_checkpoint(checkpoint, given.target, given.format, given.files)
    return 0


def _inspect(given: argparse.Namespace) -> int:
    for line in inspecting.inspect_lines(opening.open_checkpoint(given.folder)):
        print(line)
    return 0


def _verify(given: argparse.Namespace) -> int:
    a, b = opening.open_pair(given.a, given.b)
    differences = list(compare(a, b))
    for line in differences:
        print(line)
    if all(opening.has_text_model(checkpoint) for checkpoint in (a, b)):
        for line in verifying.compare_logits(a, b):
            print(line)
    else:
        print("logits: not compared, one of them has no decoder")
    count = len(a.params)
    print(f"DIFFERENT: {len(differences)} parameters" if differences else f"EQUAL: {count}")
    return 1 if differences else 0


COMMANDS = {"import": _import, "export": _export, "inspect": _inspect, "verify": _verify}

if __name__ == "__main__":
    sys.exit(main())
