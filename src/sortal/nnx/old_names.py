"""Other names that NNX code has for a Variable's value, kind and axes.

Layers make Variables of Sortal's kinds, and NNX code uses them by these names. The
import of ``sortal.nnx`` adds the names to the class. Until then each of them is an
error, or an attribute of the value or the metadata.
"""

from __future__ import annotations

import builtins
from typing import Any

from sortal._engine.variable import Variable
from sortal.errors import VariableError
from sortal.nnx import annotated as annotated
from sortal.nnx.keywords import ignoring


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
        self._cell[0] = value

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

    def to_state(self: Any) -> Any:
        """A new Variable of the same kind, value and metadata."""
        return self.replace()

    @property
    def type(self) -> builtins.type:
        """The kind."""
        return builtins.type(self)

    @property
    def sharding_names(self: Any) -> Any:
        """The names of the axes: the metadata ``out_sharding``, or None."""
        return self._metadata.get("out_sharding")


def _attach(kind: Any) -> None:
    for name, member in vars(OldNames).items():
        if not name.startswith("_"):
            setattr(kind, name, member)
    kind.get_metadata = ignoring("exclude_required")(kind.get_metadata)


_attach(Variable)
