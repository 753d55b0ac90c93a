"""Counters, gauges and histograms: recorded here, exported by deploy under the project's prefix and the field's aliases.

From a worker to the front door they travel as named numbers, `name{label=value}`, which can be summed over workers.

Every metric is declared in `METRICS` with its labels and buckets, so that its name is written once; recording under another name, or with
another number of labels, is an error. Seconds and bytes, never milliseconds or mebibytes.
"""

from __future__ import annotations

import enum
import re
import threading
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate

_MAX_SERIES = 1000  # label combinations of one metric; the rest are counted together
_OVERFLOW = "other"


class MetricKind(enum.StrEnum):
    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds; one above all is implied


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One series at the moment of a snapshot. `counts` are per bucket, not cumulative, the last one above all bounds."""

    name: str
    labels: tuple[str, ...]
    value: float  # of a histogram: the sum
    counts: tuple[int, ...] = ()


REQUEST_S = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0)
TTFT_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TPOT_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
SWITCH_S = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ERROR_RATIOS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
TOKENS = (1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0)


def _counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.COUNTER, help=text, labels=labels)


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, help=text, labels=labels)


def _histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.HISTOGRAM, help=text, labels=labels, buckets=buckets)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _gauge("num_requests_running", "Sequences in a batch.", "model_name"),
        _gauge("num_requests_waiting", "Sequences that wait for a worker, for blocks or for their turn.", "model_name"),
        _gauge("kv_cache_usage_perc", "Used part of the KV blocks, 0 to 1.", "engine"),
        _gauge("last_step_age_seconds", "Since tokens last advanced while there was work.", "engine"),
        _gauge("transport_epoch", "The incarnation under which a worker speaks.", "engine"),
        _counter("prompt_tokens", "Tokens prefilled.", "model_name"),
        _counter("generation_tokens", "Tokens generated.", "model_name"),
        _counter("num_preemptions", "Sequences preempted for lack of blocks.", "model_name"),
        _counter("prefix_cache_queries", "Tokens looked up in the prefix cache.", "model_name"),
        _counter("prefix_cache_hits", "Tokens found in the prefix cache.", "model_name"),
        _counter("request_success", "Requests that finished, by reason.", "model_name", "finished_reason"),
        _counter("request_failure", "Requests that ended otherwise, by error class.", "model_name", "error"),
        _counter("admission_rejections", "Requests refused at the door, by error class.", "model_name", "reason"),
        _counter("tenant_tokens", "Tokens by tenant.", "tenant"),
        _counter(
            "model_switches",
            "Changes of a worker's active model, by where its weights were: resident, prefetched, or loaded for it.",
            "reason",
        ),
        _counter("kv_transfer_bytes", "Bytes of KV that landed.", "transport", "edge"),
        _counter("kv_transfers", "KV transfers by outcome: committed, or an error class.", "transport", "edge", "outcome"),
        _counter("kv_stale_reads", "Attention over blocks whose transfer was not committed. Must stay 0.", "engine"),
        _counter("kv_lease_expired", "KV transfers whose deadline passed.", "engine"),
        _histogram("time_to_first_token_seconds", "Arrival to first token.", TTFT_S, "model_name"),
        _histogram("inter_token_latency_seconds", "One gap between two tokens.", TPOT_S, "model_name"),
        _histogram("request_time_per_output_token_seconds", "Mean gap of a request.", TPOT_S, "model_name"),
        _histogram("e2e_request_latency_seconds", "Arrival to end.", REQUEST_S, "model_name"),
        _histogram("request_queue_time_seconds", "Arrival to the start of the prefill.", REQUEST_S, "model_name"),
        _histogram("request_prefill_time_seconds", "Start of the prefill to the first token.", REQUEST_S, "model_name"),
        _histogram("request_decode_time_seconds", "First to last token.", REQUEST_S, "model_name"),
        _histogram("iteration_tokens_total", "Tokens in one step.", TOKENS, "engine"),
        _histogram("cost_error_ratio", "|predicted - actual| / actual seconds of a prefill, decode or switch.", ERROR_RATIOS, "step"),
        _histogram("kv_transfer_seconds", "Order to commit of a KV transfer.", TTFT_S, "transport", "edge"),
        _counter("cost_predicted_seconds", "Seconds that steps, switches and swaps were predicted to take.", "step"),
        _counter("cost_actual_seconds", "Seconds that they took.", "step"),
        _histogram(
            "model_switch_seconds",
            "What a switch waited (switch), and how long weights took to come in (load, prefetch).",
            SWITCH_S,
            "phase",
        ),
    )
}


class Telemetry:
    """One process's metrics. Thread-safe; recording costs a lock and a dictionary entry."""

    def __init__(self, metrics: dict[str, Metric] | None = None) -> None:
        self._metrics = METRICS if metrics is None else metrics
        self._lock = threading.Lock()
        self._values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in self._metrics}
        self._counts: dict[str, dict[tuple[str, ...], list[int]]] = {name: {} for name, m in self._metrics.items() if m.buckets}

    def add(self, name: str, value: float = 1.0, *labels: str) -> None:
        """Raise a counter."""
        assert value >= 0 and self._metrics[name].kind is MetricKind.COUNTER, name
        with self._lock:
            series, labels = self._series(name, labels)
            series[labels] = series.get(labels, 0.0) + value

    def set(self, name: str, value: float, *labels: str) -> None:
        """Set a gauge."""
        assert self._metrics[name].kind is MetricKind.GAUGE, name
        with self._lock:
            series, labels = self._series(name, labels)
            series[labels] = value

    def observe(self, name: str, value: float, *labels: str) -> None:
        """Count a value in a histogram."""
        metric = self._metrics[name]
        assert metric.kind is MetricKind.HISTOGRAM, name
        bucket = bisect_left(metric.buckets, value)
        with self._lock:
            series, labels = self._series(name, labels)
            series[labels] = series.get(labels, 0.0) + value
            counts = self._counts[name].get(labels)
            if counts is None:
                counts = self._counts[name][labels] = [0] * (len(metric.buckets) + 1)
            counts[bucket] += 1

    def snapshot(self) -> tuple[Sample, ...]:
        """Every series that was recorded, in declaration order."""
        with self._lock:
            return tuple(
                Sample(name=name, labels=labels, value=value, counts=tuple(self._counts[name][labels]) if name in self._counts else ())
                for name, series in self._values.items()
                for labels, value in series.items()
            )

    def _series(self, name: str, labels: tuple[str, ...]) -> tuple[dict[tuple[str, ...], float], tuple[str, ...]]:
        expected = self._metrics[name].labels
        assert len(labels) == len(expected), f"{name} takes the labels {expected}, not {labels}"
        series = self._values[name]
        if labels not in series and len(series) >= _MAX_SERIES:
            labels = (_OVERFLOW,) * len(labels)
        return series, labels


