"""The demo's parts: what it asks, what it adds up, what it would call a failure, how it looks."""

from __future__ import annotations

import io
import math
from collections import Counter
from typing import Any

import pytest
from rich.console import Console

from polymux.deploy.demo.live import progress, report, screen
from polymux.deploy.demo.requests import Ask, plan
from polymux.deploy.demo.summary import Record, percentile, summarize

MODELS = ("a", "b", "c", "d")


def record(number: int, *, state: str = "done", ttft_s: float | None = 0.5, tokens: int = 11, model: str = "a") -> Record:
    """Sent at second `number`; ten more tokens in the second after the first."""
    ask = Ask(number=number, at_s=number, model=model, is_chat=True, is_streamed=ttft_s is not None, text="?", max_tokens=tokens)
    done = Record(ask, state=state, sent_s=float(number), num_tokens=tokens, text="an answer", finish_reason="stop")
    if ttft_s is not None:
        done.first_s = number + ttft_s
    done.last_s = number + (ttft_s or 0.0) + 1.0
    return done


def topology(**counters: float) -> dict[str, Any]:
    base = {"model_switches": 12.0, "model_loads": 7.0}
    worker = {"worker_id": "decode-0", "role": "decode", "state": "alive", "active_model": "a", "num_blocks_out": 0}
    transfers = {"kv_transfer_bytes": 4096.0, "kv_transfers_committed": 3.0, "kv_transfers_failed": 0.0}
    load = {"model": "a", "is_resident": True, "num_running": 1, "num_waiting": 0}
    return {
        "workers": [
            {**worker, "loads": [load], "counters": transfers | counters},
            {**worker, "worker_id": "prefill-0", "role": "prefill", "loads": [], "counters": transfers},
        ],
        "models": [{"num_finished": 3, "num_attained": 2}, {"num_finished": 1, "num_attained": 1}],
        "stats": {"num_blocks_out": 0, "counters": base | counters},
    }


def test_the_plan_is_the_same_each_time_and_asks_every_model_as_often() -> None:
    asks = plan(MODELS, num_requests=40, seconds=10.0)
    assert asks == plan(MODELS, num_requests=40, seconds=10.0) != plan(MODELS, num_requests=40, seconds=10.0, seed=1)
    assert set(Counter(ask.model for ask in asks).values()) == {10}
    assert {(ask.is_chat, ask.is_streamed) for ask in asks} == {(True, True), (True, False), (False, True), (False, False)}
    times = [ask.at_s for ask in asks]
    assert times == sorted(times) and times[0] == 0.0 and times[-1] <= 10.0


def test_a_summary_adds_up_what_clients_and_workers_saw() -> None:
    summary = summarize([record(0), record(1, ttft_s=0.7), record(2, ttft_s=None)], topology())
    assert summary.num_requests == 3 and summary.num_failed == 0 and summary.num_tokens == 33
    assert summary.seconds == pytest.approx(3.0) and summary.tokens_per_s == pytest.approx(11.0)
    assert (summary.ttft_p50_s, summary.ttft_p95_s) == pytest.approx((0.5, 0.7))
    assert summary.tpot_p50_s == pytest.approx(0.1)
    assert summary.slo_attainment == 0.75
    assert (summary.transfers_committed, summary.kv_bytes_migrated) == (3, 4096), "each transfer is counted by one side"
    assert summary.faults() == []


@pytest.mark.parametrize(
    ("records", "seen", "fault"),
    [
        ([record(0), record(1, state="failed")], topology(), "1 of 2 requests failed"),
        ([record(0)], topology(model_switches=9.0), "9 model switches"),
        ([record(0)], topology(kv_transfers_failed=1.0), "1 KV transfers failed"),
        ([record(0)], topology(kv_transfers_committed=0.0), "no KV was migrated"),
        ([record(0)], topology() | {"stats": {"num_blocks_out": 2, "counters": {"model_switches": 10}}}, "2 KV blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_went_wrong_is_a_fault(records: list[Record], seen: dict[str, Any], fault: str) -> None:
    (found,) = summarize(records, seen).faults()
    assert fault in found


def test_percentiles_are_of_values_that_were_seen() -> None:
    values = [float(value) for value in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.95), percentile([7.0], 0.95)) == (50.0, 95.0, 7.0)
    assert math.isnan(percentile([], 0.5))


def test_the_screen_shows_what_is_under_way_and_the_latest_that_ended() -> None:
    records = [record(number, state="done") for number in range(30)] + [
        record(30, state="decoding", model="now"),
        record(31, state="planned"),
    ]
    file = io.StringIO()
    console = Console(file=file, width=140)
    console.print(screen(records, topology()), report(summarize(records[:30], topology()), {"a": records[0]}), progress(records))
    text = file.getvalue()
    assert "now" in text and "decode-0" in text and "│ 29 │" in text.replace("┃", "│") and "│  0 │" not in text
    assert "an answer" in text and "TTFT p50 / p95" in text and "1 decoding" in text


def test_the_screen_works_before_anything_is_known() -> None:
    file = io.StringIO()
    Console(file=file, width=80).print(screen([], None))
    assert "none sent" in file.getvalue()
