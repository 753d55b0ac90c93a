"""Copies of memory: they may overlap, and large pieces are used only where they pay and leave several."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from polymux.transport import bulk_copy
from polymux.transport.bulk_copy import LONG_PIECE_BYTES, PIECE_BYTES, TUNABLES, copy_bytes, piece_bytes
from polymux.transport.units import MIB


def test_ranges_that_overlap_are_copied_as_if_they_did_not() -> None:
    for shift in (-3, 3):
        data = bytearray(range(20))
        expected = bytes(data[5:15])
        view = memoryview(data)
        copy_bytes(view[5 + shift : 15 + shift], view[5:15])
        assert bytes(data[5 + shift : 15 + shift]) == expected


def test_other_lengths_and_read_only_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot copy"):
        copy_bytes(memoryview(bytearray(4)), memoryview(bytes(5)))
    with pytest.raises(ValueError, match="read-only"):
        copy_bytes(memoryview(bytes(4)), memoryview(bytes(4)))


@pytest.mark.parametrize(
    ("threshold", "nbytes", "expected"),
    [
        (None, 16 * MIB, PIECE_BYTES),
        (None, 640 * MIB, 10 * MIB),
        (None, 4096 * MIB, LONG_PIECE_BYTES),
        (MIB, 256 * MIB, PIECE_BYTES),
        (180 * MIB, 1024 * MIB, 180 * MIB),
        (180 * MIB, 512 * MIB, 8 * MIB),
    ],
)
def test_pieces_are_as_large_as_the_fast_copy_needs_if_the_image_has_four_of_them(
    monkeypatch: pytest.MonkeyPatch, threshold: int | None, nbytes: int, expected: int
) -> None:
    monkeypatch.setattr(bulk_copy, "around_cache_bytes", lambda: threshold)
    assert piece_bytes(nbytes) == expected


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc", reason="glibc's threshold on x86")
def test_a_process_that_starts_with_the_tunables_copies_pieces_around_the_cache() -> None:
    code = "from polymux.transport.bulk_copy import around_cache_bytes; print(around_cache_bytes())"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **TUNABLES}, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= PIECE_BYTES // 16
