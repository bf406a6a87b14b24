"""to_linen: a Module class as a Linen module."""

from __future__ import annotations

import functools
from typing import Any

from sortal._engine.variable import RngState
from sortal.filters import Not
from sortal.functional import state, update
from sortal.interop.linen import collections
from sortal.random import Rngs


def to_linen(
    nnx_class: Any,
    *args: Any,
    metadata_fn: Any = collections.boxed,
    name: str | None = None,
    skip_rng: bool = False,
    **kwargs: Any,
) -> Any:
    """A Linen module that makes a Module and keeps its Variables as Linen does.

    Args:
      nnx_class: the class of the Module, not an instance.
      *args: arguments of its constructor.
      metadata_fn: makes Linen's value of a Variable; by default a
        ``flax.linen.Partitioned`` where metadata names its axes, else the plain value.
        None always gives the plain value.
      name: the Linen module's name.
      skip_rng: whether the constructor takes no ``rngs``.
      **kwargs: arguments of the constructor.

    Returns:
      The Linen module. Its collections are named after kinds, ``params`` for ``Param``;
      random streams are made of Linen's at each call, and not kept.

    Example:
      >>> import jax
      >>> import sortal as nnx
      >>> from sortal.interop.linen import to_linen
      >>> dense = to_linen(nnx.Linear, 2, 3)
      >>> variables = dense.init(jax.random.key(0), jax.numpy.ones((1, 2)))
      >>> variables["params"]["kernel"].shape
      (2, 3)
    """
    from flax.core import FrozenDict

    return linen_class()(
        nnx_class=nnx_class,
        args=args,
        kwargs=FrozenDict(kwargs),
        skip_rng=skip_rng,
        metadata_fn=metadata_fn,
        name=name,
    )


def to_linen_class(
    base_nnx_class: Any,
    base_metadata_fn: Any = collections.boxed,
    base_skip_rng: bool = False,
    **partial_kwargs: Any,
) -> Any:
    """A Linen class whose instances are what ``to_linen`` makes of one Module class.

    Args:
      base_nnx_class: the class of the Module.
      base_metadata_fn: as ``metadata_fn`` of ``to_linen``.
      base_skip_rng: as ``skip_rng`` of ``to_linen``.
      **partial_kwargs: arguments of the Module's constructor; those that an instance
        is made with come before them.

    Returns:
      The class.

    Example:
      >>> import jax
      >>> import sortal as nnx
      >>> from sortal.interop.linen import to_linen_class
      >>> Dense = to_linen_class(nnx.Linear, use_bias=False)
      >>> dense = Dense(in_features=2, out_features=3)
      >>> sorted(dense.init(jax.random.key(0), jax.numpy.ones((1, 2)))["params"])
      ['kernel']
    """
    from flax.core import FrozenDict

    base = linen_class()

    class ToLinenPartial(base):
        def __init__(
            self,
            args: Any = (),
            kwargs: Any = None,
            nnx_class: Any = base_nnx_class,
            skip_rng: bool = base_skip_rng,
            metadata_fn: Any = base_metadata_fn,
            *,
            name: str | None = None,
            **others: Any,
        ):
            known = {k: others.pop(k) for k in ("parent",) if k in others}
            base.__init__(
                self,
                nnx_class=nnx_class,
                args=args,
                kwargs=FrozenDict({**partial_kwargs, **(kwargs or {}), **others}),
                skip_rng=skip_rng,
                metadata_fn=metadata_fn,
                name=name,
                **known,
            )

        def __init_subclass__(cls, **options: Any):
            super().__init_subclass__(**options)
            cls.__init__ = ToLinenPartial.__init__  # Linen gave it one of its own

    return ToLinenPartial


@functools.cache
def linen_class() -> Any:
    """The class of what ``to_linen`` makes.

    It is made at the first use, so that Flax is imported only where it is used.

    Returns:
      The class.

    Example:
      >>> from sortal.interop.linen import linen_class
      >>> linen_class().__name__
      'ToLinen'
    """
    from flax import linen
    from flax.core import FrozenDict, meta, unfreeze

    class ToLinen(linen.Module):  # type: ignore[misc]
        nnx_class: Any
        args: Any = ()
        kwargs: Any = FrozenDict({})
        skip_rng: bool = False
        metadata_fn: Any = collections.boxed

        @linen.compact
        def __call__(self, *args: Any, nnx_method: Any = None, **kwargs: Any) -> Any:
            first = self.is_initializing()
            module = self.nnx_class(*self.args, **self.kwargs, **self._rngs(first))
            if first:
                self._keep(module)
            else:
                kept: Any = self.variables
                mine: Any = meta.unbox(unfreeze(kept))
                update(module, *mine.values())
            method = nnx_method or "__call__"
            if isinstance(method, str):
                method = getattr(type(module), method)
            scope: Any = self.scope
            with collections.changing(scope.mutable):
                out = method(module, *args, **kwargs)
            if not first:
                self._keep(module)
            return out

        def __getattr__(self, name: str) -> Any:
            """The arguments that the NNX class is called with, and its methods."""
            if name in self.kwargs:
                return self.kwargs[name]
            # A copy that is being made has no class yet.
            method = getattr(vars(self).get("nnx_class"), name, None)
            if name.startswith("_") or not callable(method):
                return super().__getattr__(name)
            return functools.partial(self.__call__, nnx_method=method)

        def _rngs(self, first: bool) -> dict[str, Any]:
            if self.skip_rng:
                return {}
            scope: Any = self.scope
            keys: dict[str, Any] = {name: self.make_rng(name) for name in scope.rngs}
            if not first:
                # The constructor needs a stream, though its values are replaced.
                keys.setdefault("default", 0)
            return {"rngs": Rngs(**keys)}

        def _keep(self, module: Any) -> None:
            leaves = state(module, Not(RngState)).flat_state()
            box = self.metadata_fn or (lambda variable: variable.value)
            for collection, nested in collections.to_linen(leaves, box).items():
                if self.is_mutable_collection(collection):
                    for key, x in nested.items():
                        self.put_variable(collection, key, x)

    return ToLinen
