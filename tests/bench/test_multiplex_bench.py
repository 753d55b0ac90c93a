"""The parts of the multiplexing benchmark that decide what its figures mean: traces, the search, the static partition, the summary."""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from mux_driver import Served, partition
from mux_report import Result, Setup, draw, summary, table
from mux_search import Figures, Search, figures, percentiles
from mux_traces import KINDS, MAX_OUTPUT, Ask, Kind, Trace, read_lengths

from polymux.disagg.slo import SLO
from polymux.transport.units import WorkerId

MODELS = [f"m{number}" for number in range(12)]
BENCH = Path(__file__).parent.parent.parent / "bench"


def trace(kind: Kind, seed: int = 0) -> Trace:
    return Trace(kind, MODELS, seed=seed, vocab_size=2048)


def probe(rate: float, share: float) -> Figures:
    never = (0.1, 0.2, float("inf"))
    return Figures(
        rate_per_s=rate,
        num_requests=10,
        token_attainment=share,
        request_attainment=share,
        goodput_per_s=rate * share,
        tokens_per_s=64 * rate,
        num_failed=0,
        ttft_s=never,
        tpot_s=never,
        counters={"model_switches": 3.0},
    )


# ---------------------------------------------------------------- traces


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_same_requests_come_at_every_rate_only_sooner(kind: Kind) -> None:
    slow, fast = trace(kind).asks(2.0, 50.0), trace(kind).asks(8.0, 50.0)
    assert len(fast) > 2 * len(slow)
    for one, other in zip(slow, fast, strict=False):
        assert (one.model, one.prompt_ids, one.num_output_tokens) == (other.model, other.prompt_ids, other.num_output_tokens)
        assert one.at_s == pytest.approx(4 * other.at_s)
    assert trace(kind).asks(2.0, 50.0) == slow != trace(kind, seed=1).asks(2.0, 50.0)


def test_a_trace_has_the_rate_the_popularity_and_the_burstiness_that_it_says() -> None:
    for kind in KINDS:
        asks = trace(kind).asks(20.0, 400.0)
        gaps = [after.at_s - before.at_s for before, after in itertools.pairwise(asks)]
        assert len(asks) / 400 == pytest.approx(20, rel=0.12)
        assert statistics.stdev(gaps) / statistics.fmean(gaps) == pytest.approx(kind.burstiness, rel=0.12)
        shares = Counter(ask.model for ask in asks)
        for model, share in trace(kind).popularity:
            assert shares[model] / len(asks) == pytest.approx(share, rel=0.2)
        assert statistics.fmean(ask.num_output_tokens for ask in asks) == pytest.approx(statistics.fmean(kind.output_tokens), rel=0.12)


def test_lengths_of_a_recorded_trace_are_scaled_to_the_models_at_hand(tmp_path: Path) -> None:
    file = tmp_path / "lengths.csv"
    file.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"t,{100 * k},{40 * k}\n" for k in range(1, 9)))
    lengths = read_lengths(file)
    assert statistics.fmean(prompt for prompt, _ in lengths) == pytest.approx(48, abs=1)
    assert statistics.fmean(output for _, output in lengths) == pytest.approx(64, abs=1)
    assert all(4 <= output <= MAX_OUTPUT for _, output in lengths)
    file.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no columns of lengths"):
        read_lengths(file)


# ---------------------------------------------------------------- figures and search


def test_tokens_that_never_come_are_late_and_what_warms_up_is_not_counted() -> None:
    slo = SLO(ttft_s=1.0, tpot_s=0.1)
    served = [
        Served(Ask(0.5, "m0", (9,), 4), [9.0] * 4),  # warm-up
        Served(Ask(1.5, "m0", (9,), 4), [0.5, 0.6, 0.7, 0.8]),
        Served(Ask(2.0, "m0", (9,), 4), [0.5, 1.2], "Overloaded"),
        Served(Ask(2.5, "m0", (9,), 4), [], "Overloaded"),
    ]
    found = figures(served, slo, 2.0, begin_s=1.0, end_s=3.0, counters={})
    assert (found.num_requests, found.num_failed) == (3, 2)
    assert found.token_attainment == pytest.approx(5 / 12) and found.request_attainment == pytest.approx(1 / 3)
    assert found.goodput_per_s == 0.5 and found.tokens_per_s == 3.0
    assert found.ttft_s[2] == float("inf")


