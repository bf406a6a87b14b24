"""RNN, Bidirectional and flipped sequences."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.errors import ArgumentError


class Sum(nnx.RNNCellBase):
    """A running sum, which counts its steps."""

    num_feature_axes = 1

    def __init__(self):
        self.steps = nnx.Variable(jnp.array(0))

    def initialize_carry(self, input_shape, rngs=None, carry_init=None):
        return jnp.full(input_shape, 100.0)

    def __call__(self, carry, inputs):
        self.steps[...] += 1
        return (carry + inputs,) * 2


X = jnp.arange(1.0, 7.0).reshape(2, 3, 1)  # two sequences of three steps


def test_a_cell_goes_along_time_and_is_left_as_the_last_step_leaves_it() -> None:
    layer = nnx.RNN(Sum(), return_carry=True)
    carry, y = layer(X)
    assert y[..., 0].tolist() == [[101.0, 103.0, 106.0], [104.0, 109.0, 115.0]]
    np.testing.assert_array_equal(carry, y[:, -1])
    assert int(layer.cell.steps[...]) == 3


def test_time_may_be_in_front() -> None:
    swapped = nnx.RNN(Sum(), time_major=True)(jnp.swapaxes(X, 0, 1))
    np.testing.assert_array_equal(jnp.swapaxes(swapped, 0, 1), nnx.RNN(Sum())(X))


def test_any_number_of_batch_axes_is_kept_with_lengths_too() -> None:
    x, lengths = jnp.stack([X, X + 1]), jnp.array([[1, 3], [0, 2]])
    carry, y = nnx.RNN(Sum(), return_carry=True)(x, seq_lengths=lengths)
    flat_carry, flat_y = nnx.RNN(Sum(), return_carry=True)(
        x.reshape(4, 3, 1), seq_lengths=lengths.ravel()
    )
    np.testing.assert_array_equal(y.reshape(4, 3, 1), flat_y)
    np.testing.assert_array_equal(carry.reshape(4, 1), flat_carry)


def test_padding_has_no_part_in_the_carry_and_an_empty_sequence_keeps_its_first() -> (
    None
):
    layer = nnx.RNN(Sum(), return_carry=True)
    start = jnp.array([[1.0], [2.0]])
    carry, _ = layer(X, initial_carry=start, seq_lengths=jnp.array([0, 2]))
    assert carry[:, 0].tolist() == [1.0, 2.0 + 4.0 + 5.0]


def test_reversed_outputs_lie_backwards_unless_order_is_kept() -> None:
    lengths = jnp.array([2, 3])
    back = nnx.RNN(Sum(), reverse=True)(X, seq_lengths=lengths)[..., 0]
    assert back[0, :2].tolist() == [102.0, 103.0]
    kept = nnx.RNN(Sum(), reverse=True, keep_order=True)(X, seq_lengths=lengths)[..., 0]
    assert kept[0, :2].tolist() == [103.0, 102.0]
    assert kept[1].tolist() == [115.0, 111.0, 106.0]


def test_options_of_a_call_win_over_those_of_the_layer() -> None:
    layer = nnx.RNN(Sum(), return_carry=True, reverse=True, time_major=True)
    y = layer(X, return_carry=False, reverse=False, time_major=False)
    np.testing.assert_array_equal(y, nnx.RNN(Sum())(X))


def test_an_eager_call_is_traced_once(capsys) -> None:
    """Later calls of any layer of the same form run what the first compiled."""

    class Cell(Sum):
        def __call__(self, carry, inputs):
            print("traced")  # noqa: T201
            return super().__call__(carry, inputs)

    nnx.RNN(Cell())(X)
    assert "traced" in capsys.readouterr().out
    nnx.RNN(Cell())(X + 1)
    assert not capsys.readouterr().out


def test_an_error_in_a_step_leaves_the_cell_as_it_was() -> None:
    class Widening(Sum):
        def __call__(self, carry, inputs):
            super().__call__(carry, inputs)
            return carry.astype(jnp.bfloat16), carry

    layer = nnx.RNN(Widening())
    with pytest.raises(
        nnx.errors.LoopError, match=r"carry: float32\[2,1\] -> bfloat16"
    ):
        layer(X)
    assert int(layer.cell.steps[...]) == 0


def test_streams_for_carries_come_in_many_forms() -> None:
    rngs = nnx.Rngs(0, carry=1)
    assert nnx.RNN(Sum(), rngs=False).rngs is None
    assert int(nnx.RNN(Sum()).rngs.count[...]) == 0
    assert nnx.RNN(Sum(), rngs=rngs.carry).rngs is rngs.carry
    forked = nnx.RNN(Sum(), rngs=rngs).rngs
    assert forked is not rngs.carry
    assert int(rngs.carry.count[...]) == 1
    for make in (nnx.RNN, lambda c, rngs: nnx.Bidirectional(c, c, rngs=rngs)):
        with pytest.raises(
            ArgumentError, match=r"rngs must be an Rngs, a stream, True"
        ):
            make(Sum(), rngs=3)


def test_inputs_and_lengths_that_do_not_fit_are_refused() -> None:
    layer = nnx.RNN(Sum())
    with pytest.raises(ArgumentError, match=r"at least 2 axes, time and features"):
        layer(jnp.ones(3))
    message = r"seq_lengths are integers .* batch's shape \(2,\).*; found {}"
    for lengths, shown in ((jnp.ones(2), r"float32\[2\]"), ([1, 2, 3], r"int32\[3\]")):
        with pytest.raises(ArgumentError, match=message.format(shown)):
            layer(X, seq_lengths=lengths)


def test_both_directions_see_each_sequence_and_not_its_padding() -> None:
    layer = nnx.Bidirectional(nnx.RNN(Sum()), nnx.RNN(Sum()))
    padded = X.at[0, 2].set(1000.0)
    y = layer(padded, seq_lengths=jnp.array([2, 3]))
    assert y[0, :2].tolist() == [[101.0, 103.0], [103.0, 102.0]]
    carry, _ = layer(padded, seq_lengths=jnp.array([2, 3]), return_carry=True)
    assert [c[:, 0].tolist() for c in carry] == [[103.0, 115.0]] * 2


def test_outputs_of_both_directions_are_joined_as_said() -> None:
    layer = nnx.Bidirectional(nnx.RNN(Sum()), nnx.RNN(Sum()), merge_fn=jnp.subtract)
    start = (jnp.zeros((2, 1)), jnp.ones((2, 1)))
    y = layer(X, initial_carry=start)
    assert y[0, :, 0].tolist() == [1.0 - 7.0, 3.0 - 6.0, 6.0 - 4.0]


@pytest.mark.parametrize("time_major", [False, True])
def test_flipping_twice_gives_the_sequence_back(time_major: bool) -> None:
    x = jnp.arange(24).reshape((3, 2, 4) if time_major else (2, 3, 4))
    for given in (None, jnp.array([2, 3])):
        once = nnx.flip_sequences(x, given, 1, time_major)
        assert not jnp.array_equal(once, x)
        np.testing.assert_array_equal(nnx.flip_sequences(once, given, 1, time_major), x)


@pytest.mark.parametrize("reverse", [False, True])
def test_no_step_at_all_gives_the_first_carry(reverse) -> None:
    rnn = nnx.RNN(nnx.LSTMCell(3, 4, rngs=nnx.Rngs(0)), reverse=reverse)
    carry = (jnp.ones((2, 4)), jnp.full((2, 4), 2.0))
    last, out = rnn(
        jnp.zeros((2, 0, 3)),
        initial_carry=carry,
        seq_lengths=jnp.zeros(2, int),
        return_carry=True,
        keep_order=True,
    )
    assert out.shape == (2, 0, 4)
    for a, b in zip(last, carry, strict=True):
        assert (a == b).all()


@pytest.mark.parametrize("lengths", [[4, 1], [3, -1]])
def test_lengths_that_no_sequence_can_have_are_refused(lengths) -> None:
    layer = nnx.RNN(nnx.SimpleCell(2, 4, rngs=nnx.Rngs(0)), reverse=True)
    with pytest.raises(ArgumentError, match=r"from 0 to 3 .* found sequence [01] has"):
        layer(jnp.ones((2, 3, 2)), seq_lengths=jnp.array(lengths))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint64"])
def test_lengths_may_be_of_any_integer_dtype(dtype: str) -> None:
    x = jnp.arange(600.0).reshape(2, 300, 1)
    with jax.enable_x64(dtype == "uint64"):
        lengths = jnp.array([3, 100], dtype)
        back = nnx.RNN(Sum(), reverse=True, keep_order=True)(
            x, seq_lengths=lengths, initial_carry=jnp.zeros_like(x[:, 0])
        )
        flipped = nnx.flip_sequences(x, lengths, num_batch_dims=1, time_major=False)
    assert back[1, 0, 0] == x[1, :100].sum()
    np.testing.assert_array_equal(flipped[1, :100], x[1, 99::-1])


def test_lengths_known_only_in_a_trace_end_where_the_sequences_end() -> None:
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 2)), jnp.float32)
    cell = nnx.SimpleCell(2, 4, rngs=nnx.Rngs(0))
    layer = nnx.RNN(cell, reverse=True, return_carry=True)
    run = nnx.jit(lambda layer, x, n: layer(x, seq_lengths=n))
    carry, outputs = run(layer, x, jnp.array([9, -2]))
    same, others = layer(x, seq_lengths=jnp.array([3, 0]))
    np.testing.assert_array_equal(carry, same)
    np.testing.assert_array_equal(outputs, others)


@pytest.mark.parametrize("time_major", [False, True])
def test_sequences_longer_than_they_are_cannot_be_flipped(time_major: bool) -> None:
    x = jnp.arange(6).reshape(2, 3)
    x = x.T if time_major else x
    with pytest.raises(ArgumentError, match=r"from 0 to 3 .* found sequence 0 has 9"):
        nnx.flip_sequences(x, jnp.array([9, 1]), 1, time_major)


def test_each_device_goes_through_its_part_of_the_batch():
    layer = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("data",), axis_types=auto)
    specs = {"in_specs": (jax.P(), jax.P("data")), "out_specs": jax.P("data")}
    out = nnx.jit(nnx.shard_map(lambda m, x: m(x), mesh=mesh, **specs))(layer, x)
    np.testing.assert_allclose(out, layer(x), atol=1e-6)
