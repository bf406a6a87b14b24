"""Objects and files of other libraries: Flax objects as they are, files converted."""

from sortal._engine.foreign import register_lazily as _register_lazily


def _register_flax() -> None:
    from sortal.interop import flax

    flax.register()


_register_lazily("flax.nnx", _register_flax)
