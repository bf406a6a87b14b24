"""Cells of recurrent networks: one step in time."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sortal._engine.promotion import mixing, wide
from sortal._engine.variable import describe
from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes
from sortal.nn.activations import sigmoid, tanh
from sortal.nn.initializers import (
    NO_METADATA,
    NO_RNGS,
    Initializer,
    Metadata,
    check_sizes,
    default_bias_init,
    default_kernel_init,
    orthogonal,
    zeros,
)
from sortal.nn.linear import Linear
from sortal.random import Rngs, RngStream, is_rngs, is_stream


def modified_orthogonal(
    key: jax.Array, shape: Sequence[int], dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """Orthogonal matrices in any floating-point dtype.

    JAX makes none in half precision, so they are made in JAX's default dtype and cast.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> w = modified_orthogonal(jax.random.key(0), (3, 3), jnp.bfloat16)
      >>> w.dtype, bool(jnp.allclose(w @ w.T, jnp.eye(3), atol=0.05))
      (dtype(bfloat16), True)
    """
    return orthogonal()(key, shape).astype(dtype)


def _orthogonal(key: jax.Array, shape: Sequence[int], dtype: DTypeLike) -> jax.Array:
    """``orthogonal``, also in half precision, which JAX lacks."""
    return orthogonal()(key, shape, wide(dtype)).astype(dtype)


class RNNBase(Protocol):
    """What ``Bidirectional`` calls: ``RNN``, or another callable like it."""

    def __call__(
        self,
        inputs: jax.Array,
        *,
        initial_carry: Any = None,
        rngs: Any = None,
        seq_lengths: jax.Array | None = None,
        return_carry: bool | None = None,
        time_major: bool | None = None,
        reverse: bool | None = None,
        keep_order: bool | None = None,
    ) -> Any: ...


class RNNCellBase(Module):
    """Base of cells, which make a carry and apply one step to it.

    A subclass has ``initialize_carry``, ``num_feature_axes`` and a call of
    (carry, inputs) that returns (carry, output).

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> class Sum(nnx.RNNCellBase):
      ...     num_feature_axes = 1
      ...     def initialize_carry(self, input_shape, rngs=None, carry_init=None):
      ...         return jnp.zeros(input_shape)
      ...     def __call__(self, carry, inputs):
      ...         return (carry + inputs,) * 2
      >>> nnx.RNN(Sum())(jnp.ones((1, 3, 1))).ravel().tolist()
      [1.0, 2.0, 3.0]
    """

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: Rngs | RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Any:
        """The carry before the first step.

        Args:
          input_shape: shape (*batch, *features) of the input of one step.
          rngs: streams, of which ``carry`` is taken, or a stream.
          carry_init: its initialiser.

        Returns:
          The carry: an array or pytree.

        Raises:
          NotImplementedError: the class does not define it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define initialize_carry(input_shape, "
            "rngs, carry_init)."
        )

    def __call__(self, carry: Any, inputs: Any) -> tuple[Any, Any]:
        """One step.

        Args:
          carry: the carry after the step before.
          inputs: array (*batch, *features).

        Returns:
          The carry, and the output.

        Raises:
          NotImplementedError: the class does not define it.
        """
        raise NotImplementedError(
            f"{type(self).__name__} does not define __call__(carry, inputs)."
        )

    @property
    def num_feature_axes(self) -> int:
        """How many of the input's last axes are features, not batch."""
        raise NotImplementedError(
            f"{type(self).__name__} does not define num_feature_axes."
        )


