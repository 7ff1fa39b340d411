"""Check whether this machine can train and run models: packages, devices, memory, folders.

    python -m unimoe_jax.doctor [--output DIR] [--cache DIR] [--json]

Every failure says what to do. Exit codes: 0 nothing would fail; 1 something would; 2 bad arguments;
130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from unimoe_jax.doctor.checks import Check, has_failed
from unimoe_jax.doctor.devices import check_devices
from unimoe_jax.doctor.folders import check_cache_folder, check_run_folder
from unimoe_jax.doctor.machine import check_machine
from unimoe_jax.doctor.packages import (
    check_optional,
    check_versions,
    check_without_metadata,
    installed_plugins,
    installed_torch_family,
    module_of,
    required,
)
from unimoe_jax.doctor.printing import as_json, as_text
from unimoe_jax.doctor.probing import import_errors, run_probe
from unimoe_jax.doctor.requirements import installed_version, read_metadata
from unimoe_jax.runtime.pipes import exit_quietly_on_closed_pipe
from unimoe_jax.runtime.program import program_name


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("doctor"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output", default="runs", metavar="DIR", help="where runs will be made; default: runs"
    )
    parser.add_argument(
        "--cache", metavar="DIR", help="data.cache of the run file; default: the user's cache"
    )
    parser.add_argument("--json", action="store_true", help="print the results as JSON")
    parser.add_argument(
        "--timeout",
        type=float,
        default=120.0,
        metavar="SECONDS",
        help="how long imports, and the start of the devices, may take; default: 120",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code; see the module's docstring."""
    args = parse(arguments)
    try:
        return exit_quietly_on_closed_pipe(lambda: run_command(args))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run_command(args: argparse.Namespace) -> int:
    """Check everything and print the results."""
    if sys.stderr.isatty():
        print("importing the packages and starting the devices …", file=sys.stderr)
    checks = run_checks(args.output, args.cache, args.timeout)
    print(as_json(checks) if args.json else as_text(checks, colours=sys.stdout.isatty()))
    return 1 if has_failed(checks) else 0


def run_checks(output: str, cache: str | None, timeout: float) -> list[Check]:
    """All checks, in the order of the report."""
    metadata = read_metadata()
    modules = []
    if metadata is not None:
        modules = [module_of(r) for r in required(metadata) if installed_version(r.name)]
    # A module that hangs or crashes must not end this process, so other processes import them.
    with ThreadPoolExecutor() as pool:
        package_errors = pool.submit(import_errors, modules, timeout)
        torch_errors = pool.submit(import_errors, installed_torch_family(), timeout)
        devices = pool.submit(run_probe, ["devices"], timeout)
    if metadata is None:
        versions, optional = check_without_metadata(), []
    else:
        versions = check_versions(metadata, package_errors.result())
        optional = check_optional(metadata, torch_errors.result())
    return [
        *versions,
        *check_devices(devices.result(), installed_plugins()),
        *check_machine(),
        *optional,
        check_cache_folder(cache),
        check_run_folder(output),
    ]


if __name__ == "__main__":
    sys.exit(main())
