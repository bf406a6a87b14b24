"""Judging in a process of its own, with limits of time, memory and output."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sortal.learn.judging import Verdict, judge
from sortal.learn.lesson import Lesson, lessons

SECONDS = 120.0
MEMORY = 2 * 2**30
"""Bytes that an answer may take beside what Python and JAX take."""
OUTPUT = 16 * 2**20
"""Bytes that an answer may write into one file, or print."""
DEVICES = 8
_PROGRAM = "from sortal.learn.process import child; child()"


class Judged(NamedTuple):
    """A verdict, and what the answer printed."""

    verdict: Verdict
    printed: str


def judge_apart(
    lesson: Lesson, file: Path, *, seconds: float = SECONDS, memory: int = MEMORY
) -> Judged:
    """Judges a file in a new Python process.

    The verdict comes back in a file, under a number that is drawn anew and is not told
    to the answer, so that nothing it prints counts as a verdict.

    Args:
      lesson: the problem.
      file: the answer.
      seconds: how long it may take.
      memory: how many bytes it may take beside Python and JAX; limited on Linux only.

    Returns:
      The verdict, and what was printed.

    Raises:
      OSError: the file cannot be read, or no process started.
      UnicodeDecodeError: it is no text.
    """
    source = file.read_text(encoding="utf-8-sig")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        place, printed = Path(folder, "verdict"), Path(folder, "printed")
        nonce = secrets.token_hex(16)
        job = {
            "number": lesson.number, "source": source, "filename": str(file),
            "memory": memory, "place": str(place), "nonce": nonce,
        }  # fmt: skip
        with printed.open("wb") as output:
            ended = _run(json.dumps(job), output, seconds)
        verdict = _read(place, nonce) or Verdict(
            right=False, message=_why(ended, seconds)
        )
        return Judged(verdict, printed.read_text(encoding="utf-8", errors="replace"))


def _run(job: str, output: Any, seconds: float) -> int | None:
    """Runs the child to its end; its exit code, None if it had to be stopped."""
    process = subprocess.Popen(  # noqa: S603 - our own words
        [sys.executable, "-P", "-c", _PROGRAM],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        env=_environment(),
        text=True,
        start_new_session=True,
    )
    try:
        process.communicate(job, timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        _end(process)
    return process.returncode


def _end(process: subprocess.Popen[str]) -> None:
    """Ends the child and the processes that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


def _environment() -> dict[str, str]:
    """That of this process; on eight devices of the CPU, and as quiet as JAX can be."""
    flag = f"--xla_force_host_platform_device_count={DEVICES}"
    return {
        **os.environ,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip(),
        "JAX_PLATFORMS": "cpu",
        "PYTHONUNBUFFERED": "1",
    }


def _read(place: Path, nonce: str) -> Verdict | None:
    """The verdict that the judge left, if it did."""
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        if found.pop("nonce") == nonce:
            return Verdict(**found)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _why(ended: int | None, seconds: float) -> str:
    """Why there is no verdict."""
    if ended is None:
        return (
            f"The code was stopped after {seconds:g} seconds. Is there a loop without "
            "an end?"
        )
    if ended < 0:
        name = signal.Signals(-ended).name
        return (
            f"The process was ended by {name} before the answer was judged. Taking "
            "more memory than it may can do that."
        )
    return f"The process ended, with exit code {ended}, before the answer was judged."


# ----------------------------------------------------------------------- in the child


def child() -> None:
    """Judges the answer that is described on the standard input."""
    job = json.load(sys.stdin)
    sys.stdin = open(os.devnull)  # noqa: PTH123, SIM115 - for as long as the process
    lesson = lessons()[job["number"] - 1]
    sys.path.append(str(Path(job["filename"]).resolve().parent))
    _limit(job["memory"])
    try:
        verdict = judge(lesson, job["source"], filename=job["filename"])
        if "MemoryError" in verdict.error or "RESOURCE_EXHAUSTED" in verdict.error:
            raise MemoryError  # noqa: TRY301 - the same sentence for both
    except MemoryError:
        verdict = Verdict(
            right=False,
            message="The code asked for more memory than it may take "
            f"({job['memory'] / 2**30:.2g} GiB).",
        )
    text = json.dumps({**asdict(verdict), "nonce": job["nonce"]})
    Path(job["place"]).write_text(text, encoding="utf-8")
    sys.stdout.flush()
    os._exit(0)  # threads that the answer left would keep the process


def _limit(memory: int) -> None:
    """Bounds memory on Linux, and what is written wherever that can be bounded."""
    try:
        import resource
    except ImportError:  # not on Windows
        return
    import jax.numpy as jnp

    jnp.zeros(1).block_until_ready()  # JAX has its threads and devices now
    resource.setrlimit(resource.RLIMIT_FSIZE, (OUTPUT, OUTPUT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    status = Path("/proc/self/status")
    if status.exists():
        found = [s for s in status.read_text().splitlines() if s.startswith("VmData")]
        most = int(found[0].split()[1]) * 1024 + memory
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
