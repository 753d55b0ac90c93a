"""config.json of the supported architectures is read as transformers reads it; anything else is refused with file, field and remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from polymux.actors.models.config import ArchConfig, Llama3Scaling
from polymux.actors.weights.safetensors_file import SafetensorsFile
from polymux.transport.errors import CheckpointError

CheckpointOf = Callable[..., Path]

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def parse(**changes: Any) -> ArchConfig:
    values = {name: value for name, value in (LLAMA | changes).items() if value is not ...}
    return ArchConfig.from_json(json.dumps(values), "here/config.json")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2-tied", "qwen2-windows", "qwen3", "qwen3-tied"])
def test_the_expected_tensors_are_those_that_transformers_saves(name: str, checkpoint_of: CheckpointOf) -> None:
    path = checkpoint_of(name)
    config = ArchConfig.from_json((path / "config.json").read_text(), "config.json")
    saved = SafetensorsFile.open(path / "model.safetensors").tensors
    assert config.expected_tensors() == {name: stored.shape for name, stored in saved.items()}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures.*GPT2LMHeadModel.*Qwen3ForCausalLM"),
        ({"architectures": ...}, "architectures.*missing"),
        ({"architectures": [["LlamaForCausalLM"]]}, "architectures"),
        ({"hidden_size": ...}, "hidden_size.*missing"),
        ({"hidden_size": -1}, "hidden_size.*-1"),
        ({"hidden_size": True}, "hidden_size.*True"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers"),
        ({"vocab_size": 1 << 40}, "vocab_size"),
        ({"num_key_value_heads": 3}, "num_key_value_heads.*divisor"),
        ({"head_dim": 7}, "head_dim.*even"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"dtype": "int8"}, "dtype.*int8"),
        ({"torch_dtype": ["float32"]}, "torch_dtype"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type.*yarn.*llama3"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "type.*linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.*low_freq_factor.*missing"),
        ({"rope_parameters": []}, "rope_parameters"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8, "layer_types": ["other"]}, "layer_types"),
        ({"architectures": ["Qwen2ForCausalLM"], "hidden_size": 30}, "hidden_size.*multiple"),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 0}, "sliding_window"),
    ],
)
def test_what_cannot_be_served_is_refused_by_field(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=f"(?s)here/config.json.*{named}"):
        parse(**changes)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '"x"'])
def test_what_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        ArchConfig.from_json(text, "config.json")


def test_llama3_scaling_is_read_in_both_spellings() -> None:
    values = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    old = parse(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **values})
    new = parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **values})
    assert old == new
    assert old.rope_scaling == Llama3Scaling(**values)
    assert old.rope_theta == 5e5


def test_windows_follow_each_family() -> None:
    assert parse(sliding_window=8).windows == (None, None)
    mistral = {"architectures": ["MistralForCausalLM"]}
    assert parse(**mistral, sliding_window=8).windows == (8, 8)
    assert parse(**mistral, sliding_window=None).windows == (None, None)
    assert parse(**mistral).windows == (4096, 4096)
    qwen = {"architectures": ["Qwen3ForCausalLM"], "sliding_window": 8}
    assert parse(**qwen).windows == (None, None)
    assert parse(**qwen, use_sliding_window=True, max_window_layers=1).windows == (None, 8)
    assert parse(**qwen, use_sliding_window=True, layer_types=["sliding_attention", "full_attention"]).windows == (8, None)


def test_biases_and_norms_follow_each_family() -> None:
    seen = {
        name: (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm)
        for name in ("Llama", "Mistral", "Qwen2", "Qwen3")
        for config in [parse(architectures=[f"{name}ForCausalLM"], attention_bias=True, mlp_bias=True)]
    }
    assert seen == {
        "Llama": (True, True, True, False),
        "Mistral": (False, False, False, False),
        "Qwen2": (True, False, False, False),
        "Qwen3": (True, True, False, True),
    }


def test_defaults_are_the_heads_own_size_and_no_declared_dtype() -> None:
    config = parse(num_key_value_heads=...)
    assert (config.head_dim, config.num_kv_heads, config.dtype, config.rope_theta) == (8, 4, None, 1e4)
    assert config.kv_layout("bfloat16").block_bytes == 2 * 2 * 4 * 16 * 8 * 2
