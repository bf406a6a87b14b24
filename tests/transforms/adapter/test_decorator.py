"""Transforms called with options alone wait for the function."""

from __future__ import annotations

import inspect
import pickle

import jax.numpy as jnp
import pytest

import sortal
from sortal.transforms._adapter.decorator import NO_FUNCTION, as_decorator

TRANSFORMS = (
    "custom_jvp custom_vjp grad jit jvp remat scan shard_map value_and_grad vjp vmap"
).split()


@as_decorator
def shown(f=NO_FUNCTION, /, *args, **options):
    return f, args, options


def test_options_given_first_are_those_of_the_call() -> None:
    assert shown(len, 1, a=2) == (len, (1,), {"a": 2})
    assert shown(a=2)(len, 1) == (len, (1,), {"a": 2})
    assert shown(a=2)(b=3)(len) == (len, (), {"a": 2, "b": 3})
    assert shown()(len) == (len, (), {})


def test_the_function_may_go_by_keyword() -> None:
    found = sortal.grad(argnums=0)(f=lambda x: x * x)
    assert float(found(jnp.array(3.0))) == 6
    assert float(sortal.grad(f=lambda x: x * x)(jnp.array(3.0))) == 6


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_keeps_its_name_signature_and_place(name: str) -> None:
    transform = getattr(sortal, name)
    assert transform.__name__ == name
    assert next(iter(inspect.signature(transform).parameters)) in ("f", "fun")
    assert pickle.loads(pickle.dumps(transform)) is transform
    assert callable(transform())
