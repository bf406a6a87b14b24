"""Dropout: random zeros in training, nothing in evaluation."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sortal._engine.variable import describe
from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes
from sortal.random import Rngs, RngStream, is_rngs, is_stream


class Dropout(Module):
    """Sets elements to zero at random, and scales the others up to keep the mean.

    Args:
      rate: the probability of zero, from 0 to 1.
      broadcast_dims: axes along which all elements share one mask value.
      deterministic: True returns the input as it is; None leaves it to the call.
        ``model.train()`` and ``model.eval()`` set it.
      rng_collection: the stream of ``rngs`` that gives the keys.
      rngs: the streams, or one stream; the layer keeps a fork of it. Without it, each
        call needs one.

    Raises:
      ArgumentError: the rate is not a number from 0 to 1, or ``rngs`` is not a source
        of keys; at a call, there is no source of keys.

    References:
      Srivastava et al., "Dropout: a simple way to prevent neural networks from
      overfitting", JMLR 15 (2014), section 4.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
      >>> set(layer(jnp.ones(100)).tolist()) == {0.0, 2.0}
      True
      >>> layer.eval()
      >>> layer(jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """

    def __init__(
        self,
        rate: float,
        *,
        broadcast_dims: Sequence[int] = (),
        deterministic: bool | None = False,
        rng_collection: str = "dropout",
        rngs: Rngs | RngStream | None = None,
    ):
        if not isinstance(rate, numbers.Real) or not 0 <= rate <= 1:
            raise ArgumentError(
                "Dropout: rate is the probability of zero, a plain number from 0 to "
                f"1; found {describe(rate)}."
            )
        if not (rngs is None or is_rngs(rngs) or is_stream(rngs)):
            raise ArgumentError(
                f"Dropout: rngs must be an Rngs, a stream or None; found "
                f"{describe(rngs)}. Write rngs=nnx.Rngs(0)."
            )
        self.rate = rate
        self.broadcast_dims = tuple(broadcast_dims)
        self.deterministic = deterministic
        self.rng_collection = rng_collection
        stream = rngs[rng_collection] if is_rngs(rngs) else rngs
        self.rngs = None if stream is None else stream.fork()

    def __call__(
        self,
        inputs: Any,
        *,
        deterministic: bool | None = None,
        rngs: Rngs | RngStream | jax.Array | None = None,
    ) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: floating-point array of any shape.
          deterministic: True returns the input as it is; the layer's own if absent.
          rngs: streams, a stream or a key to draw from in place of the layer's own.

        Returns:
          Array of the shape and dtype of the input.

        Raises:
          ArgumentError: neither the call nor the layer sets ``deterministic`` or
            ``rngs``; the input is not floating-point, or lacks a broadcast axis.
        """
        if dtypes.resolve_flag(self, "deterministic", deterministic) or self.rate == 0:
            return inputs
        x = dtypes.as_array(self, inputs)
        if self.rate == 1:
            # Scaling by 1 / (1 - rate) would make NaNs of the gradients.
            return jnp.zeros_like(x)
        keep = 1.0 - self.rate
        key = self._key(self.rngs if rngs is None else rngs)
        drawn = self._drawn_shape(x)
        mask = jax.random.bernoulli(
            key, p=keep, shape=drawn, out_sharding=jax.typeof(x).sharding
        )
        mask = jnp.broadcast_to(mask, x.shape)
        return lax.select(mask, x / keep, jnp.zeros_like(x))

    def set_view(self, deterministic: bool | None = None) -> None:
        """Sets the attributes given; ``view`` calls it on copies of modules.

        Args:
          deterministic: whether to return the input as it is.
        """
        if deterministic is not None:
            self.deterministic = deterministic

    def _key(self, rngs: Any) -> jax.Array:
        if is_rngs(rngs):
            return rngs[self.rng_collection]()
        if is_stream(rngs):
            return rngs()
        if isinstance(rngs, jax.Array):
            return rngs
        raise ArgumentError(
            f"Dropout has nothing to draw from: found rngs={describe(rngs)}. Write "
            "nnx.Dropout(rate, rngs=rngs), or pass an Rngs, a stream or a key to the "
            "call as rngs=; or write model.eval() to turn dropout off."
        )

    def _drawn_shape(self, x: Any) -> tuple[int, ...]:
        if not jnp.issubdtype(x.dtype, jnp.inexact):
            raise ArgumentError(
                f"Dropout scales what it keeps, so its input must be floating-point; "
                f"found {describe(x)}. Write inputs.astype(jnp.float32)."
            )
        if not all(-x.ndim <= d < x.ndim for d in self.broadcast_dims):
            raise ArgumentError(
                f"Dropout: broadcast_dims={self.broadcast_dims} names an axis that its "
                f"input {describe(x)} does not have."
            )
        shared = {d % x.ndim for d in self.broadcast_dims}
        return tuple(1 if i in shared else n for i, n in enumerate(x.shape))
