"""Training that is stopped and resumed ends with the same bits.

``python -m benchmarks.faults --only resumed`` kills real processes, twenty times.
"""

from __future__ import annotations

import builtins
import gc
import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "resume.py"


def test_digits_stopped_in_the_middle_end_as_if_they_had_run_through(
    tmp_path, monkeypatch
):
    printed: list[str] = []
    stop_at = ""

    def note(text, **how):
        printed.append(text)
        if text == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "print", note)

    def run(name):
        words = [str(tmp_path / name), "--epochs", "1", "--every", "3"]
        monkeypatch.setattr(sys, "argv", ["resume.py", *words])
        try:
            runpy.run_path(str(EXAMPLE), run_name="__main__")
        except KeyboardInterrupt:
            gc.collect()
        return printed[-1]

    undisturbed = run("a")
    assert len(undisturbed) == 64
    stop_at = "step 11"
    assert run("b") == stop_at
    stop_at = ""
    printed.clear()
    assert run("b") == undisturbed
    assert printed[0] == "resumed at step 9"
