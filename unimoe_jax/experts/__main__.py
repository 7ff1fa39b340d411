"""Experts between checkpoints: dense layers into experts, experts into dense layers.

    python -m unimoe_jax.experts upcycle  --from DENSE --to MOE --module encoder --num-experts 4
    python -m unimoe_jax.experts assemble --from BASE --expert NAME=DIR … --to MOE
    python -m unimoe_jax.experts split    --from MOE --to FOLDER
    python -m unimoe_jax.experts prune    --from MOE --keep 0,2 --to MOE
    python -m unimoe_jax.experts list     DIR

Checkpoints are those of this package: an import, what a stage of a run left (`checkpoints/STAGE/
final`; a run directory: its last whole stage), or what this program wrote; to be read, also PyTorch
folders, as `unimoe_jax.convert import` takes them. Adapters are merged. What is written appears
complete or not at all, with a manifest of parents and hashes. Exit codes: 0 done, 2 bad input, 130
interrupted, 141 who reads the list has gone (`… | head`).
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
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(
        prog=program_name("experts"), description=__doc__, formatter_class=raw
    )
    commands = top.add_subparsers(dest="command", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.add_argument("--from", dest="source", required=True, type=Path, metavar="DIR")
        added.add_argument("--to", dest="target", required=True, type=Path, metavar="DIR")
        added.add_argument("--model", type=Path, help="model.yaml of --from, if it has none")
        return added

    up = command("upcycle", "every expert starts as the dense layer; routers start at random")
    up.add_argument("--num-experts", type=int, required=True)
    _add_modules(up, "may be repeated", required=True)
    _add_placement(up)
    join = command("assemble", "expert 0, 1, … is the dense layer of the checkpoints named")
    join.add_argument(
        "--expert",
        dest="experts",
        action="append",
        required=True,
        metavar="NAME=DIR",
        help="in order; one may occur several times",
    )
    _add_modules(join, "default: decoder")
    _add_placement(join)
    cut = command("split", "every expert as a checkpoint of its own, DIR/expert_0, …")
    cut.add_argument("--experts", type=_numbers, help="which, e.g. 0,2 (default: all)")
    cut.add_argument("--whole", action="store_true", help="dense models, not only their experts")
    _add_modules(cut, "default: all that have experts")
    less = command("prune", "keep some experts, and their rows of the routers")
    less.add_argument("--keep", type=_numbers, required=True, help="which, e.g. 0,2")
    less.add_argument("--top-k", type=int, help="default: as before, or as many as are left")
    _add_modules(less, "default: all that have experts")
    show = commands.add_parser("list", help="where there are experts, and of what origin")
    show.add_argument("folder", type=Path, metavar="DIR")
    show.add_argument("--compare", action="store_true", help="how far they are from one another")
    return top


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
    command.add_argument("--top-k", type=int, default=2)
    command.add_argument(
        "--layers",
        type=_layers,
        default="all",
        help=f"of the decoder: {', '.join(NAMED_LAYERS)}, or numbers as 0,4 (default: all)",
    )
    command.add_argument("--seed", type=int, default=0, help="of the routers")


def _numbers(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[0-9]+(,[0-9]+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: allowed: numbers from 0 up, as 0,2")
    return tuple(int(number) for number in text.split(","))


def _layers(text: str) -> str | tuple[int, ...]:
    if text in NAMED_LAYERS:
        return text
    try:
        return _numbers(text)
    except argparse.ArgumentTypeError as error:
        names = ", ".join(NAMED_LAYERS)
        raise argparse.ArgumentTypeError(f"{error}, or one of {names}") from error


def _list(given: argparse.Namespace) -> int:
    for line in listing(given.folder, given.compare):
        print(line)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code; see the module's docstring."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    given = parser().parse_args(arguments)
    try:
        if given.command == "list":
            return exit_quietly_on_closed_pipe(lambda: _list(given))
        given.line = shlex.join(["python", "-m", "unimoe_jax.experts", *arguments])
        COMMANDS[given.command](given, open_experts("base", given.source, given.model))
    except BAD_INPUT as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        text = first["msg"].removeprefix("Value error, ")
        print(f"error: {where + ': ' if where else ''}{text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


# ----------------------------------------------------------------------------------- commands


def moe_settings(
    modules: Sequence[ModuleName], given: argparse.Namespace, num_experts: int
) -> dict[ModuleName, MoEConfig]:
    """Encoder and connector get CuMo's routers, the decoder Uni-MoE's. Raises ValidationError."""
    cumo = RouterConfig(dtype_order="softmax_cast_topk", init="fan_in")
    return {
        module: MoEConfig(
            num_experts=num_experts,
            top_k=given.top_k,
            layers=given.layers if module == "decoder" else "all",
            router=RouterConfig() if module == "decoder" else cumo,
        )
        for module in modules
    }


def _upcycle(given: argparse.Namespace, base: Opened) -> None:
    moe = moe_settings(given.modules, given, given.num_experts)
    made = place_experts(base, [base] * given.num_experts, moe, given.seed)
    write(made, base, [], given.target, given.line, print)


def _assemble(given: argparse.Namespace, base: Opened) -> None:
    named = {base.name: base}  # the manifest tells them apart by name
    experts = []
    for text in given.experts:
        name, equals, path = text.partition("=")
        if not (name and equals and path):
            raise ConvertError(f"--expert {text}: write NAME=DIR")
        if name not in named:
            named[name] = open_experts(name, Path(path))
        if (
            named[name].checkpoint.path.absolute()
            != locate_checkpoint(Path(path)).folder.absolute()
        ):
            raise ConvertError(f"--expert {text}: {name} is {named[name].checkpoint.path} already")
        experts.append(named[name])
    moe = moe_settings(given.modules or ["decoder"], given, len(experts))
    made = place_experts(base, experts, moe, given.seed)
    write(made, base, list(named.values()), given.target, given.line, print)


def _split(given: argparse.Namespace, base: Opened) -> None:
    modules = _modules(given, base)
    chosen = given.experts or range(base.num_experts(modules[0]))
    made = {
        given.target / f"expert_{expert}": one_expert(base, modules, expert, given.whole)
        for expert in chosen
    }
    for folder in made:  # before the first is written
        if folder.exists():
            raise ConvertError(f"{folder}: exists already; remove it or choose another --to")
    for folder, one in made.items():
        write(one, base, [], folder, given.line, print)


def _prune(given: argparse.Namespace, base: Opened) -> None:
    made = fewer_experts(base, _modules(given, base), given.keep, given.top_k)
    write(made, base, [], given.target, given.line, print)


def _modules(given: argparse.Namespace, base: Opened) -> list[ModuleName]:
    counts = {module: base.num_experts(module) for module in MODULES}
    chosen = given.modules or [module for module, count in counts.items() if count]
    if not chosen:
        raise ConvertError(f"{given.source}: has no experts")
    if len({counts[module] for module in chosen}) > 1:
        each = ", ".join(f"{module} {counts[module]}" for module in chosen)
        raise ConvertError(f"{given.source}: experts differ in number ({each}); name one --module")
    return chosen


COMMANDS = {"upcycle": _upcycle, "assemble": _assemble, "split": _split, "prune": _prune}

if __name__ == "__main__":
    sys.exit(main())
