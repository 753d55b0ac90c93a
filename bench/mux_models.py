"""A catalogue of checkpoints with random weights: several sizes, every model with a seed of its own, so that no two have the same image.

Sizes matter and values do not: a step reads every weight once, and a switch copies every weight once. They are large enough that a step
takes some milliseconds, or the processes that ask and answer, which share the cores with the workers, would be what is measured. The
demo's tokenizer comes along.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

TOKENIZER = Path(__file__).parent.parent / "deploy" / "demo" / "models" / "llama-large"
VOCAB_SIZE = 2048  # the tokenizer's
HEAD_DIM = 64
MAX_LEN = 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A llama with grouped queries and tied embeddings."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_kv_heads: int = 2

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.hidden_size // HEAD_DIM,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": HEAD_DIM,
            "max_position_embeddings": MAX_LEN,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10_000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
            "dtype": "bfloat16",
            "eos_token_id": 4,
        }

    def tensors(self, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows: int, columns: int) -> torch.Tensor:
            return (torch.randn(rows, columns, generator=generator) / math.sqrt(columns)).to(torch.bfloat16)

        hidden, kv = self.hidden_size, self.num_kv_heads * HEAD_DIM
        found = {"model.embed_tokens.weight": matrix(VOCAB_SIZE, hidden), "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
        for layer in range(self.num_layers):
            name = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"{name}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
            for part, rows, columns in (
                ("self_attn.q_proj", hidden, hidden),
                ("self_attn.k_proj", kv, hidden),
                ("self_attn.v_proj", kv, hidden),
                ("self_attn.o_proj", hidden, hidden),
                ("mlp.gate_proj", self.intermediate_size, hidden),
                ("mlp.up_proj", self.intermediate_size, hidden),
                ("mlp.down_proj", hidden, self.intermediate_size),
            ):
                found[f"{name}.{part}.weight"] = matrix(rows, columns)
        return found


SMALL = Shape(num_layers=6, hidden_size=640, intermediate_size=1792)
MEDIUM = Shape(num_layers=7, hidden_size=640, intermediate_size=2048)
LARGE = Shape(num_layers=7, hidden_size=768, intermediate_size=2304)
MIX = (SMALL, SMALL, MEDIUM, SMALL, SMALL, LARGE, SMALL, MEDIUM, SMALL, LARGE)  # six, two and two of ten, as in the published catalogue


def make_catalogue(folder: Path, num_models: int) -> dict[str, Path]:
    """Write the checkpoints; their directories by model name, which says the rank in popularity and nothing else."""
    made = {}
    for number in range(num_models):
        path = folder / f"model-{number:02}"
        path.mkdir(parents=True)
        shape = MIX[number % len(MIX)]
        (path / "config.json").write_text(json.dumps(shape.config()))
        save_file(shape.tensors(seed=number), path / "model.safetensors")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, path / name)
        made[path.name] = path
    return made
