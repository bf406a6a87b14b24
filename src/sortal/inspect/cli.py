"""The command ``sortal``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from typing import Any

_PROGRAMS = {"demo": "sortal.demo.digits", "generate": "sortal.demo.generate"}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command ``sortal``.

    Returns:
      The exit code: 0 if all went well, 1 where ``diff`` or ``verify`` found
      something, 2 without a command, where a package that is needed is missing or a
      file cannot be read, 130 if stopped from the keyboard.

    Example:
      >>> main([])
      usage: sortal [-h] [--version] command ...
      ...
      2
    """
    parser = _parser()
    # A program parses its own arguments, and is imported only if it is run.
    known, rest = parser.parse_known_args(argv)
    if known.command is None:
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        parser.print_help()
        return 2
    try:
        if known.command in _PROGRAMS:
            program = importlib.import_module(_PROGRAMS[known.command])
            return program.main(rest, prog=f"sortal {known.command}")
        if rest:
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return _with_files(known)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130


def _with_files(options: argparse.Namespace) -> int:
    """Runs the commands on files; returns the exit code, as ``main`` does."""
    from sortal.errors import SortalError
    from sortal.inspect import stored

    try:
        if options.command == "convert":
            count = stored.convert(options.source, options.target, options.step)
            report, status = None, 0
            data = {"arrays": count, "target": options.target}
            text = f"{count} arrays written to {options.target}"
        else:
            report, status = _report(stored, options)
            data, text = report.data(), ""
    except (SortalError, OSError) as e:
        print(f"sortal {options.command}: {e}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(data, indent=1))
    elif report is None:
        print(text)
    else:
        from rich.console import Console

        Console().print(report)
    return status


def _report(stored: Any, options: argparse.Namespace) -> tuple[Any, int]:
    if options.command == "inspect":
        return stored.inspect(options.path, options.step), 0
    if options.command == "diff":
        steps = (options.step_a, options.step_b)
        found = stored.diff(options.a, options.b, steps)
        return found, int(bool(found.rows))
    from rich.console import Console
    from rich.progress import Progress

    hidden = options.json or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("reading", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        found = stored.check(options.path, options.step, progress)
    return found, int(bool(found.rows))


def _step(text: str) -> int | str:
    if text == "latest" or text.isdigit():
        return text if text == "latest" else int(text)
    raise argparse.ArgumentTypeError(f"must be a number or 'latest', found {text}")


class _OneStep(argparse.Action):
    """Refuses ``diff --step``, which does not say of which side."""

    def __call__(self, parser: Any, *_: Any, **__: Any) -> None:
        parser.error("two are compared: write A B --step-a 1 --step-b 2 for --step")


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
    _add_file_commands(commands)
    return parser


def _add_file_commands(commands: Any) -> None:
    def add(name: str, text: str, *places: tuple[str, str]) -> Any:
        made = commands.add_parser(name, help=text, description=text)
        for place, about in places:
            made.add_argument(place, help=about)
        made.add_argument("--json", action="store_true", help="print JSON")
        return made

    any_file = "a checkpoint of Sortal or Orbax, .safetensors, .npz or .gguf"
    which = {"type": _step, "default": "latest", "help": "which step (latest)"}
    add("inspect", "what is in a file or checkpoint", ("path", any_file)).add_argument(
        "--step", **which
    )
    made = add("diff", "how two differ; exit code 1 if so", ("a", any_file), ("b", ""))
    made.add_argument("--step", nargs="*", action=_OneStep, help=argparse.SUPPRESS)
    made.add_argument("--step-a", **which)
    made.add_argument("--step-b", **which)
    add(
        "verify",
        "read every byte and checksum; exit code 1 if something is damaged",
        ("path", "a checkpoint of Sortal"),
    ).add_argument("--step", **which)
    target = ".safetensors, .npz, orbax:FOLDER, or a folder of steps of Sortal"
    add(
        "convert", "write one format as another", ("source", any_file),
        ("target", target),
    ).add_argument("--step", **which)  # fmt: skip


def version() -> str:
    """The version installed; of a source tree that is not installed, ``(source)``."""
    try:
        return importlib.metadata.version("sortal")
    except importlib.metadata.PackageNotFoundError:
        return "(source)"


if __name__ == "__main__":
    sys.exit(main())
