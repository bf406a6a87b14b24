"""Wrong answers by problem: the pitfall, and edits that make one of the solution."""

from __future__ import annotations

SCAN = "return nnx.scan(step, in_axes=(0, nnx.Carry), out_axes=nnx.Carry)"
LOOP = """graphdef, state = nnx.split(blocks)
    for i in range(blocks.kernel.shape[0]):
        one = jax.tree.map(lambda a: a[i], state)
        x = step(nnx.merge(graphdef, one), x)
    return x"""
EARLY = "    early = nnx.Optimizer(model, optax.sgd(1), wrt=nnx.LoRAParam)\n"
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
            (
                "self.second(nnx.relu(self.first(x)))",
                "nnx.Linear(x.shape[-1], 2, rngs=nnx.Rngs(0))(x)",
            ),
            (
                "self.first = nnx.Linear(in_features, hidden, rngs=rngs)",
                "self.hidden = hidden",
            ),
            ("        self.second = nnx.Linear(hidden, out_features, rngs=rngs)\n", ""),
        ),
        ("no activation", ("nnx.relu(self.first(x))", "self.first(x)")),
        (
            "an activation at the end",
            (
                "self.second(nnx.relu(self.first(x)))",
                "nnx.relu(self.second(nnx.relu(self.first(x))))",
            ),
        ),
        (
            "an activation at the end",
            (
                "self.second(nnx.relu(self.first(x)))",
                "nnx.relu(self.second(self.first(x)))",
            ),
        ),
        ("the seed is ignored", ("rngs=rngs)", "rngs=nnx.Rngs(0))")),
    ],
    "state_filter": [
        (
            "`BatchStat` derived from `Param`",
            ("BatchStat(nnx.Variable)", "BatchStat(nnx.Param)"),
        ),
        (
            "`BatchStat` derived from `Param`",
            ("BatchStat(nnx.Variable)", "BatchStat(nnx.Param)"),
            (
                "    states",
                "    nnx.split(model, nnx.Param, BatchStat, ...)\n    states",
            ),
        ),
        (
            "the built-in `BatchStat` instead of your own",
            ("nnx.state(model, BatchStat)", "nnx.state(model, nnx.BatchStat)"),
        ),
        (
            "the built-in `BatchStat` instead of your own",
            ("class BatchStat(nnx.Variable):", "BatchStat = nnx.BatchStat\nif True:"),
        ),
        (
            "filtering by `Variable`",
            ("nnx.state(model, nnx.Param)", "nnx.state(model, nnx.Variable)"),
        ),
        (
            "filtering by `Variable`",
            ("nnx.state(model, BatchStat)", "nnx.state(model, nnx.Variable)"),
        ),
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
        (
            "the box was replaced",
            ("self.count[...] += 1", "self.count = self.count + 1"),
        ),
        (
            "the box was replaced",
            ("self.total[...] += x", "self.total = self.total[...] + x"),
        ),
        ("a counter that is trained", ("Count(nnx.Variable)", "Count(nnx.Param)")),
        (
            "the mean of the calls before",
            (
                "        self.total[...] += x\n",
                "        old = self.total[...]\n        self.total[...] += x\n",
            ),
            ("return self.total[...]", "return old"),
        ),
    ],
    "split_merge": [
        (
            "the model itself was changed",
            (
                "return nnx.merge(graphdef, params, rest)",
                "nnx.update(model, params)\n    return model",
            ),
        ),
        (
            "all state was scaled",
            (
                "graphdef, params, rest = nnx.split(model, nnx.Param, ...)",
                "graphdef, params = nnx.split(model)",
            ),
            (", params, rest)", ", params)"),
        ),
        (
            "nothing takes the rest",
            ("nnx.Param, ...", "nnx.Param"),
            (", rest = ", " = "),
        ),
        ("nothing takes the rest", (", params, rest)", ", params)")),
        ("nothing was scaled", ("    params = jax.tree.map", "    new = jax.tree.map")),
    ],
    "update": [
        ("only the snapshot changed", ("nnx.update(target, new)", "return new")),
        (
            "the weights are the wrong way round",
            (
                "decay * mine + (1 - decay) * other",
                "(1 - decay) * mine + decay * other",
            ),
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
        (
            "x was counted too",
            ("    model.eval()\n", "    model(x)\n    model.eval()\n"),
        ),
        ("x was counted too", ("in batches", "in [*batches, x]")),
        (
            "a copy was calibrated",
            (
                "    model.train()\n",
                "    model = nnx.clone(model)\n    model.train()\n",
            ),
        ),
    ],
    "training_step": [
        ("no update", ("    optimizer.update(model, grads)\n", "")),
        ("the sum in place of the mean", ("jnp.mean", "jnp.sum")),
        ("the loss after the step", ("return loss", "return loss_fn(model)")),
        (
            "the loss after the step",
            ("return loss\n", "return loss_fn(nnx.clone(model))\n"),
        ),
        (
            "the statistics were lost",
            ("jnp.mean((model(x)", "jnp.mean((nnx.clone(model)(x)"),
        ),
    ],
    "optimizer_groups": [
        ("one rate for all", ("sgd(slow)", "sgd(fast)")),
        (
            "one rate for all",
            (
                "nnx.Optimizer(model, groups)",
                "nnx.Optimizer(model, optax.sgd(slow), wrt=nnx.Param)",
            ),
        ),
        (
            "the rates are swapped",
            ("sgd(fast)", "sgd(f)"),
            ("sgd(slow)", "sgd(fast)"),
            ("sgd(f)", "sgd(slow)"),
        ),
        ("the rest stands still", (", ...: optax.sgd(slow)", "")),
        ("a Param in two groups", ("...: optax", "nnx.Param: optax")),
    ],
    "lora": [
        ("the base is trained", ("wrt=nnx.LoRAParam", "wrt=nnx.Param")),
        ("the base is missing", ("base_module=head, ", "")),
        (
            "the adapter is not in the model",
            ("model.head = nnx.LoRA", "adapter = nnx.LoRA"),
            ("(model, optax", "(adapter, optax"),
        ),
        (
            "the optimizer came before the adapter",
            (
                "    head = model.head",
                EARLY + "    head = model.head",
            ),
            (
                "return nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)",
                "return early",
            ),
        ),
    ],
    "sharing": [
        (
            "a copy",
            (
                "Head(self.embed.embedding)",
                "Head(nnx.Param(self.embed.embedding[...]))",
            ),
        ),
        (
            "a copy",
            ("Head(self.embed.embedding)", "Head(nnx.clone(self.embed.embedding))"),
        ),
        (
            "two tables",
            (
                "Head(self.embed.embedding)",
                "Head(nnx.Embed(words, features, rngs=rngs).embedding)",
            ),
        ),
        (
            "the array in place of the Variable",
            ("self.embed.embedding", "self.embed.embedding[...]"),
        ),
    ],
    "ensemble": [
        ("the same weights for all members", ("nnx.Rngs(key)", "nnx.Rngs(seed)")),
        (
            "the same weights for all members",
            (
                "jax.random.split(jax.random.key(seed), members)",
                "jax.random.key(jax.numpy.full(members, seed))",
            ),
            (
                "jax.random.key(jax.numpy.full(members, seed))",
                "jax.vmap(jax.random.key)(jax.numpy.full(members, seed))",
            ),
        ),
        ("a list of models", ("nnx.vmap(make)(keys)", "[make(key) for key in keys]")),
        ("x was divided among the members", (", in_axes=(0, None)", "")),
        ("the members were averaged", ("(models, x)\n", "(models, x).mean(0)\n")),
    ],
    "shared_params": [
        ("Params mapped too", ("(axes, 0)", "(0, 0)")),
        (
            "statistics shared",
            ("nnx.BatchStat: 0, ...: None", "...: None, nnx.BatchStat: 0"),
        ),
        ("statistics shared", ("(axes, 0)", "(None, 0)")),
        ("x was not divided", ("(axes, 0)", "(axes, None)")),
        ("the statistics were lost", ("(model, x)\n", "(nnx.clone(model), x)\n")),
    ],
    "scan": [
        (
            "a Python loop",
            (SCAN + "(blocks, x)", LOOP),
            ("import sortal", "import jax\nimport sortal"),
        ),
        (
            "each block got the same input",
            (
                SCAN.removeprefix("return "),
                "nnx.vmap(step, in_axes=(0, None))",
            ),
        ),
        (
            "each block got the same input",
            (
                "in_axes=(0, nnx.Carry), out_axes=nnx.Carry",
                "in_axes=(0, None), out_axes=0",
            ),
        ),
        ("the blocks were not divided", ("(0, nnx.Carry)", "(nnx.Carry, 0)")),
        (
            "the outputs of all blocks",
            ("return block(x)", "y = block(x)\n        return y, y"),
            ("out_axes=nnx.Carry", "out_axes=(nnx.Carry, 0)"),
            ("(blocks, x)\n", "(blocks, x)[1]\n"),
        ),
        (
            "from the last to the first",
            ("out_axes=nnx.Carry", "out_axes=nnx.Carry, reverse=True"),
        ),
    ],
    "kv_cache": [
        (
            "empty slots were attended to",
            ("jnp.where(filled, scores, -jnp.inf)", "scores"),
        ),
        (
            "empty slots were attended to",
            ("jnp.where(filled, scores, -jnp.inf)", "scores * filled"),
        ),
        (
            "the new token is not seen",
            ("< self.position[...]", "< self.position[...] - 1"),
        ),
        (
            "the position stands still",
            ("        self.position[...] += 1\n", ""),
            ("< self", "<= self"),
        ),
        (
            "the cache grows",
            (
                "self.keys[self.position[...]] = key",
                "self.keys.set_value(jnp.vstack([self.keys[...], key]))",
            ),
            (
                "self.values[self.position[...]] = value",
                "self.values.set_value(jnp.vstack([self.values[...], value]))",
            ),
        ),
        (
            "the cache grows",
            (
                "self.keys[self.position[...]] = key",
                "self.keys[...] = jnp.concatenate([self.keys[...], key[None]])",
            ),
        ),
        ("a cache that is trained", ("nnx.Cache", "nnx.Param")),
        (
            "a Python number for the position",
            ("nnx.Cache(jnp.array(0))", "0"),
            ("self.position[...]", "self.position"),
        ),
    ],
    "checkpoint": [
        ("everything was saved", ("step=0, only=nnx.Param", "step=0")),
        (
            "more is asked for than was saved",
            ("directory, model, only=nnx.Param", "directory, model"),
        ),
        (
            "nothing was restored",
            (
                "nnx.restore(directory, model, only=nnx.Param)",
                "return nnx.load_state(directory)",
            ),
        ),
        (
            "nothing was saved",
            (
                "nnx.save(directory, model, step=0, only=nnx.Param)",
                "return nnx.state(model, nnx.Param)",
            ),
        ),
    ],
    "sharding": [
        ("no spec", (', spec=P("data")', "")),
        ("the wrong dimension", ('P("data")', 'P(None, "data")')),
        (
            "the spec is not on the kind",
            (', spec=P("data")', ""),
            (
                "features)))\n        self.bias",
                'features)), spec=P("data"))\n        self.bias',
            ),
        ),
        (
            "everything is divided",
            (
                "nnx.shard(model, mesh)",
                'nnx.shard(model, mesh, {nnx.Param: nnx.Rule(spec=P("data"))})',
            ),
        ),
        ("nothing was placed", ("    nnx.shard(model, mesh)", "    return model")),
    ],
    "recompilation": [
        (
            "a Python number in the model",
            ("Calls(jnp.array(0))", "0"),
            ("self.calls[...]", "self.calls"),
        ),
        (
            "a static argument that changes",
            ("@nnx.jit\n", '@nnx.jit(static_argnames="rate")\n'),
        ),
        (
            "compiled anew at each call",
            ("@nnx.jit\ndef step", "def plain"),
            ("return loss\n", "return loss\n\nstep = lambda *a: nnx.jit(plain)(*a)\n"),
        ),
        ("not compiled at all", ("@nnx.jit\n", "")),
        ("the count is lost", ("        self.calls[...] += 1\n", "")),
    ],
}
