"""jit with shardings by kind: one compiled function for each structure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.tree_util as jtu

from sortal._engine.schema import Schema
from sortal._engine.state import State
from sortal.transforms._adapter.effects import Result
from sortal.transforms._adapter.lanes import Lanes, Sent, unsorted
from sortal.transforms._adapter.prefixes import (
    all_answers,
    alone,
    by_kind,
    for_plain,
    given_for_objects,
    is_answer,
    is_structural,
    leaf_answers,
    new_leaves,
)
from sortal.transforms._adapter.tracing import FlatModule, is_flat_module

_UNSET: Any = object()


class Sharded:
    """What ``jax.jit`` makes of a function, for each structure of its arguments.

    JAX is told the shardings when a function is wrapped, and which leaves there are is
    known when it is called. A leaf that is written leaves with the sharding it came
    with.

    Args:
      traced: the function to trace; it returns a Result.
      options: those of ``jax.jit``, with ``in_shardings`` or ``out_shardings``.
      static: positions and names of static arguments.
    """

    def __init__(
        self,
        traced: Callable[..., Result],
        options: dict[str, Any],
        static: Collection[Any],
    ):
        self._traced, self._options = traced, dict(options)
        self._static = static
        self._in = self._options.pop("in_shardings", None)
        self._out = self._options.pop("out_shardings", None)
        self._made: dict[Any, _Packed] = {}
        tables = jtu.tree_leaves((self._in, self._out), is_leaf=is_answer)
        self._by_value = not all(map(is_structural, tables))

    def __call__(self, *args: Any, **kwargs: Any) -> Result:
        packed = self._packed(args, kwargs)
        return unsorted(*packed.jit(*args, **kwargs))

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of what ``jax.jit`` returns."""
        return self._packed(args, kwargs).jit.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """As the method of what ``jax.jit`` returns."""
        return self._packed(args, kwargs).jit.trace(*args, **kwargs)

    def clear_cache(self) -> None:
        """Forgets all compiled programs."""
        self._made.clear()

    def _packed(self, args: Sequence[Any], kwargs: Any) -> _Packed:
        dynamic = [x for i, x in enumerate(args) if i not in self._static]
        named = {k: x for k, x in kwargs.items() if k not in self._static}
        leaves, key = jtu.tree_flatten((dynamic, named))
        if self._by_value:
            key = key, tuple(map(jax.typeof, leaves))
        found = self._made.get(key)
        if found is None:
            answers = _Answers()
            prefix = self._in
            if isinstance(prefix, (tuple, list)):
                given = tuple(map(answers.tree, prefix, dynamic))
            else:
                given = tuple(answers.tree(prefix, x) for x in dynamic)
            options = self._options
            if prefix is not None:
                options = {**options, "in_shardings": given}
            found = _Packed(self._traced, answers, self._out, options)
            self._made[key] = found
        return found


class _Answers:
    """The shardings of arguments, as trees and by number of leaf."""

    def __init__(self) -> None:
        self.of_leaf: dict[int, Any] = {}
        self.given: dict[int, Any] = {}

    def tree(self, prefix: Any, arg: Any) -> Any:
        """The shardings of one argument."""
        return jtu.tree_map(self._subtree, prefix, arg, is_leaf=is_answer)

    def _subtree(self, given: Any, subtree: Any) -> Any:
        def leaf(x: Any) -> Any:
            if is_flat_module(x):
                return self._root(given, x)
            return for_plain(given, "spec", x)

        return jtu.tree_map(
            leaf,
            subtree,
            is_leaf=lambda x: isinstance(x, (FlatModule, State)) or x is None,
        )

    def _root(self, given: Any, flat_module: FlatModule) -> FlatModule:
        definition = flat_module.definition
        whole = definition.graphdef.schema
        schema = Schema.of(
            definition.paths,
            [whole.kinds[k] for k in definition.leaves],
            [whole.metadata[k] for k in definition.leaves],
        )
        found = leaf_answers(given, "spec", schema, lambda: flat_module.values)
        self.given[definition.number] = given
        self.of_leaf.update(zip(definition.leaves, found, strict=True))
        return FlatModule(list(found), definition)


class _Packed:
    """A compiled function whose outputs are sorted into one list for each sharding."""

    def __init__(
        self,
        traced: Callable[..., Result],
        answers: _Answers,
        out: Any,
        options: dict[str, Any],
    ):
        self._traced, self._answers, self._out = traced, answers, out
        given = [out, *answers.given.values()]
        every = [None, *answers.of_leaf.values(), *all_answers(given, "spec")]
        self._lanes = Lanes(every)
        plain = jtu.tree_map(
            lambda x: None if by_kind(x) else x, out, is_leaf=is_answer
        )
        shardings = (plain, list(self._lanes.answers), None)
        self.jit = jax.jit(self._sorted, out_shardings=shardings, **options)

    def _sorted(self, *args: Any, **kwargs: Any) -> Any:
        result = self._traced(*args, **kwargs)
        answers = [self._answers.of_leaf.get(k) for k in result.effects.written]
        answers += self._of_new(result)
        values = [*result.values, *result.fresh]
        return self._lanes.sort(result, map(Sent, answers, values))

    def _of_new(self, result: Result) -> list[Any]:
        outs = given_for_objects(self._out, result.out)
        roots = self._answers.given
        return [
            # One sharding for a whole root speaks of the leaves that were there.
            leaf_answers(given, "spec", one, alone(one, value))[0]
            if by_kind(given)
            else None
            for one, given, value in new_leaves(
                result.effects, roots, outs, result.fresh
            )
        ]
