"""Optimizer state of every transformation of optax lies with its parameters."""

from __future__ import annotations

import jax
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from optax import contrib

import sortal

MESH = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,))
ROWS = {sortal.At("**.kernel"): sortal.Rule(spec=P("d"))}
SHAPE = (16, 24)


def masked():
    return optax.masked(
        optax.adam(1e-3), lambda p: jax.tree.map(lambda x: x.ndim > 1, p)
    )


TRANSFORMATIONS = {
    "adabelief": lambda: optax.adabelief(1e-3),
    "adadelta": lambda: optax.adadelta(1e-3),
    "adafactor": lambda: optax.adafactor(1e-3, min_dim_size_to_factor=8),
    "adagrad": lambda: optax.adagrad(1e-3),
    "adam": lambda: optax.adam(1e-3),
    "adamax": lambda: optax.adamax(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "adan": lambda: optax.adan(1e-3),
    "amsgrad": lambda: optax.amsgrad(1e-3),
    "ema": lambda: optax.ema(0.9),
    "fromage": lambda: optax.fromage(1e-3),
    "lamb": lambda: optax.lamb(1e-3),
    "lars": lambda: optax.lars(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "nadam": lambda: optax.nadam(1e-3),
    "noisy_sgd": lambda: optax.noisy_sgd(1e-3, key=jax.random.key(0)),
    "novograd": lambda: optax.novograd(1e-3),
    "optimistic_adam": lambda: optax.optimistic_adam_v2(1e-3),
    "radam": lambda: optax.radam(1e-3),
    "rmsprop": lambda: optax.rmsprop(1e-3, momentum=0.9, centered=True),
    "rprop": lambda: optax.rprop(1e-3),
    "sgd": lambda: optax.sgd(1e-3, momentum=0.9),
    "sm3": lambda: optax.sm3(1e-3),
    "yogi": lambda: optax.yogi(1e-3),
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
    "masked": masked,
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-3),
    "multi_steps": lambda: optax.MultiSteps(
        optax.adam(1e-3), 2
    ).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(optax.adam(1e-3), 3),
    "lookahead": lambda: optax.trace(0.9, nesterov=True),
    "schedule_free": lambda: contrib.schedule_free_adamw(1e-3),
    "muon": lambda: contrib.muon(1e-3),
    "prodigy": lambda: contrib.prodigy(),
    "dadapt_adamw": lambda: contrib.dadapt_adamw(),
    "ademamix": lambda: contrib.ademamix(1e-3),
    "sophia": lambda: contrib.sophia(1e-3),
    "cocob": lambda: contrib.cocob(),
    "dog": lambda: contrib.dog(1e-3),
    "mechanize": lambda: contrib.mechanize(optax.adam(1e-3)),
    "reduce_on_plateau": lambda: optax.chain(
        optax.adam(1e-3), contrib.reduce_on_plateau()
    ),
    "groups": lambda: {
        sortal.At("kernel"): optax.adam(1e-3),
        sortal.At("bias"): optax.sgd(1e-3, momentum=0.9),
    },
}


def model():
    return sortal.Linear(*SHAPE, rngs=sortal.Rngs(0))


def short(spec):
    entries = list(spec)
    while entries and entries[-1] is None:
        entries.pop()
    return tuple(entries)


def expected(path, value):
    """By hand: rows of the kernel are divided, wherever they are still there.

    State that is no array, as the lists of SM3, is on every device.
    """
    divided = "kernel" in path and getattr(value, "shape", ())[:1] == SHAPE[:1]
    return ("d",) if divided else ()


def check(optimizer):
    found = 0
    for path, x in sortal.state(optimizer, sortal.OptVariable).flat_state():
        for array in jax.tree.leaves(x.value):
            spec = short(getattr(array.sharding, "spec", ()))
            assert spec == expected(path, x.value), (path, array.shape, spec)
            found += spec == ("d",)
    return found


def step(m, optimizer):
    grads = sortal.state(m, sortal.Param)
    optimizer.update(m, grads)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_moments_lie_with_their_parameters(name):
    tx = TRANSFORMATIONS[name]()
    wrt = {} if isinstance(tx, dict) else {"wrt": sortal.Param}

    def make(m):
        return sortal.Optimizer(m, tx, **wrt)

    m = sortal.shard(model(), MESH, ROWS)
    plain = make(model())
    divided = sum(
        expected(path, v.value) == ("d",)
        for path, v in sortal.state(plain, sortal.OptVariable).flat_state()
    )
    for optimizer in (make(m), sortal.jit(make)(m)):
        assert check(optimizer) == divided
    m, optimizer = together(make)
    assert check(optimizer) == divided
    if name not in ("reduce_on_plateau", "sophia"):  # these need more than gradients
        for _ in range(2):
            sortal.jit(step)(m, optimizer)
            jax.block_until_ready(sortal.state((m, optimizer)).values_list())
            assert check(optimizer) == divided
            assert short(m.kernel.value.sharding.spec) == ("d",)


def together(make):
    """Made on one device and put on the mesh with its model."""
    m = model()
    return sortal.shard((m, make(m)), MESH, ROWS)


def test_the_square_moments_of_a_square_parameter_are_replicated_where_unclear():
    m = sortal.Linear(16, 16, rngs=sortal.Rngs(0))
    optimizer = sortal.Optimizer(
        m, optax.adafactor(1e-3, min_dim_size_to_factor=8), wrt=sortal.Param
    )
    report = sortal.sharding_report((m, optimizer), MESH, ROWS)
    factored = [r for r in report.rows if "v_row" in r.path and r.shape == (16,)]
    assert factored
    mine = [(r.spec, r.by) for r in factored if "kernel" in r.path]
    assert mine == [(P(), "parameter")]
