"""Objects and files of other libraries: Flax objects as they are, files converted."""

from sortal._engine.foreign import introduce as _introduce


def _register_flax() -> None:
    from sortal.interop import flax

    flax.register()


_introduce("flax.nnx", _register_flax)
