"""find_nan: which operation of a step gave the first NaN or infinity, and where."""

from __future__ import annotations

import contextlib
import functools
import linecache
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

import jax
import jax.tree_util as jtu
from jax.core import Tracer

from sortal._engine.paths import Path, show_from
from sortal._engine.schema import kind_name
from sortal.errors import TraceError
from sortal.functional import merge, split
from sortal.inspect.equations import (
    Culprit,
    Evaluation,
    Leaf,
    Operand,
    earliest,
    input_value,
)
from sortal.inspect.remedies import remedy
from sortal.inspect.scopes import Place, labelled, mark, place_of, sizes_of
from sortal.transforms._adapter.binding import BoundArguments
from sortal.transforms._adapter.effects import Result
from sortal.transforms._adapter.functions import unbind
from sortal.transforms._adapter.tracing import (
    is_flat_module,
    replace_flat_modules,
    run,
)
from sortal.transforms.compile import Jitted, JittedPartial
from sortal.transforms.refusals import named_arguments, refuse_arguments, refuse_stale


@dataclass(frozen=True)
class NonFinite:
    """The first culprit for NaN or infinity in what a step returns or writes.

    Attributes:
      operation: the JAX primitive, such as ``log``; ``input`` for what was not finite
        when the step began, ``constant`` and ``closed over`` for other values.
      argument: the argument that holds the module, or that is not finite.
      path: where in the argument the module or leaf is.
      module: the module's class, or "" outside of any.
      kinds: the kinds of the leaves that the operation reads, or else of those that the
        module itself holds.
      line: ``file.py:12``, the user's line; "" if there is none.
      code: the text of the line.
      phase: ``forward`` or ``backward``.
      iterations: of each loop around the operation, which iteration, outermost first.
      replicas: of each ``vmap`` around it, which replica; None where the array has
        several axes, or none, of that size.
      inputs: what the operation was given.
      output: what it made.
      results: the results that are not finite, by name.
      remedy: what to write instead, where that is known.
    """

    operation: str
    argument: str
    path: Path
    module: str
    kinds: tuple[str, ...]
    line: str
    code: str
    phase: str
    iterations: tuple[int, ...]
    replicas: tuple[int | None, ...]
    inputs: tuple[Operand, ...]
    output: Operand
    results: tuple[str, ...]
    remedy: str

    def __str__(self) -> str:
        rows = [("where", self._where()), ("line", f"{self.line}: {self.code}")]
        rows += [("loop", f"iteration {i}") for i in self.iterations]
        rows += [("vmap", f"replica {i}") for i in self.replicas if i is not None]
        rows += [("input", _told(x)) for x in self.inputs]
        shown = [*self.results[:3], *(["..."] if len(self.results) > 3 else [])]
        rows += [("output", _told(self.output)), ("results", ", ".join(shown))]
        rows += [("remedy", self.remedy)]
        lines = [f"  {name:<8}{text}" for name, text in rows if text.strip(": ")]
        return "\n".join([self._head(), *lines])

    __repr__ = __str__

    def _head(self) -> str:
        out, given = self.output, self.operation in ("input", "closed over")
        what = "NaN" if out.nans else "infinity"
        before = ""
        if not given and not any(x.nans for x in self.inputs):
            infinite = any(x.infinities for x in self.inputs)
            before = " from infinity" if infinite else " from finite inputs"
        text = f"{self.operation} {'holds' if given else 'made'} {what}{before}"
        if not out.shape:
            return text
        count = f"{out.nans + out.infinities} of {math.prod(out.shape)} elements"
        return f"{text} ({count}, first at {list(out.first or ())})"

    def _where(self) -> str:
        name = show_from(self.argument, self.path)
        place = f"{name} ({self.module})" if self.module else name
        phase = "" if self.operation == "input" else self.phase
        return ", ".join(filter(None, [place.strip(), phase]))


def _told(x: Operand) -> str:
    text = f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if x.low is not None:
        text += (
            f" = {x.low:.6g}" if x.low == x.high else f" in [{x.low:.6g}, {x.high:.6g}]"
        )
    counts = (("zero", x.zeros), ("NaN", x.nans), ("infinite", x.infinities))
    text += "".join(f", {n} {name}" for name, n in counts if n and x.shape)
    if x.leaf is not None:
        kind = f" ({x.leaf.kind})" if x.leaf.kind else ""
        text += f", {show_from(x.leaf.argument, x.leaf.path)}{kind}"
    return text


