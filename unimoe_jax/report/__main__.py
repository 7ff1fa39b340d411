"""report.html and plots/*.png of a run, made from what the run left in its directory.

python -m unimoe_jax.report RUN_DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unimoe_jax.report.numbers import ReportError
from unimoe_jax.report.page import write_report

# ----------------------------------------------------------------------------------- numbers


# -------------------------------------------------------------------------------------- text


# -------------------------------------------------------------------------------------- HTML


# ------------------------------------------------------------------------------------ public


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 written, 2 nothing to report, a broken file, or no place to write."""
    parser = argparse.ArgumentParser(
        prog="python -m unimoe_jax.report",
        description="Writes report.html and plots/*.png from the files of a run.",
        epilog="example: python -m unimoe_jax.report runs/tiny",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the directory of a run")
    run_dir = parser.parse_args(arguments).run_dir
    try:
        print(write_report(run_dir))
    except (ReportError, ModuleNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        reason = f"{error.filename or run_dir}: {error.strerror or error}"
        remedy = "the report is written into the run's directory: copy that to where you may write"
        print(f"error: {reason}; {remedy}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
