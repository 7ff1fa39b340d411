"""Ask a trained or converted model.

    python -m unimoe_jax.generate --model RUN_OR_CHECKPOINT --image a.png --prompt "What is this?"
    python -m unimoe_jax.generate --model … --chat
    python -m unimoe_jax.generate --model … --input questions.jsonl --output answers.jsonl

--model: a run directory (its last stage that leaves a whole model), a stage's `final` folder, or a
folder that `python -m unimoe_jax.convert import` wrote. Media flags may be repeated. Placeholders
in the prompt (<image>, <audio>, <video>) say where the files belong; without placeholders the files
come first. A line of the questions is
{"id": …, "prompt": "…", "image": PATH or [PATH, …], "speech": …, "audio": …, "video": …} with any
sampling setting, or {"messages": [{"role": "user", "text": "…", "image": …}, …]}. Paths are
relative to the questions file, and a list of images under "video" is one video.

Exit codes: 0 the questions were answered (a file of answers may record errors), 2 a question or a
setting cannot be used, 130 after Ctrl-C, 141 if the reader of the output has closed it.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unimoe_jax.checkpoints.checksums import CheckpointError
from unimoe_jax.config import MEDIA, ConfigError, MediaName, MeshConfig
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
from unimoe_jax.runtime.cpu import prepare, settle_cpu
from unimoe_jax.runtime.pipes import exit_quietly_on_closed_pipe
from unimoe_jax.runtime.program import program_name

AXES = tuple(name for name in MeshConfig.model_fields if name != "rules")


class _AppendMedia(argparse.Action):
    """Collects the files of all media flags in one list, in the order of the command line."""

    def __init__(self, *args: Any, kind: MediaName, **options: Any):
        super().__init__(*args, **options)
        self.kind: MediaName = kind

    def __call__(self, parser, namespace, value, option=None):
        del parser, option
        namespace.media = [*(namespace.media or []), Media(self.kind, (str(value),))]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("generate"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, type=Path, metavar="PATH")
    question = parser.add_argument_group("one question")
    question.add_argument("--prompt", metavar="TEXT")
    for kind in MEDIA:
        question.add_argument(
            f"--{kind}", action=_AppendMedia, kind=kind, dest="media", metavar="PATH"
        )
    question.add_argument(
        "--show-routing",
        nargs="?",
        const="routing.json",
        type=Path,
        metavar="FILE",
        help="print which experts the tokens went to, and save it (default: routing.json)",
    )
    many = parser.add_argument_group("a conversation, or many questions")
    many.add_argument("--chat", action="store_true", help="ask questions in a terminal")
    many.add_argument("--input", type=Path, metavar="FILE", help="questions, JSON lines")
    many.add_argument(
        "--output", type=Path, metavar="FILE", help="answers; the file is continued if it exists"
    )
    many.add_argument(
        "--batch-size",
        type=int,
        default=BATCH,
        metavar="N",
        help=f"questions answered side by side (default: {BATCH})",
    )
    sampling = parser.add_argument_group("sampling (default: generation_config.json, else greedy)")
    sampling.add_argument("--temperature", type=float, metavar="X", help="0: greedy")
    sampling.add_argument("--top-p", type=float, metavar="X")
    sampling.add_argument("--top-k", type=int, metavar="N", help="0: off")
    sampling.add_argument("--seed", type=int, default=0, metavar="N")
    sampling.add_argument("--max-new-tokens", type=int, metavar="N")
    loading = parser.add_argument_group("how the model is loaded")
    loading.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        help="default: float32 on a CPU, bfloat16 on other devices",
    )
    loading.add_argument(
        "--mesh", metavar="AXIS=N,…", help=f"use all devices, over {', '.join(AXES)}"
    )
    loading.add_argument(
        "--template", choices=sorted(TEMPLATES), help="default: the template of the model"
    )
    loading.add_argument("--quiet", action="store_true", help="do not list compiled programs")
    return parser


def mesh_of(text: str | None) -> MeshConfig | None:
    """`expert=4,data=2` -> sizes of the mesh axes; None -> None.

    Raises:
        GenerationError: an axis is unknown, or the sizes are not allowed.
    """
    if text is None:
        return None
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis not in AXES or not re.fullmatch(r"-1|0*[1-9]\d*", size):
            raise GenerationError(
                f"--mesh {text}: {part!r} is not AXIS=N; axes: {', '.join(AXES)}; N from 1 up, or "
                "-1 for all devices that the other axes leave"
            )
        sizes[axis] = int(size)
    try:
        return MeshConfig.model_validate(sizes)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise GenerationError(f"--mesh {text}: {reason}") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code; see the module's docstring.

    Errors that the user can mend are printed in one line. A closed pipe (`… | head`) ends the
    command without a message.
    """
    tolerate_bytes()
    try:
        args = make_parser().parse_args(arguments)
        check(args)
        return exit_quietly_on_closed_pipe(lambda: run_command(args))
    except (GenerationError, CheckpointError, ConfigError, ShardingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def tolerate_bytes() -> None:
    """Read and print bytes that are no valid text without an exception.

    A file name may hold such bytes, so they are kept when they are read, and escaped when they are
    printed. A question that holds them is refused later, with a message.
    """
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def check(args: argparse.Namespace) -> None:
    """Check the flags before the model is read, which takes long.

    Raises:
        GenerationError: flags exclude each other, a value is not allowed, or a file cannot be read
            or written; the message names the flag.
    """
    # One command is one conversation, one file of questions, or one question.
    modes = {"--chat": args.chat, "--input": args.input, "--prompt": args.prompt is not None}
    chosen = [flag for flag, is_given in modes.items() if is_given]
    if len(chosen) > 1 or (not chosen and not args.media):
        raise GenerationError(
            f"give one of {', '.join(modes)}, or media alone; got {chosen or 'none'}"
        )
    if (args.input is None) != (args.output is None):
        raise GenerationError("--input and --output go together")
    if args.media and (args.input or args.chat):
        raise GenerationError(
            "media flags belong to one question; name the files in the questions of --input, or "
            "attach them in the chat with commands such as /image PATH"
        )
    if args.show_routing and (args.input or args.chat):
        raise GenerationError("--show-routing belongs to one question")
    # Values, and paths of files.
    if args.batch_size < 1:
        raise GenerationError(f"--batch-size {args.batch_size}; allowed: 1 or more")
    if args.input and not args.input.exists():
        raise GenerationError(f"--input {args.input}: no such file")
    _check_writable("--output", args.output)
    _check_writable("--show-routing", args.show_routing)
    # Settings: both calls raise an error if a value is not allowed.
    sampling_of(args).checked()
    mesh_of(args.mesh)


def _check_writable(flag: str, path: Path | None) -> None:
    """Refuse a path at which no file can be written; None is no path."""
    if path and path.is_dir():
        raise GenerationError(f"{flag} {path}: this is a folder; name a file")
    if path and not path.parent.is_dir():
        raise GenerationError(f"{flag} {path}: no such folder: {path.parent}; make it first")
    if path and not os.access(path if path.exists() else path.parent, os.W_OK):
        raise GenerationError(f"{flag} {path}: cannot be written; name a file elsewhere")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """The settings given on the command line."""
    return Sampling(args.temperature, args.top_p, args.top_k, args.seed, args.max_new_tokens)


def run_command(args: argparse.Namespace) -> int:
    """Load the model and do what the flags ask for. Returns the exit code."""
    # Prepare the process. Compiled programs are kept for later commands.
    settle_cpu()
    prepare(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "unimoe_jax/xla")
    # Load the model. Messages go to stderr, so that stdout holds answers alone.
    options = LoadOptions(
        precision=args.precision,
        mesh=mesh_of(args.mesh),
        template=args.template,
        trace=frozenset({"experts"} if args.show_routing else ()),
    )
    log = None if args.quiet else lambda line: print(line, file=sys.stderr)
    model = load(args.model, options, log)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    sampling = sampling_of(args)
    if args.show_routing:
        routed_layers(model)  # refuse a model without experts before anything is compiled
    if args.chat:
        run_chat(Chat(model, sampling))
    elif args.input:
        answered, failed = answer_file(model, args.input, args.output, sampling, args.batch_size)
        print(f"{answered} answered, {failed} failed -> {args.output}")
    else:
        answer_one(model, args, sampling)
    return 0


def answer_one(model: Model, args: argparse.Namespace, sampling: Sampling) -> None:
    """Print the answer to one question piece by piece, then its routing if that is wanted."""
    request = ask(args.prompt or "", args.media or (), sampling)
    if note := unanswered_tags(request):
        print(f"note: {note}", file=sys.stderr)
    pieces = model.stream(request)
    while True:
        try:
            print(next(pieces), end="", flush=True)
        except StopIteration as end:
            answer = end.value  # the generator returns the whole answer
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
