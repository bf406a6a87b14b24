"""LoRA: trainable updates of low rank beside frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sortal._engine.promotion import wide
from sortal._engine.variable import Param, Variable, describe
from sortal.errors import ArgumentError
from sortal.module import Module
from sortal.nn import dtypes
from sortal.nn.initializers import (
    NO_METADATA,
    NO_RNGS,
    Initializer,
    Metadata,
    check_sizes,
    he_uniform,
    new_param,
    zeros,
)
from sortal.nn.linear import Linear
from sortal.random import Rngs

default_a_initializer: Initializer = he_uniform()
default_b_initializer: Initializer = zeros


class LoRAParam(Param):
    """The kind of LoRA's factors, so that they can be trained or saved alone.

    It is a ``Param`` too: ``wrt=LoRAParam`` trains the factors, ``wrt=Param`` all.

    Example:
      >>> import sortal as nnx
      >>> layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
      >>> nnx.state(layer, nnx.LoRAParam).paths()
      (('lora', 'lora_a'), ('lora', 'lora_b'))
    """


class LoRA(Module):
    """``y = x @ lora_a @ lora_b``, plus the output of a base module.

    Args:
      in_features: size of the input's last axis.
      lora_rank: size of the axis between the factors.
      out_features: size of the output's last axis.
      base_module: a module, or another callable, whose output is added.
      dtype: dtype of the computation; by default, the one that input and parameters
        promote to.
      param_dtype: dtype of the factors.
      a_initializer: initialiser of ``lora_a``, (in_features, lora_rank).
      b_initializer: initialiser of ``lora_b``, (lora_rank, out_features).
      lora_param_type: the kind of the factors.
      promote_dtype: casts (inputs, lora_a, lora_b) to one dtype.
      rngs: gives the keys of stream ``params``.
      a_metadata: metadata of ``lora_a``.
      b_metadata: metadata of ``lora_b``.

    Raises:
      ArgumentError: a size or ``rngs`` is invalid, or the base module cannot be called;
        at a call, the input has another number of features.

    References:
      Hu et al., "LoRA: low-rank adaptation of large language models",
      arXiv:2106.09685, equation 3.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> base = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
      >>> layer = nnx.LoRA(3, 2, 4, base_module=base, rngs=nnx.Rngs(1))
      >>> x = jnp.ones((16, 3))
      >>> bool((layer(x) == base(x)).all())  # lora_b begins with zeros
      True
    """

    def __init__(
        self,
        in_features: int,
        lora_rank: int,
        out_features: int,
        *,
        base_module: Callable[..., Any] | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable] = LoRAParam,
        promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        rngs: Rngs = NO_RNGS,
        a_metadata: Metadata = NO_METADATA,
        b_metadata: Metadata = NO_METADATA,
    ):
        check_sizes(
            self,
            in_features=in_features,
            lora_rank=lora_rank,
            out_features=out_features,
        )
        if base_module is not None and not callable(base_module):
            raise ArgumentError(
                f"LoRA adds to what base_module(x) returns; found base_module="
                f"{describe(base_module)}, which cannot be called."
            )
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.lora_param_type = lora_param_type
        self.base_module = base_module
        self.promote_dtype = promote_dtype
        self.lora_a = new_param(
            self, "lora_a", a_initializer, rngs, (in_features, lora_rank), param_dtype,
            a_metadata, kind=lora_param_type, argument="a_initializer",
        )  # fmt: skip
        self.lora_b = new_param(
            self, "lora_b", b_initializer, rngs, (lora_rank, out_features), param_dtype,
            b_metadata, kind=lora_param_type, argument="b_initializer",
        )  # fmt: skip

    def __call__(self, x: Any, **kwargs: Any) -> jax.Array:
        """Applies the layer.

        Args:
          x: array (..., in_features); the base module is given it in the dtype of the
            computation.
          **kwargs: further arguments of the base module.

        Returns:
          Array (..., out_features).

        Raises:
          ArgumentError: the last axis has another size; or this is a stack of layers.
        """
        x, lora_a, lora_b = dtypes.promote(self, x, self.lora_a, self.lora_b)
        dtypes.check_single(self, "lora_a", 2)
        dtypes.check_axis(self, x, lora_a.shape[0])
        out = x @ lora_a @ lora_b
        return out if self.base_module is None else out + self.base_module(x, **kwargs)


class LoRALinear(Linear):
    """A Linear plus a LoRA of the same input; paths and values of the Linear stay.

    Args:
      in_features: size of the input's last axis.
      out_features: size of the output's last axis.
      lora_rank: size of the axis between the factors.
      lora_dtype: dtype of the factors' computation; by default, the one that input and
        factors promote to.
      lora_param_dtype: dtype of the factors.
      a_initializer: initialiser of ``lora.lora_a``, (in_features, lora_rank).
      b_initializer: initialiser of ``lora.lora_b``, (lora_rank, out_features).
      lora_param_type: the kind of the factors.
      lora_promote_dtype: casts (inputs, lora_a, lora_b) to one dtype.
      rngs: gives the keys of stream ``params``.
      a_metadata: metadata of ``lora.lora_a``.
      b_metadata: metadata of ``lora.lora_b``.
      **kwargs: further arguments of ``Linear``.

    Raises:
      ArgumentError: a size or ``rngs`` is invalid; at a call, the input has another
        number of features.

    References:
      Hu et al., "LoRA: low-rank adaptation of large language models",
      arXiv:2106.09685, equation 3.

    Example:
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
      >>> grads = nnx.grad(lambda m: m(jnp.ones(3)).sum(), wrt=nnx.LoRAParam)(layer)
      >>> grads.paths()
      (('lora', 'lora_a'), ('lora', 'lora_b'))
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lora_rank: int,
        lora_dtype: DTypeLike | None = None,
        lora_param_dtype: DTypeLike = jnp.float32,
        a_initializer: Initializer = default_a_initializer,
        b_initializer: Initializer = default_b_initializer,
        lora_param_type: type[Variable] = LoRAParam,
        lora_promote_dtype: dtypes.PromoteDtype = dtypes.promote_dtype,
        rngs: Rngs = NO_RNGS,
        a_metadata: Metadata = NO_METADATA,
        b_metadata: Metadata = NO_METADATA,
        **kwargs: Any,
    ):
        super().__init__(in_features, out_features, rngs=rngs, **kwargs)
        self.lora = LoRA(
            in_features,
            lora_rank,
            out_features,
            dtype=lora_dtype,
            param_dtype=lora_param_dtype,
            a_initializer=a_initializer,
            b_initializer=b_initializer,
            lora_param_type=lora_param_type,
            promote_dtype=lora_promote_dtype,
            rngs=rngs,
            a_metadata=a_metadata,
            b_metadata=b_metadata,
        )

    def __call__(self, x: Any, out_sharding: Any = None) -> jax.Array:
        """Applies the layer.

        Args:
          x: array (..., in_features).
          out_sharding: sharding of the linear part, as for ``Linear``.

        Returns:
          Array (..., out_features).

        Raises:
          ArgumentError: the last axis has another size.
        """
        return super().__call__(x, out_sharding) + self.lora(x)

    def merge(self) -> Linear:
        """A Linear whose kernel holds the update: what to deploy after fine-tuning.

        Returns:
          A Linear with Variables of its own; this layer is left as it is.

        Example:
          >>> import sortal as nnx
          >>> layer = nnx.LoRALinear(3, 4, lora_rank=2, rngs=nnx.Rngs(0))
          >>> nnx.state(layer.merge()).paths()
          (('bias',), ('kernel',))
        """
        old: Any = self.kernel[...]
        to = wide(old.dtype)
        a, b = (jnp.asarray(x[...], to) for x in (self.lora.lora_a, self.lora.lora_b))
        new = old.astype(to) + jnp.matmul(a, b, precision="highest")
        own = {
            "kernel": self.kernel.replace(new.astype(old.dtype)),
            "bias": None if self.bias is None else self.bias.replace(),
        }
        made = Linear.__new__(Linear)
        for name, value in vars(self).items():  # in the order that a Linear has
            if name != "lora":
                setattr(made, name, own.get(name, value))
        return made
