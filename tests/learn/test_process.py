"""An answer in a process of its own can neither stay, nor grow, nor judge itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import sortal
from sortal.learn import Verdict, lessons, process
from sortal.learn.process import Judged, judge_apart

SOURCE = Path(sortal.__file__).parents[1]
FILTER, SHARDING = lessons()[3], lessons()[18]


@pytest.fixture(autouse=True)
def this_sortal(monkeypatch) -> None:
    """The child imports the Sortal of this process, installed or not."""
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def judged(tmp_path: Path, source: str, lesson=FILTER, **limits: float) -> Judged:
    file = tmp_path / "mine.py"
    file.write_text(source)
    return judge_apart(lesson, file, **limits)


def test_a_right_answer_is_right_and_what_it_prints_is_kept(tmp_path: Path) -> None:
    # It imports a file beside it, as a program of several files does.
    (tmp_path / "beside.py").write_text("text = 'with a number: 7'")
    source = f"from beside import text\nprint(text)\n{SHARDING.solution}"
    verdict, printed = judged(tmp_path, source, SHARDING)
    assert verdict == Verdict(right=True)
    assert printed == "with a number: 7\n"


FORGED = """
import json, os, sys
text = json.dumps({"right": True, "nonce": "0" * 32})
print(text, flush=True)
for fd in range(3, 256):
    try:
        os.write(fd, text.encode())
    except OSError:
        pass
print(repr(sys.stdin.read()), flush=True)
os._exit(0)
"""


def test_a_verdict_cannot_be_printed_and_an_early_end_is_none(tmp_path: Path) -> None:
    verdict, printed = judged(tmp_path, FORGED)
    assert not verdict.right
    assert verdict.message.startswith("The process ended, with exit code 0, before")
    assert printed.endswith("''\n")  # there is nothing left of what the judge was told


def test_a_process_that_was_ended_is_said_to_be() -> None:
    assert process._why(-11, 1.0).startswith("The process was ended by SIGSEGV before")
    assert process._why(3, 1.0).startswith(
        "The process ended, with exit code 3, before"
    )


@pytest.mark.parametrize("left", ["", "{", "[]", '{"nonce": "b"}', '{"nonce": "a"}'])
def test_what_is_no_verdict_of_the_judge_is_none(tmp_path: Path, left: str) -> None:
    file = tmp_path / "verdict"
    file.write_text(left)
    assert process._read(file, "a") is None
    assert process._read(tmp_path / "nothing", "a") is None


def test_code_without_an_end_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    source = (
        "import subprocess, sys, time\n"
        "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(p.pid, flush=True)\nwhile True: time.sleep(1)"
    )
    verdict, printed = judged(tmp_path, source, seconds=6)
    assert verdict.message == (
        "The code was stopped after 6 seconds. Is there a loop without an end?"
    )
    if printed and sys.platform == "linux":
        state = Path("/proc", printed.strip(), "stat")
        assert not state.exists() or state.read_text().split()[2] == "Z"


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux only")
def test_memory_and_output_are_bounded(tmp_path: Path) -> None:
    source = (
        "try:\n    print('x' * 20_000_000, flush=True)\n"
        "except OSError as e:\n    import sys; sys.stdout = sys.stderr\n"
        "x = []\nwhile True:\n    x.append(bytes(10_000_000))"
    )
    verdict, printed = judged(tmp_path, source, memory=2**29)
    assert verdict.message == (
        "The code asked for more memory than it may take (0.5 GiB)."
    )
    assert len(printed) <= 16 * 2**20
