"""DecoderAttention, and what is done to all of a model's caches."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import sortal as nnx
from sortal.errors import ArgumentError, CacheError

FEATURES, HEADS, KV_HEADS, WIDTH = 12, 4, 2, 6


def build(**options):
    return nnx.DecoderAttention(
        FEATURES, HEADS, num_key_value_heads=KV_HEADS, head_dim=WIDTH,
        rngs=nnx.Rngs(0), **options,
    )  # fmt: skip


@nnx.jit
def call(layer, x, lengths=None):
    return layer(x, lengths)


def inputs(batch=2, length=7):
    drawn = np.random.default_rng(0).normal(size=(batch, length, FEATURES))
    return drawn.astype(np.float32)


def by_hand(layer, x, window=None):
    """The definition, in double precision, one query and one head at a time."""
    q, k, v, o = (
        np.asarray(m.kernel.value, np.float64)
        for m in (layer.query, layer.key, layer.value, layer.out)
    )
    batch, length, _ = x.shape
    turn = 10_000.0 ** (-2 * np.arange(WIDTH // 2) / WIDTH)

    def rows(kernel, heads, rotate):
        y = (x.astype(np.float64) @ kernel).reshape(batch, length, heads, WIDTH)
        if not rotate:
            return y
        pairs = y[..., : WIDTH // 2] + 1j * y[..., WIDTH // 2 :]
        pairs = pairs * np.exp(1j * np.arange(length)[:, None, None] * turn)
        return np.concatenate([pairs.real, pairs.imag], -1)

    qs, ks, vs = rows(q, HEADS, True), rows(k, KV_HEADS, True), rows(v, KV_HEADS, False)
    out = np.zeros((batch, length, HEADS, WIDTH))
    for b, t, h in np.ndindex(batch, length, HEADS):
        g = h // (HEADS // KV_HEADS)
        first = 0 if window is None else max(0, t - window + 1)
        scores = ks[b, first : t + 1, g] @ qs[b, t, h] / np.sqrt(WIDTH)
        weights = np.exp(scores - scores.max())
        out[b, t, h] = weights / weights.sum() @ vs[b, first : t + 1, g]
    return out.reshape(batch, length, -1) @ o


@pytest.mark.parametrize("window", [None, 3])
def test_without_a_cache_it_is_the_definition(window) -> None:
    layer = build(window=window)
    expected = by_hand(layer, inputs(), window)
    np.testing.assert_allclose(call(layer, inputs()), expected, atol=2e-6)


@pytest.mark.parametrize(
    ("window", "length", "ring"),
    [(None, 8, False), (None, 3, True), (3, 8, False), (3, 7, True), (2, 2, True)],
)
@pytest.mark.parametrize("cuts", [(4, 5, 6), (2, 5)])
def test_with_a_cache_the_same_comes_out_of_any_division(
    window, length, ring, cuts
) -> None:
    """A prompt and then single tokens, and several at once into a full ring."""
    layer = build(window=window)
    nnx.init_cache(layer, 2, length, ring=ring)
    x = inputs()
    parts = [call(layer, part) for part in np.split(x, cuts, axis=1)]
    seen = window if window is not None else (length if ring else None)
    expected = by_hand(layer, x, seen)
    np.testing.assert_allclose(np.concatenate(parts, 1), expected, atol=2e-6)
    ringed = ring or (window is not None and window < length)
    assert layer.cache.ring == ringed
    assert layer.cache.length == min(length, window or length)


def test_it_is_flax_attention_where_flax_has_it() -> None:
    theirs = flax_nnx.MultiHeadAttention(
        HEADS, FEATURES, HEADS * WIDTH, use_bias=False, decode=False,
        rngs=flax_nnx.Rngs(0),
    )  # fmt: skip
    ours = nnx.DecoderAttention(
        FEATURES, HEADS, head_dim=WIDTH, rotary_base=None, rngs=nnx.Rngs(1)
    )
    for name in ("query", "key", "value", "out"):
        kernel = np.asarray(getattr(theirs, name).kernel[...])
        mine = getattr(ours, name).kernel
        mine[...] = jnp.asarray(kernel.reshape(mine.shape))
    x = inputs()
    mask = flax_nnx.make_causal_mask(x[..., 0])
    expected = np.asarray(theirs(x, mask=mask))
    np.testing.assert_allclose(call(ours, x), expected, atol=1e-6)
    nnx.init_cache(ours, 2, 7)
    steps = [call(ours, x[:, i : i + 1]) for i in range(7)]
    np.testing.assert_allclose(np.concatenate(steps, 1), expected, atol=1e-6)


@pytest.mark.parametrize("ring", [False, True])
def test_prompts_of_several_lengths_do_not_see_their_padding(ring) -> None:
    layer, x = build(), inputs(3)
    lengths = np.array([2, 5, 1])
    nnx.init_cache(layer, 3, 5 if ring else 8, ring=ring)
    first = call(layer, x[:, :5], lengths)
    nexts = [np.stack([x[b, n + i] for b, n in enumerate(lengths)]) for i in range(2)]
    rest = [call(layer, y[:, None]) for y in nexts]
    expected = by_hand(layer, x, 5 if ring else None)
    for b, n in enumerate(lengths):
        np.testing.assert_allclose(first[b, :n], expected[b, :n], atol=2e-6)
        for i, step in enumerate(rest):
            np.testing.assert_allclose(step[b, 0], expected[b, n + i], atol=2e-6)
    assert layer.cache.position.value.tolist() == (lengths + 2).tolist()


def test_a_sequence_may_wait_while_others_go_on() -> None:
    layer, x = build(), inputs()
    nnx.init_cache(layer, 2, 8)
    call(layer, x[:, :2])
    call(layer, x[:, 5:6], np.array([1, 0]))
    step = call(layer, np.stack([x[0, 6:7], x[1, 2:3]]))
    expected = by_hand(layer, x)[1, 2]
    np.testing.assert_allclose(step[1, 0], expected, atol=2e-6)


def test_a_reset_cache_gives_the_same_and_compiles_nothing_again() -> None:
    layer, x = build(), inputs()
    nnx.init_cache(layer, 2, 8)
    step = nnx.jit(lambda m, x: m(x), donate=nnx.Cache, on_retrace="raise")
    first = np.asarray(step(layer, x))
    nnx.reset_cache(layer)
    np.testing.assert_array_equal(step(layer, x), first)
    nnx.reset_cache(layer, np.array([True, False]))
    with pytest.raises(CacheError, match="sequence 1 holds 7 of 8"):
        layer(x)


def test_params_are_no_outputs_of_the_compiled_step_and_caches_are_donated() -> None:
    layer = build()
    nnx.init_cache(layer, 2, 8)
    x = inputs(2, 1)
    step = nnx.jit(lambda m, x: m(x), donate=nnx.Cache)
    compiled = step.lower(layer, x).compile()
    outputs = sorted(o.shape for o in jax.tree.leaves(compiled.out_info))
    keys = (2, KV_HEADS, 8, WIDTH)
    assert outputs == sorted([(2, 1, FEATURES), keys, keys, (2,)])
    held = nnx.state(layer, nnx.Cache).leaves()
    size = sum(v.value.nbytes for v in held)
    assert compiled.memory_analysis().alias_size_in_bytes == size
    buffers = [v.value for v in nnx.variables(layer, nnx.Cache).leaves()]
    params = [v.value for v in nnx.variables(layer, nnx.Param).leaves()]
    step(layer, x)
    assert all(b.is_deleted() for b in buffers)
    kept = [v.value for v in nnx.variables(layer, nnx.Param).leaves()]
    assert all(a is b for a, b in zip(params, kept, strict=True))


def test_a_full_cache_inside_a_trace_gives_nan_for_that_sequence_alone() -> None:
    layer, x = build(), inputs()
    nnx.init_cache(layer, 2, 4)
    call(layer, x[:, :4], np.array([4, 2]))
    for i in (4, 5):
        y = call(layer, x[:, i : i + 1])
        assert jnp.isnan(y[0]).all()
        assert not jnp.isnan(y[1]).any()
    with pytest.raises(CacheError, match="holds 6 of 4"):
        layer(x[:, :1])


def test_the_caches_are_the_whole_state_of_their_kind_and_can_be_taken_away() -> None:
    model = nnx.Sequential(build(), build())
    params = nnx.state(model)
    assert len(nnx.state(model, nnx.Cache)) == 0
    nnx.init_cache(model, 1, 4, dtype=jnp.bfloat16)
    names = {path[-1] for path in nnx.state(model, nnx.Cache).paths()}
    assert names == {"keys", "values", "position"}
    assert nnx.state(model, nnx.Param).paths() == params.paths()
    assert model.layers[1].cache.keys.value.dtype == jnp.bfloat16
    model.set_attributes(nnx.DecoderAttention, cache=None)
    assert nnx.state(model).paths() == params.paths()


def test_half_precision_stays_so() -> None:
    layer = build(param_dtype=jnp.bfloat16, use_bias=True)
    x = jnp.asarray(inputs(), jnp.bfloat16)
    whole = call(layer, x)
    nnx.init_cache(layer, 2, 8)
    assert layer.cache.keys.value.dtype == jnp.bfloat16
    parts = call(layer, x)
    assert whole.dtype == parts.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        whole.astype(jnp.float32), parts.astype(jnp.float32), atol=0.05
    )


def test_what_cannot_be_is_refused() -> None:
    rngs = nnx.Rngs(0)
    for options, message in (
        ({"num_heads": 5}, "12 features do not divide into 5 heads"),
        ({"num_heads": 4, "num_key_value_heads": 3}, "4 query heads .* 3 key-value"),
        ({"num_heads": 4, "window": 0}, "window=0"),
        ({"num_heads": 0}, "do not divide into 0"),
    ):
        with pytest.raises(ArgumentError, match=message):
            nnx.DecoderAttention(FEATURES, rngs=rngs, **options)
    with pytest.raises(ArgumentError, match=r"found float32\[7,12\]"):
        build()(inputs()[0])
    layer = build()
    with pytest.raises(CacheError, match="no DecoderAttention in Linear"):
        nnx.init_cache(nnx.Linear(1, 1, rngs=rngs), 1, 1)
    with pytest.raises(CacheError, match="no KVCache in DecoderAttention"):
        nnx.reset_cache(layer)
    nnx.init_cache(layer, 3, 8)
    with pytest.raises(ArgumentError, match=r"cache for 3 sequences; .* Make caches"):
        layer(inputs())


@pytest.mark.parametrize("library", [nnx, flax_nnx], ids=["sortal", "flax"])
def test_attention_with_a_cache_of_its_own_is_named_with_what_to_call(library):
    rngs = library.Rngs(0)
    heads = library.MultiHeadAttention(2, 4, decode=True, rngs=rngs)
    model = library.Sequential(library.Linear(4, 4, rngs=rngs), heads)
    for call_ in (
        lambda: nnx.init_cache(model, batch=2, length=8),
        lambda: nnx.reset_cache(model),
    ):
        with pytest.raises(CacheError) as error:
            call_()
        text = str(error.value)
        assert "attention.init_cache((batch, length, features)) makes and" in text
        assert "layers.1 (MultiHeadAttention)" in text


@pytest.mark.parametrize("library", [nnx, flax_nnx], ids=["sortal", "flax"])
def test_a_decoder_in_a_module_of_either_library_gets_its_cache(library):
    model = library.Sequential(build())
    nnx.init_cache(model, batch=2, length=8)
    x = inputs(length=3)
    first, second = (np.asarray(model(x)) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3, "the second call continues"
    nnx.reset_cache(model)
    np.testing.assert_array_equal(model(x), first)


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_a_batch_without_tokens_gives_none(shape) -> None:
    layer = nnx.DecoderAttention(8, 2, rngs=nnx.Rngs(0))
    assert layer(jnp.ones(shape)).shape == shape
    nnx.init_cache(layer, batch=shape[0], length=4)
    assert layer(jnp.ones(shape)).shape == shape
    assert layer.cache.position.value.tolist() == [0] * shape[0]


@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim", "window"])
def test_sizes_that_are_no_whole_numbers_are_refused(name) -> None:
    with pytest.raises(ArgumentError, match=rf"{name} must be made of whole numbers"):
        nnx.DecoderAttention(8, 2, **{name: 2.0}, rngs=nnx.Rngs(0))


def test_a_cache_of_integers_is_refused() -> None:
    layer = nnx.DecoderAttention(8, 2, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"floating.*int32"):
        nnx.init_cache(layer, batch=1, length=4, dtype=jnp.int32)


def test_lengths_are_checked_without_a_cache_too() -> None:
    layer, x = nnx.DecoderAttention(8, 2, rngs=nnx.Rngs(0)), jnp.ones((2, 3, 8))
    with pytest.raises(ArgumentError, match=r"from 0 to 3 .* found sequence 1 has 4"):
        layer(x, np.array([3, 4]))
