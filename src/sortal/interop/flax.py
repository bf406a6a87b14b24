"""Flax NNX objects as nodes and leaves of Sortal, in place, without conversion.

Only the user imports Flax: this file runs when the first Flax class is met. Beyond
public names it relies on how Variables and Pytrees keep their contents, which has not
changed since 0.12.0, except for one name.
"""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sortal import filters
from sortal import random as rngs
from sortal._engine import paths
from sortal._engine import variable as _kinds
from sortal._engine.foreign import (
    VariableHandler,
    pair,
    register_native,
    register_variable,
    to_native,
    watch_classes,
)
from sortal._engine.handlers import Handler
from sortal._engine.jax_compat import current_trace
from sortal._engine.nodes import Node, register_node
from sortal._engine.state import State
from sortal._engine.statics import Metadata, is_hashable
from sortal.errors import UnsupportedError, listing
from sortal.module import Module
from sortal.nn.lora import LoRAParam
from sortal.transforms import autodiff
from sortal.transforms._adapter import prefixes

OLDEST = (0, 12)
_PRIVATE = "_pytree__"
_attributes = operator.attrgetter("__dict__")
_joined = itertools.chain.from_iterable
_KINDS = (
    "Variable Param BatchStat Cache Intermediate Perturbation RngState RngKey RngCount"
).split()
_OPTIMIZER_KINDS = ("OptState", "OptArray", "OptVariable")


class FlaxVariables(VariableHandler):
    """Flax Variables; their three slots are written without hooks and trace checks."""

    def __init__(self) -> None:
        from flax.nnx import Variable, tracers

        slots = vars(Variable)
        value = slots.get("_raw_value") or slots["raw_value"]  # raw_value in 0.12.0
        metadata, trace = slots["_var_metadata"], slots["_trace_state"]
        # Faster than calling the __get__ of a slot.
        self._get: Callable[[Any], Any] = operator.attrgetter(value.__name__)
        self._set: Callable[[Any, Any], None] = value.__set__
        self._get_metadata: Callable[[Any], Any] = operator.attrgetter("_var_metadata")
        self._set_metadata: Callable[[Any, Any], None] = metadata.__set__
        self._get_trace: Callable[[Any], Any] = trace.__get__
        self._set_trace: Callable[[Any, Any], None] = trace.__set__
        self._new_trace: Callable[[], Any] = tracers.TraceState

    def values(self, variables: Sequence[Any]) -> list[Any]:
        return list(map(self._get, variables))

    def write(self, variable: Any, value: Any) -> None:
        self._set(variable, value)

    def entries(self, variables: Sequence[Any]) -> list[dict[str, Any]]:
        return list(map(self._get_metadata, variables))

    def set_metadata(self, variable: Any, metadata: dict[str, Any]) -> None:
        self._set_metadata(variable, metadata)

    def is_ours(self, variable: Any) -> bool:
        return self._get_trace(variable).is_valid()

    def refusal(self, variable: Any) -> str:
        metadata = self._get_metadata(variable)
        modes = [mode for mode in ("ref", "hijax") if metadata.get(mode)]
        return _BOXED.format(modes[0]) if modes else ""

    def make(self, kind: type, value: Any, metadata: Metadata) -> Any:
        made = object.__new__(kind)
        self._set_trace(made, self._new_trace())
        self._set_metadata(made, dict(metadata))
        self._set(made, value)
        return made


class HijaxVariables(VariableHandler):
    """Variables of Flax in a hijax type, which are of no class of a kind."""

    def entries(self, variables: Sequence[Any]) -> list[dict[str, Any]]:
        return [{} for _ in variables]

    def refusal(self, variable: Any) -> str:
        return _BOXED.format("hijax")


_BOXED = "made with {}=True, so that its value is no plain array; make it without"


class Shape(NamedTuple):
    """The contents of a Flax Pytree other than its attributes."""

    nodes: Any
    initializing: bool
    is_setup: bool


class Owner(NamedTuple):
    """The trace that a Flax object belongs to."""

    obj: Any

    @property
    def _trace(self) -> Any:
        state = self.obj._pytree__state.trace_state
        return current_trace() if state.is_valid() else None

    @property
    def _place(self) -> tuple[Any, paths.Path, str]:
        return self.obj, (), type(self.obj).__name__


