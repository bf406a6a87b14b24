"""Why a jitted function was traced again: what differs from an earlier compile."""

from __future__ import annotations

import functools
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path as File
from typing import Any, NamedTuple

import jax
import jax.tree_util as jtu

from sortal._engine.difference import Difference, Fact, changes, facts_of
from sortal._engine.graphdef import GraphDef
from sortal._engine.paths import Path, show, show_from
from sortal._engine.schema import kind_name
from sortal._engine.statics import is_hashable, static_key
from sortal._engine.variable import describe, is_variable
from sortal.errors import ArgumentError, RetraceError, listing
from sortal.transforms._adapter.functions import POSITIONAL, parameters_of
from sortal.transforms._adapter.tracing import FlatModule, is_flat_module

_KEPT = 16
_LONGEST, _KEPT_TEXT = 200, 2_000
_ABSENT = "absent"
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_ONLY_WEAK = re.compile(r": (.+)( \(weakly typed\) -> \1| -> \1 \(weakly typed\))$")
_GIVE_DTYPE = (
    "\nAn array of a Python number is weakly typed, and what is computed from it may "
    "not be: give it a dtype, as in jnp.array(0.5, jnp.float32)."
)
_OURS = (str(File(jax.__file__).parent), str(File(__file__).parents[1]))
_UNSEEN = (
    "nothing that was recorded: JAX also traces anew in another mesh or configuration "
    "(precision, x64), and after jax.clear_caches()"
)


class RetraceWarning(UserWarning):
    """A function made by ``jit(..., on_retrace="warn")`` was traced again."""


class Compile(NamedTuple):
    """What one trace depended on, without any array.

    ``roots`` names the Modules and Variables among the arguments; ``leaves``, by number
    in the joint GraphDef, ``arrays``, ``trees`` and ``statics``, by name, are abstract
    values, tree definitions, texts and hashes, so that nothing the caller owns is kept
    alive. ``named`` are the arguments that were passed by name.
    """

    graphdef: GraphDef | None
    roots: tuple[str, ...]
    leaves: tuple[Any, ...]
    arrays: dict[str, Any]
    trees: dict[str, Any]
    statics: dict[str, tuple[str, Any]]
    named: frozenset[str]


class Retrace(NamedTuple):
    """One compile after the first: the compile most like it, and what differs."""

    number: int
    closest: int
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"compile {self.number}, compared with compile {self.closest}:\n"
            f"{listing(self.reasons)}"
            f"{_GIVE_DTYPE if any(map(_ONLY_WEAK.search, self.reasons)) else ''}"
        )


class RetraceReport(NamedTuple):
    """How often a function was compiled, and why each time after the first."""

    name: str
    compiles: int
    retraces: tuple[Retrace, ...]

    def __str__(self) -> str:
        times = "once" if self.compiles == 1 else f"{self.compiles} times"
        head = f"{self.name} was compiled {times}."
        return "\n".join([head, *map(str, self.retraces)])

    __repr__ = __str__


