"""Train the demo models from nothing: corpus, tokenizers, training, held-out perplexity, export and model card.

`python -m polymux.deploy.demo.train --out DIR` makes all four; `--family` and `--size` choose among them. A run ends after `--steps`, or
after `--minutes` if that is given: the learning rate follows whichever is used, so a slow machine trains less and still anneals.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional

from polymux.deploy.demo import corpus
from polymux.deploy.demo.card import Perplexity, Run, model_card

log = logging.getLogger(__name__)

CONTEXT_LEN = 1024  # tokens
SHORT_LEN, LONG_LEN = 256, CONTEXT_LEN  # rows of the first 88% of training, and of the rest, which teaches the far positions
SHORT_SHARE = 0.88
BATCH_TOKENS = 2048
IGNORED = -100  # a label without loss: padding
LLAMA_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the two sizes of a family share: architecture, tokenizer and chat template."""

    name: str
    vocab_size: int
    split: str  # the pre-tokenizer's pattern
    template: str
    special: tuple[str, ...]  # in id order, from 0
    bos: str | None  # what a text begins with, if anything
    end_of_text: str
    end_of_turn: str

    def id_of(self, token: str) -> int:
        return self.special.index(token)

    def config(self, shape: dict[str, Any]) -> Any:
        common = {"vocab_size": self.vocab_size, "max_position_embeddings": CONTEXT_LEN, "rope_theta": 10000.0, **self._ids(), **shape}
        if self.name == "llama":
            return transformers.LlamaConfig(rms_norm_eps=1e-5, **common)
        return transformers.Qwen3Config(rms_norm_eps=1e-6, **common)

    def _ids(self) -> dict[str, Any]:
        ends = [self.id_of(self.end_of_turn), self.id_of(self.end_of_text)]
        bos = self.id_of(self.bos) if self.bos else None
        return {"bos_token_id": bos, "eos_token_id": ends, "pad_token_id": self.id_of(self.end_of_text)}

    def generation_config(self) -> Any:
        return transformers.GenerationConfig(do_sample=True, temperature=0.7, top_p=0.9, **self._ids())


