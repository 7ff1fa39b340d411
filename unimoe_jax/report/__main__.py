"""Draw the report of a run again, from the files in its directory.

    python -m unimoe_jax.report RUN_DIR

writes report.html and plots/*.png into the directory, and prints the path of report.html. It also
works while the run is still training. Exit codes: 0 written; 2 nothing to report, a broken file,
or no permission to write.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unimoe_jax.report.numbers import ReportError
from unimoe_jax.report.page import write_report
from unimoe_jax.runtime.program import program_name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("report"),
        description="Writes report.html and plots/*.png from the files of a run.",
        epilog=f"example: {program_name('report')} runs/tiny",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the directory of a run")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see the module's docstring."""
    run_dir = parse(arguments).run_dir
    try:
        print(write_report(run_dir))
    except (ReportError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        problem = f"{error.filename or run_dir}: {error.strerror or error}"
        remedy = (
            "the report is written into the run directory, so copy that directory to a place "
            "where you may write"
        )
        print(f"error: {problem}; {remedy}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
