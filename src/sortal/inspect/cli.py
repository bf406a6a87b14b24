"""The command ``sortal``."""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command ``sortal``.

    Args:
      argv: the words after the command's name; those of this process if absent.

    Returns:
      The exit code: 0 if all went well, 2 without a command or where a package that
      is needed is missing, 130 if stopped from the keyboard.

    Raises:
      SystemExit: as argparse does, for ``--help``, ``--version`` and wrong words.

    Example:
      >>> main([])
      usage: sortal [-h] [--version] command ...
      ...
      2
    """
    parser = _parser()
    # What follows `demo` is read by the demo, which is imported only if it is run.
    known, rest = parser.parse_known_args(argv)
    if known.command is None:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 2
    from sortal.demo import digits

    try:
        return digits.main(rest, prog="sortal demo")
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sortal",
        description="Sortal: neural network modules for JAX. Say what each array is, "
        "once; everything else follows from its kind.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sortal {version()}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser(
        "demo",
        help="learn handwritten digits in under a minute (sortal demo --help)",
        add_help=False,
        allow_abbrev=False,
    )
    return parser


def version() -> str:
    """The version installed; of a source tree that is not installed, ``(source)``.

    Returns:
      The version.
    """
    try:
        return importlib.metadata.version("sortal")
    except importlib.metadata.PackageNotFoundError:
        return "(source)"


if __name__ == "__main__":
    sys.exit(main())
