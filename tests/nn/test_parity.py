"""The same code and seed give Flax NNX's numbers, bit for bit.

Each case is run by one function, once with Flax's ``nnx`` and once with Sortal in its
place: parameters, output, gradients and what the call left in the state must agree in
path, dtype and every bit. This prints what was compared, layer by layer:

    ./run test tests/nn/test_parity.py -s
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.nnx.nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx as flax_nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal
import sortal.nn
from parity import (
    CASES,
    FLAX,
    around,
    attention,
    bits,
    layer,
    leaves,
    observe,
    random,
    weighed,
)
from sortal._engine.tables import Table, plain

# Columns of the table, and their headings; other dtypes than these share a column.
COLUMNS = {
    "arguments": "args>",
    "beginning": "init>",
    "float32": "f32>",
    "mixed": "mixed>",
    "other": "other>",
    "jit": "jit>",
    "vmap": "vmap>",
    "scan": "scan>",
}
# Layer -> column of the table -> how many comparisons agreed.
AGREED: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))


def agree(name: str, column: str, look: Callable[[Any], Any]) -> None:
    """Asserts that both libraries show the same, and notes it for the table."""
    assert look(sortal) == look(flax_nnx)
    AGREED[name.partition(":")[0]][column if column in COLUMNS else "other"] += 1


# Where it matters when a dtype is promoted: a choice, for every case costs its time.
MIXED = [
    "Linear: accumulated",
    "LinearGeneral: per batch index",
    "Einsum: plain",
    "Embed: attend",
    "Conv: circular",
    "Conv: causal",
    "Conv: mask",
    "Conv: no batch",
    "ConvTranspose: circular kernel",
    "BatchNorm: plain",
    "BatchNorm: slow and mask",
    "LayerNorm: slow",
    "RMSNorm: plain",
    "GroupNorm: plain",
    "InstanceNorm: plain",
    "WeightNorm: plain",
    "SpectralNorm: plain",
    "PReLU: slope",
    "LoRA: plain",
    "LoRALinear: dtypes",
    "GRUCell: step",
    "SimpleCell: residual",
    "MultiHeadAttention: dropout",
    "RoPE: plain",
]


def known(names: list[str]) -> list[Any]:
    """Cases as parameters; those that this Flax does otherwise are left out."""
    reason = "later versions of Flax do this as Sortal does"
    skips = [pytest.mark.skipif(CASES[n].since > FLAX, reason=reason) for n in names]
    pairs = zip(names, skips, strict=True)
    return [pytest.param(name, marks=skip) for name, skip in pairs]


# Flax wishes `sow` to be used in another way, which is no question of numbers.
sowing = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")


@sowing
@pytest.mark.parametrize("name", known(list(CASES)))
def test_a_step_has_the_bits_that_flax_gives(name: str) -> None:
    """Parameters, output, gradients and state after a step are those of Flax."""
    agree(name, "float32", lambda nnx: observe(nnx, CASES[name], "float32"))


@pytest.mark.parametrize("name", known(MIXED))
def test_a_step_of_mixed_precision_has_the_bits_that_flax_gives(name: str) -> None:
    """The same holds where parameters are float32 and the computation is bfloat16."""
    agree(name, "mixed", lambda nnx: observe(nnx, CASES[name], "mixed"))


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("Linear: plain", "bfloat16"),
        ("Linear: plain", "inferred"),
        ("Conv: mask", "bfloat16"),
        ("BatchNorm: plain", "bfloat16"),
        ("BatchNorm: plain", "inferred"),
        ("LayerNorm: plain", "bfloat16"),
        ("RMSNorm: mask", "bfloat16"),
        ("InstanceNorm: plain", "bfloat16"),
        ("PReLU: plain", "bfloat16"),
        ("LoRALinear: plain", "inferred"),
        ("GRUCell: step", "bfloat16"),
        ("MultiHeadAttention: dropout", "bfloat16"),
    ],
)
def test_other_precisions_have_the_bits_that_flax_gives(
    name: str, precision: str
) -> None:
    """The same holds in bfloat16 throughout, and where the dtype is left open."""
    agree(name, precision, lambda nnx: observe(nnx, CASES[name], precision))


# Layers that keep the shape (batch, time, 6): one program holds them all.
RNNS = {
    cell: lambda nnx, rngs, cell=cell, **precision: nnx.RNN(
        layer(cell, 6, 6)(nnx, rngs, **precision), rngs=rngs
    )
    for cell in ("LSTMCell", "OptimizedLSTMCell", "GRUCell")
}
ZOO: dict[str, Callable[..., Any]] = {
    "Linear": layer("Linear", 6, 6),
    "LinearGeneral": layer("LinearGeneral", 6, 6),
    "Einsum": layer("Einsum", "bta,ac->btc", (6, 6), (6,)),
    "Conv": layer("Conv", 6, 6, 3, padding="CIRCULAR"),
    "ConvTranspose": layer("ConvTranspose", 6, 6, 3),
    "BatchNorm": layer("BatchNorm", 6),
    "LayerNorm": layer("LayerNorm", 6),
    "RMSNorm": layer("RMSNorm", 6),
    "GroupNorm": layer("GroupNorm", 6, 2),
    "InstanceNorm": layer("InstanceNorm", 6),
    "WeightNorm": around("WeightNorm", layer("Linear", 6, 6), use_scale=False),
    "SpectralNorm": around("SpectralNorm", layer("Linear", 6, 6)),
    "Dropout": lambda nnx, rngs, **_: nnx.Dropout(0.5, rngs=rngs),
    "MultiHeadAttention": attention(),
    "LoRALinear": layer("LoRALinear", 6, 6, lora_rank=2),
    "PReLU": layer("PReLU"),
    **RNNS,
    # Its carry is as wide as its parameters, so it is not run in mixed precision.
    "SimpleCell": lambda nnx, rngs, **_: nnx.RNN(
        layer("SimpleCell", 6, 6)(nnx, rngs), rngs=rngs
    ),
    "Bidirectional": lambda nnx, rngs, **_: nnx.Bidirectional(
        *(nnx.RNN(layer("SimpleCell", 6, 3)(nnx, rngs), rngs=rngs) for _ in range(2)),
        rngs=rngs,
    ),
}


def zoo(nnx: Any, seed: int, **precision: Any) -> Any:
    """All of these layers in one model, which gives all of their outputs."""

    class Zoo(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(seed)
            for name, make in ZOO.items():
                setattr(self, name, make(nnx, rngs, **precision))

        def __call__(self, x):
            return {name: getattr(self, name)(x) for name in ZOO}

    return Zoo()


def two_zoos(nnx: Any) -> Any:
    """Two such models as one, each value with an axis in front."""
    parts = [nnx.split(zoo(nnx, seed)) for seed in range(2)]
    states = [state for _, state in parts]
    stacked = jax.tree.map(lambda *values: jnp.stack(values), *states)
    return nnx.merge(parts[0][0], stacked)


X = random((2, 4, 6))


def agree_in_all(column: str, look: Callable[[Any], Any]) -> None:
    assert look(sortal) == look(flax_nnx)
    for name in [*ZOO, "RNN"]:
        AGREED[name][column] += 1


def test_compiled_layers_have_the_bits_that_flax_gives() -> None:
    """A gradient of all layers under ``jit``, in mixed precision."""

    def look(nnx: Any) -> Any:
        model = zoo(nnx, 0, dtype=jnp.bfloat16)

        def loss(model: Any, x: Any) -> Any:
            y = model(x)
            return weighed(y), y

        step = nnx.jit(nnx.value_and_grad(loss, has_aux=True))
        (_, y), grads = step(model, jnp.asarray(X))
        outputs = {name: bits(part) for name, part in y.items()}
        return outputs, leaves(nnx, grads), leaves(nnx, nnx.state(model))

    agree_in_all("jit", look)


def test_mapped_layers_have_the_bits_that_flax_gives() -> None:
    """Two models and two inputs under ``vmap``."""

    def look(nnx: Any) -> Any:
        model, xs = two_zoos(nnx), jnp.stack([X, np.sin(X)])
        y = nnx.jit(nnx.vmap(lambda model, x: model(x)))(model, xs)
        outputs = {name: bits(part) for name, part in y.items()}
        return outputs, leaves(nnx, nnx.state(model))

    agree_in_all("vmap", look)


def test_scanned_layers_have_the_bits_that_flax_gives() -> None:
    """Two models one after the other under ``scan``."""

    def look(nnx: Any) -> Any:
        model = two_zoos(nnx)

        def step(model: Any, x: Any) -> Any:
            return sum(model(x).values()) / len(ZOO)

        scanned = nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        y = nnx.jit(scanned)(model, jnp.asarray(X))
        return bits(y), leaves(nnx, nnx.state(model))

    agree_in_all("scan", look)


def of(name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Makes a layer of either library with the initialisers that it has by itself."""
    return lambda nnx, rngs: getattr(nnx, name)(*args, rngs=rngs, **kwargs)


