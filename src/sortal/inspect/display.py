"""Objects shown in a notebook."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any


def display(*args: Any) -> None:
    """Shows objects: by treescope in a notebook that has it, else as text.

    Args:
      *args: models, States, Variables or anything else.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> nnx.display(nnx.Param(jnp.ones(2)))
      Param(float32[2]: [1. 1.])
    """
    shown = print
    if _in_notebook() and importlib.util.find_spec("treescope"):
        import treescope  # type: ignore[import-not-found]

        shown = treescope.display
    for x in args:
        shown(x)


def _in_notebook() -> bool:
    ipython = sys.modules.get("IPython")
    return ipython is not None and ipython.get_ipython() is not None
