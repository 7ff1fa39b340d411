"""Convert PyTorch checkpoints in and out: import, export, inspect and verify.

    python -m unimoe_jax.convert import  --from FOLDER … --to DIR
    python -m unimoe_jax.convert export  --from DIR --to FOLDER --format hf
    python -m unimoe_jax.convert inspect DIR
    python -m unimoe_jax.convert verify  DIR DIR

Each command explains its options with --help. Exit codes: 0 the command succeeded (for verify: both
checkpoints are equal); 1 verify found a difference; 2 the input was refused; 130 interrupted; 141
the program that reads the output has closed its end (`… | head`).
"""

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
    """Build the parser of the command line."""
    program = argparse.ArgumentParser(
        prog=program_name("convert"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = program.add_subparsers(dest="command", required=True)
    _add_import(commands)
    _add_export(commands)
    _add_inspect(commands)
    _add_verify(commands)
    return program


def _add_import(commands: argparse._SubParsersAction) -> None:
    text = "convert PyTorch folders to a checkpoint of this package"
    command = commands.add_parser("import", help=text, description=text)
    command.add_argument(
        "--from",
        dest="sources",
        action="append",
        required=True,
        type=Path,
        metavar="FOLDER",
        help="a folder with the files of one original model or of a part of it; repeat the option "
        "for a model that is spread over several folders",
    )
    command.add_argument(
        "--to", dest="target", required=True, type=Path, metavar="DIR", help="a new folder"
    )
    command.add_argument(
        "--lora",
        choices=("merge", "keep"),
        default="merge",
        help="merge adds PEFT adapters to their weights; keep stores them as separate parameters "
        "(default: merge)",
    )
    command.add_argument(
        "--router-lora",
        choices=("override", "merge"),
        help="override: mlp_gates replaces merged routers, so their adapters are lost, as in "
        "released inference (default where adapters are merged); merge: the routers' adapters take "
        "part, as in training (default with --lora keep)",
    )
    command.add_argument(
        "--numerics",
        choices=("exact", "released"),
        default="exact",
        help="exact keeps the numbers of the files; released rounds weights and RoPE tables "
        "through float16 (and bfloat16), as the loaders of released Uni-MoE inference do "
        "(default: exact)",
    )
    command.add_argument(
        "--vision-layer",
        type=int,
        default=-2,
        help="which hidden state of a CLIP encoder that is imported alone is its output "
        "(default: -2)",
    )
    command.add_argument(
        "--unread-layers",
        choices=("drop", "keep"),
        default="drop",
        help="the layers of that CLIP encoder after its output: drop or keep them; CuMo's run "
        "files need them (default: drop)",
    )
    command.add_argument(
        "--dtype",
        choices=("source", "float32", "bfloat16"),
        default="source",
        help="the dtype of the parameters; source keeps the dtype of the files (default: source)",
    )


def _add_export(commands: argparse._SubParsersAction) -> None:
    text = "convert a checkpoint of this package to PyTorch folders"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        type=Path,
        metavar="DIR",
        help="an import, the checkpoint of a stage, or a run directory (the result of its last "
        "stage that has a whole model)",
    )
    command.add_argument(
        "--to", dest="target", required=True, type=Path, metavar="FOLDER", help="a new folder"
    )
    command.add_argument(
        "--format",
        choices=("unimoe", "cumo", "hf"),
        required=True,
        help="the layout and names of the original Uni-MoE, of CuMo, or of transformers",
    )
    command.add_argument(
        "--files",
        choices=("safetensors", "bin"),
        default="safetensors",
        help="the file format of the weights (default: safetensors)",
    )
    command.add_argument(
        "--model", type=Path, metavar="FILE", help="model.yaml, for a checkpoint without model.yaml"
    )


def _add_inspect(commands: argparse._SubParsersAction) -> None:
    text = "print the tree of parameters, their total number, and how many are active per token"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument("folder", type=Path, help="a checkpoint of any supported format")


def _add_verify(commands: argparse._SubParsersAction) -> None:
    text = "compare the parameters and the logits of two checkpoints"
    command = commands.add_parser(
        "verify",
        help=text,
        description=f"{text}. A checkpoint is one of this package, an original PyTorch folder, or "
        "a folder that holds all folders of one model.",
    )
    command.add_argument("a", type=Path, help="the first checkpoint")
    command.add_argument("b", type=Path, help="the second checkpoint")


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments`, run the command and return the exit code that the module's docstring
    lists."""
    args = parser().parse_args(arguments)
    try:
        return exit_quietly_on_closed_pipe(lambda: COMMANDS[args.command](args))
    except (ConvertError, ValidationError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _import(args: argparse.Namespace) -> int:
    options = Options(
        lora=args.lora,
        router_lora=args.router_lora,
        vision_layer=args.vision_layer,
        numerics=args.numerics,
        unread_layers=args.unread_layers,
    )
    importing.import_checkpoint(args.sources, args.target, options, args.dtype)
    return 0


def _export(args: argparse.Namespace) -> int:
    checkpoint = opening.with_tokenizer(opening.open_checkpoint(args.source, args.model))
    exporting.export_checkpoint(checkpoint, args.target, args.format, args.files)
    return 0


def _inspect(args: argparse.Namespace) -> int:
    for line in inspecting.inspect_lines(opening.open_checkpoint(args.folder)):
        print(line)
    return 0


def _verify(args: argparse.Namespace) -> int:
    a, b = opening.open_pair(args.a, args.b)
    differences = list(compare(a, b))
    for line in differences:
        print(line)
    # The settings of a checkpoint may describe a decoder whose parameters it does not have.
    if all(opening.has_text_model(checkpoint) for checkpoint in (a, b)):
        for line in verifying.compare_logits(a, b):
            print(line)
    else:
        print("logits: not compared, because at least one checkpoint has no decoder")
    if differences:
        print(f"DIFFERENT: {len(differences)} parameters")
        return 1
    print(f"EQUAL: {len(a.params)}")
    return 0


COMMANDS = {"import": _import, "export": _export, "inspect": _inspect, "verify": _verify}

if __name__ == "__main__":
    sys.exit(main())
