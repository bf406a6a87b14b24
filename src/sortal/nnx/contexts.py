"""NNX's contexts for transforms of one's own, which are refused."""

from __future__ import annotations

from typing import Any, NoReturn

from sortal.errors import UnsupportedError


def _refuse(name: str) -> NoReturn:
    raise UnsupportedError(
        f"{name} is not offered. The transforms of nnx carry edits of structure out of "
        "the function that they transform: write nnx.jit in the place of jax.jit, and "
        "pass the module itself. For values alone: nnx.split before the call, and "
        "nnx.merge inside, return nnx.state(module), and nnx.update after the call."
    )


class _Refused:
    def __init__(self, *args: Any, **kwargs: Any):
        _refuse(type(self).__name__)


class UpdateContext(_Refused):
    """NNX's record of a module on its way through a transform; refused.

    Raises:
      UnsupportedError: always; the message says what to write.
    """


class SplitContext(_Refused):
    """NNX's record of what several ``split`` share; refused.

    Raises:
      UnsupportedError: always; the message says what to write.
    """


class MergeContext(_Refused):
    """NNX's record of what several ``merge`` share; refused.

    Raises:
      UnsupportedError: always; the message says what to write.
    """


def update_context(tag: Any) -> NoReturn:
    """NNX's context for a transform of one's own; refused.

    Args:
      tag: a name.

    Raises:
      UnsupportedError: always; the message says what to write.
    """
    _refuse("update_context")


def current_update_context(tag: Any) -> NoReturn:
    """NNX's context for a transform of one's own; refused.

    Args:
      tag: a name.

    Raises:
      UnsupportedError: always; the message says what to write.
    """
    _refuse("current_update_context")


def split_context(ctxtag: Any = None) -> NoReturn:
    """NNX's context for a transform of one's own; refused.

    Args:
      ctxtag: a name.

    Raises:
      UnsupportedError: always; the message says what to write.
    """
    _refuse("split_context")


def merge_context(ctxtag: Any = None, inner: bool | None = None) -> NoReturn:
    """NNX's context for a transform of one's own; refused.

    Args:
      ctxtag: a name.
      inner: whether the merge is inside the transform.

    Raises:
      UnsupportedError: always; the message says what to write.
    """
    _refuse("merge_context")