def wrapped(name: str) -> Callable[..., Any]:
    return lambda nnx, rngs: getattr(nnx, name)(nnx.Linear(5, 7, rngs=rngs), rngs=rngs)


BEGINNINGS: dict[str, Callable[..., Any]] = {
    "Linear": of("Linear", 5, 7),
    "LinearGeneral": of("LinearGeneral", 5, (7, 1)),
    "Einsum": of("Einsum", "ab,bc->ac", (5, 7), (7,)),
    "Conv": of("Conv", 5, 7, 1),
    "ConvTranspose": of("ConvTranspose", 5, 7, 1),
    "Embed": of("Embed", 5, 7),
    "BatchNorm": of("BatchNorm", 5),
    "LayerNorm": of("LayerNorm", 5),
    "RMSNorm": of("RMSNorm", 5),
    "GroupNorm": of("GroupNorm", 6, 2),
    "InstanceNorm": of("InstanceNorm", 5),
    "WeightNorm": wrapped("WeightNorm"),
    "SpectralNorm": wrapped("SpectralNorm"),
    "PReLU": lambda nnx, rngs: nnx.PReLU(),
    "LoRA": of("LoRA", 5, 2, 7),
    "LoRALinear": of("LoRALinear", 5, 7, lora_rank=2),
    "MultiHeadAttention": of(
        "MultiHeadAttention", 2, 6, normalize_qk=True, dropout_rate=0.5
    ),
    "LSTMCell": of("LSTMCell", 4, 4, param_dtype=jnp.bfloat16),
    "OptimizedLSTMCell": of("OptimizedLSTMCell", 4, 4),
    "GRUCell": of("GRUCell", 4, 4),
    "SimpleCell": of("SimpleCell", 4, 4),
    "RNN": lambda nnx, rngs: nnx.RNN(nnx.SimpleCell(4, 4, rngs=rngs)),
}


