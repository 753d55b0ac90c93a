"""The cases of `memory_bound.py`: an operation at the sizes of Llama 8B, the bytes it cannot do without, and torch's own way to do it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from polymux.kernels import reference
from polymux.kernels.gpu import blocks, pick, rms_norm, rotate_write, silu_mul
from polymux.kernels.paged import CacheShape
from polymux.kernels.row_sampling import Picks, RowPick, pack_picks
from polymux.kernels.sample import Draw

Run = Callable[[], object]
TOKENS, HIDDEN, INNER, HEADS, KV_HEADS, DIM, BLOCK = 16384, 4096, 14336, 32, 8, 128, 16
EPS = 1e-5
ROWS, VOCABULARY = 256, 151_936
ALL = slice(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    nbytes: int
    ours: Run
    torch: Run
    same: Callable[[], bool]  # whether ours, run once, gave what it should


def cases() -> Iterator[Case]:
    """One at a time: each takes up to 4 GiB, and gives it back."""
    yield from _norms()
    yield _activation()
    yield _rotation()
    yield from _block_copies()
    yield from _sampling()


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def is_close(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(found.float(), expected.float(), rtol=2e-2, atol=2e-2))


def _norms() -> Iterator[Case]:
    x, delta, weight = random(TOKENS, HIDDEN), random(TOKENS, HIDDEN), random(HIDDEN)
    yield Case(
        name="rms_norm",
        nbytes=2 * x.nbytes,
        ours=lambda: rms_norm.rms_norm(x, weight, EPS),
        torch=lambda: F.rms_norm(x, (HIDDEN,), weight, EPS),
        same=lambda: is_close(rms_norm.rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS)),
    )
    yield Case(
        name="add_rms_norm",
        nbytes=4 * x.nbytes,
        ours=lambda: rms_norm.add_rms_norm(x, delta, weight, EPS),
        torch=lambda: F.rms_norm(x.add_(delta), (HIDDEN,), weight, EPS),
        same=lambda: is_close(rms_norm.add_rms_norm(x.clone(), delta, weight, EPS), reference.add_rms_norm(x.clone(), delta, weight, EPS)),
    )


def _activation() -> Case:
    gate, up = random(TOKENS // 2, 2 * INNER).chunk(2, dim=1)
    return Case(
        name="silu_mul",
        nbytes=3 * gate.numel() * gate.element_size(),
        ours=lambda: silu_mul.silu_mul(gate, up),
        torch=lambda: F.silu(gate) * up,
        same=lambda: is_close(silu_mul.silu_mul(gate.clone(), up), reference.silu_mul(gate, up)),
    )


def _rotation() -> Case:
    shape = CacheShape(num_layers=4, num_kv_heads=KV_HEADS, block_size=BLOCK, head_dim=DIM)
    kv = random(TOKENS // BLOCK, 4, 2, KV_HEADS, BLOCK, DIM)
    rows, heads, table = shape.layer_rows(kv)[1], random(TOKENS, HEADS + 2 * KV_HEADS, DIM), random(TOKENS, DIM)
    positions = torch.arange(TOKENS, device="cuda", dtype=torch.int32)
    slots = (torch.randperm(TOKENS // BLOCK, device="cuda")[:, None] * BLOCK + torch.arange(BLOCK, device="cuda")).flatten().int()
    count = torch.tensor([TOKENS], device="cuda", dtype=torch.int32)
    places = (positions, slots, count, rows, shape)
    wide_positions, blocks_of, slots_of = positions.long(), (slots // BLOCK).long(), (slots % BLOCK).long()

    def by_torch(dtype: torch.dtype = heads.dtype) -> Tensor:
        cos, sin = table[wide_positions].to(dtype).unsqueeze(1).chunk(2, dim=-1)
        qk = reference.rotate(heads[:, : HEADS + KV_HEADS].to(dtype), torch.cat((cos, cos), dim=-1), sin)
        reference.kv_write(kv, 1, qk[:, HEADS:].to(kv.dtype), heads[:, HEADS + KV_HEADS :], blocks_of, slots_of)
        return qk[:, :HEADS]

    def same() -> bool:
        expected = by_torch(torch.float32)  # in bf16 its products are rounded one by one, and their difference may be all rounding
        expected_kv = kv.clone()
        kv.zero_()
        found = rotate_write.rotate_write(heads.clone(), None, EPS, table, *places)
        return is_close(found, expected) and is_close(kv[:, 1], expected_kv[:, 1])

    return Case(
        name="rotate_write",
        nbytes=2 * heads.nbytes + table.nbytes,
        ours=lambda: rotate_write.rotate_write(heads, None, EPS, table, *places),
        torch=by_torch,
        same=same,
    )


def _block_copies() -> Iterator[Case]:
    kv = random(2048, 8, 2, KV_HEADS, BLOCK, DIM)
    every = torch.randperm(len(kv), device="cuda").int()
    for name, ids, layers, heads in (
        ("whole", every[:1024], ALL, ALL),
        ("one_layer", every, slice(3, 4), ALL),
        ("half_the_heads", every, slice(2, 6), slice(4, 8)),
    ):
        slab = kv[:, layers, :, heads][ids.long()].contiguous()
        part, wide_ids = kv[:, layers, :, heads], ids.long()

        def gathers(ids: Tensor = ids, layers: slice = layers, heads: slice = heads, slab: Tensor = slab) -> bool:
            expected, found = slab.clone(), torch.zeros_like(slab)
            blocks.gather_blocks(kv, ids, found, layers, heads)
            return torch.equal(found, expected)

        def scatters(ids: Tensor = ids, layers: slice = layers, heads: slice = heads, slab: Tensor = slab) -> bool:
            expected = kv.clone()
            kv[:, layers, :, heads] = 0
            blocks.scatter_blocks(kv, ids, slab, layers, heads)
            return torch.equal(kv[ids.long()], expected[ids.long()])

        yield Case(
            name=f"gather_blocks.{name}",
            nbytes=2 * slab.nbytes,
            ours=lambda ids=ids, slab=slab, layers=layers, heads=heads: blocks.gather_blocks(kv, ids, slab, layers, heads),  # type: ignore[misc]
            torch=lambda part=part, ids=wide_ids: part[ids],  # type: ignore[misc]
            same=gathers,
        )
        yield Case(
            name=f"scatter_blocks.{name}",
            nbytes=2 * slab.nbytes,
            ours=lambda ids=ids, slab=slab, layers=layers, heads=heads: blocks.scatter_blocks(kv, ids, slab, layers, heads),  # type: ignore[misc]
            torch=lambda part=part, ids=wide_ids, slab=slab: part.index_copy_(0, ids, slab),  # type: ignore[misc]
            same=scatters,
        )


def _sampling() -> Iterator[Case]:
    logits = random(ROWS, VOCABULARY, dtype=torch.float32)
    greedy = picks_of([RowPick()] * ROWS)
    yield Case(
        name="pick.greedy",
        nbytes=logits.nbytes,
        ours=lambda: pick.pick(logits, greedy),
        torch=lambda: logits.argmax(1),
        same=lambda: torch.equal(pick.pick(logits, greedy)[0], logits.argmax(1)),
    )
    drawn = picks_of([RowPick(draw=Draw(word=0), seed=row) for row in range(ROWS)])
    yield Case(
        name="pick.drawn",
        nbytes=2 * logits.nbytes,
        ours=lambda: pick.pick(logits, drawn),
        torch=lambda: logits.softmax(1).multinomial(1),
        same=lambda: bool(pick.pick(logits, drawn)[1].all()),
    )


def picks_of(rows: list[RowPick]) -> Picks:
    words, draws, filters = pack_picks(rows)
    return Picks.of(torch.from_numpy(words).cuda(), draws=draws, filters=filters)
