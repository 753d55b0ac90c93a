"""Remapping a range of shared memory: it stays readable and writable, the rest stays shared."""

from __future__ import annotations

import mmap
import os

import torch

from polymux.actors.weights.huge_pages import HUGE_PAGE_BYTES, use_huge_pages


def test_the_remapped_range_is_private_and_the_rest_still_shared() -> None:
    nbytes = 4 * HUGE_PAGE_BYTES
    fd = os.memfd_create("arena")
    os.ftruncate(fd, nbytes)
    memory = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
    peer = torch.frombuffer(mmap.mmap(fd, nbytes), dtype=torch.uint8)
    os.close(fd)
    memory.fill_(1)
    weights = memory[: 3 * HUGE_PAGE_BYTES]
    remapped = use_huge_pages(weights)
    assert 2 * HUGE_PAGE_BYTES <= remapped <= 3 * HUGE_PAGE_BYTES
    assert int((weights == 0).sum()) == remapped
    memory.fill_(2)
    assert bool((memory == 2).all())
    assert int((peer == 1).sum()) == remapped
    assert bool((peer[3 * HUGE_PAGE_BYTES :] == 2).all())


def test_a_range_smaller_than_a_huge_page_is_left_alone() -> None:
    memory = torch.ones(HUGE_PAGE_BYTES - 1, dtype=torch.uint8)
    assert use_huge_pages(memory) == 0
    assert bool((memory == 1).all())