@pytest.mark.parametrize("name", BEGINNINGS)
def test_parameters_start_as_those_of_flax(name: str) -> None:
    """The default initialisers, keys and dtypes are Flax's, and what rngs are left."""

    def look(nnx: Any) -> Any:
        rngs = nnx.Rngs(3)
        model = BEGINNINGS[name](nnx, rngs)
        return leaves(nnx, nnx.state(model)), leaves(nnx, nnx.state(rngs))

    agree(name, "beginning", look)


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

    def look(nnx: Any) -> Any:
        model = nnx.BatchNorm(3, axis_name="i", rngs=nnx.Rngs(0))
        graphdef, state = nnx.split(model)

        def apply(state: Any, x: Any) -> Any:
            copy = nnx.merge(graphdef, state)
            return copy(x), copy.mean[...], copy.var[...]

        x = jnp.asarray(random((2, 4, 3)))
        mapped = jax.vmap(apply, in_axes=(None, 0), axis_name="i")
        return [bits(v) for v in mapped(state, x)]

    agree("BatchNorm", "vmap", look)


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

    def look(nnx: Any) -> Any:
        model = getattr(nnx, name)(*arguments, rngs=nnx.Rngs(0))
        y = model(x, out_sharding=jax.sharding.NamedSharding(mesh, spec))
        return str(jax.typeof(y)), bits(y)

    with jax.set_mesh(mesh):
        ours = look(sortal)
        assert "@data" in ours[0]
        assert ours == look(flax_nnx)


BOTH = {
    kind: jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    for kind in (AxisType.Explicit, AxisType.Auto)
}
WANTED: dict[str, tuple[Any, Any, Any]] = {
    "Linear": ((8, 8), P("x", None, "y"), {}),
    "LinearGeneral": ((8, (4, 2)), P("x", None, "y", None), {}),
    "Einsum": (("bti,io->bto", (8, 8), (8,)), P("x", None, "y"), {}),
    "Conv": ((8, 8, 3), P("x", None, "y"), {}),
    "LoRALinear": ((8, 8), P("x", None, "y"), {"lora_rank": 2}),
    "Embed": ((16, 8), P("x", None, "y"), {}),
    "one vector": ((1, 8), P("x", None, "y"), {}),
    "attend": ((16, 8), P("x", None, "y"), {}),
    "MultiHeadAttention": ((4, 8), P("x", None, "y"), {"decode": False}),
}


