"""The models of the contenders whose modules are changed in place; the code is one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from benchmarks import workload as w


def define(
    module: type, param: type, statistic: type, sequence: Callable[[list[Any]], Any]
) -> SimpleNamespace:
    """The classes of the models in one library.

    Args:
      module: its class of modules.
      param: its class of Variables that are trained; ``[...]`` reads and writes one.
      statistic: its class of running statistics, the same way.
      sequence: holds a list of modules.

    Returns:
      The classes by name: ``Model`` for ``Blocks``, ``Pair`` and ``Cells`` for the
      shapes of these names, and their parts.
    """

    class Linear(module):
        """A linear layer."""

        def __init__(self, index: int, width: int):
            super().__init__()
            self.kernel = param(w.kernel(index, width))
            self.bias = param(w.full(width, 0.0))
            _set_statics(self)

        def __call__(self, x: Any) -> Any:
            return w.linear(x, self.kernel[...], self.bias[...])

    class Norm(module):
        """A normalization with running statistics."""

        def __init__(self, width: int):
            super().__init__()
            self.scale = param(w.full(width, 1.0))
            self.bias = param(w.full(width, 0.0))
            self.mean = statistic(w.full(width, 0.0))
            self.var = statistic(w.full(width, 1.0))
            _set_statics(self)

        def __call__(self, x: Any) -> Any:
            y, self.mean[...], self.var[...] = w.normalize(
                x, self.scale[...], self.bias[...], self.mean[...], self.var[...]
            )
            return y

    class Block(module):
        """A linear layer and a normalization."""

        def __init__(self, index: int, width: int):
            super().__init__()
            self.linear, self.norm = Linear(index, width), Norm(width)
            self.index, self.width = index, width

        def __call__(self, x: Any) -> Any:
            return w.residual(x, self.norm(self.linear(x)))

    class Trunk(module):
        """The stack of blocks."""

        def __init__(self, depth: int, width: int):
            super().__init__()
            self.layers = sequence([Block(i, width) for i in range(depth)])
            self.depth, self.width = depth, width

        def __call__(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

    class Model(module):
        """The model."""

        def __init__(self, depth: int, width: int):
            super().__init__()
            self.trunk = Trunk(depth, width)
            self.depth, self.width = depth, width

        def __call__(self, x: Any) -> Any:
            return self.trunk(x)

    class Pair(module):
        """Two linear layers."""

        def __init__(self, width: int):
            super().__init__()
            self.first, self.second = Linear(0, width), Linear(1, width)

        def __call__(self, x: Any) -> Any:
            return self.second(w.between(self.first(x)))

    class Cell(module):
        """One Param and one statistic."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = param(w.full(2, 0.0))
            self.mean = statistic(w.full(2, 0.0))
            _set_statics(self)

    class Cells(module):
        """A list of cells."""

        def __init__(self, leaves: int):
            super().__init__()
            self.layers = sequence([Cell() for _ in range(leaves // 2)])

    classes = (Linear, Norm, Block, Trunk, Model, Pair, Cell, Cells)
    return SimpleNamespace(**{each.__name__: each for each in classes})


def make(models: Any, shape: w.Shape) -> Any:
    """The model of a shape; ``models`` has ``Model``, ``Pair`` and ``Cells``."""
    match shape:
        case w.Blocks(depth, width):
            return models.Model(depth, width)
        case w.Pair(width):
            return models.Pair(width)
        case w.Cells(leaves):
            return models.Cells(leaves)


def _set_statics(module: Any) -> None:
    for name, value in w.STATICS.items():
        setattr(module, name, value)
