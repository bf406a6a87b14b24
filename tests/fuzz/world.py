"""A world: one library, what a program has bound so far, and a portrait of it."""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from typing import Any

from . import zoo

_ATOMS = (int, bool, str, type(None))
_METADATA = ("tag", "m")


class World:
    """Runs statements with one library.

    Args:
      lib: ``live`` or ``reference``.
    """

    def __init__(self, lib: Any):
        self.lib = lib
        self.tracked: list[Any] = []  # weak references to the arrays that were made
        self.fixed = {**zoo.statics(), **_classes(lib)}
        self.fixed |= {"nnx": lib.names, "arr": lib.array(self.tracked)}
        self.fixed |= {
            "key": lib.key,
            "digest": zoo.digest(lib),
            "first": zoo.first(lib),
        }
        self.names: dict[str, Any] = dict(self.fixed)

    def run(self, code: Any) -> str:
        """Runs one statement; the name of the error's class, empty where there is none.

        No traceback outlives the call, for it would keep what the statement held.
        """
        try:
            exec(code, self.names)  # noqa: S102 - the program is the test's own
        except Exception as e:  # noqa: BLE001 - whatever a program provokes
            # Which attribute of what is missing is Python's to say.
            missing = isinstance(e, AttributeError)
            return "AttributeError" if missing else type(e).__name__
        return ""

    def bound(self) -> list[tuple[str, Any]]:
        """The names that the program has bound, and the objects."""
        fixed = self.fixed
        return [
            (k, v)
            for k, v in self.names.items()
            if k not in fixed and k != "__builtins__"
        ]

    def portrait(self) -> Any:
        """All that can be seen from the bound names, in nested tuples."""
        return self.seen()[0]

    def seen(self) -> tuple[Any, Portrait]:
        """The portrait, and who made it."""
        seer = Portrait(self.lib)
        return seer.of(self.bound()), seer

    def objects(self) -> list[Any]:
        """All modules, containers and boxes that can be reached."""
        return self.seen()[1].kept

    def jitted(self) -> list[Any]:
        """What ``jit`` returned."""
        return [v for k, v in self.bound() if k[0] == "j"]

    def pinned(self, seer: Portrait) -> int:
        """Arrays made that are alive though nothing that was seen leads to them."""
        reachable = set(map(id, seer.arrays))
        alive = [ref() for ref in self.tracked]
        return sum(x is not None and id(x) not in reachable for x in alive)

    def alive(self) -> int:
        """Arrays made that are alive."""
        return sum(ref() is not None for ref in self.tracked)

    def forget(self) -> None:
        """Unbinds everything."""
        self.names.clear()


@functools.lru_cache(maxsize=4)
def _classes(lib: Any) -> dict[str, Any]:
    return zoo.make(lib)


