"""Linear, LinearGeneral and Einsum: contractions with a learned kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sortal._engine.variable import Param, describe
from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes

# NNX has these in its `linear` too.
from sortal.nn.conv import Conv as Conv
from sortal.nn.conv import ConvTranspose as ConvTranspose
from sortal.nn.embedding import Embed as Embed
from sortal.nn.initializers import (
    NO_METADATA,
    NO_RNGS,
    Initializer,
    Metadata,
    check_sizes,
    default_bias_init,
    default_kernel_init,
    new_param,
)
from sortal.nn.initializers import default_embed_init as default_embed_init
from sortal.random import Rngs


class Linear(Module):
    """``y = x @ kernel + bias`` over the last axis of the input.

    Args:
      in_features: size of the input's last axis.
      out_features: size of the output's last axis.
      use_bias: whether there is a bias.
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the parameters.
      precision: as for ``jax.lax.dot_general``.
      kernel_init: initialiser of ``kernel``, of shape (in_features, out_features).
      bias_init: initialiser of ``bias``, of shape (out_features,).
      dot_general: used in place of ``jax.lax.dot_general``.
      promote_dtype: casts (inputs, kernel, bias) to one dtype.
      preferred_element_type: dtype of the sums of products and of the result.
      rngs: gives the keys of stream ``params``.
      kernel_metadata: metadata of the kernel.
      bias_metadata: metadata of the bias.

    Raises:
      ArgumentError: a size or ``rngs`` is invalid; at a call, the input has another
        number of features.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 5, 3))).shape
      (2, 5, 4)
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        dot_general: Callable[..., Any] = dtypes.dot_general,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs = NO_RNGS,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ):
        check_sizes(self, in_features=in_features, out_features=out_features)
        shape = (in_features, out_features)
        self.kernel = new_param(
            self, "kernel", kernel_init, rngs, shape, param_dtype, kernel_metadata
        )
        self.bias: Param[jax.Array] | None = None
        if use_bias:
            self.bias = new_param(
                self, "bias", bias_init, rngs, shape[1:], param_dtype, bias_metadata
            )
        self.in_features = in_features
        self.out_features = out_features
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: array (..., in_features).
          out_sharding: sharding of the output, on an explicit or automatic mesh.

        Returns:
          Array (..., out_features).

        Raises:
          ArgumentError: the last axis has another size; or this is a stack of layers.
        """
        x, kernel, bias = dtypes.promote(self, inputs, self.kernel, self.bias)
        dtypes.check_single(self, "kernel", 2)
        # Inside a shard, the kernel's size is not `in_features`.
        dtypes.check_axis(self, x, kernel.shape[0])
        y = self.dot_general(
            x,
            kernel,
            (((x.ndim - 1,), (0,)), ((), ())),
            **dtypes.product_options(self, out_sharding),
        )
        if bias is not None:
            y = y + dtypes.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
        return dtypes.constrain(y, out_sharding)


class LinearGeneral(Module):
    """A linear map between several axes of the input and several new, last axes.

    Args:
      in_features: size, or sizes, of the contracted axes.
      out_features: size, or sizes, of the new axes.
      axis: which axes are contracted; as many as ``in_features``, and matched with
        them in ascending order.
      batch_axis: sizes of leading axes (0, 1, ...) along which each index has a kernel
        of its own.
      use_bias: whether there is a bias.
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the parameters.
      kernel_init: initialiser of ``kernel``, of shape (*batch, *in, *out); it sees the
        shape (batch * in, out).
      bias_init: initialiser of ``bias``, of shape (*batch, *out); it sees one axis.
      precision: as for ``jax.lax.dot_general``.
      promote_dtype: casts (inputs, kernel, bias) to one dtype.
      dot_general: used in place of ``jax.lax.dot_general``.
      dot_general_cls: called at each call to make a ``dot_general``, which is used
        instead.
      preferred_element_type: dtype of the sums of products and of the result.
      rngs: gives the keys of stream ``params``.
      kernel_metadata: metadata of the kernel.
      bias_metadata: metadata of the bias.

    Raises:
      ArgumentError: sizes and axes do not fit one another; at a call, the input does
        not fit them.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.LinearGeneral((2, 3), (4, 5), axis=(1, -1), rngs=nnx.Rngs(0))
      >>> layer.kernel.shape
      (2, 3, 4, 5)
      >>> layer(jnp.ones((16, 2, 7, 3))).shape
      (16, 7, 4, 5)
    """

    def __init__(
        self,
        in_features: int | Sequence[int],
        out_features: int | Sequence[int],
        *,
        axis: int | Sequence[int] = -1,
        batch_axis: Mapping[int, int] = NO_METADATA,  # type: ignore[assignment]
        use_bias: bool = True,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        precision: lax.PrecisionLike = None,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        dot_general: Callable[..., Any] | None = None,
        dot_general_cls: Any = None,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs = NO_RNGS,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ):
        self.in_features = _as_tuple(in_features)
        self.out_features = _as_tuple(out_features)
        self.axis = _as_tuple(axis)
        self.batch_axis = dict(batch_axis)
        self._check_axes()
        batch = tuple(self.batch_axis[i] for i in range(len(self.batch_axis)))
        fan_in = math.prod((*batch, *self.in_features))
        fan_out = math.prod(self.out_features)
        self.kernel = new_param(
            self, "kernel", kernel_init, rngs,
            (*batch, *self.in_features, *self.out_features), param_dtype,
            kernel_metadata, init_shape=(fan_in, fan_out),
        )  # fmt: skip
        self.bias: Param[jax.Array] | None = None
        if use_bias:
            self.bias = new_param(
                self, "bias", bias_init, rngs, (*batch, *self.out_features),
                param_dtype, bias_metadata,
                init_shape=(math.prod(batch) * fan_out,),
            )  # fmt: skip
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.dot_general = dot_general
        self.dot_general_cls = dot_general_cls
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type

    def _check_axes(self) -> None:
        check_sizes(
            self,
            in_features=self.in_features,
            out_features=self.out_features,
            batch_axis=tuple(self.batch_axis.values()),
        )
        if len(self.in_features) != len(self.axis):
            raise ArgumentError(
                f"LinearGeneral: in_features={self.in_features} and axis={self.axis} "
                "must have one entry for each contracted axis."
            )
        if set(self.batch_axis) != set(range(len(self.batch_axis))):
            raise ArgumentError(
                f"LinearGeneral: batch_axis must name the leading axes 0, 1, ... "
                f"without a gap; found {sorted(self.batch_axis)}."
            )

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: array with the contracted axes and any others.
          out_sharding: sharding of the output, on an explicit or automatic mesh.

        Returns:
          Array (*batch, *other axes, *out_features).

        Raises:
          ArgumentError: a contracted axis is not there or has another size; or this is
            a stack of layers.
        """
        x, kernel, bias = dtypes.promote(self, inputs, self.kernel, self.bias)
        n_batch, n_in = len(self.batch_axis), len(self.axis)
        dtypes.check_single(self, "kernel", n_batch + n_in + len(self.out_features))
        axis = tuple(sorted(a + x.ndim if a < 0 else a for a in self.axis))
        batch = tuple(range(n_batch))
        if len({*batch, *axis}) < n_batch + n_in:
            raise ArgumentError(
                f"LinearGeneral takes each axis once; found axis={self.axis} and "
                f"batch_axis={self.batch_axis} for an input {describe(x)}."
            )
        for a, size in zip(batch + axis, kernel.shape, strict=False):
            dtypes.check_axis(self, x, size, a)
        dot_general = self.dot_general or dtypes.dot_general
        if self.dot_general_cls is not None:
            dot_general = self.dot_general_cls()
        contracted = tuple(range(n_batch, n_batch + n_in))
        y = dot_general(
            x,
            kernel,
            ((axis, contracted), (batch, batch)),
            **dtypes.product_options(self, out_sharding),
        )
        if bias is not None:
            others = (1,) * (x.ndim - n_batch - n_in)
            shape = bias.shape[:n_batch] + others + bias.shape[n_batch:]
            y = y + dtypes.reshape(bias, shape)
        return dtypes.constrain(y, out_sharding)