@pytest.mark.parametrize("kind", BOTH)
@pytest.mark.parametrize("name", WANTED)
def test_out_sharding_acts_on_explicit_and_auto_meshes(name: str, kind: Any) -> None:
    """The numbers are those of one device, and lie where they were asked for."""
    arguments, spec, options = WANTED[name]
    mesh = BOTH[kind]
    embeds = name in ("Embed", "one vector", "attend")
    layer = getattr(sortal, "Embed" if embeds else name)
    layer = layer(*arguments, **options, rngs=sortal.Rngs(0))
    x = random((8, 4, 8))
    if name in ("Embed", "one vector"):
        x = np.arange(32).reshape(8, 4) % arguments[0]
    f = layer.attend if name == "attend" else layer
    more = {"qkv_sharding": P("x", None, "y", None)} if "Multi" in name else {}
    expected = f(x)
    with jax.set_mesh(mesh):
        given = jax.device_put(x, NamedSharding(mesh, P("x")))
        for given_as in (spec, NamedSharding(mesh, spec)):
            found = jax.jit(lambda x, to=given_as: f(x, out_sharding=to, **more))(given)
            wanted = NamedSharding(mesh, spec)
            assert found.sharding.is_equivalent_to(wanted, found.ndim)
            np.testing.assert_allclose(found, expected, atol=1e-5)


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

    def look(nnx: Any) -> Any:
        table = nnx.Embed(*sizes, rngs=nnx.Rngs(1), **options)
        return bits(table.embedding[...]), bits(table(np.array([[0, 4], [-1, 9]])))

    agree("Embed", "float32", look)


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
    column = jnp.dtype(dtype).name
    agree("Dropout", column, lambda nnx: dropped(nnx, DROPOUTS[name], dtype))


SOURCES: dict[str, Callable[[Any], Any]] = {
    "streams": lambda nnx: nnx.Rngs(5),
    "stream": lambda nnx: nnx.Rngs(5).dropout,
    "key": lambda nnx: jax.random.key(5),
}


@pytest.mark.parametrize("name", SOURCES)
def test_dropout_draws_from_what_the_call_gives_as_flax_does(name: str) -> None:
    """Streams, a stream or a key passed to the call win over the layer's own."""

    def look(nnx: Any) -> Any:
        model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        return bits(model(jnp.ones((4, 6)), rngs=SOURCES[name](nnx)))

    assert look(sortal) == look(flax_nnx)


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
    + [(name, jnp.int32) for name in ("average", "maximum, pairs", "minimum")],
)
def test_pools_have_the_bits_that_flax_gives(name: str, dtype: Any) -> None:
    """Values, and gradients where there are any, agree."""
    function, shape, options = POOLS[name]
    x = jnp.asarray(8 * random(shape), dtype)

    def look(nnx: Any) -> Any:
        def total(x: Any) -> Any:
            y = getattr(nnx, function)(x, **options)
            return jnp.sum(y.astype(jnp.float32) * random(y.shape)), y

        if dtype == jnp.int32 or function == "pool":
            return bits(total(x)[1])
        (value, y), dx = jax.value_and_grad(total, has_aux=True)(x)
        return bits(value), bits(y), bits(dx)

    agree(function, jnp.dtype(dtype).name, look)


