"""grad and value_and_grad as NNX has them, by bare Variables too."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.tree_util as jtu

from sortal._engine.foreign import to_native
from sortal._engine.nodes import is_root
from sortal._engine.paths import Path
from sortal._engine.state import State
from sortal._engine.variable import Param, is_variable
from sortal.filters import to_filter
from sortal.transforms.autodiff import DiffState

_ENTRIES = ("idx", "key", "name")


def by_variables(transform: Any, on_grads: Callable[..., Any]) -> Any:
    """A derivative that takes Variables outside of modules as NNX does.

    A Variable that is an argument, or in a container that is one, is differentiated by
    whatever its kind, and its gradient is a Variable. The gradient by a module without
    Params is an empty State.

    Args:
      transform: ``grad`` or ``value_and_grad`` of Sortal.
      on_grads: calls a function on the gradients in what it returns.

    Returns:
      The transform.
    """

    @functools.wraps(transform)
    def taking(f: Any, argnums: Any = 0, **options: Any) -> Any:
        options = {"allow_empty": True, **options}
        made = transform(f, argnums, **options)
        several = isinstance(argnums, tuple | list) and not hasattr(argnums, "argnum")
        wanted = to_native(argnums if several else (argnums,))

        @functools.wraps(f)
        def call(*args: Any, **kwargs: Any) -> Any:
            by = [_with_variables(x, options.get("wrt", Param), args) for x in wanted]
            if all(x is y for x, y in zip(by, wanted, strict=True)):
                return made(*args, **kwargs)
            out = transform(f, by if several else by[0], **options)(*args, **kwargs)
            has_aux = options.get("has_aux", False)
            return on_grads(out, has_aux, variables_for_states)

        return call

    return taking


def _with_variables(wanted: Any, wrt: Any, args: Sequence[Any]) -> Any:
    """What to differentiate by, with the Variables outside of modules in it."""
    number = getattr(wanted, "argnum", wanted)
    if not isinstance(number, int) or not -len(args) <= number < len(args):
        return wanted
    rows = jtu.tree_leaves_with_path(args[number], is_leaf=is_root)
    paths = {_path(keys) for keys, x in rows if is_variable(x)}
    if not paths:
        return wanted
    chosen = to_filter(getattr(wanted, "filter", wrt))

    def takes(path: Path, leaf: Any) -> bool:
        return path in paths or bool(chosen(path, leaf))

    return DiffState(number, takes)


def _path(keys: Sequence[Any]) -> Path:
    return tuple(next(getattr(k, n) for n in _ENTRIES if hasattr(k, n)) for k in keys)


def variables_for_states(grads: Any) -> Any:
    """Gradients with a Variable in the place of each State of one.

    Args:
      grads: a tree with States in it.

    Returns:
      The tree.
    """

    def bare(x: Any) -> Any:
        if isinstance(x, State) and x.paths() == ((),):
            return x.flat_state()[0][1]
        return x

    return jax.tree.map(bare, grads, is_leaf=lambda x: isinstance(x, State))


def of_grad(out: Any, has_aux: bool, change: Callable[[Any], Any]) -> Any:
    """What ``grad`` returned, with its gradients changed."""
    return (change(out[0]), out[1]) if has_aux else change(out)


def of_value_and_grad(out: Any, has_aux: bool, change: Callable[[Any], Any]) -> Any:
    """What ``value_and_grad`` returned, with its gradients changed."""
    return out[0], change(out[1])
