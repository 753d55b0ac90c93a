"""The real half of the validation: a trace on workers with real tokens, and what they spent beside the costs that they learned."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from mux_cluster import Cluster
from mux_driver import Driver, Served
from mux_traces import Ask
from val_worker import Records, Step

from polymux.disagg.cost import Fit
from polymux.disagg.sim.costs import SECOND
from polymux.disagg.sim.overheads import Overheads
from polymux.disagg.slo import SLO

Counters = Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One trace, served. `counters` are all workers' over it, `records` one for each."""

    began_s: float  # monotonic
    served: Sequence[Served]
    counters: Counters
    records: Sequence[Records]


async def counted(cluster: Cluster) -> dict[str, float]:
    """All workers' counters, added up."""
    total: dict[str, float] = {}
    for counters in (await cluster.reports()).values():
        for name, value in counters.items():
            total[name] = total.get(name, 0.0) + value
    return total


async def run(cluster: Cluster, policy: str, asks: Sequence[Ask], slo: SLO, token: str) -> Run:
    driver = Driver(f"{policy}-{time.monotonic_ns()}", cluster, token)
    await driver.start()
    before = await counted(cluster)
    await cluster.ask("records")
    served = await driver.run(asks, slo)
    records = await cluster.ask("records")
    after = await counted(cluster)
    await driver.close()
    await asyncio.sleep(0.2)
    counters = {name: value - before.get(name, 0.0) for name, value in after.items()}
    return Run(began_s=driver.began_s, served=served, counters=counters, records=records)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the simulator is given beside the learned costs, as this run had it."""

    overheads: Overheads
    prefetch_bytes_per_s: float | None
    reply_us: int  # from the engine to the client; the simulator's door has it
    busy: Mapping[str, float]  # shares of the workers' time, by what they did


def measure(found: Run, fits: Mapping[str, Fit], digests: Mapping[str, str], report_interval_s: float) -> Measured:
    """`digests` are of the models' weights, as the fits are keyed."""
    door_s, reply_s = _door_s(found)
    step_s, seq_s = _around_s(found.records)
    predicted = [
        (step, fits[f"{step.phase}/{digests[step.model]}"].predict(step.features)) for records in found.records for step in records.steps
    ]
    overheads = Overheads(
        door_us=round((door_s + reply_s) * SECOND),
        step_us=round(step_s * SECOND),
        seq_us=seq_s * SECOND,
        switch_us=round(_warm_switch_s([step for step, _ in predicted]) * SECOND),
        prefill_stretch=_stretch(predicted, "prefill"),
        decode_stretch=_stretch(predicted, "decode"),
        report_us=round(report_interval_s * SECOND),
    )
    prefetch_s = found.counters.get("model_switch_seconds_sum{phase=prefetch}", 0.0)
    return Measured(
        overheads=replace(overheads, pace=_pace(found, predicted, overheads)),
        prefetch_bytes_per_s=found.counters.get("model_prefetch_bytes", 0.0) / prefetch_s if prefetch_s else None,
        reply_us=round(reply_s * SECOND),
        busy=_shares(found),
    )


def _stretch(predicted: Sequence[tuple[Step, float]], phase: str) -> float:
    """Seconds that all steps of a phase took, over those that the saved costs say: a fit follows what is usual and lately, not the mean."""
    took_s = sum(step.seconds for step, _ in predicted if step.phase == phase)
    return took_s / sum(seconds for step, seconds in predicted if step.phase == phase) if took_s else 1.0


def _pace(found: Run, predicted: Sequence[tuple[Step, float]], overheads: Overheads) -> tuple[float, ...]:
    """By how much the steps of each window took longer than on average: what else ran on the machine. A window without any is as before."""
    took: dict[int, float] = {}
    usual: dict[int, float] = {}
    stretches = {"prefill": overheads.prefill_stretch, "decode": overheads.decode_stretch}
    for step, seconds in predicted:
        window = int((step.ended_s - found.began_s) * SECOND) // overheads.window_us
        took[window] = took.get(window, 0.0) + step.seconds
        usual[window] = usual.get(window, 0.0) + seconds * stretches[step.phase]
    paces = [1.0]
    for window in range(max(took, default=-1) + 1):
        paces.append(took[window] / usual[window] if usual.get(window) else paces[-1])
    return tuple(paces[1:])


def _door_s(found: Run) -> tuple[float, float]:
    """Mean seconds from a request's arrival to its worker's socket, and from the engine's first token to the client."""
    received = {sequence_id: at_s for records in found.records for sequence_id, at_s in records.received_s.items()}
    first = {sequence_id: at_s for records in found.records for sequence_id, at_s in records.first_s.items()}
    doors, replies = [], []
    for one in found.served:
        arrived_s, sequence_id = found.began_s + one.ask.at_s, f"{one.request_id}/0"
        if one.token_times_s and sequence_id in received and sequence_id in first:
            doors.append(received[sequence_id] - arrived_s)
            replies.append(one.token_times_s[0] + arrived_s - first[sequence_id])
    return statistics.fmean(doors), statistics.fmean(replies)


def _around_s(records: Sequence[Records]) -> tuple[float, float]:
    """Seconds between two steps that followed each other at once: a line over the sequences of the second, by least squares."""
    points = [
        (step.num_seqs, step.ended_s - step.seconds - before.ended_s)
        for one in records
        for before, step in itertools.pairwise(one.steps)
        if not step.switched_s and not step.idle_s
    ]
    mean_x, mean_y = statistics.fmean(x for x, _ in points), statistics.fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    slope = max(0.0, sum((x - mean_x) * (y - mean_y) for x, y in points) / spread) if spread else 0.0
    slope = min(slope, mean_y / mean_x)
    return mean_y - slope * mean_x, slope


def _warm_switch_s(steps: Sequence[Step]) -> float:
    """The median of switches: most are to weights that are there."""
    return statistics.median([step.switched_s for step in steps if step.switched_s] or [0.0])


def _shares(found: Run) -> dict[str, float]:
    spans: dict[str, Callable[[Step], float]] = {
        "prefill": lambda step: step.seconds * (step.phase == "prefill"),
        "decode": lambda step: step.seconds * (step.phase == "decode"),
        "switch": lambda step: step.switched_s,
        "idle": lambda step: step.idle_s,
    }
    total = dict.fromkeys(spans, 0.0)
    elapsed_s = 0.0
    for records in found.records:
        if records.steps:
            elapsed_s += records.steps[-1].ended_s - found.began_s
            for name, of in spans.items():
                total[name] += sum(of(step) for step in records.steps)
    shares = {name: seconds / elapsed_s for name, seconds in total.items()}
    return shares | {"around steps": max(0.0, 1 - sum(shares.values()))}
