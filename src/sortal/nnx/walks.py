"""Functions of every node and leaf of a model: map, recursive_map, find_duplicates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax

from sortal._engine.nodes import LEAF, STATIC, handler_of, is_root
from sortal._engine.paths import Path, order, show
from sortal._engine.variable import Variable, is_variable, value_of
from sortal.errors import StructureError, UnsupportedError
from sortal.filters import to_filter
from sortal.functional import clone, graphdef, merge, split, variables
from sortal.module import Module, is_module


def map(
    f: Callable[[Path, Any], Any],
    node: Any,
    /,
    *,
    graph: bool | None = None,
    recreate_variables: bool = True,
) -> Any:
    """A new model whose leaves are what ``f`` makes of each path and leaf.

    Args:
      f: takes a path and a Variable or array; returns the new leaf.
      node: a Module, or a container of Modules, Variables and arrays.
      graph: ignored; for NNX compatibility.
      recreate_variables: whether the new model has Variables of its own; if not, it
        has those that ``f`` returns.

    Returns:
      The new model.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> zeros = nnx.map(lambda path, v: v.replace(jnp.zeros_like(v)), model)
      >>> float(zeros.kernel.sum())
      0.0
    """
    if not recreate_variables:
        return recursive_map(lambda p, x: f(p, x) if _is_leaf(x) else x, node)
    graphdef, leaves = split(node)
    return merge(graphdef, leaves.map(f))


def _is_leaf(x: Any) -> bool:
    return is_variable(x) or handler_of(x) is LEAF


def recursive_map(
    f: Callable[[Path, Any], Any], node: Any, /, *, graph: bool | None = None
) -> Any:
    """A new model made by ``f`` from each node, leaf and static value, children first.

    What is shared is given to ``f`` once. The Variables are those of the old model.

    Args:
      f: takes a path and an object; returns what to put in its place. A node is one of
        the new model and may be changed.
      node: a Module, or a container of Modules, Variables and arrays.
      graph: ignored; for NNX compatibility.

    Returns:
      What ``f`` returns for the root.

    Raises:
      StructureError: an object holds itself.

    Example:
      >>> from sortal import nnx
      >>> def show(path, x):
      ...     if isinstance(x, nnx.Module):
      ...         print(path, type(x).__name__)
      ...     return x
      >>> _ = nnx.recursive_map(show, [nnx.Linear(2, 3, rngs=nnx.Rngs(0))])
      (0,) Linear
    """
    done: dict[int, Any] = {}
    held: list[Any] = []  # so that no other object gets an id that is in `done`

    def visit(path: Path, x: Any) -> Any:
        handler = handler_of(x)
        leaf = handler in (LEAF, STATIC)
        shared = is_variable(x) if leaf else handler.tracked
        if shared and id(x) in done:
            if done[id(x)] is _OPEN:
                raise StructureError(
                    f"recursive_map: {show(path)} is the {type(x).__name__} that holds "
                    "it. Take such references out of the model, or use iter_graph."
                )
            return done[id(x)]
        new = x
        if shared:
            held.append(x)
            done[id(x)] = _OPEN
        if not leaf:
            items = handler.items(x)
            made = {k: visit(_below(handler, path, k), v) for k, v in items.items()}
            if any(made[k] is not v for k, v in items.items()):
                made = handler.arranged(x, made)
                if handler.tracked:
                    handler.fill(x, handler.spec(x), made)
                else:
                    new = handler.build(type(x), handler.spec(x), made)
        new = f(path, new)
        if shared:
            done[id(x)] = new
        return new

    return visit((), clone(node, variables=False))


_OPEN: Any = object()


def _below(handler: Any, path: Path, key: Any) -> Path:
    return (*path, *key) if handler.flat else (*path, key)


def iter_graph(
    node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[Path, Any]]:
    """Every node, leaf and static value with its path, children before their holder.

    What is shared is met once, by its first path.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      graph: ignored; for NNX compatibility.

    Yields:
      Pairs of path and object.

    Raises:
      StructureError: a static value cannot be hashed, or hides Variables.

    Example:
      >>> from sortal import nnx
      >>> [path for path, _ in nnx.iter_graph({"w": nnx.Param(1), "n": 2})]
      [('n',), ('w',), ()]
    """
    graphdef(node)  # refuses what is no graph
    entered: set[int] = set()
    # A list of what is to come, and no recursion: models may be deep.
    todo: list[tuple[Path, Any, bool]] = [((), node, False)]
    while todo:
        path, x, left = todo.pop()
        handler = handler_of(x)
        if left or handler is STATIC:
            yield path, x
            continue
        if is_root(x):
            if id(x) in entered:
                continue
            entered.add(id(x))
        todo.append((path, x, True))
        if handler is not LEAF:
            items = handler.items(x)
            keys = sorted(items, key=repr, reverse=True)
            todo += [(_below(handler, path, k), items[k], False) for k in keys]


def find_duplicates(node: Any, /, *, only: Any = ...) -> list[list[Path]]:
    """The paths of each object and Variable that is met more than once.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      only: which of the later places to list; all if absent.

    Returns:
      A list of the paths of each, for those that have several.

    Example:
      >>> from sortal import nnx
      >>> layer = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
      >>> nnx.find_duplicates([layer, layer])
      [[(0,), (1,)]]
    """
    chosen = to_filter(only)
    places: dict[int, list[Path]] = {}
    entered: set[int] = set()

    todo: list[tuple[Path, Any]] = [((), node)]
    while todo:
        path, x = todo.pop()
        handler = handler_of(x)
        if handler is STATIC:
            continue
        if is_root(x):
            if id(x) not in places:
                places[id(x)] = [path]
            elif chosen(path, x):
                places[id(x)].append(path)
        if handler is LEAF or id(x) in entered:
            continue
        if handler.tracked:
            entered.add(id(x))
        below = [(_below(handler, path, k), v) for k, v in handler.items(x).items()]
        todo += reversed(below)
    return [found for found in places.values() if len(found) > 1]


def iter_module_children(
    node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[Any, Module]]:
    """The modules directly in a module or container, sorted by key.

    Args:
      node: a Module, or a container of Modules.
      graph: ignored; for NNX compatibility.

    Yields:
      Pairs of key and Module.

    Raises:
      StructureError: ``node`` is no node.

    Example:
      >>> from sortal import nnx
      >>> model = [nnx.Linear(2, 5, rngs=nnx.Rngs(0)), nnx.Param(1)]
      >>> [key for key, _ in nnx.iter_module_children(model)]
      [0]
    """
    return _children("iter_module_children", node, is_module)


def iter_children(
    node: Any, /, *, graph: bool | None = None
) -> Iterator[tuple[Any, Any]]:
    """The modules and Variables directly in a module or container, sorted by key.

    Args:
      node: a Module, or a container of Modules and Variables.
      graph: ignored; for NNX compatibility.

    Yields:
      Pairs of key and Module, Variable or the like.

    Raises:
      StructureError: ``node`` is no node.

    Example:
      >>> from sortal import nnx
      >>> [key for key, _ in nnx.iter_children(nnx.Linear(2, 5, rngs=nnx.Rngs(0)))]
      ['bias', 'kernel']
    """
    return _children("iter_children", node, is_root)


def _children(
    name: str, node: Any, takes: Callable[[Any], bool]
) -> Iterator[tuple[Any, Any]]:
    handler = handler_of(node)
    if handler is LEAF or handler is STATIC:
        raise StructureError(
            f"{name} takes a Module or a container; found a {type(node).__name__}."
        )
    items = sorted(handler.items(node).items(), key=lambda pair: order(pair[0]))
    return ((key, child) for key, child in items if takes(child))


def set_metadata(node: Any, /, *, only: Any = Variable, **metadata: Any) -> None:
    """Sets metadata of Variables in place.

    Args:
      node: a Module, or a container of Modules and Variables.
      only: a filter that says which Variables; all if absent.
      **metadata: names and values.

    Example:
      >>> from sortal import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.set_metadata(model, frozen=True, only=nnx.Param)
      >>> model.kernel.get_metadata("frozen")
      True
    """
    for _, leaf in variables(node, only).flat_state():
        if is_variable(leaf):
            leaf.set_metadata(**metadata)


def as_pure(tree: Any) -> Any:
    """A tree with bare values in the place of Variables.

    Args:
      tree: a State, or another pytree of Variables.

    Returns:
      The new tree; a State of bare arrays for a State.

    Example:
      >>> import jax
      >>> from sortal import nnx
      >>> state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> nnx.as_pure(state)["kernel"].shape
      (2, 3)
    """

    def bare(x: Any) -> Any:
        return as_pure(value_of(x)) if is_variable(x) else x

    return jax.tree.map(bare, tree, is_leaf=is_variable)


pure = as_pure


def with_vars(
    node: Any,
    /,
    *,
    hijax: bool | None = None,
    ref: bool | None = None,
    mutable: bool | None = None,
    only: Any = ...,
    allow_duplicates: bool = False,
) -> Any:
    """A new model whose Variables are plain mutable objects, as they always are here.

    Args:
      node: a Module, or a container of Modules and Variables.
      hijax: only False, which changes nothing.
      ref: only False, which changes nothing.
      mutable: only True, which changes nothing.
      only: which Variables are meant; no effect, for none is changed.
      allow_duplicates: likewise.

    Returns:
      The new model, with the same Variables.

    Raises:
      UnsupportedError: ``hijax=True``, ``ref=True`` or ``mutable=False``.

    Example:
      >>> from sortal import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.with_vars(model, ref=False).kernel is model.kernel
      True
    """
    if mutable is False:
        raise UnsupportedError(
            "Variables can always be written. To keep values as they are, pass "
            "nnx.state(model), or nnx.as_pure(nnx.state(model)), to what reads them."
        )
    refuse_other_boxes(hijax, ref)
    return clone(node, variables=False)


def refuse_other_boxes(hijax: bool | None, ref: bool | None) -> None:
    """Refuses the kinds of storage for a Variable that Sortal does not have."""
    if hijax or ref:
        raise UnsupportedError(
            f"Variables hold their value themselves, and not in a "
            f"{'hijax type' if hijax else 'jax.Ref'}. Leave the option out: nnx.jit "
            "and the other transforms of nnx carry what a function writes out of it."
        )


vars_as = with_vars
