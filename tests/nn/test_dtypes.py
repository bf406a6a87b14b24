"""Dtype promotion, and the checks that all layers share."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.nnx.nn import dtypes as flax_dtypes

import sortal as nnx
from sortal.errors import ArgumentError
from sortal.nn import dtypes

RNGS = nnx.OfType(nnx.RngState)
VALUES: list[tuple[Any, ...]] = [
    (jnp.zeros(2, jnp.bfloat16), 1.0),
    (jnp.zeros(2, jnp.bfloat16), jnp.zeros(2)),
    (np.zeros(2), None),
    (np.arange(2), True),
    (jnp.zeros(2, jnp.complex64), np.float16(1)),
    (jnp.zeros(2, jnp.int8), jnp.zeros(2, jnp.bfloat16)),
]


@pytest.mark.parametrize("values", VALUES, ids=repr)
@pytest.mark.parametrize("inexact", [False, True])
def test_values_promote_as_in_flax(values: tuple[Any, ...], inexact: bool) -> None:
    ours = dtypes.promote_dtype(values, inexact=inexact)
    theirs = flax_dtypes.promote_dtype(values, inexact=inexact)
    assert [getattr(x, "dtype", None) for x in ours] == [
        getattr(x, "dtype", None) for x in theirs
    ]
    assert dtypes.canonicalize_dtype(
        *values, inexact=inexact
    ) == flax_dtypes.canonicalize_dtype(*values, inexact=inexact)


def test_a_given_dtype_wins_over_those_of_the_values() -> None:
    (x,) = dtypes.promote_dtype((jnp.ones(2),), dtype=jnp.bfloat16)
    assert x.dtype == jnp.bfloat16


def test_a_given_integer_dtype_is_allowed_only_where_asked_for() -> None:
    (x,) = dtypes.promote_dtype((jnp.ones(2),), dtype=jnp.int32, inexact=False)
    assert x.dtype == jnp.int32
    with pytest.raises(ArgumentError, match=r"floating-point one; found int32"):
        dtypes.promote_dtype((jnp.ones(2),), dtype=jnp.int32)


def test_a_layer_takes_nested_lists_and_variables() -> None:
    layer = nnx.Linear(2, 1, kernel_init=nnx.initializers.ones, rngs=nnx.Rngs(0))
    assert layer([[1.0, 2.0]]).tolist() == [[3.0]]
    assert layer(nnx.Variable(jnp.array([1.0, 2.0]))).tolist() == [3.0]


@pytest.mark.parametrize("thing", [None, "text", [[1.0], [1.0, 2.0]], object()])
def test_a_layer_called_with_no_array_says_so(thing: object) -> None:
    layer = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    with pytest.raises(ArgumentError, match=r"Linear was called with .*not an array"):
        layer(thing)


def test_a_wrong_number_of_features_is_named_with_its_axis() -> None:
    layer = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
    message = r"Linear has parameters for 2 features on axis -1 .* float32\[4,3\]"
    with pytest.raises(ArgumentError, match=message):
        layer(jnp.ones((4, 3)))
    with pytest.raises(ArgumentError, match=r"float32\[\]"):
        layer(jnp.float32(1))


def attend(layer: Any, x: Any) -> Any:
    return layer.attend(x)


def call(layer: Any, x: Any) -> Any:
    return layer(x)


def unroll(cell: Any, x: Any) -> Any:
    return cell((x, x), x)


X4 = np.ones((5, 4), np.float32)
# As many layers as features, so that the first axis of the stack fits the input.
STACKS: list[tuple[Any, Any, Any, str]] = [
    (lambda r: nnx.Linear(4, 3, rngs=r), call, X4, "Linear.kernel is float32[4,4,3]"),
    (lambda r: nnx.LinearGeneral(4, (3, 2), rngs=r), call, X4, "LinearGeneral.kernel"),
    (lambda r: nnx.Einsum("ab,bc->ac", (4, 3), rngs=r), call, X4, "Einsum.kernel"),
    (lambda r: nnx.Embed(4, 3, rngs=r), call, np.zeros(5, int), "Embed.embedding"),
    (lambda r: nnx.Embed(3, 4, rngs=r), attend, X4, "Embed.embedding"),
    (lambda r: nnx.Conv(4, 3, (1,), rngs=r), call, X4[None], "Conv.kernel"),
    (lambda r: nnx.ConvTranspose(4, 3, 1, rngs=r), call, X4[None], "ConvTranspose.ker"),
    (lambda r: nnx.LoRA(4, 2, 3, rngs=r), call, X4, "LoRA.lora_a is float32[4,4,2]"),
    (lambda r: nnx.LayerNorm(4, rngs=r), call, X4, "LayerNorm.scale is float32[4,4]"),
    (lambda r: nnx.GroupNorm(4, 2, rngs=r), call, X4, "GroupNorm.scale"),
    (lambda r: nnx.BatchNorm(4, rngs=r), call, X4, "BatchNorm.mean is float32[4,4]"),
    (lambda r: nnx.OptimizedLSTMCell(4, 4, rngs=r), unroll, X4, "Linear.kernel"),
]


@pytest.mark.parametrize(("make", "use", "x", "what"), STACKS)
def test_a_stack_of_layers_is_called_by_vmap_alone(
    make: Any, use: Any, x: Any, what: str
) -> None:
    layer = make(nnx.Rngs(0))
    stack = nnx.clone(layer)
    several = jax.tree.map(lambda x: jnp.stack([x] * 4), nnx.state(layer, ~RNGS))
    nnx.update(stack, several, strict=False)
    with pytest.raises(ArgumentError) as e:
        use(stack, x)
    assert what in str(e.value)
    assert "a stack to vmap or scan, as in vmap(lambda layer, x:" in str(e.value)
    axes = nnx.StateAxes({RNGS: None, ...: 0})
    out = nnx.vmap(use, in_axes=(axes, None))(stack, x)
    for all_layers, one in zip(
        jax.tree.leaves(out), jax.tree.leaves(use(layer, x)), strict=True
    ):
        np.testing.assert_allclose(all_layers[2], one, rtol=1e-5)


def test_a_kernel_that_the_layer_s_own_promotion_makes_an_array_is_no_stack() -> None:
    def dequantized(arrays: Any, **options: Any) -> Any:
        x, kernel, bias = arrays
        return dtypes.promote_dtype((x, kernel["q"] * kernel["scale"], bias), **options)

    layer = nnx.Linear(4, 3, promote_dtype=dequantized, rngs=nnx.Rngs(0))
    kernel = np.arange(12, dtype=np.int8).reshape(4, 3)
    layer.kernel = nnx.Param({"q": jnp.asarray(kernel), "scale": jnp.float32(0.5)})
    np.testing.assert_allclose(layer(X4), X4 @ (kernel * 0.5))


def test_a_layer_promotes_with_the_function_it_was_given() -> None:
    def keep(values: Any, *, dtype: Any) -> Any:
        return tuple(v if v is None else v.astype(jnp.float16) for v in values)

    layer = nnx.Linear(2, 1, promote_dtype=keep, rngs=nnx.Rngs(0))
    assert layer(jnp.ones(2)).dtype == jnp.float16


def test_a_flag_is_asked_for_with_what_sets_it() -> None:
    """``train()`` and ``eval()`` are proposed where they would help, and only there."""
    layer = nnx.Dropout(0.5, deterministic=None)
    with pytest.raises(ArgumentError, match=r"to the call\. Write model\.train\(\)"):
        dtypes.resolve_flag(layer, "deterministic", None)
    layer.decode = None
    with pytest.raises(ArgumentError, match=r"to the call\. Pass decode=True or False"):
        dtypes.resolve_flag(layer, "decode", None)


def test_cast_gives_an_array_of_the_dtype_as_it_is_and_others_as_jax_casts_them() -> (
    None
):
    x = jnp.ones(3, jnp.bfloat16)
    assert dtypes.cast(x, jnp.bfloat16) is x
    weak = jnp.asarray(1.0)
    assert weak.weak_type
    for value, dtype in ((x, jnp.float32), (weak, jnp.float32), (2, jnp.float32)):
        expected = jnp.asarray(value, dtype)
        found = dtypes.cast(value, dtype)
        assert (found.dtype, found.weak_type) == (expected.dtype, expected.weak_type)


def test_layers_of_one_size_are_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX keeps what takes longest to trace in a training step."""
    layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(3)]
    traced = []

    def counted(*args: Any, precision: Any) -> Any:
        traced.append(args)
        return jax.lax.dot_general(*args, precision=precision)

    jitted = jax.jit(counted, static_argnums=2, static_argnames="precision")
    monkeypatch.setattr(dtypes, "_dot_general", jitted)

    def loss(x: Any) -> Any:
        for layer in layers:
            x = layer(x)
        return x.sum()

    jax.grad(loss)(jnp.ones((7, 4)))
    assert len(traced) == 1


