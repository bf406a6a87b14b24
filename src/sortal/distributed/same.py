"""assert_same: whether what should be equal in all processes is."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sortal._engine.jax_compat import outside_traces
from sortal._engine.plan import bind
from sortal._engine.schema import select
from sortal.distributed.meeting import TIMEOUT, exchange, processes
from sortal.errors import DistributedError, TraceError

_calls = itertools.count()


def assert_same(model: Any, /, *, only: Any = ..., timeout: float = TIMEOUT) -> None:
    """Refuses a model that is not the same in all processes.

    What several processes hold is compared bit by bit, by a checksum: replicated
    arrays, shards that lie on devices of several processes, arrays of a process's own
    and NumPy's. A shard that one process alone holds has nothing to be compared with.
    All processes call it together.

    Args:
      model: a Module, or a container of Modules, Variables and arrays.
      only: a filter; leaves that it does not take are not compared. All if absent.
      timeout: how many seconds to wait for the other processes.

    Raises:
      ArgumentError: ``timeout`` is no number of seconds.
      DistributedError: a leaf differs; the first path and the processes that have
        something else than most are named. Or some processes did not call this in
        time.
      FilterError: ``only`` is no filter.
      TraceError: it is called inside a transform.

    Example:
      >>> import sortal as nnx
      >>> from sortal import distributed
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> distributed.assert_same(model, only=nnx.Param)
    """
    if not outside_traces():
        raise TraceError(
            "assert_same inside a transform would compare tracers, not values. Call it "
            "outside."
        )
    plan = bind(model)
    schema, values = plan.graphdef.schema, plan.values()
    chosen = select(schema, (only,), plan.view).parts[0][1]
    meeting = _Meeting(next(_calls), timeout)
    names = [schema.describe(i) for i in chosen]
    forms = [f"{n}: {_form(values[i])}" for n, i in zip(names, chosen, strict=True)]
    meeting.compare("form", EVERYONE, forms, list(map(_hash, forms)))
    sums: dict[str, list[tuple[str, str]]] = {}
    for name, i in zip(names, chosen, strict=True):
        for who, digest in _sums(values[i]).items():
            sums.setdefault(who, []).append((name, digest))
    for who in meeting.held_by({who: _hash(pairs) for who, pairs in sums.items()}):
        pairs = sums.get(who, [])
        meeting.compare(who, who, [n for n, _ in pairs], [d for _, d in pairs])


EVERYONE = "all"
"""Stands for the numbers of all processes, where several hold one value."""


class _Meeting:
    """The exchanges of one ``assert_same``; every process makes the same ones."""

    def __init__(self, number: int, timeout: float):
        self._name, self._timeout = f"same/{number}", timeout

    def _exchange(self, round: str, mine: Any) -> list[Any]:
        key, text = f"{self._name}/{round}", json.dumps(mine)
        return list(map(json.loads, exchange(key, text, "assert_same", self._timeout)))

    def held_by(self, digests: dict[str, str]) -> list[str]:
        """Who should hold the same and do not; the groups, in one order everywhere."""
        found = self._exchange("sums", digests)
        groups = sorted({who for each in found for who in each})
        return [g for g in groups if len({x[g] for x in found if g in x}) > 1]

    def compare(self, round: str, who: str, names: list[str], sums: list[str]) -> None:
        """Refuses lists of checksums that differ between the processes of a group."""
        count = jax.process_count()
        members = range(count) if who == EVERYONE else list(map(int, who.split(",")))
        brief = self._exchange(f"{round}/brief", _hash(sums))
        if len({brief[i] for i in members}) == 1:
            return
        found = self._exchange(f"{round}/each", sums)
        at = next(
            k
            for k in range(max(map(len, found)))
            if len({tuple(found[i][k : k + 1]) for i in members}) > 1
        )
        shown = self._exchange(f"{round}/name", names[at] if at < len(names) else "")
        each = {i: tuple(found[i][at : at + 1]) for i in members}
        # The first process of those with what most have; process 0 where none is most.
        counted = Counter(each.values())
        most = max(counted, key=lambda x: (counted[x], x == each[members[0]]))
        odd = [i for i in members if each[i] != most]
        usual = next(shown[i] for i in members if each[i] == most)
        raise DistributedError(
            f"the processes hold different models. First difference: {usual}, in "
            f"{processes(odd)} of {count}{_told(shown, odd, usual)}.\nGive all of them "
            "one seed, one data order and the same calls, or restore a checkpoint."
        )


def _told(shown: list[str], odd: list[int], usual: str) -> str:
    other = shown[odd[0]]
    if other == usual:
        return ""
    return f", which ha{'ve' if len(odd) > 1 else 's'} {other or 'no such leaf'}"


# ------------------------------------------------------------------------- checksums
def _hash(data: Any) -> str:
    found = data if isinstance(data, bytes) else repr(data).encode()
    return hashlib.sha256(found).hexdigest()[:32]


def _form(value: Any) -> str:
    """What is known of a leaf without its numbers."""
    rows = []
    for x in jax.tree.leaves(value):
        spec = getattr(getattr(x, "sharding", None), "spec", "")
        dtype, shape = getattr(x, "dtype", type(x).__name__), np.shape(x)
        rows.append(f"{dtype}[{','.join(map(str, shape))}] {spec}".rstrip())
    return "; ".join(rows)


def _sums(value: Any) -> dict[str, str]:
    """Checksums of a leaf's parts, by the processes that hold each part."""
    found: dict[str, list[str]] = {}
    for x in jax.tree.leaves(value):
        if not isinstance(x, jax.Array):
            found.setdefault(EVERYONE, []).append(_hash(_bits(x)))
            continue
        typed = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        whole = jax.random.key_data(x) if typed else x
        holders = _holders(whole)
        parts: dict[str, set[str]] = {}
        for shard in whole.addressable_shards:
            parts.setdefault(str(shard.index), set()).add(_hash(_bits(shard.data)))
        for index, digests in sorted(parts.items()):
            who = holders[index]
            if who is not None:
                found.setdefault(who, []).append(f"{index} {sorted(digests)}")
    return {who: _hash(rows) for who, rows in found.items()}


def _holders(x: jax.Array) -> dict[str, str | None]:
    """For each part of an array, which processes hold it; None for one alone."""
    count = jax.process_count()
    if x.is_fully_addressable:
        return dict.fromkeys((str(s.index) for s in x.addressable_shards), EVERYONE)
    held: dict[str, set[int]] = {}
    for device, index in x.sharding.devices_indices_map(x.shape).items():
        held.setdefault(str(index), set()).add(device.process_index)
    return {
        index: None
        if len(who) == 1
        else EVERYONE
        if len(who) == count
        else ",".join(map(str, sorted(who)))
        for index, who in held.items()
    }


def _bits(x: Any) -> bytes:
    if isinstance(x, (jax.Array, np.ndarray, np.generic)):
        return np.asarray(x).tobytes()
    return repr(x).encode()
