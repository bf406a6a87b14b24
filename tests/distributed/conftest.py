"""Programs that run in several processes, started by ``sortal launch``."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[2] / "src"
# What is compiled runs a few times only.
QUICK = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


class Done(NamedTuple):
    code: int
    out: list[str]
    err: str


class Launched:
    """A running ``sortal launch``, in a session of its own."""

    def __init__(self, *arguments, wide=False):
        path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, **QUICK, "PYTHONPATH": path}
        environment["JAX_ENABLE_X64"] = str(int(wide))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sortal.inspect.cli", "launch", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def until(self, text):
        """Reads lines until one has ``text``; returns it."""
        for line in self.process.stdout:
            if text in line:
                return line
        raise AssertionError(f"no {text!r}: {self.process.stderr.read()[-3000:]}")

    def end(self, timeout=120):
        out, err = self.process.communicate(timeout=timeout)
        return Done(self.process.returncode, out.splitlines(), err)


@pytest.fixture
def launch(tmp_path):
    """Starts the text of a program under ``sortal launch``; see Launched."""
    started = []

    def start(text, *arguments, n=2, devices=None, wide=False):
        program = tmp_path / f"program{len(started)}.py"
        program.write_text(text)
        extra = [] if devices is None else ["--devices", str(devices)]
        words = "-n", str(n), *extra, str(program), *arguments
        started.append(Launched(*words, wide=wide))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.process.send_signal(signal.SIGTERM)
            try:
                one.process.wait(30)
            except subprocess.TimeoutExpired:
                one.process.kill()
        one.process.stdout.close()
        one.process.stderr.close()


def slurm(rank, job):
    return {
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
    }


def ompi(rank, job):
    return {
        "OMPI_MCA_orte_hnp_uri": f"{job * 4096}.0;tcp://127.0.0.1:9",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(rank),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
    }


def free_job():
    """The number of a job whose port, of which JAX makes 61440 + it, nobody uses."""
    for job in range(1, 4096):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", 61440 + job))
            return job
    raise AssertionError("no port")


@pytest.fixture
def clusters():
    """Runs Python in two processes with the variables of a scheduler; what each did."""
    children = []

    def run(scheduler, *arguments, **more):
        job, named = free_job(), {"slurm": slurm, "ompi": ompi}[scheduler]
        clean = {
            k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "JAX_"))
        }
        for rank in range(2):
            environment = {
                **clean, **QUICK, "PYTHONPATH": str(SOURCE), **named(rank, job), **more,
            }  # fmt: skip
            children.append(
                subprocess.Popen(
                    [sys.executable, *arguments],
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        told = [child.communicate(timeout=240) for child in children]
        return [
            Done(child.returncode, out.splitlines(), err)
            for child, (out, err) in zip(children, told, strict=True)
        ]

    yield run
    for child in children:
        child.kill()
        child.wait()
