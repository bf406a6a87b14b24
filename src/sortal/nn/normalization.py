"""BatchNorm, LayerNorm, RMSNorm and GroupNorm: one core, four choices of axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes
from sortal.nn.initializers import (
    NO_METADATA,
    Initializer,
    Metadata,
    check_sizes,
    new_param,
    ones,
    zeros,
)
from sortal.rngs import Rngs
from sortal.variable import BatchStat, Param, describe

Axes = int | Sequence[int]


class _Norm(Module):
    """Statistics over some axes, and a scale and bias along others."""

    _affine: ClassVar[tuple[str, ...]] = ("scale", "bias")

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float,
        dtype: DTypeLike | None,
        param_dtype: DTypeLike,
        use_bias: bool,
        use_scale: bool,
        bias_init: Initializer,
        scale_init: Initializer,
        axis_name: str | None,
        axis_index_groups: Any,
        use_fast_variance: bool,
        promote_dtype: dtypes.PromoteDtype,
        rngs: Rngs,
        bias_metadata: Metadata,
        scale_metadata: Metadata,
    ):
        check_sizes(self, num_features=num_features)
        shape = (num_features,)
        self.scale: Param[jax.Array] | None = None
        if use_scale:
            self.scale = new_param(
                self, "scale", scale_init, rngs, shape, param_dtype, scale_metadata
            )
        self.bias: Param[jax.Array] | None = None
        if use_bias:
            self.bias = new_param(
                self, "bias", bias_init, rngs, shape, param_dtype, bias_metadata
            )
        self.num_features = num_features
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.use_fast_variance = use_fast_variance
        self.promote_dtype = promote_dtype

    def _promoted(self, inputs: Any, features: Axes, *statistics: Any) -> Any:
        """Input, statistics and affine parameters in one dtype, and feature axes."""
        affine = [getattr(self, name) for name in self._affine]
        x, *arrays = dtypes.promote(self, inputs, *statistics, *affine)
        axes = self._axes(x, features)
        found = math.prod(x.shape[a] for a in axes)
        for array in arrays:
            if array is not None and array.size != found:
                raise ArgumentError(
                    f"{dtypes.name_of(self)} has parameters for {array.size} features "
                    f"on axes {features} of its input; found an input {describe(x)}."
                )
        return x, *arrays, axes

    def _axes(self, x: Any, axes: Axes) -> tuple[int, ...]:
        """Axes counted from the front, in order, each once."""
        given = axes if isinstance(axes, Sequence) else (axes,)
        if not all(-x.ndim <= a < x.ndim for a in given):
            raise ArgumentError(
                f"{dtypes.name_of(self)} works on axes {axes}, which its input "
                f"{describe(x)} does not have."
            )
        return tuple(sorted({a % x.ndim for a in given}))

    def _statistics(
        self, x: Any, axes: tuple[int, ...], mask: Any, *, centred: bool = True
    ) -> tuple[Any, Any]:
        """Mean and variance over ``axes``, in float32 or better."""
        if mask is not None:
            mask = self._broadcast_mask(mask, x)
        dtype = jnp.result_type(x) if self.dtype is None else self.dtype
        x = jnp.asarray(x, jnp.promote_types(dtype, jnp.float32))
        if not centred:
            (variance,) = self._means(axes, mask, _squared(x))
            return jnp.zeros_like(variance), variance
        if not self.use_fast_variance:
            (mean,) = self._means(axes, mask, x)
            deviation = x - jnp.expand_dims(mean, axes)
            return mean, *self._means(axes, mask, _squared(deviation))
        mean, square = self._means(axes, mask, x, _squared(x))
        # Rounding can make a variance that is zero come out negative.
        return mean, jnp.maximum(0.0, square - _squared(mean))

    def _means(self, axes: tuple[int, ...], mask: Any, *arrays: Any) -> tuple[Any, ...]:
        means = tuple(jnp.mean(a, axes, where=mask) for a in arrays)
        if self.axis_name is None:
            return means
        # One collective for all.
        stacked = lax.pmean(
            jnp.stack(means), self.axis_name, axis_index_groups=self.axis_index_groups
        )
        return tuple(stacked[i] for i in range(len(means)))

    def _broadcast_mask(self, mask: Any, x: Any) -> Any:
        mask = dtypes.as_array(self, mask)
        try:
            return jnp.broadcast_to(mask, x.shape)
        except ValueError:
            raise ArgumentError(
                f"{dtypes.name_of(self)}: the mask must broadcast to the input "
                f"{describe(x)}; found {describe(mask)}."
            ) from None

    def _normalized(
        self,
        x: Any,
        mean: Any,
        variance: Any,
        axes: tuple[int, ...],
        features: tuple[int, ...],
        scale: Any,
        bias: Any = None,
    ) -> jax.Array:
        """``(x - mean) / sqrt(variance + epsilon) * scale + bias``."""
        kept = [1 if i in axes else n for i, n in enumerate(x.shape)]
        learned = [n if i in features else 1 for i, n in enumerate(x.shape)]
        y = x - mean.reshape(kept)
        factor = lax.rsqrt(variance.reshape(kept) + self.epsilon)
        if scale is not None:
            factor = factor * scale.reshape(learned)
        y = y * factor
        if bias is not None:
            y = y + bias.reshape(learned)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        return jnp.asarray(y, dtype)

    def _over(
        self, inputs: Any, axes: Axes, features: Axes, mask: Any, **options: Any
    ) -> jax.Array:
        """Normalises with the statistics of the input itself."""
        x, *affine, learned = self._promoted(inputs, features)
        reduced = self._axes(x, axes)
        mean, variance = self._statistics(x, reduced, mask, **options)
        return self._normalized(x, mean, variance, reduced, learned, *affine)


def _squared(x: Any) -> Any:
    if jnp.iscomplexobj(x):
        return lax.square(lax.real(x)) + lax.square(lax.imag(x))
    return lax.square(x)


class BatchNorm(_Norm):
    """Normalises each feature by its statistics over the batch, and keeps their mean.

    In training, statistics are those of the input, and the running ones are updated:
    ``running = momentum * running + (1 - momentum) * current``. In evaluation the
    running ones are used.

    Args:
      num_features: number of features.
      use_running_average: True uses the running statistics; None leaves it to the
        call. ``model.train()`` and ``model.eval()`` set it.
      axis: the feature axis.
      momentum: how much of the running statistics an update keeps.
      epsilon: added to the variance.
      dtype: dtype of the result; that which input and parameters promote to if absent.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initialiser of ``bias``, of shape (num_features,).
      scale_init: initialiser of ``scale``, of shape (num_features,).
      axis_name: name of a mapped axis over whose members statistics are averaged.
      axis_index_groups: groups of indices of that axis to average among.
      use_fast_variance: variance as E[x^2] - E[x]^2: one pass, less precise.
      promote_dtype: what casts (inputs, mean, var, scale, bias) to one dtype.
      rngs: gives the keys of stream ``params``.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.

    Raises:
      ArgumentError: ``num_features`` is no whole number, or ``rngs`` no Rngs; at a
        call, the input has another number of features, or nothing says which
        statistics to use.

    References:
      Ioffe and Szegedy, "Batch normalization", arXiv:1502.03167, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.BatchNorm(2, momentum=0.9, rngs=nnx.Rngs(0))
      >>> y = layer(jnp.array([[0.0, 10.0], [2.0, 20.0]]))
      >>> [round(v, 2) for v in layer.mean.tolist()]
      [0.1, 1.5]
      >>> layer.eval()
      >>> layer(jnp.zeros((1, 2))).shape
      (1, 2)
    """

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: int = -1,
        momentum: float = 0.99,
        epsilon: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        rngs: Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ):
        super().__init__(
            num_features, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype,
            use_bias=use_bias, use_scale=use_scale, bias_init=bias_init,
            scale_init=scale_init, axis_name=axis_name,
            axis_index_groups=axis_index_groups, use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype, rngs=rngs, bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )  # fmt: skip
        self.mean = BatchStat(jnp.zeros((num_features,), jnp.float32))
        self.var = BatchStat(jnp.ones((num_features,), jnp.float32))
        self.use_running_average = use_running_average
        self.axis = axis
        self.momentum = momentum

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
    ) -> jax.Array:
        """Applies the layer, and in training updates ``mean`` and ``var``.

        Args:
          x: array with num_features elements along ``axis``.
          use_running_average: True uses the running statistics; the layer's own if
            absent.
          mask: booleans that broadcast to ``x``; statistics leave False elements out.

        Returns:
          Array of the shape of ``x``.

        Raises:
          ArgumentError: neither the call nor the layer says which statistics to use;
            or ``x`` or the mask does not fit.
        """
        running = dtypes.resolve_flag(self, "use_running_average", use_running_average)
        x, mean, var, *affine, features = self._promoted(
            x, self.axis, self.mean, self.var
        )
        axes = tuple(i for i in range(x.ndim) if i not in features)
        if not running:
            mean, var = self._statistics(x, axes, mask)
            keep = self.momentum
            self.mean[...] = keep * self.mean[...] + (1 - keep) * mean
            self.var[...] = keep * self.var[...] + (1 - keep) * var
        return self._normalized(x, mean, var, axes, features, *affine)


class LayerNorm(_Norm):
    """Normalises each example by the statistics of its own features.

    Args:
      num_features: number of features.
      epsilon: added to the variance.
      dtype: dtype of the result; that which input and parameters promote to if absent.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initialiser of ``bias``, of shape (num_features,).
      scale_init: initialiser of ``scale``, of shape (num_features,).
      reduction_axes: axes over which statistics are taken.
      feature_axes: axes along which scale and bias vary.
      axis_name: name of a mapped axis over whose members statistics are averaged.
      axis_index_groups: groups of indices of that axis to average among.
      use_fast_variance: variance as E[x^2] - E[x]^2: one pass, less precise.
      promote_dtype: what casts (inputs, scale, bias) to one dtype.
      rngs: gives the keys of stream ``params``.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.

    Raises:
      ArgumentError: ``num_features`` is no whole number, or ``rngs`` no Rngs; at a
        call, the input has another number of features.

    References:
      Ba, Kiros and Hinton, "Layer normalization", arXiv:1607.06450, equation 4.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0, 2.0, 3.0]])).round(2)
      Array([[-1.22,  0.  ,  1.22]], dtype=float32)
    """

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        rngs: Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ):
        super().__init__(
            num_features, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype,
            use_bias=use_bias, use_scale=use_scale, bias_init=bias_init,
            scale_init=scale_init, axis_name=axis_name,
            axis_index_groups=axis_index_groups, use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype, rngs=rngs, bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )  # fmt: skip
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: array with num_features elements along ``feature_axes``.
          mask: booleans that broadcast to ``x``; statistics leave False elements out.

        Returns:
          Array of the shape of ``x``.

        Raises:
          ArgumentError: ``x`` or the mask does not fit.
        """
        return self._over(x, self.reduction_axes, self.feature_axes, mask)


