"""Generation: a decoder run token by token, in a loop of steps or as one program."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sortal._engine.variable import Cache, describe
from sortal.decoding.sampling import (
    NO_TOKEN,
    Choice,
    checked_options,
    sample,
    whole_number,
)
from sortal.errors import ArgumentError, CacheError, DecodingError, listing
from sortal.module import iter_modules
from sortal.nn.cache import KVCache, check_room
from sortal.random import Rngs
from sortal.transforms.compile import eval_shape, jit
from sortal.transforms.control import while_loop

_LEAST = 16
_PROMPTS = "prompts are lists of one or more integers, one list for each sequence; "


class Decoder(Protocol):
    """The model that ``stream`` and ``generate`` take."""

    def next_logits(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """Logits of the token after the last one of each sequence.

        Args:
          tokens: int32 (batch, length), which follow those in the model's caches.
          lengths: int32 (batch,): how many of them are not padding.

        Returns:
          Floating-point array (batch, vocabulary).
        """
        ...


def stream(
    model: Any,
    prompts: Any,
    *,
    max_new_tokens: int,
    rngs: Rngs | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
) -> Iterator[np.ndarray]:
    """Generates in a loop of compiled steps, and yields each token when it is ready.

    Prompts follow the tokens in the caches; ``reset_cache(model)`` empties them.
    Afterwards the caches hold all generated tokens but the last; all, if the loop is
    left early. ``generate`` gives the same tokens from one compiled loop.

    Args:
      model: a Decoder with caches, such as ``init_cache`` gives.
      prompts: a list of lists of token ids, one for each sequence of the caches' batch,
        of any lengths but 0; or an integer array (batch, length).
      max_new_tokens: the greatest number of tokens to generate.
      rngs: gives keys of its stream ``sample``; needed unless the temperature is 0.
      temperature: as for ``sample``; 0 takes the most likely token.
      top_k: as for ``sample``.
      top_p: as for ``sample``.
      stop: token ids that end a sequence, of which they are the last token.

    Yields:
      int32 (batch,): a token for each sequence, -1 where it has ended.

    Raises:
      ArgumentError: prompts or options are invalid, or ids are not in the vocabulary;
        nothing is changed.
      CacheError: the model has no caches, or they are too short for prompts and tokens;
        nothing is changed.
      DecodingError: logits held NaN or infinity, or only -infinity.

    Example:
      >>> import jax
      >>> import sortal as nnx
      >>> class Next(nnx.Module):
      ...     def __init__(self):
      ...         self.cache = nnx.KVCache(1, 8, num_heads=1, head_dim=1)
      ...     def next_logits(self, tokens, lengths):   # the number after the last one
      ...         return jax.nn.one_hot(tokens[:, lengths[0] - 1] + 1, 10)
      >>> [int(token[0]) for token in nnx.decoding.stream(
      ...     Next(), [[3, 4]], max_new_tokens=3)]
      [5, 6, 7]
    """
    call = _Call(model, prompts, max_new_tokens, rngs, temperature, top_k, top_p, stop)
    return _steps(call)


def generate(
    model: Any,
    prompts: Any,
    *,
    max_new_tokens: int,
    rngs: Rngs | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[int] = (),
) -> np.ndarray:
    """Generates in one compiled loop, which ends when every sequence has ended.

    The prompts are processed by ``prefill``, as in ``stream``.

    Args:
      model: as for ``stream``.
      prompts: as for ``stream``.
      max_new_tokens: as for ``stream``; each number compiles another program.
      rngs: as for ``stream``.
      temperature: as for ``stream``.
      top_k: as for ``stream``.
      top_p: as for ``stream``.
      stop: as for ``stream``.

    Returns:
      int32 (batch, max_new_tokens); -1 after the end of a sequence.

    Raises:
      ArgumentError: prompts or options are invalid, or ids are not in the vocabulary;
        nothing is changed.
      CacheError: the model has no caches, or they are too short for prompts and tokens;
        nothing is changed.
      DecodingError: logits held NaN or infinity, or only -infinity.

    Example:
      >>> import jax
      >>> import sortal as nnx
      >>> class Next(nnx.Module):
      ...     def __init__(self):
      ...         self.cache = nnx.KVCache(1, 8, num_heads=1, head_dim=1)
      ...     def next_logits(self, tokens, lengths):   # the number after the last one
      ...         return jax.nn.one_hot(tokens[:, lengths[0] - 1] + 1, 10)
      >>> nnx.decoding.generate(Next(), [[3, 4]], max_new_tokens=4, stop=[7])
      array([[ 5,  6,  7, -1]], dtype=int32)
    """
    call = _Call(model, prompts, max_new_tokens, rngs, temperature, top_k, top_p, stop)
    if call.steps == 0:
        return np.zeros((len(call.lengths), 0), np.int32)
    rngs, choice, top_k = call.rngs, call.choice, call.top_k
    first = prefill(model, rngs, call.tokens, call.lengths, choice, top_k=top_k)
    tokens, failed = decode_all(
        model, rngs, *first, choice, steps=call.steps, top_k=top_k
    )
    _check(np.asarray(failed))
    return np.asarray(tokens)


class _Call:
    """The checked arguments of ``stream`` and ``generate``."""

    def __init__(
        self,
        model: Any,
        prompts: Any,
        steps: int,
        rngs: Any,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        stop: Sequence[int],
    ):
        self.model = model
        self.steps = whole_number("max_new_tokens", steps, 0)
        heat, self.top_k, top_p = checked_options(temperature, top_k, top_p)
        if heat is not None and not isinstance(rngs, Rngs):
            raise ArgumentError(
                f"temperature={temperature} draws tokens, and needs random keys: "
                "rngs=nnx.Rngs(0). temperature=0 takes the most likely token instead."
            )
        ends = _stop_tokens(stop)
        self.tokens, self.lengths = pad(prompts)
        caches = [m for _, m in iter_modules(model) if isinstance(m, KVCache)]
        if not caches:
            raise CacheError(
                f"{type(model).__name__} has no KVCache to decode with. Make them with "
                "init_cache(model, batch, length)."
            )
        if any(isinstance(x, Tracer) for x in jax.tree.leaves(caches)):
            raise ArgumentError(
                "generate and stream are loops of compiled programs and cannot be "
                "called inside jit or another transform. Call them outside; inside, "
                "call model.next_logits(tokens, lengths) and decoding.sample."
            )
        batches = {cache.position.shape[0] for cache in caches}
        if batches != {len(self.lengths)}:
            raise CacheError(
                f"there are {len(self.lengths)} prompts, and caches for "
                f"{', '.join(map(str, sorted(batches)))} sequences. Make caches for "
                "the batch with init_cache(model, batch, length)."
            )
        check_room(model, self.lengths + max(self.steps - 1, 0))
        size = len(_vocabulary(model, self.tokens, self.lengths))
        rows = zip(self.tokens, self.lengths, strict=True)
        prompts = [(f"prompt {i}", row[:n]) for i, (row, n) in enumerate(rows)]
        _check_ids([*prompts, ("stop", np.asarray(ends, object))], size)
        self.rngs = None if heat is None else rngs
        stops = np.asarray(ends, np.int32) if ends else None
        self.choice = Choice(temperature=heat, top_p=top_p, stop=stops)


@jit
def _vocabulary(model: Any, tokens: Any, lengths: Any) -> jax.Array:
    """An empty array, as long as the vocabulary; nothing is computed."""
    logits = eval_shape(lambda m: m.next_logits(tokens, lengths), model)
    if logits.ndim != 2 or len(logits) != len(lengths):
        raise ArgumentError(
            f"{type(model).__name__}.next_logits must return logits of shape "
            f"({len(lengths)}, vocabulary), a row for each prompt; found "
            f"{describe(logits)}."
        )
    return jnp.zeros((logits.shape[-1], 0))


def _stop_tokens(stop: Any) -> list[int]:
    ids = [] if isinstance(stop, str) or not np.ndim(stop) else list(stop)
    if np.ndim(stop) != 1 or not all(map(_is_whole, ids)):
        raise ArgumentError(
            f"stop={stop!r:.60}; it is a list of token ids."
            + (f" Write stop=[{stop}]." if _is_whole(stop) else "")
        )
    return list(map(int, ids))


def _is_whole(x: Any) -> bool:
    return isinstance(x, (int, np.integer)) and not isinstance(x, bool)


def _check_ids(given: Iterable[tuple[str, np.ndarray]], size: int) -> None:
    found = [(name, ids[(ids < 0) | (ids >= size)]) for name, ids in given]
    rows = [
        f"{name}: {', '.join(map(str, bad[:8]))}"
        + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        for name, bad in found
        if len(bad)
    ]
    if rows:
        raise ArgumentError(
            f"token ids are from 0 to {size - 1} here; found others:\n{listing(rows)}\n"
            "Use the tokenizer that the model was trained with; -1 stands after the "
            "end of a sequence and is no token."
        )


def pad(prompts: Any) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of several lengths as one array.

    Args:
      prompts: a list of lists of token ids, or an integer array (batch, length).

    Returns:
      int32 (batch, padded) and int32 (batch,), the lengths. The padded length is a
      power of two, 16 or more, so that prompts of many lengths share few programs.

    Raises:
      ArgumentError: there is no prompt, one is empty, or has entries that are not
        integers, negative or too large for int32.

    Example:
      >>> tokens, lengths = pad([[5, 6, 7], [8]])
      >>> tokens.shape, lengths
      ((2, 16), array([3, 1], dtype=int32))
    """
    try:
        rows = [np.asarray(row) for row in prompts]
    except jax.errors.TracerArrayConversionError:
        raise
    except (TypeError, ValueError):  # it is no list, or one in it is ragged
        raise ArgumentError(f"{_PROMPTS}found {describe(prompts)}.") from None
    if isinstance(prompts, str) or (rows and rows[0].dtype.kind == "U"):
        raise ArgumentError(
            "prompts are token ids, not text. Write [tokenizer.encode(text).ids]."
        )
    bad = [i for i, row in enumerate(rows) if row.ndim != 1 or not row.size]
    # Integers too large for NumPy's are objects.
    bad += [
        i
        for i, row in enumerate(rows)
        if row.dtype.kind not in "iu"
        and not (row.dtype == object and all(map(_is_whole, row.flat)))
    ]
    if not rows or bad:
        found = (
            f"prompt {bad[0]} is {describe(rows[bad[0]])}" if rows else "there is none"
        )
        raise ArgumentError(f"{_PROMPTS}{found}. A batch of one is [[1, 2, 3]].")
    _check_ids(((f"prompt {i}", row) for i, row in enumerate(rows)), 1 << 31)
    lengths = np.array([row.size for row in rows], np.int32)
    padded = max(_LEAST, 1 << int(lengths.max() - 1).bit_length())
    tokens = np.zeros((len(rows), padded), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : row.size] = row
    return tokens, lengths


