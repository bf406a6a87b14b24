"""Modules written as Linen's are, by NNX's names: bridge.Module and compact."""

from __future__ import annotations

import collections
import contextvars
import dataclasses
import functools
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp

from sortal import module as modules
from sortal._engine.handlers import Handler
from sortal._engine.kind_names import variable_type_from_name
from sortal._engine.nested import flatten, nest
from sortal._engine.nodes import get_dict, handler_of
from sortal._engine.variable import Param, RngState, Variable, is_variable
from sortal.errors import ArgumentError
from sortal.filters import Not
from sortal.functional import clone, split, state
from sortal.interop.linen import as_module
from sortal.interop.linen.collections import (
    boxed_whole,
    changing,
    from_linen,
    to_linen,
)
from sortal.nnx.calls import ApplyCaller
from sortal.random import Rngs
from sortal.transforms.compile import eval_shape

_F = TypeVar("_F", bound=Callable[..., Any])


class Scope(modules.Pytree):
    """What a module has while ``init`` or ``apply`` runs.

    Args:
      rngs: the random streams.
      mutable: the collections that may change, as for ``apply``.
    """

    def __init__(self, rngs: Rngs, mutable: Any, given: Any = None, new: bool = False):
        self.rngs, self.mutable, self.new = rngs, mutable, new
        tree = given if isinstance(given, Mapping) else {}
        # A function, for what was given is no part of what the module holds.
        self.given: Callable[[], Mapping[str, Any]] = lambda: tree


@dataclasses.dataclass
class _Context:
    """A module whose method runs."""

    module: Module
    in_compact: bool
    counts: collections.Counter[str] = dataclasses.field(
        default_factory=collections.Counter
    )

    def name_for(self, cls: type) -> str:
        self.counts[cls.__name__] += 1
        return f"{cls.__name__}_{self.counts[cls.__name__] - 1}"


_running: contextvars.ContextVar[tuple[_Context, ...]]
_running = contextvars.ContextVar("running", default=())


@contextmanager
def _inside(module: Module, in_compact: bool = False) -> Iterator[None]:
    token = _running.set((*_running.get(), _Context(module, in_compact)))
    try:
        yield
    finally:
        _running.reset(token)


def current_context() -> Any:
    """The innermost module whose method runs, with whether it is ``compact``.

    Returns:
      What has ``module`` and ``in_compact``, or None.

    Example:
      >>> from sortal import nnx
      >>> nnx.bridge.current_context() is None
      True
    """
    return _running.get()[-1] if _running.get() else None


def current_module() -> Any:
    """The innermost module whose method runs.

    Returns:
      The Module, or None.

    Example:
      >>> from sortal import nnx
      >>> nnx.bridge.current_module() is None
      True
    """
    context = current_context()
    return context and context.module