def test_layers_that_hold_the_default_product_are_copied_and_pickled() -> None:
    layer = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert nnx.graphdef(other) == nnx.graphdef(layer)


def test_another_dot_general_in_the_place_of_that_of_jax_is_called() -> None:
    layer = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    x, plain = jnp.ones((1, 2)), jax.lax.dot_general
    before = layer(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.lax, "dot_general", lambda *a, **k: 2 * plain(*a, **k))
        np.testing.assert_array_equal(layer(x), 2 * before)
    np.testing.assert_array_equal(layer(x), before)


def test_other_code_in_the_dot_general_of_jax_is_run() -> None:
    layer = nnx.Linear(2, 3, use_bias=False, rngs=nnx.Rngs(0))
    x, code = jnp.ones((1, 2)), jax.lax.dot_general.__code__

    def zeros(lhs, rhs, dimension_numbers, precision=None,
              preferred_element_type=None, *, out_sharding=None):  # fmt: skip
        import jax.numpy as jnp

        return jnp.zeros((lhs.shape[0], rhs.shape[1]))

    before = layer(x)
    try:
        jax.lax.dot_general.__code__ = zeros.__code__
        np.testing.assert_array_equal(layer(x), 0 * before)
    finally:
        jax.lax.dot_general.__code__ = code
    np.testing.assert_array_equal(layer(x), before)


