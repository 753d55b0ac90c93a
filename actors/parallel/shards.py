"""What each rank of an instance computes with: the shape of its share of a decoder, and its cut of every weight. Pure.

Query and KV heads, the rows of the MLP's inner layer and the vocabulary are split evenly; KV heads are repeated where there are more ranks
than heads; the vocabulary is padded with zero rows to a multiple of the ranks. All ranks' shares have one shape, so that weights and KV
lie at the same offsets everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.weights.parts import EMBEDDING, HEAD
from polymux.transport.errors import ConfigError, LayoutMismatch
from polymux.transport.head_slices import heads_of, sharded
from polymux.transport.messages import Shard

_BY_ROWS = frozenset({"gate", "gate_bias", "up", "up_bias"})  # column-parallel: each rank makes its part of the output
_BY_COLUMNS = frozenset({"output", "down"})  # row-parallel: each rank has its part of the input, and the products are summed
_BY_HEADS = frozenset({"qkv", "qkv_bias", "head_norms"})
_BY_VOCABULARY = frozenset({EMBEDDING, HEAD})


def rank_config(config: ArchConfig, num_ranks: int) -> ArchConfig:
    """The decoder that each rank runs. Raises ConfigError, which names the size that cannot be split."""
    for name in ("num_heads", "intermediate_size"):
        if getattr(config, name) % num_ranks:
            raise ConfigError(f"{name}={getattr(config, name)} is no multiple of tensor_parallel={num_ranks}; take a divisor of it")
    try:
        kv = sharded(config.kv_layout("float32"), num_ranks)
    except LayoutMismatch as error:
        raise ConfigError(f"tensor_parallel={num_ranks}: {error}") from error
    return replace(
        config,
        num_heads=config.num_heads // num_ranks,
        num_kv_heads=kv.rank_kv_heads,
        intermediate_size=config.intermediate_size // num_ranks,
        vocab_size=rank_vocab(config.vocab_size, num_ranks),
    )


def rank_vocab(vocab_size: int, num_ranks: int) -> int:
    """Rows of the embedding, and of the head, that each rank has; the last ranks' may be padding."""
    return -(-vocab_size // num_ranks)


def whole_rows(parts: Sequence[Tensor], vocab_size: int) -> Tensor:
    """Logits [R, vocab_size] of every rank's [R, rank_vocab], without padding, contiguous."""
    size = parts[0].shape[1]
    return torch.cat([part[:, : max(vocab_size - rank * size, 0)] for rank, part in enumerate(parts)], dim=1)


def cut(config: ArchConfig, name: str, tensor: Tensor, shard: Shard) -> Tensor:
    """A rank's part of one entry of the whole model's image, contiguous; `tensor` itself where every rank has all of it."""
    field = name.rpartition(".")[2]
    if shard.num_ranks == 1:
        return tensor
    if field in _BY_ROWS:
        return _share(tensor, 0, shard).contiguous()
    if field in _BY_COLUMNS:
        return _share(tensor, 1, shard).contiguous()
    if field in _BY_HEADS:
        return _cut_heads(config, tensor, shard)
    if name in _BY_VOCABULARY:
        return _cut_vocabulary(config, tensor, shard)
    return tensor


def _share(tensor: Tensor, dim: int, shard: Shard) -> Tensor:
    size = tensor.shape[dim] // shard.num_ranks
    return tensor.narrow(dim, shard.rank * size, size)


def _cut_heads(config: ArchConfig, tensor: Tensor, shard: Shard) -> Tensor:
    """Rows of q, k and, where the tensor has them, v: `head_dim` rows a head."""
    held = heads_of(sharded(config.kv_layout("float32"), shard.num_ranks), shard.rank)
    q_size, kv_size, head_dim = config.q_size, config.kv_size, config.head_dim
    parts = [_share(tensor[:q_size], 0, shard)]
    parts += [tensor[start + held.start * head_dim : start + held.stop * head_dim] for start in range(q_size, tensor.shape[0], kv_size)]
    return torch.cat(parts)


def _cut_vocabulary(config: ArchConfig, tensor: Tensor, shard: Shard) -> Tensor:
    num_rows = rank_vocab(config.vocab_size, shard.num_ranks)
    rows = tensor[shard.rank * num_rows : (shard.rank + 1) * num_rows]
    missing = num_rows - rows.shape[0]
    return torch.cat((rows, rows.new_zeros(missing, rows.shape[1]))) if missing else rows
