"""WeightNorm and SpectralNorm: layers whose weights are normalised before each call."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from sortal._engine.paths import Path, show
from sortal._engine.promotion import mixing, wide
from sortal._engine.variable import (
    BatchStat,
    Param,
    Variable,
    describe,
    is_variable,
)
from sortal.errors import ArgumentError, FilterError
from sortal.filters import PathContains, leaf_filter
from sortal.functional import variables
from sortal.module import Module
from sortal.nn import dtypes
from sortal.nn.initializers import NO_RNGS, Initializer, check_rngs, normal, ones
from sortal.nn.moments import Axes
from sortal.random import Rngs


def _weights(layer: Any, *filters: Any) -> Iterator[tuple[Path, Variable]]:
    """The live Variables of a layer, with their paths."""
    return (
        (path, leaf)
        for path, leaf in variables(layer, *filters).flat_state()
        if is_variable(leaf)
    )


def _known(owner: str, found: dict[Any, Any], key: Any, path: Path) -> Any:
    """The parameter made for a weight; refuses weights added since."""
    if key not in found:
        raise ArgumentError(
            f"{owner} was built for other weights: its layer now has {show(path)} too. "
            "Build it again around the changed layer."
        )
    return found[key]


class WeightNorm(Module):
    """A layer whose weights are ``scale * v / |v|``: direction and length separately.

    Each call overwrites the weights of the layer by their normalised form, so what is
    trained is their direction, and ``scales`` their length.

    Args:
      layer_instance: the layer; it is called.
      feature_axes: axes of a weight along which each index has a length of its own;
        None for one length of the whole.
      use_scale: whether lengths are learned; else they are 1.
      scale_init: initialiser of ``scales``, one Param for each weight, of the sizes of
        the feature axes. Its key follows from the stream ``params`` and the weight's
        path; the stream's count does not change.
      epsilon: added to the squared length.
      dtype: dtype of the weights; by default, the one that they and the scales promote
        to.
      param_dtype: ignored; for NNX compatibility.
      variable_filter: which Variables of the layer are weights.
      promote_dtype: ignored; for NNX compatibility.
      rngs: the source of keys.

    Raises:
      ArgumentError: at a call, the layer has a weight that it did not have before.
      FilterError: ``variable_filter`` takes no Param of the layer.

    References:
      Salimans and Kingma, "Weight normalization", arXiv:1602.07868, equation 2.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = nnx.WeightNorm(nnx.Linear(8, 4, rngs=rngs), rngs=rngs)
      >>> y = layer(jnp.ones((5, 8)))
      >>> jnp.linalg.norm(layer.layer_instance.kernel[...], axis=0).round(3).tolist()
      [1.0, 1.0, 1.0, 1.0]
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        feature_axes: Axes | None = -1,
        use_scale: bool = True,
        scale_init: Initializer = ones,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        variable_filter: Any = PathContains("kernel"),  # noqa: B008 - immutable
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        rngs: Rngs = NO_RNGS,
    ):
        self.layer_instance = layer_instance
        self.feature_axes = () if feature_axes is None else feature_axes
        self.use_scale = use_scale
        self.scale_init = scale_init
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.variable_filter = leaf_filter(variable_filter)
        self.promote_dtype = promote_dtype
        self.scales: dict[Path, Param[jax.Array]] | None = None
        weights = list(_weights(layer_instance, Param))
        taken = [(p, w) for p, w in weights if self.variable_filter(p, w)]
        if not taken:
            raise FilterError(
                f"WeightNorm: variable_filter={self.variable_filter!r} takes no weight "
                f"of the {type(layer_instance).__name__}; it has "
                f"{', '.join(show(path) for path, _ in weights) or 'none'}."
            )
        if use_scale:
            check_rngs(self, "scales", rngs)
            self.scales = {
                path: Param(
                    scale_init(
                        _own_key(rngs, path),
                        self._lengths(weight),
                        wide(weight.dtype),
                    )
                )
                for path, weight in taken
            }

    def _axes(self, weight: Any) -> tuple[int, ...]:
        given = self.feature_axes
        axes = (given,) if isinstance(given, int) else given
        if not all(-weight.ndim <= a < weight.ndim for a in axes):
            raise ArgumentError(
                f"WeightNorm: feature_axes={given} names an axis that the weight "
                f"{describe(weight.value)} does not have."
            )
        return tuple(sorted({a % weight.ndim for a in axes}))

    def _lengths(self, weight: Any) -> tuple[int, ...]:
        return tuple(weight.shape[a] for a in self._axes(weight))

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """Normalises the weights, then calls the layer.

        Args:
          x: the layer's input.
          *args: further arguments of the layer.
          **kwargs: further arguments of the layer.

        Returns:
          What the layer returns.

        Raises:
          ArgumentError: the layer has a weight that it did not have before.
        """
        for path, weight in _weights(self.layer_instance):
            if self.variable_filter(path, weight):
                self._normalize(path, weight)
        return self.layer_instance(x, *args, **kwargs)  # type: ignore[operator]

    @mixing
    def _normalize(self, path: Path, weight: Variable) -> None:
        value = weight[...]
        features = self._axes(weight)
        others = tuple(i for i in range(value.ndim) if i not in features)
        new = _unit(value, others, self.epsilon)
        cast = [value]
        if self.scales is not None:
            scale = _known("WeightNorm", self.scales, path, path)[...]
            sizes = [n if i in features else 1 for i, n in enumerate(value.shape)]
            cast.append(scale.reshape(sizes))
            new = new * cast[1]
        dtype = dtypes.canonicalize_dtype(*cast, dtype=self.dtype)
        weight.set_value(jnp.asarray(new, dtype))


