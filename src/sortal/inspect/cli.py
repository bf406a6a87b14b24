"""The command ``sortal``."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

_PROGRAMS = {
    "demo": "sortal.demo.digits",
    "generate": "sortal.demo.generate",
    "show": "sortal.inspect.html.command",
    "learn": "sortal.learn.cli",
    "launch": "sortal.distributed.launch",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command ``sortal``.

    Returns:
      The exit code: 0 if all went well, 1 where ``diff`` or ``verify`` found
      something, 2 where that could not be judged, such as without a command, a package
      or a file that can be read, 130 if stopped from the keyboard.

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
        data, report, status = _report(stored, options)
    except (SortalError, OSError, MemoryError) as e:
        why = str(e) or type(e).__name__
        print(f"sortal {options.command}: {why}", file=sys.stderr)
        return 2
    _print(json.dumps(_finite(data), indent=1) if options.json else report)
    return status


def _finite(x: Any) -> Any:
    """The same data without what JSON lacks: NaN and infinities become text."""
    if isinstance(x, float) and not math.isfinite(x):
        return str(x)
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    return list(map(_finite, x)) if isinstance(x, (list, tuple)) else x


def _print(report: Any) -> None:
    """Prints text or a report; what the terminal cannot show is escaped."""
    if isinstance(report, str):
        text = report + "\n"
    else:
        from rich.console import Console

        console = Console()
        with console.capture() as drawn:
            console.print(report)
        text = drawn.get()
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read this wants no more; Python would complain again at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(stored: Any, options: argparse.Namespace) -> tuple[Any, Any, int]:
    """What to print as JSON, what otherwise, and the exit code."""
    if options.command == "inspect":
        found = stored.inspect(options.path, options.step)
        return found.data(), found, 0
    if options.command == "diff":
        steps = (options.step_a, options.step_b)
        found = stored.diff(options.a, options.b, steps)
        return found.data(), found, int(bool(found.rows))
    from rich.console import Console
    from rich.progress import Progress

    hidden = options.json or not sys.stderr.isatty()
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task("reading", total=None)

        def progress(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        if options.command == "verify":
            found = stored.check(options.path, options.step, progress)
            return found.data(), found, int(bool(found.rows))
        target = options.target
        count = stored.convert(options.source, target, options.step, progress)
    data = {"arrays": count, "target": target}
    return data, f"{count} arrays written to {target}", 0


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
        ("show", "write a page that shows a model or a file by kind"),
        ("learn", "learn Sortal in twenty problems"),
        ("launch", "run a program in several processes on this machine"),
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
