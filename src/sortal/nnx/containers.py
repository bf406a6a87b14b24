"""List and Dict: NNX's containers, for code that names them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, Self

import jax.tree_util as jtu

from sortal._engine.jax_compat import current_trace, register_pytree
from sortal._engine.marks import Marked
from sortal._engine.nodes import STATIC, handler_of
from sortal._engine.paths import order
from sortal._engine.variable import foreign_write
from sortal.errors import ArgumentError, PathAttributeError


def _guarded(base: type, names: str) -> Callable[[type], type]:
    """Makes methods refuse to change a container that another trace owns."""

    def method(name: str) -> Callable[..., Any]:
        change = getattr(base, name)

        @functools.wraps(change)
        def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
            if self._trace is not current_trace():
                raise foreign_write([(self, (), type(self).__name__)])
            return change(self, *map(_unmarked, args), **kwargs)

        return guarded

    def guard(cls: type) -> type:
        for name in names.split():
            setattr(cls, name, method(name))
        return cls

    return guard


@_guarded(
    list,
    "append extend insert remove pop clear sort reverse __setitem__ __delitem__ "
    "__iadd__ __imul__",
)
class List(list):
    """A list of modules, Variables or arrays; a plain list works as well.

    Args:
      *args: one iterable of the elements; none if absent.

    Example:
      >>> from sortal import nnx
      >>> layers = nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))])
      >>> len(layers)
      1
    """

    __slots__ = ("_trace",)

    def __new__(cls, *args: Any, **_: Any) -> Self:
        self = super().__new__(cls)
        _set_list_trace(self, current_trace())
        return self

    def __init__(self, items: Iterable[Any] = ()):
        super().__init__([_unmarked(x) for x in items])

    def __reduce__(self) -> Any:
        return (type(self), (), None, iter(list(self)))


def _unmarked(x: Any) -> Any:
    """An item without a mark that says what it is in any case."""
    if not isinstance(x, Marked):
        return x
    is_leaf = handler_of(x.value) is not STATIC
    if is_leaf is not (x.role == "data"):
        raise ArgumentError(
            f"List: {x.value!r} is marked {x.role}, and is {'' if is_leaf else 'no '}"
            "data in a list. Put a number that is data into an array or a Variable, "
            "and what is static into an attribute of its own."
        )
    return x.value


_set_list_trace: Callable[[List, Any], None] = List.__dict__["_trace"].__set__


@_guarded(
    dict,
    "pop popitem clear update setdefault __setitem__ __delitem__ __ior__",
)
class Dict(dict):
    """A dict of modules, Variables or arrays whose items are attributes too.

    Built as ``dict`` is: from a mapping, pairs, or keywords.

    Example:
      >>> from sortal import nnx
      >>> heads = nnx.Dict(policy=nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> heads.policy is heads["policy"]
      True
    """

    __slots__ = ("_trace",)

    def __new__(cls, *args: Any, **items: Any) -> Self:
        self = super().__new__(cls)
        _set_dict_trace(self, current_trace())
        return self

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise PathAttributeError(_no_item(self, name)) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __delattr__(self, name: str) -> None:
        if name not in self:
            raise PathAttributeError(_no_item(self, name))
        del self[name]

    # Items are passed last, so that copies keep cycles. They are the only attributes.
    def __reduce__(self) -> Any:
        return (type(self), (), None, None, iter(list(self.items())))


_set_dict_trace: Callable[[Dict, Any], None] = Dict.__dict__["_trace"].__set__


def _no_item(items: Dict, name: str) -> str:
    return f"Dict has no item {name!r}; it has {sorted(map(str, items))}."


def _flatten_dict(x: Dict) -> tuple[list[Any], tuple[Any, ...]]:
    keys = tuple(sorted(x, key=order))
    return [x[k] for k in keys], keys


def _flatten_dict_with_keys(x: Dict) -> tuple[list[Any], tuple[Any, ...]]:
    keys = tuple(sorted(x, key=order))
    return [(jtu.DictKey(k), x[k]) for k in keys], keys


register_pytree(
    List,
    lambda x: (list(x), None),
    lambda x: ([(jtu.SequenceKey(i), v) for i, v in enumerate(x)], None),
    lambda _, xs: List(xs),
)
register_pytree(
    Dict,
    _flatten_dict,
    _flatten_dict_with_keys,
    lambda keys, xs: Dict(zip(keys, xs, strict=True)),
)
