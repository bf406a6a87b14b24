"""Generation: the same tokens in every way, and none where there can be none."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal import decoding
from sortal.demo.llama import Config, Llama
from sortal.errors import ArgumentError, CacheError, DecodingError

TINY = Config(
    vocabulary=40, features=24, hidden=32, layers=2, heads=4, key_value_heads=2
)
PROMPTS = [[5, 6, 7, 8], [9], [1, 2]]
STEPS = 7


@pytest.fixture(scope="module")
def model():
    model = Llama(TINY, rngs=nnx.Rngs(0))
    # Large enough that the tokens differ from one another.
    for variable in nnx.variables(model, nnx.Param).leaves():
        variable[...] = variable[...] * 2.5
    nnx.init_cache(model, len(PROMPTS), 16)
    return model


@pytest.fixture
def empty(model):
    nnx.reset_cache(model)
    return model


@functools.cache
def recomputed():
    """The likeliest tokens, the whole text read anew for each, one text at a time."""
    model = Llama(TINY, rngs=nnx.Rngs(0))
    for variable in nnx.variables(model, nnx.Param).leaves():
        variable[...] = variable[...] * 2.5
    texts = [list(p) for p in PROMPTS]
    whole = nnx.jit(lambda m, tokens: m(tokens))
    for text in texts:
        for _ in range(STEPS):
            padded = np.zeros((1, 16), np.int32)
            padded[0, : len(text)] = text
            text.append(int(whole(model, padded)[0, len(text) - 1].argmax()))
    return [t[len(p) :] for t, p in zip(texts, PROMPTS, strict=True)]


def streamed(model, prompts=PROMPTS, **options):
    return np.stack(list(decoding.stream(model, prompts, **options)), axis=1)


def test_steps_one_loop_and_full_recomputation_give_the_same_tokens(empty) -> None:
    expected = recomputed()
    assert len({t for row in expected for t in row}) > 5, "tokens that say something"
    assert streamed(empty, max_new_tokens=STEPS).tolist() == expected
    held = [len(p) + STEPS - 1 for p in PROMPTS]
    assert empty.blocks[0].attention.cache.position.value.tolist() == held
    nnx.reset_cache(empty)
    found = decoding.generate(empty, PROMPTS, max_new_tokens=STEPS)
    assert found.tolist() == expected
    assert empty.blocks[1].attention.cache.position.value.tolist() == held


def test_drawn_tokens_are_those_of_the_seed_in_both_loops(empty) -> None:
    options = {"temperature": 0.8, "top_k": 9, "top_p": 0.9}

    def drawn(way, seed):
        nnx.reset_cache(empty)
        rngs = nnx.Rngs(seed)
        options_ = {"max_new_tokens": STEPS, "rngs": rngs, **options}
        return way(empty, PROMPTS, **options_).tolist(), int(rngs.default.count.value)

    one = drawn(streamed, 3)
    assert one == drawn(decoding.generate, 3)
    assert one[0] != drawn(streamed, 4)[0] != recomputed()
    assert one[1] == STEPS


def test_a_text_goes_on_from_what_the_caches_hold(empty) -> None:
    expected = recomputed()
    first = streamed(empty, max_new_tokens=3)
    rest = streamed(empty, first[:, -1:], max_new_tokens=STEPS - 3)
    assert np.concatenate([first, rest], 1).tolist() == expected


def test_a_text_ends_with_its_stop_token_and_the_others_go_on(empty) -> None:
    expected = recomputed()
    stop = expected[1][2]
    cut = [r[: r.index(stop) + 1] if stop in r else r for r in expected]
    padded = [r + [-1] * (STEPS - len(r)) for r in cut]
    options = {"max_new_tokens": STEPS, "stop": [stop]}
    assert streamed(empty, **options).tolist() == padded
    held = empty.blocks[0].attention.cache.position.value.tolist()
    assert held[1] == 1 + len(cut[1]) - 1 + (0 if len(cut[1]) == STEPS else 1) - 1
    nnx.reset_cache(empty)
    assert decoding.generate(empty, PROMPTS, **options).tolist() == padded
    assert empty.blocks[0].attention.cache.position.value.tolist() == held


def test_a_stream_ends_early_where_all_have_ended(empty) -> None:
    prompts = [PROMPTS[0]] * 3
    stop = [recomputed()[0][1]]
    assert recomputed()[0][0] not in stop
    assert streamed(empty, prompts, max_new_tokens=STEPS, stop=stop).shape == (3, 2)
    nnx.reset_cache(empty)
    found = decoding.generate(empty, prompts, max_new_tokens=STEPS, stop=stop)
    assert (found[:, 2:] == -1).all()
    assert (found[:, :2] >= 0).all()


def test_params_are_no_outputs_of_a_step_and_every_cache_is_donated(empty) -> None:
    tokens, done = np.zeros(3, np.int32), np.zeros(3, bool)
    args = (empty, None, tokens, done, decoding.Choice())
    compiled = decoding.decode.lower(*args, top_k=None).compile()
    out = jax.tree.leaves(compiled.out_info)
    caches = nnx.state(empty, nnx.Cache).leaves()
    assert len(out) == 3 + len(caches) == 3 + 3 * TINY.layers
    donated = sum(v.value.nbytes for v in caches)
    assert compiled.memory_analysis().alias_size_in_bytes == donated
    params = {v.value.shape for v in nnx.state(empty, nnx.Param).leaves()}
    assert not params & {o.shape for o in out}


def test_other_prompts_seeds_and_temperatures_compile_nothing_new(empty) -> None:
    def run(length, heat):
        nnx.reset_cache(empty)
        prompts = [[1] * length] * 3
        rngs = nnx.Rngs(length)
        streamed(empty, prompts, max_new_tokens=3, rngs=rngs, temperature=heat)

    compiled = []
    run(4, 0.7)
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event)
    )
    try:
        run(9, 1.1)
        run(1, 0.3)
    finally:
        jax.monitoring.clear_event_listeners()
    assert [e for e in compiled if "backend_compile" in e] == []


def test_what_has_no_room_is_refused_before_a_token_is_made(empty) -> None:
    message = r"blocks.0.attention.cache.position \(Cache\): sequence 0 holds 0 of 16"
    for way in (decoding.stream, decoding.generate):
        with pytest.raises(CacheError, match=message) as error:
            way(empty, PROMPTS, max_new_tokens=14)
        assert "blocks.1.attention.cache.position" in str(error.value)
        assert "sequence 1" not in str(error.value)
    assert not any(v.value.any() for v in nnx.state(empty, nnx.Cache).leaves())
    assert streamed(empty, max_new_tokens=13).shape == (3, 13)


def test_a_ring_generates_without_end() -> None:
    model = Llama(TINY, rngs=nnx.Rngs(0))
    nnx.init_cache(model, 1, 8, ring=True)
    found = streamed(model, [[3, 4, 5]], max_new_tokens=20)
    assert (found >= 0).all()
    nnx.reset_cache(model)
    again = decoding.generate(model, [[3, 4, 5]], max_new_tokens=20)
    np.testing.assert_array_equal(found, again)


def test_nan_logits_are_an_error_with_the_sequence(empty) -> None:
    table = empty.norm.scale[...]
    try:
        empty.norm.scale[...] = table.at[0].set(jnp.nan)
        with pytest.raises(DecodingError, match="sequence 0, 1, 2 hold NaN"):
            streamed(empty, max_new_tokens=3)
        nnx.reset_cache(empty)
        with pytest.raises(DecodingError, match="reset_cache"):
            decoding.generate(empty, PROMPTS, max_new_tokens=3)
    finally:
        empty.norm.scale[...] = table


def test_no_token_is_no_token(empty) -> None:
    assert list(decoding.stream(empty, PROMPTS, max_new_tokens=0)) == []
    assert decoding.generate(empty, PROMPTS, max_new_tokens=0).shape == (3, 0)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("text", {}, "token ids, not text"),
        (["text"], {}, "token ids, not text"),
        ([], {}, "there is none"),
        (None, {}, r"one list for each sequence; found None"),
        (5, {}, r"one list for each sequence; found 5"),
        ([[1], [1, [2]]], {}, r"one list for each sequence; found"),
        ([[1], []], {}, r"prompt 1 is float64\[0\]"),
        ([[1.5]], {}, r"prompt 0 is float64\[1\]"),
        ([[[1]]], {}, r"prompt 0 is int64\[1,1\]"),
        (PROMPTS, {"max_new_tokens": -1}, "max_new_tokens=-1"),
        (PROMPTS, {"temperature": -1.0}, "temperature=-1.0"),
        (PROMPTS, {"temperature": 1.0}, "rngs=nnx.Rngs"),
        (PROMPTS, {"top_p": 0.0}, "top_p=0.0"),
        (PROMPTS, {"temperature": 1.0, "rngs": nnx.Rngs(0), "top_k": 0}, "top_k=0"),
        (PROMPTS, {"top_k": 0}, "top_k=0"),
        (PROMPTS, {"top_k": 2.5}, "top_k=2.5; it is a whole number"),
        (PROMPTS, {"temperature": float("inf")}, "temperature=inf"),
        (PROMPTS, {"max_new_tokens": 2.0}, "max_new_tokens=2.0; it is a whole number"),
        (PROMPTS, {"max_new_tokens": True}, "max_new_tokens=True; it is a whole"),
        (PROMPTS, {"stop": 5}, r"stop=5; .* Write stop=\[5\]"),
        (PROMPTS, {"stop": [2.0]}, r"stop=\[2.0\]; it is a list of token ids"),
        (PROMPTS, {"stop": "</s>"}, "stop='</s>'; it is a list of token ids"),
        (PROMPTS, {"stop": [1, -1]}, r"0 to 39 (.|\n)*stop: -1"),
        (PROMPTS, {"stop": [40]}, r"0 to 39 (.|\n)*stop: 40"),
        ([[1], [2, -3], [4]], {}, r"prompt 1: -3"),
        ([[1], [2], [40, 2**32 + 5]], {}, r"prompt 2: 4294967301"),
        ([[1], [2], [40, 39, 41]], {}, r"0 to 39 (.|\n)*prompt 2: 40, 41"),
        ([[1], [2**70], [4]], {}, r"prompt 1: 1180591620717411303424"),
        (np.full((3, 2), 2**32 + 5, np.uint64), {}, "prompt 2: 4294967301, 42"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(
    empty, prompts, options, message
) -> None:
    for way in (decoding.stream, decoding.generate):
        with pytest.raises(ArgumentError, match=message):
            way(empty, prompts, **{"max_new_tokens": 2, **options})
    if isinstance(options.get("rngs"), nnx.Rngs):
        assert int(options["rngs"].default.count.value) == 0
    assert not empty.blocks[0].attention.cache.position.value.any()


def test_a_model_without_caches_or_for_another_batch_is_refused(empty) -> None:
    with pytest.raises(CacheError, match="2 prompts, and caches for 3 sequences"):
        decoding.stream(empty, [[1], [2]], max_new_tokens=1)
    bare = Llama(TINY, rngs=nnx.Rngs(0))
    with pytest.raises(CacheError, match="Llama has no KVCache"):
        decoding.generate(bare, [[1]], max_new_tokens=1)


def test_prompts_are_padded_to_few_lengths() -> None:
    sizes = {decoding.pad([[1] * n])[0].shape[1] for n in range(1, 65)}
    assert sizes == {16, 32, 64}
    tokens, lengths = decoding.pad(np.array([[1, 2], [3, 4]]))
    assert tokens[:, :3].tolist() == [[1, 2, 0], [3, 4, 0]]
    assert lengths.tolist() == [2, 2]


def test_prompts_of_a_trace_are_told_as_such() -> None:
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.jit(decoding.pad)(jnp.array([[1, 2]]))


def test_what_gives_no_row_of_logits_for_each_prompt_is_refused() -> None:
    class Wrong(nnx.Module):
        def __init__(self):
            self.cache = nnx.KVCache(1, 8, num_heads=1, head_dim=1)

        def next_logits(self, tokens, lengths):
            return jnp.zeros((1, tokens.shape[1], 7))

    message = (
        r"Wrong.next_logits must return .*\(1, vocabulary\).*found float32\[1,16,7\]"
    )
    with pytest.raises(ArgumentError, match=message):
        decoding.generate(Wrong(), [[1]], max_new_tokens=1)
