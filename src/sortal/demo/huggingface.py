"""The demo's Llama from and to folders of Hugging Face."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

import sortal as nnx
from sortal.demo.llama import Config, Llama
from sortal.interop.files.pretrained import load_pretrained, save_pretrained

_TURNED = "o i -> i o"
LLAMA: dict[str, Any] = {
    "model.embed_tokens.weight": "embed.embedding",
    "model.norm.weight": "norm.scale",
    "lm_head.weight": "head.table",
    **{
        f"model.layers.{{i}}.{theirs}.weight": f"blocks.{{i}}.{ours}.scale"
        for theirs, ours in (
            ("input_layernorm", "attention_norm"),
            ("post_attention_layernorm", "feed_norm"),
        )
    },
    **{
        f"model.layers.{{i}}.{theirs}.weight": (f"blocks.{{i}}.{ours}.kernel", _TURNED)
        for theirs, ours in (
            ("self_attn.q_proj", "attention.query"),
            ("self_attn.k_proj", "attention.key"),
            ("self_attn.v_proj", "attention.value"),
            ("self_attn.o_proj", "attention.out"),
            ("mlp.gate_proj", "feed.gate"),
            ("mlp.up_proj", "feed.up"),
            ("mlp.down_proj", "feed.down"),
        )
    },
}
"""The names of the tensors of a Llama, and the leaves of the demo's model."""

_SIZES = {
    "vocabulary": "vocab_size",
    "features": "hidden_size",
    "hidden": "intermediate_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "epsilon": "rms_norm_eps",
    "context": "max_position_embeddings",
    "tied": "tie_word_embeddings",
}


def load(
    folder: str | os.PathLike[str],
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    policy: Any = None,
) -> Llama:
    """The model in a folder; on a mesh, each device reads only its part."""
    found = json.loads((Path(folder) / "config.json").read_bytes())
    if found.get("model_type") != "llama":
        raise nnx.errors.ArgumentError(
            f"{folder} has a model of the type {found.get('model_type')!r}; only "
            "'llama' is supported."
        )
    rope = found.get("rope_parameters") or {}
    base = rope.get("rope_theta", found.get("rope_theta", 10_000.0))
    sizes = {ours: found[theirs] for ours, theirs in _SIZES.items() if theirs in found}
    config = Config(**{"tied": False, **sizes}, rotary_base=base)

    def make() -> Llama:
        return Llama(config, rngs=nnx.Rngs(0), param_dtype=dtype)

    model = nnx.abstract(make, mesh, policy)
    load_pretrained(folder, model, LLAMA, cast=True)
    return model


def save(folder: str | os.PathLike[str], model: Llama, **options: Any) -> None:
    """Writes a folder that ``transformers`` loads, without the tokenizer."""
    config = model.config
    about = {theirs: getattr(config, ours) for ours, theirs in _SIZES.items()}
    about |= {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "rope_theta": config.rotary_base,
        "torch_dtype": jnp.dtype(model.embed.embedding.value.dtype).name,
    }
    save_pretrained(folder, model, LLAMA, config=about, **options)
