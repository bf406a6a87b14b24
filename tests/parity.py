"""Cases for comparing layers with Flax's: one function runs a case with either library.

What can be seen of a case is brought to bits: dtype, shape and bytes, so that nothing
is rounded away before it is compared.
"""

from __future__ import annotations

import inspect
import re
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np

import sortal

FLAX = tuple(map(int, re.findall(r"\d+", flax.__version__)[:3]))

PRECISIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "float32": ({}, jnp.float32),
    "bfloat16": ({"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}, jnp.bfloat16),
    "mixed": ({"dtype": jnp.bfloat16}, jnp.float32),
    "inferred": ({"param_dtype": jnp.bfloat16}, jnp.float32),
}


class Case(NamedTuple):
    """A layer, the shape of its input, the keywords of the call, and how to call it."""

    make: Callable[..., Any]
    shape: tuple[int, ...]
    call: Mapping[str, Any] = {}
    run: Callable[..., Any] = lambda model, x, **call: model(x, **call)
    # The first Flax that does what the newest does.
    since: tuple[int, ...] = ()


def random(shape: tuple[int, ...], *seed: Any) -> np.ndarray:
    """Numbers that follow from a name alone."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, seed)).encode()))
    return rng.normal(size=shape).astype(np.float32)


def drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """An initialiser that depends on its key, and has nothing to compile."""
    seed = jax.random.key_data(key).tolist()
    return jnp.asarray(random(shape, seed), dtype)


INITIALISERS = {
    "kernel_init",
    "recurrent_kernel_init",
    "bias_init",
    "scale_init",
    "embedding_init",
    "a_initializer",
    "b_initializer",
}


def layer(name: str, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Makes the layer called ``name`` of either library, its parameters ``drawn``."""

    def make(nnx: Any, rngs: Any, **precision: Any) -> Any:
        cls = getattr(nnx, name)
        taken = set(inspect.signature(cls.__init__).parameters)
        # PReLU draws nothing, and takes no streams.
        options = {"rngs": rngs} if "rngs" in taken else {}
        options |= dict.fromkeys(INITIALISERS & taken, drawn)
        return cls(*args, **{**options, **kwargs, **precision})

    return make


def around(name: str, inner: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """Makes a layer of either library that holds another; both get the precision."""

    def make(nnx: Any, rngs: Any, **precision: Any) -> Any:
        held = inner(nnx, rngs, **precision)
        return getattr(nnx, name)(held, rngs=rngs, **kwargs, **precision)

    return make


def half(shape: tuple[int, ...]) -> np.ndarray:
    """A mask that keeps some of everything along the first axis."""
    return np.indices(shape).sum(0) % 3 != 0


LINEAR: dict[str, Case] = {
    "Linear: plain": Case(layer("Linear", 5, 7), (3, 5)),
    "Linear: no axes but features": Case(layer("Linear", 5, 7), (5,)),
    "Linear: no bias": Case(layer("Linear", 5, 7, use_bias=False), (2, 3, 5)),
    "Linear: accumulated": Case(
        layer("Linear", 5, 7, preferred_element_type=jnp.float32), (3, 5)
    ),
    "LinearGeneral: plain": Case(
        layer("LinearGeneral", (2, 3), (4, 5), axis=(1, -1)), (6, 2, 7, 3)
    ),
    "LinearGeneral: axes out of order": Case(
        layer("LinearGeneral", (2, 3), 4, axis=(-1, 1)), (6, 2, 3)
    ),
    "LinearGeneral: per batch index": Case(
        layer("LinearGeneral", 3, (4, 2), batch_axis={0: 6}), (6, 5, 3)
    ),
    "LinearGeneral: as class": Case(
        layer(
            "LinearGeneral",
            3,
            4,
            dot_general_cls=lambda: jax.lax.dot_general,
        ),
        (6, 3),
    ),
    "Einsum: plain": Case(
        layer(
            "Einsum",
            "nta,hab->nthb",
            (3, 2, 4),
            (3, 4),
        ),
        (5, 6, 2),
    ),
    "Einsum: ellipsis": Case(
        layer("Einsum", "...a,ab -> ...b", (3, 4), (4,)), (2, 5, 3)
    ),
    "Einsum: other equation": Case(
        layer("Einsum", "ab,bc->ac", (3, 4), (4,)), (2, 3), {"einsum_str": "ab,bc->ca"}
    ),
    "Embed: attend": Case(layer("Embed", 6, 4), (2, 4), run=lambda m, x: m.attend(x)),
}

CONV: dict[str, Case] = {
    "Conv: same": Case(layer("Conv", 3, 4, (3, 3)), (2, 6, 5, 3)),
    "Conv: one axis": Case(layer("Conv", 3, 4, 3, padding="VALID"), (2, 7, 3)),
    "Conv: strides": Case(layer("Conv", 3, 4, (3, 2), 2, padding="SAME"), (2, 6, 5, 3)),
    "Conv: circular": Case(
        layer("Conv", 3, 4, (3, 4), padding="CIRCULAR", kernel_dilation=(1, 2)),
        (2, 8, 9, 3),
    ),
    "Conv: reflect": Case(layer("Conv", 3, 4, (4,), padding="REFLECT"), (2, 7, 3)),
    "Conv: causal": Case(
        layer("Conv", 3, 4, (3,), padding="CAUSAL", kernel_dilation=2), (2, 7, 3)
    ),
    "Conv: pairs": Case(layer("Conv", 3, 4, (3, 3), padding=(1, (0, 2))), (2, 6, 5, 3)),
    "Conv: input dilation": Case(
        layer("Conv", 3, 4, (3,), input_dilation=2, padding=1), (2, 7, 3)
    ),
    "Conv: groups": Case(
        layer("Conv", 4, 6, (3,), feature_group_count=2, use_bias=False), (2, 7, 4)
    ),
    "Conv: mask": Case(layer("Conv", 3, 4, (3,), mask=half((3, 3, 4))), (2, 7, 3)),
    "Conv: no batch": Case(layer("Conv", 3, 4, (3,), strides=None), (7, 3)),
    "Conv: batches": Case(layer("Conv", 3, 4, (3,)), (2, 2, 7, 3)),
    "ConvTranspose: plain": Case(layer("ConvTranspose", 3, 4, (3, 3)), (2, 4, 5, 3)),
    "ConvTranspose: strides": Case(
        layer("ConvTranspose", 3, 4, (3,), 2, padding="VALID", kernel_dilation=2),
        (2, 5, 3),
    ),
    "ConvTranspose: pairs": Case(
        layer("ConvTranspose", 3, 4, (3,), (2,), padding=[(1, 2)]), (2, 5, 3)
    ),
    "ConvTranspose: circular": Case(
        layer("ConvTranspose", 3, 4, (4, 3), (2, 2), padding="CIRCULAR"), (2, 4, 5, 3)
    ),
    "ConvTranspose: circular kernel": Case(
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
    "ConvTranspose: no batch": Case(
        layer("ConvTranspose", 3, 4, 3, use_bias=False), (5, 3)
    ),
}

_MASK = {"mask": half((4, 3, 6))}

NORM: dict[str, Case] = {
    "BatchNorm: plain": Case(layer("BatchNorm", 6), (4, 3, 6)),
    "BatchNorm: evaluation": Case(
        layer("BatchNorm", 6), (4, 3, 6), {"use_running_average": True}
    ),
    "BatchNorm: options": Case(
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
    "BatchNorm: mask": Case(layer("BatchNorm", 6, use_scale=False), (4, 3, 6), _MASK),
    "BatchNorm: slow and mask": Case(
        layer("BatchNorm", 6, use_fast_variance=False), (4, 3, 6), _MASK
    ),
    "LayerNorm: plain": Case(layer("LayerNorm", 6), (4, 3, 6)),
    "LayerNorm: bare": Case(
        layer("LayerNorm", 6, use_bias=False, use_scale=False), (4, 3, 6)
    ),
    "LayerNorm: axes": Case(
        layer("LayerNorm", 18, reduction_axes=(-1, 1), feature_axes=(1, 2)),
        (4, 3, 6),
    ),
    "LayerNorm: slow": Case(
        layer("LayerNorm", 6, use_fast_variance=False, epsilon=1e-3), (4, 3, 6), _MASK
    ),
    "RMSNorm: plain": Case(layer("RMSNorm", 6), (4, 3, 6)),
    "RMSNorm: mask": Case(layer("RMSNorm", 6, use_scale=False), (4, 3, 6), _MASK),
    "RMSNorm: axes": Case(
        layer("RMSNorm", 3, reduction_axes=(1, 2), feature_axes=1), (4, 3, 6)
    ),
    "GroupNorm: plain": Case(layer("GroupNorm", 6, 3), (4, 3, 6)),
    "GroupNorm: by size": Case(
        layer("GroupNorm", 6, num_groups=None, group_size=3), (4, 3, 6)
    ),
    "GroupNorm: slow": Case(
        layer("GroupNorm", 6, 2, use_fast_variance=False), (4, 3, 6)
    ),
    "GroupNorm: mask": Case(layer("GroupNorm", 6, 2), (4, 3, 6), _MASK),
    "InstanceNorm: plain": Case(layer("InstanceNorm", 6), (4, 3, 6)),
    "InstanceNorm: axes": Case(
        layer("InstanceNorm", 3, feature_axes=1, use_fast_variance=False), (4, 3, 6)
    ),
    "InstanceNorm: mask": Case(
        layer("InstanceNorm", 6, use_bias=False), (4, 3, 6), _MASK
    ),
    "WeightNorm: no scale": Case(
        around("WeightNorm", layer("Linear", 5, 7), use_scale=False), (3, 5)
    ),
    "WeightNorm: plain": Case(
        around("WeightNorm", layer("Linear", 5, 7)), (3, 5), since=(0, 12, 12)
    ),
    "WeightNorm: axes": Case(
        around("WeightNorm", layer("Conv", 3, 4, 3), feature_axes=(0, -1)),
        (2, 7, 3),
        since=(0, 12, 12),
    ),
    "WeightNorm: whole": Case(
        around("WeightNorm", layer("Linear", 5, 7), feature_axes=None),
        (3, 5),
        since=(0, 12, 12),
    ),
    "SpectralNorm: plain": Case(around("SpectralNorm", layer("Linear", 5, 7)), (3, 5)),
    "SpectralNorm: steps": Case(
        around("SpectralNorm", layer("Conv", 3, 4, 3), n_steps=3), (2, 7, 3)
    ),
    "SpectralNorm: evaluation": Case(
        around("SpectralNorm", layer("Linear", 5, 7), update_stats=False), (3, 5)
    ),
    "SpectralNorm: no steps": Case(
        around("SpectralNorm", layer("Linear", 5, 7), n_steps=0), (3, 5)
    ),
}

OTHERS: dict[str, Case] = {
    "PReLU: plain": Case(layer("PReLU"), (3, 5)),
    "PReLU: slope": Case(layer("PReLU", 0.3), (3, 5)),
    "LoRA: plain": Case(layer("LoRA", 5, 2, 7), (3, 5)),
    "LoRA: base": Case(
        lambda nnx, rngs, **precision: nnx.LoRA(
            5,
            2,
            7,
            base_module=layer("Linear", 5, 7)(nnx, rngs),
            b_initializer=drawn,
            rngs=rngs,
            **precision,
        ),
        (3, 5),
    ),
    "LoRALinear: plain": Case(layer("LoRALinear", 5, 7, lora_rank=2), (3, 5)),
    "LoRALinear: dtypes": Case(
        layer(
            "LoRALinear",
            5,
            7,
            lora_rank=2,
            lora_dtype=jnp.bfloat16,
            lora_param_dtype=jnp.bfloat16,
            kernel_init=drawn,
        ),
        (3, 5),
    ),
}


def step(cell: Any, x: Any) -> Any:
    """One step of a cell whose carry is made of the input."""
    h = jnp.sin(x[..., :1] * jnp.arange(1.0, 5.0, dtype=x.dtype))
    carry, y = cell((h, jnp.cos(h)) if "LSTM" in type(cell).__name__ else h, x)
    return carry, y


def rnn(cell: str, **kwargs: Any) -> Callable[..., Any]:
    """Makes an RNN of either library, around a cell from 3 to 4 features."""

    def make(nnx: Any, rngs: Any, **precision: Any) -> Any:
        held = layer(cell, 3, 4)(nnx, rngs, **precision)
        return nnx.RNN(held, rngs=rngs, **kwargs)

    return make


def both_ways(nnx: Any, rngs: Any, **precision: Any) -> Any:
    """Makes a Bidirectional of either library."""
    rnns = [rnn("GRUCell")(nnx, rngs, **precision) for _ in range(2)]
    return nnx.Bidirectional(*rnns, return_carry=True, rngs=rngs)


class Noisy:
    """A cell with dropout, of either library."""

    def __init__(self, broadcast: Any):
        self.broadcast = broadcast

    def __call__(self, nnx: Any, rngs: Any, **precision: Any) -> Any:
        class Cell(nnx.RNNCellBase):
            def __init__(self):
                self.inner = layer("SimpleCell", 3, 4)(nnx, rngs, **precision)
                self.dropout = nnx.Dropout(0.5, rngs=rngs)

            def __call__(self, carry, x):
                return self.inner(carry, self.dropout(x))

            def initialize_carry(self, shape, rngs=None, carry_init=None):
                return self.inner.initialize_carry(shape, rngs, drawn_carry)

            @property
            def num_feature_axes(self):
                return 1

        return nnx.RNN(Cell(), broadcast_rngs=self.broadcast, rngs=rngs)


def drawn_carry(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """A carry that depends on its key."""
    return jax.random.uniform(key, shape, dtype)


_LENGTHS = {"seq_lengths": np.array([3, 5]), "return_carry": True}

RECURRENT: dict[str, Case] = {
    "LSTMCell: step": Case(layer("LSTMCell", 3, 4), (2, 3), run=step),
    "OptimizedLSTMCell: step": Case(layer("OptimizedLSTMCell", 3, 4), (2, 3), run=step),
    "GRUCell: step": Case(layer("GRUCell", 3, 4), (2, 3), run=step),
    "SimpleCell: step": Case(layer("SimpleCell", 3, 4), (2, 3), run=step),
    "SimpleCell: residual": Case(
        layer("SimpleCell", 3, 4, residual=True, activation_fn=jnp.sin),
        (2, 3),
        run=step,
    ),
    "RNN: plain": Case(rnn("SimpleCell"), (2, 5, 3)),
    "RNN: lengths": Case(rnn("OptimizedLSTMCell"), (2, 5, 3), _LENGTHS),
    "RNN: reversed": Case(
        rnn("GRUCell", reverse=True, keep_order=True), (2, 5, 3), _LENGTHS
    ),
    "RNN: time first": Case(
        rnn("SimpleCell", time_major=True, reverse=True, unroll=2), (5, 2, 3)
    ),
    "RNN: noise of each step": Case(Noisy(None), (2, 5, 3)),
    "RNN: noise of all steps": Case(Noisy("dropout"), (2, 5, 3)),
    "Bidirectional: lengths": Case(
        both_ways, (2, 5, 3), {"seq_lengths": np.array([3, 5])}
    ),
}


def attention(**kwargs: Any) -> Callable[..., Any]:
    """Makes an attention of either library, from 6 features."""
    options = {"num_heads": 2, "in_features": 6, "decode": False, **kwargs}
    return layer("MultiHeadAttention", **options)


def turned(rope: Any, x: Any) -> Any:
    """Attention with rotary positions, by the function beside the class."""
    module = sys.modules[type(rope).__module__]
    # Of one input in three places, the order in which gradients are added would count.
    keys = jnp.asarray(random(x.shape, "keys"), x.dtype)
    return module.dot_product_attention_with_rope(x, keys, keys, rope=rope)


def rope(**kwargs: Any) -> Callable[..., Any]:
    """Makes the positions alone, which have no dtype to choose."""
    return lambda nnx, rngs, **_: nnx.RoPE(**kwargs)


def decoded(model: Any, x: Any) -> Any:
    """All places of a sequence, one at a call, through a cache."""
    model.init_cache(x.shape, x.dtype if model.dtype is None else model.dtype)
    return [model(x[:, i : i + 1], decode=True) for i in range(x.shape[1])]


ATTENTION: dict[str, Case] = {
    "MultiHeadAttention: three inputs": Case(
        attention(
            out_features=3, in_kv_features=4, use_bias=False, precision="highest"
        ),
        (2, 5, 6),
        {"mask": np.tri(5, 3)[None, None]},
        run=lambda m, x, **call: m(x, x[:, :3, :4], jnp.sin(x[:, :3, 1:5]), **call),
    ),
    "MultiHeadAttention: causal": Case(
        attention(normalize_qk=True), (2, 5, 6), {"is_causal": True}
    ),
    "MultiHeadAttention: dropout": Case(
        attention(dropout_rate=0.5, broadcast_dropout=False),
        (2, 5, 6),
        {"deterministic": False, "mask": np.tri(5)[None, None]},
    ),
    "MultiHeadAttention: weights kept": Case(
        attention(num_heads=4, qkv_features=8, num_kv_heads=2),
        (2, 5, 6),
        {"sow_weights": True, "is_causal": True},
    ),
    "MultiHeadAttention: decoding": Case(
        attention(num_heads=4, qkv_features=8, num_kv_heads=2), (2, 2, 6), run=decoded
    ),
    "RoPE: attention": Case(rope(), (2, 5, 4, 6), run=turned, since=(0, 12, 9)),
    "RoPE: plain": Case(rope(), (2, 3, 5, 4), since=(0, 12, 9)),
    "RoPE: positions": Case(
        rope(theta=100.0),
        (2, 5, 4),
        {"input_positions": jnp.array([3.0, 1.0, 4.0, 1.0, 5.0])},
        since=(0, 12, 9),
    ),
}

CASES: dict[str, Case] = {**LINEAR, **CONV, **NORM, **OTHERS, **RECURRENT, **ATTENTION}


def bits(value: Any) -> tuple[str, tuple[int, ...], bytes]:
    """A value as what no rounding can hide: dtype, shape and bytes."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    return str(array.dtype), array.shape, array.tobytes()


def leaves(nnx: Any, state: Any) -> dict[Any, Any]:
    """Path -> bits, for every leaf of a state."""
    found: dict[Any, Any] = {}
    mine = isinstance(state, sortal.State)
    for path, leaf in state.flat_state() if mine else nnx.to_flat_state(state):
        value = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
        found[path] = [bits(x) for x in jax.tree.leaves(value)]
    return found


def weighed(y: Any) -> Any:
    """A number that depends on every element of every array of ``y``."""
    terms = [
        jnp.sum(part.astype(jnp.float32) * random(part.shape, "weights", i))
        for i, part in enumerate(jax.tree.leaves(y))
    ]
    return sum(terms)


def observe(nnx: Any, case: Case, precision: str) -> dict[str, Any]:
    """Builds and differentiates a case; everything that can be seen of it, as bits."""
    options, dtype = PRECISIONS[precision]
    model = case.make(nnx, nnx.Rngs(3, params=7), **options)
    seen: dict[str, Any] = {"initial": leaves(nnx, nnx.state(model))}
    x = jnp.asarray(random(case.shape), dtype)

    def loss(model: Any, x: Any) -> Any:
        y = case.run(model, x, **case.call)
        return weighed(y), y

    # A layer without parameters has no gradient of its own.
    has_parameters = bool(leaves(nnx, nnx.state(model, nnx.Param)))
    of = (nnx.DiffState(0, nnx.Param),) if has_parameters else ()
    graded = nnx.value_and_grad(loss, argnums=(*of, 1), has_aux=True)
    (value, y), (*grads, dx) = graded(model, x)
    seen |= {"loss": bits(value), "input gradient": bits(dx)}
    seen["output"] = [bits(part) for part in jax.tree.leaves(y)]
    seen["gradients"] = [leaves(nnx, g) for g in grads]
    seen["final"] = leaves(nnx, nnx.state(model))
    return seen