class FlaxObjects(Handler):
    """``nnx.Pytree`` and its subclasses; the children are the attributes."""

    root = True

    def items(self, obj: Any) -> dict[Any, Any]:
        items = _attributes_by_key(obj)
        return {key: items[key] for key in sorted(items, key=paths.order)}

    def order(self, obj: Any) -> tuple[Any, ...]:
        return tuple(_attributes_by_key(obj))

    def place(self, obj: Any, key: Any) -> tuple[Any, Any]:
        attributes = vars(obj)
        return attributes, key if key in attributes else str(key)

    def contents(self, nodes: Sequence[Any]) -> tuple[list[Any], Iterable[Any]]:
        """Compared in full, because Flax objects do not count their edits."""
        dicts = list(map(_attributes, nodes))
        return [*map(len, dicts), *_joined(dicts)], _joined(
            [dicts, *map(dict.values, dicts)]
        )

    def roles(self, obj: Any) -> Mapping[Any, str] | None:
        """What Flax treats as data or static, where the value alone does not say."""
        if not type(obj)._pytree__is_pytree:
            return None
        status = obj._pytree__nodes
        roles = {}
        for key, child in _attributes_by_key(obj).items():
            name = key if key in status else str(key)
            if status.get(name):
                # None is an empty pytree for Flax, marked or not.
                role = "data" if child is not None else ""
            else:
                # Flax allows static values without a hash; here statics have one.
                role = "static" if is_hashable(child) else ""
            roles[key] = role
        return roles

    def spec(self, obj: Any) -> Shape:
        return Shape(obj._pytree__nodes, False, False)

    def owner(self, obj: Any) -> Owner:
        return Owner(obj)

    def remove(self, obj: Any, key: Any) -> None:
        delattr(obj, key)

    def can_remove(self, key: Any) -> bool:
        return isinstance(key, str)

    def shell(self, cls: type, spec: Shape) -> Any:
        from flax.nnx import pytreelib

        made = object.__new__(cls)
        state = pytreelib.PytreeState(spec.initializing, spec.is_setup)
        vars(made).update(_pytree__state=state, _pytree__nodes=spec.nodes)
        return made

    def fill(self, obj: Any, spec: Shape, items: dict[Any, Any]) -> None:
        attributes = vars(obj)
        for name in [k for k in attributes if not str(k).startswith(_PRIVATE)]:
            del attributes[name]
        for key, child in items.items():
            digits = isinstance(key, int) and key not in spec.nodes
            name = str(key) if digits and str(key) in spec.nodes else key
            attributes[name] = child
        attributes["_pytree__nodes"] = spec.nodes


def _attributes_by_key(obj: Any) -> dict[Any, Any]:
    """The attributes by name; for a List by integers, which Flax stores as digits."""
    items = {k: x for k, x in vars(obj).items() if not str(k).startswith(_PRIVATE)}
    if getattr(type(obj), "_pytree__has_int_keys", False):
        return {int(k) if str(k).isdigit() else k: x for k, x in items.items()}
    return items


class FlaxBridges(FlaxObjects):
    """Objects of ``nnx.bridge``, the only ones that use the state of construction."""

    def contents(self, nodes: Sequence[Any]) -> tuple[list[Any], Iterable[Any]]:
        equal, same = super().contents(nodes)
        return [*equal, *map(self.spec, nodes)], same

    def spec(self, obj: Any) -> Shape:
        state = obj._pytree__state
        return Shape(obj._pytree__nodes, state.initializing, state.is_setup)


class FlaxStates(Handler):
    """``nnx.State``: a mapping of nested dicts."""

    root = True

    def items(self, obj: Any) -> dict[Any, Any]:
        mapping = obj.raw_mapping
        return {key: mapping[key] for key in sorted(mapping, key=paths.order)}

    def order(self, obj: Any) -> tuple[Any, ...]:
        return tuple(obj.raw_mapping)

    def contents(self, nodes: Sequence[Any]) -> tuple[list[Any], Iterable[Any]]:
        dicts = [x.raw_mapping for x in nodes]
        values = map(dict.values, dicts)
        return list(map(len, dicts)), itertools.chain(dicts, *dicts, *values)

    def place(self, obj: Any, key: Any) -> tuple[Any, Any]:
        return obj.raw_mapping, key

    def remove(self, obj: Any, key: Any) -> None:
        del obj.raw_mapping[key]

    def shell(self, cls: type, spec: Any) -> Any:
        return cls({})

    def fill(self, obj: Any, spec: Any, items: dict[Any, Any]) -> None:
        mapping = obj.raw_mapping
        mapping.clear()
        mapping.update(items)


