"""Names in a traced program: which module each equation belongs to, and which vmap.

While ``labelled`` is in force, the thread that traces tells JAX of each method of a
model's objects as it is called, by ``jax.named_scope``. Nothing else of the thread's
program, and no other thread, is changed.
"""

from __future__ import annotations

import ast
import contextlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path as File
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import jax

from sortal._engine.jax_compat import mapped_sizes
from sortal._engine.nodes import is_root
from sortal._engine.paths import Path
from sortal._engine.variable import is_variable
from sortal.functional import iter_graph

_PLACE = "_labelled_at"
"""The attribute that tells an object inside the trace where it is in its argument."""
_JAX = str(File(jax.__file__).parent)
_LABEL = re.compile(r"sortal_module~([\w.~%-]+)")
_MAPPED = re.compile(r"sortal_vmap~(\d+)")
_CALLED = re.compile(r"sortal_line~([\w.~%-]+)")


_LIBRARIES = ("jax", "jaxlib", "flax", "optax", "chex", "equinox")


class Place(NamedTuple):
    """Where an object is: in which argument, at which path, and its class."""

    argument: str
    path: Path
    type: str


def mark(roots: Mapping[str, Any]) -> None:
    """Notes in each object where it is, so that copies of it in transforms know it.

    Args:
      roots: objects by the name of their argument; copies, for each gets an attribute.
    """
    for name, root in roots.items():
        for path, x in iter_graph(root):
            if _is_object(x) and _noted(x) is None:
                with contextlib.suppress(Exception):  # such as a frozen dataclass
                    setattr(x, _PLACE, _written(Place(name, path, type(x).__name__)))


@contextlib.contextmanager
def labelled() -> Iterator[None]:
    """Labels what is traced by the objects whose methods compute it.

    Where the thread has a profile function already, nothing is labelled.
    """
    if sys.getprofile() is not None:
        yield
        return
    from jax.extend.source_info_util import current_name_stack  # which loads kernels

    scopes = _Scopes(current_name_stack)
    sys.setprofile(scopes.see)
    try:
        yield
    finally:
        sys.setprofile(None)
        scopes.leave_all()


def place_of(names: str) -> Place | None:
    """The innermost object among the names of an equation."""
    found = _LABEL.findall(names)
    return Place(*ast.literal_eval(unquote(found[-1]))) if found else None


def sizes_of(names: str) -> list[int]:
    """The sizes of the vmaps that an equation is under, outermost first."""
    return [int(size) for size in _MAPPED.findall(names)]


def libraries() -> tuple[str, ...]:
    """The beginnings of file names that are no user's."""
    files = [getattr(sys.modules.get(name), "__file__", None) for name in _LIBRARIES]
    ours = str(File(__file__).parents[1])
    return (ours, "<frozen", *(str(File(f).parent) for f in files if f))


def line_of(names: str) -> tuple[str, int, str] | None:
    """File, line and function, where Python ran in the backward pass."""
    found = _CALLED.findall(names)
    return ast.literal_eval(unquote(found[-1])) if found else None


class _Scopes:
    """The objects, vmaps and backward functions that the frames of a thread are in."""

    def __init__(self, current_names: Any) -> None:
        self._names = current_names
        self._open: list[tuple[Any, Any, Any, list[int]]] = []
        self._first: dict[Any, str | None] = {}
        self._backward: list[Any] = []
        self._libraries = libraries()

    def see(self, frame: Any, event: str, _: Any) -> None:
        """The profile function: Python calls it at each call and return."""
        if event == "return":
            while self._open and self._open[-1][0] is frame:
                self._open.pop()[1].__exit__(None, None, None)
            if self._backward and self._backward[-1] is frame:
                self._backward.pop()
        elif event == "call":
            if self._backward and frame.f_back is self._backward[-1]:
                self._see_line(frame)
            first = self._watched(frame.f_code)
            if first is None:
                return
            self._see_vmap(frame)
            if first:
                self._see_object(frame, frame.f_locals.get(first))
            if "transpose(" in str(self._names()):
                self._see_backward(frame)

    def leave_all(self) -> None:
        """Closes what an exception has left open."""
        while self._open:
            self._open.pop()[1].__exit__(None, None, None)

    def _watched(self, code: Any) -> str | None:
        """The name of the first parameter of a method, "" if none; None if of JAX."""
        if code not in self._first:
            name = code.co_name
            public = not name.startswith("__") or name == "__call__"
            method = "." in code.co_qualname.rpartition("<locals>.")[2]
            own = code.co_varnames[0] if code.co_argcount and public and method else ""
            self._first[code] = None if code.co_filename.startswith(_JAX) else own
        return self._first[code]

    def _see_backward(self, frame: Any) -> None:
        """A backward function; JAX would tell the line of the call forward."""
        if not frame.f_code.co_filename.startswith(self._libraries):
            self._backward.append(frame)

    def _see_line(self, frame: Any) -> None:
        caller = frame.f_back
        code = caller.f_code
        told = repr((code.co_filename, caller.f_lineno, code.co_name))
        sizes = self._open[-1][3] if self._open else []
        self._enter(frame, f"sortal_line~{quote(told, safe='')}", None, sizes)

    def _see_vmap(self, frame: Any) -> None:
        now = mapped_sizes()
        seen = self._open[-1][3] if self._open else []
        if len(now) > len(seen):
            for size in now[len(seen) :]:
                self._enter(frame, f"sortal_vmap~{size}", None, now)
        elif len(now) < len(seen):  # the body of a loop has a trace of its own
            self._open.append((frame, contextlib.nullcontext(), None, now))

    def _see_object(self, frame: Any, obj: Any) -> None:
        around = next((x for _, _, x, _ in self._open[::-1] if x is not None), None)
        if around is not None and around[0] is obj:
            return
        if not (_is_method(frame.f_code, obj) and _is_object(obj)):
            return
        noted = _noted(obj)
        if noted is None:
            noted = _written(_relative(obj, around))
        sizes = self._open[-1][3] if self._open else []
        self._enter(frame, f"sortal_module~{noted}", (obj, noted), sizes)

    def _enter(self, frame: Any, name: str, obj: Any, sizes: list[int]) -> None:
        scope = jax.named_scope(name)
        scope.__enter__()
        self._open.append((frame, scope, obj, sizes))


def _is_method(code: Any, obj: Any) -> bool:
    classes = (c.__qualname__ for c in type(obj).__mro__)
    return code.co_qualname.rpartition(".")[0] in classes


def _relative(obj: Any, around: Any) -> Place:
    """The place of an object that was made inside the trace."""
    if around is not None:
        holder = Place(*ast.literal_eval(unquote(around[1])))
        for path, x in iter_graph(around[0]):
            if x is obj:
                return Place(holder.argument, holder.path + path, type(obj).__name__)
    return Place("", (), type(obj).__name__)


def _written(place: Place) -> str:
    """A place as text that may stand in the name of a scope."""
    keys = tuple(k if type(k) in (int, str) else str(k) for k in place.path)
    return quote(repr((place.argument, keys, place.type)), safe="")


def _noted(obj: Any) -> str | None:
    held = getattr(obj, "__dict__", None)
    return held.get(_PLACE) if isinstance(held, dict) else None


def _is_object(x: Any) -> bool:
    return is_root(x) and not is_variable(x)
