"""What a save takes of a model at once: what it refuses, and what it holds."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

import sortal as nnx
from sortal.checkpoint.layout import lay_out
from sortal.checkpoint.store import SMALL, as_bytes
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


def bytes_of(found):
    """The bytes of each leaf of a layout, by path."""
    at = {}
    for leaf in found.leaves:
        place, size = leaf.value.place, leaf.value.nbytes
        parts = found.packs[place.array] if place else []
        spans = ((start, as_bytes(x)) for start, x in parts)
        inside = [x[place.offset - o :] for o, x in spans if o <= place.offset]
        at[leaf.path[0]] = inside[-1][:size].tobytes() if inside else b""
    return at


@pytest.mark.parametrize("shape", [(), (2, 3), (0, 2), (2048,)])
def test_what_is_pinned_outlives_its_buffer_in_every_dtype(shape):
    names = "bool int8 uint32 float16 float32 complex64 bfloat16 float8_e4m3fn int4"
    root = {n: nnx.Cache(jnp.ones(shape, n)) for n in names.split()}
    due = {n: np.asarray(x.value).tobytes() for n, x in root.items()}
    taken = take(root, None, None, pin=True)
    for variable in root.values():
        variable.value.delete()
    assert bytes_of(lay_out(taken)) == due


@pytest.mark.parametrize("shape", [(5,), (1024,), (1025,), (1 << 16,)])
def test_a_call_that_donates_a_pinned_buffer_does_not_overwrite_it(shape):
    """Whether it is copied, as small ones are, or held."""
    root = {f"x{i}": nnx.Cache(jnp.full(shape, float(i))) for i in range(3)}
    due = {n: np.full(shape, float(i), "f4").tobytes() for i, n in enumerate(root)}
    zeroed = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    taken = take(root, None, None, pin=True)
    now = [jax.block_until_ready(zeroed(x.value)) for x in root.values()]
    assert bytes_of(lay_out(taken)) == due
    assert all((x == -1).all() for x in now)


def test_the_array_of_a_save_in_progress_is_free_to_be_donated():
    """What is copied keeps no buffer: the next step writes where it was."""
    value = jax.block_until_ready(jnp.ones(1024) + 0)
    before = value.unsafe_buffer_pointer()
    taken = take({"x": nnx.Cache(value)}, None, None, pin=True)
    after = jax.jit(lambda x: x + 1, donate_argnums=0)(value)
    assert after.unsafe_buffer_pointer() == before
    assert bytes_of(lay_out(taken)) == {"x": np.ones(1024, "f4").tobytes()}


@pytest.mark.parametrize("pin", [True, False])
def test_axes_in_another_order_in_memory_change_nothing(pin):
    value = jnp.arange(12, dtype=jnp.float32).reshape(3, 4)
    order = Format(Layout((1, 0)), value.sharding)
    turned = jax.device_put(value, order)
    assert turned.format.layout.major_to_minor == (1, 0)
    found = lay_out(take({"x": nnx.Cache(turned)}, None, None, pin=pin))
    assert bytes_of(found)["x"] == np.asarray(value).tobytes()


def test_what_the_record_of_a_small_array_says_is_that_of_the_array():
    one = {"strong": jnp.float32(1), "weak": jnp.asarray(1.0), "key": jax.random.key(1)}
    taken = take({k: nnx.Cache(x) for k, x in one.items()}, None, None, pin=False)
    found = {leaf.path[0]: leaf.value for leaf in lay_out(taken).leaves}
    assert [found[k].weak for k in sorted(one)] == [False, False, True]
    assert found["key"].shown == "key<threefry2x32>[]"


@pytest.mark.parametrize("wait", [True, False])
def test_a_tracer_that_leaked_is_refused(tmp_path, wait):
    model = {"a": nnx.Param(jnp.ones(2)), "b": nnx.Param({"x": jnp.ones(2)})}
    kept = []
    jax.jit(lambda x: kept.append(x))(jnp.ones(2))
    model["a"].value = kept[0]
    model["b"].value = {"x": kept[0]}
    due = "a tracer, which was kept when a transform ended"
    with pytest.raises(SaveError, match=rf"a \(Param\): {due}\n  b \(Param\): {due}"):
        nnx.save(tmp_path, model, step=0, wait=wait)


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


def test_a_path_given_as_a_string_earns_a_hint(tmp_path):
    model = {"head": nnx.Linear(1, 1, rngs=nnx.Rngs(0))}
    with pytest.raises(SaveError, match=r"for the path write Under\('head'\)\."):
        nnx.save(tmp_path, model, step=0, only="head")


def test_a_key_whose_text_holds_its_address_is_refused(tmp_path):
    class Key:
        pass

    with pytest.raises(SaveError, match="keys whose repr holds an address in memory"):
        nnx.save(tmp_path, {Key(): jnp.ones(1)}, step=0)
    nnx.save(tmp_path, {(1, 2): jnp.ones(1), None: jnp.ones(1)}, step=0)
