"""Module and Pytree: the base classes of model objects, which are JAX pytrees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Never, dataclass_transform

import jax
import jax.numpy as jnp

from sortal._engine.foreign import is_kind
from sortal._engine.graphdef import GraphDef
from sortal._engine.jax_compat import register_pytree
from sortal._engine.kind_names import variable_type_from_name
from sortal._engine.nodes import (
    ARRAYS,
    Node,
    get_dict,
    handler_of,
    is_object,
    leaf_types,
)
from sortal._engine.paths import Path, PathKey, order
from sortal._engine.plan import bind, build_around
from sortal._engine.variable import Perturbation, Variable, describe
from sortal._nnx_names import refuse_unknown
from sortal.errors import ArgumentError, StructureError, VariableError, listing
from sortal.filters import to_filter
from sortal.functional import iter_nodes


class Pytree(Node):
    """Base of stateful objects that are not layers, such as optimizers and metrics.

    An instance is a JAX pytree. Its children are all its Variables and raw arrays, on
    one level, and its leaves their values.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import sortal as nnx
      >>> class Counter(nnx.Pytree):
      ...     def __init__(self):
      ...         self.n = nnx.Variable(jnp.array(3))
      >>> jax.tree.map(lambda x: x + 1, Counter()).n
      Variable(int32[])
    """

    __slots__ = ()

    def __init_subclass__(cls, pytree: bool = True, **options: Any):
        super().__init_subclass__(**options)
        if pytree:
            register_pytree(cls, _flatten, _flatten_with_keys, _unflatten)

    def __repr__(self) -> str:
        return _show(self, 0, set())


def _flatten(node: Any) -> tuple[list[Any], GraphDef]:
    plan = bind(node)
    values = plan.values()
    if not leaf_types.issuperset(map(type, values)):
        _refuse_cycle(node, plan.graphdef, values)
    return plan.view(), plan.graphdef


def _flatten_with_keys(node: Any) -> tuple[list[Any], GraphDef]:
    leaves, graphdef = _flatten(node)
    keys = map(PathKey, graphdef.schema.paths)
    return list(zip(keys, leaves, strict=True)), graphdef


def _refuse_cycle(node: Any, graphdef: GraphDef, values: list[Any]) -> None:
    """Refuses Variables whose values hold the object that holds them.

    JAX would recurse until the stack overflows, and would leave Python's recursion
    depth at its limit for the rest of the process.
    """
    bad, seen = [], {id(node)}
    for k, value in enumerate(values):
        if isinstance(value, ARRAYS):
            handler_of(value)  # notes its type, which is then passed over at once
            continue
        todo = [value]
        while todo:
            for x in jax.tree.leaves(todo.pop(), is_leaf=_is_node):
                if x is node:
                    bad.append(graphdef.schema.describe(k))
                elif _is_node(x) and id(x) not in seen:
                    seen.add(id(x))
                    todo += bind(x).values()
    if bad:
        raise StructureError(
            f"the values of these leaves hold the {type(node).__name__} that they "
            f"belong to:\n{listing(bad)}\nHold an object in an attribute, not in a "
            "Variable."
        )


def _is_node(x: Any) -> bool:
    return isinstance(x, Node)


def _unflatten(graphdef: GraphDef, leaves: Any) -> Any:
    return build_around(graphdef, tuple(leaves))


class Module(Pytree):
    """Base of layers and models: plain Python objects with attributes.

    Variables, arrays, other modules, and lists, tuples, dicts and dataclasses of these
    are found in plain attributes, with no wrapper or annotation. Anything else is
    static: part of the structure, and must be hashable.

    Example:
      >>> import sortal as nnx
      >>> class MLP(nnx.Module):
      ...     def __init__(self, sizes, *, rngs):
      ...         pairs = zip(sizes, sizes[1:])
      ...         self.layers = [nnx.Linear(a, b, rngs=rngs) for a, b in pairs]
      ...     def __call__(self, x):
      ...         for layer in self.layers:
      ...             x = layer(x)
      ...         return x
      >>> model = MLP((2, 8, 1), rngs=nnx.Rngs(0))
      >>> nnx.state(model).paths()[0]
      ('layers', 0, 'bias')
    """

    __slots__ = ()

    def sow(
        self,
        variable_type: type[Variable] | str,
        name: str,
        value: Any,
        reduce_fn: Callable[[Any, Any], Any] = lambda old, new: (*old, new),
        init_fn: Callable[[], Any] = lambda: (),
        capture_noop: bool | None = None,
    ) -> bool:
        """Records a value of a call under ``self.<name>``, to be ``pop``ped later.

        Args:
          variable_type: the kind to record it as, such as ``Intermediate``, or the
            name of one, such as ``"intermediates"``.
          name: the attribute.
          value: an array or pytree.
          reduce_fn: joins what is recorded so far and the value; appends to a tuple
            by default.
          init_fn: what is recorded before the first call.
          capture_noop: whether to do nothing where no kind is being captured.

        Returns:
          Whether it was recorded; not where only other kinds are being captured.

        Raises:
          VariableError: the attribute is there and is not of this kind, or would hide
            a method.
        """
        if capture_noop and RECORDS not in get_dict(self):
            return False
        kind, found, keep = _recorded(self, name, variable_type)
        if keep is None:
            return False
        if found is None:
            keep(kind(reduce_fn(init_fn(), value)))
        else:
            found.value = reduce_fn(found.value, value)
        return True

    def perturb(
        self,
        name: str,
        value: Any,
        variable_type: type[Variable] | str = Perturbation,
        capture_noop: bool | None = None,
    ) -> Any:
        """Adds a Variable of zeros to a value, so that its gradient can be taken.

        Args:
          name: the attribute that holds the zeros; made at the first call.
          value: an array or pytree.
          variable_type: the kind of the zeros, or the name of one.
          capture_noop: whether to do nothing where no kind is being captured.

        Returns:
          The value plus what the attribute holds.

        Raises:
          VariableError: the attribute is there and is not of this kind.
        """
        if capture_noop and RECORDS not in get_dict(self):
            return value
        kind, found, keep = _recorded(self, name, variable_type)
        if keep is None:
            return value
        if found is None:
            found = kind(jax.tree.map(jnp.zeros_like, value))
            keep(found)
        return jax.tree.map(jnp.add, found.value, value)

    def iter_modules(self) -> Iterator[tuple[Path, Module]]:
        """This module and all below it once each, with paths, children first.

        Yields:
          Pairs of path and Module.
        """
        return iter_modules(self)

    def iter_children(self) -> Iterator[tuple[str, Module]]:
        """The modules that are attributes of this one.

        Yields:
          Pairs of attribute name and Module.
        """
        return iter_children(self)

    def set_attributes(
        self, *filters: Any, raise_if_not_found: bool = True, **attributes: Any
    ) -> None:
        """Sets attributes of this and all modules below that already have them.

        Args:
          *filters: which modules; a module class takes its instances. All if absent.
          raise_if_not_found: whether a name that no module has is an error.
          **attributes: names and new values.

        Raises:
          ArgumentError: no module chosen has one of the names; nothing is set.
        """
        set_attributes(
            self, *filters, raise_if_not_found=raise_if_not_found, **attributes
        )

    def train(self, **attributes: Any) -> None:
        """Puts Dropout, BatchNorm and similar layers into training mode.

        Args:
          **attributes: more attributes to set where a module has them.
        """
        modes = {"deterministic": False, "use_running_average": False}
        self.set_attributes(raise_if_not_found=False, **modes, **attributes)

    def eval(self, **attributes: Any) -> None:
        """Puts Dropout, BatchNorm and similar layers into evaluation mode.

        Args:
          **attributes: more attributes to set where a module has them.
        """
        modes = {"deterministic": True, "use_running_average": True}
        self.set_attributes(raise_if_not_found=False, **modes, **attributes)


register_pytree(Pytree, _flatten, _flatten_with_keys, _unflatten)


def _recorded(
    module: Module, name: str, kind: type[Variable] | str
) -> tuple[type[Variable], Any, Callable[[Any], None] | None]:
    """A kind by itself or by its name, the record of it or None, and what keeps one."""
    if isinstance(kind, str):
        kind = variable_type_from_name(kind, allow_register=True)
    records = get_dict(module).get(RECORDS)
    bases = [b.__qualname__ for b in kind.__mro__ if b.__qualname__ in (records or {})]
    if records is not None and not bases:
        return kind, None, None
    apart = get_dict(module) if records is None else records[bases[0]]
    found = apart.get(name)
    if found is not None and type(found) is not kind:
        raise VariableError(
            f"Expected {name!r} to be of type {kind.__name__!r}, got "
            f"{type(found).__name__!r}, in a {type(module).__name__}. Choose another "
            "name for what is recorded."
        )
    if records is not None:
        return kind, found, functools.partial(apart.__setitem__, name)
    if found is None and callable(getattr(type(module), name, None)):
        raise VariableError(
            f"{type(module).__name__}.{name} is a method, which the {kind.__name__} to "
            "be recorded there would hide. Choose another name."
        )
    return kind, found, functools.partial(setattr, module, name)


RECORDS = "_records"
"""The attribute with what calls record apart from attributes: by kind, then name."""


def set_attributes(
    node: Any, /, *filters: Any, raise_if_not_found: bool = True, **attributes: Any
) -> None:
    """Sets attributes of all modules, of Sortal and of Flax, that already have them.

    Args:
      node: a Module or a container of modules, of either library.
      *filters: which modules; a module class takes its instances. All if absent.
      raise_if_not_found: whether a name that no module has is an error.
      **attributes: names and new values.

    Raises:
      ArgumentError: no module chosen has one of the names; nothing is set.

    Example:
      >>> import sortal as nnx
      >>> model = [nnx.Dropout(0.5), nnx.BatchNorm(2, rngs=nnx.Rngs(0))]
      >>> nnx.set_attributes(model, deterministic=True, use_running_average=True)
      >>> model[0].deterministic, model[1].use_running_average
      (True, True)
    """
    chosen = to_filter(filters or ...)
    modules = [m for path, m in iter_modules(node) if chosen(path, m)]
    absent = [n for n in attributes if not any(hasattr(m, n) for m in modules)]
    if absent and raise_if_not_found:
        raise ArgumentError(
            "Could not find at least one instance of the following attributes: "
            f"{sorted(absent)}, in {len(modules)} modules chosen; nothing was set. "
            "Check the spelling and the filters, or pass raise_if_not_found=False."
        )
    for module in modules:
        for name, value in attributes.items():
            # Any write counts as an edit of the structure, so equal ones are left out.
            if hasattr(module, name) and getattr(module, name) is not value:
                setattr(module, name, value)


def iter_modules(node: Any, /, **_unknown: Never) -> Iterator[tuple[Path, Module]]:
    """Every Module once with its first path, children before their holder.

    Args:
      node: a Module or a container of modules.

    Yields:
      Pairs of path and Module.

    Example:
      >>> import sortal as nnx
      >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
      >>> [path for path, _ in nnx.iter_modules(model)]
      [('layers', 0), ()]
    """
    if _unknown:
        refuse_unknown("iter_modules", _unknown)
    return iter_nodes(node, is_module)


def is_module(x: Any) -> bool:
    """Whether ``x`` is a Module, of Sortal or of another library."""
    return isinstance(x, Module) or is_kind(type(x), Module)  # Flax's is its pair


def iter_children(node: Module, /, **_unknown: Never) -> Iterator[tuple[str, Module]]:
    """The modules that are attributes of a module, sorted by name.

    Args:
      node: a Module.

    Yields:
      Pairs of attribute name and Module.

    Example:
      >>> import sortal as nnx
      >>> class Pair(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.b = nnx.Linear(2, 2, rngs=rngs)
      ...         self.a = nnx.Linear(2, 2, rngs=rngs)
      >>> [name for name, _ in nnx.iter_children(Pair(nnx.Rngs(0)))]
      ['a', 'b']
    """
    if _unknown:
        refuse_unknown("iter_children", _unknown)
    handler = handler_of(node)
    attributes = handler.items(node) if is_object(node) else {}
    pairs = sorted(attributes.items(), key=lambda pair: order(pair[0]))
    return ((name, x) for name, x in pairs if is_module(x))


@dataclass_transform(field_specifiers=(dataclasses.field,))
def dataclass(module: type | None = None, /, **options: Any) -> Any:
    """``dataclasses.dataclass`` for modules; fields may be ``data()`` or ``static()``.

    Args:
      module: a Pytree or Module subclass.
      **options: options of ``dataclasses.dataclass``.

    Returns:
      The class.

    Example:
      >>> from sortal import nnx
      >>> @nnx.dataclass
      ... class Scale(nnx.Module):
      ...     factor: float = nnx.data(default=2.0)
      >>> nnx.state(Scale()).to_pure_dict()
      {'factor': 2.0}
    """

    def decorate(cls: Any) -> Any:
        # Comparing by value would make modules unhashable and compare arrays.
        made = dataclasses.dataclass(**{"eq": False, "repr": False, **options})(cls)
        roles = {
            f.name: f.metadata["role"]
            for f in dataclasses.fields(made)
            if "role" in f.metadata
        }
        made._field_roles = {**(cls._field_roles or {}), **roles} or None
        return made

    return decorate if module is None else decorate(module)


def _show(obj: Any, depth: int, seen: set[int]) -> str:
    """An object as nested lines, each node once."""
    pad = "  " * (depth + 1)
    if isinstance(obj, Variable):
        return repr(obj)
    if isinstance(obj, Node):
        opening, closing = f"{type(obj).__name__}(", ")"
        items = [(f"{name}=", value) for name, value in get_dict(obj).items()]
    elif isinstance(obj, dict):
        opening, closing = "{", "}"
        items = [(f"{key!r}: ", value) for key, value in obj.items()]
    elif type(obj) in (list, tuple):
        opening, closing = ("[", "]") if type(obj) is list else ("(", ")")
        closing = ",)" if type(obj) is tuple and len(obj) == 1 else closing
        items = [("", value) for value in obj]
    else:
        return obj.__name__ if isinstance(obj, type) else describe(obj)
    if id(obj) in seen:
        return f"{opening}...{closing}"
    seen.add(id(obj))
    shown = [(label, _show(value, depth + 1, seen)) for label, value in items]
    if not any("\n" in text or ("[" in text and "(" in text) for _, text in shown):
        line = opening + ", ".join(label + text for label, text in shown) + closing
        if len(line) <= 80:
            return line
    body = "".join(f"{pad}{label}{text},\n" for label, text in shown)
    return f"{opening}\n{body}{pad[2:]}{closing}"