class Portrait:
    """Objects as nested tuples, each with a number by which it is met again.

    It walks by ``vars`` and iteration alone, so that what it says does not depend on
    the engine under test.
    """

    def __init__(self, lib: Any):
        self.lib = lib
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []
        self.arrays: list[Any] = []
        self.graphdefs: list[Any] = []
        self.is_data = False  # whether numbers are leaves here

    def of(self, x: Any) -> Any:
        cls = type(x)
        if self.is_data and cls in (int, float, bool):
            return self._leaf(x)
        if cls in _ATOMS:
            return (cls.__name__, x)
        if cls is float:
            return ("float", x.hex())
        lib = self.lib
        if lib.is_array(x):
            self.arrays.append(x)
            return number(lib.to_numpy(x))
        if cls is tuple:
            return tuple([self.of(v) for v in x])
        if isinstance(x, lib.kinds):
            return self._once(x, self._variable)
        if isinstance(x, lib.Optimizer):
            return self._once(x, lambda x: self._leaf(x.step.get_value()))
        if isinstance(x, lib.modules):
            return self._once(x, self._module)
        if isinstance(x, (list, dict)):
            return self._once(x, self._container)
        if isinstance(x, lib.State):
            return self._once(x, self._state)
        if isinstance(x, lib.GraphDef):
            return ("graphdef", self._graphdef(x))
        if isinstance(x, tuple):
            return (cls.__name__, *[self.of(v) for v in x])
        if cls is functools.partial:
            named = [(k, self.of(v)) for k, v in x.keywords.items()]
            return ("partial", self.of(x.func), self.of(x.args), named)
        if isinstance(x, types.MethodType):
            return ("method", x.__func__.__name__, self.of(x.__self__))
        if hasattr(cls, "OWN"):
            return (cls.__name__, repr(x.said()))
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return self._dataclass(x)
        if cls in (frozenset, set):
            return (cls.__name__, sorted([repr(self.of(v)) for v in x]))
        if cls is complex or cls.__module__ == "numpy":
            return (cls.__name__, repr(x))
        if callable(x) and not isinstance(x, zoo.Plain):
            return self._once(_Function(x), lambda _: None)
        return self._once(x, self._other)

    def _once(self, x: Any, show: Any) -> Any:
        at = x.at if type(x) is _Function else id(x)
        found = self.numbers.get(at)
        if found is not None:
            return ("same", found)
        number = self.numbers[at] = len(self.numbers)
        self.kept.append(x)
        return (type(x).__name__, number, show(x))

    def _variable(self, x: Any) -> Any:
        meta = self.lib.metadata(x)
        meta = tuple((k, self.of(meta[k])) for k in _METADATA if k in meta)
        return (self._leaf(x.get_value()), meta)

    def _leaf(self, value: Any) -> Any:
        # Whether a number is one of Python's or an array is no business of a program.
        return ("array", (), (float(value),)) if _is_number(value) else self.of(value)

    def _module(self, x: Any) -> Any:
        roles = getattr(x, "_roles", None) or {}
        outside, shown = self.is_data, []
        for name, value in self.lib.attributes(x):
            self.is_data = roles.get(name) == "data"
            shown.append((name, self.of(value)))
        self.is_data = outside
        return tuple(shown)

    def _container(self, x: Any) -> Any:
        if isinstance(x, dict):
            return tuple([(self.of(k), self.of(v)) for k, v in x.items()])
        return tuple([self.of(v) for v in x])

    def _state(self, x: Any) -> Any:
        self.arrays += self.lib.behind_view(x)
        return tuple([(p, self._leaf(leaf)) for p, leaf in self.lib.state_items(x)])

    def _dataclass(self, x: Any) -> Any:
        if not type(x).__dataclass_params__.frozen:
            return self._once(x, lambda x: self._fields(x))
        return (type(x).__name__, self._fields(x))

    def _fields(self, x: Any) -> Any:
        return tuple([(k, self.of(v)) for k, v in x.__dict__.items()])

    def _graphdef(self, x: Any) -> int:
        """Equal ones have one number."""
        for i, known in enumerate(self.graphdefs):
            if known == x:
                return i
        self.graphdefs.append(x)
        return len(self.graphdefs) - 1

    def _other(self, x: Any) -> Any:
        return self.of(x.v) if isinstance(x, zoo.Plain) else None


class _Function:
    """A function of any class, for libraries have classes of their own."""

    def __init__(self, x: Any):
        self.x, self.at = x, id(x)


def _is_number(x: Any) -> bool:
    return type(x) in (int, float, bool)


def number(x: Any) -> Any:
    """An array's shape and numbers; a zero's sign and which NaN do not matter."""
    flat = x.reshape(-1).tolist()
    return ("array", x.shape, tuple([0.0 if v == 0 else float(v) for v in flat]))


def difference(a: Any, b: Any, path: str = "") -> str:
    """The first place where two portraits differ."""
    if a == b:
        return ""
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        for i, (x, y) in enumerate(zip(a, b, strict=False)):
            found = difference(x, y, f"{path}.{i}")
            if found:
                return found
        if len(a) != len(b):
            return f"{path}: {len(a)} and {len(b)} parts: {a!r:.300} | {b!r:.300}"
        return ""
    same = a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))
    return "" if same else f"{path}: {a!r:.300} | {b!r:.300}"
