"""The mistakes of a first day, and the sentence that each must be answered with."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import sortal
from sortal import Param, decoding, errors, nnx
from sortal.demo.llama import Config, Llama
from sortal.inspect.cli import main

X = jnp.ones((4, 2))
SIZES = Config(
    vocabulary=16, features=8, hidden=8, layers=1, heads=2, key_value_heads=2
)


class Model(sortal.Module):
    def __init__(self):
        self.layer = sortal.Linear(2, 1, rngs=sortal.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.layer(x)


def loss(model: Any) -> Any:
    return model(X).sum()


def trained() -> tuple[Any, Any, Any]:
    model = Model()
    optimizer = sortal.Optimizer(model, optax.sgd(0.1), wrt=Param)
    return model, optimizer, sortal.grad(loss)(model)


def decoder(cache: bool = True) -> Any:
    model = Llama(SIZES, rngs=sortal.Rngs(0))
    if cache:
        sortal.init_cache(model, batch=1, length=8)
    return model


def generate(**options: Any) -> Any:
    return decoding.generate(decoder(), [[1]], **{"max_new_tokens": 2, **options})


# ------------------------------------------------------------------------ gradients
def a_loss_that_is_a_variable() -> None:
    sortal.grad(lambda m: m.layer.bias)(Model())


def a_loss_without_return() -> None:
    sortal.grad(lambda m: None)(Model())


def a_loss_for_each_row() -> None:
    sortal.value_and_grad(lambda m: m(X))(Model())


def a_loss_with_more_beside_it() -> None:
    sortal.value_and_grad(lambda m: (loss(m), m(X)))(Model())


def has_aux_and_nothing_beside_the_loss() -> None:
    sortal.value_and_grad(loss, has_aux=True)(Model())


def a_loss_that_counts() -> None:
    sortal.grad(lambda m: (m(X) > 0).sum())(Model())


def data_before_the_model() -> None:
    sortal.grad(lambda x, m: m(x * 1.0).sum())(jnp.ones((4, 2), int), Model())


def the_model_by_keyword() -> None:
    sortal.grad(lambda model: loss(model))(model=Model())


def a_loss_that_was_called_already() -> None:
    sortal.grad(loss(Model()))(Model())


def a_kind_that_the_model_lacks() -> None:
    sortal.grad(loss, wrt=sortal.BatchStat)(Model())


# -------------------------------------------------------------------------- compiled
def text_for_a_compiled_function() -> None:
    sortal.jit(lambda m, mode: m(X))(Model(), "train")


def text_among_the_data() -> None:
    sortal.jit(lambda m, batch: m(X))(Model(), {"x": X, "name": "first"})


def a_class_for_a_compiled_function() -> None:
    sortal.jit(lambda m: m(X))(Model)


def a_static_array() -> None:
    sortal.jit(lambda m, x: m(x), static_argnums=1)(Model(), X)


def a_result_to_compile() -> None:
    sortal.jit(Model()(X))


def a_write_to_a_model_that_was_not_passed() -> None:
    model = Model()

    @sortal.jit
    def step(x: Any) -> None:
        model.layer.bias[...] += x.sum()

    step(X)


def a_scan_that_returns_its_carry_alone() -> None:
    carry = sortal.Carry
    step = sortal.scan(lambda c, x: c + x, in_axes=(carry, 0), out_axes=(carry, 0))
    step(jnp.zeros(2), X)


def text_for_a_function_that_is_recomputed() -> None:
    sortal.remat(lambda m, mode: m(X).sum())(Model(), "train")


def a_model_and_data_mapped_alike() -> None:
    sortal.vmap(lambda m, x: m(x))(Model(), X)


# ---------------------------------------------------------------------------- layers
def a_layer_without_rngs() -> None:
    sortal.Linear(3, 2)


def a_seed_for_rngs() -> None:
    sortal.Linear(3, 2, rngs=0)  # type: ignore[arg-type]


def an_input_of_other_features() -> None:
    Model()(jnp.ones((4, 3)))


def dropout_without_rngs() -> None:
    sortal.Dropout(0.5)(X)


def a_list_of_layers() -> None:
    sortal.Sequential([Model()])(X)  # type: ignore[arg-type]


def the_class_of_a_layer() -> None:
    sortal.Sequential(sortal.Linear)(X)


def adding_to_a_variable() -> None:
    Model().layer.bias += 1  # type: ignore[operator]


def another_shape_for_a_variable() -> None:
    Model().layer.kernel[...] = jnp.ones(3)


def a_model_hidden_in_a_plain_object() -> None:
    class Plain:
        def __init__(self):
            self.weight = Param(jnp.ones(2))

    model: Any = Model()
    model.plain = Plain()
    sortal.split(model)


# ------------------------------------------------------------------------- optimizer
def update_with_gradients_alone() -> None:
    _, optimizer, grads = trained()
    optimizer.update(grads)


def update_with_the_model_alone() -> None:
    model, optimizer, _ = trained()
    optimizer.update(model)


def update_with_loss_and_gradients() -> None:
    model, optimizer, _ = trained()
    optimizer.update(model, sortal.value_and_grad(loss)(model))


def a_learning_rate_for_a_transformation() -> None:
    sortal.Optimizer(Model(), 0.1, wrt=Param)


def a_transformation_that_was_not_called() -> None:
    sortal.Optimizer(Model(), optax.adam, wrt=Param)


def the_transformation_before_the_model() -> None:
    sortal.Optimizer(optax.adam(1e-3), Model(), wrt=Param)


# ----------------------------------------------------------------------------- verbs
def one_filter_twice() -> None:
    sortal.split(Model(), Param, Param, ...)


def the_wide_filter_first() -> None:
    sortal.split(Model(), ..., Param)


def a_layer_for_a_filter() -> None:
    sortal.state(Model(), sortal.Linear)


def a_misspelt_name_to_train() -> None:
    sortal.Optimizer(Model(), optax.sgd(0.1), wrt="parms")


def leaves_left_over() -> None:
    sortal.split(sortal.BatchNorm(2, rngs=sortal.Rngs(0)), Param)


def a_class_for_a_model() -> None:
    sortal.state(Model, Param)


def merge_of_a_tuple() -> None:
    sortal.merge(sortal.split(Model()))  # type: ignore[arg-type]


def merge_of_a_part() -> None:
    graphdef, params, _ = sortal.split(
        sortal.BatchNorm(2, rngs=sortal.Rngs(0)), Param, ...
    )
    sortal.merge(graphdef, params)


def update_by_a_misspelt_path() -> None:
    sortal.update(Model(), {"layer": {"kernl": jnp.ones((2, 1))}})


def update_by_an_array() -> None:
    sortal.update(Model(), X)


def save_of_the_model_first() -> None:
    sortal.save(Model(), "somewhere", step=1)  # type: ignore[arg-type]


# -------------------------------------------------------------------------- decoding
def generate_inside_a_compiled_function() -> None:
    sortal.jit(lambda m: decoding.generate(m, [[1]], max_new_tokens=2))(decoder())


def generate_without_a_cache() -> None:
    decoding.generate(decoder(cache=False), [[1]], max_new_tokens=2)


def generate_from_text() -> None:
    decoding.generate(decoder(), "Once", max_new_tokens=2)


def generate_from_one_flat_list() -> None:
    decoding.generate(decoder(), [1, 2], max_new_tokens=2)


def generate_more_than_the_cache_holds() -> None:
    generate(max_new_tokens=20)


def one_token_to_stop_at() -> None:
    generate(stop=5)


def half_a_number_of_tokens() -> None:
    generate(max_new_tokens=2.0)


def half_a_top_k() -> None:
    generate(temperature=1.0, top_k=2.5, rngs=sortal.Rngs(0))


def sampling_without_keys() -> None:
    generate(temperature=1.0)


GRADIENT, ARGUMENT = errors.GradientError, errors.ArgumentError
FILTER, OPTIMIZER, CACHE = errors.FilterError, errors.OptimizerError, errors.CacheError

MISTAKES: list[tuple[Callable[[], None], type[Exception], tuple[str, ...]]] = [
    (
        a_loss_that_is_a_variable,
        GRADIENT,
        ("the loss is a Param, which is a Variable", "Write variable[...]"),
    ),
    (
        a_loss_without_return,
        GRADIENT,
        ("the function returned None, and must return the loss.", "`return`?"),
    ),
    (
        a_loss_for_each_row,
        GRADIENT,
        ("the function returned float32[4,1].", "Write loss.mean() or loss.sum()."),
    ),
    (
        a_loss_with_more_beside_it,
        GRADIENT,
        ("the function returned a tuple of 2.", "with has_aux=True."),
    ),
    (
        has_aux_and_nothing_beside_the_loss,
        ARGUMENT,
        ("the function must return (loss, aux); found float32[].",),
    ),
    (
        a_loss_that_counts,
        GRADIENT,
        ("must be a floating-point number; the function returned int32[]",),
    ),
    (
        data_before_the_model,
        GRADIENT,
        ("argument 0: int32[4,2]", "Put the model first, or say with argnums="),
    ),
    (
        the_model_by_keyword,
        ARGUMENT,
        ("called with 0 positional arguments.", "by position."),
    ),
    (
        a_loss_that_was_called_already,
        ARGUMENT,
        ("a function is expected; found float32[].", "Pass the function itself"),
    ),
    (
        a_kind_that_the_model_lacks,
        FILTER,
        ("wrt=BatchStat takes none of the 2 leaves", "layer.kernel (Param)"),
    ),
    (
        text_for_a_compiled_function,
        ARGUMENT,
        ("  mode: 'train'", "which static_argnames=['mode'] names."),
    ),
    (
        text_among_the_data,
        ARGUMENT,
        ("are models, arrays and numbers", "  batch['name']: 'first'"),
    ),
    (
        a_class_for_a_compiled_function,
        ARGUMENT,
        ("are models, arrays and numbers", "  m: <class"),
    ),
    (
        a_static_array,
        ARGUMENT,
        ("  x: float32[4,2]", "Leave data out of static_argnums"),
    ),
    (
        a_result_to_compile,
        ARGUMENT,
        ("found float32[4,1].", "Pass the function itself"),
    ),
    (
        a_write_to_a_model_that_was_not_passed,
        errors.TraceError,
        ("level: layer.bias (Param)", "Pass the object that holds it"),
    ),
    (
        text_for_a_function_that_is_recomputed,
        ARGUMENT,
        ("  mode: 'train'", "which static_argnums=[1] names."),
    ),
    (
        a_model_and_data_mapped_alike,
        errors.AxisError,
        (
            "axis 0 of layer.kernel (Param), float32[2,1], has 2",
            "axis 0 of argument 1, float32[4,2], has 4",
            "in_axes=(None, 0), or by kind StateAxes({Param: None, ...: 0}).",
        ),
    ),
    (
        a_scan_that_returns_its_carry_alone,
        ARGUMENT,
        ("asks for a tuple of 2; the step of scan returned float32[2].",),
    ),
    (
        a_layer_without_rngs,
        ARGUMENT,
        ("Linear needs an Rngs", "Write Linear(..., rngs=nnx.Rngs(0))."),
    ),
    (a_seed_for_rngs, ARGUMENT, ("found rngs=0.", "Write Linear(..., rngs=")),
    (
        an_input_of_other_features,
        ARGUMENT,
        ("Linear has parameters for 2 features", "float32[4,3]", "Build the layer"),
    ),
    (
        dropout_without_rngs,
        ARGUMENT,
        ("Write nnx.Dropout(rate, rngs=rngs)", "model.eval()"),
    ),
    (a_list_of_layers, ARGUMENT, ("layers.0 is a list", "Sequential(*layers).")),
    (
        the_class_of_a_layer,
        ARGUMENT,
        ("layers.0 is the class Linear.", "Pass an object: Linear(...)."),
    ),
    (
        adding_to_a_variable,
        errors.InPlaceError,
        ("in the place of a Param.", "Write variable[...] += x."),
    ),
    (
        another_shape_for_a_variable,
        errors.UpdateError,
        (
            "float32[3] cannot be written",
            "Param(float32[2,1])[...]",
            "variable.value = x",
        ),
    ),
    (
        a_model_hidden_in_a_plain_object,
        errors.StructureError,
        ("plain: a Plain", "holds weight (Param)", "derive it from sortal.Module"),
    ),
    (
        update_with_gradients_alone,
        OPTIMIZER,
        ("was given a State as the model.", "Write optimizer.update(model, grads)"),
    ),
    (
        update_with_the_model_alone,
        OPTIMIZER,
        ("needs the gradients; found None.", "optimizer.update(model, grads)."),
    ),
    (
        update_with_loss_and_gradients,
        OPTIMIZER,
        ("found a tuple of 2.", "loss, grads = value_and_grad(f)(model)"),
    ),
    (
        a_learning_rate_for_a_transformation,
        OPTIMIZER,
        ("such as optax.adam(1e-3), is expected", "tx: 0.1"),
    ),
    (
        a_transformation_that_was_not_called,
        OPTIMIZER,
        ("the function adam; call it, as in adam(1e-3)",),
    ),
    (
        the_transformation_before_the_model,
        OPTIMIZER,
        ("a Model; the model comes first, Optimizer(model, tx)",),
    ),
    (one_filter_twice, FILTER, ("filter 2, Param, can take nothing", "Write it once.")),
    (
        the_wide_filter_first,
        FILTER,
        ("filter 2, Param, can take nothing", "Write the narrower one first"),
    ),
    (
        a_layer_for_a_filter,
        FILTER,
        ("Linear: a filter takes leaves", "Name a kind such as Param, or a path"),
    ),
    (
        a_misspelt_name_to_train,
        OPTIMIZER,
        ("wrt='parms' takes none of the 2 leaves", "layer.kernel (Param)"),
    ),
    (leaves_left_over, FILTER, ("mean (BatchStat)", "var (BatchStat)", "...")),
    (a_class_for_a_model, ARGUMENT, ("found the class Model.", "Write Model(...).")),
    (merge_of_a_tuple, ARGUMENT, ("found a tuple.", "merge(*parts)")),
    (
        merge_of_a_part,
        errors.MergeError,
        ("missing: mean (BatchStat)", "Pass the remaining states too"),
    ),
    (
        update_by_a_misspelt_path,
        errors.UpdateError,
        ("unknown: layer.kernl", "Give leaves with the model's paths"),
    ),
    (
        update_by_an_array,
        ARGUMENT,
        ("expected a State or a nested dict of leaves, found float32[4,2].",),
    ),
    (
        save_of_the_model_first,
        ARGUMENT,
        ("found a Model.", "It comes first, before the model."),
    ),
    (
        generate_inside_a_compiled_function,
        ARGUMENT,
        ("cannot be called inside jit", "model.next_logits(tokens, lengths)"),
    ),
    (generate_without_a_cache, CACHE, ("no KVCache", "init_cache(model, batch")),
    (generate_from_text, ARGUMENT, ("not text.", "tokenizer.encode(text)")),
    (generate_from_one_flat_list, ARGUMENT, ("A batch of one is [[1, 2, 3]].",)),
    (
        generate_more_than_the_cache_holds,
        CACHE,
        ("has no room", "holds 0 of 8 tokens", "init_cache(model, batch, length)"),
    ),
    (one_token_to_stop_at, ARGUMENT, ("stop=5;", "Write stop=[5].")),
    (half_a_number_of_tokens, ARGUMENT, ("max_new_tokens=2.0; it is a whole number",)),
    (half_a_top_k, ARGUMENT, ("top_k=2.5; it is a whole number",)),
    (sampling_without_keys, ARGUMENT, ("needs random keys: rngs=nnx.Rngs(0).",)),
]

NAMES = [mistake.__name__ for mistake, _, _ in MISTAKES]

# Classes that a user never writes, Sortal's own and JAX's.
INTERNAL = re.compile(
    r"\b(Ref|FlatModule\w*|Slot|Foreign|Marked|Taken|Plan|Schema|Leaves|Effects|"
    r"BoundArguments|Selection|Program|_(?!_)\w+|\w*ArrayImpl|\w*Tracer)\b|jax\._src|jaxlib"
)
# Both `sortal.transforms.traced` and the files that it stands in.
PRIVATE = re.compile(
    r"\bsortal\.(_engine|transforms|training|nn|policy|interop)\.|\w+\.py\b|0x[0-9a-f]+"
)


def message_of(mistake: Callable[[], None], error: type[Exception]) -> str:
    with pytest.raises(error) as found:
        mistake()
    assert type(found.value) is type(error("an example"))
    return str(found.value)


@pytest.mark.parametrize(("mistake", "error", "sentences"), MISTAKES, ids=NAMES)
def test_a_mistake_is_answered_with_what_to_write(mistake, error, sentences) -> None:
    message = message_of(mistake, error)
    for sentence in sentences:
        assert sentence in message


@pytest.mark.parametrize(("mistake", "error", "sentences"), MISTAKES, ids=NAMES)
def test_no_message_shows_what_is_internal(mistake, error, sentences) -> None:
    message = message_of(mistake, error)
    assert not INTERNAL.findall(message)
    assert not PRIVATE.findall(message)


def test_a_refused_mistake_changes_nothing() -> None:
    model, optimizer, grads = trained()
    before = model.layer.kernel.value
    for given in ((grads,), (model,), (model, (1.0, grads))):
        with pytest.raises(errors.OptimizerError):
            optimizer.update(*given)
    assert model.layer.kernel.value is before
    assert int(optimizer.step) == 0


def test_a_loss_of_flax_s_variables_is_named_too() -> None:
    from flax import nnx as flax_nnx

    theirs = flax_nnx.Linear(2, 1, rngs=flax_nnx.Rngs(0))
    with pytest.raises(errors.GradientError, match="the loss is a Param, which is a"):
        sortal.grad(lambda m: m.bias)(theirs)


def test_plain_numbers_are_losses() -> None:
    value, grads = sortal.value_and_grad(lambda m: 3.0)(Model())
    assert value == 3
    assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def test_the_nnx_optimizer_answers_likewise() -> None:
    model = Model()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=Param)
    with pytest.raises(errors.OptimizerError, match=r"Write optimizer\.update"):
        optimizer.update(sortal.grad(loss)(model))


def test_diff_with_one_step_says_how_to_give_two(capsys, tmp_path: Path) -> None:
    place = str(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["diff", place, "--step", "1", "2"])
    assert ended.value.code == 2
    assert "write A B --step-a 1 --step-b 2" in capsys.readouterr().err