FAMILIES = {
    "llama": Family(
        name="llama", vocab_size=2048, split=LLAMA_SPLIT, template=LLAMA_TEMPLATE,
        special=("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>", end_of_text="<|end_of_text|>", end_of_turn="<|eot_id|>",
    ),
    "qwen3": Family(
        name="qwen3", vocab_size=3072, split=QWEN_SPLIT, template=QWEN_TEMPLATE,
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        bos=None, end_of_text="<|endoftext|>", end_of_turn="<|im_end|>",
    ),
}  # fmt: skip


def _shape(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn: int, *, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "intermediate_size": ffn, "tie_word_embeddings": tied,
    }  # fmt: skip


SHAPES = {
    ("llama", "small"): _shape(128, 2, 4, 2, 32, 384, tied=True),
    ("llama", "large"): _shape(192, 4, 6, 2, 32, 512, tied=False),
    ("qwen3", "small"): _shape(128, 2, 4, 2, 32, 320, tied=True),
    ("qwen3", "large"): _shape(192, 4, 4, 2, 64, 320, tied=True),
}
LEARNING_RATES = {"small": 5e-3, "large": 3e-3}


def train_tokenizer(family: Family, texts: list[str]) -> Tokenizer:
    """Byte-level BPE over the training texts, with the family's split pattern and special tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=family.name == "llama"))
    if family.name == "qwen3":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(family.split), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=family.vocab_size,
        special_tokens=list(family.special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if family.bos:
        begin = processors.TemplateProcessing(
            single=f"{family.bos} $A",
            pair=f"{family.bos} $A {family.bos} $B",
            special_tokens=[(family.bos, family.id_of(family.bos))],
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), begin])
    return tokenizer


def tokenizer_config(family: Family) -> dict[str, Any]:
    return {
        "added_tokens_decoder": {
            str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
            for i, t in enumerate(family.special)
        },
        "bos_token": family.bos,
        "chat_template": family.template,
        "clean_up_tokenization_spaces": False,
        "eos_token": family.end_of_turn,
        "model_max_length": CONTEXT_LEN,
        "pad_token": family.end_of_text,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


class Epochs:
    """Rows of token ids without end: every epoch words its chats anew, shuffles, and packs whole documents into rows."""

    def __init__(self, family: Family, tokenizer: Tokenizer, documents: list[corpus.Document], seed: int) -> None:
        self._family, self._tokenizer, self._documents = family, tokenizer, documents
        self._rng = random.Random(seed)
        self._template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(family.template)
        self._raw = [self._plain(text) for text in corpus.entries(documents)]
        self._waiting: list[list[int]] = []
        self.epoch = 0

    def _plain(self, text: str) -> list[int]:
        return plain_ids(self._family, self._tokenizer, text)

    def _refill(self) -> None:
        chats = corpus.conversations(self._documents, self._rng)
        rendered = [self._template.render(messages=c, bos_token=self._family.bos, add_generation_prompt=False) for c in chats]
        self._waiting = self._raw + [e.ids for e in self._tokenizer.encode_batch(rendered, add_special_tokens=False)]
        self._rng.shuffle(self._waiting)
        self.epoch += 1

    def batch(self, num_rows: int, row_len: int) -> tuple[Tensor, Tensor]:
        """Token ids and labels, both [num_rows, row_len] int64; a row starts with a document and is padded after its last whole one."""
        pad = self._family.id_of(self._family.end_of_text)
        ids = torch.full((num_rows, row_len), pad)
        labels = torch.full((num_rows, row_len), IGNORED)
        for row in range(num_rows):
            packed = torch.tensor(self._row(row_len))
            ids[row, : len(packed)] = packed
            labels[row, : len(packed)] = packed
        return ids, labels

    def _row(self, row_len: int) -> list[int]:
        if len(self._waiting) < 64:
            self._refill()
        row = self._waiting.pop()[:row_len]
        for index in range(len(self._waiting) - 1, max(-1, len(self._waiting) - 65), -1):  # first fit among the next 64
            if len(row) + len(self._waiting[index]) <= row_len:
                row = row + self._waiting.pop(index)
        return row


def plain_ids(family: Family, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of one raw document: begin-of-text where the family has one, the text, end-of-text."""
    return [*tokenizer.encode(text).ids, family.id_of(family.end_of_text)]


def evaluate(model: Any, family: Family, tokenizer: Tokenizer, texts: list[str]) -> Perplexity:
    """Held-out loss over each text by itself in fp32, its end-of-text token included.

    A family without a begin-of-text token is given the end-of-text one to predict the first token from.
    """
    total_nats, num_tokens = 0.0, 0
    begin = [] if family.bos else [family.id_of(family.end_of_text)]
    for text in texts:
        ids = torch.tensor([(begin + plain_ids(family, tokenizer, text))[:CONTEXT_LEN]])
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total_nats += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
        num_tokens += ids.shape[1] - 1
    num_bytes = sum(len(text.encode()) for text in texts)
    return Perplexity(
        per_token=math.exp(total_nats / num_tokens),
        bits_per_byte=total_nats / math.log(2) / num_bytes,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """When a run ends: after `steps`, or after `minutes` where that is set."""

    steps: int
    minutes: float | None

    def progress(self, step: int, elapsed_s: float) -> float:
        return elapsed_s / (60 * self.minutes) if self.minutes is not None else step / self.steps


def learning_rate(peak: float, progress: float) -> float:
    """Linear warm-up over the first 3%, then a cosine down to 2% of the peak."""
    if progress < 0.03:
        return peak * max(progress, 1e-4) / 0.03
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.03) / 0.97))))


