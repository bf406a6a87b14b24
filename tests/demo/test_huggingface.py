"""The demo's Llama in folders of Hugging Face; checked by transformers where it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sortal as nnx
from sortal.demo import huggingface
from sortal.demo.llama import Config, Llama

SMALL = Config(
    vocabulary=50, features=16, hidden=24, layers=3, heads=4, key_value_heads=2,
    context=32,
)  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_goes_out_in_shards_and_comes_back(tmp_path, tied):
    config = Config(**{**vars(SMALL), "tied": tied})
    model = Llama(config, rngs=nnx.Rngs(0))
    huggingface.save(tmp_path, model, shard_bytes=8_000)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 2
    again = huggingface.load(tmp_path)
    assert again.config == config
    tokens = jnp.arange(10).reshape(2, 5)
    assert np.array_equal(again(tokens), model(tokens))


def test_on_a_mesh_each_device_holds_its_part(tmp_path):
    model = Llama(SMALL, rngs=nnx.Rngs(0))
    huggingface.save(tmp_path, model)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    again = huggingface.load(tmp_path, mesh=mesh)
    for a, b in zip(*map(jax.tree.leaves, map(nnx.state, (model, again))), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers_both_ways(tmp_path, tied):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied,
        max_position_embeddings=32,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="10KB")
    tokens = np.arange(10).reshape(2, 5)
    with torch.no_grad():
        due = theirs(torch.tensor(tokens)).logits.numpy()
    ours = huggingface.load(tmp_path / "theirs")
    assert np.abs(np.asarray(ours(tokens)) - due).max() < 1e-4
    huggingface.save(tmp_path / "ours", ours, shard_bytes=10_000)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        assert np.array_equal(back(torch.tensor(tokens)).logits.numpy(), due)
