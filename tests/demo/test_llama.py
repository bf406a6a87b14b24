"""The decoder of the Llama architecture."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.demo.llama import Config, Llama
from sortal.errors import CacheError

TINY = Config(
    vocabulary=20, features=8, hidden=12, layers=2, heads=2, key_value_heads=1
)


def test_a_tied_head_is_the_embedding_itself_one_variable_at_two_paths() -> None:
    model = Llama(TINY, rngs=nnx.Rngs(0))
    assert model.head.table is model.embed.embedding
    (leaf,) = [x for x in nnx.tabulate(model).leaves if x.path[0] in {"embed", "head"}]
    assert {leaf.path, *leaf.aliases} == {("embed", "embedding"), ("head", "table")}
    assert nnx.clone(model).head.table is not model.head.table
    other = Llama(Config(**{**vars(TINY), "tied": False}), rngs=nnx.Rngs(0))
    assert len(nnx.state(other)) == len(nnx.state(model)) + 1


def test_a_tied_table_has_the_gradient_of_both_its_uses() -> None:
    model = Llama(TINY, rngs=nnx.Rngs(0))
    untied = Llama(Config(**{**vars(TINY), "tied": False}), rngs=nnx.Rngs(0))
    nnx.update(untied, nnx.state(model))
    untied.head.table[...] = model.head.table[...]
    tokens = jnp.array([[1, 2, 3]])

    @nnx.jit
    def grads(model):
        return nnx.grad(lambda m: (m(tokens) ** 2).mean())(model)

    both, apart = grads(model), grads(untied)
    total = apart["embed"]["embedding"].value + apart["head"]["table"].value
    np.testing.assert_allclose(both["embed"]["embedding"].value, total, atol=1e-5)


def test_next_logits_are_those_after_each_sequences_last_token() -> None:
    model = Llama(TINY, rngs=nnx.Rngs(0))
    tokens = np.array([[3, 4, 5, 0], [6, 7, 8, 9]])
    whole, last = nnx.jit(lambda m, t, n: (m(t), m.next_logits(t, n)))(
        model, tokens, np.array([3, 4])
    )
    np.testing.assert_allclose(last[0], whole[0, 2], atol=1e-6)
    np.testing.assert_allclose(last[1], whole[1, 3], atol=1e-6)
    alone = nnx.jit(lambda m, t: m(t))(model, tokens[:1, :3])
    np.testing.assert_allclose(last[0], alone[0, 2], atol=1e-5)


def test_every_cache_has_room_before_any_is_written() -> None:
    model = Llama(TINY, rngs=nnx.Rngs(0))
    nnx.init_cache(model, 1, 8)
    nnx.init_cache(model.blocks[1], 1, 2)
    with pytest.raises(CacheError, match=r"blocks.1.attention.cache.position"):
        model(jnp.ones((1, 3), jnp.int32))
    assert model.blocks[0].attention.cache.position.value.tolist() == [0]


def test_the_configuration_is_that_of_smollm2_and_counts_its_parameters() -> None:
    model = nnx.eval_shape(lambda: Llama(Config(), rngs=nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(model))) == 134_515_008
