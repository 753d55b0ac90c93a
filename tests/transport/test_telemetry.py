"""Metrics: declared once, counted exactly under threads, bounded in number."""

from __future__ import annotations

import threading

import pytest

from polymux.transport.telemetry import METRICS, MetricKind, Telemetry, flatten, parse


def sample(telemetry: Telemetry, name: str, *labels: str) -> float:
    return next(s.value for s in telemetry.snapshot() if (s.name, s.labels) == (name, labels))


def test_counters_add_up_over_threads() -> None:
    telemetry = Telemetry()

    def work() -> None:
        for _ in range(1000):
            telemetry.add("prompt_tokens", 2, "m")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sample(telemetry, "prompt_tokens", "m") == 8000


def test_a_gauge_keeps_its_last_value_by_label() -> None:
    telemetry = Telemetry()
    telemetry.set("num_requests_running", 3, "a")
    telemetry.set("num_requests_running", 1, "a")
    telemetry.set("num_requests_running", 7, "b")
    assert (sample(telemetry, "num_requests_running", "a"), sample(telemetry, "num_requests_running", "b")) == (1, 7)


def test_a_histogram_counts_each_value_in_one_bucket() -> None:
    telemetry = Telemetry()
    bounds = METRICS["time_to_first_token_seconds"].buckets
    values = [0.0005, bounds[3], bounds[3] + 1e-9, 10_000.0]
    for value in values:
        telemetry.observe("time_to_first_token_seconds", value, "m")
    (one,) = telemetry.snapshot()
    assert one.value == pytest.approx(sum(values))
    assert [i for i, count in enumerate(one.counts) if count] == [0, 3, 4, len(bounds)]
    assert sum(one.counts) == len(values)


@pytest.mark.parametrize("record", ["add", "set", "observe"])
def test_an_undeclared_metric_is_an_error(record: str) -> None:
    with pytest.raises(KeyError):
        getattr(Telemetry(), record)("no_such_metric", 1.0)


def test_a_missing_label_or_a_wrong_kind_is_an_error() -> None:
    with pytest.raises(AssertionError, match="model_name"):
        Telemetry().add("prompt_tokens", 1.0)
    with pytest.raises(AssertionError):
        Telemetry().add("num_requests_running", 1.0, "m")
    with pytest.raises(AssertionError):
        Telemetry().add("prompt_tokens", -1.0, "m")


def test_labels_from_outside_cannot_grow_without_bound() -> None:
    telemetry = Telemetry()
    for i in range(5000):
        telemetry.add("tenant_tokens", 1.0, f"tenant-{i}")
    samples = telemetry.snapshot()
    assert len(samples) <= 1001
    assert sum(s.value for s in samples) == 5000


def test_names_follow_the_field_s_conventions() -> None:
    for metric in METRICS.values():
        assert metric.help.endswith(".")
        assert not metric.name.endswith(("_ms", "_mb"))
        assert (metric.kind is MetricKind.HISTOGRAM) == bool(metric.buckets)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_samples_travel_as_numbers_whose_names_say_what_they_are() -> None:
    telemetry = Telemetry()
    telemetry.add("model_switches", 3, "resident")
    telemetry.add("kv_transfer_bytes", 5, "tcp", "decode-0.x")
    for seconds in (0.0002, 0.0002, 0.3, 99.0):
        telemetry.observe("model_switch_seconds", seconds, "load")
    flat = flatten(telemetry.snapshot())
    assert flat["model_switches{reason=resident}"] == 3
    assert flat["model_switch_seconds_sum{phase=load}"] == pytest.approx(99.3004)
    bounds = {parse(name)[1]["le"]: value for name, value in flat.items() if "_bucket" in name}  # type: ignore[index]
    assert (bounds["0.0001"], bounds["0.00025"], bounds["0.5"], bounds["30.0"], bounds["+Inf"]) == (0, 2, 3, 3, 4)
    assert parse("kv_transfer_bytes{transport=tcp,edge=decode-0.x}") == ("kv_transfer_bytes", {"transport": "tcp", "edge": "decode-0.x"})
    assert all(parse(name) is not None for name in flat)


@pytest.mark.parametrize("name", ["", "Upper", "a b", "a{", "a{}", "a{b}", 'a{b="c"}', "a{b=c", "a{b=c,}", "a{b=c}d", "a\n"])
def test_what_is_not_a_name_of_ours_is_not_read_as_one(name: str) -> None:
    assert parse(name) is None