def find_nan(step: Callable[..., Any]) -> Callable[..., NonFinite | None]:
    """Reruns a step operation by operation and names what first gave NaN or infinity.

    Looked for is what a result follows from: an array that the step returns, or writes
    to its arguments, with NaN or infinity in it. Going back from there through what is
    not finite, the culprit is an operation that made infinity from finite inputs, or
    NaN from inputs without NaN; the earliest, if there are several. A constant or input
    that is infinite, such as ``-inf`` in a mask, is to blame only where no operation
    is, and what is not finite on the way to finite results never is.

    Models, optimizers and buffers among the arguments stay as they are. Each operation
    runs by itself, as under ``jax.disable_jit``; a compiled step may keep more digits
    of float16 and bfloat16 between operations, and then overflows later. ``jit``,
    ``grad``, ``vmap``, ``remat``, ``shard_map``, loops and branches are looked into, on
    models of Flax as well.

    Args:
      step: a function of models, optimizers and arrays, compiled or not. What it prints
        is printed again.

    Returns:
      A function that takes the arguments of ``step`` and returns a NonFinite, or None
      where every result is finite.

    Raises:
      TraceError: at a call: the step writes to a live object that was not passed to
        it; or find_nan is called inside of a transform.
      UnsupportedError: at a call: the step uses a ``jax.Ref``.
      StaleBufferError: at a call: a leaf holds a buffer that was donated before.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> def loss(model, x):
      ...     return jnp.log(model(x) * 0).mean()
      >>> found = nnx.find_nan(nnx.value_and_grad(loss))(model, jnp.ones((1, 2)))
      >>> found.operation, found.phase, found.code
      ('log', 'forward', 'return jnp.log(model(x) * 0).mean()')
      >>> nnx.find_nan(lambda m, x: m(x))(model, jnp.ones((1, 2))) is None
      True
    """
    fn, first, static = _function(step)

    @functools.wraps(fn)
    def search(*args: Any, **kwargs: Any) -> NonFinite | None:
        kwargs = dict(sorted(kwargs.items()))  # as JAX orders them
        bound = BoundArguments((*first, *args), kwargs, static)
        if any(
            isinstance(x, Tracer) for x in jax.tree.leaves((bound.args, bound.kwargs))
        ):
            raise TraceError(
                "find_nan looks at values, which there are none of inside of jit and "
                "other transforms: call find_nan(step)(...) outside of them."
            )
        try:
            return _Search(fn, static, bound).found()
        except (RuntimeError, TypeError, ValueError) as e:
            refuse_stale(fn, bound, e)
            refuse_arguments(fn, bound, static, e)
            raise

    return search


def _function(step: Any) -> tuple[Any, tuple[Any, ...], Any]:
    """The function that is compiled, arguments before those of a call, statics."""
    if isinstance(step, JittedPartial) and not step.keywords:
        fn, first, static = _function(step.func)
        return fn, (*first, *step.args), static
    if isinstance(step, Jitted):
        return step._fn, step._first, step._static
    return (*unbind(step), set())