class Einsum(Module):
    """An einsum of the input with a learned kernel, plus a bias.

    Args:
      einsum_str: the equation, with two operands, the input first, and ``->``.
      kernel_shape: shape of the kernel.
      bias_shape: shape of the bias: the kernel's axes that the output keeps, in the
        output's order; without it there is no bias.
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the parameters.
      precision: as for ``jax.numpy.einsum``.
      kernel_init: initialiser of ``kernel``.
      bias_init: initialiser of ``bias``.
      promote_dtype: casts (inputs, kernel, bias) to one dtype.
      einsum_op: used in place of ``jax.numpy.einsum``.
      preferred_element_type: dtype of the sums of products and of the result.
      rngs: gives the keys of stream ``params``.
      kernel_metadata: metadata of the kernel.
      bias_metadata: metadata of the bias.

    Raises:
      ArgumentError: the equation or a shape is malformed; at a call, the bias does not
        fit the axes that the equation keeps.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> heads = nnx.Einsum("nta,hab->nthb", (8, 2, 4), (8, 4), rngs=nnx.Rngs(0))
      >>> heads(jnp.ones((16, 11, 2))).shape
      (16, 11, 8, 4)
    """

    def __init__(
        self,
        einsum_str: str,
        kernel_shape: Sequence[int],
        bias_shape: Sequence[int] | None = None,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        einsum_op: Callable[..., Any] = jnp.einsum,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs = NO_RNGS,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ):
        self.einsum_str = _checked(einsum_str)
        self.kernel_shape = _as_tuple(kernel_shape)
        check_sizes(self, kernel_shape=self.kernel_shape)
        self.kernel = new_param(
            self, "kernel", kernel_init, rngs, self.kernel_shape, param_dtype,
            kernel_metadata,
        )  # fmt: skip
        self.bias_shape = None if bias_shape is None else _as_tuple(bias_shape)
        self.bias: Param[jax.Array] | None = None
        if self.bias_shape is not None:
            check_sizes(self, bias_shape=self.bias_shape)
            self.bias = new_param(
                self, "bias", bias_init, rngs, self.bias_shape, param_dtype,
                bias_metadata,
            )  # fmt: skip
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.promote_dtype = promote_dtype
        self.einsum_op = einsum_op
        self.preferred_element_type = preferred_element_type

    def __call__(
        self, inputs: Any, einsum_str: str | None = None, out_sharding: Any = None
    ) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: the first operand.
          einsum_str: another equation for this call.
          out_sharding: sharding of the output, on an explicit or automatic mesh.

        Returns:
          The result of the equation, plus the bias.

        Raises:
          ArgumentError: the equation is malformed, or the bias does not fit it; or this
            is a stack of layers.
        """
        equation = self.einsum_str if einsum_str is None else _checked(einsum_str)
        x, kernel, bias = dtypes.promote(self, inputs, self.kernel, self.bias)
        dtypes.check_single(self, "kernel", len(self.kernel_shape))
        y = self.einsum_op(
            equation,
            x,
            kernel,
            **dtypes.product_options(self, out_sharding),
        )
        if bias is None:
            return dtypes.constrain(y, out_sharding)
        shape = _kept_axes(equation, kernel.shape, y.ndim)
        kept, found = ([n for n in s if n != 1] for s in (shape, bias.shape))
        # One axis may stand for all; several must have the order of the output.
        if math.prod(kept) != bias.size or (len(found) > 1 and found != kept):
            raise ArgumentError(
                f"Einsum: of a kernel {describe(kernel)}, {equation!r} keeps axes of "
                f"sizes {tuple(kept)}; the bias must have that shape, found "
                f"{describe(bias)}."
            )
        return dtypes.constrain(y + dtypes.reshape(bias, shape), out_sharding)


def _as_tuple(x: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(x) if isinstance(x, Sequence) else (x,)


def _checked(equation: Any) -> str:
    """The equation without spaces; it must have two operands and a result."""
    text = equation.replace(" ", "") if isinstance(equation, str) else ""
    if text.count("->") != 1 or text.count(",") != 1:
        raise ArgumentError(
            f"Einsum needs an equation of two operands, the input and the kernel, and "
            f"their result, such as 'nta,ab->ntb'; found {equation!r}."
        )
    return text


def _kept_axes(equation: str, kernel: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """The sizes that the kernel has at the axes of the result, else 1."""
    operands, result = equation.split("->")
    labels = _labels(operands.split(",")[1], len(kernel))
    sizes = dict(zip(labels, kernel, strict=True))
    return tuple(sizes.get(label, 1) for label in _labels(result, ndim))


def _labels(term: str, ndim: int) -> list[str | int]:
    """One label for each axis; -1, -2, ... for those of an ellipsis, from its end."""
    before, dots, after = term.partition("...")
    hidden = ndim - len(before) - len(after)
    return [*before, *(range(-hidden, 0) if dots else ()), *after]
