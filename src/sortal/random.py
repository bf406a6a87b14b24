"""Rngs: named streams of random keys, derived exactly as in Flax NNX."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Never, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np

from sortal._engine.foreign import is_kind, register_imported
from sortal._engine.nodes import get_dict
from sortal._engine.paths import Path, show
from sortal._engine.variable import RngCount, RngKey, describe
from sortal._nnx_names import refuse_unknown
from sortal.errors import RngAttributeError, RngError
from sortal.filters import leaf_filter
from sortal.functional import iter_nodes
from sortal.module import Pytree

Split = int | tuple[int, ...]
_RANDOM = (
    "ball", "bernoulli", "beta", "binomial", "bits", "categorical", "cauchy",
    "chisquare", "choice", "dirichlet", "double_sided_maxwell", "exponential", "f",
    "gamma", "generalized_normal", "geometric", "gumbel", "laplace", "loggamma",
    "logistic", "lognormal", "maxwell", "multinomial", "multivariate_normal",
    "normal", "orthogonal", "pareto", "permutation", "poisson", "rademacher",
    "randint", "rayleigh", "t", "triangular", "truncated_normal", "uniform", "wald",
    "weibull_min",
)  # fmt: skip
_INITIALIZERS = (
    "delta_orthogonal", "glorot_normal", "glorot_uniform", "he_normal", "he_uniform",
    "kaiming_normal", "kaiming_uniform", "lecun_normal", "lecun_uniform",
    "variance_scaling", "xavier_normal", "xavier_uniform",
)  # fmt: skip


class _Draws:
    """Gives a class one method for each function of ``jax.random`` that takes a key.

    ``rngs.normal((2, 3))`` is ``jax.random.normal(rngs(), (2, 3))``, and
    ``rngs.lecun_normal()((2, 3))`` is the initialiser of that name with a new key.
    """

    __slots__ = ()


def _draw(name: str) -> Callable[..., jax.Array]:
    function = getattr(jax.random, name)

    @functools.wraps(function, assigned=("__name__", "__doc__"), updated=())
    def draw(self: Any, *args: Any, **kwargs: Any) -> jax.Array:
        return function(self(), *args, **kwargs)

    return draw


def _initialise(name: str) -> Callable[..., Any]:
    make = getattr(jax.nn.initializers, name)

    @functools.wraps(make, assigned=("__name__", "__doc__"), updated=())
    def initialiser(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = make(*args, **kwargs)
        return lambda *a, **k: function(self(), *a, **k)

    return initialiser


for _name in _RANDOM:
    setattr(_Draws, _name, _draw(_name))
for _name in _INITIALIZERS:
    setattr(_Draws, _name, _initialise(_name))


class RngStream(_Draws, Pytree):
    """One stream: a key, and how many keys were derived from it by ``fold_in``.

    Args:
      key: a seed, a typed key, or raw key data (uint32); may have leading axes.
      tag: the stream's name, kept as the Variables' ``tag``.

    Raises:
      RngError: ``key`` is none of these; at a call: the stream holds several keys.

    Example:
      >>> import sortal as nnx
      >>> stream = nnx.RngStream(0, tag="params")
      >>> stream() == stream()
      Array(False, dtype=bool)
    """

    def __init__(self, key: Any, *, tag: str):
        key = _as_key(key, tag)
        self.tag = tag
        self.key = RngKey(key, tag=tag)
        self.count = RngCount(jnp.zeros(key.shape, dtype=jnp.uint32), tag=tag)

    def __call__(self) -> jax.Array:
        self.count._check_writable()
        try:
            key = jax.random.fold_in(self.key.value, self.count.value)
        except ValueError as e:
            if self.key.shape:
                raise RngError(
                    f"stream {self.tag!r} holds several keys, "
                    f"{describe(self.key.value)}, and draws by one. Draw inside vmap, "
                    "with axis 0 for RngState, or after restore_rngs."
                ) from e
            raise
        self.count[...] += 1
        return key

    def split(self, k: Split) -> RngStream:
        """A stream of ``k`` keys that takes one key from this one.

        Args:
          k: the number of keys, or the shape of an array of keys.

        Returns:
          The new stream; its keys have shape ``k``.
        """
        return type(self)(jax.random.split(self(), k), tag=self.tag)

    def fork(self, *, split: Split | None = None) -> RngStream:
        """A new stream that takes one key from this one.

        Args:
          split: the number of keys that the new stream has; one, with no axis, if
            absent.

        Returns:
          The new stream.
        """
        return type(self)(self(), tag=self.tag) if split is None else self.split(split)

    def broadcast(self, k: Split) -> RngStream:
        """A stream whose keys, of shape ``k``, are all the same one.

        Args:
          k: a number or shape of leading axes.

        Returns:
          The new stream.
        """
        key = self()
        shape = (k,) if isinstance(k, int) else tuple(k)
        return type(self)(jnp.broadcast_to(key, shape + key.shape), tag=self.tag)


def _as_key(key: Any, name: str) -> Any:
    if isinstance(key, int) and not isinstance(key, bool):
        return jax.random.key(key)
    if isinstance(key, (jax.Array, np.ndarray)):
        if key.dtype == jnp.uint32:
            with contextlib.suppress(TypeError):  # not of the shape of key data
                return jax.random.wrap_key_data(jnp.asarray(key))
        if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
            return key
    raise RngError(
        f"stream {name!r} needs a seed (int), a jax.random.key or raw key data "
        f"(uint32); found {describe(key)}."
    )


class Rngs(_Draws, Pytree):
    """Named streams of random keys.

    ``rngs.dropout()`` gives the next key of the stream ``dropout``, or of ``default``
    where there is none of that name; ``rngs()`` is ``rngs.default()``.

    Args:
      default: seed, key or stream of the stream ``default``; or a mapping of names.
      **rngs: seeds, keys or streams by name.

    Raises:
      RngError: a value is no seed, key or stream.

    Example:
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0, params=1)
      >>> keys = rngs.params(), rngs.dropout(), rngs()
      >>> int(rngs.default.count.value)
      2
    """

    def __init__(self, default: Any = None, **rngs: Any):
        # Flax's layers test for Flax's class; this passes once Flax is registered.
        register_imported(sys.modules)
        if isinstance(default, Mapping):
            rngs = {**default, **rngs}
        elif default is not None:
            rngs["default"] = default
        for name, key in rngs.items():
            seed = key.key.value if isinstance(key, RngStream) else key
            setattr(self, name, RngStream(seed, tag=name))

    def __getattr__(self, name: str) -> RngStream:
        streams = get_dict(self)
        if "default" in streams and not (name.startswith("__") or name in streams):
            return streams["default"]
        if name.startswith("__"):
            raise AttributeError(name)
        raise RngAttributeError(
            f"No RngStream named {name!r} found in Rngs. There is no default to stand "
            f"in for it; there is {', '.join(self) or 'none'}. Write Rngs(seed, ...) "
            f"for a default, or Rngs({name}=seed)."
        )

    def __getitem__(self, name: str) -> RngStream:
        return getattr(self, name)

    def __call__(self) -> jax.Array:
        return self.default()

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self.items())

    def __len__(self) -> int:
        return sum(1 for _ in self.items())

    def __contains__(self, name: Any) -> bool:
        return name in get_dict(self)

    def items(self) -> Iterator[tuple[str, RngStream]]:
        """Pairs of name and stream."""
        streams = get_dict(self).items()
        return ((n, s) for n, s in streams if isinstance(s, RngStream))

    def fork(self, *, split: Any = None) -> Rngs:
        """New Rngs whose streams each take one key from the stream of their name.

        Args:
          split: the number (or shape) of keys for each stream, or a mapping from
            filters over streams to these or None; a filter may be a stream's name.

        Returns:
          The new Rngs.
        """
        return self._derive(split, RngStream.fork)

    def split(self, k: Any) -> Rngs:
        """New Rngs whose streams hold several keys; as ``fork(split=k)``.

        Args:
          k: a number or shape, or a mapping from filters to these; streams whose value
            is None, or that no filter takes, keep their key.

        Returns:
          The new Rngs.
        """
        return self._derive(k, lambda s, split: s if split is None else s.split(split))

    def broadcast(self, k: Any) -> Rngs:
        """New Rngs whose streams repeat one new key over leading axes.

        Args:
          k: as for ``split``.

        Returns:
          The new Rngs.
        """
        return self._derive(
            k, lambda s, split: s if split is None else s.broadcast(split)
        )

    def _derive(self, splits: Any, derive: Callable[..., RngStream]) -> Rngs:
        if not isinstance(splits, Mapping):
            splits = {...: splits}
        chosen = [(leaf_filter(f), k) for f, k in splits.items()]
        made = {}
        for name, stream in self.items():
            k = next((k for f, k in chosen if _takes(f, (name,), stream)), None)
            made[name] = derive(stream, split=k)
        return Rngs(made)


def _takes(chosen: Any, path: Path, stream: RngStream) -> bool:
    return chosen((*path, "key"), stream.key) and chosen((*path, "count"), stream.count)


def is_rngs(x: Any) -> TypeGuard[Rngs]:
    """Whether ``x`` is an Rngs, of Sortal or of another library."""
    return is_kind(type(x), Rngs)


def is_stream(x: Any) -> TypeGuard[RngStream]:
    """Whether ``x`` is a stream of random keys, of Sortal or of another library."""
    return is_kind(type(x), RngStream)


class RngBackups:
    """The keys and counts that streams had; a context manager that restores them."""

    def __init__(self, backups: list[tuple[RngStream, jax.Array, jax.Array]]):
        self.backups = backups

    def __iter__(self) -> Iterator[tuple[RngStream, jax.Array, jax.Array]]:
        return iter(self.backups)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        restore_rngs(self)


def _streams(node: Any, only: Any) -> list[tuple[Path, RngStream]]:
    chosen = leaf_filter(only)
    found = iter_nodes(node, is_stream)
    return [(path, s) for path, s in found if _takes(chosen, path, s)]


_NO_NODE: Any = object()


def split_rngs(
    node: Any = _NO_NODE,
    /,
    *,
    splits: Split,
    only: Any = ...,
    squeeze: bool = False,
    **_unknown: Never,
) -> Any:
    """Turns the keys of a model's streams, in place, into arrays of keys.

    Args:
      node: a Module, Rngs or container. Without it, a decorator is returned that
        splits the streams of all arguments for the time of each call.
      splits: the number or shape of keys.
      only: which streams, as a filter over their Variables; a name is a tag.
      squeeze: keep no axis; for ``splits=1``.

    Returns:
      An RngBackups, usable with ``with`` or ``restore_rngs``; or the decorator.

    Raises:
      RngError: ``squeeze`` with several splits.

    Example:
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0)
      >>> with nnx.split_rngs(rngs, splits=4):
      ...     print(rngs.default.key.shape)
      (4,)
      >>> rngs.default.key.shape
      ()
    """
    refuse_unknown("split_rngs", _unknown)
    if squeeze and splits != 1:
        raise RngError(f"squeeze=True is for splits=1; found splits={splits!r}.")
    if node is _NO_NODE:

        def decorate(f: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(f)
            def wrapper(*args: Any, **kwargs: Any) -> Any:
                options = {"splits": splits, "only": only, "squeeze": squeeze}
                with split_rngs((args, kwargs), **options):
                    return f(*args, **kwargs)

            return wrapper

        return decorate
    backups = []
    for _, stream in _streams(node, only):
        key = jax.random.split(stream(), splits)
        backups.append((stream, stream.key.get_value(), stream.count.get_value()))
        lead = () if squeeze else key.shape[: key.ndim - stream.count.ndim]
        stream.key.set_value(key[0] if squeeze else key)
        counts = (*lead, *stream.count.shape)
        stream.count.set_value(jnp.zeros(counts, dtype=jnp.uint32))
    return RngBackups(backups)


def fork_rngs(
    node: Any,
    /,
    *,
    split: Any = None,
    **_unknown: Never,
) -> RngBackups:
    """Gives a model's streams new keys in place, each derived from the old one.

    Args:
      node: a Module, Rngs or container.
      split: None, a number or shape of keys, or a mapping from filters to these.

    Returns:
      An RngBackups, usable with ``with`` or ``restore_rngs``.

    Example:
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0)
      >>> with nnx.fork_rngs(rngs):
      ...     key = rngs()
    """
    refuse_unknown("fork_rngs", _unknown)
    splits = split if isinstance(split, Mapping) else {...: split}
    backups = []
    for only, k in splits.items():
        for _, stream in _streams(node, only):
            if any(stream is s for s, *_ in backups):
                continue
            forked = stream.fork(split=k)
            backups.append((stream, stream.key.get_value(), stream.count.get_value()))
            stream.key.set_value(forked.key.get_value())
            stream.count.set_value(forked.count.get_value())
    return RngBackups(backups)


def restore_rngs(backups: Any, /) -> None:
    """Gives streams back the keys and counts that they had.

    Args:
      backups: what ``split_rngs`` or ``fork_rngs`` returned.

    Example:
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0)
      >>> backups = nnx.split_rngs(rngs, splits=2)
      >>> nnx.restore_rngs(backups)
      >>> rngs.default.key.shape
      ()
    """
    for stream, key, count in backups:
        stream.key.set_value(key)
        stream.count.set_value(count)


def reseed(
    node: Any,
    /,
    *,
    policy: str | Callable[[Path, jax.Array, tuple[int, ...]], jax.Array] = (
        "scalars_only"
    ),
    **stream_keys: Any,
) -> None:
    """Gives a model's streams, by name, new keys and counts of zero, in place.

    Args:
      node: a Module, Rngs or container.
      policy: what to do with streams that hold several keys: ``"scalars_only"`` is an
        error, ``"match_shape"`` splits the new key; or a function of (path, key,
        shape) that returns the keys.
      **stream_keys: seeds or keys by stream name, which is that of the Rngs it was
        forked from: ``default`` where that stood in. Names of no stream are ignored.

    Raises:
      RngError: the policy is unknown, or forbids a stream's shape; nothing is changed.

    Example:
      >>> import sortal as nnx
      >>> rngs = nnx.Rngs(0)
      >>> first = rngs()
      >>> nnx.reseed(rngs, default=7)
      >>> int(rngs.default.count.value)
      0
    """
    if not callable(policy) and policy not in ("scalars_only", "match_shape"):
        raise RngError(
            "policy must be 'scalars_only', 'match_shape' or a function; found "
            f"{policy!r}."
        )
    seeds = Rngs(**stream_keys)
    found = [(p, s) for p, s in _streams(node, ...) if s.tag in stream_keys]
    several = [
        f"{show(p)} {describe(s.key.get_value())}" for p, s in found if s.key.shape
    ]
    if policy == "scalars_only" and several:
        raise RngError(
            f"reseed found streams with several keys: {', '.join(several)}. Pass "
            "policy='match_shape', or a function of (path, key, shape)."
        )
    for path, stream in found:
        key = seeds[stream.tag]()
        if callable(policy):
            key = policy(path, key, stream.key.shape)
        elif stream.key.shape:
            key = jax.random.split(key, stream.key.shape)
        stream.key.set_value(key)
        stream.count.set_value(jnp.zeros(key.shape, dtype=jnp.uint32))
