"""What a save takes of a model at once: what it refuses, and what it holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.checkpoint.layout import lay_out
from sortal.checkpoint.store import SMALL, as_bytes, on_host
from sortal.checkpoint.taking import take
from sortal.errors import SaveError


def test_what_is_pinned_does_not_change_with_the_model():
    small, big = np.ones(3), np.ones(SMALL // 2)
    for pin in (True, False):
        found = lay_out(
            take({"s": nnx.Cache(small), "b": nnx.Cache(big)}, None, None, pin=pin)
        )
        (_, held), (piece,) = found.packs["Cache/packed"][0], found.own["Cache/b"]
        assert np.shares_memory(held, small) is not pin
        assert np.shares_memory(piece.data, big) is not pin


@pytest.mark.parametrize("shape", [(), (2, 3), (0, 2)])
def test_what_is_pinned_outlives_its_buffer_in_every_dtype(shape):
    names = "bool int8 uint32 float16 float32 complex64 bfloat16 float8_e4m3fn int4"
    root = {n: nnx.Cache(jnp.ones(shape, n)) for n in names.split()}
    due = {n: np.asarray(x.value).copy() for n, x in root.items()}
    data = take(root, None, None, pin=True).data
    for variable in root.values():
        variable.value.delete()
    for (name, host), held in zip(sorted(due.items()), data, strict=True):
        assert np.array_equal(on_host(held), on_host(host)), name
        assert as_bytes(held).tobytes() == host.tobytes(), name


def test_keys_that_are_alike_as_text_are_refused():
    """Else the step would be saved, and no manifest of it could be read."""
    root = {(1, 2): nnx.Param(jnp.ones(1)), "<tuple> (1, 2)": nnx.Param(jnp.ones(1))}
    with pytest.raises(SaveError, match=r"one path once their keys are text; found:\n"):
        take(root, None, None, pin=False)
    root["<tuple> (1, 3)"] = root.pop("<tuple> (1, 2)")
    assert len(take(root, None, None, pin=False).values) == 2


def test_a_policy_that_drops_all_is_refused():
    policy = nnx.Policy({...: nnx.Rule(checkpoint="drop")})
    with pytest.raises(SaveError, match=r"the policy takes none of the 1 leaves:\n  w"):
        take({"w": nnx.Param(jnp.ones(1))}, None, policy, pin=False)


def test_all_that_cannot_be_saved_is_listed_and_nothing_is_written(tmp_path):
    root = {
        "a": nnx.Param(lambda: 0),
        "b": nnx.Param(jax.ShapeDtypeStruct((2,), jnp.float32)),
        "c": nnx.Param({(1, 2): jnp.ones(1)}),
        "d": np.array(["text"]),
        "e": nnx.Param(jnp.ones(2)),
    }
    jax.jit(lambda x: x + 1, donate_argnums=0)(root["e"].value)
    with pytest.raises(SaveError) as caught:
        nnx.save(tmp_path / "new", root, step=0)
    text = str(caught.value)
    assert "a (Param): a function, <function" in text
    assert "b (Param): a shape without values" in text
    assert "c (Param): a dict with the key (1, 2)" in text
    assert "d (unlabelled array): an array of dtype <U4" in text
    assert "e (Param): its buffer was donated to a call and is gone" in text
    assert not (tmp_path / "new").exists()


def test_numbers_beside_models_are_refused_because_they_would_not_be_saved(tmp_path):
    root = {"model": nnx.Linear(1, 1, rngs=nnx.Rngs(0)), "data": {"position": 17}}
    with pytest.raises(SaveError, match=r"data\.position: 17\nPut them into"):
        nnx.save(tmp_path, root, step=0)


def test_a_filter_that_takes_nothing_is_refused(tmp_path):
    with pytest.raises(
        SaveError, match=r"only=Cache takes none of the 2 leaves:\n  bias"
    ):
        nnx.save(tmp_path, nnx.Linear(1, 1, rngs=nnx.Rngs(0)), step=0, only=nnx.Cache)


def test_a_key_whose_text_holds_its_address_is_refused(tmp_path):
    class Key:
        pass

    with pytest.raises(SaveError, match="keys whose repr holds an address in memory"):
        nnx.save(tmp_path, {Key(): jnp.ones(1)}, step=0)
    nnx.save(tmp_path, {(1, 2): jnp.ones(1), None: jnp.ones(1)}, step=0)
