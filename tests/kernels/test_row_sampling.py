"""A batch's sampling without a wait of the host is that of the CPU's sampler, to the bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polymux.kernels import row_sampling, sample
from polymux.kernels.philox import draw_words
from polymux.kernels.row_sampling import Edits, RowPick

from .picks import batches, edited_batches, expected, packed

CPU = torch.device("cpu")


@settings(max_examples=80, deadline=None)
@given(batch=batches(st.sampled_from([1, 2, 33, 257, 4000])))
def test_a_batch_is_sampled_as_its_rows_are(batch: tuple[Tensor, list[RowPick]]) -> None:
    logits, rows = batch
    kept = logits.clone()
    ids, is_finite = row_sampling.pick(logits, packed(rows, CPU))
    assert (ids.tolist(), is_finite.tolist()) == expected(logits, rows)
    assert torch.equal(logits, kept) or logits.isnan().any()


@settings(max_examples=30, deadline=None)
@given(seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), index=st.integers(0, 2**63 - 1))
def test_words_are_those_of_the_generator(seeds: list[int], index: int) -> None:
    picks = packed([RowPick(seed=seed, index=index) for seed in seeds], CPU)
    words = [word & 2**64 - 1 for word in row_sampling._words(picks).tolist()]
    assert words == draw_words(seeds, [index] * len(seeds))


@settings(max_examples=30, deadline=None)
@given(batch=edited_batches())
def test_edits_are_the_samplers_own(batch: tuple[Tensor, Edits, Tensor]) -> None:
    logits, edits, result = batch
    row_sampling.edit_(logits, edits)
    assert torch.equal(logits, result)


@settings(max_examples=30, deadline=None)
@given(batch=batches(st.sampled_from([1, 33, 257])), k=st.integers(1, 40))
def test_top_tells_equals_apart_by_id(batch: tuple[Tensor, list[RowPick]], k: int) -> None:
    logits = batch[0].nan_to_num(0.0, neginf=-torch.inf)
    for found, wanted in zip(row_sampling.top(logits, k), sample.top(logits, k), strict=True):
        assert torch.equal(found, wanted)


def test_normalizers_are_the_samplers_own() -> None:
    logits = torch.randn(5, 3000) * 4
    found = row_sampling.normalizers(*row_sampling.weight_sums(logits))
    assert found.tolist() == pytest.approx(sample.log_normalizers(logits, logits.amax(1)), abs=1e-12)
