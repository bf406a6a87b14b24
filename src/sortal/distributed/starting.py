"""initialize: this process becomes one of several that run one program."""

from __future__ import annotations

import os
from typing import Any

import jax

from sortal._engine.jax_compat import coordinator, in_a_cluster
from sortal.distributed import failures
from sortal.errors import DistributedError

COUNT, INDEX = "SORTAL_NUM_PROCESSES", "SORTAL_PROCESS_ID"
"""Environment variables that ``sortal launch`` sets, beside those that JAX reads."""


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: int = 300,
    heartbeat_timeout: int = 20,
    shutdown_timeout: int = 300,
    **options: Any,
) -> None:
    """Makes this process one of several that run one program.

    It calls ``jax.distributed.initialize``, which finds out the rest under SLURM,
    Kubernetes, MPI, Cloud TPU and GCE; so do the variables that ``sortal launch``
    sets. Where nothing is given and nothing is found, the process is the only one and
    the call does nothing. It comes before anything else asks JAX for devices.

    From then on no process waits in vain for another. One that an exception ends tells
    the others, which end within 15 seconds with a message that says which process
    failed, where and why; a save that runs beside the program is finished first, for at
    most 10 of them. One that is killed, stopped or cut off is noticed when
    ``heartbeat_timeout`` seconds are over. A process that comes to its end without an
    error waits for the others.

    Args:
      coordinator_address: host and port of process 0, which carries the messages.
      num_processes: how many processes there are.
      process_id: which of them this is, from 0 on.
      initialization_timeout: how many seconds to wait for all to begin.
      heartbeat_timeout: after how many seconds without a sign of life a process is
        taken for dead, and the others end.
      shutdown_timeout: for how many seconds a process that is at its end waits for
        the others.
      **options: other arguments of ``jax.distributed.initialize``.

    Raises:
      DistributedError: it was called before; or only some of ``coordinator_address``,
        ``num_processes`` and ``process_id`` are known, and nothing says the rest; or a
        launcher that JAX does not know has started several processes.

    Example:
      >>> from sortal import distributed
      >>> distributed.initialize()  # the only process
    """
    if coordinator() is not None:
        raise DistributedError(
            "this process is already one of several: initialize() is called once, and "
            "instead of jax.distributed.initialize()."
        )
    if COUNT in os.environ and num_processes is None:
        num_processes = _number(COUNT)
    if INDEX in os.environ and process_id is None:
        process_id = _number(INDEX)
    address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = (address, num_processes, process_id)
    if None in given and "cluster_detection_method" not in options:
        if given == (None, None, None) and not options and not in_a_cluster():
            _refuse_others()
            return
        if not in_a_cluster():
            raise DistributedError(
                f"coordinator_address={given[0]!r}, num_processes={given[1]!r} and "
                f"process_id={given[2]!r} are not enough, and no cluster was found "
                "that says the rest. Give all three, or start the program with "
                "sortal launch."
            )
    jax.distributed.initialize(
        *given,
        initialization_timeout=initialization_timeout,
        heartbeat_timeout_seconds=heartbeat_timeout,
        shutdown_timeout_seconds=shutdown_timeout,
        **options,
    )
    failures.watch(coordinator(), shutdown_timeout)


def _number(name: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise DistributedError(f"the variable {name} is {text!r}, which is no number.")
    return int(text)


_COUNTS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE")
"""Where Open MPI, MPICH and its kin, and torchrun say how many processes there are."""


def _refuse_others() -> None:
    """Refuses to take one of several processes for the only one."""
    for name in _COUNTS:
        if os.environ.get(name, "1") != "1":
            raise DistributedError(
                f"{name}={os.environ[name]} says that several processes were started, "
                "and JAX cannot find out from their launcher which this is. Give "
                "coordinator_address=, num_processes= and process_id=; or, under MPI "
                'with mpi4py installed, cluster_detection_method="mpi4py". Unset the '
                "variable if this process is the only one."
            )