Q, K = random((2, 5, 4, 6), "q"), random((2, 3, 2, 6), "k")
_KEY = jax.random.key(0)
ATTENDING: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
    "fused": (
        "dot_product_attention",
        (Q, K, K),
        {"bias": random((1, 4, 1, 3)), "mask": np.tri(5, 3)[None, None] > 0},
    ),
    "many batch axes": (
        "dot_product_attention",
        (Q[None, None], K[None, None], K[None, None]),
        {"mask": np.tri(5, 3)[None, None, None, None] > 0},
    ),
    "no batch axis": ("dot_product_attention", (Q[0], K[0], K[0]), {}),
    "dropout": (
        "dot_product_attention",
        (Q, K, K),
        {"dropout_rate": 0.5, "dropout_rng": _KEY, "bias": random((2, 4, 5, 3))},
    ),
    "precision": ("dot_product_attention", (Q, K, K), {"precision": "high"}),
    "half": ("dot_product_attention", (Q, K, K), {"dtype": jnp.bfloat16}),
    "weights": (
        "dot_product_attention_weights",
        (Q, K),
        {"mask": np.ones((2, 4, 5, 3)), "is_causal": True, "precision": "highest"},
    ),
    "weights of pairs": (
        "dot_product_attention_weights",
        (Q, K),
        {"precision": ("high", "highest"), "deterministic": True},
    ),
    "mask": (
        "make_attention_mask",
        (np.arange(3) > 0, np.arange(4) > 1),
        {"pairwise_fn": jnp.logical_or, "extra_batch_dims": 2, "dtype": jnp.int8},
    ),
    "causal mask": ("make_causal_mask", (np.zeros((2, 3)),), {"extra_batch_dims": 1}),
    "masks": (
        "combine_masks",
        (np.tri(3), None, np.ones((3, 1)), np.eye(3)[:1]),
        {"dtype": jnp.bfloat16},
    ),
    "flip": ("flip_sequences", (Q, None, 1, False), {}),
    "flip, lengths": ("flip_sequences", (Q, np.array([3, 5]), 1, False), {}),
    "flip, time first": (
        "flip_sequences",
        (Q, np.array([[1, 2, 1, 2]] * 5), 2, True),
        {},
    ),
}


def submodules(package: Any) -> Iterator[Any]:
    for info in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{info.name}")


def found(nnx: Any, name: str) -> Any:
    """What a library has under a name, if only in one of its modules; or None."""
    package = sortal.nn if nnx is sortal else flax.nnx.nn
    places = (nnx, *submodules(package))
    return next((vars(p)[name] for p in places if name in vars(p)), None)


@pytest.mark.parametrize("name", ATTENDING)
def test_functions_have_the_bits_that_flax_gives(name: str) -> None:
    """Functions of attention and of sequences agree; the former with gradients."""
    function, args, options = ATTENDING[name]

    def look(nnx: Any) -> Any:
        def total(first: Any) -> Any:
            y = found(nnx, function)(first, *map(as_jax, args[1:]), **options)
            return weighed(y), y

        if not function.startswith("dot"):
            return bits(total(as_jax(args[0]))[1])
        (_, y), dx = jax.value_and_grad(total, has_aux=True)(as_jax(args[0]))
        return bits(y), bits(dx)

    agree(function, "float32", look)


def as_jax(x: Any) -> Any:
    return jnp.asarray(x) if isinstance(x, np.ndarray) else x


def exported() -> dict[str, Any]:
    """Every layer, function of layers and initialiser that Flax NNX has, by name."""
    names = {
        name: thing
        for name, thing in vars(flax_nnx).items()
        if getattr(thing, "__module__", "").startswith(("jax", "flax.linen.pooling"))
    }
    for module in submodules(flax.nnx.nn):
        names |= {
            name: thing
            for name, thing in vars(module).items()
            if getattr(thing, "__module__", "") == module.__name__
        }
    initialisers = vars(flax_nnx.initializers).items()
    names |= {n: f for n, f in initialisers if callable(f) and n.islower()}
    return {
        name: thing
        for name, thing in sorted(names.items())
        if callable(thing) and not name.startswith("_")
    }


EXPORTED = exported()
# Where a default is another one on purpose: a signature and why.
OWN_DEFAULTS = {
    (cell, "recurrent_kernel_init"): "Flax's fails for parameters in half precision"
    for cell in ("OptimizedLSTMCell", "GRUCell", "SimpleCell")
}


def test_no_layer_of_flax_is_missing() -> None:
    assert [n for n in EXPORTED if found(sortal, n) is None] == []
    assert {"Linear", "MultiHeadAttention", "RNN", "relu", "avg_pool"} <= set(EXPORTED)


def test_every_layer_that_sortal_defines_is_exported_at_the_top() -> None:
    """What Flax has in ``nnx`` is in ``sortal`` and in ``sortal.nn``."""
    top = [n for n in EXPORTED if n in vars(flax_nnx)]
    assert [n for n in top if not (hasattr(sortal, n) and hasattr(sortal.nn, n))] == []


