"""The verbs over live objects: state, split, merge, update, pop, clone, variables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Never

import jax
import jax.numpy as jnp
import numpy as np

from sortal._engine.foreign import same_kind
from sortal._engine.graphdef import GraphDef
from sortal._engine.leaves import Slot, held, own, picker, store_all
from sortal._engine.nodes import ARRAYS, LEAF, STATIC
from sortal._engine.paths import Path, show
from sortal._engine.plan import Part, bind, build
from sortal._engine.schema import Schema, check_exhaustive, kind_name
from sortal._engine.stale import any_gone, is_gone, refuse_leaves
from sortal._engine.state import State, as_state, one_or_all, snapshot
from sortal._engine.statics import Metadata
from sortal._engine.variable import check_writable, describe
from sortal._nnx_names import refuse_unknown
from sortal.errors import (
    ArgumentError,
    FilterError,
    MergeError,
    StructureError,
    UpdateError,
    listing,
)

_Getter = Callable[[Sequence[Any]], Sequence[Any]]


def state(node: Any, *filters: Any, **_unknown: Never) -> Any:
    """A snapshot of the leaves that filters take.

    Editing the snapshot never edits the model. Each leaf goes to the first filter that
    takes it; leaves that no filter takes are left out.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      *filters: kinds, tags, ``...``, Filter objects; everything if absent.

    Returns:
      A State, or a tuple with one State for each filter where there are several.

    Raises:
      FilterError: a filter is malformed, names a class that no leaf can be, or is
        swallowed by an earlier one.
      StructureError: a static value in the model cannot be hashed.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> params, stats = nnx.state(model, nnx.Param, nnx.BatchStat)
      >>> stats.paths()
      (('mean',), ('var',))
    """
    if _unknown:
        refuse_unknown("state", _unknown)
    return one_or_all(_snapshots(bind(node).pick(filters or _ALL)[1]))


_ALL = (...,)


def _snapshots(parts: list[Part]) -> list[State]:
    return [snapshot(schema, leaves.snapshot()) for schema, leaves in parts]


def graphdef(node: Any, /, **_unknown: Never) -> GraphDef:
    """The description of everything but the values.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.

    Returns:
      The GraphDef; one and the same object for equal structures.

    Raises:
      StructureError: a static value in the model cannot be hashed.

    Example:
      >>> import sortal as nnx
      >>> nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      GraphDef(Linear: 1 nodes, 2 leaves, 0 aliases)
    """
    refuse_unknown("graphdef", _unknown)
    return bind(node).graphdef


def split(node: Any, *filters: Any, **_unknown: Never) -> tuple[Any, ...]:
    """Divides a model into its GraphDef and one State for each filter.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      *filters: together they must take every leaf; everything if absent.

    Returns:
      ``(graphdef, state, ...)``.

    Raises:
      FilterError: a filter is malformed, swallowed by an earlier one, or leaves are
        left over; all of them are listed.
      StructureError: a static value in the model cannot be hashed.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
      >>> copy = nnx.merge(graphdef, params, rest)
    """
    refuse_unknown("split", _unknown)
    plan = bind(node)
    found, parts = plan.pick(filters or _ALL)
    check_exhaustive(plan.graphdef.schema, filters, found.rest)
    return (plan.graphdef, *_snapshots(parts))


class _Match(NamedTuple):
    """Which leaves of a schema are in some states put end to end, and where."""

    found: list[int]
    missing: list[int]
    live: _Getter  # takes the leaves that were found from all of the schema's
    given: _Getter  # takes their new values, in the same order, from the states' values
    metadata: list[Metadata]
    problems: list[str]


def _match(graphdef: GraphDef, states: list[State]) -> _Match:
    given = tuple(state.schema for state in states)
    return graphdef.memo(("match", given), lambda: _matched(graphdef.schema, given))


def _matched(schema: Schema, given: tuple[Schema, ...]) -> _Match:
    places = [-1] * len(schema)
    metadata = list(schema.metadata)
    problems = []
    offset = 0
    for number, part in enumerate(given, 1):
        for i, path in enumerate(part.paths):
            at = schema.index.get(path)
            if at is None:
                problems.append(f"unknown: {part.describe(i)}, in state {number}")
            elif places[at] != -1:
                problems.append(f"given twice: {part.describe(i)}, again in {number}")
            else:
                places[at] = offset + i
                kind, expected = part.kinds[i], schema.kinds[at]
                if kind is not None:
                    metadata[at] = part.metadata[i]
                    if not same_kind(kind, expected):
                        problems.append(
                            f"wrong kind: {show(path)} is a {kind_name(expected)}, "
                            f"found a {kind_name(kind)}"
                        )
        offset += len(part)
    missing = [i for i, place in enumerate(places) if place == -1]
    found = [i for i, place in enumerate(places) if place != -1]
    live, new = picker(found), picker([places[i] for i in found])
    return _Match(found, missing, live, new, metadata, problems)


def _values(given: list[State], match: _Match) -> list[Any]:
    values = [value for state in given for value in state.values_list()]
    return own(list(match.given(values)))


def merge(
    graphdef: GraphDef,
    /,
    *states: Any,
    missing: Any = None,
    **_unknown: Never,
) -> Any:
    """Builds a new model from a GraphDef and States that hold each leaf once.

    Args:
      graphdef: what ``split`` returned first.
      *states: States or nested dicts of leaves.
      missing: where leaves that no state holds come from: a State, or a function of
        (path, kind) that returns a value. Without it a missing leaf is an error.

    Returns:
      The new model.

    Raises:
      ArgumentError: the first argument is no GraphDef, or another no State.
      MergeError: leaves are missing, unknown, given twice or of the wrong kind; all
        of them are listed.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.merge(*nnx.split(model)).kernel
      Param(float32[2,3])
    """
    refuse_unknown("merge", _unknown)
    if not isinstance(graphdef, GraphDef):
        raise ArgumentError(
            f"merge takes a GraphDef first; found a {type(graphdef).__name__}. Write "
            "merge(graphdef, state, ...), or merge(*parts) for the tuple of parts that "
            "split returned."
        )
    given = [as_state(s) for s in states]
    schema, match = graphdef.schema, _match(graphdef, given)
    if match.missing and missing is not None:
        given.append(_taken_from(missing, schema, match.missing))
        match = _match(graphdef, given)
    if match.missing or match.problems:
        absent = [f"missing: {schema.describe(i)}" for i in match.missing]
        raise MergeError(
            f"merge needs each of the {len(schema)} leaves of the GraphDef exactly "
            f"once; found:\n{listing(absent + match.problems)}\n"
            "Pass the remaining states too, or missing=another_state to fill a kind."
        )
    return build(graphdef, _values(given, match), match.metadata)


def _taken_from(source: Any, schema: Schema, missing: list[int]) -> State:
    """Values for the missing leaves, as far as the source has them."""
    paths, kinds = schema.paths, schema.kinds
    if callable(source) and not isinstance(source, State):
        found = {paths[i]: source(paths[i], kinds[i]) for i in missing}
    else:
        other = as_state(source)
        values = dict(zip(other.paths(), other.values_list(), strict=True))
        found = {paths[i]: values[paths[i]] for i in missing if paths[i] in values}
    return State.from_flat_path(found)


def update(node: Any, /, *states: Any, strict: bool = True) -> None:
    """Writes the leaves of States into a live model: all of them, or none.

    Args:
      node: a Module, or a container of Modules and Variables.
      *states: States or nested dicts; they may hold some of the leaves only.
      strict: False allows other shapes and dtypes; never other paths or kinds.

    Raises:
      UpdateError: a path is unknown, or a leaf has the wrong kind, shape or dtype; all
        are listed and nothing is changed.
      TraceError: the model belongs to another trace than the current one.
      StaleBufferError: a leaf holds a buffer that was donated; nothing is changed.

    Example:
      >>> import jax
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> doubled = jax.tree.map(lambda x: 2 * x, nnx.state(model))
      >>> nnx.update(model, doubled)
    """
    plan = bind(node)
    given = [as_state(s) for s in states]
    schema, match = plan.graphdef.schema, _match(plan.graphdef, given)
    leaves, new = plan.part(match.live), _values(given, match)
    problems, olds = list(match.problems), leaves.values()
    if leaves.slotted or (strict and not all(map(_fits, olds, new))):
        where, n = map(schema.describe, match.found), len(new)
        misfits = map(_misfit, where, leaves, olds, new, [strict] * n)
        problems += filter(None, misfits)
    if any_gone(new):
        gone = ((i, x) for i, x in zip(match.found, new, strict=True) if is_gone(x))
        refuse_leaves([f"{schema.describe(i)}: {describe(x)}" for i, x in gone])
    if problems:
        raise UpdateError(
            f"the model was left as it was, because {len(problems)} of the given "
            f"leaves do not fit it:\n{listing(problems)}\n"
            "Give leaves with the model's paths, kinds, shapes and dtypes; "
            "strict=False allows other shapes and dtypes."
        )
    store_all([leaves], new)


def _fits(old: Any, new: Any) -> bool:
    try:
        return new.shape == old.shape and new.dtype == old.dtype
    except AttributeError:
        return False  # values that are no arrays are compared by their leaves


def _misfit(where: str, leaf: Any, old: Any, new: Any, strict: bool) -> str:
    """Why a value cannot take the place of another; empty where it can."""
    both = f"{where} is {describe(old)}, found {describe(new)}"
    if type(leaf) is Slot:
        if not leaf.writable:
            return f"cannot be written: {where} is in a tuple or other value"
        if not isinstance(new, ARRAYS) and type(new) is not type(old):
            return f"no array: {both}, which would be static; write jnp.asarray(...)"
    if strict and not _fits(old, new):
        names = ("structure", "shape", "dtype")
        for name, a, b in zip(names, _form(old), _form(new), strict=True):
            if a != b:
                return f"wrong {name}: {both}"
    return ""


def _form(value: Any) -> tuple[Any, list[Any], list[Any]]:
    leaves, structure = jax.tree.flatten(value)
    return structure, list(map(np.shape, leaves)), list(map(_dtype, leaves))


def _dtype(x: Any) -> Any:
    number = isinstance(x, bool | int | float | complex)
    return jnp.result_type(x) if number else getattr(x, "dtype", type(x))


def pop(node: Any, *filters: Any) -> Any:
    """Removes the leaves that filters take from a live model, and returns them.

    Args:
      node: a Module.
      *filters: one or more filters.

    Returns:
      A State, or a tuple with one State for each filter where there are several.

    Raises:
      FilterError: no filter is given, one is malformed, or swallowed by another.
      StructureError: a leaf hangs in a list or tuple, whose other indices would move;
        nothing is removed.
      TraceError: the model belongs to another trace than the current one.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> model.sow(nnx.Intermediate, "y", jnp.ones(2))
      True
      >>> nnx.pop(model, nnx.Intermediate).paths()
      (('y',),)
    """
    if not filters:
        raise FilterError("pop needs a filter that says which leaves to remove.")
    plan = bind(node)
    found, parts = plan.pick(filters)
    states = _snapshots(parts)
    gone = {i for _, at in found.parts for i in at}
    schema = plan.graphdef.schema
    holders = zip(plan.graphdef.records, plan.nodes_of(node), strict=False)
    places = [
        (record, holder, entry)
        for record, holder in holders
        for entry in record.entries
        if entry.what == LEAF and entry.ref in gone
    ]
    stuck = [
        f"{schema.describe(entry.ref)}, in a {record.cls.__name__}"
        for record, _, entry in places
        if not record.handler.can_remove(entry.key)
    ]
    if stuck:
        raise StructureError(
            "pop cannot take leaves out of lists and tuples, because the indices of "
            f"others would move; found:\n{listing(stuck)}\nNothing was removed."
        )
    check_writable(plan.leaves[entry.ref] for _, _, entry in places)
    for record, holder, entry in places:
        record.handler.remove(holder, entry.key)
    return one_or_all(states)


def clone(
    node: Any, variables: bool = True, *, arrays: bool = False, **_unknown: Never
) -> Any:
    """A new model of the same structure and values.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      variables: whether it has Variables of its own; False shares the old model's.
      arrays: True also copies the arrays, so that donating one model's buffers leaves
        the other's alive.

    Returns:
      The new model.

    Raises:
      ArgumentError: the Variables are shared, and their arrays are to be copied.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.clone(model).kernel is model.kernel
      False
    """
    refuse_unknown("clone", _unknown)
    if arrays and not variables:
        raise ArgumentError(
            "clone(variables=False, arrays=True): Variables that are shared have one "
            "array. Leave out variables=False, or arrays=True."
        )
    plan = bind(node)
    if not variables:
        return plan.graphdef.build(plan.view())[0]
    values = plan.leaves.snapshot()
    if arrays:
        values = jax.tree.map(jnp.copy, values)
    return plan.graphdef.build(plan.graphdef.build_leaves(values))[0]


def variables(node: Any, *filters: Any, **_unknown: Never) -> Any:
    """The live Variables themselves, by path: writing to one writes to the model.

    To a transform every State is a value, and what a function writes to one that it is
    given is not written outside: pass the model, or a list of its Variables.

    Args:
      node: a Module, or a container of Modules and Variables.
      *filters: as for ``state``.

    Returns:
      A State of the live Variables, or a tuple with one for each filter.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.variables(model, nnx.Param)["kernel"] is model.kernel
      True
    """
    refuse_unknown("variables", _unknown)
    _, parts = bind(node).pick(filters or _ALL)
    return one_or_all(
        State.from_flat_path(zip(schema.paths, map(held, leaves), strict=True))
        for schema, leaves in parts
    )


def iter_graph(node: Any, /, **_unknown: Never) -> Iterator[tuple[Path, Any]]:
    """Every node and leaf once with its first path, children before their holder.

    Args:
      node: any root.

    Yields:
      Pairs of path and object; static values are left out.

    Example:
      >>> import sortal as nnx
      >>> [p for p, _ in nnx.iter_graph(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))]
      [('bias',), ('kernel',), ()]
    """
    refuse_unknown("iter_graph", _unknown)
    plan = bind(node)
    nodes = plan.nodes_of(node)
    around: list[tuple[Path, Any]] = []  # what the next place may still lie in
    for path, (_, what, ref), first in plan.graphdef.places():
        if what == STATIC or first != path:
            continue
        while around and path[: len(around[-1][0])] != around[-1][0]:
            yield around.pop()
        around.append((path, held(plan.leaves[ref]) if what == LEAF else nodes[ref]))
    yield from reversed(around)


def iter_nodes(node: Any, wanted: Callable[[Any], bool]) -> Iterator[tuple[Path, Any]]:
    """The nodes that ``wanted`` says yes to, with their paths, children first.

    Args:
      node: any root.
      wanted: takes an object, returns a truth value.

    Yields:
      Pairs of path and object.
    """
    return ((path, x) for path, x in iter_graph(node) if wanted(x))
