"""The sampler's kernels against the CPU's sampler: the same tokens, to the bit."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.kernels import row_sampling, sample
from polymux.kernels.gpu import edit_logits, narrow
from polymux.kernels.gpu import pick as kernels
from polymux.kernels.row_sampling import Edits, RowPick
from polymux.kernels.sample import Draw

from ..picks import batches, edited_batches, expected, packed


@settings(max_examples=15, deadline=None)
@given(batch=batches(st.sampled_from([1, 2, 33, 257, 4096, 4097])), has_room=st.booleans())
def test_a_batch_is_sampled_as_the_cpu_samples_it(batch: tuple[Tensor, list[RowPick]], has_room: bool, device: torch.device) -> None:
    logits, rows = batch
    with patch.object(narrow, "CANDIDATES", narrow.CANDIDATES if has_room else 4):
        ids, is_finite = kernels.pick(logits.to(device), packed(rows, device))
    assert (ids.tolist(), is_finite.tolist()) == expected(logits, rows)


@pytest.mark.parametrize(
    "draw", [None, Draw(word=0), Draw(word=0, top_k=50), Draw(word=0, top_p=0.9), Draw(word=0, min_p=0.01, top_k=2000)]
)
def test_a_row_of_a_large_vocabulary(draw: Draw | None, device: torch.device) -> None:
    logits = torch.randn(1, 20_001, generator=torch.Generator().manual_seed(1)) * 6
    rows = [RowPick(draw=draw, seed=7, index=3)]
    ids, _ = kernels.pick(logits.to(device), packed(rows, device))
    assert ids.tolist() == expected(logits, rows)[0]


def test_strided_rows_are_read_where_they_lie(device: torch.device) -> None:
    wide = torch.randn(3, 700, generator=torch.Generator().manual_seed(2)).to(device)
    rows = [RowPick(), RowPick(draw=Draw(word=0), seed=1), RowPick(draw=Draw(word=0, top_p=0.5), seed=2)]
    ids, _ = kernels.pick(wide[:, :600], packed(rows, device))
    assert ids.tolist() == expected(wide[:, :600].cpu().contiguous(), rows)[0]


def test_no_rows_are_no_tokens(device: torch.device) -> None:
    ids, is_finite = kernels.pick(torch.empty(0, 9, device=device), packed([], device))
    assert ids.shape == is_finite.shape == (0,)


@pytest.mark.parametrize("size", [1, 4095, 5000])
def test_normalizers_are_the_cpu_samplers(size: int, device: torch.device) -> None:
    logits = torch.randn(3, size, generator=torch.Generator().manual_seed(size)) * 5
    logits[1, : size // 2] = -torch.inf
    found = row_sampling.normalizers(*kernels.weight_sums(logits.to(device)))
    assert found.tolist() == pytest.approx(sample.log_normalizers(logits, logits.amax(1)), abs=1e-12)


@settings(max_examples=15, deadline=None)
@given(batch=edited_batches())
def test_edits_are_the_samplers_own(batch: tuple[Tensor, Edits, Tensor], device: torch.device) -> None:
    logits, edits, result = batch
    assert edits.banned is not None
    assert edits.biased is not None
    assert edits.penalized is not None
    assert edits.penalties is not None
    found = logits.to(device)
    banned = (edits.banned[0].to(device), edits.banned[1].to(device))
    biased, penalized = ((x[0].to(device), x[1].to(device), x[2].to(device)) for x in (edits.biased, edits.penalized))
    edit_logits.edit_(found, Edits(banned=banned, biased=biased, penalized=penalized, penalties=edits.penalties.to(device)))
    assert torch.equal(found.cpu(), result)
