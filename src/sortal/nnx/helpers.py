"""Containers and the TrainState, by NNX's module name."""

from __future__ import annotations

from typing import Any

from sortal.nn.sequential import Sequential as Sequential
from sortal.nnx.containers import Dict as Dict
from sortal.nnx.containers import List as List
from sortal.training import train_state


class TrainState(train_state.TrainState):
    """``sortal.TrainState``, which is also written ``TrainState[M]``.

    Args:
      graphdef: the model's GraphDef.
      params: its parameters.
      opt_state: the state of ``tx``.
      step: how many steps were taken.
      tx: an optax transformation; static.

    Example:
      >>> import optax
      >>> from sortal import nnx
      >>> class State(nnx.TrainState[nnx.Linear]):
      ...     batch_stats: nnx.State
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> graphdef, params, rest = nnx.split(model, nnx.Param, ...)
      >>> tx = optax.sgd(0.1)
      >>> state = State.create(graphdef, params=params, tx=tx, batch_stats=rest)
      >>> int(state.step)
      0
    """

    def __class_getitem__(cls, model: Any) -> Any:
        return cls
