"""The verbs over live objects: state, split, merge, update, pop, clone, variables."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sortal._engine.foreign import same_kind
from sortal._engine.graphdef import Entry, GraphDef
from sortal._engine.leaves import Leaves, Slot, held, own, store_all
from sortal._engine.nodes import LEAF, NODE, STATIC
from sortal._engine.paths import Path, show
from sortal._engine.plan import bind, build
from sortal._engine.schema import Schema, check_exhaustive, kind_name
from sortal._engine.state import State, as_state, snapshot
from sortal._engine.statics import Metadata
from sortal._engine.variable import check_writable, describe
from sortal._engine.walk import Walk
from sortal.errors import MergeError, StructureError, UpdateError, listing


def state(node: Any, *filters: Any, graph: bool | None = None) -> Any:
    """A snapshot of the leaves that filters take.

    Editing the snapshot never edits the model. Each leaf goes to the first filter that
    takes it; leaves that no filter takes are left out.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      *filters: kinds, tags, ``...``, Filter objects; everything if absent.
      graph: taken for NNX code, of no effect.

    Returns:
      A State, or a tuple with one State for each filter where there are several.

    Raises:
      FilterError: a filter is malformed, or an earlier one swallows a later one.
      StructureError: a static value in the model cannot be hashed.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> params, stats = nnx.state(model, nnx.Param, nnx.BatchStat)
      >>> stats.paths()
      (('mean',), ('var',))
    """
    plan = bind(node)
    if not filters:
        return snapshot(plan.graphdef.schema, plan.leaves.snapshot())
    found, leaves = plan.pick(filters)
    states = tuple(
        snapshot(part[0], mine.snapshot())
        for part, mine in zip(found.parts, leaves, strict=True)
    )
    return states[0] if len(states) == 1 else states


def graphdef(node: Any, /, *, graph: bool | None = None) -> GraphDef:
    """The description of everything but the values.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      graph: taken for NNX code, of no effect.

    Returns:
      The GraphDef; one and the same object for equal structures.

    Raises:
      StructureError: a static value in the model cannot be hashed.

    Example:
      >>> import sortal as nnx
      >>> nnx.graphdef(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      GraphDef(Linear: 1 nodes, 2 leaves, 0 aliases)
    """
    return bind(node).graphdef


def split(node: Any, *filters: Any, graph: bool | None = None) -> tuple[Any, ...]:
    """Divides a model into its GraphDef and one State for each filter.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      *filters: together they must take every leaf; everything if absent.
      graph: taken for NNX code, of no effect.

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
    plan = bind(node)
    if not filters:
        return plan.graphdef, snapshot(plan.graphdef.schema, plan.leaves.snapshot())
    found, leaves = plan.pick(filters)
    check_exhaustive(plan.graphdef.schema, filters, found.rest)
    states = [
        snapshot(part[0], mine.snapshot())
        for part, mine in zip(found.parts, leaves, strict=True)
    ]
    return (plan.graphdef, *states)


class _Match(NamedTuple):
    """Where each leaf of a schema is found in the given states put end to end."""

    places: list[int]
    metadata: list[Metadata]
    missing: list[int]
    found: list[int]
    problems: list[str]


def _match(schema: Schema, given: tuple[Schema, ...]) -> _Match:
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
            elif part.kinds[i] and not same_kind(part.kinds[i], schema.kinds[at]):
                problems.append(
                    f"wrong kind: {show(path)} is a {kind_name(schema.kinds[at])}, "
                    f"found a {kind_name(part.kinds[i])}"
                )
                places[at] = offset + i
            else:
                places[at] = offset + i
                if part.kinds[i] is not None:
                    metadata[at] = part.metadata[i]
        offset += len(part)
    missing = [i for i, place in enumerate(places) if place == -1]
    found = [i for i, place in enumerate(places) if place != -1]
    return _Match(places, metadata, missing, found, problems)


def merge(
    graphdef: GraphDef,
    state: Any,
    /,
    *states: Any,
    missing: Any = None,
    copy: bool | None = None,
) -> Any:
    """Builds a new model from a GraphDef and States that hold each leaf once.

    Args:
      graphdef: what ``split`` returned first.
      state: a State or nested dict of leaves.
      *states: more of them.
      missing: where leaves that no state holds come from: a State, or a function of
        (path, kind) that returns a value. Without it a missing leaf is an error.
      copy: taken for NNX code and of no effect: the model's Variables are always new.

    Returns:
      The new model.

    Raises:
      MergeError: leaves are missing, unknown, given twice or of the wrong kind; all
        of them are listed.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.merge(*nnx.split(model)).kernel
      Param(float32[2,3])
    """
    del copy
    given = [as_state(s) for s in (state, *states)]
    schemas = tuple(s.schema for s in given)
    schema = graphdef.schema
    match = graphdef.memo(("merge", schemas), lambda: _match(schema, schemas))
    filled: dict[int, Any] = {}
    if match.missing and missing is not None:
        filled = _fill_missing(schema, match.missing, missing)
    _check_merge(schema, match, filled)
    values = [v for s in given for v in s.values_list()]
    ordered = [
        values[place] if place >= 0 else filled[i]
        for i, place in enumerate(match.places)
    ]
    return build(graphdef, own(ordered), match.metadata)


def _fill_missing(schema: Schema, missing: list[int], source: Any) -> dict[int, Any]:
    if callable(source) and not isinstance(source, State):
        return {i: source(schema.paths[i], schema.kinds[i]) for i in missing}
    other = as_state(source)
    values = other.values_list()
    return {
        i: values[other.schema.index[schema.paths[i]]]
        for i in missing
        if schema.paths[i] in other.schema.index
    }


def _check_merge(schema: Schema, match: _Match, filled: dict[int, Any]) -> None:
    absent = [i for i in match.missing if i not in filled]
    if not absent and not match.problems:
        return
    rows = [f"missing: {schema.describe(i)}" for i in absent] + match.problems
    raise MergeError(
        f"merge needs each of the {len(schema)} leaves of the GraphDef exactly once; "
        f"found:\n{listing(rows)}\n"
        "Pass the remaining states too, or missing=another_state to fill a kind."
    )


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

    Example:
      >>> import jax
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> doubled = jax.tree.map(lambda x: 2 * x, nnx.state(model))
      >>> nnx.update(model, doubled)
    """
    plan = bind(node)
    schema = plan.graphdef.schema
    given = [as_state(s) for s in states]
    schemas = tuple(s.schema for s in given)
    match = plan.graphdef.memo(("update", schemas), lambda: _match(schema, schemas))
    values = [v for s in given for v in s.values_list()]
    leaves = Leaves(plan.leaves[i] for i in match.found)
    new = own([values[match.places[i]] for i in match.found])
    problems = list(match.problems)
    if strict:
        problems += _misfits(schema, match.found, leaves, new)
    if leaves.slotted:
        problems += [
            f"cannot be written: {schema.describe(i)} is in a tuple or other value"
            for i, leaf in zip(match.found, leaves, strict=True)
            if type(leaf) is Slot and not leaf.writable
        ]
    if problems:
        raise UpdateError(
            f"the model was left as it was, because {len(problems)} of the given "
            f"leaves do not fit it:\n{listing(problems)}\n"
            "Give leaves with the model's paths, kinds, shapes and dtypes; "
            "strict=False allows other shapes and dtypes."
        )
    store_all([leaves], new)


def _misfits(
    schema: Schema, at: list[int], leaves: Leaves, new: list[Any]
) -> list[str]:
    olds = leaves.values()
    if all(map(_fits, olds, new)):
        return []
    rows = []
    for i, old, value in zip(at, olds, new, strict=True):
        what = _misfit(old, value)
        if what:
            rows.append(
                f"wrong {what}: {schema.describe(i)} is {_shown(old)}, "
                f"found {_shown(value)}"
            )
    return rows


def _fits(old: Any, new: Any) -> bool:
    try:
        return new.shape == old.shape and new.dtype == old.dtype
    except AttributeError:
        return False  # values that are no arrays are compared by their leaves


def _misfit(old: Any, new: Any) -> str:
    if _fits(old, new):
        return ""
    if jax.tree.structure(old) != jax.tree.structure(new):
        return "structure"
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        if jnp.shape(a) != jnp.shape(b):
            return "shape"
        if _dtype(a) != _dtype(b):
            return "dtype"
    return ""


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)


def _shown(value: Any) -> str:
    return describe(jax.tree.map(lambda x: x, value))


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
        raise StructureError("pop needs a filter that says which leaves to remove.")
    taken = state(node, *filters)
    states = [taken] if len(filters) == 1 else taken
    gone = {p for s in states for p in s.paths()}
    walk = Walk(node)
    schema = walk.graphdef.schema
    removals, stuck = [], []
    for n, record in enumerate(walk.graphdef.records):
        for entry in record.entries:
            if entry.what == LEAF and schema.paths[entry.ref] in gone:
                if record.handler.can_remove(entry.key):
                    removals.append((record.handler, walk.nodes[n], entry.key))
                else:
                    stuck.append(
                        f"{schema.describe(entry.ref)}, in a {record.cls.__name__}"
                    )
    if stuck:
        raise StructureError(
            "pop cannot take leaves out of lists and tuples, because the indices of "
            f"others would move; found:\n{listing(stuck)}\nNothing was removed."
        )
    leaves = zip(walk.leaves, schema.paths, strict=True)
    check_writable(x for x, path in leaves if path in gone)
    for handler, holder, key in removals:
        handler.remove(holder, key)
    return taken


def clone(
    node: Any,
    variables: bool = True,
    *,
    arrays: bool = False,
    graph: bool | None = None,
) -> Any:
    """A new model of the same structure and values.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      variables: whether it has Variables of its own; False shares the old model's.
      arrays: True also copies the arrays, so that donating one model's buffers leaves
        the other's alive.
      graph: taken for NNX code, of no effect.

    Returns:
      The new model.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.clone(model).kernel is model.kernel
      False
    """
    if not variables:
        plan = bind(node)
        return plan.graphdef.build(plan.view())[0]
    definition, leaves = split(node)
    return merge(definition, jax.tree.map(jnp.copy, leaves) if arrays else leaves)


def variables(node: Any, *filters: Any, graph: bool | None = None) -> Any:
    """The live Variables themselves, by path: writing to one writes to the model.

    Args:
      node: a Module, or a container of Modules and Variables.
      *filters: as for ``state``.
      graph: taken for NNX code, of no effect.

    Returns:
      A State of the live Variables, or a tuple with one for each filter.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.variables(model, nnx.Param)["kernel"] is model.kernel
      True
    """
    plan = bind(node)
    literals = filters or (...,)
    found, leaves = plan.pick(literals)
    states = tuple(
        State.from_flat_path(
            zip(
                schema.paths,
                map(held, mine),
                strict=True,
            )
        )
        for (schema, _), mine in zip(found.parts, leaves, strict=True)
    )
    return states[0] if len(states) == 1 else states


def iter_graph(
    node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[Path, Any]]:
    """Every node and leaf once with its first path, children before their holder.

    Args:
      node: any root.
      graph: taken for NNX code, of no effect.

    Yields:
      Pairs of path and object; static values are left out.

    Example:
      >>> import sortal as nnx
      >>> [p for p, _ in nnx.iter_graph(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))]
      [('bias',), ('kernel',), ()]
    """
    walk = Walk(node)
    seen: set[tuple[int, int]] = set()
    # A stack of (entry, path, whether its children were met), so that no depth is too
    # deep.
    todo: list[tuple[Entry, Path, bool]] = [(walk.graphdef.root, (), False)]
    while todo:
        entry, path, left = todo.pop()
        if left:
            yield path, walk.nodes[entry.ref]
        elif entry.what == STATIC or (entry.what, entry.ref) in seen:
            continue
        elif entry.what == LEAF:
            seen.add((LEAF, entry.ref))
            leaf = walk.leaves[entry.ref]
            yield path, held(leaf)
        else:
            seen.add((NODE, entry.ref))
            record = walk.graphdef.records[entry.ref]
            todo.append((entry, path, True))
            todo += [
                (child, record.below(path, child.key), False)
                for child in reversed(record.entries)
            ]


def iter_nodes(node: Any, wanted: Callable[[Any], bool]) -> Iterator[tuple[Path, Any]]:
    """The nodes that ``wanted`` says yes to, with their paths, children first.

    Args:
      node: any root.
      wanted: takes an object, returns a truth value.

    Yields:
      Pairs of path and object.
    """
    return ((path, x) for path, x in iter_graph(node) if wanted(x))
