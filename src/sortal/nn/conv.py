"""Conv and ConvTranspose: convolutions of channels-last inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sortal._engine.promotion import mixing
from sortal._engine.variable import Param, describe
from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes
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
from sortal.random import Rngs

Sizes = int | Sequence[int] | None
Padding = str | int | Sequence[int | tuple[int, int]]
Pairs = list[tuple[int, int]]

_WRAPPED = {"CIRCULAR": "wrap", "REFLECT": "reflect"}


def canonicalize_padding(padding: Padding, rank: int) -> str | Pairs:
    """Padding as JAX takes it: a name, or a pair (low, high) for each of ``rank`` axes.

    Example:
      >>> canonicalize_padding((1, (0, 2)), 2)
      [(1, 1), (0, 2)]
    """
    if isinstance(padding, str):
        return padding
    entries = [padding] * rank if isinstance(padding, Integral) else padding
    if isinstance(entries, Sequence) and len(entries) == rank:
        pairs: list[Any] = [(p, p) if isinstance(p, Integral) else p for p in entries]
        if all(map(_is_pair, pairs)):
            return [(int(low), int(high)) for low, high in pairs]
    raise ArgumentError(
        f"padding must be a name, a number, or a sequence of {rank} numbers or pairs "
        f"(low, high), one for each spatial axis; found {padding!r}."
    )


def _is_pair(p: Any) -> bool:
    whole = isinstance(p, tuple) and all(isinstance(n, Integral) for n in p)
    return whole and len(p) == 2


class _Conv(Module):
    """The common part of both convolutions."""

    _paddings: ClassVar[tuple[str, ...]]
    _per_axis: ClassVar[tuple[str, ...]]

    out_features: int
    padding: Padding
    use_bias: bool
    param_dtype: DTypeLike

    def _init_geometry(
        self, kernel_size: int | Sequence[int], features: tuple[int, int], mask: Any
    ) -> None:
        """Sets and checks kernel and mask sizes; ``features`` are the last two."""
        sizes = kernel_size if isinstance(kernel_size, Sequence) else (kernel_size,)
        self.kernel_size = tuple(sizes)
        for name in ("kernel_size", *self._per_axis):
            self._sizes(name)
        self._check_padding()
        self.kernel_shape = (*self.kernel_size, *features)
        self.mask = None if mask is None else dtypes.as_array(self, mask)
        if self.mask is not None and self.mask.shape != self.kernel_shape:
            raise ArgumentError(
                f"{dtypes.name_of(self)}: the mask must have the kernel's shape "
                f"{self.kernel_shape}; found {describe(self.mask)}."
            )

    def _init_parameters(
        self,
        kernel_init: Initializer,
        bias_init: Initializer,
        rngs: Rngs,
        kernel_metadata: Metadata,
        bias_metadata: Metadata,
    ) -> None:
        self.kernel = new_param(
            self, "kernel", kernel_init, rngs, self.kernel_shape, self.param_dtype,
            kernel_metadata,
        )  # fmt: skip
        self.bias: Param[jax.Array] | None = None
        if self.use_bias:
            self.bias = new_param(
                self, "bias", bias_init, rngs, (self.out_features,), self.param_dtype,
                bias_metadata,
            )  # fmt: skip

    def _check_padding(self) -> None:
        padding = canonicalize_padding(self.padding, len(self.kernel_size))
        if isinstance(padding, str) and padding not in self._paddings:
            raise ArgumentError(
                f"{dtypes.name_of(self)}: padding {padding!r} is unknown; the names "
                f"are {', '.join(self._paddings)}."
            )

    def _flattened(self, inputs: Any) -> tuple[Any, tuple[int, ...]]:
        """The input with one batch axis, and the shape of the batch axes it had."""
        x = dtypes.as_array(self, inputs)
        n_batch = x.ndim - len(self.kernel_size) - 1
        if n_batch < 0:
            raise ArgumentError(
                f"{dtypes.name_of(self)} with kernel_size={self.kernel_size} needs an "
                f"input of at least {len(self.kernel_size) + 1} axes, the last being "
                f"features; found {describe(x)}."
            )
        batch = x.shape[:n_batch]
        if n_batch != 1:
            x = jnp.reshape(x, (math.prod(batch), *x.shape[n_batch:]))
        return x, batch

    @mixing
    def _masked(self) -> jax.Array:
        dtypes.check_single(self, "kernel", len(self.kernel_shape))
        kernel = self.kernel[...]
        return kernel if self.mask is None else kernel * self.mask

    def _sizes(self, name: str) -> tuple[int, ...]:
        """An attribute, given as None, a number, or one for each spatial axis."""
        given, n = getattr(self, name), len(self.kernel_size)
        sizes = given if isinstance(given, Sequence) else (given,) * n
        sizes = tuple(1 if given is None else size for size in sizes)
        check_sizes(self, **{name: sizes})
        if 0 in sizes:
            raise ArgumentError(
                f"{dtypes.name_of(self)}: {name}={given!r} must be 1 or more."
            )
        if len(sizes) != n:
            raise ArgumentError(
                f"{dtypes.name_of(self)}: {name} must be one number or one for each of "
                f"{n} spatial axes; found {given!r}."
            )
        return sizes


def _finish(y: Any, bias: Any, batch: tuple[int, ...]) -> jax.Array:
    """Adds the bias, and restores the batch axes of the input."""
    if bias is not None:
        y = y + dtypes.reshape(bias, (1,) * (y.ndim - 1) + (-1,))
    return y if len(batch) == 1 else jnp.reshape(y, (*batch, *y.shape[1:]))


class Conv(_Conv):
    """Convolution over the spatial axes of a channels-last input.

    Args:
      in_features: size of the input's last axis.
      out_features: size of the output's last axis.
      kernel_size: size of the kernel along each spatial axis; a number for one axis.
      strides: steps of the kernel; a number for all axes, or one for each.
      padding: ``"SAME"`` (the output is as large as the input, divided by the
        strides), ``"SAME_LOWER"`` (an odd element goes in front), ``"VALID"``
        (none), ``"CIRCULAR"`` (periodic), ``"REFLECT"`` (mirrored), ``"CAUSAL"`` (one
        axis, padded in front only); a number; or numbers or pairs (low, high) for
        each spatial axis.
      input_dilation: spacing of the input's elements; 2 puts a zero between any two.
        Other than 1, it needs padding in numbers.
      kernel_dilation: spacing of the kernel's elements.
      feature_group_count: how many groups the features are divided into; each group
        of outputs sees only its group of inputs.
      use_bias: whether there is a bias.
      mask: array of the kernel's shape that the kernel is multiplied by.
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the parameters.
      precision: as for ``jax.lax.conv_general_dilated``.
      kernel_init: initialiser of ``kernel``, of shape
        (*kernel_size, in_features // feature_group_count, out_features).
      bias_init: initialiser of ``bias``, of shape (out_features,).
      conv_general_dilated: used in place of ``jax.lax.conv_general_dilated``.
      promote_dtype: casts (inputs, kernel, bias) to one dtype.
      preferred_element_type: dtype of the sums of products and of the result.
      rngs: gives the keys of stream ``params``.
      kernel_metadata: metadata of the kernel.
      bias_metadata: metadata of the bias.

    Raises:
      ArgumentError: sizes, groups, mask or padding do not fit one another; at a call,
        the input does not fit them.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.Conv(3, 8, (5, 5), strides=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 28, 28, 3))).shape
      (4, 14, 14, 8)
    """

    _paddings = ("SAME", "SAME_LOWER", "VALID", "CIRCULAR", "REFLECT", "CAUSAL")
    _per_axis = ("strides", "input_dilation", "kernel_dilation")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: Sizes = 1,
        *,
        padding: Padding = "SAME",
        input_dilation: Sizes = 1,
        kernel_dilation: Sizes = 1,
        feature_group_count: int = 1,
        use_bias: bool = True,
        mask: Any = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        conv_general_dilated: Callable[..., Any] = lax.conv_general_dilated,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs = NO_RNGS,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ):
        self.in_features = in_features
        self.out_features = out_features
        self.strides = strides
        self.padding = padding
        self.input_dilation = input_dilation
        self.kernel_dilation = kernel_dilation
        self.feature_group_count = feature_group_count
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.conv_general_dilated = conv_general_dilated
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        self._check_groups()
        features = (in_features // feature_group_count, out_features)
        self._init_geometry(kernel_size, features, mask)
        self._init_parameters(
            kernel_init, bias_init, rngs, kernel_metadata, bias_metadata
        )

    def _check_groups(self) -> None:
        sizes = {"in_features": self.in_features, "out_features": self.out_features}
        check_sizes(self, **sizes, feature_group_count=self.feature_group_count)
        groups = self.feature_group_count
        if groups == 0 or any(size % groups for size in sizes.values()):
            raise ArgumentError(
                f"Conv: feature_group_count={groups} must divide in_features="
                f"{self.in_features} and out_features={self.out_features}."
            )

    def _check_padding(self) -> None:
        super()._check_padding()
        if self.padding == "CAUSAL" and len(self.kernel_size) != 1:
            raise ArgumentError(
                f"Conv: padding 'CAUSAL' is for one spatial axis; found kernel_size="
                f"{self.kernel_size}. Give pairs (low, high) instead."
            )
        dilated = any(d != 1 for d in self._sizes("input_dilation"))
        if isinstance(self.padding, str) and dilated:
            raise ArgumentError(
                f"Conv: padding {self.padding!r} is not defined for a dilated input; "
                f"found input_dilation={self.input_dilation}. Write it as numbers or "
                "pairs (low, high)."
            )

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: array (*batch, *spatial, in_features), with any number of batch axes.
          out_sharding: sharding of the output, on an explicit or automatic mesh.

        Returns:
          Array (*batch, *spatial, out_features), the spatial sizes as padding and
          strides make them.

        Raises:
          ArgumentError: the input has too few axes, or another number of features; or
            this is a stack of layers.
        """
        x, batch = self._flattened(inputs)
        kernel = self._masked()
        dtypes.check_axis(self, x, kernel.shape[-2] * self.feature_group_count)
        x, padding = self._padded(x)
        x, kernel, bias = dtypes.promote(self, x, kernel, self.bias)
        # Batch, features and spatial axes: of the input, and output before input
        # features of the kernel.
        n = x.ndim
        data = (0, n - 1, *range(1, n - 1))
        weights = (n - 1, n - 2, *range(n - 2))
        y = self.conv_general_dilated(
            x,
            kernel,
            self._sizes("strides"),
            padding,
            lhs_dilation=self._sizes("input_dilation"),
            rhs_dilation=self._sizes("kernel_dilation"),
            dimension_numbers=lax.ConvDimensionNumbers(data, weights, data),
            feature_group_count=self.feature_group_count,
            **dtypes.product_options(self, out_sharding),
        )
        return dtypes.constrain(_finish(y, bias, batch), out_sharding)

    def _padded(self, x: Any) -> tuple[Any, str | Pairs]:
        """Applies the paddings that JAX's convolutions do not have."""
        padding = canonicalize_padding(self.padding, len(self.kernel_size))
        dilation = self._sizes("kernel_dilation")
        reach = [(k - 1) * d for k, d in zip(self.kernel_size, dilation, strict=True)]
        if padding == "CAUSAL":
            return jnp.pad(x, [(0, 0), (reach[0], 0), (0, 0)]), "VALID"
        if isinstance(padding, str) and padding in _WRAPPED:
            if 0 in x.shape[1:-1]:
                raise ArgumentError(
                    f"Conv: padding {padding!r} repeats elements, of which there are "
                    f"none in an input {describe(x)}."
                )
            sides = [(0, 0), *((r // 2, (r + 1) // 2) for r in reach), (0, 0)]
            return jnp.pad(x, sides, mode=_WRAPPED[padding]), "VALID"
        return x, padding


class ConvTranspose(_Conv):
    """Transposed convolution over the spatial axes of a channels-last input.

    Padding is that of the underlying convolution over the dilated input, as in
    ``jax.lax.conv_transpose`` and unlike PyTorch: to undo the shape change of a Conv
    padded by p, pass ``kernel_dilation * (kernel_size - 1) - p``.

    Args:
      in_features: size of the input's last axis.
      out_features: size of the output's last axis.
      kernel_size: size of the kernel along each spatial axis; a number for one axis.
      strides: by how much each spatial axis grows; a number for all, or one for each.
      padding: ``"SAME"`` (the output is as large as the input times the strides),
        ``"VALID"`` (as large as to contain every product), ``"CIRCULAR"`` (periodic;
        of an even kernel, as in NNX, up to one place beside the transpose of ``Conv``);
        a number; or numbers or pairs (low, high) for each spatial axis.
      kernel_dilation: spacing of the kernel's elements.
      use_bias: whether there is a bias.
      mask: array of the kernel's shape that the kernel is multiplied by.
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the parameters.
      precision: as for ``jax.lax.conv_transpose``.
      kernel_init: initialiser of ``kernel``, of shape
        (*kernel_size, in_features, out_features).
      bias_init: initialiser of ``bias``, of shape (out_features,).
      transpose_kernel: whether the kernel is that of the convolution which this layer
        transposes: mirrored, of shape (*kernel_size, out_features, in_features).
      promote_dtype: casts (inputs, kernel, bias) to one dtype.
      preferred_element_type: dtype of the sums of products and of the result.
      rngs: gives the keys of stream ``params``.
      kernel_metadata: metadata of the kernel.
      bias_metadata: metadata of the bias.

    Raises:
      ArgumentError: sizes, mask or padding do not fit one another; at a call, the
        input does not fit them.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.ConvTranspose(3, 8, (4, 4), strides=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 7, 7, 3))).shape
      (2, 14, 14, 8)
    """

    _paddings = ("SAME", "VALID", "CIRCULAR")
    _per_axis = ("strides", "kernel_dilation")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: Sizes = None,
        *,
        padding: Padding = "SAME",
        kernel_dilation: Sizes = None,
        use_bias: bool = True,
        mask: Any = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: lax.PrecisionLike = None,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        transpose_kernel: bool = False,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        preferred_element_type: DTypeLike | None = None,
        rngs: Rngs = NO_RNGS,
        kernel_metadata: Metadata = NO_METADATA,
        bias_metadata: Metadata = NO_METADATA,
    ):
        check_sizes(self, in_features=in_features, out_features=out_features)
        self.in_features = in_features
        self.out_features = out_features
        self.strides = strides
        self.padding = padding
        self.kernel_dilation = kernel_dilation
        self.use_bias = use_bias
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.precision = precision
        self.transpose_kernel = transpose_kernel
        self.promote_dtype = promote_dtype
        self.preferred_element_type = preferred_element_type
        features = (in_features, out_features)
        if transpose_kernel:
            features = (out_features, in_features)
        self._init_geometry(kernel_size, features, mask)
        self._init_parameters(
            kernel_init, bias_init, rngs, kernel_metadata, bias_metadata
        )

    def __call__(self, inputs: Any) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: array (*batch, *spatial, in_features), with any number of batch axes.

        Returns:
          Array (*batch, *spatial, out_features), the spatial sizes as padding and
          strides make them.

        Raises:
          ArgumentError: the input has too few axes, or another number of features; or
            this is a stack of layers.
        """
        x, batch = self._flattened(inputs)
        kernel = self._masked()
        dtypes.check_axis(self, x, kernel.shape[-1 if self.transpose_kernel else -2])
        x, kernel, bias = dtypes.promote(self, x, kernel, self.bias)
        padding = canonicalize_padding(self.padding, len(self.kernel_size))
        strides = self._sizes("strides")
        circular = padding == "CIRCULAR"
        y = lax.conv_transpose(
            x,
            kernel,
            strides,
            "VALID" if circular else padding,
            rhs_dilation=self._sizes("kernel_dilation"),
            transpose_kernel=self.transpose_kernel,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
        )
        if circular:
            periods = [n * s for n, s in zip(x.shape[1:-1], strides, strict=True)]
            y = _folded(y, periods, self.transpose_kernel)
        return _finish(y, bias, batch)


def _folded(y: Any, periods: list[int], odd_last: bool) -> jax.Array:
    """Sums elements that are whole periods apart, along each spatial axis.

    The array is first padded on both sides to whole periods, around its middle;
    ``odd_last`` puts an odd element on the right.
    """
    sides = []
    for size, period in zip(y.shape[1:-1], periods, strict=True):
        missing = (period - size) % (2 * period)
        less, more = missing // 2, (missing + 1) // 2
        sides.append((less, more) if odd_last else (more, less))
    y = jnp.pad(y, [(0, 0), *sides, (0, 0)])
    for axis, period in enumerate(periods, 1):
        periods_there = y.shape[axis] // period
        shape = (*y.shape[:axis], periods_there, period, *y.shape[axis + 1 :])
        y = y.reshape(shape).sum(axis=axis)
    return y
