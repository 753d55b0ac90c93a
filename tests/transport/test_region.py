"""Regions: shared without a copy, read-only to others, never shrinking; and where a block's layers lie in one."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np
import pytest

from polymux.transport.errors import ConfigError, GrantViolation
from polymux.transport.messages import KVLayout
from polymux.transport.region import BlockGrid, Region, drop_pages, grids_over, map_read_only, this_host
from polymux.transport.units import MIB

LAYOUT = KVLayout(num_layers=3, num_kv_heads=2, head_dim=4, dtype="bfloat16", block_size=2)


def test_what_is_written_here_is_read_through_the_descriptor_at_once() -> None:
    region = Region.create(10_000)
    fd = region.read_only_fd()
    view = map_read_only(fd, region.nbytes)
    os.close(fd)
    region.buffer[9_990:] = b"0123456789"
    assert bytes(view[9_990:]) == b"0123456789"
    region.close()
    assert bytes(view[9_990:]) == b"0123456789"  # the memory goes with its last view


def test_a_reader_cannot_write_and_nobody_can_shrink() -> None:
    region = Region.create(4096)
    fd = region.read_only_fd()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, 4096)
    assert map_read_only(fd, 4096).readonly
    assert region.fd is not None
    with pytest.raises(PermissionError):
        os.ftruncate(region.fd, 0)
    os.close(fd)
    region.close()


def test_a_region_that_could_shrink_or_is_smaller_than_it_claims_is_not_mapped() -> None:
    fd = os.memfd_create("loose")
    os.ftruncate(fd, 4096)
    with pytest.raises(ConfigError, match="not sealed"):
        map_read_only(fd, 4096)
    with pytest.raises(ConfigError, match="4096 bytes, not the 8192"):
        map_read_only(fd, 8192)
    os.close(fd)


def test_plain_memory_has_no_descriptor_to_hand_over() -> None:
    region = Region.wrap(bytearray(64))
    assert region.fd is None and region.nbytes == 64
    with pytest.raises(ConfigError, match="plain memory"):
        region.read_only_fd()


def shared_kib() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssShmem"))
    return int(line.split()[1])


def test_dropped_pages_leave_the_resident_size_and_come_back_when_read() -> None:
    region = Region.create(32 * MIB)
    fd = region.read_only_fd()
    view = map_read_only(fd, region.nbytes)
    os.close(fd)
    region.buffer[:] = b"\7" * region.nbytes
    before = shared_kib()
    assert np.frombuffer(view, dtype="u1").sum() == 7 * region.nbytes
    assert shared_kib() > before + 30_000
    drop_pages(view)
    assert shared_kib() < before + 2_000
    assert view[-1] == 7
    region.close()


@pytest.mark.parametrize("nbytes", [0, -1])
def test_an_empty_region_is_refused(nbytes: int) -> None:
    with pytest.raises(ConfigError):
        Region.create(nbytes)


def test_closing_gives_the_descriptor_back_and_may_be_repeated() -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    region = Region.create(4096)
    view = np.frombuffer(region.buffer, dtype="u1")
    region.close()
    region.close()
    assert view.sum() == 0
    del view
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_layer_of_a_block_is_one_range_where_the_layout_says() -> None:
    region = Region.wrap(bytearray(LAYOUT.block_bytes * 5 + 7))
    grid = BlockGrid(region.buffer, LAYOUT)
    assert grid.num_blocks == 5
    grid.view(2, 1, 3)[:] = bytes(range(2 * LAYOUT.layer_bytes))
    start = 2 * LAYOUT.block_bytes + LAYOUT.layer_bytes
    assert bytes(region.buffer[start : start + 2 * LAYOUT.layer_bytes]) == bytes(range(2 * LAYOUT.layer_bytes))
    assert grid.array[2, 1].tobytes() == bytes(range(LAYOUT.layer_bytes))


@pytest.mark.parametrize("block_id", [-1, 5])
def test_a_block_outside_the_grid_is_a_violation(block_id: int) -> None:
    grid = BlockGrid(memoryview(bytearray(LAYOUT.block_bytes * 5)), LAYOUT)
    with pytest.raises(GrantViolation, match=f"block {block_id}"):
        grid.check([0, block_id])


def test_grids_are_made_once_per_layout() -> None:
    grids = grids_over([memoryview(bytearray(LAYOUT.block_bytes))])
    assert grids.of(LAYOUT) is grids.of(LAYOUT)


def test_two_processes_of_one_kernel_share_a_host_id() -> None:
    assert this_host() == this_host() != ""
