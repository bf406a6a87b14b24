"""What Sortal relies on in JAX, version by version."""

from __future__ import annotations

import collections

import jax
import jax.numpy as jnp
import pytest

from sortal._engine import jax_compat


def test_each_trace_has_its_own_token_and_top_level_keeps_one():
    """Tokens are identical within a trace and differ between traces."""
    top = jax_compat.current_trace()
    seen = []

    def f(x):
        seen.append((jax_compat.current_trace(), jax_compat.current_trace()))
        return x

    for transform in (jax.jit, jax.grad, jax.vmap, jax.checkpoint):
        transform(f)(jnp.ones(3).sum() if transform is not jax.vmap else jnp.ones(3))
    jax.lax.scan(lambda c, x: (f(c), x), 0.0, jnp.ones(2))
    assert top is jax_compat.current_trace()
    assert all(a is b and a is not top for a, b in seen)
    assert len({id(a) for a, _ in seen}) == len(seen)


def test_one_level_takes_registered_types_apart_and_leaves_others():
    """Children come with bare keys, and the treedef puts them together again."""
    pairs, treedef = jax_compat.one_level(collections.OrderedDict(b=1, a=(2, 3)))
    assert pairs == [("b", 1), ("a", (2, 3))]
    assert jax.tree.unflatten(treedef, [1, (2, 3)]) == {"b": 1, "a": (2, 3)}
    assert jax_compat.one_level(3.0) is None
    assert jax_compat.one_level(object()) is None


@pytest.mark.parametrize(
    ("key", "plain"),
    [
        (jax.tree_util.DictKey("a"), "a"),
        (jax.tree_util.SequenceKey(2), 2),
        (jax.tree_util.GetAttrKey("mu"), "mu"),
        (jax.tree_util.FlattenedIndexKey(4), 4),
        ("strange", "strange"),
    ],
)
def test_plain_key_is_the_name_inside_a_key_path_entry(key, plain):
    """Every kind of JAX key-path entry gives its bare name or index."""
    assert jax_compat.plain_key(key) == plain


def test_mapped_sizes_are_those_of_the_vmaps_around():
    """Outermost first; a derivative between them hides none."""
    seen = []

    def f(x):
        seen.append(jax_compat.mapped_sizes())
        return x**2

    jax.vmap(jax.vmap(jax.grad(f)))(jnp.ones((3, 2)))
    assert jax_compat.mapped_sizes() == []
    assert seen == [[3, 2]]


def test_scan_layout_counts_constants_and_carries():
    """Inputs of the equation are constants, carries and what is scanned over."""
    constant = jnp.ones(2)

    def body(carry, x):
        return (carry[0] + constant, carry[1] * x), x

    def f(carry, xs):
        return jax.lax.scan(body, carry, xs)

    jaxpr = jax.make_jaxpr(f)((jnp.ones(2), 1.0), jnp.ones(3))
    (equation,) = (e for e in jaxpr.eqns if e.primitive.name == "scan")
    assert jax_compat.scan_layout(equation) == (1, 2)
