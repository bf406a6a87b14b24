"""Our programs with another library in the place of Sortal."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

OURS, THEIRS = "import sortal as nnx\n", "from flax import nnx\n"
LIBRARIES = ("sortal", "flax")


def load(file: str | Path, library: str, name: str) -> types.ModuleType:
    """A program as a module, the one import line that names the library swapped."""
    source = Path(file).read_text()
    assert source.count(OURS) == 1
    if library == "flax":
        source = source.replace(OURS, THEIRS)
        # Flax takes a list of modules in a List of its own only.
        source = re.sub(r"self.blocks = (.*)", r"self.blocks = nnx.List(\1)", source)
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(source, str(file), "exec"), vars(module))  # noqa: S102 - our own file
    return module
