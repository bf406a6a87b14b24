"""Names whose files are read when first asked for, so that `import sortal` is light."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, MutableMapping
from typing import Any

TABLE = {
    "Checkpoints": "sortal.checkpoint.manager",
    "Restored": "sortal.checkpoint.restoring",
    "Saving": "sortal.checkpoint.pending",
    "TrainState": "sortal.training.train_state",
    "display": "sortal.inspect.display",
    "explain": "sortal.inspect.text",
    "load_state": "sortal.checkpoint.restoring",
    "restore": "sortal.checkpoint.restoring",
    "save": "sortal.checkpoint.saving",
    "tabulate": "sortal.inspect.text",
}
"""The file of each name."""
MODULES = {
    "checkpoint": "sortal.checkpoint",
    "decoding": "sortal.decoding",
    "nnx": "sortal.nnx",
}
"""Modules by the names that they have in the package."""


def load(
    namespace: MutableMapping[str, Any],
    name: str,
    table: Mapping[str, str] = TABLE,
    modules: Mapping[str, str] = MODULES,
) -> Any:
    """What a name of the package stands for, imported now and kept.

    Args:
      namespace: the package's own.
      name: the name asked for.
      table: the file of each name.
      modules: the modules that are names.

    Returns:
      The object or module.

    Raises:
      AttributeError: the package has no such name.
    """
    package = namespace["__name__"]
    if name in modules:
        found = importlib.import_module(modules[name])
    elif name in table:
        found = getattr(importlib.import_module(table[name]), name)
    else:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    namespace[name] = found
    return found
