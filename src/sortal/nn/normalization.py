"""BatchNorm, LayerNorm, RMSNorm, InstanceNorm and GroupNorm."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sortal._engine.promotion import mixing
from sortal._engine.variable import BatchStat, describe
from sortal.errors import ArgumentError
from sortal.nn import dtypes
from sortal.nn.initializers import (
    NO_METADATA,
    NO_RNGS,
    Initializer,
    Metadata,
    check_sizes,
    ones,
    zeros,
)
from sortal.nn.moments import Axes, Norm
from sortal.random import Rngs


class BatchNorm(Norm):
    """Normalises each feature by its statistics over the batch, and averages these.

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
      dtype: dtype of the result; by default, the one that input, parameters and
        statistics promote to, which is float32 at least.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initialiser of ``bias``, of shape (num_features,).
      scale_init: initialiser of ``scale``, of shape (num_features,).
      axis_name: name of a mapped axis over whose members statistics are averaged, with
        a mask by how much of each is seen.
      axis_index_groups: groups of indices of that axis to average among.
      use_fast_variance: variance as E[x^2] - E[x]^2: one pass, less precise.
      promote_dtype: casts (inputs, mean, var, scale, bias) to one dtype.
      rngs: gives the keys of stream ``params``.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.

    Raises:
      ArgumentError: ``num_features`` or ``rngs`` is invalid; at a call, the input has
        another number of features, or ``use_running_average`` is not set.

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

    use_running_average: bool | None
    axis: int
    momentum: float

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
        rngs: Rngs = NO_RNGS,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ):
        self._begin(locals())
        self.mean = BatchStat(jnp.zeros((num_features,), jnp.float32))
        self.var = BatchStat(jnp.ones((num_features,), jnp.float32))

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
          mask: booleans that broadcast to ``x``; statistics leave False elements out. A
            feature of which it hides all is normalised by its running statistics,
            which stay.

        Returns:
          Array of the shape of ``x``.

        Raises:
          ArgumentError: neither the call nor the layer sets ``use_running_average``; or
            ``x`` or the mask does not fit; or ``x`` is complex in training and the
            running mean is not.
        """
        running = dtypes.resolve_flag(self, "use_running_average", use_running_average)
        x, mean, var, *affine, features = self._promoted(
            x, self.axis, self.mean, self.var
        )
        axes = tuple(i for i in range(x.ndim) if i not in features)
        shape = tuple(n if i in features else 1 for i, n in enumerate(x.shape))
        if running:
            mean, var = dtypes.reshape(mean, shape), dtypes.reshape(var, shape)
        else:
            self._refuse_complex(x)
            before = (self.mean[...].reshape(shape), self.var[...].reshape(shape))
            mean, var = self._statistics(x, axes, mask, unseen=before)
            for kept, new in ((self.mean, mean), (self.var, var)):
                kept[...] = _moved(self.momentum, kept[...], new)
        return self._normalized(x, mean, var, features, *affine)

    def _refuse_complex(self, x: jax.Array) -> None:
        dtype = self.mean[...].dtype
        if jnp.iscomplexobj(x) and not jnp.issubdtype(dtype, jnp.complexfloating):
            raise ArgumentError(
                f"BatchNorm: the input is {x.dtype}, the mean kept {dtype}, which has "
                "the real part alone. Write layer.mean.value = "
                f"layer.mean.value.astype(jnp.{x.dtype}) once, after making the layer."
            )

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Sets the attributes given; ``view`` calls it on copies of modules.

        Args:
          use_running_average: whether to use the running statistics.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average


@mixing
def _moved(keep: float, kept: jax.Array, new: jax.Array) -> jax.Array:
    moved = keep * kept + (1 - keep) * dtypes.reshape(new, kept.shape)
    return moved.astype(kept.dtype)  # inputs may be float64


class LayerNorm(Norm):
    """Normalises each example by the statistics of its own features.

    Args:
      num_features: number of features.
      epsilon: added to the variance.
      dtype: dtype of the result; by default, the one that input and parameters promote
        to.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initialiser of ``bias``, of shape (num_features,).
      scale_init: initialiser of ``scale``, of shape (num_features,).
      reduction_axes: axes over which statistics are taken.
      feature_axes: axes along which scale and bias vary.
      axis_name: name of a mapped axis over whose members statistics are averaged, with
        a mask by how much of each is seen.
      axis_index_groups: groups of indices of that axis to average among.
      use_fast_variance: variance as E[x^2] - E[x]^2: one pass, less precise.
      promote_dtype: casts (inputs, scale, bias) to one dtype.
      rngs: gives the keys of stream ``params``.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.

    Raises:
      ArgumentError: ``num_features`` or ``rngs`` is invalid; at a call, the input has
        another number of features.

    References:
      Ba, Kiros and Hinton, "Layer normalization", arXiv:1607.06450, equation 4.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.LayerNorm(3, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[1.0, 2.0, 3.0]])).round(2)
      Array([[-1.22,  0.  ,  1.22]], dtype=float32)
    """

    reduction_axes: Axes
    feature_axes: Axes

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
        rngs: Rngs = NO_RNGS,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ):
        self._begin(locals())

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: array with num_features elements along ``feature_axes``.
          mask: booleans that broadcast to ``x``; statistics leave False elements out.
            What is hidden as a whole is not normalised.

        Returns:
          Array of the shape of ``x``.

        Raises:
          ArgumentError: ``x`` or the mask does not fit.
        """
        return self._over(x, self.reduction_axes, self.feature_axes, mask)


