"""When a preempted sequence's KV is worth keeping."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from polymux.disagg.swap import SwapView, pays

LONG = SwapView(num_bytes=1000, free_host_bytes=1000, copy_s=0.001, recompute_s=0.1)
seconds = st.floats(0, 1e3)


def test_a_long_context_is_kept_and_a_very_short_one_is_computed_again() -> None:
    assert pays(LONG)
    assert not pays(replace(LONG, recompute_s=0.0015))


def test_what_the_host_tier_has_no_room_for_is_computed_again() -> None:
    assert not pays(replace(LONG, free_host_bytes=999))


@given(copy_s=seconds, recompute_s=seconds, free=st.integers(0, 2000), more=seconds)
def test_dearer_computing_cheaper_copies_and_more_room_never_speak_against_keeping(
    copy_s: float, recompute_s: float, free: int, more: float
) -> None:
    view = SwapView(num_bytes=1000, free_host_bytes=free, copy_s=copy_s, recompute_s=recompute_s)
    if pays(view):
        assert pays(replace(view, recompute_s=recompute_s + more, copy_s=copy_s / 2, free_host_bytes=free + 1))
