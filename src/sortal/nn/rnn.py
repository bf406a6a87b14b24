"""RNN and Bidirectional: cells applied along a sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sortal._engine.jax_compat import varying_axes
from sortal._engine.variable import RngState, describe
from sortal.errors import ArgumentError
from sortal.filters import All
from sortal.module import Module
from sortal.nn import dtypes
from sortal.nn.recurrent import RNNBase, RNNCellBase
from sortal.random import Rngs, RngStream, is_rngs, is_stream, split_rngs
from sortal.sharding.mesh_axes import varying_along
from sortal.transforms._adapter.prefixes import Carry, StateAxes
from sortal.transforms.scan import scan


class RNN(Module):
    """Applies a cell along a sequence, by ``scan``.

    Args:
      cell: the cell.
      time_major: whether the first axis is time; else it is the one before the
        features.
      return_carry: whether calls return the last carry too.
      reverse: whether to go through the sequence from its end.
      keep_order: whether reversed outputs have the order of the inputs.
      unroll: as for ``jax.lax.scan``.
      state_axes: the axis in the scan of each kind of the cell, as for ``StateAxes``;
        ``Carry`` for all if absent.
      broadcast_rngs: a filter of the cell's streams that draw the same at each step.
      rngs: streams, of which a fork of ``carry`` makes new carries; True for a stream
        of seed 0, False for none.

    Raises:
      ArgumentError: ``rngs`` is none of these; at a call, the input has too few axes.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> rnn = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), return_carry=True)
      >>> carry, y = rnn(jnp.ones((2, 5, 3)))
      >>> carry.shape, y.shape
      ((2, 4), (2, 5, 4))
    """

    def __init__(
        self,
        cell: RNNCellBase,
        *,
        time_major: bool = False,
        return_carry: bool = False,
        reverse: bool = False,
        keep_order: bool = False,
        unroll: int = 1,
        state_axes: Mapping[Any, Any] | StateAxes | None = None,
        broadcast_rngs: Any = None,
        rngs: Rngs | RngStream | bool = True,
    ):
        self.cell = cell
        self.time_major = time_major
        self.return_carry = return_carry
        self.reverse = reverse
        self.keep_order = keep_order
        self.unroll = unroll
        self.rngs = _carry_stream("RNN", rngs)
        axes = {...: Carry} if state_axes is None else state_axes
        self.state_axes = axes if isinstance(axes, StateAxes) else StateAxes(axes)
        self.broadcast_rngs = broadcast_rngs

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: Any = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
        rngs: Rngs | RngStream | None = None,
    ) -> Any:
        """Applies the cell at each time.

        Args:
          inputs: array (*batch, time, *features), or (time, *batch, *features) where
            ``time_major``.
          initial_carry: the carry before the first step; the cell's
            ``initialize_carry`` if absent.
          seq_lengths: integers (*batch,), from 0 to the number of steps, inside a
            transform the nearest of these: the rest of each sequence is padding, which
            stays at the end when reversed and does not change the carry returned.
          return_carry: whether to return the last carry; the layer's own if absent.
          time_major: which axis is time; the layer's own if absent.
          reverse: whether to begin at the end; the layer's own if absent.
          keep_order: whether outputs keep the inputs' order; the layer's own if absent.
          rngs: streams, of which ``carry`` is forked, or a stream, for a new carry; the
            layer's own if absent.

        Returns:
          The outputs, time where it is in the inputs; or the last carry, (*batch, ...),
          and the outputs.

        Raises:
          ArgumentError: the input has too few axes, or lengths are not one for each
            sequence.
        """
        return_carry = self.return_carry if return_carry is None else return_carry
        time_major = self.time_major if time_major is None else time_major
        reverse = self.reverse if reverse is None else reverse
        keep_order = self.keep_order if keep_order is None else keep_order
        x = dtypes.as_array(self, inputs)
        n_batch = x.ndim - self.cell.num_feature_axes - 1
        if n_batch < 0:
            raise ArgumentError(
                f"RNN needs an input of at least {self.cell.num_feature_axes + 1} "
                f"axes, time and features; found {describe(x)}."
            )
        axis = 0 if time_major else n_batch
        step_shape = (*x.shape[:axis], *x.shape[axis + 1 :])
        if seq_lengths is not None:
            batch, steps = step_shape[:n_batch], x.shape[axis]
            name = "RNN: seq_lengths"
            seq_lengths = dtypes.checked_lengths(name, seq_lengths, batch, steps)
        flip = functools.partial(
            flip_sequences,
            seq_lengths=seq_lengths,
            num_batch_dims=n_batch,
            time_major=time_major,
        )
        carry = initial_carry
        if carry is None:
            rngs = self.rngs if rngs is None else rngs
            stream = rngs.carry.fork() if is_rngs(rngs) else rngs
            carry = self.cell.initialize_carry(step_shape, stream)
            # Inside of shard_map the state of each device is its own after a step.
            own = functools.partial(varying_along, varying_axes(x))
            carry = jax.tree.map(own, carry)
        keep_all = seq_lengths is not None and return_carry
        last, outputs = self._scanned(carry, flip(x) if reverse else x, axis, keep_all)
        if keep_all:
            carries, outputs = outputs
            last = _last_carry(carries, carry, seq_lengths)
        if reverse and keep_order:
            outputs = jax.tree.map(flip, outputs)
        return (last, outputs) if return_carry else outputs

    def _scanned(self, carry: Any, x: Any, axis: int, keep_all: bool) -> Any:
        """The last carry, and the outputs or the pair of all carries and outputs."""
        shared = All(RngState, self.broadcast_rngs)
        axes = StateAxes([(shared, None), *self.state_axes.items()])
        steps = _scan(keep_all, axis, self.unroll, axes)
        # New keys at each call of the layer, but the same at each step.
        options = {"splits": 1, "only": self.broadcast_rngs, "squeeze": True}
        with split_rngs(self.cell, **options):
            return steps(self.cell, carry, x)


def _step(cell: RNNCellBase, carry: Any, x: Any) -> Any:
    return cell(carry, x)


def _step_keeping_all(cell: RNNCellBase, carry: Any, x: Any) -> Any:
    carry, y = cell(carry, x)
    return carry, (carry, y)


@functools.lru_cache(maxsize=64)
def _scan(keep_all: bool, axis: int, unroll: int, axes: StateAxes) -> Any:
    """The scan of a cell, cached, because it caches what it compiled."""
    return scan(
        _step_keeping_all if keep_all else _step,
        in_axes=(axes, Carry, axis),
        out_axes=(Carry, (0, axis) if keep_all else axis),
        unroll=unroll,
    )


def _carry_stream(owner: str, rngs: Any) -> RngStream | None:
    """The stream that a layer keeps for new carries."""
    if rngs is True:
        return RngStream(0, tag="carry")
    if is_rngs(rngs):
        return rngs.carry.fork()
    if is_stream(rngs):
        return rngs
    if rngs is False:
        return None
    raise ArgumentError(
        f"{owner}: rngs must be an Rngs, a stream, True or False; found "
        f"{describe(rngs)}. Write rngs=nnx.Rngs(0)."
    )


def _last_carry(carries: Any, initial: Any, lengths: Any) -> Any:
    """The carry after each sequence's last step; ``carries`` have time in front."""
    if not len(jax.tree.leaves(carries)[0]):
        return initial  # there is no step
    last = jnp.maximum(lengths - 1, 0)
    places = (last, *jnp.indices(lengths.shape))

    def pick(every: Any, start: Any) -> Any:
        tail = (1,) * (every.ndim - 1 - lengths.ndim)
        empty = (lengths == 0).reshape((*lengths.shape, *tail))
        return jnp.where(empty, start, every[places])

    return jax.tree.map(pick, carries, initial)


