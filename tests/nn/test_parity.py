"""The same code and seed give Flax NNX's numbers, bit for bit.

Each case is run by one function, once with Flax's ``nnx`` and once with Sortal in its
place: parameters, output, gradients and what the call left in the state must agree in
path, dtype and every bit.
"""

from __future__ import annotations

import inspect
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx

import sortal

PRECISIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "float32": ({}, jnp.float32),
    "bfloat16": ({"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}, jnp.bfloat16),
    "mixed": ({"dtype": jnp.bfloat16}, jnp.float32),
    "inferred": ({"param_dtype": jnp.bfloat16}, jnp.float32),
}


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly():
    """Spends no time on fast code: what is compared is which operations are done."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


class Case(NamedTuple):
    """A layer, the input it is called with, and the keywords of the call."""

    make: Callable[..., Any]
    shape: tuple[int, ...]
    call: Mapping[str, Any] = {}
    method: str = "__call__"


def random(shape: tuple[int, ...], *seed: Any) -> np.ndarray:
    """Numbers that follow from a name alone."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, seed)).encode()))
    return rng.normal(size=shape).astype(np.float32)


def drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An initialiser that depends on its key, and has nothing to compile."""
    seed = jax.random.key_data(key).tolist()
    return jnp.asarray(random(shape, seed), dtype)


INITIALISERS = {"kernel_init", "bias_init", "scale_init", "embedding_init"}


def layer(name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Makes the layer called ``name`` of either library, its parameters ``drawn``."""

    def make(nnx: Any, rngs: Any, **precision: Any) -> Any:
        cls = getattr(nnx, name)
        inits = INITIALISERS & set(inspect.signature(cls.__init__).parameters)
        return cls(
            *args, rngs=rngs, **dict.fromkeys(inits, drawn), **kwargs, **precision
        )

    return make


def half(shape: tuple[int, ...]) -> np.ndarray:
    """A mask that keeps some of everything along the first axis."""
    return np.indices(shape).sum(0) % 3 != 0


LINEAR = {
    "plain": Case(layer("Linear", 5, 7), (3, 5)),
    "no axes but features": Case(layer("Linear", 5, 7), (5,)),
    "no bias": Case(layer("Linear", 5, 7, use_bias=False), (2, 3, 5)),
    "accumulated": Case(
        layer("Linear", 5, 7, preferred_element_type=jnp.float32), (3, 5)
    ),
    "general": Case(layer("LinearGeneral", (2, 3), (4, 5), axis=(1, -1)), (6, 2, 7, 3)),
    "general, axes out of order": Case(
        layer("LinearGeneral", (2, 3), 4, axis=(-1, 1)), (6, 2, 3)
    ),
    "general, per batch index": Case(
        layer("LinearGeneral", 3, (4, 2), batch_axis={0: 6}), (6, 5, 3)
    ),
    "general, as class": Case(
        layer(
            "LinearGeneral",
            3,
            4,
            dot_general_cls=lambda: jax.lax.dot_general,
        ),
        (6, 3),
    ),
    "einsum": Case(
        layer(
            "Einsum",
            "nta,hab->nthb",
            (3, 2, 4),
            (3, 4),
        ),
        (5, 6, 2),
    ),
    "einsum, ellipsis": Case(
        layer("Einsum", "...a,ab -> ...b", (3, 4), (4,)), (2, 5, 3)
    ),
    "einsum, other equation": Case(
        layer("Einsum", "ab,bc->ac", (3, 4), (4,)), (2, 3), {"einsum_str": "ab,bc->ca"}
    ),
    "attend": Case(layer("Embed", 6, 4), (2, 4), {}, "attend"),
}

CONV = {
    "same": Case(layer("Conv", 3, 4, (3, 3)), (2, 6, 5, 3)),
    "one axis": Case(layer("Conv", 3, 4, 3, padding="VALID"), (2, 7, 3)),
    "strides": Case(layer("Conv", 3, 4, (3, 2), 2, padding="SAME"), (2, 6, 5, 3)),
    "circular": Case(
        layer("Conv", 3, 4, (3, 4), padding="CIRCULAR", kernel_dilation=(1, 2)),
        (2, 8, 9, 3),
    ),
    "reflect": Case(layer("Conv", 3, 4, (4,), padding="REFLECT"), (2, 7, 3)),
    "causal": Case(
        layer("Conv", 3, 4, (3,), padding="CAUSAL", kernel_dilation=2), (2, 7, 3)
    ),
    "pairs": Case(layer("Conv", 3, 4, (3, 3), padding=(1, (0, 2))), (2, 6, 5, 3)),
    "input dilation": Case(
        layer("Conv", 3, 4, (3,), input_dilation=2, padding=1), (2, 7, 3)
    ),
    "groups": Case(
        layer("Conv", 4, 6, (3,), feature_group_count=2, use_bias=False), (2, 7, 4)
    ),
    "mask": Case(layer("Conv", 3, 4, (3,), mask=half((3, 3, 4))), (2, 7, 3)),
    "no batch": Case(layer("Conv", 3, 4, (3,), strides=None), (7, 3)),
    "batches": Case(layer("Conv", 3, 4, (3,)), (2, 2, 7, 3)),
    "transposed": Case(layer("ConvTranspose", 3, 4, (3, 3)), (2, 4, 5, 3)),
    "transposed, strides": Case(
        layer("ConvTranspose", 3, 4, (3,), 2, padding="VALID", kernel_dilation=2),
        (2, 5, 3),
    ),
    "transposed, pairs": Case(
        layer("ConvTranspose", 3, 4, (3,), (2,), padding=[(1, 2)]), (2, 5, 3)
    ),
    "transposed, circular": Case(
        layer("ConvTranspose", 3, 4, (4, 3), (2, 2), padding="CIRCULAR"), (2, 4, 5, 3)
    ),
    "transposed, circular kernel": Case(
        layer(
            "ConvTranspose",
            3,
            4,
            (5,),
            2,
            padding="CIRCULAR",
            transpose_kernel=True,
            mask=half((5, 4, 3)),
        ),
        (2, 4, 3),
    ),
    "transposed, no batch": Case(
        layer("ConvTranspose", 3, 4, 3, use_bias=False), (5, 3)
    ),
}

_MASK = {"mask": half((4, 3, 6))}

NORM = {
    "batch": Case(layer("BatchNorm", 6), (4, 3, 6)),
    "batch, evaluation": Case(
        layer("BatchNorm", 6), (4, 3, 6), {"use_running_average": True}
    ),
    "batch, options": Case(
        layer(
            "BatchNorm",
            3,
            axis=1,
            momentum=0.9,
            epsilon=1e-3,
            use_fast_variance=False,
            use_bias=False,
        ),
        (4, 3, 6),
    ),
    "batch, mask": Case(layer("BatchNorm", 6, use_scale=False), (4, 3, 6), _MASK),
    "batch, slow and mask": Case(
        layer("BatchNorm", 6, use_fast_variance=False), (4, 3, 6), _MASK
    ),
    "layer": Case(layer("LayerNorm", 6), (4, 3, 6)),
    "layer, bare": Case(
        layer("LayerNorm", 6, use_bias=False, use_scale=False), (4, 3, 6)
    ),
    "layer, axes": Case(
        layer("LayerNorm", 18, reduction_axes=(-1, 1), feature_axes=(1, 2)),
        (4, 3, 6),
    ),
    "layer, slow": Case(
        layer("LayerNorm", 6, use_fast_variance=False, epsilon=1e-3), (4, 3, 6), _MASK
    ),
    "rms": Case(layer("RMSNorm", 6), (4, 3, 6)),
    "rms, mask": Case(layer("RMSNorm", 6, use_scale=False), (4, 3, 6), _MASK),
    "rms, axes": Case(
        layer("RMSNorm", 3, reduction_axes=(1, 2), feature_axes=1), (4, 3, 6)
    ),
    "group": Case(layer("GroupNorm", 6, 3), (4, 3, 6)),
    "group, by size": Case(
        layer("GroupNorm", 6, num_groups=None, group_size=3), (4, 3, 6)
    ),
    "group, slow": Case(layer("GroupNorm", 6, 2, use_fast_variance=False), (4, 3, 6)),
    "group, mask": Case(layer("GroupNorm", 6, 2), (4, 3, 6), _MASK),
}

CASES = {
    f"{group}: {name}": case
    for group, cases in {"linear": LINEAR, "conv": CONV, "norm": NORM}.items()
    for name, case in cases.items()
}


def bits(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    """A value as what no rounding can hide: dtype, shape and bytes."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()


def leaves(nnx: Any, state: Any) -> dict[Any, Any]:
    """Path -> bits, for every leaf of a state."""
    return {path: bits(leaf[...]) for path, leaf in nnx.to_flat_state(state)}


def observe(nnx: Any, case: Case, precision: str, *, jit: bool) -> dict[str, Any]:
    """Builds and differentiates a case; everything that can be seen of it, as bits."""
    options, dtype = PRECISIONS[precision]
    model = case.make(nnx, nnx.Rngs(3, params=7), **options)
    seen: dict[str, Any] = {"initial": leaves(nnx, nnx.state(model))}
    x = jnp.asarray(random(case.shape), dtype)

    def loss(model: Any, x: Any) -> Any:
        y = getattr(model, case.method)(x, **case.call)
        weights = random(y.shape, "weights")
        return jnp.sum(y.astype(jnp.float32) * weights), y

    # A layer without parameters has no gradient of its own.
    of = (nnx.DiffState(0, nnx.Param),) if seen["initial"] else ()
    step = nnx.value_and_grad(loss, argnums=(*of, 1), has_aux=True)
    (value, y), (*grads, dx) = (nnx.jit(step) if jit else step)(model, x)
    seen |= {"loss": bits(value), "output": bits(y), "input gradient": bits(dx)}
    seen["gradients"] = [leaves(nnx, g) for g in grads]
    seen["final"] = leaves(nnx, nnx.state(model))
    return seen


# Where it matters when a dtype is promoted: a choice, for every case costs its time.
MIXED = [
    "linear: accumulated",
    "linear: general, per batch index",
    "linear: einsum",
    "linear: attend",
    "conv: circular",
    "conv: causal",
    "conv: mask",
    "conv: no batch",
    "conv: transposed, circular kernel",
    "norm: batch",
    "norm: batch, slow and mask",
    "norm: layer, slow",
    "norm: rms",
    "norm: group",
]


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "float32") for name in CASES] + [(name, "mixed") for name in MIXED],
)
def test_a_step_has_the_bits_that_flax_gives(name: str, precision: str) -> None:
    """Parameters, output, gradients and state after a step are those of Flax."""
    ours = observe(sortal, CASES[name], precision, jit=False)
    assert ours == observe(flax_nnx, CASES[name], precision, jit=False)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("linear: plain", "bfloat16"),
        ("linear: plain", "inferred"),
        ("conv: mask", "bfloat16"),
        ("norm: batch", "bfloat16"),
        ("norm: batch", "inferred"),
        ("norm: layer", "bfloat16"),
        ("norm: rms, mask", "bfloat16"),
    ],
)
def test_other_precisions_have_the_bits_that_flax_gives(
    name: str, precision: str
) -> None:
    """The same holds in bfloat16 throughout, and where the dtype is left open."""
    ours = observe(sortal, CASES[name], precision, jit=False)
    assert ours == observe(flax_nnx, CASES[name], precision, jit=False)


@pytest.mark.parametrize(
    "name", ["linear: plain", "conv: circular", "norm: batch", "norm: group"]
)
def test_a_compiled_step_has_the_bits_that_flax_gives(name: str) -> None:
    """The same holds where each library compiles the step as a whole."""
    ours = observe(sortal, CASES[name], "mixed", jit=True)
    assert ours == observe(flax_nnx, CASES[name], "mixed", jit=True)


DEFAULTS: dict[str, tuple[Any, ...]] = {
    "Linear": (5, 7),
    "LinearGeneral": (5, (7, 1)),
    "Einsum": ("ab,bc->ac", (5, 7), (7,)),
    "Conv": (5, 7, 1),
    "ConvTranspose": (5, 7, 1),
    "Embed": (5, 7),
    "BatchNorm": (5,),
    "LayerNorm": (5,),
    "RMSNorm": (5,),
    "GroupNorm": (6, 2),
}


@pytest.mark.parametrize("name", DEFAULTS)
def test_parameters_start_as_those_of_flax(name: str) -> None:
    """The default initialisers, keys and dtypes are Flax's."""

    def observe(nnx: Any) -> Any:
        rngs = nnx.Rngs(3)
        model = getattr(nnx, name)(*DEFAULTS[name], rngs=rngs)
        return leaves(nnx, nnx.state(model)), leaves(nnx, nnx.state(rngs))

    assert observe(sortal) == observe(flax_nnx)


def norm_in_two_steps(nnx: Any, *, running: bool) -> dict[str, Any]:
    model = nnx.BatchNorm(3, momentum=0.8, rngs=nnx.Rngs(0))
    for i in range(2):
        model(jnp.asarray(random((4, 3), i)))
    if running:
        model.eval()
    y = model(jnp.asarray(random((4, 3), "last")))
    return {"y": bits(y), "state": leaves(nnx, nnx.state(model))}


@pytest.mark.parametrize("running", [False, True])
def test_running_statistics_evolve_as_in_flax(running: bool) -> None:
    """Several updates, and evaluation after them, agree to the bit."""
    ours = norm_in_two_steps(sortal, running=running)
    assert ours == norm_in_two_steps(flax_nnx, running=running)


def test_statistics_over_a_mapped_axis_are_those_of_flax() -> None:
    """With ``axis_name``, members of a mapped axis share one mean and variance."""

    def observe(nnx: Any) -> Any:
        model = nnx.BatchNorm(3, axis_name="i", rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(model)

        def apply(state: Any, x: Any) -> Any:
            copy = nnx.merge(graphdef, state)
            return copy(x), copy.mean[...], copy.var[...]

        x = jnp.asarray(random((2, 4, 3)))
        mapped = jax.vmap(apply, in_axes=(None, 0), axis_name="i")
        return [bits(v) for v in mapped(state, x)]

    assert observe(sortal) == observe(flax_nnx)


SHARDED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "Linear": ((5, 7), jnp.ones((4, 5))),
    "LinearGeneral": ((5, 7), jnp.ones((4, 5))),
    "Einsum": (("ab,bc->ac", (5, 7)), jnp.ones((4, 5))),
    "Conv": ((5, 7, 1), jnp.ones((4, 3, 5))),
    "Embed": ((5, 7), jnp.zeros(4, jnp.int32)),
}


@pytest.mark.parametrize("name", SHARDED)
def test_an_output_gets_the_sharding_asked_for_as_in_flax(name: str) -> None:
    """Under explicit sharding, ``out_sharding`` says how the output lies."""
    arguments, x = SHARDED[name]
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    spec = jax.sharding.PartitionSpec("data")

    def observe(nnx: Any) -> Any:
        model = getattr(nnx, name)(*arguments, rngs=nnx.Rngs(0))
        y = model(x, out_sharding=jax.sharding.NamedSharding(mesh, spec))
        return str(jax.typeof(y)), bits(y)

    with jax.set_mesh(mesh):
        ours = observe(sortal)
        assert "@data" in ours[0]
        assert ours == observe(flax_nnx)


LOOKUPS = {
    "plain": ({}, (5, 3)),
    "integer table": ({"dtype": jnp.int32}, (5, 3)),
    "half": ({"dtype": jnp.bfloat16}, (5, 3)),
    "half parameters": ({"param_dtype": jnp.bfloat16}, (5, 3)),
    "one vector": ({}, (1, 3)),
}


@pytest.mark.parametrize("name", LOOKUPS)
def test_embeddings_are_those_of_flax(name: str) -> None:
    """Tables and look-ups agree, out of range and negative indices included."""
    options, sizes = LOOKUPS[name]

    def observe(nnx: Any) -> Any:
        table = nnx.Embed(*sizes, rngs=nnx.Rngs(1), **options)
        return bits(table.embedding[...]), bits(table(np.array([[0, 4], [-1, 9]])))

    assert observe(sortal) == observe(flax_nnx)


def dropped(nnx: Any, make: Callable[[Any], dict[str, Any]], dtype: Any) -> list[Any]:
    """Two calls of a Dropout on its own stream, and what they and the fork left."""
    options = make(nnx)
    model = nnx.Dropout(**options)
    x = jnp.asarray(random((4, 6)), dtype)
    outputs = [bits(model(x)) for _ in range(2)]
    state = leaves(nnx, nnx.state(model))
    # What the fork took from the streams that were passed in.
    source = leaves(nnx, nnx.state(options["rngs"]))
    return [outputs, state, source]


DROPOUTS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "default stream": lambda nnx: {"rate": 0.5, "rngs": nnx.Rngs(0)},
    "its stream": lambda nnx: {"rate": 0.3, "rngs": nnx.Rngs(0, dropout=1)},
    "named stream": lambda nnx: {
        "rate": 0.3,
        "rng_collection": "noise",
        "rngs": nnx.Rngs(noise=1),
    },
    "a stream": lambda nnx: {"rate": 0.5, "rngs": nnx.Rngs(0).dropout},
    "broadcast": lambda nnx: {
        "rate": 0.5,
        "broadcast_dims": (0,),
        "rngs": nnx.Rngs(2),
    },
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", DROPOUTS)
def test_dropout_draws_the_masks_of_flax(name: str, dtype: Any) -> None:
    """Masks, and the keys and counts after, agree however the stream was given."""
    ours = dropped(sortal, DROPOUTS[name], dtype)
    assert ours == dropped(flax_nnx, DROPOUTS[name], dtype)


SOURCES: dict[str, Callable[[Any], Any]] = {
    "streams": lambda nnx: nnx.Rngs(5),
    "stream": lambda nnx: nnx.Rngs(5).dropout,
    "key": lambda nnx: jax.random.key(5),
}


@pytest.mark.parametrize("name", SOURCES)
def test_dropout_draws_from_what_the_call_gives_as_flax_does(name: str) -> None:
    """Streams, a stream or a key passed to the call win over the layer's own."""

    def observe(nnx: Any) -> Any:
        model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        return bits(model(jnp.ones((4, 6)), rngs=SOURCES[name](nnx)))

    assert observe(sortal) == observe(flax_nnx)


POOLS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "average": ("avg_pool", (2, 6, 5, 3), {"window_shape": (2, 2)}),
    "average, strides": (
        "avg_pool",
        (2, 6, 5, 3),
        {"window_shape": (3, 2), "strides": (2, 1), "padding": "SAME"},
    ),
    "average of what is there": (
        "avg_pool",
        (2, 6, 5, 3),
        {"window_shape": (3, 3), "padding": "SAME", "count_include_pad": False},
    ),
    "average of what is there, no batch": (
        "avg_pool",
        (6, 3),
        {"window_shape": (3,), "padding": "SAME", "count_include_pad": False},
    ),
    "maximum": ("max_pool", (2, 6, 3), {"window_shape": (2,), "strides": (2,)}),
    "maximum, pairs": (
        "max_pool",
        (2, 6, 3),
        {"window_shape": (3,), "padding": ((1, 0),)},
    ),
    "maximum, no batch": ("max_pool", (6, 3), {"window_shape": (2,)}),
    "minimum": ("min_pool", (2, 6, 3), {"window_shape": (2,), "padding": "SAME"}),
    "batches": ("max_pool", (2, 2, 6, 3), {"window_shape": (2,), "padding": "SAME"}),
    "product": (
        "pool",
        (2, 6, 3),
        {
            "init": 1.0,
            "reduce_fn": jax.lax.mul,
            "window_shape": (2,),
            "strides": None,
            "padding": "VALID",
        },
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, jnp.float32) for name in POOLS]
    + [(name, jnp.bfloat16) for name in POOLS if "average" in name]
    + [(name, jnp.int32) for name in ("average", "maximum, pairs", "minimum")],
)
def test_pools_have_the_bits_that_flax_gives(name: str, dtype: Any) -> None:
    """Values, and gradients where there are any, agree."""
    function, shape, options = POOLS[name]
    x = jnp.asarray(8 * random(shape), dtype)

    def observe(nnx: Any) -> Any:
        def total(x: Any) -> Any:
            y = getattr(nnx, function)(x, **options)
            return jnp.sum(y.astype(jnp.float32) * random(y.shape)), y

        if dtype == jnp.int32 or function == "pool":
            return bits(total(x)[1])
        (value, y), dx = jax.value_and_grad(total, has_aux=True)(x)
        return bits(value), bits(y), bits(dx)

    assert observe(sortal) == observe(flax_nnx)


FUNCTIONS = ["avg_pool", "max_pool", "min_pool", "pool"]


def shown(default: Any) -> Any:
    """A default as what can be compared across libraries."""
    if inspect.isfunction(default):
        # An initialiser made by a factory shows only in what it returns.
        return default.__name__
    return dict(default) if isinstance(default, Mapping) else default


def signature(function: Any) -> list[tuple[str, Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, shown(p.default)) for p in parameters]


@pytest.mark.parametrize("name", [*DEFAULTS, "Dropout", *FUNCTIONS])
def test_arguments_are_those_of_flax(name: str) -> None:
    """Names, order, kinds and defaults of constructors and calls agree."""
    ours, theirs = getattr(sortal, name), getattr(flax_nnx, name)
    if name in FUNCTIONS:
        assert signature(ours) == signature(theirs)
        return
    methods = ["__init__", "__call__", *(["attend"] if name == "Embed" else [])]
    for method in methods:
        assert signature(getattr(ours, method)) == signature(getattr(theirs, method))
