"""The check of "A checkpoint by kind"."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import sortal
from sortal.errors import NoCheckpointError
from sortal.learn.answer import Answer, Wrong, expect, values
from sortal.learn.problems.p06_split_merge import network

MORE = {r"(?s)RestoreError.*missing: .*BatchStat": "more is asked for than was saved"}


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless Params, and no more, go to the disk and come back."""
    nnx = answer.nnx
    seed = int(rng.integers(1000))
    model, other = (network(nnx, np.random.default_rng(seed)) for _ in range(2))
    params = values(model, nnx.Param)
    for held in (other.layers[0].kernel, other.layers[1].scale, other.layers[1].mean):
        held[...] = rng.normal(size=held.shape).astype(np.float32)
    mine = values(other)
    case = f"a model of {', '.join(mine)}"
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        directory = str(Path(folder, "checkpoint"))
        answer.run(case, answer.get("save_params"), model, directory)
        _saved(answer, directory, set(params), case)
        load = answer.get("load_params")
        answer.run(case, load, other, directory, pitfalls=MORE)
    mistakes = [("nothing was restored", mine)]
    expect(
        values(other), {**mine, **params}, case, mistakes, "The model has other arrays."
    )


def _saved(answer: Answer, directory: str, params: set[str], case: str) -> None:
    try:
        state = sortal.load_state(directory)
    except (NoCheckpointError, OSError) as e:
        pitfall = "nothing was saved" if answer.called() else ""
        raise Wrong("There is no checkpoint.", case=case, pitfall=pitfall) from e
    saved = {".".join(map(str, path)) for path in state.paths()}
    if saved != params:
        raise Wrong(
            "The checkpoint holds other leaves.",
            case=case,
            expected=", ".join(sorted(params)),
            found=", ".join(sorted(saved)),
            pitfall="everything was saved" if saved > params else "",
        )
