"""The timeline in the trace event format, which Perfetto (ui.perfetto.dev) and chrome://tracing read.

A worker is a process, a kind of span a thread of it; spans of a kind that overlap get further threads, since complete events of one
thread must nest. Times are microseconds from the earliest span; `otherData` says when that was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from polymux.transport.messages import SpanKind

_KINDS = tuple(kind.value for kind in SpanKind)
_MAX_ROWS = 64  # of one kind; what overlaps more is drawn on the last, where a viewer may cut it short


def trace(timeline: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON object form of the format. `timeline` is the reply of `/v1/polymux/timeline`."""
    lanes = [(lane, timeline["now_s"] - lane["age_s"]) for lane in timeline["lanes"]]
    began_s = min((made_s - row[2] for lane, made_s in lanes for row in lane["spans"]), default=timeline["now_s"])
    events: list[dict[str, Any]] = []
    for pid, (lane, made_s) in enumerate(lanes, 1):
        events += _worker(pid, lane, made_s - began_s)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {"began_at_unix_s": began_s, "missing": [lane["worker_id"] for lane, _ in lanes if lane["missing"]]},
    }


def _worker(pid: int, lane: Mapping[str, Any], made_s: float) -> Iterator[dict[str, Any]]:
    name = f"{lane['worker_id']} (missing: {lane['missing']})" if lane["missing"] else lane["worker_id"]
    yield _named("process_name", pid, 0, name=name)
    yield _named("process_sort_index", pid, 0, sort_index=pid)
    for place, kind in enumerate(_KINDS):
        rows = sorted((row for row in lane["spans"] if row[0] == kind), key=lambda row: -row[2])
        ends: list[float] = []
        for row in rows:
            start_s = made_s - row[2]
            level = _level(ends, start_s, start_s + row[3])
            yield _event(pid, place * _MAX_ROWS + level + 1, row, start_s)
        for level in range(len(ends)):
            tid = place * _MAX_ROWS + level + 1
            yield _named("thread_name", pid, tid, name=kind if level == 0 else f"{kind} {level + 1}")
            yield _named("thread_sort_index", pid, tid, sort_index=tid)


def _level(ends: list[float], start_s: float, end_s: float) -> int:
    """The first row that is free by then, which is taken until the end."""
    for level, until_s in enumerate(ends):
        if until_s <= start_s + 1e-6:
            ends[level] = end_s
            return level
    if len(ends) < _MAX_ROWS:
        ends.append(end_s)
    return len(ends) - 1


def _event(pid: int, tid: int, row: Iterable[Any], start_s: float) -> dict[str, Any]:
    kind, model, _, seconds, nbytes, num_seqs, num_tokens, num_steps = row
    args = {"model": model, "nbytes": nbytes, "num_seqs": num_seqs, "num_tokens": num_tokens, "num_steps": num_steps}
    ts, dur = round(start_s * 1e6, 3), round(seconds * 1e6, 3)
    return {"ph": "X", "name": model, "cat": kind, "pid": pid, "tid": tid, "ts": max(ts, 0.0), "dur": dur, "args": args}


def _named(name: str, pid: int, tid: int, /, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "ts": 0, "args": args}