def _decoded(x: Any) -> Any:
    layer = nnx.DecoderAttention(4, 2, window=2, rngs=nnx.Rngs(0))
    nnx.init_cache(layer, len(x), 8)
    layer(x, jnp.array([1, 3]))
    return layer(x[:, :1])


def _causal(x: Any) -> Any:
    heads, mask = x[:, :, None], jnp.ones((3, 3), bool)
    return nnx.dot_product_attention_weights(heads, heads, mask=mask, is_causal=True)


def _pooled(x: Any) -> Any:
    return nnx.avg_pool(x, (2,), padding="SAME", count_include_pad=False)


@pytest.mark.parametrize(
    "call",
    [
        _decoded,
        _causal,
        _pooled,
        lambda x: nnx.RoPE()(x),
        lambda x: nnx.RoPE(embedding_size=4, max_seq_len=3)(x, jnp.array([0, 2, 1])),
        lambda x: nnx.rotary(x[:, :, None], jnp.arange(3)),
    ],
)
def test_no_layer_leaves_it_to_jax_to_add_axes(call: Any) -> None:
    x = jnp.arange(24.0).reshape(2, 3, 4) / 24
    with jax.numpy_rank_promotion("raise"):
        strict = call(x)
    np.testing.assert_array_equal(strict, call(x))


_SEEN = jnp.array([True, False, True])


def _of(name: str, *args: Any, **options: Any) -> Any:
    return getattr(nnx, name)(*args, rngs=nnx.Rngs(0), **options)


def _half(name: str, *args: Any, **options: Any) -> Any:
    return _of(name, *args, param_dtype=jnp.bfloat16, **options)


def _recurrent(cell: Any, **options: Any) -> Any:
    return nnx.RNN(cell, reverse=True, keep_order=True, **options)


def _averaged(x: Any) -> Any:
    metrics = nnx.metrics.Average(), nnx.metrics.Welford()
    for metric in metrics:
        metric.update(values=x)
    metrics[0].update(values=x, mask=_SEEN[:, None])
    return metrics[0].compute(), metrics[1].compute()


def _right(x: Any) -> Any:
    accuracy = nnx.metrics.Accuracy()
    accuracy.update(logits=x, labels=jnp.zeros((2, 3), jnp.int32))
    return accuracy.compute()


def _moving(x: Any) -> Any:
    model = _half("Linear", 4, 4)
    ema = nnx.EMA(model, jnp.float32(0.5))
    ema.update(model)
    return ema.apply_to(model)(x)


_OF_ONE_DTYPE: list[Any] = [
    lambda x: _of("BatchNorm", 4)(x, mask=_SEEN[:, None]),
    lambda x: _of("RMSNorm", 4)(x, mask=_SEEN[:, None]),
    lambda x: nnx.RoPE()(x, jnp.array([0, 2, 1])),
    lambda x: _recurrent(_of("GRUCell", 4, 4))(x, seq_lengths=jnp.array([1, 3])),
    lambda x: _of("Conv", 4, 4, 1, mask=jnp.ones((1, 4, 4), bool))(x),
    _averaged,
    _right,
]
_IN_HALF: list[Any] = [
    lambda x: _half("LayerNorm", 4)(x),
    lambda x: _half("GroupNorm", 4, 2)(x),
    lambda x: nnx.RoPE()(x),
    lambda x: _half("DecoderAttention", 4, 2)(x),
    lambda x: _half("MultiHeadAttention", 2, 4, decode=False)(x),
    lambda x: _recurrent(_half("GRUCell", 4, 4))(x),
    lambda x: _recurrent(_of("LSTMCell", 4, 4, dtype=jnp.bfloat16))(x),
    lambda x: _of("SpectralNorm", _half("Linear", 4, 4))(x),
    lambda x: _of("WeightNorm", _half("Linear", 4, 4), dtype=jnp.bfloat16)(x),
    lambda x: nnx.avg_pool(x, (2,)),
    lambda x: nnx.decoding.sample(x, jax.random.key(0), temperature=1.0, top_p=0.5),
    _averaged,
    _moving,
]


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize(
    ("call", "dtype"),
    [
        *((call, jnp.float32) for call in _OF_ONE_DTYPE),
        *((call, jnp.bfloat16) for call in _IN_HALF),
    ],
)
def test_what_a_layer_mixes_inside_is_no_mixture_of_the_program(
    call: Any, dtype: Any, x64: bool
) -> None:
    with jax.enable_x64(x64):
        x = jax.ShapeDtypeStruct((2, 3, 4), dtype)
        with jax.numpy_dtype_promotion("strict"):
            strict = jax.eval_shape(call, x)
        assert strict == jax.eval_shape(call, x)
