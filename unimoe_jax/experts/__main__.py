"""Move experts between checkpoints: dense layers become experts, and experts dense layers.

    python -m unimoe_jax.experts upcycle  --from DENSE --to MOE --module encoder --num-experts 4
    python -m unimoe_jax.experts assemble --from BASE --expert NAME=DIR … --to MOE
    python -m unimoe_jax.experts split    --from MOE --to FOLDER
    python -m unimoe_jax.experts prune    --from MOE --keep 0,2 --to MOE
    python -m unimoe_jax.experts list     DIR

A checkpoint is an import, the result of a stage (`checkpoints/STAGE/final`, or a run directory for
its last stage that has a whole model), or a checkpoint that this program wrote. PyTorch folders can
be read, too, as `unimoe_jax.convert import` reads them. Adapters are merged into their weights. A
new checkpoint appears complete or not at all, with a manifest of its parents and their hashes.

Exit codes: 0 the command succeeded; 2 the input was refused; 130 interrupted; 141 the program that
reads the list has closed its end (`… | head`).
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.config import MODULES, ConfigError, ModuleName, MoEConfig, RouterConfig
from unimoe_jax.config.problems import first_problem
from unimoe_jax.convert.opening import locate_checkpoint
from unimoe_jax.convert.reader import ConvertError
from unimoe_jax.experts.listing import listing
from unimoe_jax.experts.making import fewer_experts, one_expert, place_experts
from unimoe_jax.experts.opening import Opened, open_experts
from unimoe_jax.experts.writing import write
from unimoe_jax.params.paths import ParamError
from unimoe_jax.runtime.pipes import exit_quietly_on_closed_pipe
from unimoe_jax.runtime.program import program_name

NAMED_LAYERS = ("all", "even", "first_half", "second_half")
BAD_INPUT = (ConvertError, CheckpointError, ConfigError, ParamError, OSError)


def parser() -> argparse.ArgumentParser:
    """Build the parser of the command line."""
    program = argparse.ArgumentParser(
        prog=program_name("experts"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = program.add_subparsers(dest="command", required=True)
    _add_upcycle(commands)
    _add_assemble(commands)
    _add_split(commands)
    _add_prune(commands)
    _add_list(commands)
    return program


def _add_command(
    commands: argparse._SubParsersAction, name: str, text: str
) -> argparse.ArgumentParser:
    """Add a command that reads one checkpoint and writes another."""
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument(
        "--from",
        dest="source",
        required=True,
        type=Path,
        metavar="DIR",
        help="the checkpoint to start from",
    )
    command.add_argument(
        "--to", dest="target", required=True, type=Path, metavar="DIR", help="a new folder"
    )
    command.add_argument(
        "--model", type=Path, metavar="FILE", help="model.yaml for --from, if it has no model.yaml"
    )
    return command


def _add_upcycle(commands: argparse._SubParsersAction) -> None:
    text = "make every expert a copy of the dense layer; routers start at random"
    command = _add_command(commands, "upcycle", text)
    command.add_argument(
        "--num-experts", type=int, required=True, help="the number of experts in each layer"
    )
    _add_modules(command, "a module that gets experts; may be repeated", required=True)
    _add_placement(command)


def _add_assemble(commands: argparse._SubParsersAction) -> None:
    text = "make expert 0, 1, … from the dense layers of the named checkpoints"
    command = _add_command(commands, "assemble", text)
    command.add_argument(
        "--expert",
        dest="experts",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="the checkpoint for the next expert; repeat the option for every expert, in order; "
        "the same checkpoint may occur several times",
    )
    _add_modules(command, "a module that gets experts; may be repeated (default: decoder)")
    _add_placement(command)


def _add_split(commands: argparse._SubParsersAction) -> None:
    text = "write every expert as a separate checkpoint: DIR/expert_0, DIR/expert_1, …"
    command = _add_command(commands, "split", text)
    command.add_argument(
        "--experts", type=_numbers, help="numbers of the experts, e.g. 0,2 (default: all)"
    )
    command.add_argument(
        "--whole", action="store_true", help="write whole dense models instead of experts alone"
    )
    _add_modules(command, "a module to split; may be repeated (default: all that have experts)")


def _add_prune(commands: argparse._SubParsersAction) -> None:
    text = "keep some experts and their outputs of the routers"
    command = _add_command(commands, "prune", text)
    command.add_argument(
        "--keep", type=_numbers, required=True, help="numbers of the kept experts, e.g. 0,2"
    )
    command.add_argument(
        "--top-k",
        type=int,
        help="experts per token (default: as before, but at most as many as are kept)",
    )
    _add_modules(command, "a module to prune; may be repeated (default: all that have experts)")


def _add_list(commands: argparse._SubParsersAction) -> None:
    text = "print where a checkpoint has experts, and where they come from"
    command = commands.add_parser("list", help=text, description=text)
    command.add_argument("folder", type=Path, metavar="DIR", help="the checkpoint")
    command.add_argument(
        "--compare", action="store_true", help="read all experts and compare them with expert 0"
    )


def _add_modules(command: argparse.ArgumentParser, text: str, required: bool = False) -> None:
    command.add_argument(
        "--module",
        dest="modules",
        action="append",
        choices=MODULES,
        required=required,
        help=text,
    )


def _add_placement(command: argparse.ArgumentParser) -> None:
    """Add the options that say which layers get experts, and how routers choose and start."""
    command.add_argument("--top-k", type=int, default=2, help="experts per token (default: 2)")
    command.add_argument(
        "--layers",
        type=_layers,
        default="all",
        help="the decoder layers that get experts: "
        f"{', '.join(NAMED_LAYERS)}, or numbers like 0,4 (default: all)",
    )
    command.add_argument(
        "--seed", type=int, default=0, help="the random seed of the routers (default: 0)"
    )


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: numbers from 0 up, like 0,2")
    return tuple(int(number) for number in text.split(","))


def _layers(text: str) -> str | tuple[int, ...]:
    if text in NAMED_LAYERS:
        return text
    try:
        return _numbers(text)
    except argparse.ArgumentTypeError as error:
        names = ", ".join(NAMED_LAYERS)
        raise argparse.ArgumentTypeError(f"{error}, or one of {names}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse `arguments`, run the command and return the exit code that the module's docstring
    lists."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parser().parse_args(arguments)
    # The manifest of a new checkpoint records the command that made it.
    args.line = shlex.join(["python", "-m", "unimoe_jax.experts", *arguments])
    try:
        if args.command == "list":
            return exit_quietly_on_closed_pipe(lambda: _list(args))
        COMMANDS[args.command](args, open_experts("base", args.source, args.model))
    except BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValidationError as error:
        print(f"error: {first_problem(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


# ----------------------------------------------------------------------------------- commands


def _list(args: argparse.Namespace) -> int:
    for line in listing(args.folder, args.compare):
        print(line)
    return 0


def moe_settings(
    modules: Sequence[ModuleName], args: argparse.Namespace, num_experts: int
) -> dict[ModuleName, MoEConfig]:
    """Settings of the experts of each module.

    Encoder and connector get the routers of CuMo, the decoder the routers of Uni-MoE.

    Raises:
        ValidationError: the options do not fit each other.
    """
    cumo_router = RouterConfig(dtype_order="softmax_cast_topk", init="fan_in")
    return {
        module: MoEConfig(
            num_experts=num_experts,
            top_k=args.top_k,
            layers=args.layers if module == "decoder" else "all",
            router=RouterConfig() if module == "decoder" else cumo_router,
        )
        for module in modules
    }


def _upcycle(args: argparse.Namespace, base: Opened) -> None:
    moe = moe_settings(args.modules, args, args.num_experts)
    made = place_experts(base, [base] * args.num_experts, moe, args.seed)
    write(made, base, [], args.target, args.line, print)


def _assemble(args: argparse.Namespace, base: Opened) -> None:
    # The manifest identifies checkpoints by their names, so a name means one checkpoint.
    opened = {base.name: base}
    experts = []
    for text in args.experts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConvertError(f"--expert {text}: write NAME=DIR")
        if name not in opened:
            opened[name] = open_experts(name, Path(path))
        first_path = opened[name].checkpoint.path
        if first_path.absolute() != locate_checkpoint(Path(path)).folder.absolute():
            raise ConvertError(
                f"--expert {text}: {name} is {first_path} already; choose another name"
            )
        experts.append(opened[name])
    moe = moe_settings(args.modules or ["decoder"], args, len(experts))
    made = place_experts(base, experts, moe, args.seed)
    write(made, base, list(opened.values()), args.target, args.line, print)


def _split(args: argparse.Namespace, base: Opened) -> None:
    modules = _modules(args, base)
    experts = args.experts or range(base.num_experts(modules[0]))
    made = {
        args.target / f"expert_{expert}": one_expert(base, modules, expert, args.whole)
        for expert in experts
    }
    # Check all folders before the first is written, so that a refused command writes none.
    for folder in made:
        if folder.exists():
            raise ConvertError(f"{folder}: exists already; remove it or choose another --to")
    for folder, checkpoint in made.items():
        write(checkpoint, base, [], folder, args.line, print)


def _prune(args: argparse.Namespace, base: Opened) -> None:
    made = fewer_experts(base, _modules(args, base), args.keep, args.top_k)
    write(made, base, [], args.target, args.line, print)


def _modules(args: argparse.Namespace, base: Opened) -> list[ModuleName]:
    """The modules that a command concerns: those of --module, or all that have experts.

    Raises:
        ConvertError: the checkpoint has no experts, or the modules have different numbers of them.
    """
    counts = {module: base.num_experts(module) for module in MODULES}
    modules: list[ModuleName] = args.modules or [module for module in MODULES if counts[module]]
    if not modules:
        raise ConvertError(f"{args.source}: has no experts")
    # One number chooses the same expert in every module.
    if len({counts[module] for module in modules}) > 1:
        numbers = ", ".join(f"{module} {counts[module]}" for module in modules)
        raise ConvertError(
            f"{args.source}: experts differ in number ({numbers}); name one --module"
        )
    return modules


COMMANDS = {"upcycle": _upcycle, "assemble": _assemble, "split": _split, "prune": _prune}

if __name__ == "__main__":
    sys.exit(main())
