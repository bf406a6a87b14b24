"""Embed: a table of vectors, looked up by index."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sortal._engine.variable import describe
from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes
from sortal.nn.initializers import (
    NO_METADATA,
    NO_RNGS,
    Initializer,
    Metadata,
    check_sizes,
    default_embed_init,
    new_param,
)
from sortal.random import Rngs


class Embed(Module):
    """Maps integers to learned vectors, and by ``attend`` vectors to logits.

    An index of ``num_embeddings`` or more gives NaN; negative ones count from the end.
    A table of one vector gives that vector for every index.

    Args:
      num_embeddings: how many vectors there are.
      features: the size of each.
      dtype: dtype of the result; ``param_dtype`` if absent.
      param_dtype: dtype of the table.
      embedding_init: initialiser of ``embedding``, (num_embeddings, features).
      promote_dtype: casts (embedding,), or (query, embedding) in ``attend``.
      rngs: gives the key of stream ``params``.
      embedding_metadata: metadata of the table.

    Raises:
      ArgumentError: a size or ``rngs`` is invalid; at a call, the input's dtype is not
        an integer dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> table = nnx.Embed(5, 3, rngs=nnx.Rngs(0))
      >>> table(jnp.array([[0, 1], [4, 4]])).shape
      (2, 2, 3)
      >>> table.attend(jnp.ones((2, 3))).shape
      (2, 5)
    """

    def __init__(
        self,
        num_embeddings: int,
        features: int,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        embedding_init: Initializer = default_embed_init,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        rngs: Rngs = NO_RNGS,
        embedding_metadata: Metadata = NO_METADATA,
    ):
        check_sizes(self, num_embeddings=num_embeddings, features=features)
        shape = (num_embeddings, features)
        self.embedding = new_param(
            self, "embedding", embedding_init, rngs, shape, param_dtype,
            embedding_metadata,
        )  # fmt: skip
        self.num_embeddings = num_embeddings
        self.features = features
        self.dtype = self.embedding.dtype if dtype is None else dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    def __call__(self, inputs: Any, out_sharding: Any = None) -> jax.Array:
        """Looks vectors up.

        Args:
          inputs: integer array of any shape.
          out_sharding: sharding of the output, on an explicit or automatic mesh.

        Returns:
          Array (*inputs.shape, features).

        Raises:
          ArgumentError: the input's dtype is not an integer dtype; or this is a stack
            of layers.
        """
        inputs = dtypes.as_array(self, inputs)
        if not jnp.issubdtype(inputs.dtype, jnp.integer):
            raise ArgumentError(
                f"Embed looks up by integers; found {describe(inputs)}. Write "
                "inputs.astype(jnp.int32) if these are indices."
            )
        dtypes.check_single(self, "embedding", 2)
        (table,) = self.promote_dtype(
            (self.embedding[...],), dtype=self.dtype, inexact=False
        )
        take = _repeat if self.num_embeddings == 1 else _take
        if out_sharding is None or dtypes.is_automatic(out_sharding):
            return dtypes.constrain(take(table, inputs), out_sharding)
        # These have no such argument, so their inside uses automatic sharding.
        return jax.sharding.auto_axes(out_sharding=out_sharding)(take)(table, inputs)

    def attend(self, query: Any, out_sharding: Any = None) -> jax.Array:
        """Inner products of vectors with the whole table, as for tied output weights.

        Args:
          query: array (..., features).
          out_sharding: sharding of the output, on an explicit or automatic mesh.

        Returns:
          Array (..., num_embeddings).

        Raises:
          ArgumentError: the last axis has another size; or this is a stack of layers.
        """
        x, table = dtypes.promote(self, query, self.embedding)
        dtypes.check_single(self, "embedding", 2)
        dtypes.check_axis(self, x, table.shape[1])
        to = None if dtypes.is_automatic(out_sharding) else out_sharding
        y = jnp.dot(x, table.T, out_sharding=to)
        return dtypes.constrain(y, out_sharding)


def _repeat(table: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.broadcast_to(table, (*indices.shape, table.shape[1]))


def _take(table: jax.Array, indices: jax.Array) -> jax.Array:
    if indices.dtype.itemsize < 4:
        # JAX adds the table's size to negative ones in their own dtype.
        indices = indices.astype(jnp.int32)
    elif indices.dtype.itemsize > 4:
        # JAX takes their last 32 bits.
        unsigned = jnp.issubdtype(indices.dtype, jnp.unsignedinteger)
        indices = indices.clip(0 if unsigned else -len(table) - 1, len(table))
    return jnp.take(table, indices, axis=0)
