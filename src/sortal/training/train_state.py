"""TrainState: a split model, its optax state and a step count, as one pytree."""

from __future__ import annotations

import dataclasses
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_leaves_with_path

from sortal._engine.graphdef import GraphDef
from sortal._engine.state import State
from sortal._engine.variable import describe
from sortal.errors import ArgumentError, listing
from sortal.functional import merge, split


@dataclass_transform(frozen_default=True)
class TrainState:
    """Everything that a training step changes, as a value; a step returns a new one.

    A subclass is a dataclass of more fields, each a pytree. For live objects that are
    changed in place there is ``Optimizer``.

    Args:
      graphdef: the model's GraphDef.
      params: its parameters.
      opt_state: the state of ``tx``.
      step: how many steps were taken.
      tx: an optax transformation; static.

    Example:
      >>> import jax
      >>> import optax
      >>> import sortal as nnx
      >>> graphdef, params = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> state = nnx.TrainState.create(graphdef, params=params, tx=optax.sgd(0.1))
      >>> state = state.apply_gradients(jax.tree.map(jax.numpy.ones_like, params))
      >>> int(state.step)
      1
    """

    graphdef: GraphDef
    params: State
    opt_state: Any
    step: Any
    tx: Any

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        _register(cls)

    @classmethod
    def create(
        cls, graphdef: GraphDef, *, params: State, tx: Any, step: int = 0, **kwargs: Any
    ) -> Any:
        """A TrainState at the start of training.

        Args:
          graphdef: the model's GraphDef.
          params: its parameters.
          tx: an optax transformation.
          step: the number of the first step.
          **kwargs: the fields that a subclass has besides.

        Returns:
          The TrainState.

        Raises:
          ArgumentError: ``tx`` is no transformation.
        """
        if not (hasattr(tx, "init") and hasattr(tx, "update")):
            raise ArgumentError(
                "tx is an optax transformation, such as optax.adam(1e-3); found "
                f"{describe(tx)}."
            )
        make: Any = cls
        return make(
            graphdef=graphdef,
            params=params,
            opt_state=tx.init(params),
            step=jnp.asarray(step),
            tx=tx,
            **kwargs,
        )

    def apply(self, state: Any, *states: Any) -> Any:
        """The model as a pure function: what a call changes is returned.

        Args:
          state: a State, or the name of a field that is one.
          *states: more of them; together they hold each leaf once.

        Returns:
          A function that calls the model and returns ``(output, (graphdef, state))``.
          Its attributes are the model's methods, which return the same.

        Raises:
          ArgumentError: a field is no State.
        """
        found = [self._state(x) for x in (state, *states)]
        return _Caller(merge(self.graphdef, *found))

    def _state(self, x: Any) -> Any:
        found = getattr(self, x, x) if isinstance(x, str) else x
        if not isinstance(found, State):
            raise ArgumentError(
                f"apply takes States, or names of fields that are States; {x!r} is a "
                f"{type(found).__name__}."
            )
        return found

    def apply_gradients(self, grads: State, **kwargs: Any) -> Any:
        """The TrainState after one step.

        Args:
          grads: the gradients of ``params``.
          **kwargs: new values of other fields.

        Returns:
          The new TrainState.

        Raises:
          ArgumentError: the gradients are not of the leaves of ``params``, or of other
            shapes.
        """
        import optax

        _refuse_shapes(self.params, grads)
        try:
            updates, opt_state = self.tx.update(grads, self.opt_state, self.params)
            params: Any = optax.apply_updates(self.params, updates)  # type: ignore[arg-type]
        except (TypeError, ValueError) as e:
            _refuse_others(self.params, grads, e)
            raise
        return self.replace(
            params=params,
            opt_state=opt_state,
            step=self.step + 1,
            **kwargs,
        )

    def replace(self, **fields: Any) -> Any:
        """A TrainState with other values in some fields.

        Args:
          **fields: the fields and their new values.

        Returns:
          The new TrainState.
        """
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]


def _refuse_others(params: Any, grads: Any, cause: Exception) -> None:
    """Says which gradients are missing or unknown, where optax has refused some."""
    due, found = (
        {keystr(path): None for path, _ in tree_leaves_with_path(tree)}
        for tree in (params, grads)
    )
    rows = [f"missing: {x}" for x in due if x not in found]
    rows += [f"unknown: {x}" for x in found if x not in due]
    if rows:
        raise ArgumentError(
            "apply_gradients takes the gradients of params, built as these; found a "
            f"{type(grads).__name__}:\n{listing(rows)}"
        ) from cause


def _refuse_shapes(params: Any, grads: Any) -> None:
    """Refuses gradients that would broadcast, and give parameters another shape."""
    rows = [
        f"{keystr(path)} is {describe(p)}, its gradient {describe(g)}"
        for (path, p), g in zip(
            tree_leaves_with_path(params), jax.tree.leaves(grads), strict=False
        )
        if jnp.shape(p) != jnp.shape(g)
    ]
    if rows and jax.tree.structure(params) == jax.tree.structure(grads):
        raise ArgumentError(
            "gradients must have the shapes of their parameters; found:\n"
            + listing(rows)
        )


class _Caller:
    def __init__(self, model: Any, method: str = "__call__"):
        self._model, self._method = model, method

    def __getattr__(self, name: str) -> _Caller:
        return _Caller(self._model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[GraphDef, State]]:
        out = getattr(self._model, self._method)(*args, **kwargs)
        return out, split(self._model)


def _register(cls: Any) -> None:
    made = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(made)
    static = [
        f.name
        for f in fields
        if f.name == "tx" or f.metadata.get("pytree_node") is False
    ]
    data = [f.name for f in fields if f.name not in static]
    jax.tree_util.register_dataclass(made, data_fields=data, meta_fields=static)


_register(TrainState)
