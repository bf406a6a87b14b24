"""Optimizers with NNX's keywords."""

from __future__ import annotations

from typing import Any

from sortal._engine.state import State
from sortal._engine.variable import OptArray as OptArray
from sortal._engine.variable import OptState as OptState
from sortal._engine.variable import OptVariable as OptVariable
from sortal.functional import state
from sortal.policy.rule import UNSET
from sortal.training import optimizer


class Optimizer(optimizer.Optimizer):
    """``sortal.Optimizer``, which also takes ``graph`` and is written ``Optimizer[M]``.

    Args:
      model: a Module, or a container of Modules and Variables.
      tx: an optax transformation, a dict of filter to transformation, or a Policy.
      wrt: which leaves to train; ``Param`` if absent.
      graph: ignored; for NNX compatibility.

    Example:
      >>> import optax
      >>> from sortal import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> optimizer = nnx.Optimizer(model, optax.sgd(0.5), wrt=nnx.Param)
      >>> int(optimizer.step)
      0
    """

    def __class_getitem__(cls, model: Any) -> Any:
        return cls

    def __init__(
        self, model: Any, tx: Any, *, wrt: Any = UNSET, graph: bool | None = None
    ):
        super().__init__(model, tx, wrt=wrt)

    def update(self, model: Any, grads: Any = None, /, **kwargs: Any) -> State:
        """One step; see ``sortal.Optimizer.update``.

        Args:
          model: the model that the optimizer was made for.
          grads: a State or nested dict with the leaves that ``wrt`` takes; others that
            the model has are left out.
          **kwargs: passed to ``tx.update``.

        Returns:
          The updates that were added to the parameters, as a State.
        """
        if isinstance(grads, State):
            trained = self._trained.index
            if any(path not in trained for path in grads.paths()):
                others = state(model).schema.index.keys() - trained.keys()
                grads = grads.filter(lambda path, _: path not in others)
        return super().update(model, grads, **kwargs)


class ModelAndOptimizer(Optimizer):
    """An Optimizer that holds the model it trains.

    Args:
      model: a Module.
      tx: an optax transformation, a dict of filter to transformation, or a Policy.
      wrt: which leaves to train; as for ``Optimizer``.
      graph: ignored; for NNX compatibility.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from sortal import nnx
      >>> class Scale(nnx.Module):
      ...     def __init__(self):
      ...         self.w = nnx.Param(jnp.ones(2))
      >>> state = nnx.ModelAndOptimizer(Scale(), optax.sgd(0.5))
      >>> _ = state.update(nnx.grad(lambda m: m.w.sum())(state.model))
      >>> state.model.w.value.tolist()
      [0.5, 0.5]
    """

    def __init__(
        self, model: Any, tx: Any, *, wrt: Any = UNSET, graph: bool | None = None
    ):
        super().__init__(model, tx, wrt=wrt)
        self.model = model

    def update(self, grads: Any, /, **kwargs: Any) -> State:  # type: ignore[override]
        """One step; see ``Optimizer.update``.

        Args:
          grads: a State or nested dict with exactly the leaves that ``wrt`` takes.
          **kwargs: passed to ``tx.update``.

        Returns:
          The updates that were added to the parameters, as a State.
        """
        return super().update(self.model, grads, **kwargs)
