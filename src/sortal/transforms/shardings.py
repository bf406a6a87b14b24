"""jit with shardings by kind: one compiled function for each structure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
from jax.core import Tracer
from jax.sharding import NamedSharding

from sortal._engine.jax_compat import outside_traces
from sortal._engine.paths import Path, show
from sortal._engine.schema import Schema
from sortal._engine.state import State, snapshot
from sortal._engine.statics import PLACEMENT
from sortal._engine.variable import describe
from sortal.errors import AxisError, PolicyError, ShardingError, listing
from sortal.policy.rule import format_answer
from sortal.sharding.mesh_axes import (
    declared,
    in_force,
    put,
    put_apart,
    spec_fault,
)
from sortal.sharding.resolution import (
    check_specs,
    placement,
    refuse_fixed,
    spec_for,
)
from sortal.transforms._adapter.binding import BoundArguments, write_back
from sortal.transforms._adapter.effects import Effects, Result, rigid_leaves
from sortal.transforms._adapter.functions import named_positions
from sortal.transforms._adapter.lanes import Lanes, Sent, unsorted
from sortal.transforms._adapter.prefixes import (
    all_answers,
    alone,
    by_kind,
    for_plain,
    given_for_objects,
    is_answer,
    is_structural,
    leaf_answers,
    new_leaves,
)
from sortal.transforms._adapter.tracing import (
    FlatModule,
    find_flat_modules,
    is_flat_module,
)


def as_declared(result: Result, given: Any) -> Result:
    """What a compiled function did, with its leaves where they are declared to be.

    A leaf whose metadata or kind declares a spec leaves each compiled function with
    it; XLA would otherwise choose what is cheapest there. What has another rank than
    where ``shard`` put it, or fewer dimensions than its spec, is part of something that
    ``jax.vmap`` maps over, and left to JAX.

    Args:
      result: what ``run`` returned; for use inside its trace.
      given: the arguments, with FlatModules in the place of roots.

    Returns:
      The Result.
    """
    effects = result.effects
    values, fresh = result.values, result.fresh
    if effects.written:
        (first, *_) = find_flat_modules(given)
        schema = first.definition.graphdef.schema
        values = _as_declared(schema.pick(effects.written), values)
    if fresh and effects.edits is not None:
        edits = effects.edits
        new = [i for i, leaf in enumerate(edits.leaves) if leaf.origin is None]
        fresh = _as_declared(edits.graphdef.schema.pick(new), fresh)
    return Result(effects, (result.out, values, fresh))


def declares(given: Any) -> bool:
    """Whether some leaf of the FlatModules in ``given`` has a declared sharding."""
    schemas = {c.definition.graphdef.schema for c in find_flat_modules(given)}
    return any(x is not None for schema in schemas for x in _declared(schema))


def _declared(schema: Schema) -> list[Any]:
    """The declared mesh and spec of each leaf.

    They follow from the leaves, the mesh and the settings in force, by which they are
    kept.
    """
    key = "declared", jax.sharding.get_abstract_mesh(), in_force()
    return schema.memo(key, lambda: list(map(declared, schema.kinds, schema.metadata)))


def _as_declared(schema: Schema, values: Sequence[Any]) -> list[Any]:
    found = list(_declared(schema))
    for i, (x, given) in enumerate(zip(values, found, strict=True)):
        if given is not None:
            n = min((jnp.ndim(a) for a in jax.tree.leaves(x)), default=0)
            part = PLACEMENT in schema.metadata[i] and not placement(
                x, schema.metadata[i]
            )
            found[i] = None if part or n < len(given[1]) else given
    for mesh in {given[0] for given in found if given is not None}:
        mine = [x[1] if x is not None and x[0] == mesh else None for x in found]
        check_specs(schema, values, mine, mesh)
    made = [None if given is None else NamedSharding(*given) for given in found]
    return [
        x if sharding is None else jax.tree.map(lambda a, s=sharding: put(a, s), x)
        for x, sharding in zip(values, made, strict=True)
    ]


def _of(flat_module: FlatModule) -> Iterable[tuple[int, Any]]:
    """The values of a FlatModule by number of leaf."""
    return zip(flat_module.definition.leaves, flat_module.values, strict=True)


def _no_values() -> Any:
    raise PolicyError(
        "out_shardings has filters that look at values, which are not known before the "
        "call; use kinds, tags and paths there."
    )


class Sharded:
    """What ``jax.jit`` makes of a function, for each structure of its arguments.

    JAX is told the shardings when a function is wrapped, and which leaves there are is
    known when it is called. A leaf that is written leaves with the sharding it came
    with.

    Args:
      traced: the function to trace; it returns a Result.
      options: those of ``jax.jit``, with ``in_shardings`` or ``out_shardings``.
    """

    def __init__(self, traced: Callable[..., Result], options: dict[str, Any]):
        self._traced, self._options = traced, dict(options)
        # A method has no parameters that JAX could find the positions of names by.
        nums, names = (options.get(f"static_arg{x}") for x in ("nums", "names"))
        self._static = named_positions(traced, nums, names)
        at = [i for i in self._static if isinstance(i, int)]
        self._options["static_argnums"] = tuple(sorted(at))
        self._options["static_argnames"] = tuple(sorted(self._static - set(at)))
        self._in = self._options.pop("in_shardings", None)
        self._out = self._options.pop("out_shardings", None)
        self._made: dict[Any, _Packed] = {}
        # Structures of which some answer depends on shapes too.
        self._by_shape: set[Any] = set()
        tables = jtu.tree_leaves((self._in, self._out), is_leaf=is_answer)
        self._by_value = not all(map(is_structural, tables))

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        packed = self._packed(args, kwargs)
        try:
            return unsorted(*packed.jit(*args, **kwargs))
        except ValueError as error:
            dynamic = self._dynamic(args, kwargs)
            given, _ = self._answers(*dynamic)  # refuses what does not fit
            _refuse_undivided(given, dynamic[0], error)
            _refuse_elsewhere(given, dynamic[0], error)
            raise

    def place(
        self,
        bound: BoundArguments,
        args: Sequence[Any],
        kwargs: Any,
        effects: Effects,
    ) -> None:
        """Puts what was only read where ``in_shardings`` has it, to stay there.

        Args:
          bound: the arguments of a call that has been made.
          args: positional arguments as they were given to JAX.
          kwargs: keyword arguments, likewise.
          effects: what the call did; what it wrote lies where it is to.
        """
        if self._in is not None and bound.roots and outside_traces():
            self._packed(args, kwargs).answers.place(bound, effects)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of what ``jax.jit`` returns."""
        return self._packed(args, kwargs).jit.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of what ``jax.jit`` returns."""
        return self._packed(args, kwargs).jit.trace(*args, **kwargs)

    def clear_cache(self) -> None:
        """Forgets all compiled programs."""
        self._made.clear()
        self._by_shape.clear()

    def _dynamic(self, args: Sequence[Any], kwargs: Any) -> tuple[list[Any], Any]:
        """The arguments that JAX traces."""
        dynamic = [x for i, x in enumerate(args) if i not in self._static]
        return dynamic, {k: x for k, x in kwargs.items() if k not in self._static}

    def _packed(self, args: Sequence[Any], kwargs: Any) -> _Packed:
        dynamic, named = self._dynamic(args, kwargs)
        leaves, tree = jtu.tree_flatten((dynamic, named))
        # Names of axes, and specs that are functions, depend on rules and mesh.
        short = (tree, jax.sharding.get_abstract_mesh(), in_force())
        key = self._key(short, leaves)
        found = self._made.get(key)
        if found is None:
            given, answers = self._answers(dynamic, named)
            if answers.by_shape:
                self._by_shape.add(short)
                key = self._key(short, leaves)
            options = self._options
            if self._in is not None:
                options = {**options, "in_shardings": given}
            found = _Packed(self._traced, answers, self._out, options)
            self._made[key] = found
        return found

    def _key(self, short: Any, leaves: Sequence[Any]) -> Any:
        """What answers are kept by: all that they depend on."""
        if self._by_value:
            return short, tuple(map(jax.typeof, leaves))
        if short in self._by_shape:
            return short, tuple(getattr(x, "shape", ()) for x in leaves)
        return short

    def _answers(self, dynamic: Sequence[Any], named: Any) -> tuple[Any, _Answers]:
        """What JAX is told of each argument, and the answers behind it."""
        answers = _Answers()
        prefix = self._in
        if isinstance(prefix, (tuple, list)):
            given = tuple(map(answers.tree, prefix, dynamic))
        else:
            given = tuple(answers.tree(prefix, x) for x in dynamic)
        answers.share((dynamic, named), given)
        return given, answers


class _Answers:
    """The shardings of arguments, as trees and by number of leaf."""

    def __init__(self) -> None:
        self.of_leaf: dict[int, Any] = {}
        self.given: dict[int, Any] = {}
        self.by_shape = False

    def tree(self, prefix: Any, arg: Any) -> Any:
        """The shardings of one argument."""
        return jtu.tree_map(self._subtree, prefix, arg, is_leaf=is_answer)

    def share(self, args: Any, trees: Any) -> None:
        """Gives shared Variables the sharding of any argument; refuses two.

        A Variable goes in with the first argument that holds it.
        """
        found = find_flat_modules(args)
        if len(found) < 2:
            return
        graphdef = found[0].definition.graphdef
        schema, rows = graphdef.schema, []
        values = {k: x for c in found for k, x in _of(c)}
        for path, entry, first in graphdef.places():
            root: Any = path[0] if path else None
            given = self.given.get(root)
            if first == path or first[0] == path[0] or given is None:
                continue
            for below, k in graphdef.leaves_below(entry).items():
                at = (*path, *below)
                one = Schema.of([at[1:]], [schema.kinds[k]], [schema.metadata[k]])
                (answer,) = leaf_answers(given, "spec", one, alone(one, values[k]))
                (answer,) = self._fit(one, [values[k]], [answer])
                mine = self.of_leaf[k]
                if mine is None:
                    self.of_leaf[k] = answer
                elif answer is not None and answer != mine:
                    rows.append(f"{one.describe(0)}: {mine}, and {answer}")
        if rows:
            raise AxisError(
                "Variables that several arguments share have one sharding each; found "
                f"two for:\n{listing(rows)}\nGive both arguments the same."
            )
        for c in find_flat_modules(trees):
            c.values = [self.of_leaf[k] for k in c.definition.leaves]

    def place(self, bound: BoundArguments, effects: Effects) -> None:
        """Leaves live Variables that were only read where the program had them."""
        where = {}
        graphdef = bound.alias_map.graphdef
        fixed = rigid_leaves(graphdef).union(effects.written)
        if effects.edits is not None:  # something else may be where an array was
            kinds = enumerate(graphdef.schema.kinds)
            fixed = fixed.union(k for k, kind in kinds if kind is None)
        for k, answer in self.of_leaf.items():
            if k in fixed:
                continue
            x, there = bound.live_leaf(k)._value, _on_mesh(answer)
            free = isinstance(x, jax.Array) and not isinstance(x, Tracer)
            if free and there not in (None, x.sharding) and not x.is_deleted():
                where[k] = there
        if where:
            values = [bound.live_leaf(k)._value for k in where]
            moved = put_apart(values, list(where.values()))
            effects = Effects(tuple(where), (), None)
            write_back(bound, Result(effects, (None, moved, [])))

    def _subtree(self, given: Any, subtree: Any) -> Any:
        def leaf(x: Any) -> Any:
            if is_flat_module(x):
                return self._root(given, x)
            if isinstance(x, State) and by_kind(given):
                found = leaf_answers(given, "spec", x.schema, x.leaves)
                return snapshot(x.schema, self._fit(x.schema, x.values_list(), found))
            return for_plain(given, "spec", x)

        return jtu.tree_map(
            leaf,
            subtree,
            is_leaf=lambda x: isinstance(x, (FlatModule, State)) or x is None,
        )

    def _root(self, given: Any, flat_module: FlatModule) -> FlatModule:
        definition = flat_module.definition
        whole = definition.graphdef.schema
        schema = Schema.of(
            definition.paths,
            [whole.kinds[k] for k in definition.leaves],
            [whole.metadata[k] for k in definition.leaves],
        )
        values = flat_module.values
        found = leaf_answers(given, "spec", schema, lambda: values)
        found = self._fit(schema, values, found)
        self.given[definition.number] = given
        self.of_leaf.update(zip(definition.leaves, found, strict=True))
        return FlatModule(list(found), definition)

    def _fit(
        self, schema: Schema, values: Sequence[Any], found: Sequence[Any]
    ) -> list[Any]:
        """Answers as ``jax.jit`` takes them, which fit their leaves."""
        self.by_shape |= not all(x is None or isinstance(x, _FIXED) for x in found)
        found = [_for_jit(*x) for x in zip(found, values, schema.paths, strict=True)]
        _check(schema, values, found)
        return found


_FIXED = (jax.sharding.PartitionSpec, jax.sharding.Sharding)


def _of_one(given: Any, schema: Schema, value: Any) -> Any:
    """The answer of a Policy for a new leaf, whose Schema is of it alone."""
    (answer,) = leaf_answers(given, "spec", schema, alone(schema, value))
    answer = _for_jit(answer, value, schema.paths[0])
    _check(schema, [value], [answer])
    return answer


def _for_jit(answer: Any, value: Any, path: Path) -> Any:
    """An answer as ``jax.jit`` takes it: functions of the mesh become specs."""
    known = answer is None or isinstance(answer, _FIXED)
    return answer if known else spec_for(answer, value, None, lambda: show(path))


def _on_mesh(answer: Any) -> Any:
    """An answer as a sharding; a spec is on the mesh of the context."""
    if isinstance(answer, jax.sharding.PartitionSpec):
        return NamedSharding(jax.sharding.get_mesh(), answer)
    return answer


def _refuse_undivided(given: Any, args: Any, cause: Exception) -> None:
    """Says which arrays cannot be divided as in_shardings says."""
    if "is partitioned" not in str(cause) or not outside_traces():
        return
    rows = []
    for name, answer, x in _placed(given, args):
        sharding = _on_mesh(answer)
        if isinstance(sharding, NamedSharding):
            sizes = dict(sharding.mesh.shape)
            if fault := spec_fault(jnp.shape(x), sharding.spec, sizes):
                rows.append(
                    f"{name}: {format_answer('spec', sharding.spec)}, but {fault}"
                )
    if rows:
        raise ShardingError(
            "these arguments cannot be divided as in_shardings says:\n"
            f"{listing(rows)}\nGive them another spec, or another shape, such as a "
            "batch that is padded to a multiple."
        ) from cause


def _refuse_elsewhere(given: Any, args: Any, cause: Exception) -> None:
    """Says which arrays are bound to another place, where that is why JAX refused."""
    # Inside of a trace JAX does not say what the mesh is.
    known = "does not match the sharding on the respective arg" in str(cause)
    if not (known and outside_traces()):
        return
    bad = []
    for name, answer, x in _placed(given, args):
        bound = getattr(x, "committed", False) and not isinstance(x, Tracer)
        if bound and not x.sharding.is_equivalent_to(_on_mesh(answer), x.ndim):
            where, due = (format_answer("spec", s) for s in (x.sharding, answer))
            bad.append(f"{name}: {where}; in_shardings: {due}")
    if bad:
        raise ShardingError(
            "these arrays are bound to another place than in_shardings gives them:\n"
            f"{listing(bad)}\nPut models there by shard(model, mesh, policy), and "
            "other arrays by jax.device_put(x, sharding)."
        ) from cause


def _placed(given: Any, args: Any) -> list[tuple[str, Any, Any]]:
    """Each array with an answer in ``given``: what it is called, the answer, it."""
    found: list[tuple[str, Any, Any]] = []

    def note(name: str, answer: Any, value: Any) -> None:
        leaves = jax.tree.leaves(value) if answer is not None else ()
        found.extend((name or describe(x), answer, x) for x in leaves)

    def visit(answer: Any, x: Any) -> None:
        if not isinstance(answer, (FlatModule, State)):
            note("", answer, x)
            return
        if isinstance(answer, State):
            schema, rows = x.schema, enumerate(x.values_list())
            answers = answer.values_list()
        else:
            schema, rows = x.definition.graphdef.schema, _of(x)
            answers = answer.values
        for mine, (k, value) in zip(answers, rows, strict=True):
            note(schema.describe(k), mine, value)

    ends = (FlatModule, State, type(None))
    jtu.tree_map(visit, given, tuple(args), is_leaf=lambda x: isinstance(x, ends))
    return found


def _check(schema: Schema, values: Sequence[Any], found: Sequence[Any]) -> None:
    """Refuses what does not fit, before JAX does so one leaf at a time."""
    meshes = {x.mesh for x in found if isinstance(x, NamedSharding)}
    for mesh in meshes:
        mine = [x.spec if getattr(x, "mesh", None) == mesh else None for x in found]
        check_specs(schema, values, mine, mesh)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        check_specs(schema, values, found, mesh)


class _Packed:
    """A compiled function whose outputs are sorted into one list for each sharding."""

    def __init__(
        self,
        traced: Callable[..., Result],
        answers: _Answers,
        out: Any,
        options: dict[str, Any],
    ):
        self._traced, self.answers, self._out = traced, answers, out
        given = [out, *answers.given.values()]
        every = [None, *answers.of_leaf.values(), *all_answers(given, "spec")]
        every = [x for x in every if x is None or isinstance(x, _FIXED)]
        self._lanes = Lanes(every)
        plain = jtu.tree_map(
            lambda x: None if by_kind(x) else x, out, is_leaf=is_answer
        )
        shardings = (plain, list(self._lanes.answers), None)
        self.jit = jax.jit(self._sorted, out_shardings=shardings, **options)

    def _sorted(self, *args: Any, **kwargs: Any) -> Any:
        result = self._traced(*args, **kwargs)
        values = {k: x for c in find_flat_modules((args, kwargs)) for k, x in _of(c)}
        written = dict(zip(result.effects.written, result.values, strict=True))
        moved = self._moved(result, (args, kwargs), values | written)
        written |= {k: values[k] for k in moved.keys() - written.keys()}
        effects = result.effects
        effects = Effects(tuple(written), effects.outputs, effects.edits)
        of_leaf = {**self.answers.of_leaf, **moved}
        answers = [of_leaf.get(k) for k in written] + self._of_new(result)
        result = Result(effects, (result.out, [*written.values()], result.fresh))
        sent = map(self._send, answers, [*result.values, *result.fresh])
        return self._lanes.sort(result, sent)

    def _send(self, answer: Any, value: Any) -> Sent:
        if answer in self._lanes.answers:
            return Sent(answer, value)
        # A function of shape and mesh made it while the lanes were already there.
        on_mesh = NamedSharding(jax.sharding.get_abstract_mesh(), answer)
        return Sent(None, jax.tree.map(lambda x: put(x, on_mesh), value))

    def _moved(
        self, result: Result, given: Any, values: dict[int, Any]
    ) -> dict[int, Any]:
        """The answers for leaves that came in and are returned, by their number."""
        outs = given_for_objects(self._out, result.out)
        outs = {n: x for n, x in outs.items() if x is not None}
        if not outs:
            return {}
        effects, edits = result.effects, result.effects.edits
        flat = find_flat_modules(given)
        entered = flat[0].definition.graphdef if flat else None
        if edits is None:
            graphdef: Any = entered
            origins: Sequence[Any] = range(len(graphdef.schema))
        else:
            graphdef = edits.graphdef
            origins = [leaf.origin for leaf in edits.leaves]
        moved = {}
        for number, answer in outs.items():
            at = graphdef.leaves_below(effects.outputs[number])
            at = {path: i for path, i in at.items() if origins[i] is not None}
            whole = graphdef.schema
            schema = Schema.of(
                list(at),
                [whole.kinds[i] for i in at.values()],
                [whole.metadata[i] for i in at.values()],
            )
            found = leaf_answers(answer, "spec", schema, _no_values)
            mine = [values[origins[i]] for i in at.values()]
            found = list(map(_for_jit, found, mine, schema.paths))
            _check(schema, mine, found)
            moved.update(zip([origins[i] for i in at.values()], found, strict=True))
        if entered is not None:
            refuse_fixed(entered.schema, moved.keys() & rigid_leaves(entered))
        return moved

    def _of_new(self, result: Result) -> list[Any]:
        effects, edits = result.effects, result.effects.edits
        if edits is None:
            return []
        outs = given_for_objects(self._out, result.out)
        # One sharding for a whole root speaks of the leaves that were there.
        given = self.answers.given.items()
        roots = {i: table if by_kind(table) else None for i, table in given}
        returned = {
            i: (path, answer)
            for n, answer in outs.items()
            if answer is not None
            for path, i in edits.graphdef.leaves_below(effects.outputs[n]).items()
        }
        new = [i for i, leaf in enumerate(edits.leaves) if leaf.origin is None]
        found = new_leaves(effects, roots, outs, result.fresh)
        answers = []
        for i, (one, table, value) in zip(new, found, strict=True):
            path, answer = returned.get(i, (one.paths[0], table))
            leaf = Schema.of([path], one.kinds, one.metadata)
            answers.append(None if answer is None else _of_one(answer, leaf, value))
        return answers
