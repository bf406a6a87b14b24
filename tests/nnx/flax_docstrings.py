"""Runs the examples of Flax NNX's docstrings with one word changed.

`python tests/nnx/flax_docstrings.py [--failures] [part of a module's name]` prints how
many statements run, and how many print what the docstring says.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import io
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path

from flax import nnx as flax_nnx

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def docstrings(root: Path) -> Iterator[tuple[str, str]]:
    """Each docstring of the package, with where it is."""
    for file in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            if text and ">>>" in text:
                name = getattr(node, "name", "")
                yield f"{file.relative_to(root).with_suffix('')}:{name}", text


def ours(text: str) -> str:
    """An example with `sortal.nnx` in the place of `flax.nnx`."""
    text = re.sub(r"from flax import (.+), nnx\b", _TWO, text)
    text = text.replace("from flax import nnx", "from sortal import nnx")
    return text.replace("flax.nnx", "sortal.nnx")


_TWO = r"from flax import \1; from flax import nnx"


def run(where: str, text: str) -> Iterator[tuple[doctest.Example, str, str | None]]:
    """Each statement of a docstring, what it prints, and the error it ends with."""
    space: dict[str, object] = {"__name__": "__main__"}
    for example in doctest.DocTestParser().get_examples(text, where):
        out = io.StringIO()
        error = None
        with contextlib.redirect_stdout(out):
            try:
                code = compile(example.source, where, "single")
                exec(code, space)  # noqa: S102
            except Exception as e:  # noqa: BLE001
                if example.exc_msg is None:
                    error = "".join(traceback.format_exception_only(e))
                out.write("Traceback (most recent call last):\n")
                out.write("".join(traceback.format_exception_only(e)))
        yield example, out.getvalue(), error


def main(argv: list[str]) -> None:
    """Prints the two figures, and with `--failures` what does not run."""
    verbose, only = "--failures" in argv, [x for x in argv if x[0] != "-"]
    root = Path(str(flax_nnx.__file__)).parent
    total = ran = same = 0
    for where, text in docstrings(root):
        if only and not any(x in where for x in only):
            continue
        for example, got, error in run(where, text if "--flax" in argv else ours(text)):
            total += 1
            ran += error is None
            agrees = doctest.OutputChecker().check_output(example.want, got, FLAGS)
            same += error is None and (agrees or example.exc_msg is not None)
            if verbose and error is not None:
                print(f"{where}: {example.source.strip()[:150]}\n    {error[:400]}")
            elif verbose and "--prints" in argv and not agrees:
                print(
                    f"{where}: {example.source.strip()[:150]}\n  want "
                    f"{example.want[:300]}\n  got {got[:300]}"
                )
    print(f"{ran} of {total} statements run; {same} print what is documented")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(sys.argv[1:])