def register() -> None:
    """Registers Flax's types with the engine, and some of Sortal's with Flax."""
    import flax
    from flax import nnx

    version = tuple(map(int, re.findall(r"\d+", flax.__version__)[: len(OLDEST)]))
    if version < OLDEST:
        raise UnsupportedError(
            f"Sortal works on Flax NNX objects of Flax "
            f"{'.'.join(map(str, OLDEST))} and newer; found {flax.__version__}. "
            "Write pip install --upgrade flax."
        )
    register_variable(nnx.Variable, FlaxVariables())
    hijax = getattr(nnx.variablelib, "HijaxVariable", None)
    if hijax is not None:
        register_variable(hijax, HijaxVariables())
    register_node(nnx.Pytree, FlaxObjects())
    for bridging in (nnx.bridge.Module, nnx.bridge.ToNNX):
        register_node(bridging, FlaxBridges())
    register_node(nnx.State, FlaxStates())
    for theirs, names in ((nnx, _KINDS), (nnx.optimizer, _OPTIMIZER_KINDS)):
        for name in names:
            pair(getattr(_kinds, name), getattr(theirs, name))
    pair(LoRAParam, nnx.LoRAParam)
    pair(Module, nnx.Module)
    register_native(nnx.Carry, lambda _: prefixes.Carry)
    register_native(nnx.DiffState, lambda x: autodiff.DiffState(x.argnum, x.filter))
    register_native(nnx.StateAxes, lambda x: _by_kind(prefixes.StateAxes, x, x.axes))
    register_native(
        nnx.StateSharding, lambda x: _by_kind(prefixes.StateSharding, x, x.shardings)
    )
    for name, read in _FILTERS.items():
        register_native(getattr(nnx.filterlib, name), read)
    _register_ours()


# Called as functions, Flax's would know Flax's classes alone.
_FILTERS: dict[str, Callable[[Any], filters.Filter]] = {
    "OfType": lambda f: filters.OfType(f.type),
    "WithTag": lambda f: filters.WithTag(f.tag),
    "PathContains": lambda f: filters.PathContains(f.key, getattr(f, "exact", True)),
    "PathIn": lambda f: filters.PathIn(*f.paths),
    "Any": lambda f: filters.Any_(*f.predicates),
    "All": lambda f: filters.All(*f.predicates),
    "Not": lambda f: filters.Not(f.predicate),
    "Everything": lambda f: filters.Everything(),
    "Nothing": lambda f: filters.Nothing(),
}


def _by_kind(ours: type, theirs: Any, answers: Iterable[Any]) -> Any:
    return ours(dict(zip(theirs.filters, map(to_native, answers), strict=True)))


def _register_ours() -> None:
    from flax import nnx
    from flax.nnx import graph

    # Flax objects treat ours as data, like Flax's own modules and Variables.
    for base in (Node, _kinds.Variable, State):
        for cls in _with_subclasses(base):
            nnx.register_data_type(cls)
    watch_classes(nnx.register_data_type)
    # As virtual subclasses: Flax layers check isinstance(x, Rngs), and then only call
    # and fork it.
    for ours, theirs in ((rngs.Rngs, nnx.Rngs), (rngs.RngStream, nnx.RngStream)):
        theirs.register(ours)
        pair(ours, theirs)
    graph.register_graph_node_type(
        State, _items, operator.setitem, _pop_item, lambda _: State({}), _clear, _fill
    )


def _with_subclasses(cls: type) -> Iterator[type]:
    yield cls
    for below in cls.__subclasses__():
        yield from _with_subclasses(below)


def _items(state: State) -> tuple[list[tuple[Any, Any]], None]:
    """The entries of a State for Flax's functions, such as its Optimizer."""
    leaves = enumerate(state.leaves())
    unseen = [i for i, x in leaves if isinstance(x, _kinds.Variable)]
    if unseen:
        raise UnsupportedError(
            "Flax does not see these Variables of Sortal, and by kind leaves them "
            "out:\n"
            + listing(map(state.schema.describe, unseen))
            + "\nWrite Sortal's own function, such as sortal.Optimizer(model, tx) or "
            "sortal.jit, which take models of both; or give Flax a State without them, "
            "as state.filter(Under('encoder'))."
        )
    return [(key, state[key]) for key in sorted(state, key=paths.order)], None


def _pop_item(state: State, key: Any) -> Any:
    found = state[key]
    del state[key]
    return found


def _clear(state: State) -> None:
    for key in list(state):
        del state[key]


def _fill(state: State, items: Iterable[tuple[Any, Any]]) -> None:
    for key, value in items:
        state[key] = value
