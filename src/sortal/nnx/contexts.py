"""NNX's contexts: a module through a transform of one's own, and its edits back.

The module is split outside, merged inside, split inside and merged outside. What the
inner split gives says of each object which one outside it is a copy of, so that the
outer merge writes to that; it is static, and so is there again at each later call of a
compiled function, whose inside does not run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import jax

from sortal import functional
from sortal._engine.graphdef import GraphDef
from sortal._engine.leaves import Leaves, held, store_all
from sortal._engine.nodes import STATIC, handler_of
from sortal._engine.plan import Plan, bind
from sortal._engine.variable import check_writable, value_of
from sortal.errors import ArgumentError, UnsupportedError


@jax.tree_util.register_static
@dataclass(frozen=True)
class InnerGraphDef:
    """A GraphDef, and for each of its nodes and leaves its number outside, or None."""

    graphdef: GraphDef
    nodes: tuple[int | None, ...]
    leaves: tuple[int | None, ...]


class UpdateContext:
    """A module on its way through a transform; what ``update_context`` gives.

    Args:
      tag: its name.

    Example:
      >>> from sortal import nnx
      >>> with nnx.update_context("mine") as ctx:
      ...     type(ctx).__name__, ctx.tag
      ('UpdateContext', 'mine')
    """

    def __init__(self, tag: Any):
        self.tag = tag
        self._outside: tuple[Any, Plan] | None = None
        self._inside: tuple[Any, Plan] | None = None


class _Stacks(threading.local):
    def __init__(self) -> None:
        self.by_tag: dict[Any, list[UpdateContext]] = {}


_stacks = _Stacks()


@contextlib.contextmanager
def update_context(tag: Any) -> Iterator[UpdateContext]:
    """Carries edits of a module out of a transform of one's own.

    The transforms of ``nnx`` do that by themselves, on the module as it is; this is for
    code that has it.

    Args:
      tag: a name, which ``split_context`` and ``merge_context`` are given.

    Yields:
      The UpdateContext; as a decorator it lasts for each call.

    Example:
      >>> import jax
      >>> from sortal import nnx
      >>> @jax.jit
      ... def inside(graphdef, state):
      ...     with nnx.merge_context("mine", inner=True) as ctx:
      ...         model = ctx.merge(graphdef, state)
      ...     model.name, model.itself = "changed", model
      ...     with nnx.split_context("mine") as ctx:
      ...         return ctx.split(model)
      >>> @nnx.update_context("mine")
      ... def change(model):
      ...     with nnx.split_context("mine") as ctx:
      ...         graphdef, state = ctx.split(model)
      ...     graphdef, state = inside(graphdef, state)
      ...     with nnx.merge_context("mine", inner=False) as ctx:
      ...         return ctx.merge(graphdef, state)
      >>> model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
      >>> change(model) is model, model.itself is model, model.name
      (True, True, 'changed')
    """
    context = UpdateContext(tag)
    stack = _stacks.by_tag.setdefault(tag, [])
    stack.append(context)
    try:
        yield context
    finally:
        stack.remove(context)
        if not stack:
            del _stacks.by_tag[tag]


def current_update_context(tag: Any) -> UpdateContext:
    """The innermost UpdateContext of a name.

    Args:
      tag: the name.

    Returns:
      The UpdateContext.

    Raises:
      ArgumentError: there is none.

    Example:
      >>> from sortal import nnx
      >>> with nnx.update_context("mine") as ctx:
      ...     nnx.current_update_context("mine") is ctx
      True
    """
    if tag not in _stacks.by_tag:
        raise ArgumentError(f"No update context found for tag {tag!r}.")
    return _stacks.by_tag[tag][-1]


class SplitContext:
    """What splits a module on its way in or out; what ``split_context`` gives.

    Args:
      ctxtag: the name of the UpdateContext; None for a plain ``split``.

    Example:
      >>> from sortal import nnx
      >>> with nnx.split_context() as ctx:
      ...     type(ctx).__name__
      'SplitContext'
    """

    def __init__(self, ctxtag: Any):
        self.ctxtag = ctxtag
        self._used = False

    def split(self, node: Any, *filters: Any) -> tuple[Any, ...]:
        """``nnx.split`` of the module; of several, as one tuple.

        Args:
          node: the module.
          *filters: as for ``nnx.split``.

        Returns:
          A GraphDef for ``MergeContext.merge``, and a State for each filter.

        Raises:
          UnsupportedError: it is the second split of this context.
        """
        if self._used:
            _refuse_second("split")
        self._used = True
        graphdef, *states = functional.split(node, *filters)
        if self.ctxtag is None:
            return graphdef, *states
        context = current_update_context(self.ctxtag)
        if context._inside is None:
            context._outside = (node, bind(node))
            return graphdef, *states
        nodes, leaves = _numbers(context._inside)
        context._inside, plan = None, bind(node)
        inner = InnerGraphDef(
            graphdef,
            tuple(nodes.get(id(x)) for x in plan.nodes_of(node)),
            tuple(leaves.get(id(held(x))) for x in plan.leaves),
        )
        return inner, *states


class MergeContext:
    """What merges a module on its way in or out; what ``merge_context`` gives.

    Args:
      ctxtag: the name of the UpdateContext; None for a plain ``merge``.
      is_inner: whether the merge is inside the transform.

    Example:
      >>> from sortal import nnx
      >>> with nnx.merge_context() as ctx:
      ...     type(ctx).__name__
      'MergeContext'
    """

    def __init__(self, ctxtag: Any, is_inner: bool | None):
        self.ctxtag, self.is_inner = ctxtag, is_inner
        self._used = False

    def merge(self, graphdef: Any, state: Any, /, *states: Any) -> Any:
        """``nnx.merge`` inside; outside, writes to the objects that were split there.

        Args:
          graphdef: what ``SplitContext.split`` gave first.
          state: a State that it gave.
          *states: more of them.

        Returns:
          The module.

        Raises:
          ArgumentError: outside: ``graphdef`` is not what the split inside gave.
          TraceError: outside: an object belongs to another trace; nothing is changed.
          UnsupportedError: it is the second merge of this context.
        """
        if self._used:
            _refuse_second("merge")
        self._used = True
        if self.ctxtag is None or self.is_inner:
            whole = graphdef
            if isinstance(graphdef, InnerGraphDef):
                whole = graphdef.graphdef
            node = functional.merge(whole, state, *states)
            if self.ctxtag is not None:
                context = current_update_context(self.ctxtag)
                context._inside = (node, bind(node))
            return node
        context = current_update_context(self.ctxtag)
        if not isinstance(graphdef, InnerGraphDef) or context._outside is None:
            raise ArgumentError(
                "an outer merge takes what the split inside gave, which follows "
                f"nnx.merge_context({self.ctxtag!r}, inner=True) there."
            )
        return _written(graphdef, (state, *states), *context._outside)


@contextlib.contextmanager
def split_context(ctxtag: Any = None) -> Iterator[SplitContext]:
    """A SplitContext, for one split; see ``update_context``.

    Args:
      ctxtag: the name of the UpdateContext; None for a plain ``split``.

    Yields:
      The SplitContext.

    Example:
      >>> from sortal import nnx
      >>> with nnx.split_context() as ctx:
      ...     graphdef, state = ctx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> state.paths()
      (('bias',), ('kernel',))
    """
    yield SplitContext(ctxtag)


@contextlib.contextmanager
def merge_context(
    ctxtag: Any = None, inner: bool | None = None
) -> Iterator[MergeContext]:
    """A MergeContext, for one merge; see ``update_context``.

    Args:
      ctxtag: the name of the UpdateContext; None for a plain ``merge``.
      inner: whether the merge is inside the transform.

    Yields:
      The MergeContext.

    Example:
      >>> from sortal import nnx
      >>> graphdef, state = nnx.split(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> with nnx.merge_context() as ctx:
      ...     ctx.merge(graphdef, state).kernel.shape
      (2, 3)
    """
    yield MergeContext(ctxtag, inner)


def _refuse_second(verb: str) -> NoReturn:
    raise UnsupportedError(
        f"one {verb} for each context: objects that share are split as one tuple, "
        "ctx.split((a, b)), and merged as one."
    )


def _numbers(known: tuple[Any, Plan]) -> tuple[dict[int, int], dict[int, int]]:
    """The numbers of the nodes and leaves that have an identity, by their ids."""
    root, plan = known
    nodes = enumerate(plan.nodes_of(root))
    kinds = plan.graphdef.schema.kinds
    return (
        {id(x): n for n, x in nodes if handler_of(x).tracked},
        {id(held(x)): k for k, x in enumerate(plan.leaves) if kinds[k] is not None},
    )


def _written(inner: InnerGraphDef, states: Any, root: Any, plan: Plan) -> Any:
    """Makes the objects outside what their copies inside became."""
    graphdef, schema = inner.graphdef, inner.graphdef.schema
    live = plan.nodes_of(root)
    kept = [(i, k) for i, k in enumerate(inner.leaves) if k is not None]
    tracked = [live[n] for n in inner.nodes if n is not None]
    owners = [handler_of(x).owner(x) for x in tracked]
    check_writable(
        x for x in (*owners, *(plan.leaves[k] for _, k in kept)) if x is not None
    )
    new = list(bind(functional.merge(graphdef, *states)).leaves)
    leaves = list(map(held, new))
    values = [value_of(leaves[i]) for i, _ in kept]
    store_all([Leaves([plan.leaves[k] for _, k in kept])], values)
    for i, k in kept:
        leaf = plan.leaves[k]
        if plan.graphdef.schema.metadata[k] is not schema.metadata[i]:
            leaf.set_metadata(dict(schema.metadata[i]))
        leaves[i] = held(leaf)
    nodes = graphdef.shells()
    for n, number in enumerate(inner.nodes):
        if number is not None:
            nodes[n] = live[number]
            if type(nodes[n]) is not graphdef.records[n].cls:
                nodes[n].__class__ = graphdef.records[n].cls
    graphdef.fill(nodes, leaves, range(len(nodes)))
    what, ref = graphdef.root[1:]
    return ref.value if what is STATIC else (leaves if what else nodes)[ref]
