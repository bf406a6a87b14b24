"""JAX's activation functions, under the names of NNX, and PReLU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.nn import celu as celu
from jax.nn import elu as elu
from jax.nn import gelu as gelu
from jax.nn import glu as glu
from jax.nn import hard_sigmoid as hard_sigmoid
from jax.nn import hard_silu as hard_silu
from jax.nn import hard_swish as hard_swish
from jax.nn import hard_tanh as hard_tanh
from jax.nn import identity as identity
from jax.nn import leaky_relu as leaky_relu
from jax.nn import log_sigmoid as log_sigmoid
from jax.nn import log_softmax as log_softmax
from jax.nn import logsumexp as logsumexp
from jax.nn import one_hot as one_hot
from jax.nn import relu as relu
from jax.nn import relu6 as relu6
from jax.nn import selu as selu
from jax.nn import sigmoid as sigmoid
from jax.nn import silu as silu
from jax.nn import soft_sign as soft_sign
from jax.nn import softmax as softmax
from jax.nn import softplus as softplus
from jax.nn import standardize as standardize
from jax.nn import swish as swish
from jax.numpy import tanh as tanh
from jax.typing import DTypeLike

from sortal._engine.variable import Param
from sortal.module import Module
from sortal.nn import dtypes
from sortal.nn.initializers import NO_METADATA, Metadata


class PReLU(Module):
    """``x`` where it is not negative, and a learned multiple of it elsewhere.

    Args:
      negative_slope_init: the initial multiple.
      dtype: dtype of the computation; that of the input if absent, or if that is an
        integer dtype, the one that input and slope promote to.
      param_dtype: dtype of the slope.
      promote_dtype: casts (inputs, negative_slope) to ``dtype``.
      negative_slope_metadata: metadata of the slope.

    References:
      He et al., "Delving deep into rectifiers", arXiv:1502.01852, equation 1.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> nnx.PReLU(0.5)(jnp.array([-2.0, 3.0]))
      Array([-1.,  3.], dtype=float32)
    """

    def __init__(
        self,
        negative_slope_init: float = 0.01,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        negative_slope_metadata: Metadata = NO_METADATA,
    ):
        self.negative_slope = Param(
            jnp.asarray(negative_slope_init, dtype=param_dtype),
            **negative_slope_metadata,
        )
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.promote_dtype = promote_dtype

    def __call__(self, inputs: Any) -> jax.Array:
        """Applies the layer.

        Args:
          inputs: array of any shape.

        Returns:
          Array of the shape of the input.

        Raises:
          ArgumentError: the input is not an array.
        """
        x = dtypes.as_array(self, inputs)
        if self.dtype is None and jnp.issubdtype(x.dtype, jnp.inexact):
            slope = jnp.asarray(self.negative_slope[...], x.dtype)
        else:
            x, slope = dtypes.promote(self, x, self.negative_slope)
        return jnp.where(x >= 0, x, slope * x)
