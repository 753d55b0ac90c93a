"""Real against simulated: figures, the table, one line of JSON."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mux_driver import Served
from mux_search import percentiles
from val_system import Measured

from machine import describe
from polymux.disagg.sim.costs import SECOND
from polymux.disagg.sim.outcome import Progress
from polymux.disagg.slo import SLO, request_attainment, token_attainment

MAX_POINTS, MAX_SHARE = 3.0, 0.1  # of attainment, and of mean TTFT and TPOT


class Setup(NamedTuple):
    num_models: int
    num_workers: int
    arena_mib: int
    trace: str
    seconds: float
    warm_up_s: float
    command: str


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one run. Attainments are shares; times are seconds."""

    num_requests: int
    tokens: float
    requests: float
    ttft_s: tuple[float, ...]
    tpot_s: tuple[float, ...]

    @classmethod
    def of_served(cls, served: Sequence[Served], slo: SLO) -> Figures:
        outcomes = [one.outcome(slo) for one in served]
        times = [one.token_times_s for one in served]
        return cls(
            num_requests=len(served),
            tokens=token_attainment(outcomes),
            requests=request_attainment(outcomes),
            ttft_s=tuple(t[0] for t in times if t),
            tpot_s=tuple((t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1),
        )

    @classmethod
    def of_progress(cls, served: Sequence[Progress]) -> Figures:
        return cls(
            num_requests=len(served),
            tokens=sum(one.num_on_time for one in served) / sum(one.request.output_len for one in served),
            requests=sum(one.is_attained for one in served) / len(served),
            ttft_s=tuple(one.ttft_us / SECOND for one in served if one.ttft_us is not None),
            tpot_s=tuple(one.tpot_us / SECOND for one in served if one.tpot_us is not None),
        )


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One policy's run, and its simulation."""

    policy: str
    slo: SLO
    real: Figures
    simulated: Figures
    measured: Measured

    def differences(self) -> dict[str, float]:
        """Points of attainment, and shares of the real times."""
        real, simulated = self.real, self.simulated
        return {
            "tokens_points": 100 * (simulated.tokens - real.tokens),
            "requests_points": 100 * (simulated.requests - real.requests),
            "ttft": statistics.fmean(simulated.ttft_s) / statistics.fmean(real.ttft_s) - 1,
            "tpot": statistics.fmean(simulated.tpot_s) / statistics.fmean(real.tpot_s) - 1,
        }

    @property
    def is_met(self) -> bool:
        found = self.differences()
        is_close = abs(found["tokens_points"]) <= MAX_POINTS and abs(found["requests_points"]) <= MAX_POINTS
        return is_close and abs(found["ttft"]) <= MAX_SHARE and abs(found["tpot"]) <= MAX_SHARE

    def line(self) -> str:
        parts = []
        for name, one in (("real", self.real), ("simulated", self.simulated)):
            parts.append(
                f"{name}: tokens {one.tokens:.1%} requests {one.requests:.1%} of {one.num_requests} "
                f"ttft {1e3 * statistics.fmean(one.ttft_s):.1f} ms tpot {1e3 * statistics.fmean(one.tpot_s):.2f} ms"
            )
        return f"{self.policy:6} " + "; ".join(parts)


def summary(found: Sequence[Compared]) -> dict[str, Any]:
    line: dict[str, Any] = {"is_met": all(one.is_met for one in found)}
    for one in found:
        line[one.policy] = {name: round(value, 4) for name, value in one.differences().items()}
        for name, figures in (("real", one.real), ("simulated", one.simulated)):
            line[one.policy][name] = {
                "tokens": round(100 * figures.tokens, 2),
                "requests": round(100 * figures.requests, 2),
                "ttft_ms": round(1e3 * statistics.fmean(figures.ttft_s), 2),
                "tpot_ms": round(1e3 * statistics.fmean(figures.tpot_s), 3),
            }
    return line


def report(setup: Setup, found: Sequence[Compared]) -> str:
    missed = [one.policy for one in found if not one.is_met]
    return "\n".join(
        [
            "# The simulator against the real system",
            "",
            f"{describe()}; load average {os.getloadavg()[0]:.1f} at the end.",
            "",
            f"{setup.num_models} models on {setup.num_workers} CPU workers of one thread, arenas of {setup.arena_mib} MiB, `{setup.trace}` "
            f"arrivals for {setup.seconds:.0f} s, the first {setup.warm_up_s:.0f} s not counted; real tokens through the real front door "
            "and controller. Then the same requests in simulation, by the same policy objects, at the costs that those workers had "
            "learned and saved.",
            "",
            "| policy | | tokens on time | requests on time | mean TTFT, ms | p90 | mean TPOT, ms | p90 |",
            "|---|---|---|---|---|---|---|---|",
            *(row for one in found for row in _rows(one)),
            "",
            f"Wanted: attainment within {MAX_POINTS:.0f} points, mean TTFT and TPOT within {MAX_SHARE:.0%}: "
            f"{'not met by ' + ', '.join(missed) if missed else 'met'}.",
            "",
            "Beside the learned costs the simulator is given what the run itself has shown, of workers that noted when each step ended, "
            "and nothing that is fitted to the figures above: the door (from an arrival to its worker's socket, and from the engine to the "
            "client), the time around each step, a switch to weights that are there, how much longer all steps took than the saved costs "
            "say (a fit follows what is usual and recent), how much more those did that weights were loaded beside (the load drag), and "
            "the pace of the machine second by second (what else ran on it).",
            "",
            "| policy | door, ms | around a step | each sequence | warm switch "
            "| prefill, decode stretch | load drag | pace | TTFT, TPOT SLO |",
            "|---|---|---|---|---|---|---|---|---|",
            *(_given(one) for one in found),
            "",
            "What the workers' time went to in the real runs:",
            "",
            *(f"- `{one.policy}`: " + ", ".join(f"{what} {share:.0%}" for what, share in one.measured.busy.items()) for one in found),
            "",
            f"Made by `python bench/validate.py {setup.command}`.",
            "",
        ]
    )


def _rows(one: Compared) -> list[str]:
    found = one.differences()
    points = f"{found['tokens_points']:+.1f} points | {found['requests_points']:+.1f} points"
    return [
        _row(one.policy, "real", one.real),
        _row(one.policy, "simulated", one.simulated),
        f"| {one.policy} | difference | {points} | {found['ttft']:+.1%} | | {found['tpot']:+.1%} | |",
    ]


def _row(policy: str, name: str, figures: Figures) -> str:
    cells = [f"{figures.tokens:.1%}", f"{figures.requests:.1%} of {figures.num_requests}"]
    for times, digits in ((figures.ttft_s, 1), (figures.tpot_s, 2)):
        cells += [f"{1e3 * statistics.fmean(times):.{digits}f}", f"{1e3 * percentiles(times)[1]:.{digits}f}"]
    return f"| {policy} | {name} | {' | '.join(cells)} |"


def _given(one: Compared) -> str:
    o, slo = one.measured.overheads, one.slo
    cells = [
        one.policy,
        *(f"{us / 1e3:.3f}" for us in (o.door_us, o.step_us, o.seq_us, o.switch_us)),
        f"{o.prefill_stretch:.2f}, {o.decode_stretch:.2f}",
        f"{o.load_drag:.2f}",
        f"{min(o.pace, default=1.0):.2f} to {max(o.pace, default=1.0):.2f}",
        f"{1e3 * slo.ttft_s:.0f}, {1e3 * slo.tpot_s:.1f}",
    ]
    return f"| {' | '.join(cells)} |"
