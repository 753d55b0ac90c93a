"""Many models on a worker that holds few: token-level multiplexing against switching between requests, real tokens on this CPU.

Twelve models on two workers (one process and one thread each) whose arenas hold about three. The same trace, memory and processes
for every policy: `slack` and `wrr` multiplex token by token; `request_level` and `request_level_idle` give a worker to one model until
its requests end (ServerlessLLM's rule as published, and with idle workers first); `static` keeps the models that fit where they are.
For each policy and trace a search over request rates finds the one at which 90% of the tokens are on time; policies take turns, so
that a machine that drifts drifts under all of them.

    python bench/multiplex.py --out docs/results/multiplex.md
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path

from mux_cluster import KV_FRACTION, Cluster, SharedStore, make_config
from mux_driver import Driver, RequestLevelRouter, StaticRouter, instances, partition
from mux_models import VOCAB_SIZE, make_catalogue
from mux_report import Result, Setup, draw, summary, table
from mux_search import Figures, Search, figures
from mux_traces import KINDS, Ask, Trace, read_lengths

from polymux.disagg.slo import SLO
from polymux.transport.units import GIB, MIB, ModelName, WorkerId

MULTIPLEXED = ("slack", "wrr")
POLICIES = (*MULTIPLEXED, "request_level", "request_level_idle", "static")
STEPS_OF_TPOT = 8  # the published 100 ms are 7 to 12 steps of its models
STEPS_OF_TTFT = 200  # of 64 tokens' mean answers about three, as the published 10 s are of 300 tokens'
QUOTA_OF_TTFT = 0.4  # the published 4 s
FIRST_RATE = 4.0  # requests a second


@dataclass
class Bench:
    """What stands while it runs: a driver for each policy, and the cluster below each."""

    args: argparse.Namespace
    slo: SLO = field(default_factory=lambda: SLO(ttft_s=2.0, tpot_s=0.1))
    clusters: dict[str, Cluster] = field(default_factory=dict)
    drivers: dict[str, Driver] = field(default_factory=dict)
    step_ms: dict[str, float] = field(default_factory=dict)

    async def probe(self, policy: str, trace: Trace, rate: float) -> Figures:
        """One run of one policy: warm-up, the measured part, and a tail that keeps the load up while the last of it finish."""
        args, cluster = self.args, self.clusters[policy]
        begin_s, end_s = args.warm_up, args.warm_up + args.seconds
        asks = trace.asks(rate, end_s + self.slo.ttft_s)
        before = await cluster.reports()
        served = await self.drivers[policy].run(asks, self.slo)
        after = await cluster.reports()
        counters = {name: sum(w[name] - before[i].get(name, 0.0) for i, w in after.items() if name in w) for name in _names(after)}
        found = figures(served, self.slo, rate, begin_s, end_s, counters)
        _say(
            f"{trace.kind.name:7} {policy:19} {rate:6.2f}/s tokens {found.token_attainment:6.1%} requests {found.request_attainment:6.1%} "
            f"of {found.num_requests:4}, ttft p50 {found.ttft_s[0]:.2f} s, {found.counters.get('model_switches', 0):.0f} switches "
            f"{_shares(found.counters, end_s + self.slo.ttft_s)}"
        )
        await asyncio.sleep(0.3)
        return found

    async def trace_results(self, trace: Trace, starts: Mapping[str, float]) -> dict[str, Search]:
        """A search for each policy, probe by probe in turns; the static placement is probed at the first rate only where it cannot win."""
        searches = {policy: Search(starts.get(policy, FIRST_RATE)) for policy in self.args.policies}
        for number in range(self.args.probes):
            order = list(searches)[number % len(searches) :] + list(searches)[: number % len(searches)]
            for policy in order:
                if policy != "static" or number < 2:
                    searches[policy].probes.append(await self.probe(policy, trace, searches[policy].next_rate))
        return searches


def _names(reports: Mapping[str, Mapping[str, float]]) -> list[str]:
    return sorted({name for counters in reports.values() for name in counters})


def _shares(counters: Mapping[str, float], duration_s: float) -> str:
    """What the two workers did with their time."""
    parts = {"decode": "decode_seconds", "prefill": "prefill_seconds", "switch": "model_switch_seconds"}
    return ", ".join(f"{part} {counters.get(name, 0.0) / duration_s / 2:.0%}" for part, name in parts.items())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def bring_up(bench: Bench, stack: AsyncExitStack, models: dict[str, Path], store: SharedStore) -> None:
    """Calibrate on one cluster, then one cluster for each token-level policy; request-level and static routers share the first."""
    args = bench.args

    async def cluster(policy: str, max_quota_s: float) -> Cluster:
        config = make_config(models, policy, args.arena_mib * MIB, store.token, max_quota_s)
        return await stack.enter_async_context(Cluster(config, store))

    plain = await cluster("slack", 4.0)
    bench.step_ms = await calibrate(plain, models, store.token)
    step_s = statistics.median(bench.step_ms.values()) / 1e3
    tpot_s = args.tpot_ms / 1e3 if args.tpot_ms else STEPS_OF_TPOT * step_s
    bench.slo = SLO(ttft_s=tpot_s * STEPS_OF_TTFT / STEPS_OF_TPOT, tpot_s=tpot_s)
    for policy in args.policies:
        if policy in MULTIPLEXED:
            bench.clusters[policy] = await cluster(policy, QUOTA_OF_TTFT * bench.slo.ttft_s)
            await calibrate(bench.clusters[policy], models, store.token)
        else:
            bench.clusters[policy] = plain


async def calibrate(cluster: Cluster, models: Mapping[str, Path], token: str) -> dict[str, float]:
    """Every model alone on an instance while the others do the same: milliseconds of a step. Also loads, verifies and meters each once."""
    steps = await asyncio.gather(*(_steps(cluster, worker_id, models, token) for worker_id in instances(cluster)))
    return {model: 1e3 * statistics.median([gap for one in steps for gap in one[model]]) for model in models}


async def _steps(cluster: Cluster, worker_id: WorkerId, models: Mapping[str, Path], token: str) -> dict[str, list[float]]:
    """Seconds between the tokens of two requests of each model, one after another, on one instance."""
    gaps: dict[str, list[float]] = {model: [] for model in models}
    driver = Driver(f"calibrate-{worker_id}", StaticRouter(cluster, {ModelName(model): worker_id for model in models}), token)
    await driver.start()
    for model in models:
        for _ in range(2):
            (served,) = await driver.run([Ask(0.0, model, tuple(range(8, 56)), 24)], SLO(ttft_s=30.0, tpot_s=1.0))
            if served.error:
                raise SystemExit(f"{model} failed on {worker_id}: {served.error}")
            gaps[model] += [after - before for before, after in itertools.pairwise(served.token_times_s)]
    await driver.close()
    return gaps


async def open_drivers(bench: Bench, trace: Trace, token: str) -> None:
    """A fresh front door for each policy: lines begin empty, and the static placement knows this trace's popularity."""
    for policy, cluster in bench.clusters.items():
        control: object = cluster
        if policy.startswith("request_level"):
            control = RequestLevelRouter(cluster, idle_first=policy == "request_level_idle")
        elif policy == "static":
            weights = {spec.model: spec.weight_bytes for spec in await cluster.models()}
            capacity = int(bench.args.arena_mib * MIB * (1 - KV_FRACTION))
            control = StaticRouter(cluster, partition(trace.popularity, weights, list(instances(cluster)), capacity))
        bench.drivers[policy] = Driver(f"{policy}-{trace.kind.name}-{time.monotonic_ns()}", control, token)
        await bench.drivers[policy].start()


