"""prefix, and models as JAX pytrees and back: to_tree and from_tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec, Sharding

from sortal._engine.graphdef import GraphDef
from sortal._engine.nodes import is_root
from sortal._engine.paths import Path, show
from sortal._engine.state import State
from sortal._engine.variable import is_variable
from sortal.errors import FilterError, StructureError, UnsupportedError, listing
from sortal.filters import PathIn, to_filter
from sortal.functional import merge, split, variables
from sortal.nnx.walks import find_duplicates
from sortal.transforms._adapter.prefixes import StateAxes, StateSharding


def prefix(
    node: Any,
    filter_map: Mapping[Any, Any] | Callable[[Path, Any], Any],
    /,
    *,
    graph: bool | None = None,
) -> Any:
    """Axes or shardings for the leaves of a tree, to give to a transform.

    Args:
      node: a model, or a pytree of models, Variables and arrays.
      filter_map: a function of path and leaf that returns the answer, or a mapping
        from filter to answer, of which the first that fits counts.
      graph: ignored; for NNX compatibility.

    Returns:
      The tree with answers in the place of Variables and arrays, and a ``StateAxes`` or
      ``StateSharding`` in the place of each model.

    Raises:
      FilterError: no filter takes a leaf; all such leaves are listed.

    Example:
      >>> import jax.numpy as jnp
      >>> from sortal import nnx
      >>> d = {"a": nnx.Param(jnp.array(2)), "b": nnx.BatchStat(jnp.arange(5))}
      >>> axes = nnx.prefix(d, {nnx.Param: None, nnx.BatchStat: 0})
      >>> nnx.vmap(lambda d: d["a"] * d["b"], in_axes=(axes,))(d).tolist()
      [0, 2, 4, 6, 8]
    """
    missed: list[str] = []
    answer: Any = filter_map
    filters: list[Any] = []
    if isinstance(filter_map, Mapping):
        filters += filter_map
        rules = [(to_filter(f), value) for f, value in filter_map.items()]

        def by_filter(path: Path, leaf: Any) -> Any:
            for takes, value in rules:
                if takes(path, leaf):
                    return value
            missed.append(f"{show(path)} ({type(leaf).__name__})")
            return None

        answer = by_filter

    def of_root(keys: Any, x: Any) -> Any:
        path = tuple(map(_key, keys))
        if is_variable(x) or not is_root(x):
            return answer(path, x)
        pairs = [
            (p, answer((*path, *p), leaf)) for p, leaf in variables(x).flat_state()
        ]
        table: list[tuple[Any, list[Path]]] = []
        for p, value in pairs:
            row = next((row for row in table if row[0] == value), None)
            if row is None:
                table.append((value, [p]))
            else:
                row[1].append(p)
        placed = any(isinstance(v, PartitionSpec | Sharding) for v, _ in table)
        make: Any = StateSharding if placed else StateAxes
        return make([(PathIn(*paths), value) for value, paths in table])

    made = jax.tree_util.tree_map_with_path(of_root, node, is_leaf=is_root)
    if missed:
        raise FilterError(
            f"no filter of {filters} takes these leaves:\n{listing(missed)}\n"
            "End the mapping with `...: answer`."
        )
    return made


def _key(key: Any) -> Any:
    for name in ("key", "idx", "name"):
        if hasattr(key, name):
            return getattr(key, name)
    return key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class NodeStates:
    """A model as a JAX pytree: its values in a State, and its GraphDef.

    Args:
      graphdef: the GraphDef.
      states: the States.

    Example:
      >>> import jax
      >>> from sortal import nnx
      >>> node = nnx.to_tree(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> [x.shape for x in jax.tree.leaves(node)]
      [(3,), (2, 3)]
    """

    graphdef: GraphDef = dataclasses.field(metadata={"static": True})
    states: tuple[State, ...]

    @property
    def state(self) -> State:
        """The only State."""
        (state,) = self.states
        return state

    @classmethod
    def from_split(cls, graphdef: GraphDef, state: State, /, *states: State) -> Any:
        """The NodeStates of what ``split`` returned.

        Args:
          graphdef: the GraphDef.
          state: a State.
          *states: more of them.

        Returns:
          The NodeStates.
        """
        return cls(graphdef, (state, *states))


def to_tree(tree: Any, /, **options: Any) -> Any:
    """A pytree with ``NodeStates`` in the place of models and Variables.

    Args:
      tree: a pytree of models, Variables and anything else.
      **options: those of NNX's function, of which none is taken.

    Returns:
      The new pytree, of bare arrays to JAX.

    Raises:
      StructureError: two of the models share a Variable.
      UnsupportedError: an option is given.

    Example:
      >>> from sortal import nnx
      >>> tree = nnx.to_tree({"model": nnx.Linear(2, 3, rngs=nnx.Rngs(0)), "n": 1})
      >>> nnx.from_tree(tree)["model"].kernel.shape
      (2, 3)
    """
    _refuse("to_tree", options)
    roots = [x for x in jax.tree.leaves(tree, is_leaf=is_root) if is_root(x)]
    between = [
        " and ".join(map(str, found))
        for found in find_duplicates(roots)
        if len({path[0] for path in found}) > 1
    ]
    if between:
        raise StructureError(
            "to_tree makes a pytree of each model, and these are or have the same "
            f"Variables, by number and path:\n{listing(between)}\nWrite "
            "nnx.split((first, second)), which keeps them shared."
        )
    return jax.tree.map(
        lambda x: NodeStates.from_split(*split(x)) if is_root(x) else x,
        tree,
        is_leaf=is_root,
    )


def from_tree(tree: Any, /, **options: Any) -> Any:
    """A pytree with models in the place of ``NodeStates``; the inverse of ``to_tree``.

    Args:
      tree: a pytree.
      **options: those of NNX's function, of which none is taken.

    Returns:
      The new pytree.

    Raises:
      UnsupportedError: an option is given.

    Example:
      >>> from sortal import nnx
      >>> nnx.from_tree([nnx.to_tree(nnx.Param(1))])[0].value
      1
    """
    _refuse("from_tree", options)
    return jax.tree.map(
        lambda x: merge(x.graphdef, *x.states) if isinstance(x, NodeStates) else x,
        tree,
        is_leaf=lambda x: isinstance(x, NodeStates),
    )


def _refuse(name: str, options: dict[str, Any]) -> None:
    if options:
        raise UnsupportedError(
            f"{name} takes no {', '.join(sorted(options))}. The transforms of nnx take "
            "modules as they are, with StateAxes or StateSharding for axes by kind; "
            "for a transform of your own, split each module, and merge inside."
        )
