"""The contenders: each builds the same model and offers the same operations."""

from __future__ import annotations

import importlib
from types import ModuleType

NAMES = ("sortal", "flax", "sortal_on_flax", "equinox", "raw")
"""``<name>_peer`` is the module; ``sortal_on_flax`` is Sortal's verbs on the models of
``flax``, ``raw`` is plain JAX on a flat list of arrays."""


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
        except ImportError as e:
            notes.append(f"{name} left out: {e}")
    return found, notes
