"""How the demo looks: a table that lives on a terminal, plain lines elsewhere, and the summary at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from polymux.deploy.demo.summary import Record, Summary

MAX_ROWS = 14  # requests shown; the oldest finished ones leave first
STYLES = {"waiting": "yellow", "decoding": "cyan", "done": "green", "failed": "bold red"}


def screen(records: Sequence[Record], topology: Mapping[str, Any] | None) -> RenderableType:
    return Group(_workers(topology), _requests(records))


def _workers(topology: Mapping[str, Any] | None) -> Table:
    table = Table(title="workers", title_justify="left", expand=False)
    for name in ("worker", "state", "active model", "resident", "sequences", "KV blocks", "switches"):
        table.add_column(name, justify="right" if name in ("sequences", "KV blocks", "switches") else "left")
    for worker in (topology or {}).get("workers", ()):
        counters = worker["counters"]
        table.add_row(
            worker["worker_id"],
            worker["state"],
            worker["active_model"] or "-",
            " ".join(load["model"] for load in worker["loads"] if load["is_resident"]) or "-",
            str(sum(load["num_running"] + load["num_waiting"] for load in worker["loads"])),
            str(worker["num_blocks_out"]),
            f"{counters.get('model_switches', 0):.0f}",
        )
    return table


def _requests(records: Sequence[Record]) -> Table:
    table = Table(title=progress(records), title_justify="left", expand=False)
    for name in ("#", "model", "worker", "kind", "state", "TTFT", "TPOT", "tokens"):
        table.add_column(name, justify="right" if name in ("#", "TTFT", "TPOT", "tokens") else "left")
    for record in _shown(records):
        table.add_row(
            str(record.ask.number),
            record.ask.model,
            record.worker or "-",
            record.ask.kind,
            Text(record.state, style=STYLES.get(record.state, "")),
            milliseconds(record.ttft_s),
            milliseconds(record.tpot_s),
            str(record.num_tokens or "-"),
        )
    return table


def _shown(records: Sequence[Record]) -> list[Record]:
    """What is under way, and the latest that ended."""
    begun = [record for record in records if record.state != "planned"]
    ended = [record for record in begun if record.state in ("done", "failed")]
    room = max(MAX_ROWS - (len(begun) - len(ended)), 0)
    hidden = {record.ask.number for record in ended[: len(ended) - room]}
    return [record for record in begun if record.ask.number not in hidden][-MAX_ROWS:]


def progress(records: Sequence[Record]) -> str:
    """One line: how far the run is."""
    states = [record.state for record in records]
    tokens = sum(record.num_tokens for record in records)
    counts = " ".join(f"{states.count(state)} {state}" for state in ("waiting", "decoding", "done", "failed") if state in states)
    return f"{len(records)} requests: {counts or 'none sent'}; {tokens} tokens"


def milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.1f} ms"


def report(summary: Summary, answers: Mapping[str, Record]) -> RenderableType:
    """The end: one answer a model, then the figures."""
    panels = [
        Panel(Text(record.text.strip() or "(no text)"), title=f"{model}: {record.ask.text.strip()}", title_align="left")
        for model, record in answers.items()
    ]
    table = Table(title="summary", title_justify="left", show_header=False)
    for name, value in _figures(summary):
        table.add_row(name, value)
    return Group(*panels, table)


def _figures(summary: Summary) -> list[tuple[str, str]]:
    return [
        ("requests", f"{summary.num_requests - summary.num_failed} of {summary.num_requests} finished in {summary.seconds:.1f} s"),
        ("TTFT p50 / p95", f"{milliseconds(summary.ttft_p50_s)} / {milliseconds(summary.ttft_p95_s)}"),
        ("TPOT p50 / p95", f"{milliseconds(summary.tpot_p50_s)} / {milliseconds(summary.tpot_p95_s)}"),
        ("tokens", f"{summary.num_tokens}, {summary.tokens_per_s:.1f} a second"),
        ("SLO attainment", f"{summary.slo_attainment:.1%}"),
        ("model switches", f"{summary.switches}, {summary.loads} of them loads, {summary.evictions} evictions"),
        (
            "KV migrated",
            f"{summary.kv_bytes_migrated / 1e6:.1f} MB in {summary.transfers_committed} transfers, {summary.transfers_failed} failed",
        ),
        ("KV blocks out", str(summary.blocks_out)),
    ]