class History:
    """The compiles of one jitted function.

    Args:
      fn: the user's function.
      static: positions and names of its static arguments.
      on_retrace: ``"ignore"``, ``"warn"`` or ``"raise"``.

    Raises:
      ArgumentError: ``on_retrace`` is something else.
    """

    def __init__(
        self, fn: Callable[..., Any], static: Collection[Any], on_retrace: str
    ):
        if on_retrace not in ("ignore", "warn", "raise"):
            raise ArgumentError(
                f"on_retrace is 'ignore', 'warn' or 'raise'; found {on_retrace!r}."
            )
        named: Any = fn
        while isinstance(named, functools.partial):
            named = named.func  # the text of what it holds may be long, or on a device
        self.name = getattr(named, "__qualname__", None) or repr(named)
        self._static, self._on_retrace = static, on_retrace
        self._names, self._rest = _parameters(fn)
        self.forget()

    def forget(self) -> None:
        """Forgets all compiles."""
        self.count = 0
        self._kept: deque[Compile] = deque(maxlen=_KEPT)

    def see(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Compile:
        """Describes the arguments of a call, inside its trace."""
        return _describe(
            [(self._name(i), i in self._static, x) for i, x in enumerate(args)]
            + [(k, k in self._static, x) for k, x in kwargs.items()],
            kwargs,
        )

    def add(self, seen: Compile) -> None:
        """Records a compile, once its trace is done.

        Args:
          seen: what ``see`` said of it.

        Raises:
          RetraceError: it is not the first, and ``on_retrace`` is ``"raise"``.
        """
        if self.count and self._on_retrace != "ignore":
            text = f"{self.name}: {_explain(seen, self.count + 1, self._numbered())}"
            if self._on_retrace == "raise":
                raise RetraceError(
                    f"{text}\nPass what is the same each time, or allow it with "
                    "on_retrace='warn'."
                )
            warnings.warn(text, RetraceWarning, stacklevel=_stacklevel())
        self._kept.append(seen)
        self.count += 1

    def report(self) -> RetraceReport:
        """Why each compile happened, of those still kept."""
        numbered = self._numbered()
        return RetraceReport(
            self.name,
            self.count,
            tuple(
                _explain(seen, n, numbered[:i])
                for i, (n, seen) in enumerate(numbered)
                if i
            ),
        )

    def _numbered(self) -> list[tuple[int, Compile]]:
        first = self.count - len(self._kept) + 1
        return list(enumerate(self._kept, first))

    def _name(self, i: int) -> str:
        if i < len(self._names):
            return self._names[i]
        return f"{self._rest}[{i - len(self._names)}]"


def explain_retrace(f: Any) -> RetraceReport:
    """Says why a jitted function was compiled more than once.

    Each compile after the first is compared with the earlier one most like it: which
    static, kind, shape or dtype of which path changed, which node was added or
    removed, which other argument has another shape, dtype, static value or structure.
    The last 16 compiles are kept. Those that JAX makes without tracing anew, such as
    for another device, are not seen, nor those of a function that donates inside of
    other transforms.

    Args:
      f: what ``jit`` returned.

    Returns:
      A report to print, with ``compiles`` and ``retraces`` as data.

    Raises:
      ArgumentError: ``f`` is no jitted function.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      >>> f = nnx.jit(lambda model, x: model(x))
      >>> y = f(model, jnp.ones(2))
      >>> model.rate = 0.25
      >>> y = f(model, jnp.ones(2))
      >>> nnx.explain_retrace(f).retraces[0].reasons
      ('model.rate: 0.5 -> 0.25',)
    """
    while isinstance(f, functools.partial):
        f = f.func
    history = getattr(f, "_history", None)
    if not isinstance(history, History):
        raise ArgumentError(
            f"explain_retrace takes a function made by sortal.jit; found {f!r:.80}."
        )
    return history.report()


def _parameters(fn: Callable[..., Any]) -> tuple[list[str], str]:
    """Names of the positional parameters, and of what takes further ones."""
    parameters = parameters_of(fn)
    rest = [p.name for p in parameters if p.kind is p.VAR_POSITIONAL]
    return [p.name for p in parameters if p.kind in POSITIONAL], (rest or ["args"])[0]


def _describe(
    arguments: Sequence[tuple[str, bool, Any]], named: Collection[str]
) -> Compile:
    flat_modules: dict[int, tuple[str, FlatModule]] = {}
    arrays: dict[str, Any] = {}
    trees: dict[str, Any] = {}
    statics: dict[str, tuple[str, Any]] = {}
    for name, static, x in arguments:
        if static:
            statics[name] = (
                repr(x)[:_KEPT_TEXT],
                hash(static_key(x)) if is_hashable(x) else None,
            )
            continue
        pairs, _ = jtu.tree_flatten_with_path(x, is_leaf=_is_told)
        trees[name] = jtu.tree_structure(x, is_leaf=_stops)
        for path, leaf in pairs:
            at = name + jtu.keystr(path)
            if is_flat_module(leaf):
                flat_modules[leaf.definition.number] = at, leaf
            else:
                arrays[at] = _aval(leaf)
    ordered = [flat_modules[i] for i in sorted(flat_modules)]
    return Compile(
        ordered[0][1].definition.graphdef if ordered else None,
        tuple(name for name, _ in ordered),
        tuple(_aval(v) for _, c in ordered for v in c.values),
        arrays,
        trees,
        statics,
        frozenset(named),
    )


def _stops(x: Any) -> bool:
    return x is None or is_flat_module(x)


def _is_told(x: Any) -> bool:
    return _stops(x) or is_variable(x)  # one that a State holds


def _aval(value: Any) -> tuple[Any, ...]:
    """What JAX tells a value by, with nothing of it; of a small pytree each leaf's."""
    # Put into words only when somebody asks: no trace need wait for that.
    return (None,) if value is None else tuple(map(jax.typeof, jtu.tree_leaves(value)))


def _text(avals: tuple[Any, ...]) -> str:
    return ", ".join(map(_one_text, avals))


def _one_text(aval: Any) -> str:
    if aval is None:
        return "None"
    text = describe(aval)
    if any(axis is not None for axis in getattr(aval.sharding, "spec", ())):
        text += f" over {tuple(aval.sharding.spec)}"
    return f"{text} (weakly typed)" if getattr(aval, "weak_type", False) else text


def _explain(
    seen: Compile, number: int, earlier: Sequence[tuple[int, Compile]]
) -> Retrace:
    options = [(_reasons(old, seen), n) for n, old in earlier]
    # Of equally close ones the latest, which is what the caller remembers.
    reasons, closest = min(options, key=lambda option: (len(option[0]), -option[1]))
    return Retrace(number, closest, tuple(reasons) or (_UNSEEN,))


def _reasons(old: Compile, new: Compile) -> list[str]:
    rows = [
        f"{name}: {_change(a[0], b[0])}"
        for name, a, b in changes(old.statics, new.statics, (_ABSENT, None))
    ]
    rows += list(_structure(old, new))
    was, now = ({k: _text(x) for k, x in c.arrays.items()} for c in (old, new))
    arrays = list(changes(was, now, _ABSENT))
    rows += [f"{name}: {a} -> {b}" for name, a, b in arrays]
    for name in [name for name in old.trees if name in new.trees]:
        a, b = old.trees[name], new.trees[name]
        told = any(at == name or at.startswith(f"{name}[") for at, _, _ in arrays)
        if a != b and not told:
            rows.append(f"{name}: structure {_change(_plain(a), _plain(b))}")
    by_name = old.named ^ new.named
    for name in sorted(by_name & (old.trees.keys() | old.statics.keys())):
        ways = ("by name", "by position")
        was, now = ways if name in old.named else reversed(ways)
        rows.append(f"{name}: passed {was} -> {now}")
    return rows


def _plain(treedef: Any) -> str:
    return str(treedef).removeprefix("PyTreeDef(").removesuffix(")")


def _structure(old: Compile, new: Compile) -> Iterator[str]:
    """What differs in the Modules and Variables among the arguments."""
    if old.roots != new.roots and sorted(old.roots) == sorted(new.roots):
        yield f"order of the arguments: {_change(*map(', '.join, (old[1], new[1])))}"
    if old.graphdef is not new.graphdef or old.roots != new.roots:
        for name, a, b in changes(_facts(old), _facts(new)):
            same_text = str(a) == str(b)  # look-alikes, printed at length
            both = str(Difference((), a, b)).removeprefix(f"{show(())}: ")
            yield f"{name}: {both if same_text else _change(str(a), str(b))}"
    kept = _leaves(old)
    for name, (kind, now) in _leaves(new).items():
        before = kept.get(name, (kind, now))[1]
        if before != now:
            yield f"{name} ({kind}): {before} -> {now}"


def _facts(seen: Compile) -> dict[str, Any]:
    """What is at each path of the roots; paths begin with the argument's name."""
    if seen.graphdef is None:
        return {}
    facts = facts_of(seen.graphdef)
    if len(seen.roots) > 1:
        facts.pop(())
    return {_at(path, seen.roots): _told(f, seen.roots) for path, f in facts.items()}


def _told(fact: Any, roots: Sequence[str]) -> Any:
    if isinstance(fact, Fact) and fact.text.startswith("alias of "):
        owner = _at(fact.details, roots)  # type: ignore[arg-type]
        return Fact(None, owner, f"alias of {owner}")
    return fact


def _leaves(seen: Compile) -> dict[str, tuple[str, str]]:
    if seen.graphdef is None:
        return {}
    schema = seen.graphdef.schema
    names = [_at(path, seen.roots) for path in schema.paths]
    rows = zip(map(kind_name, schema.kinds), map(_text, seen.leaves), strict=True)
    return dict(zip(names, rows, strict=True))


def _change(old: str, new: str) -> str:
    """``old -> new``, or a hint where they are one thing built twice."""
    if _ADDRESS.sub("", old) == _ADDRESS.sub("", new):
        what = _cut(_ADDRESS.sub("", old))
        return f"{what} -> another that looks the same; build it once and reuse it"
    return f"{_cut(old)} -> {_cut(new)}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _at(path: Path, roots: Sequence[str]) -> str:
    number, below = (0, path) if len(roots) == 1 else (path[0], path[1:])
    return show_from(roots[number], below)  # type: ignore[index]


def _stacklevel() -> int:
    """Where in the stack the caller is: above the files of JAX and Sortal."""
    frame, level = sys._getframe(1), 1
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        frame, level = frame.f_back, level + 1
    return level
