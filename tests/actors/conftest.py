"""Tiny checkpoints of every architecture, made by transformers, and a model runner over them with a cache of shuffled block ids."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_images import HeldCopy
from torch import Tensor

from polymux.actors.model_runner import BoundModel, ForwardBatch, ModelRunner, SequenceSlice
from polymux.actors.weights.builder import build_image
from polymux.actors.weights.checkpoint import Checkpoint
from polymux.actors.weights.image import DTYPES, ImageManifest
from polymux.transport.units import BLOCK_SIZE, KIB

SHAPE: dict[str, Any] = {
    "vocab_size": 515,  # no multiple of any packing block
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"sliding_window": 24, "head_dim": 24}),
    "qwen2-tied": ("Qwen2Config", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen2-windows": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "attention_bias": True}),
    "qwen3-tied": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}),
}


@dataclass
class Runner:
    """One bound model, and sequences in a cache whose unwritten slots are NaN."""

    model: BoundModel
    kv: Tensor
    manifest: ImageManifest
    weights: Tensor
    free_blocks: list[int]
    tables: dict[str, list[int]] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)

    def step(self, tokens: dict[str, Sequence[int]], on_layer: Callable[[int], None] | None = None) -> dict[str, Tensor]:
        """Feed each named sequence its next tokens, in one batch; the logits of every fed token, by name."""
        slices, start = [], 0
        for name, ids in tokens.items():
            slices.append(self.slice(name, start, len(ids)))
            start += len(ids)
        flat = torch.tensor([i for ids in tokens.values() for i in ids])
        logits = self.model.forward(ForwardBatch(token_ids=flat, slices=tuple(slices), logits_rows=torch.arange(start)), on_layer)
        return {name: logits[s.start : s.start + s.num_tokens] for name, s in zip(tokens, slices, strict=True)}

    def slice(self, name: str, start: int, num_tokens: int) -> SequenceSlice:
        table, length = self.tables.setdefault(name, []), self.lengths.get(name, 0)
        while len(table) * BLOCK_SIZE < length + num_tokens:
            table.append(self.free_blocks.pop())
        self.lengths[name] = length + num_tokens
        return SequenceSlice(start=start, num_tokens=num_tokens, context_len=length, block_ids=tuple(table))

    def greedy(self, prompts: dict[str, Sequence[int]], num_tokens: int) -> dict[str, list[int]]:
        """Prefill each prompt alone, then decode them all together."""
        out = {name: [int(self.step({name: prompt})[name][-1].argmax())] for name, prompt in prompts.items()}
        for _ in range(num_tokens - 1):
            logits = self.step({name: ids[-1:] for name, ids in out.items()})
            for name, rows in logits.items():
                out[name].append(int(rows[-1].argmax()))
        return out


def make_runner(
    checkpoint: Checkpoint, dtype: str, *, batch_invariant: bool = False, layout: str = "auto", num_blocks: int = 96, seed: int = 0
) -> Runner:
    fd = os.memfd_create("image")
    try:
        manifest = ImageManifest.from_bytes(build_image(checkpoint, fd, dtype=dtype, layout=layout).to_bytes())
        weights = torch.from_file(f"/proc/self/fd/{fd}", shared=True, size=manifest.nbytes, dtype=torch.uint8)
    finally:
        os.close(fd)
    shape = checkpoint.config.kv_layout(dtype)
    kv = torch.full((num_blocks, shape.num_layers, 2, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim), torch.nan, dtype=DTYPES[dtype])
    model = ModelRunner(batch_invariant=batch_invariant).bind(manifest, weights, kv)
    blocks = list(range(num_blocks))
    random.Random(seed).shuffle(blocks)
    return Runner(model, kv, manifest, weights, blocks)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pack_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack fp32 weights of any size."""
    monkeypatch.setattr("polymux.kernels.onednn.MIN_PACKED_FP32", 0)


@pytest.fixture(scope="session")
def runner_for() -> Callable[..., Runner]:
    return make_runner


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a tiny random checkpoint: by architecture, dtype and shard size; each is made once a session."""
    import transformers

    made: dict[tuple[str, str, str], Path] = {}

    def make(name: str, dtype: str = "float32", max_shard_size: str = "1GB") -> Path:
        key = (name, dtype, max_shard_size)
        if key not in made:
            kind, overrides = ARCHITECTURES[name]
            torch.manual_seed(len(name))
            config = getattr(transformers, kind)(**SHAPE | overrides)
            model = transformers.AutoModelForCausalLM.from_config(config).to(DTYPES[dtype])
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.1) if parameter.dim() > 1 else torch.nn.init.uniform_(parameter, 0.5, 1.5)
            made[key] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[key], max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture
def copy(monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldCopy]:
    """Every load is in pieces of a group or so, and its copies can be held."""
    copy = HeldCopy()
    monkeypatch.setattr("polymux.actors.weights.load.piece_bytes", lambda _nbytes: 4 * KIB)
    monkeypatch.setattr("polymux.actors.weights.load.copy_bytes", copy)
    yield copy
    copy.go.set()