class RMSNorm(_Norm):
    """Divides each example by the root mean square of its own features.

    Args:
      num_features: number of features.
      epsilon: added to the mean square.
      dtype: dtype of the result; that which input and parameters promote to if absent.
      param_dtype: dtype of the parameters.
      use_scale: whether there is a scale.
      scale_init: initialiser of ``scale``, of shape (num_features,).
      reduction_axes: axes over which the mean is taken.
      feature_axes: axes along which the scale varies.
      axis_name: name of a mapped axis over whose members statistics are averaged.
      axis_index_groups: groups of indices of that axis to average among.
      use_fast_variance: accepted as the other layers do; nothing depends on it.
      promote_dtype: what casts (inputs, scale) to one dtype.
      rngs: gives the keys of stream ``params``.
      scale_metadata: metadata of the scale.

    Raises:
      ArgumentError: ``num_features`` is no whole number, or ``rngs`` no Rngs; at a
        call, the input has another number of features.

    References:
      Zhang and Sennrich, "Root mean square layer normalization", arXiv:1910.07467,
      equation 4.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.RMSNorm(2, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0, 7.0]])).round(1)
      Array([[0.2, 1.4]], dtype=float32)
    """

    _affine = ("scale",)

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        rngs: Rngs,
        scale_metadata: Metadata = NO_METADATA,
    ):
        super().__init__(
            num_features, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype,
            use_bias=False, use_scale=use_scale, bias_init=zeros,
            scale_init=scale_init, axis_name=axis_name,
            axis_index_groups=axis_index_groups, use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype, rngs=rngs, bias_metadata=NO_METADATA,
            scale_metadata=scale_metadata,
        )  # fmt: skip
        self.reduction_axes = reduction_axes
        self.feature_axes = feature_axes

    def __call__(self, x: Any, mask: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: array with num_features elements along ``feature_axes``.
          mask: booleans that broadcast to ``x``; the mean leaves False elements out.

        Returns:
          Array of the shape of ``x``.

        Raises:
          ArgumentError: ``x`` or the mask does not fit.
        """
        axes, features = self.reduction_axes, self.feature_axes
        return self._over(x, axes, features, mask, centred=False)


class GroupNorm(_Norm):
    """Normalises groups of an example's features by the statistics of the group.

    Args:
      num_features: number of features, on the last axis.
      num_groups: number of groups; None to give ``group_size`` instead.
      group_size: number of features in a group.
      epsilon: added to the variance.
      dtype: dtype of the result; that which input and parameters promote to if absent.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initialiser of ``bias``, of shape (num_features,).
      scale_init: initialiser of ``scale``, of shape (num_features,).
      reduction_axes: axes over which statistics are taken, the last included; all but
        the first if absent.
      axis_name: name of a mapped axis over whose members statistics are averaged.
      axis_index_groups: groups of indices of that axis to average among.
      use_fast_variance: variance as E[x^2] - E[x]^2: one pass, less precise.
      promote_dtype: what casts (inputs, scale, bias) to one dtype.
      rngs: gives the keys of stream ``params``.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.

    Raises:
      ArgumentError: the groups do not divide the features, or both or neither of
        ``num_groups`` and ``group_size`` are given; at a call, the input does not fit.

    References:
      Wu and He, "Group normalization", arXiv:1803.08494, equation 7.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[0.0, 2.0, 10.0, 30.0]])).round(2).tolist()
      [[-1.0, 1.0, -1.0, 1.0]]
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-6,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = zeros,
        scale_init: Initializer = ones,
        reduction_axes: Axes | None = None,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        rngs: Rngs,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ):
        if (num_groups is None) == (group_size is None):
            raise ArgumentError(
                "GroupNorm needs num_groups or group_size, not both; found num_groups="
                f"{num_groups} and group_size={group_size}. With group_size= write "
                "num_groups=None."
            )
        name, divisor = "num_groups", num_groups
        if divisor is None:
            name, divisor = "group_size", group_size
        check_sizes(self, num_features=num_features, **{name: divisor})
        if not divisor or num_features % divisor:
            raise ArgumentError(
                f"GroupNorm: {name}={divisor} does not divide num_features="
                f"{num_features}."
            )
        super().__init__(
            num_features, epsilon=epsilon, dtype=dtype, param_dtype=param_dtype,
            use_bias=use_bias, use_scale=use_scale, bias_init=bias_init,
            scale_init=scale_init, axis_name=axis_name,
            axis_index_groups=axis_index_groups, use_fast_variance=use_fast_variance,
            promote_dtype=promote_dtype, rngs=rngs, bias_metadata=bias_metadata,
            scale_metadata=scale_metadata,
        )  # fmt: skip
        quotient = num_features // divisor
        self.num_groups = divisor if group_size is None else quotient
        self.group_size = quotient if group_size is None else divisor
        self.reduction_axes = reduction_axes
        self.feature_axis = -1

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: array (..., num_features).
          mask: booleans that broadcast to ``x``; statistics leave False elements out.

        Returns:
          Array of the shape of ``x``.

        Raises:
          ArgumentError: ``x``, the mask or ``reduction_axes`` does not fit.
        """
        x, *affine, features = self._promoted(x, self.feature_axis)
        dtypes.check_axis(self, x, self.num_groups * self.group_size)
        last = x.ndim - 1
        given = self.reduction_axes
        axes = self._axes(x, (*range(1, last), last) if given is None else given)
        if last not in axes:
            raise ArgumentError(
                f"GroupNorm: reduction_axes must contain the last axis, that of the "
                f"features; found {given} for an input {describe(x)}."
            )
        others = tuple(a for a in axes if a != last)
        split = (*x.shape[:-1], self.num_groups, self.group_size)
        if mask is not None:
            mask = self._broadcast_mask(mask, x).reshape(split)
        mean, variance = self._statistics(x.reshape(split), (*others, x.ndim), mask)
        mean, variance = (
            jnp.repeat(s, self.group_size, axis=-1) for s in (mean, variance)
        )
        return self._normalized(x, mean, variance, others, features, *affine)
