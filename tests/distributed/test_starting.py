"""initialize finds out which process this is, or that it is the only one."""

from __future__ import annotations

import jax
import pytest

from sortal import distributed
from sortal.errors import DistributedError

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


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "WORLD_SIZE"])
def test_one_of_several_is_not_taken_for_the_only_one(monkeypatch, name):
    monkeypatch.setenv(name, "4")
    told = f"{name}=4 says that several processes were started.*mpi4py"
    with pytest.raises(DistributedError, match=told):
        distributed.initialize()
    monkeypatch.setenv(name, "1")
    distributed.initialize()


def test_a_variable_that_is_no_number_is_named(monkeypatch):
    monkeypatch.setenv("SORTAL_NUM_PROCESSES", "two")
    with pytest.raises(DistributedError, match="PROCESSES is 'two', which is no"):
        distributed.initialize()


def test_open_mpi_says_how_many_and_which(clusters):
    told = clusters("ompi", "-c", PROGRAM)
    found = [done.out[-1:] for done in told]
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