class _Cell(RNNCellBase):
    """Cells whose carry is one or more arrays (*batch, hidden_features)."""

    _arrays = 1

    in_features: int
    hidden_features: int
    dtype: DTypeLike | None
    param_dtype: DTypeLike
    promote_dtype: dtypes.PromoteDtype
    carry_init: Initializer | None

    def _begin(self, given: Mapping[str, Any]) -> None:
        """Sets the attributes above from the constructor's ``locals()``."""
        for name in _Cell.__annotations__:
            setattr(self, name, given[name])
        check_sizes(
            self, in_features=self.in_features, hidden_features=self.hidden_features
        )
        self.rngs = given["rngs"].carry.fork() if given["keep_rngs"] else None

    def _linear(
        self, given: Mapping[str, Any], name: str, gates: int = 1, *, bias: bool = False
    ) -> Linear:
        """A map to all gates, by ``kernel`` or ``recurrent_kernel``."""
        options: dict[str, Any] = {"use_bias": False}
        if bias:
            options = {n: given[n] for n in ("bias_init", "bias_metadata")}
        return Linear(
            self.in_features if name == "kernel" else self.hidden_features,
            gates * self.hidden_features,
            kernel_init=given[f"{name}_init"],
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            promote_dtype=self.promote_dtype,
            rngs=given["rngs"],
            kernel_metadata=given[f"{name}_metadata"],
            **options,
        )

    def initialize_carry(
        self,
        input_shape: tuple[int, ...],
        rngs: Rngs | RngStream | None = None,
        carry_init: Initializer | None = None,
    ) -> Any:
        """The carry before the first step; a pair of arrays for LSTM cells.

        Without ``carry_init``, that of the cell is used, or else zeros.
        """
        rngs = self.rngs if rngs is None else rngs
        stream = rngs.carry if is_rngs(rngs) else rngs
        if not is_stream(stream):
            raise ArgumentError(
                f"{type(self).__name__}.initialize_carry needs an Rngs or a stream; "
                f"found rngs={describe(rngs)}. Write cell.initialize_carry(shape, "
                "nnx.Rngs(0))."
            )
        init = carry_init or self.carry_init or zeros
        shape = (*input_shape[:-1], self.hidden_features)
        carry = tuple(
            init(stream(), shape, self.param_dtype) for _ in range(self._arrays)
        )
        return carry if self._arrays > 1 else carry[0]

    def _check(self, carry: Any, inputs: Any) -> None:
        """Refuses a carry that is no pair where one is due, or of another batch."""
        name, arrays = type(self).__name__, (carry,) if self._arrays == 1 else carry
        if not isinstance(arrays, (tuple, list)) or len(arrays) != self._arrays:
            raise ArgumentError(
                f"{name}: the carry, given first, is a pair, found {describe(carry)}."
            )
        try:
            jnp.broadcast_shapes(*(jnp.shape(x)[:-1] for x in (*arrays, inputs)))
        except ValueError:
            found = ", ".join(map(describe, arrays))
            raise ArgumentError(
                f"{name}: the carry {found} is not of the batch of the inputs "
                f"{describe(inputs)}. Write initialize_carry(inputs.shape, rngs)."
            ) from None

    @property
    def num_feature_axes(self) -> int:
        return 1


