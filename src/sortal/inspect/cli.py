"""The command ``sortal``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import sys
from collections.abc import Sequence

_PROGRAMS = {"demo": "sortal.demo.digits", "generate": "sortal.demo.generate"}


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
    # What follows a command is read by its program, imported only if it is run.
    known, rest = parser.parse_known_args(argv)
    if known.command is None:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 2
    program = importlib.import_module(_PROGRAMS[known.command])
    try:
        return program.main(rest, prog=f"sortal {known.command}")
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
    for name, does in (
        ("demo", "learn handwritten digits in under a minute"),
        ("generate", "continue a text with SmolLM2-135M"),
    ):
        commands.add_parser(
            name,
            help=f"{does} (sortal {name} --help)",
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
