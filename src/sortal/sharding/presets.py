"""Policies for the usual ways to divide a model over devices; each is a short table.

A preset says where the model and its optimizer lie. The batch is the caller's:
``jax.device_put(batch, NamedSharding(mesh, P("data")))``. The words are those of
Rajbhandari et al., "ZeRO" (2020), Zhao et al., "PyTorch FSDP" (2023), and Shoeybi et
al., "Megatron-LM" (2019).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from jax.sharding import PartitionSpec

from sortal._engine.variable import BatchStat, OptState, Param
from sortal.errors import ShardingError
from sortal.filters import At
from sortal.policy.policy import Policy
from sortal.policy.rule import Rule
from sortal.sharding.mesh_axes import axes_of
from sortal.sharding.resolution import WHOLE

_SMALL = 2**11
"""Arrays of fewer elements are replicated: dividing them costs more than it saves."""


@dataclass(frozen=True)
class LargestAxis:
    """A spec that divides the largest dimension that a mesh axis divides evenly.

    For ``Rule(spec=...)``: a function of an array's shape and a mesh. An array of
    fewer than ``min_size`` elements, or with no such dimension, keeps ``given``.

    Args:
      axis: the mesh axis.
      min_size: the least number of elements of an array that is divided.
      given: entries that are there already, such as for tensor parallelism.

    Raises:
      ShardingError: at a call: the mesh has no such axis.

    Example:
      >>> import jax
      >>> from sortal.sharding.presets import LargestAxis
      >>> mesh = jax.sharding.AbstractMesh((4,), ("data",))
      >>> list(LargestAxis("data", min_size=0)((6, 8), mesh))
      [None, 'data']
    """

    axis: str
    min_size: int = _SMALL
    given: PartitionSpec = WHOLE

    def __call__(self, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
        sizes = dict(mesh.shape)
        if self.axis not in sizes:
            raise ShardingError(
                f"{self!r} divides by an axis that the mesh does not have; it has "
                f"{', '.join(map(repr, sizes))}."
            )
        entries = [*self.given, *[None] * (len(shape) - len(self.given))]
        taken = {dimension for dimension, _ in axes_of(self.given)}
        free = [d for d in range(len(shape)) if d not in taken]
        fits = [d for d in free if shape[d] and shape[d] % sizes[self.axis] == 0]
        if not fits or math.prod(shape) < self.min_size:
            return self.given
        largest = max(fits, key=lambda d: (shape[d], -d))
        entries[largest] = self.axis
        return PartitionSpec(*entries)


def data_parallel() -> Policy:
    """Everything on every device; only the batch is divided.

    Returns:
      The Policy: one row, ``...: P()``.

    Example:
      >>> from sortal.sharding import presets
      >>> presets.data_parallel()
      Policy({...: Rule(spec=P())})
    """
    return Policy({...: Rule(spec=WHOLE)})


def zero1(axis: str = "data", *, min_size: int = _SMALL) -> Policy:
    """Optimizer state divided over the devices, parameters on every device.

    Args:
      axis: the mesh axis.
      min_size: the least number of elements of an array that is divided.

    Returns:
      The Policy: a row for ``OptState``, and ``...: P()``.

    Example:
      >>> from sortal.sharding import presets
      >>> len(presets.zero1("data").rows)
      2
    """
    moments = LargestAxis(axis, min_size)
    return Policy({OptState: Rule(spec=moments), ...: Rule(spec=WHOLE)})


def fsdp(axis: str = "data", *, min_size: int = _SMALL) -> Policy:
    """Parameters, and with them optimizer state, divided over the devices.

    Args:
      axis: the mesh axis.
      min_size: the least number of elements of an array that is divided.

    Returns:
      The Policy: one row, for ``Param``; optimizer state follows its parameters.

    Example:
      >>> from sortal.sharding import presets
      >>> len(presets.fsdp("data").rows)
      1
    """
    return Policy({Param: Rule(spec=LargestAxis(axis, min_size))})


_COLUMNS = ("query", "key", "value", "gate", "up")
_ROWS = ("out", "down")
_VOCABULARY = ("embedding", "table")


def tensor_parallel(axis: str = "model") -> Policy:
    """Attention by heads and feed-forward networks by hidden units, as Megatron does.

    For layers of the names that ``MultiHeadAttention``, ``DecoderAttention`` and the
    Llama of the demonstration use: ``query``, ``key``, ``value``, ``gate`` and ``up``
    are divided by their outputs, ``out`` and ``down`` by their inputs, ``embedding``
    and ``table`` by the vocabulary. Where the mesh axis does not divide them,
    ``shard`` refuses.

    Args:
      axis: the mesh axis.

    Returns:
      The Policy; what no row takes is replicated.

    Example:
      >>> from sortal.sharding import presets
      >>> len(presets.tensor_parallel("model").rows)
      14
    """
    return _tensor_parallel(axis, lambda spec: spec)


def fsdp_tensor_parallel(
    data: str = "data", model: str = "model", *, min_size: int = _SMALL
) -> Policy:
    """``tensor_parallel`` over one axis, and ``fsdp`` over the other of what is left.

    Args:
      data: the mesh axis by which the batch is divided, and parameters once more.
      model: the mesh axis of tensor parallelism.
      min_size: the least number of elements of an array that ``data`` divides.

    Returns:
      The Policy; optimizer state follows its parameters.

    Example:
      >>> from sortal.sharding import presets
      >>> len(presets.fsdp_tensor_parallel().rows)
      17
    """
    # By its vocabulary alone: divided by its features, each lookup would exchange all.
    each = Rule(spec=PartitionSpec((model, data)))
    table = {At(f"**.{n}") & Param: each for n in _VOCABULARY}
    both = _tensor_parallel(model, lambda spec: LargestAxis(data, min_size, spec))
    return table | both | fsdp(data, min_size=min_size)


def _tensor_parallel(axis: str, spec: Any) -> Policy:
    columns, rows = PartitionSpec(None, axis), PartitionSpec(axis)
    table = {At(f"**.{n}.kernel") & Param: Rule(spec=spec(columns)) for n in _COLUMNS}
    table |= {At(f"**.{n}.bias") & Param: Rule(spec=spec(rows)) for n in _COLUMNS}
    table |= {At(f"**.{n}.kernel") & Param: Rule(spec=spec(rows)) for n in _ROWS}
    table |= {At(f"**.{n}") & Param: Rule(spec=spec(rows)) for n in _VOCABULARY}
    return Policy(table)


def per_device_statistics(axis: str = "data") -> Policy:
    """Parameters shared by all devices, statistics of each device's own batch.

    For ``shard_map``, whose ``in_specs`` takes the Policy: ``BatchStat`` has a leading
    axis with one entry for each device.

    Args:
      axis: the mesh axis.

    Returns:
      The Policy: a row for ``BatchStat``, and ``...: P()``.

    Example:
      >>> from sortal.sharding import presets
      >>> len(presets.per_device_statistics().rows)
      2
    """
    statistics = Rule(spec=PartitionSpec(axis))
    return Policy({BatchStat: statistics, ...: Rule(spec=WHOLE)})
