"""tabulate: a model as a table by module, with what each call takes and returns."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sortal._engine.foreign import is_kind
from sortal._engine.paths import Path
from sortal._engine.variable import RngState, is_variable
from sortal.errors import ArgumentError
from sortal.functional import merge, split, variables
from sortal.inspect.rows import LeafRow, leaves
from sortal.module import iter_modules

_PLACE = "_tabulated_at"
"""The attribute that tells a module inside the trace where it is in the model."""


class CallInfo(NamedTuple):
    """One row: a module, and a call of one of its methods if it was called."""

    path: Path
    """Where the module is; the name of a method other than ``__call__`` ends it."""
    type: type
    inputs_repr: str
    outputs: Any
    flops: int | None
    vjp_flops: int | None
    module: Path


def tabulate(
    obj: Any,
    *input_args: Any,
    depth: int | None = None,
    method: str = "__call__",
    row_filter: Callable[[CallInfo], bool] | None = None,
    table_kwargs: Mapping[str, Any] = types.MappingProxyType({}),
    column_kwargs: Mapping[str, Any] = types.MappingProxyType({}),
    console_kwargs: Mapping[str, Any] = types.MappingProxyType({}),
    compute_flops: bool = False,
    compute_vjp_flops: bool = False,
    **input_kwargs: Any,
) -> str:
    """A table of a model by module: calls, and the Variables of each kind.

    The method is evaluated abstractly on a copy: nothing is computed and nothing in the
    model changes. A module called several times has a row for each form of input. Where
    the method needs inputs and none are given, nothing is called, and every module has
    a row.

    Args:
      obj: a Module; its arrays may be abstract.
      *input_args: what its method is called with; arrays may be abstract.
      depth: how many levels of modules have rows; all if absent.
      method: the name of the method.
      row_filter: takes a CallInfo; whether it is shown.
      table_kwargs: options of ``rich.table.Table``.
      column_kwargs: options of each of its columns.
      console_kwargs: options of ``rich.console.Console``, such as ``width``.
      compute_flops: whether to count the operations of each call.
      compute_vjp_flops: whether to count those of each call with its derivative.
      **input_kwargs: what the method is called with by keyword.

    Returns:
      The table as text.

    Raises:
      ArgumentError: the module has no such method.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> plain = {"force_terminal": False, "width": 60}
      >>> table = nnx.tabulate(model, jnp.ones(2), console_kwargs=plain)
      >>> table.splitlines()[-1].strip()
      'Total Parameters: 9 (36 B)'
    """
    function = getattr(obj, method, None)
    if not callable(function):
        raise ArgumentError(f"A {type(obj).__name__} has no method {method!r}.")
    called = bool(input_args or input_kwargs) or _callable_as_is(function)
    if called:
        options = (compute_flops, compute_vjp_flops)
        rows = _calls(obj, method, input_args, input_kwargs, options)
    else:
        rows = [
            CallInfo(path, type(m), "", None, None, None, path)
            for path, m in sorted(
                iter_modules(obj), key=lambda x: tuple(map(_order, x[0]))
            )
        ]
    shown = [
        row
        for row in rows
        if (depth is None or len(row.path) <= depth)
        and (row_filter is None or row_filter(row))
    ]
    heads = ["path", "type", *(("inputs", "outputs") if called else ())]
    heads += ["flops"] * (called and compute_flops)
    heads += ["vjp_flops"] * (called and compute_vjp_flops)
    return _drawn(obj, shown, heads, table_kwargs, column_kwargs, console_kwargs)


def _callable_as_is(function: Any) -> bool:
    try:
        inspect.signature(function).bind()
    except TypeError:
        return False
    return True


def _order(key: Any) -> tuple[bool, Any]:
    return (isinstance(key, str), key)


# -------------------------------------------------------------------- calls
def _calls(
    obj: Any, method: str, args: Any, kwargs: Any, counts: tuple[bool, bool]
) -> list[CallInfo]:
    """The calls of methods, in the order in which they begin."""
    rows: dict[Any, CallInfo | None] = {}
    graphdef, values = split((obj, args, kwargs))

    def evaluate(values: Any) -> None:
        model, args, kwargs = merge(graphdef, values)
        for path, m in iter_modules(model):
            setattr(m, _PLACE, path)
        getattr(model, method)(*args, **kwargs)

    classes = {type(m) for _, m in iter_modules(obj)}
    with _recording(classes, rows, counts):
        jax.eval_shape(evaluate, _abstract(values))
    return [row for row in rows.values() if row is not None]


@contextlib.contextmanager
def _recording(
    classes: set[type], rows: dict[Any, CallInfo | None], counts: tuple[bool, bool]
) -> Iterator[None]:
    """Has the public methods of classes record their calls."""
    own: list[tuple[type, str, Any]] = []
    for cls in classes:
        for name in dir(cls):
            method = inspect.getattr_static(cls, name)
            public = not name.startswith("_") or name == "__call__"
            if public and isinstance(method, types.FunctionType):
                own.append((cls, name, vars(cls).get(name)))
    try:
        for cls, name, _ in own:
            method = inspect.getattr_static(cls, name)
            setattr(cls, name, _recorded(method, name, rows, counts))
        yield
    finally:
        for cls, name, method in own:
            if method is not None:
                setattr(cls, name, method)
            elif name in vars(cls):
                delattr(cls, name)


def _recorded(
    method: Any, name: str, rows: dict[Any, CallInfo | None], counts: tuple[bool, bool]
) -> Any:
    @functools.wraps(method)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        place = getattr(self, _PLACE, None)
        inputs = _inputs(args, kwargs)
        identity = (place, name, inputs)
        if place is None or identity in rows:
            return method(self, *args, **kwargs)
        rows[identity] = None  # keeps its place: callers are listed before callees
        whole = (self, *args)
        forward = _flops(method, whole, kwargs, False) if counts[0] else None
        vjp = _flops(method, whole, kwargs, True) if counts[1] else None
        out = method(self, *args, **kwargs)
        path = place if name == "__call__" else (*place, name)
        rows[identity] = CallInfo(path, type(self), inputs, out, forward, vjp, place)
        return out

    return recorded


def _flops(method: Any, args: Any, kwargs: Any, differentiate: bool) -> int:
    """The operations that a call lowers to, without what is recorded below it."""
    graphdef, values = split((args, kwargs))

    def call(values: Any) -> Any:
        args, kwargs = merge(graphdef, values)
        out = method(*args, **kwargs)
        return [x for x in jax.tree.leaves(split(out)[1]) if _is_array(x)]

    def with_derivative(values: Any) -> Any:
        out, pullback = jax.vjp(call, values)
        return pullback(out)

    function = with_derivative if differentiate else call
    lowered = jax.jit(function).lower(_abstract(values))
    cost = lowered.cost_analysis() or lowered.compile().cost_analysis()
    return int(cost["flops"]) if cost and "flops" in cost else 0


def _abstract(tree: Any) -> Any:
    def abstract(x: Any) -> Any:
        return jax.ShapeDtypeStruct(jnp.shape(x), x.dtype) if _is_array(x) else x

    return jax.tree.map(abstract, tree)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") and hasattr(x, "dtype")


# -------------------------------------------------------------------- cells
def _inputs(args: Any, kwargs: Any) -> str:
    parts = [args[0] if len(args) == 1 and not kwargs else args, kwargs]
    return "\n".join(_text(x) for x in parts if not _empty(x))


def _empty(x: Any) -> bool:
    return x is None or (isinstance(x, tuple | list | dict) and not x)


def _text(x: Any) -> str:
    """A value as lines: arrays by dtype and shape, dicts and sequences by items."""
    if _empty(x):
        return "" if not isinstance(x, dict | list | tuple) else _scalar(x)
    items = x.items() if isinstance(x, Mapping) else None
    if items is None and isinstance(x, tuple | list):
        items = zip(getattr(x, "_fields", [None] * len(x)), x, strict=True)
    if items is None:
        return _scalar(x)
    return "\n".join(line for key, value in items for line in _item(key, value))


def _item(key: Any, value: Any) -> list[str]:
    head = "-" if key is None else f"{key}:"
    nested = isinstance(value, Mapping | tuple | list) and value
    if not nested:
        return [f"{head} {_scalar(value)}"]
    lines = _text(value).splitlines()
    if key is None:
        return [f"- {lines[0]}", *(f"  {line}" for line in lines[1:])]
    return [head, *(f"  {line}" for line in lines)]


def _scalar(x: Any) -> str:
    if is_variable(x):
        x = x.get_value()
    if _is_array(x):
        return f"{x.dtype}[{','.join(map(str, x.shape))}]"
    if isinstance(x, str):
        return x
    if isinstance(x, type):
        return f"type[{x.__name__}]"
    if x is None or isinstance(x, bool | int | float | complex | tuple | list | dict):
        return repr(x)
    return f"{type(x).__name__}(...)"


def _size(rows: Sequence[LeafRow]) -> tuple[str, str]:
    if not rows:
        return "", ""
    count, size = sum(r.elements for r in rows), sum(r.bytes for r in rows)
    scale, unit = next(
        ((s, u) for s, u in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")) if size > s),
        (1, "B"),
    )
    shown = f"{size:,}" if scale == 1 else f"{size / scale:,.1f}"
    return f"{count:,} ", f"({shown} {unit})"


def _drawn(
    obj: Any,
    rows: Sequence[CallInfo],
    heads: list[str],
    table_kwargs: Mapping[str, Any],
    column_kwargs: Mapping[str, Any],
    console_kwargs: Mapping[str, Any],
) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def sized(found: Sequence[LeafRow], style: str = "") -> Any:
        count, size = _size(found)
        return Text.assemble((count, style), (size, f"{style} dim".strip()))

    below: dict[tuple[str, Path], list[LeafRow]] = {}
    every = leaves(obj)
    for leaf in every:
        for n in range(len(leaf.path)):
            below.setdefault((_kind(leaf), leaf.path[:n]), []).append(leaf)
    kinds = sorted({_kind(leaf) for leaf in every})
    boxes = dict(variables(obj).flat_state())

    options = {"show_header": True, "show_lines": True, "show_footer": True}
    title = f"{type(obj).__name__} Summary"
    table = Table(**{**options, "title": title, **table_kwargs})
    for head in heads[:-1]:
        table.add_column(head, **column_kwargs)
    total = Text("Total", justify="right")
    table.add_column(heads[-1], footer=total, **column_kwargs)
    for kind in kinds:
        table.add_column(kind, footer=sized(below[kind, ()]), **column_kwargs)
    for row in rows:
        cells: dict[str, Any] = {
            "path": "/".join(map(str, row.path)),
            "type": row.type.__name__,
            "inputs": row.inputs_repr,
            "outputs": "" if _empty(row.outputs) else _text(row.outputs),
            "flops": str(row.flops),
            "vjp_flops": str(row.vjp_flops),
        }
        line = [Text(cells[head]) for head in heads]
        for kind in kinds:
            found = below.get((kind, row.module), [])
            n = len(row.module) + 1
            own = [r.path for r in found if len(r.path) == n]
            here = {path[-1]: _shown(boxes[path]) for path in own}
            told = f"{_text(here)}\n\n" if here else ""
            line.append(Text(told) + sized(found, "bold"))
        table.add_row(*line)
    table.caption = Text("\nTotal Parameters: ", "bold") + sized(every, "bold")
    file = io.StringIO()
    known = {"force_terminal": True, "force_jupyter": False}
    Console(file=file, **{**known, **console_kwargs}).print(table)
    return file.getvalue()


def _kind(leaf: LeafRow) -> str:
    random = leaf.kind is not None and is_kind(leaf.kind, RngState)
    return RngState.__name__ if random else leaf.label


def _shown(leaf: Any) -> Any:
    metadata = leaf.get_metadata(exclude_required=True) if is_variable(leaf) else {}
    return {"value": _scalar(leaf), **metadata} if metadata else leaf
