"""ToNNX: a Linen module as a Module."""

from __future__ import annotations

import contextvars
import functools
import types
from collections.abc import Iterable
from typing import Any

import jax

from sortal._engine.marks import static
from sortal._engine.nodes import get_dict
from sortal._engine.paths import Path
from sortal._engine.variable import Variable, check_writable, value_of, write
from sortal.errors import ArgumentError, listing
from sortal.functional import iter_graph
from sortal.interop.linen.collections import from_linen, mutable_here, to_linen
from sortal.module import Module, iter_modules
from sortal.random import Rngs

_initialising: contextvars.ContextVar[frozenset[int]]
_initialising = contextvars.ContextVar("initialising", default=frozenset())
_OWN = "to_nnx__"


class _Held:
    """A Linen module as a static value; with lists in its fields it has no hash."""

    def __init__(self, module: Any):
        self.module = module

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and (
            self.module is other.module or bool(self.module == other.module)
        )

    def __hash__(self) -> int:
        return hash(type(self.module))

    def __repr__(self) -> str:
        return repr(self.module)


class ToNNX(Module):
    """A Linen module as a Module; its collections give the kinds of its Variables.

    Linen makes variables from an input, so call ``lazy_init`` before the first call.
    The methods of the Linen module can be called on it.

    Args:
      module: the Linen module.
      rngs: the streams that ``init`` and calls draw from, or a key for ``params``.

    Example:
      >>> from flax import linen
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> from sortal.interop.linen import ToNNX
      >>> model = ToNNX(linen.Dense(3), rngs=nnx.Rngs(0))
      >>> model = model.lazy_init(jnp.ones((1, 2)))
      >>> model.kernel, model(jnp.ones((1, 2))).shape
      (Param(float32[2,3]), (1, 3))
    """

    def __init__(self, module: Any, rngs: Rngs | jax.Array | None = None):
        if not hasattr(module, "init_with_output"):
            raise ArgumentError(
                f"ToNNX takes a Linen module, such as flax.linen.Dense(3); found a "
                f"{type(module).__name__}."
            )
        self.to_nnx__held = static(_Held(module))
        self.to_nnx__rngs: Rngs | None = None
        if isinstance(rngs, Rngs):
            self.to_nnx__rngs = rngs.fork()
        elif rngs is not None:
            self.to_nnx__rngs = Rngs(params=rngs)

    @property
    def to_nnx__module(self) -> Any:
        """The Linen module."""
        return self.to_nnx__held.module

    @property
    def module(self) -> Any:
        """The Linen module."""
        return self.to_nnx__module

    @property
    def rngs(self) -> Rngs | None:
        """The streams of this module."""
        return self.to_nnx__rngs

    def lazy_init(self, *args: Any, **kwargs: Any) -> Any:
        """Makes the Variables; see ``lazy_init``.

        Args:
          *args: arguments of a call.
          **kwargs: keyword arguments of a call.

        Returns:
          This module.
        """
        return lazy_init(self, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        held = get_dict(self).get(f"{_OWN}held")
        module = held and held.module
        method = getattr(type(module), name, None)
        if name.startswith("__") or not callable(method):
            raise AttributeError(
                f"{type(self).__name__} of a {type(module).__name__} has no attribute "
                f"{name!r}. Variables are there after lazy_init(input)."
            )
        return functools.partial(self.__call__, method=method)

    def __call__(
        self,
        *args: Any,
        rngs: Rngs | jax.Array | None = None,
        method: Any = None,
        mutable: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Calls the Linen module on the Variables here.

        Args:
          *args: arguments of the Linen module.
          rngs: streams for this call, or a key for ``params``; its own if absent.
          method: a method of the Linen module, or its name; its ``__call__`` if absent.
          mutable: the collections that the call may change, as for Linen's ``apply``.
            If absent, none, or inside ``to_linen`` what the outer call may change; a
            function that is compiled in there keeps what that was when it was traced.
          **kwargs: keyword arguments of the Linen module.

        Returns:
          The output. Changes of the call are written to the Variables.
        """
        keys = _keys(self.to_nnx__rngs if rngs is None else rngs)
        module = self.to_nnx__module
        if id(self) in _initialising.get():
            out, found = module.init_with_output(keys, *args, method=method, **kwargs)
        else:
            mutable = mutable_here.get() if mutable is None else mutable
            mine = to_linen(
                (path, x)
                for path, x in iter_graph(self)
                if isinstance(x, Variable) and not str(path[0]).startswith(_OWN)
            )
            out = module.apply(
                mine, *args, rngs=keys, method=method, mutable=mutable, **kwargs
            )
            if mutable is False:
                return out
            out, found = out
        stored = from_linen(found)
        _check_names(path[0] for path in stored)
        for path, variable in stored.items():
            _store(self, path, variable)
        return out


def _check_names(names: Iterable[Any]) -> None:
    """Refuses names that ``ToNNX`` itself reads, of which Linen knows nothing."""
    own = [k for k, x in vars(ToNNX).items() if isinstance(x, property)]
    if taken := sorted({x for x in names if x in own or str(x).startswith(_OWN)}):
        raise ArgumentError(
            "ToNNX has attributes of its own with the names that the Linen module "
            f"gives to variables or submodules:\n{listing(taken)}\nRename these there."
        )


def _keys(rngs: Any) -> dict[str, Any]:
    if rngs is None:
        return {}
    if not isinstance(rngs, Rngs):
        return {"params": rngs}
    keys = {name: stream() for name, stream in rngs.items()}
    if "params" not in keys and "default" in keys:
        keys["params"] = keys.pop("default")
    return keys


def _store(module: ToNNX, path: Path, variable: Variable) -> None:
    *above, last = path
    old: Any
    if not above:
        old = get_dict(module).get(str(last))
    else:
        if str(above[0]) not in get_dict(module):
            setattr(module, str(above[0]), {})
        holder = get_dict(module)[str(above[0])]
        for key in above[1:]:
            holder = holder.setdefault(key, {})
        old = holder.get(last)
    if type(old) is type(variable):
        check_writable([old])
        write(old, value_of(variable))
        old.set_metadata(variable.get_metadata())
    elif above:
        holder[last] = variable
    else:
        setattr(module, str(last), variable)


def lazy_init(fn: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls a model once so that the Linen modules in it make their Variables.

    Args:
      fn: a Module, a method of one, or a method of the Linen module in one.
      *args: arguments of the call.
      **kwargs: keyword arguments of the call.

    Returns:
      ``fn``.

    Raises:
      ArgumentError: ``fn`` is neither.

    Example:
      >>> from flax import linen
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> from sortal.interop.linen import ToNNX, lazy_init
      >>> model = ToNNX(linen.Dense(3), rngs=nnx.Rngs(0))
      >>> lazy_init(model, jnp.ones((1, 2))).bias
      Param(float32[3])
    """
    method = fn.func if isinstance(fn, functools.partial) else fn
    owner = method.__self__ if isinstance(method, types.MethodType) else method
    if not isinstance(owner, Module):
        raise ArgumentError(
            "lazy_init takes a Module or a method of one, and what to call it with; "
            f"found a {type(fn).__name__}."
        )
    inside = frozenset(id(m) for _, m in iter_modules(owner) if isinstance(m, ToNNX))
    token = _initialising.set(_initialising.get() | inside)
    try:
        fn(*args, **kwargs)
    finally:
        _initialising.reset(token)
    return fn
