"""initialize finds out which process this is, or that it is the only one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from sortal import distributed
from sortal.errors import DistributedError

SOURCE = Path(__file__).parents[2] / "src"
PROGRAM = """
from sortal import distributed
distributed.initialize()
import jax
jax.config.update("jax_num_cpu_devices", 3)  # nothing has asked for devices yet
distributed.barrier("all are here", 60)
print(jax.process_index(), jax.process_count(), jax.device_count())
"""


def test_alone_it_does_nothing():
    distributed.initialize()
    assert jax.process_count() == 1
    distributed.barrier("nobody else", 0)


def test_half_of_what_is_needed_is_refused():
    with pytest.raises(
        DistributedError,
        match=r"num_processes=4 and process_id=None are not enough.*sortal launch",
    ):
        distributed.initialize(num_processes=4)


def test_slurm_says_how_many_and_which():
    # Its port is 61440 + the number of the job modulo 4096.
    for job in range(1, 4096):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", 61440 + job))
            except OSError:
                continue
            break
    slurm = {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
    }
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_"))}
    children = []
    for rank in range(2):
        mine = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        environment = {
            **clean, **slurm, **mine, "PYTHONPATH": str(SOURCE),
            "JAX_PLATFORMS": "cpu",
        }  # fmt: skip
        children.append(
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        told = [child.communicate(timeout=120) for child in children]
    finally:
        for child in children:
            child.kill()
    found = [out.splitlines()[-1:] for out, _ in told]
    assert found == [["0 2 6"], ["1 2 6"]], told


def test_a_program_may_shut_jax_down_itself(launch):
    """The thread that looks for failures must not be inside of JAX then."""
    text = """
from sortal import distributed
distributed.initialize()
import jax
distributed.barrier("here")
jax.distributed.shutdown()
print("over")
"""
    done = launch(text).end()
    assert done.code == 0, done.err[-3000:]
    assert sorted(done.out) == ["[0] over", "[1] over"]
