"""What helps against NaN and infinity, by the operation that made them."""

from __future__ import annotations

import jax.numpy as jnp

from sortal.inspect.equations import Operand

_LOW = frozenset(["float16", "bfloat16"])
_STEEP = "an exponent that large overflows: subtract the maximum first, as "
_STEEP += "jax.nn.softmax, logsumexp and log_softmax do, or clip."
_ROOT = "a root has no derivative at 0: add a small number under the root, or choose "
_ROOT += "the argument first, jnp.sqrt(jnp.where(x > 0, x, 1)), and the result after."
_ZERO = "division by zero: add a small number below the line, or put 1 there with "
_ZERO += "jnp.where before dividing and choose the result after."
_LEAVES = (
    "arrays that are handed to the step are not finite already: look at the data, "
)
_LEAVES += "or at the step that wrote them."
_MASKED = "infinity minus infinity: a row that is masked everywhere has no softmax; "
_MASKED += "let each row attend to something, or take jnp.finfo(dtype).min for -inf."
_SINGULAR = "the matrix has no inverse: add a small multiple of jnp.eye."
_GROWING = frozenset(
    "add add_any conv_general_dilated convert_element_type cumprod cumsum dot_general "
    "integer_pow mul pow reduce_prod reduce_sum reduce_window_sum scatter-add "
    "scatter_add square sub".split()
)
_DOMAINS = {
    "acos": "arguments beyond [-1, 1], often by rounding: clip them.",
    "asin": "arguments beyond [-1, 1], often by rounding: clip them.",
    "acosh": "arguments below 1: clip them.",
    "atanh": "arguments that are not between -1 and 1: clip them.",
    "lgamma": "a pole: arguments must be positive.",
    "digamma": "a pole: arguments must be positive.",
    "cholesky": "the matrix is not positive definite: add a small multiple of jnp.eye.",
    "custom_linear_solve": _SINGULAR,
    "triangular_solve": _SINGULAR,
    "erf_inv": "arguments that are not between -1 and 1: clip them.",
}


def remedy(
    operation: str, inputs: tuple[Operand, ...], output: Operand, back: bool
) -> str:
    """What to write instead, as far as operation and values tell; "" where they do not.

    Args:
      operation: the name of the primitive.
      inputs: what it was given.
      output: what it made.
      back: whether it belongs to the backward pass.

    Returns:
      One or two sentences.
    """
    if operation == "input":
        return _LEAVES
    if operation in ("constant", "closed over"):
        return "a constant that is not finite reaches a result: choose a finite one."
    if operation in _DOMAINS:
        return _DOMAINS[operation]
    known = _of_operation(operation, inputs, back)
    if known:
        return known
    return _overflow(inputs, output) if operation in _GROWING else ""


def _of_operation(operation: str, inputs: tuple[Operand, ...], back: bool) -> str:
    infinite = [x for x in inputs if x.infinities]
    if operation in ("exp", "exp2", "expm1", "cosh", "sinh"):
        return _STEEP
    if operation in ("log", "log1p"):
        least = 0.0 if operation == "log" else -1.0
        if any(x.low is not None and x.low < least for x in inputs):
            return "the logarithm of a negative number: clip the argument."
        return (
            "the logarithm of zero: add a small number, or compute in logarithms "
            "throughout, with log_softmax, logsumexp or log_sigmoid."
        )
    if operation in ("sqrt", "rsqrt", "cbrt"):
        if any(x.low is not None and x.low < 0 for x in inputs):
            return (
                "a root of a negative number, such as a variance that cancellation "
                "made negative: jnp.maximum(x, 0), or jnp.var."
            )
        return _ROOT if back else "a root of zero below the line: add a small number."
    if operation in ("div", "rem", "atan2", "integer_pow") and not infinite:
        if inputs and inputs[-1].zeros:
            # JAX's derivative of a root divides one half by the root.
            half = inputs[0].low == inputs[0].high == 0.5
            return _ROOT if back and operation == "div" and half else _ZERO
        return ""
    if operation == "pow":
        if any(x.low is not None and x.low < 0 for x in inputs[:1]):
            return "a fractional power of a negative number: use its absolute value."
        return _ZERO if inputs and inputs[0].zeros else ""
    if operation in ("sub", "add", "add_any", "reduce_sum", "cumsum") and infinite:
        return _MASKED
    if operation in ("mul", "dot_general") and infinite:
        return (
            "zero times infinity: in a gradient the branch of jnp.where that was not "
            "taken counts as well, so choose its argument with jnp.where first."
        )
    return ""


def _overflow(inputs: tuple[Operand, ...], output: Operand) -> str:
    most = float(jnp.finfo(output.dtype).max)
    sizes = [max(abs(x.low or 0), abs(x.high or 0)) for x in inputs]
    text = f"overflow: {output.dtype} ends at {most:.3g}."
    if any(x.leaf is not None and x.leaf.kind for x in inputs) and max(sizes) > 1e6:
        return f"{text} The parameters have grown: is the learning rate too large?"
    if output.dtype in _LOW:
        return f"{text} Compute this in float32."
    return f"{text} Are the inputs, or the learning rate, too large?"
