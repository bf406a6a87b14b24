"""What the norms share: moments over some axes, scale and bias along others."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sortal._engine.promotion import mixing, wide
from sortal._engine.variable import Param, describe
from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes
from sortal.nn.initializers import NO_METADATA, check_sizes, new_param

Axes = int | Sequence[int]


class Norm(Module):
    """Base of the norms: settings, parameters and arithmetic."""

    epsilon: float
    dtype: DTypeLike | None
    axis_name: str | None
    axis_index_groups: Any
    use_fast_variance: bool
    promote_dtype: dtypes.PromoteDtype
    scale: Param[jax.Array] | None
    bias: Param[jax.Array] | None

    def _begin(self, arguments: Mapping[str, Any]) -> None:
        """Makes parameters and attributes of the constructor's ``locals()``."""
        given = {n: x for n, x in arguments.items() if n not in {"self", "rngs"}}
        check_sizes(self, num_features=given["num_features"])
        for name in ("scale", "bias"):
            init = given.pop(f"{name}_init", None)
            metadata = given.pop(f"{name}_metadata", NO_METADATA)
            shape, dtype = (given["num_features"],), given["param_dtype"]
            param = None
            if given.get(f"use_{name}", False):
                rngs = arguments["rngs"]
                param = new_param(self, name, init, rngs, shape, dtype, metadata)
            setattr(self, name, param)
        for name, setting in given.items():
            setattr(self, name, setting)

    def _promoted(self, inputs: Any, features: Axes, *statistics: Any) -> Any:
        """Input, statistics, scale and bias in one dtype, and the feature axes."""
        x, *arrays = self._cast(inputs, *statistics)
        axes = self._axes(x, features)
        found = math.prod(x.shape[a] for a in axes)
        for array in arrays:
            if array is not None and array.size != found:
                for name in ("mean", "scale", "bias"):
                    dtypes.check_single(self, name, 1)
                raise ArgumentError(
                    f"{dtypes.name_of(self)} has parameters for {array.size} features "
                    f"on axes {features} of its input; found an input {describe(x)}."
                )
        return x, *arrays, axes

    def _cast(self, inputs: Any, *statistics: Any) -> Any:
        """Input, statistics, scale and bias, as the layer promotes them."""
        return dtypes.promote(self, inputs, *statistics, self.scale, self.bias)

    def _axes(self, x: Any, axes: Axes) -> tuple[int, ...]:
        """Non-negative axes in rising order, without repeats."""
        given = axes if isinstance(axes, Sequence) else (axes,)
        if not all(-x.ndim <= a < x.ndim for a in given):
            raise ArgumentError(
                f"{dtypes.name_of(self)} works on axes {axes}, which its input "
                f"{describe(x)} does not have."
            )
        return tuple(sorted({a % x.ndim for a in given}))

    @mixing
    def _statistics(
        self,
        x: Any,
        axes: tuple[int, ...],
        mask: Any,
        *,
        centred: bool = True,
        unseen: tuple[Any, Any] = (0.0, 1.0),
    ) -> tuple[Any, Any]:
        """Mean (None if not centred) and variance; reduced ``axes`` are kept as 1.

        Where the mask hides all elements, or there are none, they are ``unseen``: the
        mean of nothing would be NaN.
        """
        if mask is None and not math.prod(x.shape[a] for a in axes):
            mask = True
        if mask is None:
            return self._moments(x, functools.partial(self._means, axes), centred)
        mask = self._broadcast_mask(mask, x)
        seen = self._total(jnp.sum(mask, axes, keepdims=True))
        means = functools.partial(self._masked_means, axes, mask, seen)
        mean, variance = self._moments(x, means, centred)
        variance = jnp.where(seen > 0, variance, unseen[1])
        return mean if mean is None else jnp.where(seen > 0, mean, unseen[0]), variance

    def _moments(self, x: Any, means: Any, centred: bool) -> tuple[Any, Any]:
        dtype = jnp.result_type(x) if self.dtype is None else self.dtype
        x = dtypes.cast(x, wide(dtype))
        if not centred:
            return None, *means(_squared(x))
        if not self.use_fast_variance:
            (mean,) = means(x)
            return mean, *means(_squared(x - mean))
        mean, square = means(x, _squared(x))
        # Rounding can make a variance of zero negative.
        return mean, jnp.maximum(0.0, square - _squared(mean))

    def _means(self, axes: tuple[int, ...], *arrays: Any) -> tuple[Any, ...]:
        means = tuple(jnp.mean(a, axes, keepdims=True) for a in arrays)
        if self.axis_name is None:
            return means
        over = {"axis_name": self.axis_name}
        over["axis_index_groups"] = self.axis_index_groups
        if len({x.dtype for x in means}) > 1:  # a complex mean, and a real square
            return lax.pmean(means, **over)
        # One collective for all means.
        stacked = lax.pmean(jnp.stack(means), **over)
        return tuple(stacked[i] for i in range(len(means)))

    def _masked_means(
        self, axes: tuple[int, ...], mask: Any, seen: Any, *arrays: Any
    ) -> tuple[Any, ...]:
        """Means of the ``seen`` elements, of all members of a mapped axis together."""
        sums = [jnp.sum(a, axes, where=mask, keepdims=True) for a in arrays]
        return tuple(x / jnp.maximum(seen, 1) for x in self._total(sums))

    def _total(self, x: Any) -> Any:
        """A sum over the members of the mapped axis, if there is one."""
        if self.axis_name is None:
            return x
        return lax.psum(x, self.axis_name, axis_index_groups=self.axis_index_groups)

    def _broadcast_mask(self, mask: Any, x: Any) -> Any:
        mask = dtypes.as_array(self, mask)
        try:
            if mask.dtype == bool:
                return jnp.broadcast_to(mask, x.shape)
        except ValueError:
            pass
        raise ArgumentError(
            f"{dtypes.name_of(self)}: the mask must broadcast to the input "
            f"{describe(x)}, and be of booleans; found {describe(mask)}."
        )

    @mixing
    def _normalized(
        self,
        x: Any,
        mean: Any,
        variance: Any,
        features: tuple[int, ...],
        scale: Any,
        bias: Any = None,
    ) -> jax.Array:
        """``(x - mean) / sqrt(variance + epsilon) * scale + bias``."""
        learned = tuple(n if i in features else 1 for i, n in enumerate(x.shape))
        y = x if mean is None else x - mean
        factor = lax.rsqrt(variance + self.epsilon)
        if scale is not None:
            factor = factor * dtypes.reshape(scale, learned)
        y = y * factor
        if bias is not None:
            y = y + dtypes.reshape(bias, learned)
        dtype = dtypes.canonicalize_dtype(x, scale, bias, dtype=self.dtype)
        return dtypes.cast(y, dtype)

    def _over(
        self, inputs: Any, axes: Axes, features: Axes, mask: Any, **options: Any
    ) -> jax.Array:
        """Normalises with the statistics of the input itself."""
        x, *affine, learned = self._promoted(inputs, features)
        reduced = self._axes(x, axes)
        mean, variance = self._statistics(x, reduced, mask, **options)
        return self._normalized(x, mean, variance, learned, *affine)


def _squared(x: Any) -> Any:
    if jnp.iscomplexobj(x):
        return jnp.square(jnp.real(x)) + jnp.square(jnp.imag(x))
    return jnp.square(x)