async def close_drivers(bench: Bench) -> None:
    for driver in bench.drivers.values():
        await driver.close()
    bench.drivers.clear()


async def measure(args: argparse.Namespace) -> tuple[Setup, list[Result]]:
    """All traces, all repeats."""
    token, results, bench = "bench-" + os.urandom(16).hex(), [], Bench(args)
    lengths = read_lengths(args.lengths) if args.lengths else []
    with tempfile.TemporaryDirectory(prefix="pmx-") as folder:
        models = make_catalogue(Path(folder), args.models)
        store = SharedStore(budget_bytes=4 * GIB, token=token)
        try:
            async with AsyncExitStack() as stack:
                await bring_up(bench, stack, models, store)
                setup = await describe_setup(bench)
                _say(f"SLO: TTFT {bench.slo.ttft_s:.3f} s, TPOT {1e3 * bench.slo.tpot_s:.1f} ms")
                starts: dict[str, float] = {}
                for kind in [kind for kind in KINDS if kind.name in args.traces]:
                    for repeat in range(args.repeats):
                        trace = Trace(kind, list(models), seed=args.seed + repeat, vocab_size=VOCAB_SIZE, lengths=lengths)
                        await open_drivers(bench, trace, token)
                        searches = await bench.trace_results(trace, starts)
                        await close_drivers(bench)
                        results.append(Result(kind, args.seed + repeat, searches))
                        starts = {policy: search.estimate for policy, search in searches.items() if search.estimate}
        finally:
            store.close()
    return setup, results


