"""The check of "A default spec and a mesh of eight"."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import sortal
from sortal.learn.answer import Answer, Wrong, kind_of

DEVICES = 8


def check(answer: Answer, rng: np.random.Generator) -> None:
    """Raises ``Wrong`` unless each device holds an eighth of the rows, and the bias."""
    if jax.device_count() < DEVICES:
        raise Wrong(
            f"This problem needs {DEVICES} devices, and JAX has {jax.device_count()}."
        )
    if answer.nnx.__name__.startswith("flax"):
        raise Wrong("Flax has no options of kinds. Write `import sortal as nnx` here.")
    rows, features = (DEVICES * int(n) for n in rng.integers(1, 4, 2))
    case = f"Table({rows}, {features}) on a mesh of {DEVICES}"
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    kind = answer.kind("Rows", {})
    model = answer.run(case, answer.get("Table"), rows, features)
    for name, wanted in (("table", kind), ("bias", sortal.Param)):
        held = getattr(model, name, None)
        if not isinstance(held, wanted):
            raise Wrong(
                f"`{name}` is not a {wanted.__name__}.",
                case=case,
                expected=wanted.__name__,
                found=kind_of(held),
            )
    answer.run(case, answer.get("place"), model, mesh)
    held = {name: _part(getattr(model, name)) for name in ("table", "bias")}
    right = {"table": (rows // DEVICES, features), "bias": (features,)}
    if len(model.table[...].sharding.device_set) < DEVICES:
        raise Wrong(
            "The table is on one device.", case=case, pitfall="nothing was placed"
        )
    if held != right:
        raise Wrong(
            "The part on each device has another shape.",
            case=case,
            expected=str(right),
            found=str(held),
            pitfall=_pitfall(held, right, rows),
        )
    other = kind(jnp.zeros((rows, features)))
    sortal.shard(other, mesh)
    if _part(other) != right["table"]:
        raise Wrong(
            "Another `Rows` lies on every device as a whole.",
            case=case,
            pitfall="the spec is not on the kind",
        )


def _part(held: Any) -> tuple[int, ...]:
    return held[...].addressable_shards[0].data.shape


def _pitfall(held: dict[str, Any], right: dict[str, Any], rows: int) -> str:
    if held["bias"] != right["bias"]:
        return "everything is divided"
    if held["table"][1] != right["table"][1]:
        return "the wrong dimension"
    return "no spec" if held["table"][0] == rows else ""
