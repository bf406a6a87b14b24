"""The exceptions of Sortal: what was found, where, and what to write instead."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 200


class SortalError(Exception):
    """Base of every error that Sortal raises on purpose.

    Example:
      >>> import sortal as nnx
      >>> try:
      ...     nnx.At("")
      ... except nnx.SortalError as e:
      ...     print(type(e).__name__)
      FilterError
    """


class ArgumentError(SortalError, ValueError, TypeError):
    """An argument is missing, or of a kind or value the function cannot work with."""


class VariableError(SortalError, TypeError, ValueError):
    """A Variable was built or used in a way that would lose its kind or value."""


class InPlaceError(VariableError, NotImplementedError):
    """An operator such as ``+=`` would put an array in the place of a Variable."""


class VariableAttributeError(SortalError, AttributeError, KeyError):
    """A name that neither a Variable, its metadata nor its value has."""

    __str__ = SortalError.__str__


class TraceError(SortalError, ValueError):
    """A live object was written to from inside a trace that does not own it."""


class StaleBufferError(SortalError, RuntimeError):
    """A leaf holds a buffer that was donated to an earlier call and then deleted."""


class RetraceError(SortalError, RuntimeError):
    """A function that was to be compiled once was traced again."""


class StructureError(SortalError, ValueError, TypeError):
    """An object cannot be described as a graph of nodes, leaves and statics."""


class UnsupportedError(SortalError, RuntimeError):
    """An object of another library, or of a version of it, that is not supported."""


class FilterError(SortalError, ValueError):
    """A filter is malformed, takes nothing it should, or leaves something over."""


class MergeError(SortalError, ValueError):
    """The leaves given to ``merge`` are not exactly those of the GraphDef."""


class UpdateError(SortalError, ValueError):
    """The leaves given to ``update`` do not fit the model; nothing was changed."""


class PathError(SortalError, KeyError, ValueError):
    """A path or key that a State does not have."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would escape line breaks.
        return str(self.args[0]) if self.args else ""


class PathAttributeError(PathError, AttributeError):
    """A path reached by attribute access that a State does not have."""


class EntryError(SortalError, AttributeError):
    """An entry of a JAX key path was read as one level, but is a whole path."""


class AxisError(SortalError, ValueError):
    """A leaf cannot go through a map or loop the way its axis, spec or role says."""


class LoopError(SortalError, TypeError):
    """A loop or branch would change what must be the same at each step."""


class CacheError(SortalError, ValueError):
    """A cache is not there, or has no room for what would be written to it."""


class DecodingError(SortalError, ArithmeticError):
    """A model gave logits from which no token can be chosen."""


class PolicyError(SortalError, ValueError):
    """A Rule or kind says what no pipeline can do, or a leaf has no answer."""


class ShardingError(SortalError, ValueError):
    """A partition spec does not fit its leaf or the mesh, or nothing is sharded."""


class DistributedError(SortalError, RuntimeError):
    """Processes of one program do not meet, or do not hold the same."""


class GradientError(SortalError, TypeError):
    """A loss, or what it is to be differentiated by, has no gradient."""


class OptimizerError(SortalError, ValueError):
    """Parameters, gradients and optimizer groups do not fit one another."""


class RngError(SortalError, ValueError):
    """A random stream is missing, or was given something that is no key."""


class RngAttributeError(RngError, AttributeError, KeyError):
    """A random stream was asked for by a name that is not there."""

    __str__ = SortalError.__str__


class CheckpointError(SortalError, RuntimeError):
    """A checkpoint could not be written, found, read or fitted to a model."""


class SaveError(CheckpointError):
    """A save failed, or what it was given cannot be saved; nothing was committed."""


class WriterError(SaveError):
    """Another writer is at work in the directory."""


class NoCheckpointError(CheckpointError, FileNotFoundError):
    """There is no checkpoint, or no such step, where one was looked for."""

    __str__ = SortalError.__str__


class DamagedError(CheckpointError, ValueError):
    """A file is missing, damaged, foreign, or not what was written."""


class RestoreError(CheckpointError, ValueError):
    """A checkpoint does not fit the model; the model was left as it was."""


def listing(rows: Iterable[str]) -> str:
    """Indents ``rows``, one a line; of very many it prints the first and a count."""
    lines = list(rows)
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    if len(lines) > _SHOWN:
        shown.append(f"  ... and {len(lines) - _SHOWN} more")
    return "\n".join(shown)
