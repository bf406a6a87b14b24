"""The file that defines each public name; it is imported when the name is first used.

So `import sortal` is cheap, and a program imports only the files that it uses.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any


def contents(files: Mapping[str, str]) -> dict[str, str]:
    """A contents table, written file by file.

    Example:
      >>> contents({"sortal.random": "Rngs reseed"})
      {'Rngs': 'sortal.random.Rngs', 'reseed': 'sortal.random.reseed'}
    """
    pairs = ((file, name) for file, names in files.items() for name in names.split())
    return {name: f"{file}.{name}" for file, name in pairs}


TABLE = contents(
    {
        "sortal": (
            "checkpoint decoding distributed errors module nn nnx sharding transforms"
        ),
        "sortal._engine.annotations": "PARTITION_NAME with_metadata with_partitioning",
        "sortal._engine.graphdef": "GraphDef",
        "sortal._engine.nodes": "register_node",
        "sortal._engine.state": "FlatState State",
        "sortal._engine.variable": (
            "BatchStat Cache Intermediate OptArray OptState OptVariable Param "
            "Perturbation RngCount RngKey RngState Variable"
        ),
        "sortal.checkpoint.manager": "Checkpoints",
        "sortal.checkpoint.pending": "Saving",
        "sortal.checkpoint.planning": "restore_plan",
        "sortal.checkpoint.restoring": "Restored load_state restore",
        "sortal.checkpoint.saving": "save",
        "sortal.errors": "SortalError TraceError",
        "sortal.filters": (
            "All At Dtyped Everything Filter Not Nothing OfType PathContains PathIn "
            "Shaped Under WithTag to_filter"
        ),
        "sortal.functional": (
            "clone graphdef iter_graph merge pop split state update variables"
        ),
        "sortal.inspect.display": "display",
        "sortal.inspect.html.picture": "show",
        "sortal.inspect.nans": "find_nan",
        "sortal.inspect.text": "explain tabulate",
        "sortal.module": (
            "Module Pytree dataclass iter_children iter_modules set_attributes"
        ),
        "sortal.nn": "initializers",
        "sortal.nn.activations": (
            "PReLU celu elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh "
            "identity leaky_relu log_sigmoid log_softmax logsumexp one_hot relu "
            "relu6 selu sigmoid silu soft_sign softmax softplus standardize swish "
            "tanh"
        ),
        "sortal.nn.attention": (
            "RoPE combine_masks dot_product_attention dot_product_attention_weights "
            "dot_product_attention_with_rope make_attention_mask make_causal_mask"
        ),
        "sortal.nn.cache": "KVCache check_room",
        "sortal.nn.conv": "Conv ConvTranspose",
        "sortal.nn.decoder": "DecoderAttention init_cache reset_cache",
        "sortal.nn.embedding": "Embed",
        "sortal.nn.initializers": "Initializer",
        "sortal.nn.linear": "Einsum Linear LinearGeneral",
        "sortal.nn.lora": "LoRA LoRALinear LoRAParam",
        "sortal.nn.multihead": "MultiHeadAttention",
        "sortal.nn.normalization": "BatchNorm GroupNorm InstanceNorm LayerNorm RMSNorm",
        "sortal.nn.pooling": "avg_pool max_pool min_pool pool",
        "sortal.nn.recurrent": (
            "GRUCell LSTMCell OptimizedLSTMCell RNNCellBase SimpleCell"
        ),
        "sortal.nn.reparameterization": "SpectralNorm WeightNorm",
        "sortal.nn.rnn": "Bidirectional RNN flip_sequences",
        "sortal.nn.rope": "rotary",
        "sortal.nn.sequential": "Sequential",
        "sortal.nn.stochastic": "Dropout",
        "sortal.policy.policy": "Policy",
        "sortal.policy.rule": "Rule",
        "sortal.random": "RngStream Rngs fork_rngs reseed restore_rngs split_rngs",
        "sortal.sharding.placing": (
            "abstract constrain init_sharded named_shardings shard specs"
        ),
        "sortal.sharding.report": "assert_sharded sharding_report",
        "sortal.sharding.transfer": "Transferred transfer",
        "sortal.sharding.mesh_axes": (
            "logical_axis_rules use_eager_sharding using_eager_sharding"
        ),
        "sortal.sharding.specs": (
            "as_abstract get_abstract_model get_named_sharding get_partition_spec"
        ),
        "sortal.training": "metrics",
        "sortal.training.ema": "EMA",
        "sortal.training.metrics": "Metric MultiMetric",
        "sortal.training.optimizer": "Optimizer",
        "sortal.training.train_state": "TrainState",
        "sortal.transforms._adapter.prefixes": "Carry StateAxes StateSharding",
        "sortal.transforms.autodiff": "DiffState grad value_and_grad",
        "sortal.transforms.compile": "eval_shape jit",
        "sortal.transforms.control": "cond fori_loop switch while_loop",
        "sortal.transforms.custom": "custom_jvp custom_vjp",
        "sortal.transforms.derivatives": "jvp linearize make_jaxpr vjp",
        "sortal.transforms.export": "Exported export",
        "sortal.transforms.mapping": "shard_map vmap",
        "sortal.transforms.remat": "remat",
        "sortal.transforms.retrace": "RetraceWarning explain_retrace",
        "sortal.transforms.scan": "scan",
    }
) | {"Any": "sortal.filters.Any_"}
"""Each name of ``sortal``, and the full dotted name of what it is."""


def load(namespace: dict[str, Any], name: str, table: Mapping[str, str]) -> Any:
    """Imports what a package's contents table lists for a name, and keeps it."""
    if name not in table:
        package = namespace["__name__"]
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    file, _, attribute = table[name].rpartition(".")
    found = vars(importlib.import_module(file))
    if attribute not in found:  # it is a module, not imported before
        importlib.import_module(table[name])
    namespace[name] = found[attribute]
    return namespace[name]