def _advance(
    model: Any,
    rngs: Any,
    tokens: Any,
    lengths: Any,
    done: Any,
    choice: Choice,
    top_k: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """One step: the new tokens, which sequences have ended, which have failed."""
    logits = model.next_logits(tokens, lengths)
    key = None if rngs is None else rngs.sample()
    temperature, top_p, stop = choice
    new = sample(logits, key, temperature=temperature, top_k=top_k, top_p=top_p)
    failed = (new == NO_TOKEN) & ~done
    new = jnp.where(done, NO_TOKEN, new)
    if stop is not None:
        done |= jnp.isin(new, stop)
    return new, done, failed


def _follow(
    model: Any, rngs: Any, tokens: Any, done: Any, choice: Choice, top_k: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``_advance`` by the last token of each sequence."""
    lengths = jnp.where(done, 0, 1).astype(jnp.int32)
    return _advance(model, rngs, tokens[:, None], lengths, done, choice, top_k)


@functools.partial(jit, donate=Cache, static_argnames="top_k")
def prefill(
    model: Any,
    rngs: Any,
    tokens: Any,
    lengths: Any,
    choice: Choice,
    *,
    top_k: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The compiled step from prompts to their first tokens, as ``stream`` makes it.

    Args:
      model: a Decoder with caches, which are donated.
      rngs: the source of keys, or None.
      tokens: int32 (batch, length).
      lengths: int32 (batch,).
      choice: the options of sampling.
      top_k: as for ``sample``.

    Returns:
      The tokens, int32 (batch,); which sequences have ended; which gave no token.
    """
    done = jnp.zeros(lengths.shape, bool)
    return _advance(model, rngs, tokens, lengths, done, choice, top_k)


@functools.partial(jit, donate=Cache, static_argnames="top_k")
def decode(
    model: Any, rngs: Any, tokens: Any, done: Any, choice: Choice, *, top_k: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The compiled step from one token of each sequence to the next.

    Args:
      model: as for ``prefill``.
      rngs: as for ``prefill``.
      tokens: int32 (batch,).
      done: booleans (batch,): which have ended; their caches do not change.
      choice: as for ``prefill``.
      top_k: as for ``sample``.

    Returns:
      As ``prefill``.
    """
    return _follow(model, rngs, tokens, done, choice, top_k)


@functools.partial(jit, donate=Cache, static_argnames=("steps", "top_k"))
def decode_all(
    model: Any,
    rngs: Any,
    tokens: Any,
    done: Any,
    failed: Any,
    choice: Choice,
    *,
    steps: int,
    top_k: int | None,
) -> tuple[jax.Array, jax.Array]:
    """The tokens after ``prefill``, in one compiled loop.

    Args:
      model: as for ``prefill``.
      rngs: as for ``prefill``.
      tokens: what ``prefill`` returned first.
      done: the second.
      failed: the third.
      choice: as for ``prefill``.
      steps: the greatest number of tokens, the first included.
      top_k: as for ``sample``.

    Returns:
      The tokens, int32 (batch, steps), and which sequences gave no token.
    """
    out = jnp.full((len(tokens), steps), NO_TOKEN, jnp.int32).at[:, 0].set(tokens)

    def goes_on(state: Any) -> jax.Array:
        *_, done, failed, i = state
        return (i < steps) & ~done.all() & ~failed.any()

    def body(state: Any) -> Any:
        model, rngs, out, new, done, _, i = state
        new, done, failed = _follow(model, rngs, new, done, choice, top_k)
        return model, rngs, out.at[:, i].set(new), new, done, failed, i + 1

    state = (model, rngs, out, tokens, done, failed, jnp.int32(1))
    _, _, out, _, _, failed, _ = while_loop(goes_on, body, state)
    return out, failed


def _steps(call: _Call) -> Iterator[np.ndarray]:
    if call.steps == 0:
        return
    model, rngs, choice, top_k = call.model, call.rngs, call.choice, call.top_k
    ahead = prefill(model, rngs, call.tokens, call.lengths, choice, top_k=top_k)
    for left in range(call.steps - 1, -1, -1):
        new, done, failed = ahead
        # The next step is dispatched before this token is read, unless the token says
        # whether there is a next step.
        more = left > 0 and not (choice.stop is not None and bool(done.all()))
        if more:
            ahead = decode(model, rngs, new, done, choice, top_k=top_k)
        _check(np.asarray(failed))
        yield np.asarray(new)
        if not more:
            return


def _check(failed: np.ndarray) -> None:
    if failed.any():
        rows = ", ".join(map(str, np.flatnonzero(failed)))
        raise DecodingError(
            f"the logits of sequence {rows} hold NaN or infinity, or only -infinity: "
            "the parameters or a cache hold such numbers, or a cache was given more "
            "tokens than it has slots for. Look at state(model), and begin anew with "
            "reset_cache(model)."
        )