class _Search:
    """One call of a step, traced and evaluated."""

    def __init__(self, fn: Any, static: Any, bound: BoundArguments):
        self._fn, self._static = fn, static
        self._jaxpr: Any = None
        with contextlib.suppress(Exception):
            self._trace(self._copied(bound, marked=True))
        # A program may compare structures, which marks make different.
        if self._jaxpr is None:
            self._trace(self._copied(bound, marked=False))

    def found(self) -> NonFinite | None:
        """What there is to report."""
        n = len(self._inputs)
        pairs = enumerate(self._inputs)
        given = [input_value(x, leaf, k - n - 1) for k, (leaf, x) in pairs]
        outputs = Evaluation().run(self._jaxpr, given)
        pairs = zip(self._results, outputs, strict=True)
        bad = {name: x for name, x in pairs if x.bad}
        culprit = earliest(x.culprit for x in bad.values())
        culprit = culprit or earliest(x.meant for x in bad.values())
        return None if culprit is None else self._report(culprit, tuple(bad))

    def _copied(self, bound: BoundArguments, marked: bool) -> BoundArguments:
        """The arguments with copies of the objects, which know where they are."""
        places = _places(self._fn, bound, self._static)
        pairs = ((x, name) for name, x in places if is_flat_module(x))
        self._roots = {x.definition.number: name for x, name in pairs}
        if not self._roots:
            return bound
        copies = merge(*split(tuple(bound.roots)))
        if marked:
            mark({name: copies[k] for k, name in self._roots.items()})

        def copied(x: Any) -> Any:
            return replace_flat_modules(x, lambda c: copies[c.definition.number])

        args = [x if i in self._static else copied(x) for i, x in enumerate(bound.args)]
        named = {
            k: x if k in self._static else copied(x) for k, x in bound.kwargs.items()
        }
        return BoundArguments(args, named, self._static)

    def _trace(self, bound: BoundArguments) -> None:
        fixed = {i: bound.args[i] for i in range(len(bound.args)) if i in self._static}
        named = {k: x for k, x in bound.kwargs.items() if k in self._static}
        args = [x for i, x in enumerate(bound.args) if i not in fixed]
        kwargs = {k: x for k, x in bound.kwargs.items() if k not in named}

        def traced(args: Any, kwargs: Any) -> Result:
            rest = iter(args)
            whole = [
                fixed[i] if i in fixed else next(rest) for i in range(len(bound.args))
            ]
            return run(self._fn, whole, {**kwargs, **named})

        with labelled():
            made = jax.make_jaxpr(traced, return_shape=True)(args, kwargs)
        self._inputs = self._leaves(bound)
        self._results = self._result_names(bound, made[1])
        self._jaxpr = made[0]

    def _leaves(self, bound: BoundArguments) -> list[tuple[Leaf, Any]]:
        """What the program takes, with what it is called, in JAX's order."""
        found: list[tuple[Leaf, Any]] = []
        for name, x in _places(self._fn, bound, self._static):
            if not is_flat_module(x):
                found.append((Leaf(name, (), None), x))
                continue
            kinds = x.definition.graphdef.schema.kinds
            numbers = x.definition.leaves
            for path, k, value in zip(
                x.definition.paths, numbers, x.values, strict=True
            ):
                leaf = Leaf(name, path, kind_name(kinds[k]))
                found += [(leaf, part) for part in jax.tree.leaves(value)]
        return found

    def _result_names(self, bound: BoundArguments, shape: Result) -> list[str]:
        rows = jtu.tree_leaves_with_path(shape.out)
        names = [f"output{jtu.keystr(path)}" for path, _ in rows]
        for k, value in zip(shape.effects.written, shape.values, strict=True):
            schema = bound.alias_map.graphdef.schema
            path, one = schema.paths[k], len(self._roots) == 1
            name, below = self._roots[0 if one else path[0]], path if one else path[1:]
            text = f"{show_from(name, below)} ({kind_name(schema.kinds[k])})"
            names += [text] * len(jax.tree.leaves(value))
        return names + ["a new leaf"] * len(jax.tree.leaves(shape.fresh))

    def _report(self, culprit: Culprit, results: tuple[str, ...]) -> NonFinite:
        told, where = culprit.output, culprit.where
        line, back = where.line, where.backward
        place = place_of(where.names) or Place("", (), "")
        if culprit.operation == "input" and told.leaf is not None:
            place = Place(told.leaf.argument, told.leaf.path, "")
        read = [x.leaf for x in (*culprit.inputs, told) if x.leaf is not None]
        if not any(leaf.kind for leaf in read) and place.type:
            at = (place.argument, place.path)
            read = [x for x, _ in self._inputs if (x.argument, x.path[:-1]) == at]
        text = "" if line is None else linecache.getline(line.file, line.number).strip()
        return NonFinite(
            operation=culprit.operation,
            argument=place.argument,
            path=place.path,
            module=place.type,
            kinds=tuple(dict.fromkeys(x.kind for x in read if x.kind)),
            line="" if line is None else f"{File(line.file).name}:{line.number}",
            code=text,
            phase="backward" if back else "forward",
            iterations=where.iterations,
            replicas=tuple(_replica(told, n) for n in sizes_of(where.names)),
            inputs=culprit.inputs,
            output=told,
            results=results,
            remedy=remedy(culprit.operation, culprit.inputs, told, back),
        )


def _replica(told: Operand, size: int) -> int | None:
    if told.first is None or told.shape.count(size) != 1:
        return None
    return told.first[told.shape.index(size)]


def _places(fn: Any, bound: BoundArguments, skip: Any) -> Iterator[tuple[str, Any]]:
    """Each part of the arguments with its name, such as ``batch['x']``."""
    for key, name, x in named_arguments(fn, bound):
        if key not in skip:
            for path, part in jtu.tree_leaves_with_path(x, is_leaf=is_flat_module):
                yield name + jtu.keystr(path), part