def shown(default: Any) -> Any:
    """A default as what can be compared across libraries."""
    if inspect.isfunction(default) or inspect.isclass(default):
        # An initialiser made by a factory shows only in what it returns.
        return default.__name__
    if type(default).__name__ == "PathContains":
        return f"PathContains({default.key!r})"
    return dict(default) if isinstance(default, Mapping) else default


def signature(name: str, function: Any) -> list[tuple[str, Any, Any]]:
    parameters = inspect.signature(function).parameters.values()
    return [
        (p.name, p.kind, (name, p.name) in OWN_DEFAULTS or shown(p.default))
        for p in parameters
    ]


def own(thing: Any) -> bool:
    """Whether a name is of Flax's making, not JAX's function under another name."""
    return thing.__module__.startswith("flax")


def name_of(thing: Any) -> str:
    return getattr(thing, "__name__", "")


OWN = [name for name, thing in EXPORTED.items() if own(thing)]


@pytest.mark.parametrize("name", OWN)
def test_arguments_are_those_of_flax(name: str) -> None:
    """Names, order, kinds and defaults of functions, constructors and methods agree."""
    ours, theirs = found(sortal, name), EXPORTED[name]
    if name == "MultiHeadAttention" and FLAX < (0, 12, 9):
        pytest.skip("later versions of Flax have an argument more")
    methods = [""]
    if inspect.isclass(theirs):
        # A default given in the class body is no method.
        taken = inspect.signature(theirs.__init__).parameters
        public = [n for n, f in vars(theirs).items() if inspect.isfunction(f)]
        public = [n for n in public if n not in taken]
        methods = [n for n in public if not n.startswith("_")]
        methods += [n for n in ("__init__", "__call__") if n in public]
    for method in methods:
        pair = [getattr(x, method) if method else x for x in (ours, theirs)]
        ours_has, theirs_has = (signature(name, x) for x in pair)
        # A missing Rngs is refused in a sentence of ours, and so has a default.
        given = {entry[0]: entry for entry in theirs_has}
        ours_has = [given.get("rngs") if x[0] == "rngs" else x for x in ours_has]
        assert ours_has == theirs_has
    AGREED[name]["arguments"] += 1


@pytest.mark.parametrize("name", sorted(set(EXPORTED) - set(OWN)))
def test_what_flax_takes_from_jax_is_the_very_same_here(name: str) -> None:
    assert found(sortal, name) is EXPORTED[name]


# Layers without an entry of their own in the tables above, and where they are compared.
ELSEWHERE = {
    "LoRAParam": "LoRA",
    "RNNBase": "tests/nnx/test_names.py",
    "RNNCellBase": "RNN",
    "dot_product_attention_with_rope": "RoPE",
    "modified_orthogonal": "LSTMCell",
    "canonicalize_dtype": "tests/nn/test_dtypes.py",
    "promote_dtype": "tests/nn/test_dtypes.py",
    "canonicalize_padding": "Conv",
    "zeros_init": "tests/nn/test_initializers.py",
    "ones_init": "tests/nn/test_initializers.py",
}


def compared() -> set[str]:
    """The layers that the tables of this file run."""
    names = {name.partition(":")[0] for name in CASES}
    names |= {name for name, *_ in (*POOLS.values(), *ATTENDING.values())}
    return names | {"Dropout"}


def test_every_layer_is_compared_with_flax() -> None:
    """No layer is only present: each has its numbers compared."""
    assert set(OWN) - compared() == set(OWN) & set(ELSEWHERE)


def test_the_table_is_printed() -> None:
    """How often each layer agreed with Flax in this run."""
    rows = tuple(
        (name, *(str(AGREED[name][column] or "") for column in COLUMNS))
        for name in OWN
        if name not in ELSEWHERE
    )
    same = len(EXPORTED) - len(OWN)
    notes = [f"{same} activations and initialisers are JAX's own in both libraries"]
    notes += [f"{name} is compared in {where}" for name, where in ELSEWHERE.items()]
    title = f"How often layers had the bits of Flax {flax.__version__} in this run"
    headings = ("layer", *COLUMNS.values())
    text = plain(Table(title, headings, rows, tuple(notes)))
    print(f"\n{text}")  # noqa: T201 - it is what this test is for
    assert {row[0] for row in rows} == set(OWN) - set(ELSEWHERE)
