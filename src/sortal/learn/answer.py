"""What a check knows of the learner's code, and how it says that a result is wrong."""

from __future__ import annotations

import ast
import linecache
import re
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import sortal

MODULE = "answer"
"""The name under which the learner's code is imported."""
_LONGEST = 600
_LIBRARIES = ("sortal", "sortal.nnx", "flax.nnx")


class Wrong(Exception):  # noqa: N818 - a result, and no fault of the program
    """An answer is not right.

    Args:
      message: what is not right, in a sentence.
      case: the arguments that it was called with.
      expected: the result that was due, as text; absent if there is none to show.
      found: the result, as text.
      pitfall: the name of the mistake, if it was recognised.
      error: the end of the traceback, where the code raised an exception.
    """

    def __init__(
        self,
        message: str,
        *,
        case: str = "",
        expected: str = "",
        found: str = "",
        pitfall: str = "",
        error: str = "",
    ):
        super().__init__(message)
        self.message, self.case = message, case
        self.expected, self.found = expected, found
        self.pitfall, self.error = pitfall, error


class Answer:
    """The learner's code, executed.

    Args:
      source: the text of the file.
      filename: its name in tracebacks.

    Attributes:
      tree: the syntax tree.
      module: the module that the code made.
      nnx: the library that it uses, by preference under this name: Sortal or Flax NNX.

    Raises:
      Wrong: it cannot be compiled, or raises an exception when it is executed.
    """

    def __init__(self, source: str, filename: str):
        self.filename = filename
        lines = source.splitlines(keepends=True)
        linecache.cache[filename] = (len(source), None, lines, filename)
        self.module = types.ModuleType(MODULE)
        self.module.__file__ = filename
        sys.modules[MODULE] = self.module  # dataclasses look for their module here
        try:
            self.tree = ast.parse(source, filename)
            exec(compile(self.tree, filename, "exec"), vars(self.module))  # noqa: S102 - the learner's own file
        except (Exception, SystemExit) as e:
            raise self.raised(e) from e
        names = vars(self.module)
        given = [names.get("nnx"), *names.values()]
        known = [sys.modules[name] for name in _LIBRARIES if name in sys.modules]
        found = (value for value in given if any(value is m for m in known))
        self.nnx: Any = next(found, sortal)

    def raised(self, error: BaseException, case: str = "", pitfall: str = "") -> Wrong:
        """What to say of an exception: the message, and the learner's own lines."""
        return Wrong(
            "The code raised an exception.",
            case=case,
            pitfall=pitfall,
            error=_traceback(error, self.filename),
        )

    def get(self, name: str) -> Any:
        """Something that the code has to define.

        Raises:
          Wrong: it does not.
        """
        if not hasattr(self.module, name):
            raise Wrong(f"The file defines no `{name}`. The task says what it is.")
        return getattr(self.module, name)

    def kind(self, name: str, pitfalls: Mapping[str, str]) -> type:
        """A kind that the code has to define: a class derived from `Variable`.

        Args:
          name: its name.
          pitfalls: for the name of a kind, such as ``Param``, the pitfall of having
            derived from it.

        Raises:
          Wrong: it is not there, is no kind, or is derived from one of ``pitfalls``.
        """
        kind = self.get(name)
        if not (isinstance(kind, type) and issubclass(kind, self.nnx.Variable)):
            raise Wrong(f"`{name}` is not a class derived from `nnx.Variable`.")
        for base, pitfall in pitfalls.items():
            if issubclass(kind, getattr(self.nnx, base)):
                raise Wrong(f"`{name}` is a kind of `{base}`.", pitfall=pitfall)
        return kind

    def run(
        self,
        case: str,
        function: Callable[..., Any],
        *args: Any,
        pitfalls: Mapping[str, str] | None = None,
    ) -> Any:
        """Calls the learner's code.

        Args:
          case: what it is called with, in words.
          function: what is called.
          *args: its arguments.
          pitfalls: for a regular expression, the pitfall that an exception with such a
            message is a sign of.

        Raises:
          Wrong: the code raised an exception.
        """
        try:
            return function(*args)
        except Wrong:
            raise
        except (Exception, SystemExit) as e:
            text = f"{type(e).__name__}: {e}"
            fits = (
                name for sign, name in (pitfalls or {}).items() if re.search(sign, text)
            )
            raise self.raised(e, case, next(fits, "")) from e

    def called(self) -> set[str]:
        """The last names of all functions that the source calls, as in ``state``."""
        calls = (n.func for n in ast.walk(self.tree) if isinstance(n, ast.Call))
        return {ast.unparse(func).rpartition(".")[2] for func in calls}


