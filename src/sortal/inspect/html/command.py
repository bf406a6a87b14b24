"""The command ``sortal show``: a page of a model or a file."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sortal.errors import ArgumentError, SortalError
from sortal.inspect.html.picture import show
from sortal.sharding.placing import abstract

_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def parse(argv: Sequence[str] | None = None, prog: str | None = None) -> Any:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Write a page of HTML that shows a model or a file by kind: a "
        "tree, filters to try, histograms, a treemap, and with two what changed.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    what = (
        "a checkpoint of Sortal or Orbax, a folder of Hugging Face, .safetensors, "
        ".npz or .gguf; or package.module:function, which is called for a model"
    )
    add("model", help=what)
    add("other", nargs="?", help="the same again, to compare with")
    add("-o", "--output", required=True, metavar="FILE", help="such as model.html")
    add("--step", type=_step, default="latest", help="which step (latest)")
    add("--title", help="of the page (the name of the class or file)")
    add(
        "--abstract", action="store_true",
        help="call the function for shapes alone, which needs no memory",
    )  # fmt: skip
    add(
        "--no-values", action="store_true",
        help="read no array: no histograms, and no comparison of values",
    )  # fmt: skip
    return parser.parse_args(argv)


def _step(text: str) -> int | str:
    if text == "latest" or text.isdigit():
        return text if text == "latest" else int(text)
    raise argparse.ArgumentTypeError(f"must be a number or 'latest', found {text}")


def model_of(text: str, shapes_only: bool) -> Any:
    """The path that a text names, or the model of the function that it names.

    Raises:
      ArgumentError: there is no such function, or it cannot be called without
        arguments.
    """
    if Path(text).exists() or not _FUNCTION.fullmatch(text):
        return text
    function = _function(*text.split(":"))
    try:
        inspect.signature(function).bind()
    except TypeError as e:
        raise ArgumentError(
            f"{text} cannot be called without arguments ({e}). Write a function that "
            "takes none and returns the model."
        ) from None
    return abstract(function) if shapes_only else function()


def _function(module: str, name: str) -> Callable[[], Any]:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` finds modules
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as e:
        if e.name is None or not f"{module}.".startswith(f"{e.name}."):
            raise
        raise ArgumentError(
            f"there is no module {e.name}, and no file {module}:{name}."
        ) from None
    finally:
        sys.path.pop(0)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"{module} has no function {name}.")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentError(f"{module}:{name} is no function, but {found!r:.60}.")
    return found


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Writes the page; returns the exit code, 2 where there was nothing to show."""
    options = parse(argv, prog)
    names = [options.model, *filter(None, [options.other])]
    try:
        things = [model_of(name, options.abstract) for name in names]
        picture = show(
            *things,
            values=not options.no_values,
            title=options.title,
            step=options.step,
        )
        picture.save(options.output)
    except (SortalError, OSError) as e:
        sys.stderr.write(f"sortal show: {e}\n")
        return 2
    size = Path(options.output).stat().st_size
    text = f"{options.output}: {picture.summary}; {size / 1000:.0f} kB\n"
    # What the terminal cannot show is escaped.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
    return 0