class _Named(type):
    """Gives modules that are made in a ``compact`` method their place and name."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        context = current_context()
        if context is None:
            return super().__call__(*args, **kwargs)
        parent = kwargs.pop("parent", context.module)
        if "name" in kwargs and not isinstance(kwargs["name"], str):
            raise ArgumentError(f"name is a string; found {kwargs['name']!r}.")
        if parent is not None and parent is not context.module:
            raise ArgumentError(
                f"the parent of a module made in a {type(context.module).__name__} is "
                f"that or None; found a {type(parent).__name__}."
            )
        name = kwargs.get("name")
        dataclass: Any = cls
        if "name" not in {f.name for f in dataclasses.fields(dataclass)}:
            kwargs.pop("name", None)
        if name is None and context.in_compact:
            name = context.name_for(cls)
        made = super().__call__(*args, **kwargs)
        if parent is not None and name is not None:
            setattr(parent, name, made)
        return made


@dataclass_transform(field_specifiers=(dataclasses.field,))
class Module(modules.Module, metaclass=_Named):
    """A Module written as one of Linen: a dataclass, with ``setup`` or ``compact``.

    It holds no values of its own. ``init`` makes them, and ``apply`` is given them, as
    nested dicts by collection.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> class Scale(nnx.bridge.Module):
      ...     size: int
      ...     @nnx.bridge.compact
      ...     def __call__(self, x):
      ...         return x * self.param("w", nnx.initializers.ones, (self.size,))
      >>> variables = Scale(2).init(0, jnp.ones(2))
      >>> Scale(2).apply(variables, jnp.array([1.0, 3.0]))
      Array([1., 3.], dtype=float32)
    """

    scope = None

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        modules.dataclass(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        scope: Any = self.scope
        if scope is not None and name != "scope":
            _bind(value, scope, scope.given().get(name))

    def make_rng(self, name: str = "default") -> jax.Array:
        """A key of a random stream.

        Args:
          name: the stream.

        Returns:
          The key.
        """
        return self._bound_scope("make_rng").rngs[name]()

    def param(
        self, name: str, init_fn: Any, *args: Any, unbox: bool = True, **kwargs: Any
    ) -> Param:
        """The Param of a name: as it was given, else as ``init_fn`` makes it.

        Args:
          name: the name.
          init_fn: a function of a key and what follows.
          *args: arguments of ``init_fn``.
          unbox: ignored; for NNX compatibility.
          **kwargs: keyword arguments of ``init_fn``.

        Returns:
          The Param.

        Raises:
          ArgumentError: no ``init`` or ``apply`` is running, or what was given has
            another kind or shape.
        """

        def make(key: Any) -> Any:
            return init_fn(key() if callable(key) else key, *args, **kwargs)

        return self._variable(Param, name, make)

    def variable(
        self,
        col: str,
        name: str,
        init_fn: Any = None,
        *args: Any,
        unbox: bool = True,
        **kwargs: Any,
    ) -> Variable:
        """The Variable of a collection and name, as ``param``.

        Args:
          col: the collection, which gives the kind.
          name: the name.
          init_fn: a function that makes the value.
          *args: arguments of ``init_fn``.
          unbox: ignored; for NNX compatibility.
          **kwargs: keyword arguments of ``init_fn``.

        Returns:
          The Variable.
        """
        kind = variable_type_from_name(col, allow_register=True)
        make = init_fn and (lambda key: init_fn(*args, **kwargs))
        return self._variable(kind, name, make)

    def _bound_scope(self, what: str) -> Any:
        if self.scope is None:
            raise ArgumentError(
                f"{what} works in setup() and in methods that init or apply calls; "
                f"write {type(self).__name__}(...).init(rngs, ...)."
            )
        return self.scope

    def _variable(self, kind: type[Variable], name: str, make: Any) -> Any:
        scope = self._bound_scope("param" if kind is Param else "variable")
        found = get_dict(self).get(name)
        if found is None:
            found = scope.given().get(name)
            found = found.replace() if is_variable(found) else None
            if found is not None and make is not None:
                key = jax.random.key(0)
                _fit(found, name, eval_shape(lambda: kind(make(key))))
        if found is None:
            if make is None:
                raise ArgumentError(f"no {name} was given, and no init_fn makes it.")
            found = kind(make(lambda: self.make_rng("params")))
        if not isinstance(found, kind):
            raise ArgumentError(
                f"{type(self).__name__}.{name} is a {type(found).__name__}, not a "
                f"{kind.__name__}."
            )
        if name not in get_dict(self):
            setattr(self, name, found)
        return found

    def is_initializing(self) -> bool:
        """Whether ``init`` is running.

        Returns:
          True or False.
        """
        return self.scope is not None and self.scope.new

    @property
    def variables(self) -> Any:
        """The values here by collection, as Linen has them."""
        from flax.core import FrozenDict

        return FrozenDict(_collections(self))

    def apply(
        self,
        variables: Mapping[str, Any],
        *args: Any,
        rngs: Any = None,
        method: Any = "__call__",
        mutable: Any = False,
        **kwargs: Any,
    ) -> Any:
        """Calls a method with values that are given; this object is left alone.

        Args:
          variables: the values, by collection.
          *args: arguments of the method.
          rngs: a seed, a key, a dict of them by stream, or ``Rngs``.
          method: the method, or its name.
          mutable: False, or which collections may change.
          **kwargs: keyword arguments of the method.

        Returns:
          The output, and with ``mutable`` all values afterwards.
        """
        return self._run(variables, rngs, method, mutable, False, args, kwargs)

    def init(
        self, rngs: Any = None, *args: Any, method: Any = "__call__", **kwargs: Any
    ) -> Any:
        """Makes the values that a call needs.

        Args:
          rngs: as for ``apply``.
          *args: arguments of the method.
          method: the method, or its name.
          **kwargs: keyword arguments of the method.

        Returns:
          The values, by collection.
        """
        return self._run({}, rngs, method, True, True, args, kwargs)[1]

    def init_with_output(
        self, rngs: Any = None, *args: Any, method: Any = "__call__", **kwargs: Any
    ) -> Any:
        """As ``init``.

        Args:
          rngs: as for ``apply``.
          *args: arguments of the method.
          method: the method, or its name.
          **kwargs: keyword arguments of the method.

        Returns:
          The output, and the values.
        """
        kwargs.pop("mutable", None)
        return self._run({}, rngs, method, True, True, args, kwargs)

    def _run(
        self,
        variables: Mapping[str, Any],
        rngs: Any,
        method: Any,
        mutable: Any,
        new: bool,
        args: Any,
        kwargs: Any,
    ) -> Any:
        given = from_linen(variables)
        if not isinstance(rngs, Rngs):
            rngs = Rngs(rngs)
        # What Linen modules inside make is noted there for as long as this runs.
        token = as_module._initialising.set(as_module._initialising.get())
        try:
            module: Any = clone(self)
            _bind(module, Scope(rngs, mutable, new=new), nest(given.items()))
            with _inside(module), changing(mutable):
                out = _unbound(module, method)(module, *args, **kwargs)
        finally:
            as_module._initialising.reset(token)
        if mutable is False:
            return out
        return out, _collections(module, given)


def compact(f: _F) -> _F:
    """Marks a method in which submodules and parameters are made, as Linen's.

    Args:
      f: a method of a ``bridge.Module``.

    Returns:
      The method.

    Example:
      >>> from sortal import nnx
      >>> @nnx.bridge.compact
      ... def f(self): return self
      >>> f.__name__
      'f'
    """

    @functools.wraps(f)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Module):
            raise ArgumentError(
                "compact is for methods of an nnx.bridge.Module; found a "
                f"{type(self).__name__}."
            )
        with _inside(self, in_compact=True):
            return f(self, *args, **kwargs)

    return method  # type: ignore[return-value]


def _bind(x: Any, scope: Scope, given: Any) -> None:
    """Has an object, and all below it, be part of what runs, with given values."""
    handler = handler_of(x)
    if is_variable(x):
        if is_variable(given):
            x.value = given.value
        return
    if not isinstance(handler, Handler) or isinstance(x, Rngs):
        return
    tree = given if isinstance(given, Mapping) else {}
    if isinstance(x, as_module.ToNNX):
        for path, variable in flatten(tree) if tree else ():
            as_module._store(x, path, variable)
        return
    if isinstance(x, Module):
        x.scope = Scope(scope.rngs, scope.mutable, tree, scope.new)
    for key, child in handler.items(x).items():
        if key != "scope":
            _bind(child, scope, tree.get(key))
    if isinstance(x, Module) and hasattr(x, "setup"):
        with _inside(x):
            x.setup()  # type: ignore[attr-defined]


def _fit(given: Variable, name: str, made: Variable) -> None:
    """Refuses a value of another shape; adds the metadata that ``init_fn`` has."""
    given.set_metadata({**made.get_metadata(), **given.get_metadata()})
    theirs, ours = (
        [jnp.shape(x) for x in jax.tree.leaves(variable.value)]
        for variable in (made, given)
    )
    if theirs != ours:
        raise ArgumentError(
            f"the value given for {name} has the shape {ours}; init_fn makes {theirs}."
        )


def _unbound(module: Any, method: Any) -> Callable[..., Any]:
    if isinstance(method, str):
        name, method = method, getattr(type(module), method, None)
        if method is None and isinstance(getattr(module, name, None), Module):
            return lambda m, *args, **kwargs: getattr(m, name)(*args, **kwargs)
    method = method.__func__ if isinstance(method, types.MethodType) else method
    if not callable(method):
        raise ArgumentError(
            f"method is a method of {type(module).__name__}, a function of it or the "
            f"name of one; found {method!r}."
        )
    return method


def _collections(module: Any, given: Mapping[Any, Any] | None = None) -> dict[str, Any]:
    leaves = dict(state(module, Not(RngState)).flat_state())
    return to_linen({**(given or {}), **leaves}.items(), boxed_whole)


def nnx_in_bridge_mdl(factory: Callable[[Rngs], Any], name: str | None = None) -> Any:
    """A Module of another style as a submodule of the ``bridge.Module`` that runs.

    Args:
      factory: makes it of random streams.
      name: its name, for a ``compact`` method.

    Returns:
      The Module.

    Raises:
      ArgumentError: no ``bridge.Module`` runs.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> class Net(nnx.bridge.Module):
      ...     @nnx.bridge.compact
      ...     def __call__(self, x):
      ...         make = lambda rngs: nnx.Linear(2, 3, rngs=rngs)
      ...         return nnx.bridge.nnx_in_bridge_mdl(make, name="layer")(x)
      >>> sorted(Net().init(0, jnp.ones(2))["params"]["layer"])
      ['bias', 'kernel']
    """
    scope = _scope_that_runs("nnx_in_bridge_mdl")
    # Without streams its values are all given.
    made = factory(scope.rngs if len(scope.rngs) else Rngs(0))
    return _placed(made, name, type(made))


def linen_in_bridge_mdl(linen_module: Any, name: str | None = None) -> Any:
    """A Linen module as a submodule of the ``bridge.Module`` that runs.

    Args:
      linen_module: the Linen module.
      name: its name, for a ``compact`` method.

    Returns:
      A ``ToNNX`` of it.

    Raises:
      ArgumentError: no ``bridge.Module`` runs.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import linen
      >>> from sortal import nnx
      >>> class Net(nnx.bridge.Module):
      ...     @nnx.bridge.compact
      ...     def __call__(self, x):
      ...         return nnx.bridge.linen_in_bridge_mdl(linen.Dense(3))(x)
      >>> sorted(Net().init(0, jnp.ones(2))["params"])
      ['Dense_0']
    """
    scope = _scope_that_runs("linen_in_bridge_mdl")
    made = as_module.ToNNX(linen_module, scope.rngs if len(scope.rngs) else None)
    if scope.new:
        as_module._initialising.set(as_module._initialising.get() | {id(made)})
    return _placed(made, name, type(linen_module))


def _scope_that_runs(what: str) -> Any:
    module = current_module()
    if module is None:
        raise ArgumentError(f"{what} is called in a method of an nnx.bridge.Module.")
    return module._bound_scope(what)


def _placed(made: Any, name: str | None, cls: type) -> Any:
    context = current_context()
    if context.in_compact:
        setattr(context.module, name or context.name_for(cls), made)
    return made


@dataclasses.dataclass
class Functional:
    """A Module class by functions: ``init`` gives its state, ``apply`` takes it.

    Args:
      module_type: the class.
      graphdef: the structure; None before ``init``.
      args: arguments of the class.
      kwargs: keyword arguments of the class.
    """

    module_type: type
    graphdef: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def init(self, *, rngs: Rngs | None = None) -> Any:
        """Makes the Module.

        Args:
          rngs: random streams for its constructor, if it takes them.

        Returns:
          Its State.
        """
        extra = {} if rngs is None else {"rngs": rngs}
        made = self.module_type(*self.args, **self.kwargs, **extra)
        self.graphdef, found = split(made)
        return found

    def apply(self, *states: Any) -> Any:
        """The Module as a function of its arguments that returns output and new state.

        Args:
          *states: its state.

        Returns:
          The function, whose attributes are methods.

        Raises:
          ArgumentError: ``init`` was not called.
        """
        if self.graphdef is None:
            raise ArgumentError("call init before apply.")
        return ApplyCaller((self.graphdef, *states))


def functional(cls: type) -> Callable[..., Functional]:
    """A Module class by functions.

    Args:
      cls: the class.

    Returns:
      What is called with the arguments of the class.

    Example:
      >>> from sortal import nnx
      >>> layer = nnx.bridge.functional(nnx.Linear)(2, 3)
      >>> layer.init(rngs=nnx.Rngs(0)).paths()
      (('bias',), ('kernel',))
    """
    return lambda *args, **kwargs: Functional(cls, None, args, kwargs)