class _LSTM(_Cell):
    """The arithmetic of LSTM cells."""

    _arrays = 2
    gate_fn: Callable[..., Any]
    activation_fn: Callable[..., Any]

    def __call__(
        self, carry: tuple[Any, Any], inputs: Any
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        """One step.

        Args:
          carry: memory and output of the step before, each (*batch, hidden_features).
          inputs: array (*batch, in_features).

        Returns:
          The carry, and the output (*batch, hidden_features).

        Raises:
          ArgumentError: the carry is no pair, or of another batch than the inputs.
        """
        self._check(carry, inputs)
        memory, h = carry
        i, f, g, o = self._gates(inputs, h)
        i, f, o = self.gate_fn(i), self.gate_fn(f), self.gate_fn(o)
        memory = _gated(f, memory, i, self.activation_fn(g))
        h = _gated(o, self.activation_fn(memory))
        return (memory, h), h

    def _gates(self, inputs: Any, h: Any) -> Any:
        """The inputs of the gates i, f, g and o."""
        raise NotImplementedError


@mixing
def _gated(gate: Any, x: Any, other_gate: Any = None, other: Any = None) -> Any:
    """What gates let through; the carry may have another dtype than the gates."""
    return gate * x if other is None else gate * x + other_gate * other


class LSTMCell(_LSTM):
    r"""Long short-term memory, with a kernel for each gate.

    ``i, f, o = gate_fn(W x + V h + b)`` and ``g = activation_fn(W x + V h + b)``, each
    with its own W, V and b; then ``c' = f * c + i * g``, and
    ``h' = o * activation_fn(c')``.

    Args:
      in_features: size of the input's last axis.
      hidden_features: size of the carry's and the output's last axis.
      gate_fn: activation of i, f and o.
      activation_fn: activation of g and the output.
      kernel_init: initialiser of the input's kernels, (in_features, hidden_features):
        ``ii``, ``if_``, ``ig`` and ``io``.
      recurrent_kernel_init: initialiser of the carry's kernels, (hidden_features,
        hidden_features): ``hi``, ``hf``, ``hg`` and ``ho``.
      bias_init: initialiser of the biases, (hidden_features,), of the latter.
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the parameters and of a new carry.
      carry_init: initialiser of a new carry; zeros if absent.
      promote_dtype: casts (inputs, kernel, bias) to one dtype.
      keep_rngs: whether to fork the stream ``carry`` for new carries.
      rngs: gives the keys of stream ``params``.
      kernel_metadata: metadata of the input's kernels.
      recurrent_kernel_metadata: metadata of the carry's kernels.
      bias_metadata: metadata of the biases.

    Raises:
      ArgumentError: a size or ``rngs`` is invalid; at a call, the input has another
        number of features.

    References:
      Hochreiter and Schmidhuber, "Long short-term memory", Neural Computation 9
      (1997); with the forget gate of Gers et al. (2000).

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0)
      >>> cell = nnx.LSTMCell(3, 4, rngs=rngs)
      >>> carry, y = cell(cell.initialize_carry((2, 3), rngs), jnp.ones((2, 3)))
      >>> y.shape
      (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = sigmoid,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = modified_orthogonal,
        bias_init: Initializer = default_bias_init,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs = NO_RNGS,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ):
        given = locals()
        self._begin(given)
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self.ii, self.if_, self.ig, self.io = (
            self._linear(given, "kernel") for _ in range(4)
        )
        self.hi, self.hf, self.hg, self.ho = (
            self._linear(given, "recurrent_kernel", bias=True) for _ in range(4)
        )

    def _gates(self, inputs: Any, h: Any) -> Any:
        return (
            self.ii(inputs) + self.hi(h),
            self.if_(inputs) + self.hf(h),
            self.ig(inputs) + self.hg(h),
            self.io(inputs) + self.ho(h),
        )


class OptimizedLSTMCell(_LSTM):
    """Long short-term memory as in ``LSTMCell``, with one kernel for all gates.

    Args:
      in_features: size of the input's last axis.
      hidden_features: size of the carry's and the output's last axis.
      gate_fn: activation of i, f and o.
      activation_fn: activation of g and the output.
      kernel_init: initialiser of ``dense_i.kernel``, (in_features,
        4 * hidden_features), in the order i, f, g, o.
      recurrent_kernel_init: initialiser of ``dense_h.kernel``, (hidden_features,
        4 * hidden_features); orthogonal by default.
      bias_init: initialiser of ``dense_h.bias``, (4 * hidden_features,).
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the parameters and of a new carry.
      carry_init: initialiser of a new carry; zeros if absent.
      promote_dtype: casts (inputs, kernel, bias) to one dtype.
      keep_rngs: whether to fork the stream ``carry`` for new carries.
      rngs: gives the keys of stream ``params``.
      kernel_metadata: metadata of ``dense_i.kernel``.
      recurrent_kernel_metadata: metadata of ``dense_h.kernel``.
      bias_metadata: metadata of the bias.

    Raises:
      ArgumentError: a size or ``rngs`` is invalid; at a call, the input has another
        number of features.

    References:
      As for ``LSTMCell``.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> rnn = nnx.RNN(nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0)))
      >>> rnn(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = sigmoid,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = _orthogonal,
        bias_init: Initializer = default_bias_init,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs = NO_RNGS,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ):
        given = locals()
        self._begin(given)
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self.dense_i = self._linear(given, "kernel", gates=4)
        self.dense_h = self._linear(given, "recurrent_kernel", gates=4, bias=True)

    def _gates(self, inputs: Any, h: Any) -> Any:
        return jnp.split(self.dense_i(inputs) + self.dense_h(h), 4, axis=-1)