def _traceback(error: BaseException, filename: str) -> str:
    """The learner's lines of a traceback, and the message."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename == filename]
    if isinstance(error, SyntaxError):
        last = "".join(traceback.format_exception_only(error))
    else:
        last = f"{type(error).__name__}: {error}"
    if isinstance(error, ModuleNotFoundError) and (error.name or "").startswith("flax"):
        last += "\nFlax is not installed here. `import sortal as nnx` works as well."
    if isinstance(error, AttributeError) and "flax.nnx has no" in str(error):
        last += "\nThe text of the problem says what to write with Flax."
    return "".join(traceback.format_list(own)) + cut(last.strip(), 2 * _LONGEST)


def cut(text: str, longest: int = _LONGEST) -> str:
    """Text of bounded length; what was left out is counted."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]} ... ({len(text) - longest} more characters)"


def shown(value: Any) -> str:
    """A result as text: an array with its dtype and shape, a dict line by line."""
    if isinstance(value, dict):
        return cut("\n".join(f"{key}: {shown(item)}" for key, item in value.items()))
    if isinstance(value, jax.Array | np.ndarray) and not _is_key(value):
        with np.printoptions(precision=5, threshold=40, edgeitems=2, suppress=True):
            numbers = str(np.asarray(value))
        sizes = ",".join(map(str, value.shape))
        return cut(f"{numbers}  {value.dtype}[{sizes}]")
    return cut(repr(value))


def _is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def same(found: Any, expected: Any) -> bool:
    """Whether two arrays, or trees of arrays, agree but for the order of additions."""
    if jax.tree.structure(found) != jax.tree.structure(expected):
        return False
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
    return all(_same_array(a, b) for a, b in pairs)


def _same_array(a: Any, b: Any) -> bool:
    if np.shape(a) != np.shape(b):
        return False
    try:
        return np.allclose(
            np.asarray(a), np.asarray(b), rtol=1e-3, atol=1e-4, equal_nan=True
        )
    except TypeError:
        return bool(a == b)


def expect(
    found: Any,
    expected: Any,
    case: str,
    pitfalls: Iterable[tuple[str, Any]] = (),
    what: str = "The result is not what was expected.",
) -> None:
    """Compares a result with what was due.

    Args:
      found: the result.
      expected: what was due.
      case: the arguments, in words.
      pitfalls: names of pitfalls, and a result that each leads to.
      what: what is wrong if they differ.

    Raises:
      Wrong: they differ; with the first pitfall whose result was found.
    """
    if same(found, expected):
        return
    fits = (name for name, value in pitfalls if same(found, value))
    told = next(fits, "")
    if isinstance(found, dict) and isinstance(expected, dict):
        differ = {key for key in expected if not same(found.get(key), expected[key])}
        if found.keys() == expected.keys():
            found = {key: found[key] for key in found if key in differ}
            expected = {key: expected[key] for key in expected if key in differ}
    raise Wrong(
        "Nothing was returned." if found is None else what,
        case=case,
        expected=shown(expected),
        found=shown(found),
        pitfall=told,
    )


def kind_of(value: Any) -> str:
    """The name of a type as one says it: that of an array is ``array``."""
    return "array" if isinstance(value, jax.Array) else type(value).__name__


def of_type(found: Any, cls: type, what: str, case: str) -> None:
    """Refuses a result of another type.

    Raises:
      Wrong: it is one.
    """
    if not isinstance(found, cls):
        raise Wrong(
            f"The result is not {what}.",
            case=case,
            expected=cls.__name__,
            found=kind_of(found),
        )


def values(tree: Any, *filters: Any) -> dict[str, np.ndarray]:
    """The arrays of a model that filters take, by path, as they are now."""
    state = sortal.state(tree, *filters)
    flat = zip(state.paths(), state.leaves(), strict=True)
    return {".".join(map(str, path)): _array(leaf) for path, leaf in flat}


def _array(leaf: Any) -> np.ndarray:
    bare = isinstance(leaf, jax.Array | np.ndarray)
    value = leaf if bare else leaf[...]
    return np.array(jax.random.key_data(value) if _is_key(value) else value)
