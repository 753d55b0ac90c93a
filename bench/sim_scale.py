"""How large a pool can be simulated, and what one real scheduling decision costs at that size.

python bench/sim_scale.py --out docs/results/simulation-scale.md

The same objects decide in the live controller and on live workers, so the microseconds are theirs too. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine import describe
from polymux.deploy.simulation.generators import generate
from polymux.deploy.simulation.runs import Result, run_policy
from polymux.disagg.dispatch import choose_decode
from polymux.disagg.sim.costs import MS, SECOND
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.physical import GIB, physical_costs
from polymux.disagg.sim.policies import Pool
from polymux.disagg.sim.topology import HOSTS
from polymux.disagg.slack import Slack
from polymux.disagg.views import AskView, BatchView, DecodeModelView, DecodeView, DecodeWorkerView, Due
from polymux.transport.units import ModelName, WorkerId

TARGETS = Targets(ttft_us=10 * SECOND, tpot_us=100 * MS)
KINDS = (*("qwen2.5-7b",) * 6, *("yi-9b",) * 2, *("llama2-13b",) * 2)
COSTS = (0.009, 7e-5, 1e-8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    workers: int
    models: int  # with work, on each worker
    seqs: int  # of each model there


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--devices", type=int, default=512)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second, of all models")
    parser.add_argument("--links", action="store_true", help="copies share the links of hosts of eight GPUs")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    trace = f"poisson:models={options.models},rate={options.rate / options.models},zipf=0.8,seconds={2 * options.requests / options.rate}"
    requests = generate(trace, KINDS)[: options.requests]
    hosts = HOSTS["h100"] if options.links else None
    pool = Pool(num_devices=options.devices, weight_budget_bytes=48 * GIB, hosts=hosts)
    result = run_policy("slack", requests, physical_costs("h100"), TARGETS, pool)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    placements = {size: placement_us(size) for size in _placement_sizes(options.devices)}
    turns = {size: turn_us(size) for size in _turn_sizes()}
    line = {
        "models": options.models,
        "devices": options.devices,
        "requests": len(requests),
        "wall_s": round(result.wall_s, 1),
        "tokens_per_s": round(result.num_tokens / result.wall_s),
        "events_per_s": round(result.num_events / result.wall_s),
        "peak_mib": round(peak_mib),
        "attainment": result.to_dict(),
        "placement_us": {f"{s.workers}x{s.models}": round(us, 1) for s, us in placements.items()},
        "turn_us": {f"{s.models}x{s.seqs}": round(us, 1) for s, us in turns.items()},
    }
    if options.out is not None:
        options.out.write_text(report(line, result, placements, turns), encoding="utf-8")
    print(json.dumps(line))


def _placement_sizes(most: int) -> list[Size]:
    by_workers = [Size(workers=n, models=4, seqs=4) for n in (16, 64, 256, most)]
    return by_workers + [Size(workers=64, models=n, seqs=4) for n in (1, 16, 64)]


def _turn_sizes() -> list[Size]:
    return [Size(workers=1, models=m, seqs=s) for m, s in ((2, 4), (4, 4), (8, 4), (16, 4), (8, 1), (8, 16), (8, 64))]


def placement_us(size: Size) -> float:
    """One `choose_decode`, the workers' views at hand, as the controller keeps them."""
    names = [ModelName(f"model-{i:04d}") for i in range(1000)]
    costs = dict.fromkeys(names, COSTS)
    workers = []
    for i in range(size.workers):
        here = [names[(i * size.models + k) % 1000] for k in range(size.models)]
        models = {name: DecodeModelView(num_seqs=size.seqs, kv_tokens=900 * size.seqs, tpot_slo_s=0.1, step_s=0.0095) for name in here}
        view = DecodeWorkerView(
            worker_id=WorkerId(f"worker-{i:04d}"),
            models=models,
            resident=frozenset(here[:3]),
            costs=costs,
            load=0.095 * size.models,
            round_switch_s=0.6 * max(0, size.models - 3),
            min_steps=10.5,
            num_seqs=size.models * size.seqs,
            free_kv_bytes=20 << 30,
            max_num_seqs=256,
            switch_bytes_per_s=25e9,
        )
        workers.append(view)
    asks = [
        AskView(model=name, num_prompt_tokens=700, num_output_tokens=290, tpot_slo_s=0.1, kv_bytes=60 << 20, weight_bytes=14 << 30)
        for name in names[::50]
    ]
    return _median_us(lambda: [choose_decode(ask, workers) for ask in asks]) / len(asks)


def turn_us(size: Size) -> float:
    """One `Slack.next_turn` over a worker's models and all their sequences."""
    policy = Slack()
    batches = tuple(
        BatchView(
            model=ModelName(f"model-{m:04d}"),
            num_seqs=size.seqs,
            kv_tokens=900 * size.seqs,
            step_s=0.0095,
            tpot_slo_s=0.1,
            switch_s=0.0 if m < 3 else 0.6,
            dues=tuple(Due(0.2 * m + 0.01 * s, 0.1) for s in range(size.seqs)),
        )
        for m in range(size.models)
    )
    view = DecodeView(now_s=0.0, active=batches[0].model, batches=batches)
    memory = policy.next_turn(view, policy.start())[1]
    return _median_us(lambda: [policy.next_turn(view, memory) for _ in range(20)]) / 20


def _median_us(run: Callable[[], Any], rounds: int = 9) -> float:
    run()
    taken = []
    for _ in range(rounds):
        began_s = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began_s)
    return 1e6 * statistics.median(taken)


def report(line: dict[str, Any], result: Result, placements: dict[Size, float], turns: dict[Size, float]) -> str:
    shares = line["attainment"]
    rows = [f"| {s.workers} | {s.models} | {us:.0f} | {us / s.workers:.2f} |" for s, us in placements.items()]
    turn_rows = [f"| {s.models} | {s.seqs} | {us:.0f} | {us / s.models / s.seqs:.2f} |" for s, us in turns.items()]
    return "\n".join(
        [
            "# Simulation at scale, and what a decision costs",
            "",
            f"{describe()}; load average {os.getloadavg()[0]:.1f} at the end.",
            "",
            f"{line['models']} models (popularity rank ** -0.8, the published mix of sizes) on {line['devices']} devices with physical "
            f"costs: {line['requests']} Poisson requests and {result.num_tokens} tokens under `slack` in {line['wall_s']:.0f} s "
            f"of one core, {line['tokens_per_s']} tokens and {line['events_per_s']} events a second, {line['peak_mib']} MiB at most. "
            "An event is a stretch of steps that nothing could change. "
            f"{shares['req']:.1f}% of the requests had every token on time.",
            "",
            "One placement (`choose_decode`), over views that are kept as the controller keeps them: linear in the workers.",
            "",
            "| workers | models with work on each | us | us a worker |",
            "|---|---|---|---|",
            *rows,
            "",
            "One turn of a worker (`Slack.next_turn`): linear in the sequences.",
            "",
            "| models with work | sequences of each | us | us a sequence |",
            "|---|---|---|---|",
            *turn_rows,
            "",
            "Made by `python bench/sim_scale.py --out docs/results/simulation-scale.md`.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
