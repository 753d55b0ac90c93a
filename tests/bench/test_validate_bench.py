"""The validation benchmark: what it makes of a run's records, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from mux_driver import Served
from mux_traces import Ask
from val_report import Compared, Figures, Setup, report, summary
from val_system import Run, measure
from val_worker import Records, Step

from polymux.disagg.cost import DECODE_ANCHORS, PREFILL_ANCHORS, Fit
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.workload import SimRequest
from polymux.disagg.slo import SLO

BENCH = Path(__file__).parent.parent.parent / "bench"
FITS = {
    "prefill/d": Fit.guessed((0.010, 0.0, 0.0), PREFILL_ANCHORS),
    "decode/d": Fit.guessed((0.002, 0.0, 0.0), DECODE_ANCHORS),
}
SLO_S = SLO(ttft_s=0.4, tpot_s=0.02)


def run() -> Run:
    """A worker received a request 3 ms after it came, and stepped with half a millisecond and 0.1 a sequence around each step."""
    steps, at_s = [Step("prefill", "m", 1, (1.0, 16.0, 256.0), 0.020, 100.030, 0.0, 0.05)], 100.030
    for num_seqs in (1, 4, 2, 3):
        at_s += 0.0005 + 0.0001 * num_seqs + 0.003
        steps.append(Step("decode", "m", num_seqs, (1.0, float(num_seqs), 64.0), 0.003, at_s, 0.0, 0.0))
    served = Served(Ask(0.0, "m", (9,), 5), [0.032, 0.036, 0.040, 0.044, 0.048], request_id="r-1")
    counters = {"model_switch_seconds_sum{phase=prefetch}": 0.02, "model_prefetch_bytes": 5e7}
    records = Records(steps, received_s={"r-1/0": 100.003}, first_s={"r-1/0": 100.031})
    return Run(began_s=100.0, served=[served], counters=counters, records=[records])


def test_what_a_run_has_shown_is_what_the_simulator_gets() -> None:
    found = measure(run(), FITS, {"m": "d"}, report_interval_s=0.5)
    given = found.overheads
    assert given.door_us == pytest.approx(4000, abs=1) and found.reply_us == pytest.approx(1000, abs=1)
    assert given.step_us == pytest.approx(500, abs=2) and given.seq_us == pytest.approx(100, abs=1)
    assert given.prefill_stretch == pytest.approx(2.0) and given.decode_stretch == pytest.approx(1.5)
    assert given.pace == pytest.approx((1.0,)) and given.report_us == 500_000
    assert found.prefetch_bytes_per_s == pytest.approx(2.5e9)


def compared() -> Compared:
    targets = Targets(ttft_us=400_000, tpot_us=20_000)
    progress = Progress(SimRequest(request_id=0, arrival_us=0, model="m", kind="m", input_len=1, output_len=5), targets)
    progress.tokens([33_000 + 4000 * i for i in range(5)], 4000)
    return Compared(
        policy="slack",
        slo=SLO_S,
        real=Figures.of_served(run().served, SLO_S),
        simulated=Figures.of_progress([progress]),
        measured=measure(run(), FITS, {"m": "d"}, 0.5),
    )


def test_the_report_says_what_differs_and_whether_it_is_little_enough() -> None:
    one = compared()
    line = summary([one])
    assert line["is_met"] and line["slack"]["tokens_points"] == 0.0
    assert line["slack"]["ttft"] == pytest.approx(1 / 32, abs=1e-4) and line["slack"]["tpot"] == pytest.approx(0.0, abs=1e-4)
    text = report(Setup(12, 2, 136, "zipf", 45.0, 5.0, ""), [one])
    assert "| slack | real | 100.0% | 100.0% of 1 | 32.0 | 32.0 | 4.00 | 4.00 |" in text
    assert "| slack | difference | +0.0 points | +0.0 points | +3.1% | | +0.0% | |" in text


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_benchmark_serves_a_trace_and_simulates_it() -> None:
    command = [sys.executable, BENCH / "validate.py", "--policies", "slack", "--models", "4", "--seconds", "6", "--warm-up", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["slack"]["real"]["tokens"] > 0 and line["slack"]["simulated"]["tokens"] > 0
