"""A worker's timeline: bounded, cheap, readable while it is written."""

from __future__ import annotations

import threading
import timeit

import pytest

from polymux.actors.timeline import MERGED_S, Timeline
from polymux.transport.messages import SpanKind


class Clock:
    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


def test_steps_of_one_turn_become_one_span_and_others_stay_apart() -> None:
    timeline = Timeline(Clock(1003.0))
    for step in range(10):
        timeline.add(SpanKind.DECODE, "a", 1000 + step / 100, 1000 + (step + 1) / 100, num_seqs=step % 3, num_tokens=2)
    timeline.add(SpanKind.KV_IN, "b", 1000.05, 1000.1, nbytes=4096, num_seqs=1)
    timeline.add(SpanKind.DECODE, "a", 1000.1, 1000.11, num_seqs=1, num_tokens=1)
    timeline.add(SpanKind.DECODE, "b", 1000.12, 1000.2, num_seqs=1, num_tokens=1)
    timeline.add(SpanKind.DECODE, "a", 1000.2, 1000.3, num_seqs=1, num_tokens=1)
    merged, arrived, other, again = timeline.spans(within_s=60)
    assert (merged.kind, merged.model, merged.num_steps, merged.num_tokens, merged.num_seqs) == (SpanKind.DECODE, "a", 11, 21, 2)
    assert (merged.began_s, merged.ended_s) == pytest.approx((3.0, 2.89))
    assert (arrived.kind, arrived.nbytes) == (SpanKind.KV_IN, 4096)
    assert (other.model, again.model) == ("b", "a")


def test_a_merged_span_ends_at_a_pause_and_after_its_longest_time() -> None:
    timeline = Timeline(Clock(1010.0))
    for step in range(300):  # 3 s without a pause
        timeline.add(SpanKind.DECODE, "a", 1000 + step / 100, 1000 + (step + 1) / 100)
    timeline.add(SpanKind.DECODE, "a", 1004.0, 1004.01)
    lengths = [span.began_s - span.ended_s for span in timeline.spans(within_s=60)]
    assert len(lengths) in (4, 5)
    assert max(lengths) <= MERGED_S + 1e-9
    assert sum(lengths) == pytest.approx(3.01)


def test_the_active_model_is_a_span_while_it_is_active() -> None:
    clock = Clock(1000.0)
    timeline = Timeline(clock)
    timeline.activated("a", 1000.0)
    timeline.activated("b", 1002.0)
    clock.now_s = 1005.0
    first, second = timeline.spans(within_s=60)
    assert (first.kind, first.model, first.began_s, first.ended_s) == (SpanKind.ACTIVE, "a", 5.0, 3.0)
    assert (second.model, second.began_s, second.ended_s) == ("b", 3.0, 0.0)
    timeline.activated(None, 1005.0)
    clock.now_s = 1006.0
    assert timeline.spans(within_s=60)[-1].ended_s == 1.0


def test_only_the_newest_spans_are_kept_and_only_recent_ones_are_told() -> None:
    clock = Clock(1000.0)
    timeline = Timeline(clock, max_spans=8)
    for i in range(20):
        timeline.add(SpanKind.KV_OUT, "a", 1000.0 + i, 1000.5 + i)
    clock.now_s = 1020.0
    assert [span.began_s for span in timeline.spans(within_s=60)] == [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    assert [span.began_s for span in timeline.spans(within_s=60, max_spans=2)] == [2.0, 1.0]
    assert [span.began_s for span in timeline.spans(within_s=2.6)] == [3.0, 2.0, 1.0]
    assert timeline.spans(within_s=60, max_spans=0) == ()


def test_threads_may_write_while_others_read() -> None:
    timeline = Timeline(max_spans=64)

    def write(kind: SpanKind) -> None:
        for _ in range(2000):
            timeline.add(kind, "a", timeline.clock(), timeline.clock())

    threads = [threading.Thread(target=write, args=(kind,)) for kind in (SpanKind.DECODE, SpanKind.KV_IN, SpanKind.SWAP_OUT)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert len(timeline.spans(within_s=60)) <= 64
    for thread in threads:
        thread.join()
    assert len(timeline.spans(within_s=60)) == 64


def test_a_record_costs_the_engine_thread_less_than_five_microseconds() -> None:
    timeline = Timeline()

    def record() -> None:
        now_s = timeline.clock()
        timeline.add(SpanKind.DECODE, "a", now_s - 0.01, now_s, num_seqs=8, num_tokens=8)
        timeline.add(SpanKind.KV_IN, "a", now_s - 0.01, now_s, nbytes=1)

    assert min(timeit.repeat(record, number=2000, repeat=7)) / 4000 < 5e-6
