"""A rank's share of a model: what all ranks have together is the model, whatever its heads, its vocabulary and the number of ranks."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.actors.models.config import ArchConfig
from polymux.actors.parallel.shards import cut, rank_config, rank_vocab, whole_rows
from polymux.actors.weights.builder import build_images
from polymux.actors.weights.checkpoint import Checkpoint
from polymux.actors.weights.image import ImageManifest
from polymux.actors.weights.parts import EMBEDDING, HEAD, layer_entry
from polymux.transport.errors import ConfigError
from polymux.transport.messages import Shard

CONFIG = ArchConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=37,
    hidden_size=6,
    intermediate_size=16,
    num_layers=1,
    num_heads=8,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    windows=(None,),
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tie_word_embeddings=False,
    dtype="float32",
)


def shards(num_ranks: int) -> list[Shard]:
    return [Shard(rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]


def all_cuts(config: ArchConfig, name: str, tensor: Tensor, num_ranks: int) -> list[Tensor]:
    return [cut(config, name, tensor, shard) for shard in shards(num_ranks)]


degrees = st.sampled_from([1, 2, 4, 8])


@settings(deadline=None)
@given(degrees, st.integers(1, 40))
def test_the_vocabulary_is_split_with_zero_rows_behind_it(num_ranks: int, vocab_size: int) -> None:
    config = replace(CONFIG, vocab_size=vocab_size)
    table = torch.rand(vocab_size, 6)
    for name in (EMBEDDING, HEAD):
        parts = all_cuts(config, name, table, num_ranks)
        assert {part.shape for part in parts} == {(rank_config(config, num_ranks).vocab_size, 6)}
        joined = torch.cat(parts)
        assert torch.equal(joined[:vocab_size], table)
        assert not joined[vocab_size:].any()


@settings(deadline=None)
@given(degrees)
def test_inner_rows_and_their_columns_are_the_same_ones(num_ranks: int) -> None:
    rows, columns = torch.rand(16, 6), torch.rand(6, 16)
    assert torch.equal(torch.cat(all_cuts(CONFIG, layer_entry(0, "gate"), rows, num_ranks)), rows)
    assert torch.equal(torch.cat(all_cuts(CONFIG, layer_entry(0, "down"), columns, num_ranks), dim=1), columns)
    x = torch.rand(3, 6)
    gates, downs = (all_cuts(CONFIG, layer_entry(0, f), t, num_ranks) for f, t in (("up", rows), ("down", columns)))
    product = sum(((x @ gate.T) @ down.T for gate, down in zip(gates, downs, strict=True)), torch.zeros(3, 6))
    torch.testing.assert_close(product, (x @ rows.T) @ columns.T)


@settings(deadline=None)
@given(degrees, st.sampled_from([1, 2, 4, 8]))
def test_each_query_head_lies_with_its_kv_head(num_ranks: int, num_kv_heads: int) -> None:
    """Rows of the joined q, k, v weight are told apart by head: a rank's q heads use the k and v heads that it has."""
    config = replace(CONFIG, num_kv_heads=num_kv_heads)
    q = torch.arange(8).repeat_interleave(4)
    k = torch.arange(num_kv_heads).repeat_interleave(4)
    joined = torch.cat((q, 100 + k, 200 + k))[:, None].expand(-1, 6)
    seen: list[int] = []
    for part in all_cuts(config, layer_entry(0, "qkv"), joined, num_ranks):
        own = rank_config(config, num_ranks)
        heads = part[:, 0].view(-1, 4)[:, 0].tolist()
        qs, ks, vs = heads[: own.num_heads], heads[own.num_heads : own.num_heads + own.num_kv_heads], heads[-own.num_kv_heads :]
        assert [head - 100 for head in ks] == [head - 200 for head in vs]
        assert [ks[i // own.group_size] - 100 for i in range(own.num_heads)] == [head // config.group_size for head in qs]
        seen += qs
    assert seen == list(range(8))


def test_what_all_ranks_need_is_not_cut() -> None:
    vector = torch.rand(6)
    for field in ("input_norm", "post_norm", "output_bias", "down_bias"):
        assert all_cuts(CONFIG, layer_entry(0, field), vector, 4)[3] is vector


@pytest.mark.parametrize(
    ("change", "named"),
    [({"num_heads": 6}, "num_heads=6"), ({"intermediate_size": 18}, "intermediate_size=18"), ({"num_kv_heads": 3}, "3 KV")],
)
def test_a_model_that_ranks_cannot_share_is_refused_by_the_size_that_is_wrong(change: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        rank_config(replace(CONFIG, **change), 4)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3-tied"])
@pytest.mark.parametrize(("layout", "dtype"), [("plain", "float32"), ("onednn", "bfloat16")])
def test_the_ranks_images_have_one_shape_and_one_digest(name: str, layout: str, dtype: str, checkpoint_of: Callable[..., Path]) -> None:
    checkpoint = Checkpoint.open(checkpoint_of(name, dtype))
    fds = [os.memfd_create(f"image-{rank}") for rank in range(4)]
    whole = os.memfd_create("whole")
    try:
        manifests = build_images(checkpoint, fds, dtype=dtype, layout=layout)
        (one,) = build_images(checkpoint, [whole], dtype=dtype, layout=layout)
        assert [m.shard for m in manifests] == shards(4)
        assert {m.digest for m in manifests} == {one.digest}
        assert len({(m.nbytes, m.groups, tuple((e.name, e.offset, e.nbytes) for e in m.entries)) for m in manifests}) == 1
        assert manifests[0].nbytes < 0.6 * one.nbytes
        assert [ImageManifest.from_bytes(m.to_bytes()) for m in manifests] == list(manifests)
    finally:
        for fd in (*fds, whole):
            os.close(fd)


@given(st.integers(1, 40), st.integers(1, 6))
def test_logits_of_all_ranks_are_the_models_in_one_piece(vocab_size: int, num_ranks: int) -> None:
    size = rank_vocab(vocab_size, num_ranks)
    padded = torch.arange(3 * size * num_ranks).view(3, -1).float()
    found = whole_rows(padded.split(size, dim=1), vocab_size)
    assert torch.equal(found, padded[:, :vocab_size]) and found.is_contiguous()