class SimpleCell(_Cell):
    """One tanh layer: ``h' = activation_fn(W x + b + V h)``, plus ``h`` if residual.

    Args:
      in_features: size of the input's last axis.
      hidden_features: size of the carry's and the output's last axis.
      dtype: dtype of the computation.
      param_dtype: dtype of the parameters and of a new carry.
      carry_init: initialiser of a new carry; zeros if absent.
      residual: whether ``h`` is added before ``activation_fn``.
      activation_fn: activation of the sum.
      kernel_init: initialiser of ``dense_i.kernel``, (in_features, hidden_features).
      recurrent_kernel_init: initialiser of ``dense_h.kernel``, (hidden_features,
        hidden_features); orthogonal by default.
      bias_init: initialiser of ``dense_i.bias``, (hidden_features,).
      promote_dtype: casts (inputs, kernel, bias) to one dtype.
      keep_rngs: whether to fork the stream ``carry`` for new carries.
      rngs: gives the keys of stream ``params``.
      kernel_metadata: metadata of ``dense_i.kernel``.
      recurrent_kernel_metadata: metadata of ``dense_h.kernel``.
      bias_metadata: metadata of the bias.

    Raises:
      ArgumentError: a size or ``rngs`` is invalid; at a call, the input has another
        number of features.

    References:
      Elman, "Finding structure in time", Cognitive Science 14 (1990).

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> cell = nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0))
      >>> carry, y = cell(jnp.zeros((2, 4)), jnp.ones((2, 3)))
      >>> bool((carry == y).all())
      True
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        residual: bool = False,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = _orthogonal,
        bias_init: Initializer = default_bias_init,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs = NO_RNGS,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ):
        given = locals()
        self._begin(given)
        self.residual = residual
        self.activation_fn = activation_fn
        self.dense_h = self._linear(given, "recurrent_kernel")
        self.dense_i = self._linear(given, "kernel", bias=True)

    def __call__(self, carry: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        """One step.

        Args:
          carry: array (*batch, hidden_features), the output of the step before.
          inputs: array (*batch, in_features).

        Returns:
          The carry, and the output, which are one array (*batch, hidden_features).

        Raises:
          ArgumentError: the carry is of another batch than the inputs.
        """
        self._check(carry, inputs)
        new = self.dense_i(inputs) + self.dense_h(carry)
        if self.residual:
            new = mixing(operator.add)(new, carry)
        new = self.activation_fn(new)
        return new, new


class GRUCell(_Cell):
    """Gated recurrent unit.

    ``r = gate_fn(W x + b + V h)``, ``z`` likewise,
    ``n = activation_fn(W x + b + r * (V h))``, each with its own W, V and b; then
    ``h' = (1 - z) * n + z * h``.

    Args:
      in_features: size of the input's last axis.
      hidden_features: size of the carry's and the output's last axis.
      gate_fn: activation of r and z.
      activation_fn: activation of n.
      kernel_init: initialiser of ``dense_i.kernel``, (in_features,
        3 * hidden_features), in the order r, z, n.
      recurrent_kernel_init: initialiser of ``dense_h.kernel``, (hidden_features,
        3 * hidden_features); orthogonal by default.
      bias_init: initialiser of ``dense_i.bias``, (3 * hidden_features,).
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the parameters and of a new carry.
      carry_init: initialiser of a new carry; zeros if absent.
      promote_dtype: casts (inputs, kernel, bias) to one dtype.
      keep_rngs: whether to fork the stream ``carry`` for new carries.
      rngs: gives the keys of stream ``params``.
      kernel_metadata: metadata of ``dense_i.kernel``.
      recurrent_kernel_metadata: metadata of ``dense_h.kernel``.
      bias_metadata: metadata of the bias.

    Raises:
      ArgumentError: a size or ``rngs`` is invalid; at a call, the input has another
        number of features.

    References:
      Cho et al., arXiv:1406.1078, section 2.3; r after V as in cuDNN.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
      >>> carry, y = cell(jnp.zeros((2, 4)), jnp.ones((2, 3)))
      >>> y.shape
      (2, 4)
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        *,
        gate_fn: Callable[..., Any] = sigmoid,
        activation_fn: Callable[..., Any] = tanh,
        kernel_init: Initializer = default_kernel_init,
        recurrent_kernel_init: Initializer = _orthogonal,
        bias_init: Initializer = default_bias_init,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        carry_init: Initializer | None = None,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        keep_rngs: bool = False,
        rngs: Rngs = NO_RNGS,
        kernel_metadata: Metadata = NO_METADATA,
        recurrent_kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ):
        given = locals()
        self._begin(given)
        self.gate_fn = gate_fn
        self.activation_fn = activation_fn
        self.dense_i = self._linear(given, "kernel", gates=3, bias=True)
        self.dense_h = self._linear(given, "recurrent_kernel", gates=3)

    def __call__(self, carry: Any, inputs: Any) -> tuple[jax.Array, jax.Array]:
        """One step.

        Args:
          carry: array (*batch, hidden_features), the output of the step before.
          inputs: array (*batch, in_features).

        Returns:
          The carry, and the output, which are one array (*batch, hidden_features).

        Raises:
          ArgumentError: the carry is of another batch than the inputs.
        """
        self._check(carry, inputs)
        r, z, n = jnp.split(self.dense_i(inputs), 3, axis=-1)
        hr, hz, hn = jnp.split(self.dense_h(carry), 3, axis=-1)
        r, z = self.gate_fn(r + hr), self.gate_fn(z + hz)
        n = self.activation_fn(n + r * hn)
        h = _gated(1.0 - z, n, z, carry)
        return h, h