def flip_sequences(
    inputs: Any, seq_lengths: Any, num_batch_dims: int, time_major: bool
) -> jax.Array:
    """Reverses sequences in time; their padding stays at the end.

    Args:
      inputs: array (*batch, time, ...), or (time, *batch, ...) where ``time_major``.
      seq_lengths: integers (*batch,), the lengths without padding, at most that of
        time; None where there is none.
      num_batch_dims: how many axes are the batch.
      time_major: whether time is in front.

    Returns:
      Array of the shape of ``inputs``.

    Raises:
      ArgumentError: lengths are not one for each sequence, or too large.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> x = jnp.array([[1, 0, 0], [2, 3, 0], [4, 5, 6]])
      >>> nnx.flip_sequences(x, jnp.array([1, 2, 3]), 1, False).tolist()
      [[1, 0, 0], [3, 2, 0], [6, 5, 4]]
    """
    axis = 0 if time_major else num_batch_dims
    if seq_lengths is None:
        return jnp.flip(inputs, axis=axis)
    steps = inputs.shape[axis]
    batch = (*inputs.shape[:axis], *inputs.shape[axis + 1 : num_batch_dims + 1])
    name = "flip_sequences: seq_lengths"
    seq_lengths = dtypes.checked_lengths(name, seq_lengths, batch, steps)
    if not steps:
        return jnp.asarray(inputs)
    backwards = jnp.arange(steps - 1, -1, -1, dtype=seq_lengths.dtype)
    places = backwards.reshape(
        [-1 if i == axis else 1 for i in range(num_batch_dims + 1)]
    )
    places = (places + jnp.expand_dims(seq_lengths, axis)) % steps
    places = places.reshape(places.shape + (1,) * (inputs.ndim - places.ndim))
    return jnp.take_along_axis(inputs, places, axis=axis)


