"""ArchConfig: what a checkpoint's config.json says of a decoder, parsed and checked once; everything later trusts it.

Llama, Mistral, Qwen2 and Qwen3 are one decoder with switches: biases, a norm on each head of q and k, a sliding window per layer, and
the scaling of the rotary frequencies.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from polymux.transport.errors import CheckpointError
from polymux.transport.messages import ITEM_BYTES, KVLayout

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MAX_DIMENSION = 1 << 24  # no size of a decoder comes near it; a larger one is a damaged file
MAX_NUMBER = 1e12


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's frequency scaling: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchConfig:
    """The shape of one decoder. Frozen and hashable: equal configurations share a skeleton."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    windows: tuple[int | None, ...]  # per layer: how many positions back a token sees, itself included; None is all
    qkv_bias: bool
    output_bias: bool  # of the attention's output projection
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str | None  # as declared; None: only the tensors say

    @classmethod
    def from_json(cls, config_json: str, source: str) -> ArchConfig:
        """Parse a config.json. `source` names the file in errors. Raises CheckpointError naming the field, its value and the remedy."""
        try:
            values = json.loads(config_json)
        except ValueError as error:
            raise CheckpointError(f"{source} is not JSON: {error}; download it again") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{source} holds a {type(values).__name__}, not an object; download it again")
        return _parse(_Fields(values, source))

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads that share one KV head."""
        return self.num_heads // self.num_kv_heads

    def kv_layout(self, dtype: str) -> KVLayout:
        return KVLayout(num_layers=self.num_layers, num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, dtype=dtype)

    def layer_tensors(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor that layer has in a Hugging Face checkpoint."""
        hidden, inner = self.hidden_size, self.intermediate_size
        linears = {
            "self_attn.q_proj": (self.q_size, hidden, self.qkv_bias),
            "self_attn.k_proj": (self.kv_size, hidden, self.qkv_bias),
            "self_attn.v_proj": (self.kv_size, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, self.q_size, self.output_bias),
            "mlp.gate_proj": (inner, hidden, self.mlp_bias),
            "mlp.up_proj": (inner, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, inner, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        if self.qk_norm:
            shapes |= {"self_attn.q_norm.weight": (self.head_dim,), "self_attn.k_norm.weight": (self.head_dim,)}
        for name, (rows, columns, has_bias) in linears.items():
            shapes[f"{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{name}.bias"] = (rows,)
        return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of each tensor that the checkpoint must have; it may have others, which are not read."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.num_layers):
            shapes |= self.layer_tensors(layer)
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes


class _Fields:
    """Typed reads of one JSON object; every miss is a CheckpointError that names file, field and value."""

    def __init__(self, values: dict[str, Any], source: str) -> None:
        self.values = values
        self.source = source

    def wrong(self, name: str, expected: str) -> CheckpointError:
        found = f"is {self.values[name]!r:.80}" if name in self.values else "is missing"
        return CheckpointError(f"{self.source}: `{name}` {found}; expected {expected}")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if type(value) is not int or not 0 < value <= MAX_DIMENSION:
            raise self.wrong(name, "a positive integer")
        return value

    def optional_integer(self, name: str) -> int | None:
        return None if self.values.get(name) is None else self.integer(name)

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= MAX_NUMBER:
            raise self.wrong(name, "a positive number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def nested(self, name: str) -> _Fields | None:
        value = self.values.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(name, "an object or null")
        return _Fields(value, f"{self.source}: `{name}`")


def _parse(fields: _Fields) -> ArchConfig:
    architecture = _architecture(fields)
    hidden, num_heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    num_layers = fields.integer("num_hidden_layers")
    rope_theta, rope_scaling = _rope(fields)
    attention_bias = fields.flag("attention_bias")
    if num_heads % num_kv_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of `num_attention_heads`, {num_heads}")
    return ArchConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, architecture, hidden, num_heads),
        max_position_embeddings=fields.integer("max_position_embeddings"),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        windows=_windows(fields, architecture, num_layers),
        qkv_bias=architecture == "Qwen2ForCausalLM" or (attention_bias and architecture != "MistralForCausalLM"),
        output_bias=attention_bias and architecture in ("LlamaForCausalLM", "Qwen3ForCausalLM"),
        mlp_bias=fields.flag("mlp_bias") and architecture == "LlamaForCausalLM",
        qk_norm=architecture == "Qwen3ForCausalLM",
        tie_word_embeddings=fields.flag("tie_word_embeddings"),
        dtype=_dtype(fields),
    )


def _architecture(fields: _Fields) -> str:
    named = fields.values.get("architectures")
    if not isinstance(named, list) or len(named) != 1 or named[0] not in ARCHITECTURES:
        raise fields.wrong("architectures", f"one of {', '.join(ARCHITECTURES)}")
    for name, expected in (("hidden_act", "silu"), ("quantization_config", None)):
        if fields.values.get(name, expected) != expected:
            raise fields.wrong(name, "silu, the only activation of these models" if expected else "none: serve the unquantized checkpoint")
    return str(named[0])


def _head_dim(fields: _Fields, architecture: str, hidden: int, num_heads: int) -> int:
    implied = 128 if architecture == "Qwen3ForCausalLM" else max(hidden // num_heads, 1)
    if architecture == "Qwen2ForCausalLM" and fields.values.get("head_dim") is None and hidden % num_heads:
        raise fields.wrong("hidden_size", f"a multiple of `num_attention_heads`, {num_heads}")
    head_dim = fields.integer("head_dim", implied)
    if head_dim % 2:
        raise fields.wrong("head_dim", "an even number: rotary embedding pairs its halves")
    return head_dim


def _windows(fields: _Fields, architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Mistral slides in every layer; Qwen only where `use_sliding_window` says so, from `max_window_layers` on; Llama never."""
    everywhere: tuple[int | None, ...] = (None,) * num_layers
    if architecture == "LlamaForCausalLM":
        return everywhere
    if "sliding_window" not in fields.values and architecture == "MistralForCausalLM":
        return (4096,) * num_layers  # what an absent field means there; null means none
    window = fields.optional_integer("sliding_window")
    if architecture == "MistralForCausalLM":
        return (window,) * num_layers
    if not fields.flag("use_sliding_window") or window is None:
        return everywhere
    kinds = fields.values.get("layer_types")
    if kinds is None:
        first = fields.values.get("max_window_layers", 28)
        if type(first) is not int or first < 0:
            raise fields.wrong("max_window_layers", "a layer's index")
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != num_layers or not all(kind in known for kind in kinds):
        raise fields.wrong("layer_types", f"{num_layers} of full_attention and sliding_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(fields: _Fields) -> tuple[float, Llama3Scaling | None]:
    """`rope_parameters` (transformers 5) or `rope_theta` beside `rope_scaling` (before)."""
    rope = fields.nested("rope_parameters") or fields.nested("rope_scaling")
    theta = fields.number("rope_theta", 10000.0)
    if rope is None:
        return theta, None
    theta = rope.number("rope_theta", theta)
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise rope.wrong("partial_rotary_factor", "1: these models rotate the whole head")
    key = "rope_type" if "rope_type" in rope.values else "type"
    kind = rope.values.get(key, "default")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise rope.wrong(key, "default or llama3")
    scaling = Llama3Scaling(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position_embeddings=rope.integer("original_max_position_embeddings"),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise rope.wrong("high_freq_factor", f"more than `low_freq_factor`, {scaling.low_freq_factor}")
    return theta, scaling


def _dtype(fields: _Fields) -> str | None:
    name = "dtype" if "dtype" in fields.values else "torch_dtype"
    value = fields.values.get(name)
    if value is None or value == "auto":
        return None
    if not isinstance(value, str) or value not in ITEM_BYTES:
        raise fields.wrong(name, f"one of {', '.join(ITEM_BYTES)}")
    return value
