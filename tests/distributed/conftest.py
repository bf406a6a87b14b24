"""Programs that run in several processes, started by ``sortal launch``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

SOURCE = Path(__file__).parents[2] / "src"


class Done(NamedTuple):
    code: int
    out: list[str]
    err: str


class Launched:
    """A running ``sortal launch``, in a session of its own."""

    def __init__(self, *arguments):
        path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles in less time
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

    def start(text, *arguments, n=2, devices=None):
        program = tmp_path / f"program{len(started)}.py"
        program.write_text(text)
        extra = [] if devices is None else ["--devices", str(devices)]
        started.append(Launched("-n", str(n), *extra, str(program), *arguments))
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
