"""One reply of every worker's spans: ages that add up whatever the hosts' clocks say, bounds, and workers that do not answer."""

from __future__ import annotations

import asyncio

import pytest

from polymux.cluster import timelines
from polymux.cluster.timelines import COLUMNS, MAX_SPANS, gather
from polymux.transport.errors import WorkerLost
from polymux.transport.messages import LookBack, Role, Span, SpanKind, WorkerTimeline
from polymux.transport.units import Epoch, ModelName, WorkerId

LOOK = LookBack(within_s=60.0, max_spans=1000)


def worker(number: int, *, delay_s: float = 0.0, fails: bool = False, seen: list[LookBack] | None = None) -> timelines.Ask:
    async def answer(look: LookBack) -> WorkerTimeline:
        if seen is not None:
            seen.append(look)
        await asyncio.sleep(delay_s)
        if fails:
            raise WorkerLost("its process is gone")
        span = Span(kind=SpanKind.SWITCH, model=ModelName("a"), began_s=2.5, ended_s=2.0, nbytes=7)
        return WorkerTimeline(worker_id=WorkerId(str(number)), epoch=Epoch(number), spans=(span,))

    return answer


async def test_a_worker_that_does_not_answer_is_shown_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timelines, "ANSWER_S", 0.05)
    asks = {
        WorkerId("well"): (Role.DECODE, worker(1)),
        WorkerId("silent"): (Role.DECODE, worker(2, delay_s=30)),
        WorkerId("dead"): (Role.DECODE, worker(3, fails=True)),
        WorkerId("young"): (Role.PREFILL, None),
    }
    lanes = (await gather(asks, LOOK))["lanes"]
    assert [lane["worker_id"] for lane in lanes] == list(asks)
    assert [lane["missing"] for lane in lanes] == [
        None,
        "it did not answer within 0.05 s",
        "its process is gone",
        "it is being started",
    ]
    assert lanes[0]["spans"] == [("switch", "a", 2.5, 0.5, 7, 0, 0, 1)]
    assert len(lanes[0]["spans"][0]) == len(COLUMNS)
    assert [len(lane["spans"]) for lane in lanes] == [1, 0, 0, 0]


async def test_ages_are_counted_from_halfway_between_question_and_answer() -> None:
    asks = {WorkerId("near"): (Role.DECODE, worker(1)), WorkerId("far"): (Role.DECODE, worker(2, delay_s=0.2))}
    near, far = (await gather(asks, LOOK))["lanes"]
    assert near["age_s"] == pytest.approx(0.2, abs=0.1) and near["uncertainty_s"] < 0.05
    assert far["age_s"] == pytest.approx(0.1, abs=0.08) and far["uncertainty_s"] == pytest.approx(0.1, abs=0.08)


async def test_a_reply_is_bounded_however_many_workers_share_it() -> None:
    seen: list[LookBack] = []
    many = {WorkerId(str(i)): (Role.DECODE, worker(i, seen=seen)) for i in range(64)}
    await gather(many, LookBack(within_s=1e9, max_spans=10**9))
    assert {look.max_spans for look in seen} == {MAX_SPANS // 64}
    assert {look.within_s for look in seen} == {timelines.MAX_SECONDS}
