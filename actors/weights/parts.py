"""What a weight image is made of: its entries in the order in which a step reads them, each a join of checkpoint tensors.

Projections that read the same input are joined (q, k, v), so a layer costs few products. The names are those of `decoder.LayerWeights`.
"""

from __future__ import annotations

from dataclasses import dataclass

from polymux.actors.models.config import ArchConfig

EMBEDDING, FINAL_NORM, HEAD = "embedding", "final_norm", "head"


@dataclass(frozen=True, slots=True)
class Part:
    """One entry: the checkpoint tensors `sources`, end to end along their first dimension. `is_linear` ones may be packed."""

    name: str
    sources: tuple[str, ...]
    is_linear: bool = False


def parts_of(config: ArchConfig) -> tuple[tuple[Part, ...], ...]:
    """The image's groups: what comes before the layers, each layer, what comes after. A tied head comes first: it is the embedding too."""
    table = "model.embed_tokens.weight"
    first = Part(HEAD if config.tie_word_embeddings else EMBEDDING, (table,), is_linear=config.tie_word_embeddings)
    last = [Part(FINAL_NORM, ("model.norm.weight",))]
    if not config.tie_word_embeddings:
        last.append(Part(HEAD, ("lm_head.weight",), is_linear=True))
    return ((first,), *(_layer(config, layer) for layer in range(config.num_layers)), tuple(last))


def layer_entry(layer: int, field: str) -> str:
    return f"layers.{layer}.{field}"


def _layer(config: ArchConfig, layer: int) -> tuple[Part, ...]:
    prefix = f"model.layers.{layer}."

    def vector(field: str, *sources: str) -> Part:
        return Part(layer_entry(layer, field), tuple(prefix + source for source in sources))

    def linear(field: str, has_bias: bool, *sources: str) -> list[Part]:
        weight = Part(layer_entry(layer, field), tuple(f"{prefix}{source}.weight" for source in sources), is_linear=True)
        bias = vector(f"{field}_bias", *(f"{source}.bias" for source in sources))
        return [weight, bias] if has_bias else [weight]

    norms = ["self_attn.q_norm.weight"] * config.num_heads + ["self_attn.k_norm.weight"] * config.num_kv_heads
    return (
        vector("input_norm", "input_layernorm.weight"),
        *linear("qkv", config.qkv_bias, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        *([vector("head_norms", *norms)] if config.qk_norm else []),
        *linear("output", config.output_bias, "self_attn.o_proj"),
        vector("post_norm", "post_attention_layernorm.weight"),
        *linear("gate", config.mlp_bias, "mlp.gate_proj"),
        *linear("up", config.mlp_bias, "mlp.up_proj"),
        *linear("down", config.mlp_bias, "mlp.down_proj"),
    )
