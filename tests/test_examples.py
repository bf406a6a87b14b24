"""The programs under examples/ do what they say, also with Flax NNX in their place."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import types
from pathlib import Path

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sortal
from sortal.demo import digits
from swapped import LIBRARIES, OURS, THEIRS, load

EXAMPLES = Path(__file__).parents[1] / "examples"
COUNT = EXAMPLES / "state_filter_count.py"


# ---------------------------------------------------------------- state_filter_count


@pytest.fixture(scope="module")
def counters():
    return [
        load(COUNT, library, f"count_{library}").state_filter_count
        for library in LIBRARIES
    ]


@hypothesis.settings(max_examples=15)
@given(
    seed=st.integers(0, 2**31 - 1),
    size=st.integers(1, 9),
    hidden=st.integers(1, 9),
)
def test_four_leaves_two_params_one_statistic_for_any_seed_and_shape(
    counters, seed, size, hidden
):
    for count in counters:
        found = count(float(seed), jnp.linspace(-1, 1, size), float(hidden))
        assert isinstance(found, jax.Array)
        assert jnp.issubdtype(found.dtype, jnp.floating)
        assert found.tolist() == [4.0, 2.0, 1.0]


@pytest.mark.parametrize("library", LIBRARIES)
def test_the_counts_follow_the_classes_and_are_not_assumed(library):
    name = f"changed_{library}"
    module = load(COUNT, library, name)
    nnx = module.nnx

    def count(base):
        module.BatchStat = type("BatchStat", (base,), {})
        return module.state_filter_count(0.0, jnp.ones(3), 2.0).tolist()

    assert count(nnx.Variable) == [4, 2, 1]
    assert count(nnx.Param) == [4, 3, 1]
    module.BatchStat = nnx.Param
    assert module.state_filter_count(0.0, jnp.ones(3), 2.0).tolist() == [4, 3, 3]
    module.BatchStat = nnx.Variable
    assert module.state_filter_count(0.0, jnp.ones(3), 2.0).tolist() == [4, 2, 4]


def test_the_same_weights_as_in_flax_come_of_the_same_seed():
    models = [
        load(COUNT, library, f"weights_{library}").Affine for library in LIBRARIES
    ]
    ours, theirs = (
        model(5, 4, rngs=module.Rngs(3))
        for model, module in zip(models, (sortal, load_nnx()), strict=True)
    )
    assert np.array_equal(ours.kernel[...], theirs.kernel[...])
    assert np.array_equal(ours(jnp.ones(5)), theirs(jnp.ones(5)))


def load_nnx():
    from flax import nnx

    return nnx


def test_what_the_lesson_says_of_explain_is_so():
    module = load(COUNT, "sortal", "lesson")
    model = module.Affine(3, 2, rngs=sortal.Rngs(0))
    found = sortal.explain(model, sortal.Param, sortal.BatchStat)
    notes = " ".join(found.notes)
    assert "lesson.BatchStat (running_mean)" in notes
    assert "sortal.BatchStat (none here)" in notes
    assert ("running_mean",) in [leaf.path for leaf in found.left_over]
    module.BatchStat = type("BatchStat", (sortal.Param,), {})
    trained = sortal.explain(module.Affine(3, 2, rngs=sortal.Rngs(0)))
    assert any("wrt=Param trains it: running_mean" in note for note in trained.notes)


# See filterwarnings in pyproject.toml.
HALF_WRITTEN = "Error reading persistent compilation cache entry"


def run(*command: str, text: str | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", f"ignore:{HALF_WRITTEN}", *command],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("library", LIBRARIES)
def test_pasted_into_a_fresh_interpreter_it_prints_4_2_and_1(library):
    source = COUNT.read_text()
    text = source if library == "sortal" else source.replace(OURS, THEIRS)
    printed = run("-", text=text)
    assert re.findall(r"^\d+", printed, re.MULTILINE) == ["4", "2", "1"]


# ---------------------------------------------------------------------------- digits


def test_the_whole_program_runs_as_a_script_and_prints_its_tables():
    printed = run(digits.__file__, "--epochs", "1")
    assert "\x1b" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    for part in (
        "1348 digits to learn from, 449 held out",
        "Before training",
        "After training",
        "__main__.BatchStat",
        "forward pass 1, you 1",
        "2 different kinds are called BatchStat",
        "held-out accuracy",
        "What you can try next",
    ):
        assert part in printed


# ------------------------------------------------------------------------- ensemble


def test_three_ways_to_train_eight_replicas_give_the_same_numbers():
    """In double precision: under vmap, shard_map on eight devices, and in a loop."""
    printed = run(str(EXAMPLES / "ensemble.py"), "--steps", "3")
    gaps = re.findall(r"largest difference (\S+)", printed)
    assert len(gaps) == 4
    assert all(float(gap) < 1e-12 for gap in gaps)
    assert "sortal.BatchStat" in printed  # the Policy's table
    assert "P('replica')" in printed
    first, last = re.search(r"vmap +(\S+) -> (\S+)", printed).groups()
    assert float(last) < float(first)


# ---------------------------------------------------------------------- scan_layers


def test_a_scanned_stack_has_the_loss_and_gradients_of_the_unrolled_one():
    example = runpy.run_path(str(EXAMPLES / "scan_layers.py"))
    found = example["main"](["--layers", "2", "--width", "8", "--length", "8"])
    unrolled, scanned, remat = found.values()
    for other in (scanned, remat):
        assert other.loss == pytest.approx(unrolled.loss, rel=1e-6)
        assert example["largest_gap"](unrolled, other) < 1e-5


# ----------------------------------------------------------------------------- lora


def test_lora_learns_its_factors_only_and_saves_them_only():
    from sortal.demo.llama import Config, Llama

    example = types.SimpleNamespace(**runpy.run_path(str(EXAMPLES / "lora.py")))
    config = Config(
        vocabulary=16, features=16, hidden=16, layers=1, heads=2, key_value_heads=1
    )
    model = Llama(config, rngs=sortal.Rngs(0), param_dtype=jnp.bfloat16)
    text = np.tile(np.arange(16, dtype=np.int32), 20)
    words = "--steps 30 --batch 4 --length 12 --rank 4 --rate 0.02 --quiet"
    options = example.parse([*words.split(), "--targets", "blocks.*.attention.*"])
    found = example.run(model, text, options)
    assert found.losses[-1] < 0.8 * found.losses[0]
    assert found.held_out[1] < 0.8 * found.held_out[0]
    assert found.base_unchanged
    assert found.restored_same
    assert 0 < found.merged_gap < 0.2
    factors = sortal.state(model, sortal.LoRAParam)
    assert len(factors.paths()) == 4 * 2
    numbers = sum(x.size for x in jax.tree.leaves(factors))
    # Two moments of Adam for each number trained, and the count of steps.
    assert 2 * numbers <= found.optimizer_elements <= 2 * numbers + 2
    whole = 4 * sum(x.size for x in jax.tree.leaves(sortal.state(model)))
    assert found.adapter_bytes < whole
    with pytest.raises(sortal.errors.FilterError, match="no Linear has a path"):
        example.places(model, "nowhere.*")
