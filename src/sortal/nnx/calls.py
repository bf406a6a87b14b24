"""Pure calls: a method of a split model that returns the model as it is afterwards."""

from __future__ import annotations

from typing import Any

from sortal._engine.graphdef import GraphDef
from sortal.functional import merge, split


class ApplyCaller:
    """A method of a model, found when called; see ``call``."""

    __slots__ = ("_model", "_steps")

    def __init__(self, model: tuple[Any, ...], steps: tuple[Any, ...] = ()):
        self._model, self._steps = model, steps

    def __getattr__(self, name: str) -> ApplyCaller:
        if name.startswith("__"):  # asked for by copy and the like
            raise AttributeError(name)
        return ApplyCaller(self._model, (*self._steps, (True, name)))

    def __getitem__(self, key: Any) -> ApplyCaller:
        return ApplyCaller(self._model, (*self._steps, (False, key)))

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...]]:
        model = found = merge(*self._model)
        for is_attribute, key in self._steps:
            found = getattr(found, key) if is_attribute else found[key]
        out = found(*args, **kwargs)
        return out, split(model)


def call(graphdef_state: tuple[GraphDef, Any], /) -> ApplyCaller:
    """Calls a model that is given as GraphDef and State.

    Args:
      graphdef_state: what ``split`` returned.

    Returns:
      A function that calls the model and returns its output and the new
      ``(graphdef, state)``. Its attributes and items are the model's.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> pair = nnx.split({"a": nnx.Linear(2, 3, rngs=nnx.Rngs(0))})
      >>> y, (graphdef, state) = nnx.call(pair)["a"](jnp.ones(2))
      >>> y.shape
      (3,)
    """
    return ApplyCaller(tuple(graphdef_state))


def apply(  # noqa: D417
    self: GraphDef, state: Any, *states: Any, graph: bool | None = None
) -> ApplyCaller:
    """Calls the model of this GraphDef; ``nnx.GraphDef.apply``.

    Args:
      state: a State or nested dict of leaves.
      *states: more of them.
      graph: ignored; for NNX compatibility.

    Returns:
      What ``call`` returns.
    """
    return ApplyCaller((self, state, *states))
