"""KVCache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sortal import nnx
from sortal.errors import ArgumentError, CacheError


def numbered(counts, width, start):
    """Keys whose every element is 100 * sequence + position, padding -7."""
    rows = np.full((len(counts), 1, width, 1), -7.0, np.float32)
    for b, n in enumerate(counts):
        rows[b, 0, :n, 0] = 100 * b + start[b] + np.arange(n)
    return jnp.asarray(rows)


@nnx.jit
def append(cache, keys, values, lengths):
    return cache.append(keys, values, lengths)


@settings(max_examples=20)
@given(
    ring=st.booleans(),
    calls=st.lists(
        st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=5
    ),
)
def test_each_sequence_holds_its_last_tokens_as_a_list_would(ring, calls) -> None:
    length = 3
    cache = nnx.KVCache(2, length, 1, 1, ring=ring)
    model = [0, 0]  # how many tokens each sequence was given
    for counts in calls:
        width = 1 if max(counts) <= 1 else 4
        new = numbered(counts, width, model)
        before = [np.asarray(x.value) for x in (cache.keys, cache.position)]
        after = [n + more for n, more in zip(model, counts, strict=True)]
        over = [n > length and more for n, more in zip(after, counts, strict=True)]
        if not ring and any(over):
            with pytest.raises(CacheError, match="no room"):
                cache.append(new, 2 * new, np.array(counts))
            np.testing.assert_array_equal(cache.keys.value, before[0])
            np.testing.assert_array_equal(cache.position.value, before[1])
            continue
        held = jax.device_get(append(cache, new, 2 * new, np.array(counts)))
        for b, more in enumerate(counts):
            # A query at the last position sees the last `length`; one at an earlier of
            # several sees as many before itself.
            earliest = max(0, model[b] + (1 if width > 1 else more) - length)
            if width > 1 and more == 0:
                earliest = max(0, model[b] - length)
            found = held.positions[b]
            keys = {
                int(p): (float(k), float(v))
                for p, k, v in zip(
                    found, held.keys[b, 0, :, 0], held.values[b, 0, :, 0], strict=True
                )
                if p >= 0
            }
            needed = range(earliest if ring else 0, after[b])
            assert set(needed) <= set(keys)
            assert max(keys, default=-1) < after[b]
            assert all(kv == (100 * b + p, 2 * (100 * b + p)) for p, kv in keys.items())
            assert int((found >= 0).sum()) == len(keys), "no position twice"
        model = after
        assert cache.position.value.tolist() == model


def test_what_exceeds_a_fixed_cache_is_refused_with_path_and_kind() -> None:
    model = nnx.DecoderAttention(2, 1, rngs=nnx.Rngs(0))
    model.layers = [{"cache": nnx.KVCache(3, 4, 1, 1)}]
    cache = model.layers[0]["cache"]
    new = jnp.ones((3, 1, 3, 1))
    cache.append(new, new, jnp.array([3, 1, 3]))
    with pytest.raises(CacheError) as error:
        cache.append(new, new, jnp.array([2, 3, 0]))
    text = str(error.value)
    assert (
        "layers.0.cache.position (Cache): sequence 0 holds 3 of 4 tokens, and 2 more "
        "are to come"
    ) in text
    assert "sequence 1" not in text
    assert "sequence 2" not in text
    assert "init_cache(..., ring=True)" in text
    assert cache.position.value.tolist() == [3, 1, 3]


def test_check_room_names_every_cache_without_room_and_rings_never() -> None:
    model = nnx.Dict(
        a=nnx.KVCache(1, 2, 1, 1),
        b=nnx.KVCache(1, 4, 1, 1),
        c=nnx.KVCache(1, 3, 1, 1),
        d=nnx.KVCache(1, 1, 1, 1, ring=True),
    )
    nnx.check_room(model, 2)
    with pytest.raises(CacheError) as error:
        nnx.check_room(model, 4)
    named = [line.split()[0] for line in str(error.value).splitlines()[1:3]]
    assert named == ["a.position", "c.position"]
    assert "b.position" not in str(error.value)


def test_inside_a_trace_what_does_not_fit_is_not_written_and_is_told() -> None:
    cache = nnx.KVCache(2, 3, 1, 1)
    new = jnp.arange(1.0, 4.0).reshape(1, 1, 3, 1) * jnp.ones((2, 1, 1, 1))
    cache.append(new, new, jnp.array([3, 1]))
    kept = np.asarray(cache.keys.value)

    @nnx.jit
    def more(cache, new, lengths):
        cache.append(new, new, lengths)

    more(cache, 9 * new[:, :, :1], jnp.array([1, 1]))
    assert cache.overflowed.tolist() == [True, False]
    np.testing.assert_array_equal(cache.keys.value[0], kept[0])
    assert cache.keys.value[1, 0, :, 0].tolist() == [1.0, 9.0, 0.0]
    # It stays told until the sequence is forgotten.
    cache.reset(jnp.array([True, False]))
    assert cache.overflowed.tolist() == [False, False]
    assert cache.position.value.tolist() == [0, 2]
    assert not cache.keys.value[0].any()


def test_what_no_cache_could_hold_is_refused_inside_a_trace_too() -> None:
    cache = nnx.KVCache(1, 2, 1, 1)
    with pytest.raises(CacheError, match="holds 0 of 2 tokens, and 3 more"):
        nnx.jit(lambda c, x: c.append(x, x))(cache, jnp.ones((1, 1, 3, 1)))


def test_a_ring_never_overflows() -> None:
    cache = nnx.KVCache(1, 2, 1, 1, ring=True)
    for i in range(5):
        held = cache.append(*[jnp.full((1, 1, 1, 1), float(i))] * 2)
    assert not cache.overflowed.any()
    assert held.positions.tolist() == [[4, 3]]
    assert held.keys[0, 0, :, 0].tolist() == [4.0, 3.0]


def test_reset_forgets_a_nan_and_compiles_nothing_again() -> None:
    cache = nnx.KVCache(2, 2, 1, 1, dtype=jnp.bfloat16)

    @nnx.jit(on_retrace="raise", donate=nnx.Cache)
    def write(cache, x):
        return cache.append(x, x).positions

    for _ in range(2):
        write(cache, jnp.full((2, 1, 1, 1), jnp.nan))
        cache.reset()
    assert not cache.keys.value.any()
    assert cache.position.value.tolist() == [0, 0]
    assert cache.keys.value.dtype == jnp.bfloat16


def test_tokens_before_heads_are_answered_with_how_to_swap_them() -> None:
    cache, keys = nnx.KVCache(1, 4, 2, 8), jnp.ones((1, 3, 2, 8))
    with pytest.raises(ArgumentError, match=r"as keys\.swapaxes\(1, 2\); or make"):
        cache.append(keys, keys)
    cache.append(keys.swapaxes(1, 2), keys.swapaxes(1, 2))


def test_shapes_that_do_not_fit_are_refused() -> None:
    cache = nnx.KVCache(2, 4, 3, 8)
    good = jnp.ones((2, 3, 1, 8))
    message = r"holds keys and values \(2, 3, tokens, 8\)"
    for keys, values in ((good[:1], good[:1]), (good, good[:, :1]), (good[0], good[0])):
        with pytest.raises(ArgumentError, match=message):
            cache.append(keys, values)
    with pytest.raises(ArgumentError, match="length=0"):
        nnx.KVCache(1, 0, 1, 1)
    with pytest.raises(ArgumentError, match="batch"):
        nnx.KVCache(-1, 1, 1, 1)


def test_the_state_by_kind_is_keys_values_and_position() -> None:
    cache = nnx.KVCache(2, 4, 3, 8)
    assert nnx.state(cache, nnx.Cache).paths() == (
        ("keys",),
        ("position",),
        ("values",),
    )
    assert len(nnx.state(cache, nnx.Not(nnx.Cache))) == 0
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(cache)))["keys"] == (
        2, 3, 4, 8,
    )  # fmt: skip


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize(
    ("lengths", "found"),
    [
        ([4, 1], "sequence 0 has 4"),
        ([-1, 1], "sequence 0 has -1"),
        ([1.0, 2.0], r"found float32\[2\]"),
        ([True, False], r"found bool\[2\]"),
        ([1], r"found int32\[1\]"),
        (2, r"found int32\[\]"),
        ([[1], [1]], r"found int32\[2,1\]"),
    ],
)
def test_lengths_that_the_new_tokens_do_not_have_are_refused(
    ring, lengths, found
) -> None:
    cache = nnx.KVCache(2, 9, 1, 1, ring=ring)
    keys = jnp.ones((2, 1, 3, 1))
    with pytest.raises(
        ArgumentError, match=rf"lengths are integers from 0 to 3.*{found}"
    ):
        cache.append(keys, keys, np.asarray(lengths))
    assert cache.position.value.tolist() == [0, 0]


def test_inside_a_trace_no_more_tokens_are_taken_than_there_are() -> None:
    cache = nnx.KVCache(2, 9, 1, 1)
    keys = jnp.ones((2, 1, 3, 1))
    append(cache, keys, keys, jnp.array([5, -2]))
    assert cache.position.value.tolist() == [3, 0]
    held = nnx.jit(lambda c, n: c.append(keys, keys, [n, 1]))(cache, jnp.array(2))
    assert held.positions.max(axis=1).tolist() == [4, 0]


@pytest.mark.parametrize("where", [[True], [0, 1], [True] * 3, True])
def test_a_reset_of_other_sequences_than_there_are_is_refused(where) -> None:
    cache = nnx.KVCache(2, 4, 1, 1)
    keys = jnp.ones((2, 1, 3, 1))
    cache.append(keys, keys)
    with pytest.raises(ArgumentError, match=r"bool\[2\], one for each sequence"):
        cache.reset(np.asarray(where))
    assert cache.position.value.tolist() == [3, 3]


@pytest.mark.parametrize("tokens", ["4", 2.5, [1, 2, 3], [[1, 2]]])
def test_room_is_asked_for_whole_numbers_of_tokens(tokens) -> None:
    cache = nnx.KVCache(2, 4, 1, 1)
    with pytest.raises(ArgumentError, match=r"an integer, or an integer for each of 2"):
        nnx.check_room(cache, tokens)
