"""Programs of other people give the same bits with `sortal.nnx` as `flax.nnx`."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.nnx.other_programs import PROGRAMS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Mapping[str, Any]]:
    folder = tmp_path_factory.mktemp("results")
    paths = [ROOT / "src", ROOT, ROOT / "tests", os.environ.get("PYTHONPATH", "")]
    there = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    there["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # compiles in half the time
    found = {}
    for library in ("flax", "sortal"):
        file = str(folder / f"{library}.npz")
        run = [sys.executable, "-m", "tests.nnx.other_programs", library, file]
        subprocess.run(run, check=True, env=there, cwd=ROOT)
        found[library] = dict(np.load(file))
    return found


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_gives_the_bits_that_it_gives_with_flax(
    program: str, results: dict[str, Mapping[str, Any]]
) -> None:
    theirs, ours = (
        {k: x for k, x in results[library].items() if k.startswith(f"{program}:")}
        for library in ("flax", "sortal")
    )
    if not theirs:
        pytest.skip(f"the package of {program} is not installed")
    assert f"{program}:failed" not in theirs
    assert ours.keys() == theirs.keys()
    for key, x in theirs.items():
        y = ours[key]
        assert (y.shape, y.dtype, y.tobytes()) == (x.shape, x.dtype, x.tobytes()), key
