"""Other names that NNX code has for a Variable's value, kind and axes.

Layers make Variables of Sortal's kinds, and NNX code uses them by these names. The
import of ``sortal.nnx`` adds the names to the class. Until then each of them is an
error, or an attribute of the value or the metadata.
"""

from __future__ import annotations

import builtins
import copy
import functools
from collections.abc import Mapping
from typing import Any

from sortal._engine.foreign import watch_classes
from sortal._engine.statics import EMPTY
from sortal._engine.variable import Variable, make, write
from sortal.errors import VariableError
from sortal.nnx import annotated as annotated
from sortal.nnx.added import add_members
from sortal.nnx.keywords import ignoring
from sortal.sharding.mesh_axes import placed


class OldNames:
    """The attributes of a Variable that only NNX code uses."""

    __slots__ = ()

    @property
    def raw_value(self) -> Any:
        """The value that is held; see ``get_raw_value``."""
        return self.get_raw_value()

    @raw_value.setter
    def raw_value(self, value: Any) -> None:
        self.set_raw_value(value)

    def get_raw_value(self: Any) -> Any:
        """The value that is held, where a kind's own ``get_value`` gives another."""
        return self._value

    def set_raw_value(self: Any, value: Any) -> None:
        """Replaces the value without asking a kind's own ``set_value``.

        Args:
          value: the new value.

        Raises:
          TraceError: this Variable belongs to another trace than the current one.
        """
        self._check_writable()
        write(self, value)

    def copy_from(self: Any, other: Any) -> None:
        """Takes over the value and the metadata of a Variable of the same kind.

        Args:
          other: the Variable; it is left alone.

        Raises:
          TraceError: this Variable belongs to another trace than the current one.
          VariableError: the other is of another kind.
        """
        mine, theirs = builtins.type(self), builtins.type(other)
        if theirs is not mine:
            raise VariableError(
                f"copy_from on a {mine.__name__} takes another {mine.__name__}; found "
                f"a {theirs.__name__}. For the value alone write variable.value = x."
            )
        self.set_raw_value(other.get_raw_value())
        if other._metadata is not self._metadata:
            self.set_metadata(dict(other._metadata))

    def update_from_state(self: Any, variable_state: Any) -> None:
        """Takes over the value and the metadata of a Variable of any kind.

        Args:
          variable_state: the Variable; it is left alone.

        Raises:
          TraceError: this Variable belongs to another trace than the current one.
        """
        self.set_raw_value(variable_state.get_raw_value())
        self.set_metadata(dict(variable_state._metadata))

    @classmethod
    def from_metadata(cls: Any, value: Any, attributes: Mapping[str, Any]) -> Any:
        """A Variable of this kind, made without ``create_value``.

        Args:
          value: its value.
          attributes: its metadata.

        Returns:
          The Variable.

        Raises:
          VariableError: the metadata has a hook, or cannot be hashed.
        """
        return make(cls, value, EMPTY).replace(value, **attributes)

    def create_value(self, value: Any) -> Any:
        """What a new Variable holds of a value; for kinds to define.

        Args:
          value: what the Variable is made with.

        Returns:
          The value to hold.
        """
        return value

    def to_state(self: Any) -> Any:
        """A new Variable of the same kind, value and metadata."""
        return self.replace()

    @property
    def type(self) -> builtins.type:
        """The kind."""
        return builtins.type(self)

    @property
    def var_type(self) -> builtins.type:
        """The kind."""
        return builtins.type(self)

    @property
    def hijax(self) -> bool:
        """False: no Variable is an object of JAX's own."""
        return False

    @property
    def ref(self) -> bool:
        """False: a Variable holds its value itself."""
        return False

    @property
    def sharding_names(self: Any) -> Any:
        """The names of the axes: the metadata ``out_sharding``, or None."""
        return self._metadata.get("out_sharding")

    def __delitem__(self: Any, key: Any) -> None:
        value = copy.copy(self.get_value())
        del value[key]
        self.set_value(value)


_AXIS_METHODS = ("add_axis", "remove_axis")


def _refuse_axis_methods(cls: Any) -> None:
    """Refuses in kinds the methods that NNX's transforms call for a mapped axis."""
    if issubclass(cls, Variable):
        found = [name for name in _AXIS_METHODS if name in vars(cls)]
        if found:
            raise VariableError(
                f"class {cls.__name__}: {' and '.join(found)} would never be called. "
                "transform_metadata={nnx.PARTITION_NAME: name} changes the metadata "
                "that names axes; leave the methods out."
            )


def _creates(cls: Any) -> None:
    """Has a kind that defines ``create_value`` be asked when one is made."""
    if "create_value" not in vars(cls) or not issubclass(cls, Variable):
        return
    if any("create_value" in vars(k) for k in cls.__mro__[1:] if k is not Variable):
        return  # its base asks
    first = cls.__init__

    @functools.wraps(first)
    def init(self: Any, *args: Any, **metadata: Any) -> None:
        first(self, *args, **metadata)
        write(self, placed(self.create_value(self._value), self._metadata))

    cls.__init__ = init


def _get_metadata(function: Any) -> Any:
    taking = ignoring("exclude_required")(function)

    @functools.wraps(taking)
    def get_metadata(self: Any, *args: Any, **options: Any) -> Any:
        found = taking(self, *args, **options)
        if options.get("exclude_required") and builtins.type(found) is dict:
            # In NNX every Variable has this entry; here those that were given it.
            found.pop("eager_sharding", None)
        return found

    return get_metadata


def _attach(kind: Any) -> None:
    add_members(kind, OldNames)
    kind.get_metadata = _get_metadata(kind.get_metadata)


_attach(Variable)
watch_classes(_creates)
watch_classes(_refuse_axis_methods)
