"""`polymux demo`: four models on three workers that hold two each, asked all at once through the SDK, watched while they take turns."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.live import Live

from polymux.cluster.config import ClusterConfig
from polymux.deploy.cli_serve import serving
from polymux.deploy.client import AsyncClient
from polymux.deploy.demo.check import Comparison, compare
from polymux.deploy.demo.live import progress, report, screen
from polymux.deploy.demo.requests import Ask, plan
from polymux.deploy.demo.summary import Record, Summary, summarize
from polymux.transport.errors import PolymuxError

CONFIG = Path(__file__).parent / "demo.yaml"
REQUEST_S = 60.0  # a request that takes longer has failed
LOOK_S = 0.25  # between two looks at the cluster, and two drawings
LINE_S = 2.0  # between two lines where there is no terminal
SNAPSHOT_S = 0.5  # how old the front door's picture of the cluster may be
SETTLE_S = 10.0  # for the last reports of the workers to come in


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    num_requests: int = 48
    seconds: float = 10.0  # in which they arrive
    seed: int = 0
    is_checked: bool = False  # against transformers
    json_path: Path | None = None


def run(options: DemoOptions, console: Console) -> int:
    """0 when all went as it should; else 1, and why."""
    config = ClusterConfig.load(CONFIG, overrides=["serve.port=0"])
    asks = plan([model.name for model in config.models], num_requests=options.num_requests, seconds=options.seconds, seed=options.seed)
    console.print(f"starting Ray, {config.pools.prefill.workers} prefill and {config.pools.decode.workers} decode workers ...")
    began_s = time.monotonic()
    with serving(config) as url:
        console.print(
            f"serving {', '.join(model.name for model in config.models)} on {url} after {time.monotonic() - began_s:.1f} s", soft_wrap=True
        )
        records, summary = asyncio.run(_drive(url, asks, console))
    comparison = compare(records, {model.name: model.path for model in config.models}) if options.is_checked else None
    faults = summary.faults() + _differences(comparison)
    console.print(report(summary, _answers(records)))
    if comparison is not None:
        console.print(f"transformers: {comparison.num_identical} answers identical, {len(comparison.different)} different")
    if options.json_path is not None:
        options.json_path.write_text(json.dumps(_as_json(summary, comparison, faults), indent=2) + "\n")
    for record in records:
        if record.error:
            console.print(f"request {record.ask.number} ({record.ask.model}) failed: {record.error}", style="red", markup=False)
    for fault in faults:
        console.print(f"failed: {fault}", style="bold red", markup=False)
    return 1 if faults else 0


async def _drive(url: str, asks: Sequence[Ask], console: Console) -> tuple[list[Record], Summary]:
    records = [Record(ask) for ask in asks]
    async with AsyncClient(url, timeout_s=REQUEST_S) as client:
        watcher = asyncio.create_task(_watch(client, records, console))
        began_s = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for record in records:
                group.create_task(_send(client, record, began_s))
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        return records, summarize(records, await _settled(client, records))


async def _send(client: AsyncClient, record: Record, began_s: float) -> None:
    """One request at its time, from beginning to end; an error is written down, not raised."""
    ask = record.ask
    await asyncio.sleep(max(began_s + ask.at_s - time.monotonic(), 0.0))
    record.state, record.sent_s = "waiting", time.monotonic()
    try:
        await (_stream(client, record) if ask.is_streamed else _whole(client, record))
        record.state = "done"
    except PolymuxError as error:
        record.state, record.error = "failed", f"{type(error).__name__}: {error}"


async def _stream(client: AsyncClient, record: Record) -> None:
    ask = record.ask
    begin = client.stream_chat if ask.is_chat else client.stream_complete
    async with begin(ask.model, ask.text, max_tokens=ask.max_tokens, temperature=0) as stream:
        async for chunk in stream:
            if chunk.text:
                record.state, record.last_s = "decoding", time.monotonic()
                record.first_s = record.first_s or record.last_s
                record.text += chunk.text
                record.num_tokens += 1
        record.num_tokens = stream.usage.completion_tokens if stream.usage else record.num_tokens
        record.finish_reason = stream.finish_reason or ""


async def _whole(client: AsyncClient, record: Record) -> None:
    ask = record.ask
    call = client.chat if ask.is_chat else client.complete
    result = await call(ask.model, ask.text, max_tokens=ask.max_tokens, temperature=0)
    record.text, record.num_tokens, record.last_s = result.text, result.usage.completion_tokens, time.monotonic()
    record.finish_reason = result.finish_reason or ""


async def _watch(client: AsyncClient, records: Sequence[Record], console: Console) -> None:
    """Draw until cancelled: a table that lives on a terminal, a line now and then elsewhere."""
    topology: dict[str, Any] | None = None
    if not console.is_terminal:
        while True:
            await asyncio.sleep(LINE_S)
            console.print(progress(records), markup=False)
    with Live(screen(records, topology), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        try:
            while True:
                topology = await _look(client, records) or topology
                live.update(screen(records, topology), refresh=True)
                await asyncio.sleep(LOOK_S)
        finally:
            live.update(screen(records, topology), refresh=True)


async def _look(client: AsyncClient, records: Sequence[Record]) -> dict[str, Any] | None:
    """The cluster now. Every request sent is given the decode workers that run its model, or that had it at hand when it ended."""
    try:
        topology = await client.topology()
    except PolymuxError:
        return None
    loads = [(load, worker["worker_id"]) for worker in topology["workers"] if worker["role"] == "decode" for load in worker["loads"]]
    for record in records:
        if record.state == "planned" or (record.state in ("done", "failed") and record.worker):
            continue
        mine = [(load, worker_id) for load, worker_id in loads if load["model"] == record.ask.model]
        busy = [worker_id for load, worker_id in mine if load["num_running"] + load["num_waiting"]]
        resident = [worker_id for load, worker_id in mine if load["is_resident"]]
        record.worker = " or ".join(busy or resident) or record.worker
    return topology


async def _settled(client: AsyncClient, records: Sequence[Record]) -> dict[str, Any]:
    """The cluster once every worker has reported the end, or as it is when that takes too long."""
    num_done = sum(record.state == "done" for record in records)
    ended_s = time.monotonic()
    while True:
        topology = await client.topology()
        stats, waited_s = topology["stats"], time.monotonic() - ended_s
        is_settled = not stats["num_blocks_out"] and not stats["num_inflight"] and stats["outcomes"].get("finished", 0) >= num_done
        ages_s = [worker["report_age_s"] for worker in topology["workers"]]
        is_fresh = all(age_s is not None and age_s + SNAPSHOT_S < waited_s for age_s in ages_s)
        if (is_settled and is_fresh) or waited_s > SETTLE_S:
            return topology
        await asyncio.sleep(LOOK_S / 2)


def _answers(records: Sequence[Record]) -> dict[str, Record]:
    """One answer of each model: a chat that came to its own end and that no model before was asked, long rather than short."""
    found: dict[str, Record] = {}
    for model in sorted({record.ask.model for record in records}):
        asked = {record.ask.text for record in found.values()}
        done = [record for record in records if record.ask.model == model and record.state == "done"]
        if done:
            found[model] = max(
                done,
                key=lambda r: (r.ask.is_chat, r.finish_reason == "stop", r.ask.text not in asked, len(r.text)),
            )
    return found


def _differences(comparison: Comparison | None) -> list[str]:
    return [
        f"request {one.record.ask.number} ({one.record.ask.model}, {one.record.ask.text!r}): {one.record.num_tokens} tokens "
        f"{one.record.text[:60]!r}..., transformers has {one.num_expected}: {one.expected[:60]!r}..."
        for one in (comparison.different if comparison else ())
    ]


def _as_json(summary: Summary, comparison: Comparison | None, faults: Sequence[str]) -> dict[str, Any]:
    compared = comparison and {"identical": comparison.num_identical, "different": len(comparison.different)}
    return {**summary.to_dict(), "transformers": compared, "faults": list(faults)}