def _own_key(rngs: Rngs, path: Path) -> jax.Array:
    """A key that follows from a stream and a path, without advancing the stream.

    NNX takes no key for scales, so layers made afterwards get the same keys as in NNX
    only if none is taken here.
    """
    return jax.random.fold_in(rngs["params"].key.value, zlib.crc32(show(path).encode()))


def _unit(x: Any, axes: Any, epsilon: float) -> Any:
    return x * lax.rsqrt((x * x).sum(axis=axes, keepdims=True) + epsilon)


class SpectralNorm(Module):
    """A layer whose weight matrices are divided by their greatest singular value.

    Each call overwrites the layer's Params of two or more axes by their normalised
    form. The singular value is found by power iteration, which starts where the last
    update ended. Of more than two axes, all but the last count as one.

    Args:
      layer_instance: the layer; it is called.
      n_steps: steps of power iteration in a call; 0 does not change the weights.
      epsilon: added to squared lengths.
      dtype: dtype to which the normalised weights are rounded; by default, the one that
        they and the statistics promote to. The weights keep the dtype that they have.
      param_dtype: dtype of the initial statistics.
      error_on_non_matrix: whether a Param of more than two axes is an error.
      update_stats: whether calls keep what the power iteration found, in
        ``batch_stats``. ``model.train()`` and ``model.eval()`` set it.
      rngs: gives the keys of stream ``params``, for the initial vectors.

    Raises:
      ArgumentError: a Param has more than two axes, where that is an error; at a call,
        the layer has a weight that it did not have before.

    References:
      Miyato et al., "Spectral normalization for generative adversarial networks",
      arXiv:1802.05957, algorithm 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0)
      >>> layer = nnx.SpectralNorm(nnx.Linear(4, 5, rngs=rngs), n_steps=50, rngs=rngs)
      >>> y = layer(jnp.ones((3, 4)))
      >>> float(jnp.linalg.norm(layer.layer_instance.kernel[...], ord=2).round(3))
      1.0
    """

    def __init__(
        self,
        layer_instance: Module,
        *,
        n_steps: int = 1,
        epsilon: float = 1e-12,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        error_on_non_matrix: bool = False,
        update_stats: bool = True,
        rngs: Rngs = NO_RNGS,
    ):
        self.layer_instance = layer_instance
        self.n_steps = n_steps
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.error_on_non_matrix = error_on_non_matrix
        # `train()` and `eval()` set this name, which means the opposite.
        self.use_running_average: bool | None = not update_stats
        self.batch_stats: dict[Path, BatchStat[jax.Array]] = {}
        check_rngs(self, "batch_stats", rngs)
        for path, weight in self._matrices():
            key, shape = rngs.params(), (1, weight.shape[-1])
            start = normal()(key, shape, param_dtype)
            self.batch_stats[*path, "u"] = BatchStat(start)
            self.batch_stats[*path, "sigma"] = BatchStat(ones(key, (), param_dtype))

    def _matrices(self) -> list[tuple[Path, Variable]]:
        """The Params to normalise."""
        found = [(p, w) for p, w in _weights(self.layer_instance, Param) if w.ndim > 1]
        found = found if self.n_steps > 0 else []
        large = [f"{show(p)}: {describe(w.value)}" for p, w in found if w.ndim > 2]
        if large and self.error_on_non_matrix:
            raise ArgumentError(
                "SpectralNorm: these are not matrices: " + ", ".join(large) + ". Pass "
                "error_on_non_matrix=False to take all axes but the last as one."
            )
        return found

    def __call__(self, x: Any, update_stats: bool | None = None) -> Any:
        """Normalises the weights, then calls the layer.

        Args:
          x: the layer's input.
          update_stats: whether to keep what the power iteration found; the layer's own
            if absent.

        Returns:
          What the layer returns.

        Raises:
          ArgumentError: ``update_stats`` is not set; or the layer has a weight that it
            did not have before.
        """
        if update_stats is None:
            name = "use_running_average"
            update_stats = not dtypes.resolve_flag(self, name, None)
        for path, weight in self._matrices():
            self._normalize(path, weight, update_stats)
        return self.layer_instance(x)  # type: ignore[operator]

    @mixing
    def _normalize(self, path: Path, weight: Variable, update_stats: bool) -> None:
        value = weight[...]
        matrix = jnp.reshape(value, (-1, value.shape[-1]))
        kept_u, kept_sigma = (
            _known("SpectralNorm", self.batch_stats, (*path, name), path)
            for name in ("u", "sigma")
        )
        u = v = kept_u[...]
        for _ in range(self.n_steps):
            v = _unit(jnp.matmul(u, matrix.T), None, self.epsilon)
            u = _unit(jnp.matmul(v, matrix), None, self.epsilon)
        u, v = lax.stop_gradient(u), lax.stop_gradient(v)
        sigma = jnp.matmul(jnp.matmul(v, matrix), u.T)[0, 0]
        new = (matrix / jnp.where(sigma != 0, sigma, 1)).reshape(value.shape)
        if update_stats:
            kept_u[...] = u.astype(kept_u.dtype)
            kept_sigma[...] = sigma.astype(kept_sigma.dtype)
        dtype = dtypes.canonicalize_dtype(new, u, v, sigma, dtype=self.dtype)
        weight[...] = jnp.asarray(new, dtype).astype(weight.dtype)
