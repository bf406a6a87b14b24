"""Wrong answers: by problem, the pitfall, and the edits that make them of a solution."""

from __future__ import annotations

Edit = tuple[str, str]

COUNTS = "jnp.array(counts, dtype=float)"

MISTAKES: dict[str, list[tuple]] = {
    "kinds": [
        ("a bare array", ("nnx.Param(weight)", "weight")),
        ("a bare array", ("Visits(visits + 1)", "visits + 1")),
        (
            "arithmetic took the array out of the box",
            ("Visits(visits + 1)", "Visits(visits) + 1"),
        ),
        ("a plain `Variable`", ("Visits(visits", "nnx.Variable(visits")),
        ("a plain `Variable`", ("nnx.BatchStat(mean)", "nnx.Variable(mean)")),
        ("a kind derived from `Param`", ("Visits(nnx.Variable)", "Visits(nnx.Param)")),
    ],
    "module": [
        ("a bare array", ("nnx.Param(kernel)", "kernel")),
        ("not a Module", ("Affine(nnx.Module)", "Affine")),
        ("the seed is ignored", ("rngs.params()", "jax.random.key(0)")),
        ("the seed is ignored", ("rngs.params()", "nnx.Rngs(7).params()")),
        ("a setting in a box", ("= scale", "= nnx.Param(jnp.array(scale))")),
        ("a setting in a box", ("= scale", "= jnp.array(scale)")),
    ],
    "call": [
        (
            "layers made in the call",
            ("self.second(nnx.relu(self.first(x)))", "nnx.Linear(x.shape[-1], 2, rngs=nnx.Rngs(0))(x)"),
            ("self.first = nnx.Linear(in_features, hidden, rngs=rngs)", "self.hidden = hidden"),
            ("        self.second = nnx.Linear(hidden, out_features, rngs=rngs)\n", ""),
        ),
        ("no activation", ("nnx.relu(self.first(x))", "self.first(x)")),
        (
            "an activation at the end",
            ("self.second(nnx.relu(self.first(x)))", "nnx.relu(self.second(nnx.relu(self.first(x))))"),
        ),
        (
            "an activation at the end",
            ("self.second(nnx.relu(self.first(x)))", "nnx.relu(self.second(self.first(x)))"),
        ),
        ("the seed is ignored", ("rngs=rngs)", "rngs=nnx.Rngs(0))")),
    ],
    "state_filter": [
        ("`BatchStat` derived from `Param`", ("BatchStat(nnx.Variable)", "BatchStat(nnx.Param)")),
        (
            "the built-in `BatchStat` instead of your own",
            ("nnx.state(model, BatchStat)", "nnx.state(model, nnx.BatchStat)"),
        ),
        (
            "the built-in `BatchStat` instead of your own",
            ("class BatchStat(nnx.Variable):", "BatchStat = nnx.BatchStat\nif True:"),
        ),
        ("filtering by `Variable`", ("nnx.state(model, nnx.Param)", "nnx.state(model, nnx.Variable)")),
        ("filtering by `Variable`", ("nnx.state(model, BatchStat)", "nnx.state(model, nnx.Variable)")),
        ("ints in place of floats", (COUNTS, "jnp.array(counts)")),
        ("a hard-coded answer", (COUNTS, "jnp.array([4.0, 2.0, 1.0])")),
        (
            "a hard-coded answer",
            (COUNTS, "jnp.array([sum([2, 2]), 2, 1], dtype=float)"),
            ("nnx.state(", "print("),
        ),
        ("`hidden` left a float", ("int(hidden)", "hidden")),
    ],
    "counters": [
        (
            "a Python number",
            ("Count(jnp.array(0))", "0"),
            ("self.count[...]", "self.count"),
        ),
        ("the box was replaced", ("self.count[...] += 1", "self.count = self.count + 1")),
        ("the box was replaced", ("self.total[...] += x", "self.total = self.total[...] + x")),
        ("a counter that is trained", ("Count(nnx.Variable)", "Count(nnx.Param)")),
        (
            "the mean of the calls before",
            ("        self.total[...] += x\n", "        old = self.total[...]\n        self.total[...] += x\n"),
            ("return self.total[...]", "return old"),
        ),
    ],
    "split_merge": [
        (
            "the model itself was changed",
            ("return nnx.merge(graphdef, params, rest)", "nnx.update(model, params)\n    return model"),
        ),
        (
            "all state was scaled",
            ("graphdef, params, rest = nnx.split(model, nnx.Param, ...)", "graphdef, params = nnx.split(model)"),
            (", params, rest)", ", params)"),
        ),
        ("nothing takes the rest", ("nnx.Param, ...", "nnx.Param"), (", rest = ", " = ")),
        ("nothing takes the rest", (", params, rest)", ", params)")),
        ("nothing was scaled", ("    params = jax.tree.map", "    new = jax.tree.map")),
    ],
    "update": [
        ("only the snapshot changed", ("nnx.update(target, new)", "return new")),
        (
            "the weights are the wrong way round",
            ("decay * mine + (1 - decay) * other", "(1 - decay) * mine + decay * other"),
        ),
        ("statistics averaged too", (", nnx.Param)", ")")),
        (
            "the two models now share Variables",
            ("nnx.update(target, new)", "target.scale = source.scale"),
        ),
    ],
    "paths": [
        ("`*` is one step only", ("decoder.**.kernel", "decoder.*.kernel")),
        ("found anywhere in the path", ("decoder.**.kernel", "**.decoder.**.kernel")),
        (
            "found anywhere in the path",
            ('nnx.At("decoder.**.kernel")', 'nnx.PathContains("decoder")'),
        ),
        ("biases too", ('nnx.At("decoder.**.kernel")', 'nnx.Under("decoder")')),
        ("a path says nothing of the kind", ("nnx.Param & ", "")),
    ],
    "batchnorm": [
        ("left in training mode", ("    model.eval()\n", "")),
        ("the statistics never moved", ("model.train()", "model.eval()")),
        ("x was counted too", ("    model.eval()\n", "    model(x)\n    model.eval()\n")),
        ("x was counted too", ("in batches", "in [*batches, x]")),
        ("a copy was calibrated", ("    model.train()\n", "    model = nnx.clone(model)\n    model.train()\n")),
    ],
    "training_step": [
        ("no update", ("    optimizer.update(model, grads)\n", "")),
        ("the sum in place of the mean", ("jnp.mean", "jnp.sum")),
        ("the loss after the step", ("return loss", "return loss_fn(model)")),
        ("the loss after the step", ("return loss\n", "return loss_fn(nnx.clone(model))\n")),
        ("the statistics were lost", ("jnp.mean((model(x)", "jnp.mean((nnx.clone(model)(x)")),
    ],
}
