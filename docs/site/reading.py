"""Lets griffe read the source as its readers do."""

from __future__ import annotations

import re

import griffe

_HEADING = re.compile(r"^Example:$", re.MULTILINE)


class AsWritten(griffe.Extension):
    """Finds the section `Example:`, and leaves private parameters out."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called by griffe for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = _HEADING.sub("Examples:", obj.docstring.value)
        if isinstance(obj, griffe.Function):
            for parameter in [p for p in obj.parameters if p.name.startswith("_")]:
                del obj.parameters[parameter.name]
