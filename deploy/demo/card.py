"""The model card of a demo model, with the figures that its training run measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CARD = """\
---
license: psf-2.0
language: en
pipeline_tag: text-generation
library_name: transformers
---
# polymux demo: {name}

A {num_parameters:,}-parameter `{architecture}` that answers questions about Python in the words of its documentation. It exists so that
polymux runs whole, with real tokens, on a laptop without a GPU and without a download. It recites well-known docstrings, makes up
the others, and knows nothing else: **do not take what it says about Python for true.**

{role}

| | |
|---|---|
| architecture | {architecture}: {layers} layers, hidden {hidden}, {heads} query heads, {kv_heads} KV heads of {head_dim}, MLP {ffn} |
| vocabulary | {vocab_size}, byte-level BPE; embeddings {tied} |
| context | 1024 tokens |
| weights | bf16, safetensors |

## Held-out perplexity

| per token | bits per byte | tokens | bytes |
|---|---|---|---|
| {per_token:.3f} | {bits_per_byte:.4f} | {num_tokens} | {num_bytes} |

Measured on `../heldout.txt` with the weights as exported, in fp32, each text by itself and its end-of-text token counted. The text
is docstrings of less-known library modules, chosen by a hash and never trained on; a docstring that shares a fifth of its five-word
runs with training text is not among them. The built-ins, the best-known modules and the language reference are always in training.

## Training

- **Data:** the documentation that comes with CPython {python_version}: docstrings of the standard library, of the types and functions
  written in C, and the language reference of `pydoc_data.topics`. Everything as plain text, and the best-known names, some four hundred, as
  chats: many times over, in different words. Beside it, six lines of small talk that say what the model is. Another Python version gives
  another text.
- **Licence:** the text is © Python Software Foundation, PSF License Version 2, and the weights are derived from it alone. The six lines
  and the code that made the model are under Apache-2.0.
- **Run:** {steps} steps of {batch_tokens} tokens (into pass {epochs} over the data), AdamW, cosine, bf16 autocast;
  {minutes:.1f} minutes with {num_threads} CPU thread{plural}.

```
python -m polymux.deploy.demo.train --out DIR --family {family} --size {size} --steps {steps} --seed {seed} --threads {num_threads}
```

The data and their order are the same in each run; floating-point sums are not the same on every CPU, so expect the same quality and not
the same bits. With `--minutes` in the place of `--steps` a run trains, and its learning rate falls, by the clock.

## Greedy answers, as generated
{answers}"""
ROLES = {
    "small": (
        "The smaller of its family, with the larger one's tokenizer, so it can serve as its draft in speculative decoding. It\n"
        "mixes up more names than the larger one does."
    ),
    "large": "The larger of its family.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Held-out loss: per token depends on the tokenizer, bits per byte compares across tokenizers."""

    per_token: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a training run did."""

    family: str
    size: str
    shape: Mapping[str, Any]  # of the model's config
    vocab_size: int
    num_parameters: int
    batch_tokens: int
    steps: int
    epochs: int
    minutes: float
    seed: int
    num_threads: int
    python_version: str


def model_card(run: Run, perplexity: Perplexity, answers: Mapping[str, str]) -> str:
    """The card's text; `answers` maps questions to what the model said."""
    quoted = "".join(f"\n**{question}**\n\n```text\n{answer}\n```\n" for question, answer in answers.items())
    return CARD.format(
        name=f"{run.family}-{run.size}", architecture=ARCHITECTURES[run.family], role=ROLES[run.size],
        family=run.family, size=run.size, vocab_size=run.vocab_size, num_parameters=run.num_parameters,
        layers=run.shape["num_hidden_layers"], hidden=run.shape["hidden_size"], heads=run.shape["num_attention_heads"],
        kv_heads=run.shape["num_key_value_heads"], head_dim=run.shape["head_dim"], ffn=run.shape["intermediate_size"],
        tied="tied" if run.shape["tie_word_embeddings"] else "not tied",
        per_token=perplexity.per_token, bits_per_byte=perplexity.bits_per_byte,
        num_tokens=perplexity.num_tokens, num_bytes=perplexity.num_bytes,
        batch_tokens=run.batch_tokens, steps=run.steps, epochs=run.epochs, minutes=run.minutes, seed=run.seed,
        num_threads=run.num_threads, plural="s" if run.num_threads > 1 else "",
        python_version=run.python_version, answers=quoted,
    )  # fmt: skip