class RMSNorm(Norm):
    """Divides each example by the root mean square of its own features.

    Args:
      num_features: number of features.
      epsilon: added to the mean square.
      dtype: dtype of the result; by default, the one that input and parameters promote
        to.
      param_dtype: dtype of the parameters.
      use_scale: whether there is a scale.
      scale_init: initialiser of ``scale``, of shape (num_features,).
      reduction_axes: axes over which the mean is taken.
      feature_axes: axes along which the scale varies.
      axis_name: name of a mapped axis over whose members statistics are averaged, with
        a mask by how much of each is seen.
      axis_index_groups: groups of indices of that axis to average among.
      use_fast_variance: ignored; for NNX compatibility.
      promote_dtype: casts (inputs, scale) to one dtype.
      rngs: gives the keys of stream ``params``.
      scale_metadata: metadata of the scale.

    Raises:
      ArgumentError: ``num_features`` or ``rngs`` is invalid; at a call, the input has
        another number of features.

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

    reduction_axes: Axes
    feature_axes: Axes

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
        rngs: Rngs = NO_RNGS,
        scale_metadata: Metadata = NO_METADATA,
    ):
        self._begin(locals())

    def _cast(self, inputs: Any, *statistics: Any) -> Any:
        return *dtypes.promote(self, inputs, *statistics, self.scale), None

    def __call__(self, x: Any, mask: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: array with num_features elements along ``feature_axes``.
          mask: booleans that broadcast to ``x``; the mean leaves False elements out.
            What is hidden as a whole is not normalised.

        Returns:
          Array of the shape of ``x``.

        Raises:
          ArgumentError: ``x`` or the mask does not fit.
        """
        axes, features = self.reduction_axes, self.feature_axes
        return self._over(x, axes, features, mask, centred=False)


