"""Points that all processes of a program must reach together."""

from __future__ import annotations

import itertools
import math
import numbers
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import jax

from sortal._engine.jax_compat import coordinator, outside_traces
from sortal.errors import ArgumentError, DistributedError, TraceError

TIMEOUT = 600.0
"""Seconds that processes wait for one another, unless something else is said."""

_times: defaultdict[str, Iterator[int]] = defaultdict(itertools.count)


def barrier(name: str, timeout: float = TIMEOUT) -> None:
    """Waits until all processes of the program are here.

    Args:
      name: names the place, in every process the same; it may be passed many times.
      timeout: how many seconds to wait.

    Raises:
      ArgumentError: ``timeout`` is no number of seconds.
      DistributedError: some processes did not come in time; they are named.
      TraceError: it is called inside a transform.

    Example:
      >>> from sortal import distributed
      >>> distributed.barrier("data is there")  # alone, nobody is waited for
    """
    if not outside_traces():
        raise TraceError(
            "barrier inside a transform would wait once, when it is traced, and not "
            "when the compiled function is called. Call it outside."
        )
    exchange(f"barrier/{name}/{next(_times[name])}", "", f"barrier {name!r}", timeout)


def exchange(
    key: str,
    mine: str,
    matter: str,
    timeout: float = TIMEOUT,
    client: Any = None,
    who: tuple[int, int] | None = None,
) -> list[str]:
    """Gives a text to all processes, and returns those of all, in their order.

    Args:
      key: another one for each exchange, and the same in all processes.
      mine: the text of this process.
      matter: names the exchange in messages.
      timeout: how many seconds to wait for the others.
      client: carries the messages; that of the program if absent.
      who: the number of this process, and of all; those of the devices if absent.

    Returns:
      The text of each process.

    Raises:
      ArgumentError: ``timeout`` is no number of seconds.
      DistributedError: some processes did not come in time, or this one comes after
        the others have given up; or there is nothing that carries messages.
    """
    if not isinstance(timeout, numbers.Real) or not 0 <= timeout < math.inf:
        raise ArgumentError(f"timeout= is seconds, from 0 on; found {timeout!r}.")
    index, count = who or (jax.process_index(), jax.process_count())
    if count == 1:
        return [mine]
    client = client or messenger(count)
    try:
        client.key_value_set(f"sortal/{key}/{index}", mine)
        client.wait_at_barrier(f"sortal/{key}", round(timeout * 1000))
    except Exception as e:
        raise DistributedError(_absent(client, key, matter, timeout, count, e)) from e
    found = _present(client, key)
    return [found[i] for i in range(count)]


def messenger(count: int) -> Any:
    """The client that carries messages between processes.

    Raises:
      DistributedError: there is none.
    """
    client = coordinator()
    if client is None:
        raise DistributedError(
            f"{count} processes run this program and cannot talk to one another: call "
            "sortal.distributed.initialize() or jax.distributed.initialize() in each "
            "of them first."
        )
    return client


def _present(client: Any, key: str) -> dict[int, str]:
    """The texts that processes have given, by their number."""
    pairs = client.key_value_dir_get(f"sortal/{key}/")
    return {int(name.rpartition("/")[2]): text for name, text in pairs}


def _absent(
    client: Any, key: str, matter: str, timeout: float, count: int, error: Exception
) -> str:
    try:
        found = _present(client, key)
    except Exception:  # noqa: BLE001 - whoever keeps the messages is gone
        return (
            f"{matter}: process 0, which carries the messages of the others, does not "
            f"answer: {error}"
        )
    absent = [i for i in range(count) if i not in found]
    if not absent:
        return (
            f"{matter}: this process came when the others had given up waiting for "
            f"it, or one of them ended meanwhile: {error}"
        )
    return (
        f"{matter}: {processes(absent)} of {count} did not come within {timeout:g} s. "
        "All processes must call this together; one that did not may be dead, "
        "stopped, slow, or in another part of the program."
    )


def processes(indices: list[int]) -> str:
    """Processes in words, such as ``processes 1, 2``."""
    listed = ", ".join(map(str, indices[:20]))
    more = f" and {len(indices) - 20} more" if len(indices) > 20 else ""
    return f"process{'es' if len(indices) > 1 else ''} {listed}{more}"