def test_percentiles_are_values_that_occurred() -> None:
    assert percentiles([float(k) for k in range(1, 101)]) == (50.0, 90.0, 99.0)
    assert percentiles([2.0]) == (2.0, 2.0, 2.0)


def test_the_search_closes_in_on_the_rate_at_which_the_target_is_met() -> None:
    search = Search(start_per_s=2.0)
    for _ in range(8):
        rate = search.next_rate
        search.probes.append(probe(rate, 1 / (1 + (rate / 20) ** 3)))
    assert search.is_bracketed
    assert search.estimate == pytest.approx(20 * (1 / 9) ** (1 / 3), rel=0.01)


def test_a_target_out_of_reach_is_zero_and_one_never_missed_is_the_highest_rate_tried() -> None:
    assert Search(2.0, probes=[probe(2.0, 0.5), probe(1.0, 0.7)]).estimate == 0.0
    assert Search(2.0, probes=[probe(2.0, 0.99), probe(4.0, 0.95)]).estimate == 4.0


def test_the_static_partition_takes_the_popular_models_and_shares_their_demand() -> None:
    popularity = [("a", 0.5), ("b", 0.3), ("c", 0.15), ("d", 0.05)]
    weights = dict.fromkeys("abcd", 10)
    workers = [WorkerId("w0"), WorkerId("w1")]
    assert partition(popularity, weights, workers, 20) == {"a": "w0", "b": "w1", "c": "w1", "d": "w0"}
    assert partition(popularity, weights, workers, 10) == {"a": "w0", "b": "w1"}


# ---------------------------------------------------------------- report


def results() -> list[Result]:
    searches = {
        "slack": Search(6.0, probes=[probe(6.0, 1.0), probe(12.0, 0.8)]),
        "wrr": Search(6.0, probes=[probe(4.0, 0.9), probe(6.0, 0.5)]),
        "request_level": Search(6.0, probes=[probe(3.0, 0.9), probe(6.0, 0.4)]),
        "static": Search(6.0, probes=[probe(6.0, 0.6)]),
    }
    return [Result(KINDS[0], 0, searches), Result(KINDS[0], 1, searches)]


def test_the_summary_compares_with_the_best_request_level_placement() -> None:
    line = summary(results())
    assert line["rate_at_90"]["static"] == {"even": 0.0}
    assert line["slack_vs_request_level"] == line["worst_slack_vs_request_level"] == pytest.approx(6 * 2**0.5 / 3, abs=1e-3)
    assert line["slack_vs_wrr"] == pytest.approx(6 * 2**0.5 / 4, abs=1e-3)


def test_the_report_and_its_picture_can_be_made(tmp_path: Path) -> None:
    setup = Setup(
        num_models=12,
        weight_mib=(25.0, 53.0, 372.0),
        arena_mib=136,
        num_fitting=3.1,
        step_ms=(4.0, 4.1, 8.0),
        slo=SLO(ttft_s=0.8, tpot_s=0.03),
        seconds=8.0,
        warm_up_s=2.0,
        probes=2,
        repeats=2,
        lengths=None,
        command="--quick",
    )
    text = table(setup, results())
    assert "| even | 8.5 (8.5 to 8.5) | 4.0 (4.0 to 4.0) | 3.0 (3.0 to 3.0) | 0.0 (0.0 to 0.0) | 2.83 | 2.12 |" in text
    draw(setup, results(), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_the_quick_benchmark_ends_with_one_line_of_json() -> None:
    """By one policy of each kind: `wrr` takes the way of `slack`."""
    command = [sys.executable, BENCH / "multiplex.py", "--quick", "--policies", "slack", "request_level", "static"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=140, check=False)
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout.splitlines()[-1])
    assert set(line) >= {"rate_at_90", "slack_vs_request_level", "slack_vs_wrr"}
