"""The real half of the validation: a trace on workers with real tokens, and what they spent beside the costs that they learned."""

from __future__ import annotations

import asyncio
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mux_cluster import Cluster
from mux_driver import Driver, Served
from mux_traces import Ask
from val_worker import Records, Step

from polymux.actors.device import CpuDevice
from polymux.disagg.cost import Fit
from polymux.disagg.sim.costs import SECOND
from polymux.disagg.sim.overheads import Overheads
from polymux.disagg.slo import SLO

Counters = Mapping[str, float]
MIN_BESIDE = 20  # decode steps beside loads, from which on their drag is told


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
    predicted = [one for records in found.records for one in _predicted(records, fits, digests)]
    overheads = Overheads(
        door_us=round((door_s + reply_s) * SECOND),
        step_us=round(step_s * SECOND),
        seq_us=seq_s * SECOND,
        switch_us=round(_warm_switch_s([step for records in found.records for step in records.steps]) * SECOND),
        prefill_stretch=_stretch(predicted, "prefill"),
        decode_stretch=_stretch(predicted, "decode"),
        load_drag=_drag(predicted),
        report_us=round(report_interval_s * SECOND),
    )
    prefetch_s = found.counters.get("model_switch_seconds_sum{phase=prefetch}", 0.0)
    return Measured(
        overheads=replace(overheads, pace=_pace(found, predicted, overheads)),
        prefetch_bytes_per_s=found.counters.get("model_prefetch_bytes", 0.0) / prefetch_s if prefetch_s else None,
        reply_us=round(reply_s * SECOND),
        busy=_shares(found),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """A step, what the saved costs say of it, and how much of it weights were loaded beside."""

    step: Step
    usual_s: float
    share_beside: float


def _predicted(records: Records, fits: Mapping[str, Fit], digests: Mapping[str, str]) -> Iterator[Predicted]:
    """All steps but those that waited for their own weights."""
    loads = deque(sorted(records.loads, key=lambda load: load.began_s))
    for step in records.steps:
        while loads and loads[0].ended_s <= step.ended_s - step.seconds:
            loads.popleft()
        beside = [load for load in loads if step.share_beside(load)]
        if all(load.model != step.model for load in beside):
            usual_s = fits[f"{step.phase}/{digests[step.model]}"].predict(step.features)
            yield Predicted(step=step, usual_s=usual_s, share_beside=min(1.0, sum(step.share_beside(load) for load in beside)))


def _ratio(steps: Sequence[Predicted]) -> float | None:
    """Seconds that these steps took, over those that the saved costs say."""
    return sum(one.step.seconds for one in steps) / sum(one.usual_s for one in steps) if steps else None


def _stretch(predicted: Sequence[Predicted], phase: str) -> float:
    """Of the steps of a phase beside which nothing was loaded: a fit follows what is usual and lately, not the mean."""
    return _ratio([one for one in predicted if one.step.phase == phase and not one.share_beside]) or 1.0


def _drag(predicted: Sequence[Predicted]) -> float:
    """By how much more decode steps took that weights were loaded beside from end to end; what workers take it for where these are few."""
    beside = [one for one in predicted if one.step.phase == "decode" and one.share_beside > 0.99]
    return max(0.0, (_ratio(beside) or 1.0) / _stretch(predicted, "decode") - 1.0) if len(beside) >= MIN_BESIDE else CpuDevice.load_drag


def _pace(found: Run, predicted: Sequence[Predicted], overheads: Overheads) -> tuple[float, ...]:
    """By how much the steps of each window took longer than on average: what else ran on the machine. A window without any is as before."""
    took: dict[int, float] = {}
    usual: dict[int, float] = {}
    stretches = {"prefill": overheads.prefill_stretch, "decode": overheads.decode_stretch}
    for one in predicted:
        window = int((one.step.ended_s - found.began_s) * SECOND) // overheads.window_us
        dragged = 1.0 / (1.0 - one.share_beside * overheads.load_drag / (1.0 + overheads.load_drag))
        took[window] = took.get(window, 0.0) + one.step.seconds
        usual[window] = usual.get(window, 0.0) + one.usual_s * stretches[one.step.phase] * dragged
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
