"""Which trace is current."""

from __future__ import annotations

import jax

from sortal.nnx import tracers


def test_a_trace_state_is_valid_in_its_own_trace_only() -> None:
    outer = tracers.TraceState()
    assert outer == tracers.TraceState()
    assert hash(outer) == hash(tracers.TraceState())
    assert outer.jax_trace is tracers.current_jax_trace()

    def inside(x: float) -> float:
        inner = tracers.TraceState()
        assert inner.is_valid()
        assert not outer.is_valid()
        assert inner != outer
        return x

    jax.jit(inside)(1.0)
    assert outer.is_valid()
