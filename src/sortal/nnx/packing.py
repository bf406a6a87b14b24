"""unpack: States that bring their GraphDef along; flatten and unflatten."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any, Never

import jax

from sortal import functional
from sortal._engine.graphdef import GraphDef
from sortal._engine.state import FlatState, State, as_state
from sortal._engine.variable import is_variable
from sortal.errors import ArgumentError, MergeError
from sortal.nnx import calls
from sortal.nnx.keywords import ignoring

split = ignoring("graph")(functional.split)
GraphDef.apply = calls.apply  # type: ignore[attr-defined]


class GraphState(MutableMapping[Any, Any]):
    """A State with the GraphDef of the model that it is from.

    Used as a mapping it is the State, and its attributes are the State's.

    Args:
      graphdef: the GraphDef.
      state: the State.

    Raises:
      ArgumentError: ``state`` is no State.

    Example:
      >>> from sortal import nnx
      >>> packed = nnx.unpack(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> packed["kernel"].shape, nnx.merge(packed).kernel.shape
      ((2, 3), (2, 3))
    """

    __slots__ = ("_graphdef", "_state")

    _graphdef: GraphDef
    _state: State

    def __init__(self, graphdef: GraphDef, state: State):
        if not isinstance(state, State):
            raise ArgumentError(
                f"GraphState takes a GraphDef and a State; found a "
                f"{type(state).__name__}."
            )
        object.__setattr__(self, "_graphdef", graphdef)
        object.__setattr__(self, "_state", state)

    def __class_getitem__(cls, model: Any) -> Any:
        return cls

    def __getattr__(self, name: str) -> Any:
        if name in GraphState.__slots__:  # being copied or unpickled: not set yet
            raise AttributeError(name)
        return getattr(self._state, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._state, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._state[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._state[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._state[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __repr__(self) -> str:
        return f"GraphState({self._graphdef!r}, {self._state!r})"

    def __reduce__(self) -> Any:
        return (GraphState, (self._graphdef, self._state))


jax.tree_util.register_pytree_with_keys(
    GraphState,
    lambda x: (
        ((jax.tree_util.GetAttrKey("_state"), x._state),),
        x._graphdef,
    ),
    lambda graphdef, states: _unflattened(graphdef, *states),
)


def _unflattened(graphdef: Any, state: Any) -> GraphState:
    made = object.__new__(GraphState)  # JAX also puts placeholders in a State's place
    object.__setattr__(made, "_graphdef", graphdef)
    object.__setattr__(made, "_state", state)
    return made


def unpack(node: Any, *filters: Any, graph: bool | None = None) -> Any:
    """``split`` with the GraphDef in each of the States.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      *filters: together they must take every leaf; everything if absent.
      graph: ignored; for NNX compatibility.

    Returns:
      A GraphState, or a tuple with one for each filter where there are several.

    Raises:
      FilterError: a filter is malformed, swallowed by an earlier one, or leaves are
        left over; all of them are listed.

    Example:
      >>> from sortal import nnx
      >>> model = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> params, rest = nnx.unpack(model, nnx.Param, ...)
      >>> type(nnx.merge(params, rest)).__name__
      'BatchNorm'
    """
    graphdef, *states = functional.split(node, *filters)
    packed = tuple(GraphState(graphdef, s) for s in states)
    return packed[0] if len(packed) == 1 else packed


@ignoring("copy", "recreate_variables")
def merge(
    graphdef: Any,
    state: Any = None,
    /,
    *states: Any,
    missing: Any = None,
    **_unknown: Never,
) -> Any:
    """``sortal.merge``, which also takes what ``unpack`` returns.

    Args:
      graphdef: what ``split`` returned first; or a GraphState, and then all are.
      state: a State or nested dict of leaves.
      *states: more of them.
      missing: where leaves that no state holds come from, as for ``sortal.merge``.

    Returns:
      The new model.

    Raises:
      MergeError: leaves are missing, unknown, given twice or of the wrong kind, or
        GraphStates are those of different models.

    Example:
      >>> from sortal import nnx
      >>> nnx.merge(nnx.unpack(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))).kernel.shape
      (2, 3)
    """
    given = [x for x in (graphdef, state, *states) if x is not None]
    if not isinstance(graphdef, GraphState):
        return functional.merge(graphdef, *given[1:], missing=missing, **_unknown)
    others = [x for x in given if not isinstance(x, GraphState)]
    if others or any(x._graphdef != graphdef._graphdef for x in given):
        raise MergeError(
            "merge takes a GraphDef and States, or the GraphStates of one model; found "
            f"{', '.join(type(x).__name__ for x in given)}"
            f"{'' if others else ' of different structures'}."
        )
    states = tuple(x._state for x in given)
    return functional.merge(graphdef._graphdef, *states, missing=missing, **_unknown)


def flatten(
    node: Any,
    /,
    *,
    with_paths: bool = True,
    ref_index: Any = None,
    ref_outer_index: Any = None,
    graph: bool | None = None,
) -> tuple[GraphDef, Any]:
    """The GraphDef of a model and its live leaves.

    Args:
      node: a Module, or a container of Modules, Variables and arrays.
      with_paths: whether the leaves come with their paths.
      ref_index: only None. To flatten several models that share Variables, flatten a
        tuple of them.
      ref_outer_index: only None.
      graph: ignored; for NNX compatibility.

    Returns:
      The GraphDef, and a FlatState or a list of leaves.

    Raises:
      ArgumentError: ``ref_index`` or ``ref_outer_index`` is given.

    Example:
      >>> from sortal import nnx
      >>> graphdef, leaves = nnx.flatten(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> [path for path, _ in leaves]
      [('bias',), ('kernel',)]
    """
    if ref_index is not None or ref_outer_index is not None:
        raise ArgumentError(
            "flatten keeps no table of references between calls. Models that share "
            "Variables are flattened together: write nnx.flatten((first, second))."
        )
    graphdef = functional.graphdef(node)
    leaves = functional.variables(node).flat_state()
    return graphdef, leaves if with_paths else list(leaves.leaves)


def unflatten(
    graphdef: GraphDef,
    state: Any,
    /,
    *,
    index_ref: Any = None,
    outer_index_outer_ref: Any = None,
    copy_variables: bool = False,
    recreate_variables: bool = True,
) -> Any:
    """The model of a GraphDef and its leaves; the inverse of ``flatten``.

    Args:
      graphdef: the GraphDef.
      state: a FlatState, State, nested dict, or list of the leaves in order.
      index_ref: only None; see ``flatten``.
      outer_index_outer_ref: only None; see ``flatten``.
      copy_variables: True gives the model Variables of its own; False those given.
      recreate_variables: ignored; for NNX compatibility.

    Returns:
      The model.

    Raises:
      ArgumentError: ``index_ref`` or ``outer_index_outer_ref`` is given, or the number
        of leaves is another one than the GraphDef's.

    Example:
      >>> from sortal import nnx
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> nnx.unflatten(*nnx.flatten(model)).kernel is model.kernel
      True
    """
    if index_ref is not None or outer_index_outer_ref is not None:
        raise ArgumentError(
            "unflatten keeps no table of references between calls. Write "
            "nnx.flatten((first, second)), and unflatten them together."
        )
    if isinstance(state, FlatState):
        leaves = list(state.leaves)
    elif isinstance(state, list | tuple):
        leaves = list(state)
    else:
        leaves = list(as_state(state).leaves())
    schema = graphdef.schema
    if len(leaves) != len(schema):
        raise ArgumentError(
            f"the GraphDef has {len(schema)} leaves; found {len(leaves)}."
        )
    if copy_variables or not all(
        is_variable(x) or kind is None
        for x, kind in zip(leaves, schema.kinds, strict=True)
    ):
        values = [x.get_raw_value() if is_variable(x) else x for x in leaves]
        leaves = graphdef.build_leaves(values)
    return graphdef.build(leaves)[0]
