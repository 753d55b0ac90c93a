"""Is the simulator right? A trace on real workers with real tokens, then the very same in simulation, with the costs that they learned.

Twelve models on two CPU workers, as in `bench/multiplex.py`. What a live system spends beside its steps (front door, controller, around
each step, cores that are shared) is measured while it serves the trace and given to the simulator as it is; nothing is fitted to the
figures that are compared.

    python bench/validate.py --out docs/results/validation.md
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from multiplex import QUOTA_OF_TTFT, STEPS_OF_TPOT, STEPS_OF_TTFT, calibrate
from mux_cluster import KV_FRACTION, Cluster, SharedStore, make_config
from mux_models import VOCAB_SIZE, make_catalogue
from mux_traces import KINDS, Ask, Trace
from val_report import Compared, Figures, Setup, report, summary
from val_system import Measured, Run, measure, run
from val_worker import RecordedWorker

from polymux.actors.costs import CostFile, device_kind
from polymux.disagg.cost import Fit
from polymux.disagg.sim.costs import SECOND
from polymux.disagg.sim.learned import LearnedKind, learned_costs
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.policies import Pool, simulation
from polymux.disagg.sim.workload import SimRequest
from polymux.disagg.slo import SLO
from polymux.transport.messages import ModelSpec
from polymux.transport.units import GIB, MIB

NUM_WORKERS = 2
SIMULATED = {"slack": "slack", "wrr": "wrr-shared"}  # the simulator's names of the same turn policies


@dataclass(frozen=True, kw_only=True)
class Real:
    """What a simulation of it needs."""

    policy: str
    slo: SLO
    asks: Sequence[Ask]
    specs: Sequence[ModelSpec]
    run: Run
    costs: Path
    report_interval_s: float

    def measured(self) -> Measured:
        return measure(self.run, self.fits(), {spec.model: spec.digest for spec in self.specs}, self.report_interval_s)

    def fits(self) -> dict[str, Fit]:
        return CostFile(str(self.costs), device_kind(1)).load()


async def serve(args: argparse.Namespace, policy: str, models: dict[str, Path], store: SharedStore, costs: Path) -> Real:
    """Bring a cluster up, calibrate, and serve the trace. Its workers have saved their costs when it is down."""
    arena_bytes, token = args.arena_mib * MIB, store.token
    config = make_config(models, policy, arena_bytes, token, args.max_quota, costs_path=costs)
    async with Cluster(config, store, RecordedWorker) as cluster:
        await calibrate(cluster, models, token)  # code is compiled, images are checked
        step_s = statistics.median((await calibrate(cluster, models, token)).values()) / 1e3
        tpot_s = args.tpot_ms / 1e3 if args.tpot_ms else STEPS_OF_TPOT * step_s
        slo = SLO(ttft_s=tpot_s * STEPS_OF_TTFT / STEPS_OF_TPOT, tpot_s=tpot_s)
        kind = next(kind for kind in KINDS if kind.name == args.trace)
        rate = args.rate or args.load * NUM_WORKERS / (statistics.fmean(kind.output_tokens) * step_s)
        asks = Trace(kind, list(models), seed=args.seed, vocab_size=VOCAB_SIZE).asks(rate, args.seconds)
        _say(f"{policy}: step {1e3 * step_s:.2f} ms, {rate:.2f} requests/s, TTFT {slo.ttft_s:.3f} s, TPOT {1e3 * tpot_s:.1f} ms")
        found = await run(cluster, policy, asks, slo, token)
        specs = await cluster.models()
    return Real(
        policy=policy,
        slo=slo,
        asks=asks,
        specs=specs,
        run=found,
        costs=costs,
        report_interval_s=config.liveness.report_interval_s,
    )


def simulate(args: argparse.Namespace, real: Real) -> list[Progress]:
    """The same requests by the same policy on the same pool, at the costs that its workers saved."""
    kinds = {
        spec.model: LearnedKind(
            digest=spec.digest, num_weight_bytes=spec.weight_bytes, num_kv_bytes=spec.kv.block_bytes // spec.kv.block_size
        )
        for spec in real.specs
    }
    asked, measured = {ask.model for ask in real.asks}, real.measured()
    costs = learned_costs(
        {name: kind for name, kind in kinds.items() if name in asked},
        real.fits(),
        memory_bytes=args.arena_mib * MIB,
        prefetch_bytes_per_s=measured.prefetch_bytes_per_s,
    )
    requests = [
        SimRequest(
            request_id=number,
            arrival_us=round(ask.at_s * SECOND),
            model=ask.model,
            kind=ask.model,
            input_len=len(ask.prompt_ids),
            output_len=ask.num_output_tokens,
            max_tokens=ask.num_output_tokens,
        )
        for number, ask in enumerate(real.asks)
    ]
    pool = Pool(
        num_devices=NUM_WORKERS,
        max_prefill_tokens=512,
        max_num_seqs=64,
        weight_budget_bytes=int(args.arena_mib * MIB * (1 - KV_FRACTION)),
        max_quota_s=args.max_quota,
        overheads=measured.overheads,
    )
    targets = Targets(ttft_us=round(real.slo.ttft_s * SECOND), tpot_us=round(real.slo.tpot_s * SECOND))
    world = simulation(SIMULATED[real.policy], costs, targets, pool)
    return world.run(requests)


def compare(args: argparse.Namespace, real: Real, simulated: Sequence[Progress]) -> Compared:
    """Over requests that came after the warm-up."""
    counted = [number for number, ask in enumerate(real.asks) if ask.at_s >= args.warm_up]
    lasting = [real.run.served[number] for number in counted]
    made = [simulated[number] for number in counted]
    return Compared(
        policy=real.policy,
        slo=real.slo,
        real=Figures.of_served(lasting, real.slo),
        simulated=Figures.of_progress(made),
        measured=real.measured(),
    )


async def compared(args: argparse.Namespace) -> list[Compared]:
    token, found = "bench-" + os.urandom(16).hex(), []
    with tempfile.TemporaryDirectory(prefix="pmx-") as folder:
        models = make_catalogue(Path(folder), args.models)
        store = SharedStore(budget_bytes=4 * GIB, token=token)
        try:
            for policy in args.policies:
                real = await serve(args, policy, models, store, Path(folder) / f"costs-{policy}")
                found.append(compare(args, real, simulate(args, real)))
                _say(found[-1].line())
        finally:
            store.close()
    return found


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", nargs="+", choices=list(SIMULATED), default=list(SIMULATED))
    parser.add_argument("--trace", choices=[kind.name for kind in KINDS], default="zipf")
    parser.add_argument("--models", type=int, default=12)
    parser.add_argument("--arena-mib", type=int, default=284, help="of one worker, weights and KV")
    parser.add_argument("--seconds", type=float, default=45.0, help="of arrivals")
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds of arrivals that are not counted")
    parser.add_argument("--load", type=float, default=0.5, help="of both workers' time if every request decoded alone")
    parser.add_argument("--rate", type=float, help="requests a second, in place of --load")
    parser.add_argument("--tpot-ms", type=float, help=f"TPOT in place of {STEPS_OF_TPOT} measured steps; TTFT follows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.max_quota = QUOTA_OF_TTFT * 0.4  # seconds: the cluster is configured before its steps are known; TTFT is about 0.4 s
    return args


def main() -> None:
    args = arguments()
    found = asyncio.run(compared(args))
    setup = Setup(args.models, NUM_WORKERS, args.arena_mib, args.trace, args.seconds, args.warm_up, " ".join(sys.argv[1:]))
    text = report(setup, found)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    print(json.dumps(summary(found)))


if __name__ == "__main__":
    main()
