"""The moving average with NNX's keywords."""

from __future__ import annotations

from typing import Any

from sortal.training import ema


class EMA(ema.EMA):
    """``sortal.EMA``, which also takes ``graph``.

    Args:
      model: a Module, a container of Modules and Variables, or a State.
      decay: the share of the old average that is kept, from 0 to 1.
      only: which leaves to track: Variables of floating or complex dtype; all of them
        if absent.
      graph: ignored; for NNX compatibility.

    Example:
      >>> from sortal import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.EMA(model, decay=0.75, only=nnx.Param).params.paths()
      (('bias',), ('kernel',))
    """

    def __init__(
        self, model: Any, decay: Any, *, only: Any = ..., graph: bool | None = None
    ):
        super().__init__(model, decay, only=only)
