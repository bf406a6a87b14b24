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
    "checkpoint": "sortal.checkpoint",
    "decoding": "sortal.decoding",
    "display": "sortal.inspect.display",
    "explain": "sortal.inspect.text",
    "load_state": "sortal.checkpoint.restoring",
    "nnx": "sortal.nnx",
    "restore": "sortal.checkpoint.restoring",
    "save": "sortal.checkpoint.saving",
    "tabulate": "sortal.inspect.text",
}
"""The file of each name; one that ends in the name is itself what is meant."""


def load(
    namespace: MutableMapping[str, Any], name: str, table: Mapping[str, str] = TABLE
) -> Any:
    """What a name of the package stands for, imported now and kept.

    Args:
      namespace: the package's own.
      name: the name asked for.
      table: the file of each name.

    Returns:
      The object or module.

    Raises:
      AttributeError: the package has no such name.
    """
    package = namespace["__name__"]
    if name not in table:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    found: Any = importlib.import_module(table[name])
    if not table[name].endswith(f".{name}"):
        found = getattr(found, name)
    namespace[name] = found
    return found
