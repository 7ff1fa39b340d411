"""Ask a trained or converted model.

    python -m unimoe_jax.generate --model RUN_OR_CHECKPOINT --image a.png --prompt "What is this?"
    python -m unimoe_jax.generate --model … --chat
    python -m unimoe_jax.generate --model … --input questions.jsonl --output answers.jsonl

--model: a run directory (its last whole stage), a stage's `final` folder, or what
`python -m unimoe_jax.convert import` wrote. Media flags may repeat; placeholders in the prompt
(<image>, <audio>, <video>) say where they stand, otherwise they come first. A question line is
{"id": …, "prompt": "…", "image": PATH or [PATH, …], "speech": …, "audio": …, "video": …} with any
sampling setting, or {"messages": [{"role": "user", "text": "…", "image": …}, …]}; paths are
relative to the file, and a list of images under "video" is one video.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from pydantic import ValidationError

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.config import MEDIA, ConfigError, MeshConfig
from unimoe_jax.data.conversation import TEMPLATES
from unimoe_jax.generate.chat import Chat, run_chat
from unimoe_jax.generate.engine.settings import Sampling
from unimoe_jax.generate.errors import GenerationError
from unimoe_jax.generate.loader import LoadOptions, load
from unimoe_jax.generate.model import BATCH, Model
from unimoe_jax.generate.prompt import unanswered_tags
from unimoe_jax.generate.question_files import answer_file
from unimoe_jax.generate.request import Media, ask
from unimoe_jax.generate.routing import report_lines, routed_layers, routing_report, save_report
from unimoe_jax.parallel.sharding import ShardingError
from unimoe_jax.runtime.cpu import settle_cpu
from unimoe_jax.runtime.memory import keep_freed_memory
from unimoe_jax.runtime.pipes import exit_quietly_on_closed_pipe
from unimoe_jax.runtime.program import program_name

AXES = tuple(name for name in MeshConfig.model_fields if name != "rules")


class _AppendMedia(argparse.Action):
    """All media flags fill one list, in the order in which they are given."""

    def __call__(self, parser, namespace, value, option=None):
        del parser
        media = [*(namespace.media or []), Media(option.lstrip("-"), (value,))]
        namespace.media = media


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog=program_name("generate"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--model", required=True, type=Path, metavar="PATH")
    asking = top.add_argument_group("one question")
    asking.add_argument("--prompt", metavar="TEXT")
    for kind in MEDIA:
        asking.add_argument(f"--{kind}", action=_AppendMedia, dest="media", metavar="PATH")
    asking.add_argument(
        "--show-routing",
        nargs="?",
        const="routing.json",
        type=Path,
        metavar="FILE",
        help="print which experts the tokens went to, and save it (default: routing.json)",
    )
    many = top.add_argument_group("a conversation, or many questions")
    many.add_argument("--chat", action="store_true")
    many.add_argument("--input", type=Path, metavar="FILE", help="questions, JSON lines")
    many.add_argument("--output", type=Path, metavar="FILE", help="answers; continued if it exists")
    many.add_argument("--batch-size", type=int, default=BATCH, metavar="N")
    how = top.add_argument_group("sampling (default: generation_config.json, else greedy)")
    how.add_argument("--temperature", type=float, metavar="X", help="0: greedy")
    how.add_argument("--top-p", type=float, metavar="X")
    how.add_argument("--top-k", type=int, metavar="N", help="0: off")
    how.add_argument("--seed", type=int, default=0, metavar="N")
    how.add_argument("--max-new-tokens", type=int, metavar="N")
    held = top.add_argument_group("how the model is held")
    held.add_argument("--precision", choices=("float32", "bfloat16"))
    held.add_argument("--mesh", metavar="AXIS=N,…", help=f"all devices, over {', '.join(AXES)}")
    held.add_argument("--template", choices=sorted(TEMPLATES), help="default: the model's own")
    held.add_argument("--quiet", action="store_true", help="do not list compiled programs")
    return top


def mesh_of(text: str | None) -> MeshConfig | None:
    """`expert=4,data=2` -> sizes of axes; None stays.

    Raises:
        GenerationError: an unknown axis, or sizes that no mesh has.
    """
    if text is None:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not re.fullmatch(r"-1|0*[1-9]\d*", size):
            raise GenerationError(
                f"--mesh {text}: {part!r} is not AXIS=N; axes: {', '.join(AXES)}; N from 1 up, or "
                "-1: what the others leave"
            )
        sizes[axis] = int(size)
    try:
        return MeshConfig(**sizes)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise GenerationError(f"--mesh {text}: {reason}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, or 2 where something cannot be answered; one line says why.

    130 after Ctrl-C; 141, in silence, where whoever reads the answers has gone (`… | head`).
    """
    tolerate_bytes()
    try:
        args = parser().parse_args(arguments)
        check(args)
        return exit_quietly_on_closed_pipe(lambda: run(args))
    except (GenerationError, CheckpointError, ConfigError, ShardingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def tolerate_bytes() -> None:
    """What is typed may hold bytes that are no text: they are kept until the question is refused
    or the file is opened, and escaped where they are shown."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def check(args: argparse.Namespace) -> None:
    """What the flags contradict, before a model is read.

    Raises:
        GenerationError: they are named.
    """
    ways = {"--chat": args.chat, "--input": args.input, "--prompt": args.prompt is not None}
    asked = [name for name, given in ways.items() if given]
    if len(asked) > 1 or (not asked and not args.media):
        raise GenerationError(
            f"give one of {', '.join(ways)}, or media alone; got {asked or 'none'}"
        )
    if (args.input is None) != (args.output is None):
        raise GenerationError("--input and --output go together")
    if args.media and (args.input or args.chat):
        raise GenerationError("media flags belong to one question; here they are named elsewhere")
    if args.show_routing and (args.input or args.chat):
        raise GenerationError("--show-routing belongs to one question")
    if args.batch_size < 1:
        raise GenerationError(f"--batch-size {args.batch_size}; allowed: 1 or more")
    if args.input and not args.input.exists():
        raise GenerationError(f"--input {args.input}: no such file")
    _check_place("--output", args.output)
    _check_place("--show-routing", args.show_routing)
    sampling_of(args).checked()
    mesh_of(args.mesh)


def _check_place(flag: str, path: Path | None) -> None:
    if path and path.is_dir():
        raise GenerationError(f"{flag} {path}: this is a folder; name a file")
    if path and not path.parent.is_dir():
        raise GenerationError(f"{flag} {path}: no such folder: {path.parent}; make it first")
    if path and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise GenerationError(f"{flag} {path}: cannot be written; name a file elsewhere")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The settings given on the command line."""
    return Sampling(args.temperature, args.top_p, args.top_k, args.seed, args.max_new_tokens)


def run(args: argparse.Namespace) -> int:
    """Load and ask."""
    settle_cpu()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "unimoe_jax/xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    trace = frozenset({"experts"} if args.show_routing else ())
    settings = LoadOptions(args.precision, mesh_of(args.mesh), args.template, trace=trace)
    tell = None if args.quiet else lambda line: print(line, file=sys.stderr)
    model = load(args.model, settings, tell)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    sampling = sampling_of(args)
    if args.show_routing:
        routed_layers(model)
    if args.chat:
        run_chat(Chat(model, sampling))
    elif args.input:
        answered, failed = answer_file(model, args.input, args.output, sampling, args.batch_size)
        print(f"{answered} answered, {failed} failed -> {args.output}")
    else:
        answer_one(model, args, sampling)
    return 0


def answer_one(model: Model, args: argparse.Namespace, sampling: Sampling) -> None:
    """Stream the answer to one question, then its routing if it was asked for."""
    request = ask(args.prompt or "", args.media or (), sampling)
    if note := unanswered_tags(request):
        print(f"note: {note}", file=sys.stderr)
    pieces = model.stream(request)
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as finished:
            answer = finished.value
            break
    print()
    if args.show_routing:
        report = routing_report(model, answer)
        for line in report_lines(report):
            print(line)
        save_report(report, args.show_routing)
        print(f"routing saved to {args.show_routing}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
