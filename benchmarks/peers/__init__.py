"""The contenders: each builds the same model and offers the same operations.

``<name>_peer`` is the module of a contender, with a function each for

- ``build(shape)``: the roots, which are the model and its optimizer;
- ``operations(shape, wanted)``: calls for the rows that are wanted and that it can do;
- ``training(shape)``: calls of a whole training step, which return the loss;
- ``lowering(shape)``: calls that trace and lower that step, written as a new function.

Each gives calls by the contender's name in the tables. Some contenders can be called in
more than one way, and each way is one call.
"""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = (
    "sortal", "sortal_on_flax", "flax", "equinox", "spectrax", "brainstate", "raw",
    "nested",
)  # fmt: skip
"""``sortal_on_flax`` is Sortal's verbs on the models of ``flax``. ``raw`` is plain JAX
on a flat list of arrays, which is the floor, and ``nested`` on lists of dicts, as
programs hold them."""


def load(names: tuple[str, ...] = NAMES) -> tuple[dict[str, ModuleType], list[str]]:
    """Imports the contenders that are installed.

    Args:
      names: which of them.

    Returns:
      The modules by name, and a note for each one that is missing.
    """
    found, notes = {}, []
    for name in names:
        try:
            found[name] = importlib.import_module(f"benchmarks.peers.{name}_peer")
        # A library that this version of JAX is too new for lacks attributes of JAX.
        except (ImportError, AttributeError) as e:
            notes.append(f"{name} left out: {e}")
    return found, notes
