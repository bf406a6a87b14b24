"""Kinds are classes: a small lesson in what a filter takes.

A Variable's *kind* is its class, and a filter written as a class takes that class and
its subclasses, as ``isinstance`` does. Nothing else is involved: no registry of names,
no strings. Four things follow.

1. A kind of one's own is one line, ``class BatchStat(nnx.Variable): pass``. It works
   at once wherever a kind does: ``state``, ``split``, ``grad``, an optimizer's ``wrt``.
2. ``nnx.Variable`` itself is the base of every kind, so as a filter it takes every
   Variable of any kind. The other way round, a plain ``Variable`` (``step`` below) is
   of no narrower kind: only ``nnx.Variable``, or no filter at all, takes it.
3. The library has an ``nnx.BatchStat`` too. It has the same name as ours and is
   another class, hence another kind: a filter by one does not take the other, and
   there is no error either; the State is simply empty. ``sortal.explain(model,
   nnx.Param, nnx.BatchStat)`` says so, naming both classes and the leaf left over.
4. A kind derived from the wrong base is trained: with ``class BatchStat(nnx.Param)``
   the second count below is 3, and ``nnx.grad`` and ``nnx.Optimizer`` would treat the
   running mean as a weight. ``sortal.explain(model)`` warns of that as well.

The program is plain NNX: with ``from flax import nnx`` for the import below it prints
the same three numbers.
"""

import jax
import jax.numpy as jnp

import sortal as nnx


class BatchStat(nnx.Variable):
    """Statistics of the data: ours, and not ``nnx.BatchStat``."""


class Affine(nnx.Module):
    """A dense layer that also carries a running mean and a step count."""

    def __init__(self, in_features, hidden, *, rngs):
        weights = jax.random.normal(rngs.params(), (in_features, hidden))
        self.kernel = nnx.Param(weights / jnp.sqrt(in_features))
        self.bias = nnx.Param(jnp.zeros((hidden,)))
        self.running_mean = BatchStat(jnp.zeros((hidden,)))
        self.step = nnx.Variable(jnp.array(0))

    def __call__(self, x):
        return x @ self.kernel + self.bias


def state_filter_count(seed, x, hidden):
    """Builds a model and counts its leaves: all, its Params, its BatchStats.

    Args:
      seed: the random seed, as a float.
      x: one input, an array with one axis.
      hidden: the number of outputs, as a float.

    Returns:
      An array of three floats, counted from the three States.
    """
    model = Affine(x.shape[0], int(hidden), rngs=nnx.Rngs(int(seed)))
    assert model(x).shape == (int(hidden),)
    states = (
        nnx.state(model),
        nnx.state(model, nnx.Param),
        nnx.state(model, BatchStat),
    )
    counts = [len(jax.tree_util.tree_leaves(state)) for state in states]
    return jnp.array(counts, dtype=float)


if __name__ == "__main__":
    names = ("everything", "nnx.Param", "BatchStat")
    found = state_filter_count(0.0, jnp.ones(3), 5.0)
    for name, count in zip(names, found, strict=True):
        print(f"{int(count)} leaves: {name}")