def _concatenate(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.concatenate([a, b], axis=-1)


class Bidirectional(Module):
    """Applies two RNNs, one in each direction, and joins the outputs.

    Args:
      forward_rnn: an RNN, or another callable like it.
      backward_rnn: another one, called with ``reverse=True`` and ``keep_order=True``.
        The same one shares its parameters.
      merge_fn: joins the two outputs; by default, concatenates their features.
      time_major: whether the first axis is time.
      return_carry: whether calls return the last carries too.
      rngs: streams, of which a fork of ``carry`` makes new carries; a stream; True for
        one of seed 0, False for none.

    Raises:
      ArgumentError: ``rngs`` is none of these.

    References:
      Schuster and Paliwal, "Bidirectional recurrent neural networks", IEEE
      Transactions on Signal Processing 45 (1997).

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0)
      >>> cells = [nnx.GRUCell(3, 4, rngs=rngs) for _ in range(2)]
      >>> layer = nnx.Bidirectional(*map(nnx.RNN, cells))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 8)
    """

    def __init__(
        self,
        forward_rnn: RNNBase,
        backward_rnn: RNNBase,
        *,
        merge_fn: Callable[[jax.Array, jax.Array], jax.Array] = _concatenate,
        time_major: bool = False,
        return_carry: bool = False,
        rngs: Rngs | RngStream | bool = True,
    ):
        self.forward_rnn = forward_rnn
        self.backward_rnn = backward_rnn
        self.merge_fn = merge_fn
        self.time_major = time_major
        self.return_carry = return_carry
        self.rngs = _carry_stream("Bidirectional", rngs)

    def __call__(
        self,
        inputs: Any,
        *,
        initial_carry: tuple[Any, Any] | None = None,
        rngs: Rngs | RngStream | None = None,
        seq_lengths: Any = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any:
        """Applies both.

        Args:
          inputs: array (*batch, time, *features), or (time, *batch, *features) where
            ``time_major``.
          initial_carry: the pair of carries before the first step.
          rngs: streams, of which ``carry`` is taken, or a stream, for new carries; the
            layer's own if absent.
          seq_lengths: integers (*batch,): the rest of each sequence is padding.
          return_carry: whether to return the last carries; the layer's own if absent.
          time_major: which axis is time; the layer's own if absent.
          reverse: ignored; for NNX compatibility.
          keep_order: ignored; for NNX compatibility.

        Returns:
          The outputs; or the pair of last carries, and the outputs.

        Raises:
          ArgumentError: as for ``RNN``.
        """
        rngs = self.rngs if rngs is None else rngs
        first, second = (None, None) if initial_carry is None else initial_carry
        options = {
            "rngs": rngs.carry if is_rngs(rngs) else rngs,
            "seq_lengths": seq_lengths,
            "return_carry": True,
            "time_major": self.time_major if time_major is None else time_major,
        }
        carry_forward, forward = self.forward_rnn(
            inputs, initial_carry=first, reverse=False, **options
        )
        carry_backward, backward = self.backward_rnn(
            inputs, initial_carry=second, reverse=True, keep_order=True, **options
        )
        outputs = jax.tree.map(self.merge_fn, forward, backward)
        if self.return_carry if return_carry is None else return_carry:
            return (carry_forward, carry_backward), outputs
        return outputs
