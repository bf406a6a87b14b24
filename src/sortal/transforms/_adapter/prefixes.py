"""Answers by kind: which axis, role or sharding each leaf of the arguments has."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.tree_util as jtu

from sortal._engine.schema import Schema
from sortal._engine.state import State, snapshot
from sortal._engine.statics import PLACEMENT
from sortal._engine.variable import describe, make, value_of
from sortal.errors import ArgumentError, AxisError, PolicyError, listing
from sortal.filters import Filter, PathIn, leaf_filter
from sortal.policy.policy import Policy, answers
from sortal.policy.rule import format_answer
from sortal.transforms._adapter.binding import BoundArguments, identity
from sortal.transforms._adapter.effects import Effects, Ref
from sortal.transforms._adapter.tracing import FlatModule, is_flat_module


class _CarryType:
    """The type of ``Carry``."""

    def __repr__(self) -> str:
        return "Carry"

    def __reduce__(self) -> str:
        return "Carry"


Carry: Any = _CarryType()
"""In ``scan``, says that an argument or kind goes from one step to the next."""


class ByKind:
    """An immutable table from filter to answer; the first filter that fits counts.

    Args:
      table: a mapping, or pairs, of filter literal and answer; or a State of answers.

    Raises:
      FilterError: a filter is malformed.
    """

    __slots__ = ("_key", "answers", "filters", "tests")

    column = ""

    def __init__(self, table: Mapping[Any, Any] | Iterable[tuple[Any, Any]]):
        if isinstance(table, State):
            leaves = sorted(table.flat_state(), key=lambda pair: repr(pair[0]))
            table = [(PathIn(path), value_of(leaf)) for path, leaf in leaves]
        pairs = list(table.items() if isinstance(table, Mapping) else table)
        self.filters: tuple[Any, ...] = tuple(literal for literal, _ in pairs)
        self.tests: tuple[Filter, ...] = tuple(map(leaf_filter, self.filters))
        self.answers: tuple[Any, ...] = tuple(answer for _, answer in pairs)
        self._key = (type(self), self.tests, self.answers)

    def items(self) -> Iterable[tuple[Any, Any]]:
        """Pairs of filter, as it was written, and answer, in order."""
        return zip(self.filters, self.answers, strict=True)

    def all_answers(self, name: str) -> list[Any]:
        """All answers there are, as ``Policy.all_answers``."""
        return list(self.answers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ByKind) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        pairs = zip(self.tests, self.answers, strict=True)
        rows = ", ".join(f"{f!r}: {answer!r}" for f, answer in pairs)
        return f"{type(self).__name__}({{{rows}}})"


class StateAxes(ByKind):
    """Axes by kind, for ``vmap`` and ``scan``: ``StateAxes({Param: None, ...: 0})``.

    Args:
      table: a mapping, or pairs, of filter literal and axis: an int, None for what all
        replicas share, or in ``scan`` also ``Carry``; or a State of axes. Leaves that
        no filter takes have the axis that their Variable or their kind declares.

    Raises:
      FilterError: a filter is malformed.

    Example:
      >>> import sortal as nnx
      >>> nnx.StateAxes({nnx.Param: None, ...: 0})
      StateAxes({Param: None, ...: 0})
    """

    column = "axis"

    @property
    def axes(self) -> tuple[Any, ...]:
        """The axes, in the order of ``filters``."""
        return self.answers


class StateSharding(ByKind):
    """Shardings or partition specs by kind, for ``jit`` and ``shard_map``.

    Args:
      table: a mapping, or pairs, of filter literal and ``PartitionSpec`` or
        ``Sharding``; or a State of them. Leaves that no filter takes have the spec that
        their Variable or their kind declares.

    Raises:
      FilterError: a filter is malformed.

    Example:
      >>> from jax.sharding import PartitionSpec as P
      >>> import sortal as nnx
      >>> specs = nnx.StateSharding({nnx.Param: P(), nnx.BatchStat: P("data")})
      >>> specs.shardings == (P(), P("data"))
      True
    """

    column = "spec"

    @property
    def shardings(self) -> tuple[Any, ...]:
        """The shardings, in the order of ``filters``."""
        return self.answers


def is_answer(x: Any) -> bool:
    """Whether a tree of answers ends here: at None, a spec, a table or a Policy."""
    return x is None or isinstance(
        x, (ByKind, Policy, _CarryType, jax.sharding.PartitionSpec)
    )


def by_kind(x: Any) -> bool:
    """Whether ``x`` gives each leaf an answer of its own."""
    return isinstance(x, (ByKind, Policy))


def per_argument(name: str, given: Any, args: Sequence[Any]) -> tuple[Any, ...]:
    """One answer, or tree of answers, for each positional argument.

    Args:
      name: what the user calls them, for the message.
      given: one answer for all arguments, or a tuple or list with one for each.
      args: the arguments.

    Returns:
      As many as there are arguments.

    Raises:
      ArgumentError: there are more or fewer.
    """
    if not isinstance(given, (tuple, list)) or is_answer(given):
        return (given,) * len(args)
    if len(given) != len(args):
        raise ArgumentError(
            f"{name} has {len(given)} entries, but the function was called with "
            f"{len(args)} positional arguments. Give one entry for each."
        )
    return tuple(given)


def of_each(prefix: Any, tree: Any) -> Any:
    """A tree of answers with one in the place of each leaf.

    What ``tree_map`` makes of a prefix has its structure, in which a State has a leaf
    in the place of a whole part.

    Args:
      prefix: a prefix tree of answers.
      tree: what they are about.

    Returns:
      The answers, in the structure of ``tree``.
    """
    given, top = jtu.tree_flatten(prefix, is_leaf=is_answer)
    pairs = zip(given, top.flatten_up_to(tree), strict=True)
    each = [answer for answer, part in pairs for _ in jtu.tree_leaves(part)]
    return jtu.tree_structure(tree).unflatten(each)


def is_structural(given: Any) -> bool:
    """Whether structure alone decides what is answered."""
    if isinstance(given, Policy):
        return given.is_structural("axis") and given.is_structural("spec")
    return not by_kind(given) or all(f.structural for f in given.tests)


def all_answers(tree: Any, name: str) -> list[Any]:
    """All answers that a tree of answers may give.

    Args:
      tree: a prefix tree.
      name: the column to read from Policies.

    Returns:
      The answers, in order.
    """
    return [
        answer
        for x in jtu.tree_leaves(tree, is_leaf=is_answer)
        for answer in (x.all_answers(name) if by_kind(x) else [x])
    ]


def leaf_answers(
    given: Any, name: str, schema: Schema, view: Callable[[], Any]
) -> list[Any]:
    """One answer for each leaf.

    Args:
      given: a ByKind, a Policy, or one answer for all leaves.
      name: the column of the Policy and the kind option to read.
      schema: the leaves.
      view: gives the leaves themselves, for filters that look at values.

    Returns:
      The answers.

    Raises:
      AxisError: a ByKind is of another sort than the transform needs.
      PolicyError: a leaf has no answer; all are listed.
    """
    if not by_kind(given):
        return [given] * len(schema)
    if isinstance(given, Policy):
        found = _declared(name, schema, given, view)
        left = [i for i, answer in enumerate(found) if answer is _NONE]
        if left:
            answers(name, schema.pick(left), given, lambda: [view()[i] for i in left])
        return found
    if given.column != name:
        raise AxisError(
            f"{given!r} holds values for {given.column!r}; here {name!r} is asked for. "
            f"Use {'StateAxes' if name == 'axis' else 'StateSharding'}."
        )
    if is_structural(given):
        return schema.memo(("column", given), lambda: _match(given, schema, None))
    return _match(given, schema, view())


def _match(given: ByKind, schema: Schema, leaves: Any) -> list[Any]:
    found: list[Any] = []
    left: list[int] = []
    pairs = list(zip(given.tests, given.answers, strict=True))
    for i, row in enumerate(schema.rows(leaves)):
        hit = next((a for f, a in pairs if f.test(*row)), _NONE)
        found.append(hit)
        if hit is _NONE:
            left.append(i)
    if left:
        declared = _declared(given.column, schema.pick(left))
        for i, answer in zip(left, declared, strict=True):
            found[i] = answer
        still = [i for i in left if found[i] is _NONE]
        if still:
            raise PolicyError(
                f"{given!r} takes no notice of leaves whose kind and Variable do not "
                f"say their {given.column!r} either:\n"
                + listing(map(schema.describe, still))
                + f"\nAdd a row for them to the {type(given).__name__}, or ... as the "
                "last one."
            )
    return found


def _declared(
    name: str, schema: Schema, given: Policy | None = None, view: Any = None
) -> list[Any]:
    """What a Policy, metadata and kinds say; else where ``shard`` put a leaf."""
    found = answers(name, schema, given, view, _NONE)
    if name != "spec":
        return found
    pairs = zip(found, schema.metadata, strict=True)
    return [m.get(PLACEMENT, _NONE) if x is _NONE else x for x, m in pairs]


_NONE: Any = object()


class Spread:
    """The answers for one call: a tree for JAX, and a list for each root.

    Args:
      bound: the call's arguments.
      prefixes: one prefix tree of answers for each positional argument.
      named: likewise for keyword arguments.
      name: the column to read from Policies and kinds.
      read: from an answer as users write it, and a leaf's value, to one as JAX takes
        it; without a value, answers that depend on it are left as they are.

    Raises:
      ArgumentError: a prefix is built differently from its argument.
      AxisError: answers by kind stand for a plain array, or arguments that share a
        Variable give it two answers; all are listed.
      PolicyError: a leaf has no answer; all are listed.
    """

    def __init__(
        self,
        bound: BoundArguments,
        prefixes: Sequence[Any],
        named: Mapping[str, Any],
        name: str,
        read: Callable[..., Any] = lambda answer, value=None: answer,
    ):
        self.bound, self.name, self.read = bound, name, read
        self.given: list[Any] = [None] * len(bound.roots)
        self.roots: list[list[Any]] = [[] for _ in bound.roots]
        self._at = {id(c): i for i, c in enumerate(bound.flat_modules)}
        self.args = tuple(
            self._tree(given, x, f"argument {i}")
            for i, (given, x) in enumerate(zip(prefixes, bound.args, strict=True))
        )
        self.kwargs = {k: self._tree(named[k], x, k) for k, x in bound.kwargs.items()}
        self._check_shared()

    def _tree(self, prefix: Any, arg: Any, where: str) -> Any:
        top, answers, parts = _paired(prefix, arg, where)
        return top.unflatten(map(self._subtree, answers, parts))

    def _subtree(self, given: Any, subtree: Any) -> Any:
        if is_flat_module(subtree):
            return self._root(given, subtree)
        if not by_kind(given) and not self._at:
            return self.read(given)
        return jtu.tree_map(
            lambda x: (
                self._root(given, x) if is_flat_module(x) else self._plain(given, x)
            ),
            subtree,
            is_leaf=lambda x: isinstance(x, (FlatModule, State)) or x is None,
        )

    def _plain(self, given: Any, x: Any) -> Any:
        return jax.tree.map(
            self.read, for_plain(given, self.name, x), is_leaf=lambda x: x is None
        )

    def _root(self, given: Any, flat_module: FlatModule) -> FlatModule:
        i = self._at[id(flat_module)]
        plan = self.bound.plans[i]
        found = leaf_answers(given, self.name, plan.graphdef.schema, plan.view)
        found = list(map(self.read, found, plan.values()))
        self.given[i], self.roots[i] = given, found
        pick = self.bound.alias_map.picks[i]
        mine = found if pick is None else [found[j] for j in pick]
        return FlatModule(list(mine), flat_module.definition)

    def of_leaf(self, k: int) -> Any:
        """The answer for a leaf of the joint GraphDef."""
        i, j = self.bound.alias_map.leaf_at[k]
        return self.roots[i][j]

    def new_leaves(
        self, effects: Effects, outs: Mapping[int, Any], fresh: Sequence[Any]
    ) -> list[tuple[Schema, Any, Any]]:
        """The leaves that came into being inside, in the order of ``Result.fresh``.

        Args:
          effects: what the call did.
          outs: what was given for each object that it returned.
          fresh: their values, for filters that look at values.

        Returns:
          For each a Schema of it alone, what was given for it, and its answer.
        """
        return [
            (
                one,
                given,
                self.read(leaf_answers(given, self.name, one, alone(one, value))[0]),
            )
            for one, given, value in new_leaves(effects, self.given, outs, fresh)
        ]

    def _check_shared(self) -> None:
        if not self.roots or all(pick is None for pick in self.bound.alias_map.picks):
            return
        first: dict[Any, tuple[str, Any]] = {}
        bad = []
        for i, plan in enumerate(self.bound.plans):
            for j, leaf in enumerate(plan.leaves):
                where, answer = plan.graphdef.schema.describe(j), self.roots[i][j]
                other = first.setdefault(identity(leaf), (where, answer))
                if other[1] != answer:
                    was, now = (format_answer(self.name, a) for a in (other[1], answer))
                    bad.append(f"{other[0]}: {was}, and {where}: {now}")
        if bad:
            raise AxisError(
                "Variables that several arguments share have one answer each; found "
                f"two for:\n{listing(bad)}\nGive both arguments the same."
            )


def new_leaves(
    effects: Effects, roots: Any, outs: Mapping[int, Any], fresh: Sequence[Any]
) -> Iterator[tuple[Schema, Any, Any]]:
    """What was given for the leaves that came into being inside.

    Args:
      effects: what the call did.
      roots: what was given for each argument that is a root, by number.
      outs: what was given for each object that was returned, by number of its Ref.
      fresh: the values of the new leaves.

    Yields:
      For each a Schema of it alone, what was given for it, and its value.
    """
    if effects.edits is None:
        return
    schema = effects.edits.graphdef.schema
    values = iter(fresh)
    for i, leaf in enumerate(effects.edits.leaves):
        if leaf.origin is None:
            part, number, *path = tuple[Any, ...](schema.paths[i])
            given = outs[number] if part == 1 else roots[number]
            path = path[1:] if part == 2 else path  # below the object that left
            one = Schema.of([tuple(path)], [schema.kinds[i]], [schema.metadata[i]])
            yield one, given, next(values)


def alone(one: Schema, value: Any) -> Callable[[], list[Any]]:
    """Gives a leaf that is not in a model yet as filters see it.

    Args:
      one: a Schema of the leaf alone.
      value: its value.

    Returns:
      A function that returns a list of the one leaf.
    """
    kind, metadata = one.kinds[0], one.metadata[0]
    return lambda: [value if kind is None else make(kind, value, metadata)]


def for_plain(given: Any, name: str, x: Any) -> Any:
    """The answer for what is neither Module nor Variable.

    Args:
      given: a ByKind, a Policy, or one answer.
      name: the column to read.
      x: an array, None, or a State, which is answered by kind.

    Returns:
      The answer; for a State by kind a State of answers.

    Raises:
      AxisError: answers by kind stand for a plain value.
    """
    if not by_kind(given) or x is None:
        return None if x is None and by_kind(given) else given
    if isinstance(x, State):
        return snapshot(x.schema, list(leaf_answers(given, name, x.schema, x.leaves)))
    raise AxisError(
        f"{given!r} says what to do by kind, but stands for {describe(x)}, which is no "
        "Module, Variable or State. Give a plain value there."
    )


_WHOLE = (Ref, State)


def given_for_objects(prefix: Any, out: Any) -> dict[int, Any]:
    """What a prefix tree gives for each object in an output, by number of its Ref.

    Args:
      prefix: a tree of answers.
      out: an output, with Refs in the place of objects.

    Returns:
      A dict of number to answer.

    Raises:
      ArgumentError: the prefix is built differently from the output.
      AxisError: answers by kind stand for a plain array or a State.
    """
    found: dict[int, Any] = {}

    def note(given: Any, subtree: Any) -> None:
        for x in jtu.tree_leaves(subtree, is_leaf=lambda x: isinstance(x, _WHOLE)):
            if isinstance(x, Ref):
                found[x.k] = given
            elif by_kind(given) and isinstance(x, State):
                rows = listing(map(x.schema.describe, range(len(x.schema))))
                some = "P('x')" if given.column == "spec" else 0
                answers = f"State({{'w': {some}, 'b': None}})"
                raise AxisError(
                    f"{given!r} says what to do by kind, but stands for a State that "
                    f"is returned, of which JAX sees no kinds:\n{rows}\nGive it a "
                    f"State with an answer for each leaf: {answers}."
                )
            elif by_kind(given):
                raise AxisError(
                    f"{given!r} says what to do by kind, but stands for {describe(x)}, "
                    "which is no Module or Variable. Give a plain value there."
                )

    _, answers, parts = _paired(prefix, out, "what the function returns")
    for given, subtree in zip(answers, parts, strict=True):
        note(given, subtree)
    return found


def _paired(prefix: Any, tree: Any, where: str) -> tuple[Any, list[Any], list[Any]]:
    """The structure of a prefix, its answers, and the part of ``tree`` of each."""
    answers, top = jtu.tree_flatten(prefix, is_leaf=is_answer)
    try:
        return top, answers, top.flatten_up_to(tree)
    except ValueError:
        raise ArgumentError(
            f"{prefix!r} was given for {where}, which is built differently. Give one "
            "value for all of it, a container like it with one for each part, or for "
            "leaves of a Module, as in StateAxes({At('w'): 0, ...: None})."
        ) from None