_NAME = re.compile(r"([a-z][a-z0-9_]*)(?:\{([a-z_]+=[A-Za-z0-9_.+-]*(?:,[a-z_]+=[A-Za-z0-9_.+-]*)*)\})?")


def flatten(samples: Iterable[Sample], metrics: Mapping[str, Metric] = METRICS) -> dict[str, float]:
    """Samples as named numbers. A histogram is its cumulative `name_bucket`s, by the bound `le`, and its `name_sum`."""
    flat: dict[str, float] = {}
    for sample in samples:
        metric = metrics[sample.name]
        labels = [f"{label}={value}" for label, value in zip(metric.labels, sample.labels, strict=True)]
        if metric.kind is not MetricKind.HISTOGRAM:
            flat[_named(sample.name, labels)] = sample.value
            continue
        flat[_named(f"{sample.name}_sum", labels)] = sample.value
        bounds = [*map(str, metric.buckets), "+Inf"]
        for bound, count in zip(bounds, accumulate(sample.counts), strict=True):
            flat[_named(f"{sample.name}_bucket", [*labels, f"le={bound}"])] = float(count)
    return flat


def parse(name: str) -> tuple[str, dict[str, str]] | None:
    """The name of a flattened number, and its labels; None for what is not one."""
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    pairs = (pair.partition("=") for pair in (found[2] or "").split(",") if pair)
    return found[1], {label: value for label, _, value in pairs}


def _named(name: str, labels: list[str]) -> str:
    return f"{name}{{{','.join(labels)}}}" if labels else name