async def describe_setup(bench: Bench) -> Setup:
    specs = await next(iter(bench.clusters.values())).models()
    nbytes = [spec.weight_bytes for spec in specs]
    return Setup(
        num_models=len(specs),
        weight_mib=(min(nbytes) / MIB, max(nbytes) / MIB, sum(nbytes) / MIB),
        arena_mib=bench.args.arena_mib,
        num_fitting=bench.args.arena_mib * MIB * (1 - KV_FRACTION) / statistics.fmean(nbytes),
        step_ms=(min(bench.step_ms.values()), statistics.median(bench.step_ms.values()), max(bench.step_ms.values())),
        slo=bench.slo,
        seconds=bench.args.seconds,
        warm_up_s=bench.args.warm_up,
        probes=bench.args.probes,
        repeats=bench.args.repeats,
        lengths=bench.args.lengths.name if bench.args.lengths else None,
        command=" ".join(sys.argv[1:]),
    )


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    names = [kind.name for kind in KINDS]
    parser.add_argument("--traces", nargs="+", choices=names, default=["even", "zipf", "bursty", "long"])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--models", type=int, default=12)
    parser.add_argument("--arena-mib", type=int, default=284, help="of one worker, weights and KV")
    parser.add_argument("--seconds", type=float, default=12.0, help="of arrivals that are measured in one run")
    parser.add_argument("--warm-up", type=float, default=3.0, help="seconds of arrivals before them")
    parser.add_argument("--probes", type=int, default=4, help="runs of one policy on one trace")
    parser.add_argument("--repeats", type=int, default=1, help="searches of each policy on each trace, each with a seed of its own")
    parser.add_argument("--tpot-ms", type=float, help=f"TPOT in place of {STEPS_OF_TPOT} measured steps; TTFT follows")
    parser.add_argument("--lengths", type=Path, help="CSV trace whose lengths are drawn from, in place of generated ones")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="six models, one trace, two short runs a policy: does it work?")
    parser.add_argument("--out", type=Path, help="where the report goes; its picture lies beside it")
    args = parser.parse_args(argv)
    if args.quick:
        args.traces, args.models, args.arena_mib, args.seconds, args.warm_up, args.probes = ["zipf"], 6, 192, 2.0, 0.5, 2
    return args


def main() -> None:
    args = arguments()
    setup, results = asyncio.run(measure(args))
    text = table(setup, results)
    print(text)
    if args.out:
        args.out.write_text(text)
        draw(setup, results, args.out.with_suffix(".png"))
    print(json.dumps(summary(results)))


if __name__ == "__main__":
    main()
