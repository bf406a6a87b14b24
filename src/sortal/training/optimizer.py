"""Optimizer: any optax transformation over the leaves that a filter takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Never

import jax
import jax.numpy as jnp
import jax.tree_util as jtu
import numpy as np

from sortal._engine.leaves import Leaves, Slot, store_all
from sortal._engine.marks import static
from sortal._engine.nodes import is_object
from sortal._engine.paths import Path
from sortal._engine.plan import bind
from sortal._engine.schema import Kind, Schema, path_hints
from sortal._engine.state import FlatState, State, as_state, snapshot
from sortal._engine.statics import EMPTY, Metadata
from sortal._engine.variable import (
    OptArray,
    OptState,
    OptVariable,
    Param,
    Variable,
    describe,
    is_variable,
    value_of,
)
from sortal._nnx_names import refuse_unknown
from sortal.errors import OptimizerError, listing
from sortal.filters import Any_, to_filter
from sortal.functional import state as state_of
from sortal.module import Pytree
from sortal.policy.policy import UNSET, Policy
from sortal.sharding.resolution import SPECS, shape_of, with_spec_like
from sortal.training.fitting import (
    ANEW,
    check_arguments,
    check_dtypes,
    check_paths,
    check_shapes,
    check_updates,
    dtype,
    dtypes,
    is_array,
    is_gradient,
    is_leaf,
    odd_shapes,
    placed_like,
)
from sortal.training.groups import (
    check_groups,
    divide,
    groups_of,
    parts_of,
    scatter,
    takes_extra,
)


class Hyperparam(OptArray):
    """A hyperparameter that optax keeps in its state, such as a learning rate.

    A Python number written to it gets the dtype of the old value, so that compiled
    steps are used again. ``optax.inject_hyperparams`` makes them.
    """

    def set_value(self, value: Any, **options: Any) -> None:
        """Replaces the value; a Python or NumPy number is given the old one's dtype.

        Args:
          value: the new value.
          **options: ``index``, as for every Variable.

        Raises:
          TraceError: this Variable belongs to another trace than the current one.
        """
        old: Any = self._value
        number = isinstance(value, (int, float, complex, np.generic))
        if number and isinstance(old, jax.Array) and not options:
            new = jnp.asarray(value)
            fits = new.dtype == old.dtype and new.weak_type == old.weak_type
            value = new if fits else new.astype(old.dtype)
        super().set_value(value, **options)


class Optimizer(Pytree):
    """Trains the parameters of a model by an optax transformation; keeps its state.

    The transformation is given parameters, gradients and its own moments as States of
    the same treedef, so that masks and labels may be made from
    ``sortal.state(model, wrt)``. Variables hold its state: ``OptVariable`` at a
    parameter's path, ``OptArray`` for everything else.

    Several transformations may share a model: ``Optimizer(model, {filter: tx, ...})``.
    Each parameter belongs to one group, and each group has its own optax state; a last
    ``...`` takes what the others leave. ``Optimizer(model, policy)`` reads the columns
    ``optimizer`` and ``trainable`` of a Policy: a group for each transformation, and
    nothing kept for what is frozen.

    Args:
      model: a Module, or a container of Modules and Variables.
      tx: an optax transformation, a dict of filter to transformation, or a Policy.
      wrt: which leaves to train, all of a floating or complex dtype; ``Param`` if
        absent, for a dict whatever its filters take, and for a Policy whatever has a
        transformation. ``optimizer.wrt`` is what to give to ``grad``.

    Raises:
      OptimizerError: ``wrt`` takes no leaf, or leaves that are not floating or cannot
        be written; a leaf is in no group or in two; a group is empty; or ``tx`` is no
        transformation.
      PolicyError: of a Policy: leaves of ``wrt`` have no answer, a row's transformation
        trains no leaf, or nothing is trained.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import sortal as nnx
      >>> class Scale(nnx.Module):
      ...     def __init__(self):
      ...         self.w = nnx.Param(jnp.ones(2))
      >>> model = Scale()
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
      >>> grads = nnx.grad(lambda m: m.w.sum())(model)
      >>> _ = optimizer.update(model, grads)
      >>> model.w.value.tolist(), int(optimizer.step)
      ([0.5, 0.5], 1)
    """

    def __init__(self, model: Any, tx: Any, *, wrt: Any = UNSET, **_unknown: Never):
        refuse_unknown("Optimizer", _unknown)
        if isinstance(tx, Policy):
            tx, wrt = tx.optimizer_groups(model, wrt), UNSET
        groups = tuple(tx.items()) if isinstance(tx, Mapping) else None
        _check_transformations(tx, groups)
        if wrt is UNSET:
            wrt = Param if groups is None else Any_(*(f for f, _ in groups))
        wrt = tuple(wrt) if isinstance(wrt, list) else wrt
        _, params = _trainable(model, wrt)
        if groups is not None:
            groups = tuple((to_filter(f), t) for f, t in groups)
        self.step = OptState(jnp.array(0, dtype=jnp.uint32))
        self.tx = static(tx if groups is None else groups)
        self.wrt = static(wrt)
        paths, kinds = params.schema.paths, params.schema.kinds
        self._trained = static(Schema.of(paths, kinds, [EMPTY] * len(paths)))
        self.dtypes = static(tuple(map(dtypes, params.values_list())))
        shared = set(map(id, jax.tree.leaves(params)))
        divided = divide(self.tx, groups, params)
        parts = parts_of(params, [at for _, at in divided])
        self._divided = static(tuple(part.schema.paths for part in parts))
        states = tuple(
            _stored(t.init(part), shared, part)
            for (t, _), part in zip(divided, parts, strict=True)
        )
        self.opt_state = states[0] if groups is None else states
        self._odd = static(frozenset(odd_shapes(params, self.opt_state)))

    def update(self, model: Any, grads: Any = None, /, **kwargs: Any) -> State:
        """One step: changes the model's parameters and this optimizer's state.

        Args:
          model: the model that the optimizer was made for.
          grads: a State or nested dict with exactly the leaves that ``wrt`` takes, of
            the parameters' shapes; or what ``grad`` gives for a container of models.
          **kwargs: handed to ``tx.update``, such as ``value``, ``grad``, ``value_fn``;
            a State among them is given the parameters' treedef. Of several groups,
            those get them that take extra arguments.

        Returns:
          The updates that were added to the parameters, as a State.

        Raises:
          ArgumentError: ``grads`` is neither a State nor a nested dict.
          OptimizerError: gradients are missing, unknown, of the wrong shape or complex
            where the parameter is real, or the model's trainable leaves are others than
            at the start or have another shape, dtype or group; all are listed and
            nothing is changed.
          TraceError: the model or this optimizer belongs to another trace than the
            current one; nothing is changed.
        """
        check_arguments(model, grads)
        targets, params = _chosen(model, self.wrt)
        check_paths(
            "the model's trainable leaves",
            params.schema,
            self._trained,
            ANEW,
        )
        check_dtypes(params, self.dtypes)
        gradients = _gradients(grads, params)
        several = groups_of(self.tx)
        stored = (self.opt_state,) if several is None else self.opt_state
        check_shapes(params, self.opt_state, self._odd)
        updates: list[Any] = [None] * len(targets)
        values: list[Any] = [None] * len(targets)
        steps = []
        divided, parts = self._parts(params)
        grads = parts_of(gradients, [at for _, at in divided])
        for (tx, at), kept, part, mine in zip(
            divided, stored, parts, grads, strict=True
        ):
            takes = several is None or takes_extra(tx)
            extra = {k: _extra(v, part) for k, v in kwargs.items()} if takes else {}
            step = _step(tx, mine, kept, part, extra)
            scatter(updates, at, step.updates)
            scatter(values, at, step.params)
            targets += step.targets
            values += step.values
            steps.append(step)
        check_updates(params.schema, params.values_list(), updates)
        # All in one write, so that an error leaves model and optimizer unchanged.
        store_all([Leaves([*targets, self.step])], [*values, self.step.value + 1])
        if any(step.replaced is not None for step in steps):
            now = tuple(
                kept if step.replaced is None else step.replaced
                for step, kept in zip(steps, stored, strict=True)
            )
            self.opt_state = now[0] if several is None else now
            self._odd = static(frozenset(odd_shapes(params, self.opt_state)))
        return snapshot(params.schema, updates)

    def optax_state(self, model: Any) -> Any:
        """The state in the form in which optax made it, for functions of optax.

        Such functions look at it beside parameters: ``optax.tree_map_params``,
        ``optax.tree.get``, ``optax.contrib.schedule_free_eval_params``.

        Args:
          model: the model that the optimizer was made for.

        Returns:
          What ``tx.init(sortal.state(model, wrt))`` would return, with the values of
          now; of several groups a tuple, each over the parameters of its own.

        Raises:
          OptimizerError: the model has other trainable leaves than at the start.

        Example:
          >>> import jax.numpy as jnp
          >>> import optax
          >>> import sortal as nnx
          >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
          >>> optimizer = nnx.Optimizer(model, optax.adam(0.1))
          >>> int(optax.tree.get(optimizer.optax_state(model), "count"))
          0
        """
        _, params = _chosen(model, self.wrt)
        check_paths("the model's trainable leaves", params.schema, self._trained, ANEW)
        several = groups_of(self.tx)
        stored = (self.opt_state,) if several is None else self.opt_state
        states = tuple(
            _as_optax_made(kept, part.schema)
            for kept, part in zip(stored, self._parts(params)[1], strict=True)
        )
        return states[0] if several is None else states

    def _parts(self, params: State) -> tuple[list[tuple[Any, Any]], list[State]]:
        """Each transformation with its leaves, by position and as a State."""
        several = groups_of(self.tx)
        divided = divide(self.tx, several, params)
        parts = parts_of(params, [at for _, at in divided])
        check_groups(several, parts, self._divided)
        return divided, parts


# ------------------------------------------------------------------ what is trained
def _chosen(model: Any, wrt: Any) -> tuple[list[Any], State]:
    """The live leaves that ``wrt`` takes, and a snapshot of them."""
    _, [(schema, mine)] = bind(model).pick((wrt,))
    return list(mine), snapshot(schema, mine.snapshot())


def _trainable(model: Any, wrt: Any) -> tuple[list[Any], State]:
    leaves, params = _chosen(model, wrt)
    schema = params.schema
    if not leaves:
        every = bind(model).graphdef.schema
        if not len(every):
            raise OptimizerError(
                f"the model, a {type(model).__name__}, has no leaves, so there is "
                "nothing to train. Pass the object that holds the Variables; a class "
                "that defines __init__ has those of its base by super().__init__(...)."
            )
        raise OptimizerError(
            f"wrt={to_filter(wrt)!r} takes none of the {len(every)} leaves of the "
            "model, so there is nothing to train; it has:\n"
            + listing(map(every.describe, range(len(every))))
            + path_hints(every, (to_filter(wrt),))
        )
    bad = [
        f"{schema.describe(i)}: {describe(value)}"
        for i, value in enumerate(params.values_list())
        if not all(
            jnp.issubdtype(dtype(x), jnp.inexact) for x in jax.tree.leaves(value)
        )
    ]
    if bad:
        raise OptimizerError(
            f"wrt={to_filter(wrt)!r} takes leaves that are neither floating nor "
            f"complex and so have no gradient:\n{listing(bad)}\n"
            "Give them another kind than Param, or narrow wrt."
        )
    stuck = [
        schema.describe(i)
        for i, leaf in enumerate(leaves)
        if type(leaf) is Slot and not leaf.writable
    ]
    if stuck:
        raise OptimizerError(
            "raw arrays in tuples and other values cannot be written:\n"
            f"{listing(stuck)}\nHold them in Variables, such as Param(array)."
        )
    return leaves, params


def _check_transformations(tx: Any, groups: Any) -> None:
    if groups == ():
        raise OptimizerError("the dict of groups is empty; write {filter: tx, ...}.")
    named = [("tx", tx)] if groups is None else groups
    bad = [
        f"{name if groups is None else repr(to_filter(name))}: {_shown(t)}"
        for name, t in named
        if not (hasattr(t, "init") and hasattr(t, "update"))
    ]
    if bad:
        raise OptimizerError(
            "an optax transformation, such as optax.adam(1e-3), is expected; found:\n"
            + listing(bad)
        )


def _shown(tx: Any) -> str:
    if isinstance(tx, Pytree):
        return f"a {type(tx).__name__}; the model comes first, Optimizer(model, tx)"
    if inspect.isfunction(tx):
        return f"the function {tx.__name__}; call it, as in {tx.__name__}(1e-3)"
    return describe(tx)


# ---------------------------------------------------------------------- gradients
def _gradients(grads: Any, params: State) -> State:
    schema = params.schema
    given = as_state(_as_mapping(grads, (), schema))
    if given.schema is not schema:
        check_paths(
            "the gradients",
            given.schema,
            schema,
            "Give grad and Optimizer the same wrt, or pass grads.filter(wrt).",
        )
        given = _reordered(given, schema)
    bad = [
        f"{schema.describe(i)} is {describe(p)}, its gradient {describe(g)}"
        for i, (p, g) in enumerate(
            zip(params.values_list(), given.values_list(), strict=True)
        )
        if not is_gradient(p, g)
    ]
    if bad:
        raise OptimizerError(
            "gradients must have the shapes of their parameters, and be real where "
            f"these are; found:\n{listing(bad)}"
        )
    return given


def _as_mapping(grads: Any, path: Path, params: Schema) -> Any:
    """What ``grad`` returns for a container of models, as nested dicts of States."""
    if isinstance(grads, (State, FlatState)) or path in params.index:
        return grads
    if is_object(grads):
        return state_of(grads)
    if isinstance(grads, (list, tuple)) and not any(map(is_array, grads)):
        grads = dict(enumerate(grads))
    if not isinstance(grads, Mapping):
        return grads
    return {k: _as_mapping(x, (*path, k), params) for k, x in grads.items()}


def _reordered(state: State, schema: Schema) -> State:
    """The values of ``state`` at the paths of ``schema``, all of which it has."""
    values, index = state.values_list(), state.schema.index
    return snapshot(schema, [values[index[path]] for path in schema.paths])


def _extra(x: Any, params: State) -> Any:
    """A keyword argument as optax sees it: trees of parameters have their treedef."""
    if is_variable(x):
        return value_of(x)
    if isinstance(x, State) and params.schema.index.keys() <= x.schema.index.keys():
        return _reordered(x, params.schema)
    return x


# ------------------------------------------------------------------- optax's state
class _Step(NamedTuple):
    """What one transformation did: values to write, or a replaced optax state."""

    updates: list[Any]
    params: list[Any]
    targets: list[Variable]
    values: list[Any]
    replaced: Any


def _step(tx: Any, grads: State, kept: Any, params: State, extra: Any) -> _Step:
    import optax

    old, treedef = _flatten(kept)
    plain = _as_optax_made(kept, params.schema)
    updates, state = tx.update(grads, plain, params, **extra)
    changed: Any = optax.apply_updates(params, updates)
    new, after = _flatten(state)
    pairs = _pairs(old, new, params.schema) if after == treedef else None
    replaced = _stored(state, (), params) if pairs is None else None
    targets, values = pairs or ([], [])
    return _Step(
        updates.values_list(), changed.values_list(), targets, values, replaced
    )


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    return jtu.tree_flatten(tree, is_leaf=is_leaf)


def _pairs(
    old: list[Any], new: list[Any], schema: Schema
) -> tuple[list[Variable], list[Any]] | None:
    """The Variables kept and their new values; None where the structure changed."""
    targets: list[Variable] = []
    values: list[Any] = []
    for a, b in zip(old, new, strict=True):
        if isinstance(a, State):
            if not isinstance(b, State) or b.schema is not _seen(a.schema, schema):
                return None
            targets += a.leaves()
            values += b.values_list()
        elif isinstance(a, Variable) and not isinstance(b, State):
            targets.append(a)
            values.append(value_of(b))
        else:
            return None
    return targets, values


def _stored(tree: Any, shared: Any, params: State) -> Any:
    """An optax state of ``params`` with its arrays in Variables.

    Arrays whose ids are in ``shared`` are copied: the model holds them too, and one of
    the two may be donated.
    """
    owners = dict(zip(params.paths(), params.values_list(), strict=True))

    def own_buffer(x: Any) -> Any:
        return jnp.copy(x) if id(x) in shared else x

    def store(path: Any, x: Any) -> Any:
        if isinstance(x, State):
            values = [jax.tree.map(own_buffer, v) for v in x.values_list()]
            schema = _fitting(_kept(x.schema), values, owners)
            given = values, schema.metadata, x.schema.metadata
            return snapshot(schema, list(map(placed_like, *given)))
        named = any(getattr(key, "name", None) == "hyperparams" for key in path)
        return (Hyperparam if named else OptArray)(
            jax.tree.map(own_buffer, value_of(x))
        )

    return jtu.tree_map_with_path(store, tree, is_leaf=is_leaf)


def _kept(schema: Schema) -> Schema:
    """The Schema in which a State from optax is stored: the kinds are OptStates."""
    if None not in schema.kinds:
        return schema.of_kind(OptVariable)
    kinds = [OptArray if kind is None else OptVariable for kind in schema.kinds]
    return Schema.of(schema.paths, kinds, schema.metadata)


def _as_optax_made(kept: Any, params: Schema) -> Any:
    """A stored optax state in the form in which optax made it."""
    parts, treedef = _flatten(kept)
    return treedef.unflatten([_plain(x, params) for x in parts])


def _fitting(schema: Schema, values: Sequence[Any], owners: Any) -> Schema:
    """The Schema with the declared specs of what has not its parameter's shape."""
    metadata = list(schema.metadata)
    for i, old in enumerate(metadata):
        if (own := old.get("optimizer_sharding")) is not None:
            metadata[i] = Metadata.of({**old, "out_sharding": own})
    for i, (path, old) in enumerate(zip(schema.paths, metadata, strict=True)):
        if old.keys() & SPECS and path in owners:
            full, shape = shape_of(owners[path]), shape_of(values[i])
            if full != shape:
                metadata[i] = Metadata.of(with_spec_like(old, full, shape))
    if metadata == list(schema.metadata):
        return schema
    return Schema.of(schema.paths, schema.kinds, metadata)


def _plain(x: Any, params: Schema) -> Any:
    if isinstance(x, State):
        return snapshot(_seen(x.schema, params), x.values_list())
    return value_of(x)


def _seen(kept: Schema, params: Schema) -> Schema:
    """The Schema under which optax sees a stored State: kinds of the parameters."""
    if kept is params.of_kind(OptVariable):
        return params
    return kept.memo(("seen", params), lambda: _seen_by_path(kept, params))


def _seen_by_path(kept: Schema, params: Schema) -> Schema:
    kinds: list[Kind] = []
    metadata: list[Metadata] = []
    for path, kind, old in zip(kept.paths, kept.kinds, kept.metadata, strict=True):
        at = params.index.get(path)
        if kind is OptArray:
            kinds.append(None)
            metadata.append(EMPTY)
        else:
            kinds.append(Param if at is None else params.kinds[at])
            metadata.append(old if at is None else params.metadata[at])
    return Schema.of(kept.paths, kinds, metadata)