class InstanceNorm(Norm):
    """Normalises each feature of each example by its statistics over all other axes.

    Args:
      num_features: number of features.
      epsilon: added to the variance.
      dtype: dtype of the result; by default, the one that input and parameters promote
        to.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initialiser of ``bias``, of shape (num_features,).
      scale_init: initialiser of ``scale``, of shape (num_features,).
      feature_axes: axes along which scale and bias vary; not the first, that of the
        batch.
      axis_name: name of a mapped axis over whose members statistics are averaged, with
        a mask by how much of each is seen.
      axis_index_groups: groups of indices of that axis to average among.
      use_fast_variance: variance as E[x^2] - E[x]^2: one pass, less precise.
      promote_dtype: casts (inputs, scale, bias) to one dtype.
      rngs: gives the keys of stream ``params``.
      bias_metadata: metadata of the bias.
      scale_metadata: metadata of the scale.

    Raises:
      ArgumentError: ``num_features`` or ``rngs`` is invalid; at a call, the input has
        another number of features, or features on its first axis.

    References:
      Ulyanov, Vedaldi and Lempitsky, "Instance normalization", arXiv:1607.08022,
      equation 3.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.InstanceNorm(2, rngs=nnx.Rngs(0))
      >>> layer(jnp.array([[[0.0, 10.0], [2.0, 30.0]]])).round(2).tolist()
      [[[-1.0, -1.0], [1.0, 1.0]]]
    """

    feature_axes: Axes

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
        feature_axes: Axes = -1,
        axis_name: str | None = None,
        axis_index_groups: Any = None,
        use_fast_variance: bool = True,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        rngs: Rngs = NO_RNGS,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ):
        self._begin(locals())

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: array (batch, ...) with num_features elements along ``feature_axes``.
          mask: booleans that broadcast to ``x``; statistics leave False elements out.
            What is hidden as a whole is not normalised.

        Returns:
          Array of the shape of ``x``.

        Raises:
          ArgumentError: ``x`` or the mask does not fit.
        """
        x, *affine, features = self._promoted(x, self.feature_axes)
        if 0 in features:
            raise ArgumentError(
                "InstanceNorm: the first axis is that of the batch, and cannot be "
                f"among feature_axes={self.feature_axes}; found an input {describe(x)}."
            )
        axes = tuple(i for i in range(1, x.ndim) if i not in features)
        mean, variance = self._statistics(x, axes, mask)
        return self._normalized(x, mean, variance, features, *affine)


class GroupNorm(Norm):
    """Normalises groups of an example's features by the statistics of the group.

    Args:
      num_features: number of features, on the last axis.
      num_groups: number of groups; None to give ``group_size`` instead.
      group_size: number of features in a group.
      epsilon: added to the variance.
      dtype: dtype of the result; by default, the one that input and parameters promote
        to.
      param_dtype: dtype of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initialiser of ``bias``, of shape (num_features,).
      scale_init: initialiser of ``scale``, of shape (num_features,).
      reduction_axes: axes over which statistics are taken, the last included; all but
        the first if absent.
      axis_name: name of a mapped axis over whose members statistics are averaged, with
        a mask by how much of each is seen.
      axis_index_groups: groups of indices of that axis to average among.
      use_fast_variance: variance as E[x^2] - E[x]^2: one pass, less precise.
      promote_dtype: casts (inputs, scale, bias) to one dtype.
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

    reduction_axes: Axes | None

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
        rngs: Rngs = NO_RNGS,
        bias_metadata: Metadata = NO_METADATA,
        scale_metadata: Metadata = NO_METADATA,
    ):
        _check_groups(num_features, num_groups, group_size)
        self._begin(locals())
        self.num_groups = num_groups or num_features // (group_size or 1)
        self.group_size = group_size or num_features // (num_groups or 1)
        self.feature_axis = -1

    def __call__(self, x: Any, *, mask: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: array (..., num_features).
          mask: booleans that broadcast to ``x``; statistics leave False elements out.
            What is hidden as a whole is not normalised.

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
            jnp.repeat(s.squeeze(-1), self.group_size, axis=-1)
            for s in (mean, variance)
        )
        return self._normalized(x, mean, variance, features, *affine)


def _check_groups(num_features: int, num_groups: Any, group_size: Any) -> None:
    if (num_groups is None) == (group_size is None):
        raise ArgumentError(
            "GroupNorm needs num_groups or group_size, not both; found num_groups="
            f"{num_groups} and group_size={group_size}. With group_size= write "
            "num_groups=None."
        )
    name, divisor = "num_groups", num_groups
    if divisor is None:
        name, divisor = "group_size", group_size
    check_sizes("GroupNorm", num_features=num_features, **{name: divisor})
    if not divisor or num_features % divisor:
        raise ArgumentError(
            f"GroupNorm: {name}={divisor} does not divide num_features={num_features}."
        )