def fit(model: Any, data: Epochs, budget: Budget, peak: float) -> tuple[int, float]:
    """Train `model` in place with AdamW under bf16 autocast. Returns the steps taken and the wall-clock minutes."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    model.train()
    started, step, smoothed = time.monotonic(), 0, 0.0
    while (progress := budget.progress(step, time.monotonic() - started)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(peak, progress)
        row_len = SHORT_LEN if progress < SHORT_SHARE else LONG_LEN
        loss = train_step(model, optimizer, *data.batch(BATCH_TOKENS // row_len, row_len))
        smoothed = loss if step == 0 else 0.98 * smoothed + 0.02 * loss
        step += 1
        if step % 50 == 0:
            log.info("step=%d progress=%.3f epoch=%d loss=%.3f", step, progress, data.epoch, smoothed)
    model.eval()
    return step, (time.monotonic() - started) / 60


def train_step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor, labels: Tensor) -> float:
    """One update on ids and labels [B, T]; returns the mean loss in nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    loss = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    return loss.item()


def sample(model: Any, family: Family, tokenizer: Tokenizer, question: str, max_new_tokens: int = 200) -> str:
    """The greedy answer to one question."""
    messages = [{"role": "user", "content": question}]
    prompt = jinja2.Template(family.template).render(messages=messages, bos_token=family.bos, add_generation_prompt=True)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    out = model.generate(torch.tensor([ids]), do_sample=False, temperature=None, top_p=None, max_new_tokens=max_new_tokens)
    return str(tokenizer.decode(out[0, len(ids) :].tolist()))


def export(model: Any, family: Family, tokenizer: Tokenizer, out: Path) -> None:
    """Write the checkpoint as others publish theirs, weights in bf16. `model` is left rounded to bf16."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = family.generation_config()
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(family), indent=2) + "\n", encoding="utf-8")


def build(family: Family, size: str, out: Path, budget: Budget, seed: int) -> None:
    """One model from the corpus to its card. The held-out text is written beside the models."""
    documents, held_out = corpus.hold_out(corpus.collect())
    out.mkdir(parents=True, exist_ok=True)
    (out / "heldout.txt").write_text(corpus.HELD_OUT_SEPARATOR.join(held_out), encoding="utf-8")
    tokenizer = train_tokenizer(family, corpus.entries(documents))
    torch.manual_seed(seed)
    config = family.config(SHAPES[family.name, size])
    model = (transformers.LlamaForCausalLM if family.name == "llama" else transformers.Qwen3ForCausalLM)(config)
    data = Epochs(family, tokenizer, documents, seed)
    steps, minutes = fit(model, data, budget, LEARNING_RATES[size])
    target = out / f"{family.name}-{size}"
    export(model, family, tokenizer, target)
    perplexity = evaluate(model.float(), family, tokenizer, held_out)
    run = Run(
        family=family.name,
        size=size,
        shape=SHAPES[family.name, size],
        vocab_size=family.vocab_size,
        num_parameters=sum(p.numel() for p in model.parameters()),
        batch_tokens=BATCH_TOKENS,
        steps=steps,
        epochs=data.epoch,
        minutes=minutes,
        seed=seed,
        num_threads=torch.get_num_threads(),
        python_version=platform.python_version(),
    )
    card = model_card(run, perplexity, {q: sample(model, family, tokenizer, q) for q in QUESTIONS})
    (target / "README.md").write_text(card, encoding="utf-8")
    log.info("model=%s steps=%d minutes=%.1f %s", target.name, steps, minutes, perplexity)


QUESTIONS = ("What does os.path.join do?", "Explain str.split", "Describe the for statement")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=sorted(FAMILIES), help="one family only")
    parser.add_argument("--size", choices=["small", "large"], help="one size only")
    parser.add_argument("--steps", type=int, default=2000, help=f"updates of {BATCH_TOKENS} tokens for each model")
    parser.add_argument("--minutes", type=float, help="train each model for this long instead of for --steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    budget = Budget(steps=arguments.steps, minutes=arguments.minutes)
    for family, size in SHAPES:
        if arguments.family in (None, family) and arguments.size in (None, size):
            build(FAMILIES[family], size, arguments.out, budget, arguments.seed)


if __name__ == "__main__":
    main()
