"""Objects and files of other libraries: Flax objects as they are, files converted."""

import sys as _sys

from sortal._engine.foreign import register_lazily as _register_lazily


def _register_flax() -> None:
    from sortal.interop import flax

    if _sys.modules["flax.nnx"].__name__ != "flax.nnx":
        # A program has put another module there; Flax's own may be met later.
        _register_lazily("flax.nnx", _register_flax)
        return

    flax.register()


_register_lazily("flax.nnx", _register_flax)
