"""What a front door measures, as Prometheus text: under `polymux:` and, where the field's dashboards look for it, under `vllm:` too.

Recording is a few dictionary look-ups, since it happens for each token; families are built when somebody scrapes. What workers count
comes from the controller's topology and carries the worker's name.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from polymux.transport.telemetry import METRICS, parse

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# vLLM's buckets (v1/metrics/buckets.py), with finer ones below 10 ms.
TTFT_BUCKETS_S = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640, 2560)
TPOT_BUCKETS_S = (*(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),)
LATENCY_BUCKETS_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)

BOTH = ("polymux:", "vllm:")
OWN = ("polymux:",)
VLLM_COUNTERS = {  # of workers, under the names that the field's dashboards know
    "preemptions": ("num_preemptions", "Sequences that gave their blocks back."),
    "prefix_cache_queries": ("prefix_cache_queries", "Prompt tokens that were looked up in the prefix cache."),
    "prefix_cache_hits": ("prefix_cache_hits", "Prompt tokens that were found there."),
}

Labels = tuple[str, ...]


class Histogram:
    """Counts by bucket; the last bucket is for everything above the highest bound."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulative counts by upper bound, and the sum."""
        bounds = [*(str(float(bound)) for bound in self._bounds), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True)), self._sum


class Metrics:
    """Of one front-door replica, written by its event loop alone."""

    def __init__(self) -> None:
        self._ttft = defaultdict[str, Histogram](lambda: Histogram(TTFT_BUCKETS_S))
        self._itl = defaultdict[str, Histogram](lambda: Histogram(TPOT_BUCKETS_S))
        self._tpot = defaultdict[str, Histogram](lambda: Histogram(TPOT_BUCKETS_S))
        self._latency = defaultdict[str, Histogram](lambda: Histogram(LATENCY_BUCKETS_S))
        self._num_prompt = defaultdict[str, Histogram](lambda: Histogram(TOKEN_BUCKETS))
        self._num_output = defaultdict[str, Histogram](lambda: Histogram(TOKEN_BUCKETS))
        self._num_open = defaultdict[str, int](int)
        self._num_waiting = defaultdict[str, int](int)
        self._counters = defaultdict[str, defaultdict[Labels, float]](lambda: defaultdict(float))

    # -- what happens to a request ------------------------------------------------------------------------------------

    def arrived(self, model: str, num_prompt_tokens: int) -> None:
        self._num_open[model] += 1
        self._num_waiting[model] += 1
        self._num_prompt[model].observe(num_prompt_tokens)
        self._counters["prompt_tokens"][(model,)] += num_prompt_tokens

    def first_token(self, model: str, ttft_s: float) -> None:
        """A request's first token, of whichever of its sequences."""
        self._num_waiting[model] -= 1
        self._ttft[model].observe(ttft_s)

    def gaps(self, model: str) -> Histogram:
        """Of times between two tokens of a sequence; at hand for each request, since it is written for each token."""
        return self._itl[model]

    def ended(
        self, model: str, outcome: str, *, num_output_tokens: int, had_token: bool, latency_s: float, tpot_s: float | None, tenant: str
    ) -> None:
        self._num_open[model] -= 1
        if not had_token:
            self._num_waiting[model] -= 1
        self._latency[model].observe(latency_s)
        self._num_output[model].observe(num_output_tokens)
        self._counters["generation_tokens"][(model,)] += num_output_tokens
        if tpot_s is not None:
            self._tpot[model].observe(tpot_s)
        self._counters["requests"][(model, outcome)] += 1
        if tenant:
            self._counters["tenant_tokens"][(tenant,)] += num_output_tokens

    def finished(self, model: str, reason: str) -> None:
        """A sequence came to its natural end."""
        self._counters["request_success"][(model, reason)] += 1

    def rejected(self, model: str, code: str) -> None:
        self._counters["admission_rejections"][(model, code)] += 1

    def replayed(self, model: str, num_sequences: int) -> None:
        self._counters["replays"][(model,)] += num_sequences

    def responded(self, path: str, status: int) -> None:
        self._counters["http_responses"][(path, str(status))] += 1

    # -- what a scrape gets -------------------------------------------------------------------------------------------

    def render(self, topology: Mapping[str, Any] | None) -> bytes:
        """Prometheus text; `topology` is the controller's latest, where there is one."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Families([*self._families(), *(worker_families(topology) if topology else ())]))
        return generate_latest(registry)

    def _families(self) -> Iterator[Metric]:
        model = ("model_name",)
        waiting: dict[Labels, float] = {(name,): float(count) for name, count in self._num_waiting.items()}
        running: dict[Labels, float] = {(name,): float(count - self._num_waiting[name]) for name, count in self._num_open.items()}
        yield from _gauges(BOTH, "num_requests_running", "Open requests of this front door that have a token.", model, running)
        yield from _gauges(BOTH, "num_requests_waiting", "Open requests of this front door without a token.", model, waiting)
        for name, doc, labels, prefixes in (
            ("prompt_tokens", "Prompt tokens of admitted requests.", model, BOTH),
            ("generation_tokens", "Output tokens of ended requests.", model, BOTH),
            ("request_success", "Sequences that came to their end.", ("model_name", "finished_reason"), BOTH),
            ("admission_rejections", "Requests that were refused.", ("model_name", "reason"), BOTH),
            ("requests", "Requests by how they ended.", ("model_name", "outcome"), OWN),
            ("replays", "Sequences moved from a lost worker to another.", model, OWN),
            ("tenant_tokens", "Output tokens by tenant.", ("tenant",), OWN),
            ("http_responses", "Responses by route and status.", ("path", "status"), OWN),
        ):
            yield from _counters(prefixes, name, doc, labels, self._counters[name])
        for name, doc, histograms, prefixes in (
            ("time_to_first_token_seconds", "Arrival to first token.", self._ttft, BOTH),
            ("inter_token_latency_seconds", "One gap between two tokens.", self._itl, BOTH),
            ("request_time_per_output_token_seconds", "Mean gap of a request.", self._tpot, BOTH),
            ("e2e_request_latency_seconds", "Arrival to the end of a request.", self._latency, BOTH),
            ("request_prompt_tokens", "Prompt tokens of a request.", self._num_prompt, BOTH),
            ("request_generation_tokens", "Output tokens of a request.", self._num_output, BOTH),
        ):
            yield from _histograms(prefixes, name, doc, histograms)


class _Families(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def worker_families(topology: Mapping[str, Any]) -> Iterator[Metric]:
    """Gauges and counters of every worker, and of every model, from the controller's snapshot."""
    workers = topology.get("workers", ())
    gauges: dict[str, dict[Labels, float]] = defaultdict(dict)
    usage: dict[Labels, float] = {}
    counted = WorkerCounters()
    for worker in workers:
        labels = (str(worker["worker_id"]), str(worker["role"]))
        gauges["worker_up"][labels] = float(worker["state"] == "alive")
        if worker["state"] == "lost":
            continue
        gauges["transport_epoch"][labels] = float(worker["epoch"])
        gauges["kv_free_bytes"][labels] = float(worker["num_free_kv_bytes"])
        if worker["num_free_host_bytes"] is not None:
            gauges["kv_host_free_bytes"][labels] = float(worker["num_free_host_bytes"])
        used = float(worker["num_used_kv_bytes"])
        gauges["kv_used_bytes"][labels] = used
        usage[labels] = used / max(used + worker["num_free_kv_bytes"], 1.0)
        gauges["kv_blocks_out"][labels] = float(worker["num_blocks_out"])
        gauges["last_step_age_seconds"][labels] = 0.0 if worker["step_age_s"] is None else float(worker["step_age_s"])
        counted.add(labels, worker["counters"])
    for name, values in gauges.items():
        yield from _gauges(OWN, name, _WORKER_DOCS[name], ("worker", "role"), values)
    yield from _gauges(OWN, "kv_cache_usage_perc", "Part of the arena's KV that sequences hold, 0 to 1.", ("worker", "role"), usage)
    yield from _gauges(("vllm:",), "kv_cache_usage_perc", "Part of the arena's KV that sequences hold, 0 to 1.", ("engine", "role"), usage)
    yield from counted.families()
    yield from _cache_config(topology)
    yield from _model_families(topology)


class WorkerCounters:
    """What workers count, by family: plain, with labels of its own, or a histogram (`telemetry.flatten`)."""

    def __init__(self) -> None:
        self._plain: dict[str, dict[Labels, float]] = defaultdict(dict)
        self._labelled: dict[tuple[str, Labels], dict[Labels, float]] = defaultdict(dict)
        self._buckets: dict[tuple[str, Labels], dict[Labels, dict[str, float]]] = defaultdict(lambda: defaultdict(dict))
        self._sums: dict[tuple[str, Labels], dict[Labels, float]] = defaultdict(dict)

    def add(self, worker: Labels, counters: Mapping[str, float]) -> None:
        """What has no name of ours, or no value, is left out."""
        for text, value in counters.items():
            found = parse(text)
            if found is None or not math.isfinite(value):
                continue
            (name, labels), number = found, float(value)
            bound = labels.pop("le", None)
            names, key = tuple(labels), (*worker, *labels.values())
            if bound is not None:
                self._buckets[name.removesuffix("_bucket"), names][key][bound] = number
            elif labels and name.endswith("_sum"):
                self._sums[name.removesuffix("_sum"), names][key] = number
            elif labels:
                self._labelled[name, names][key] = number
            else:
                self._plain[name.removesuffix("_total")][key] = number

    def families(self) -> Iterator[Metric]:
        """A name is one family: where it has labels or is a histogram, the plain counter would say the same again."""
        said = {name for name, _ in (*self._labelled, *self._buckets)}
        for name, values in self._plain.items():
            if name not in said:
                yield from _counters(OWN, name, "Counted by workers since they started.", _WORKER, values)
            if name in VLLM_COUNTERS:
                alias, doc = VLLM_COUNTERS[name]
                yield from _counters(("vllm:",), alias, doc, ("engine", "role"), values)
        for (name, labels), values in self._labelled.items():
            yield from _counters(OWN, name, _doc(name), (*_WORKER, *labels), values)
        for (name, labels), series in self._buckets.items():
            family = HistogramMetricFamily(OWN[0] + name, _doc(name), labels=(*_WORKER, *labels))
            for key, buckets in series.items():
                ordered = sorted(buckets.items(), key=lambda bucket: float(bucket[0]))
                family.add_metric(key, ordered, self._sums[name, labels].get(key, 0.0))
            yield family


def _doc(name: str) -> str:
    return METRICS[name].help if name in METRICS else "Counted by workers since they started."


_WORKER = ("worker", "role")
_WORKER_DOCS = {
    "worker_up": "1 where the worker is alive and steps.",
    "transport_epoch": "The worker's incarnation.",
    "kv_free_bytes": "Arena bytes that KV blocks could still take.",
    "kv_host_free_bytes": "Bytes of the node's host tier that swapped KV could still take; workers of a node share it.",
    "kv_blocks_out": "KV blocks held by sequences, grants and quarantine, in the arena and in the host tier.",
    "kv_used_bytes": "Arena bytes in KV blocks that sequences, grants and quarantine hold.",
    "last_step_age_seconds": "Seconds since a busy worker's last step; 0 when idle.",
}


def _cache_config(topology: Mapping[str, Any]) -> Iterator[Metric]:
    """How many blocks of a model a worker's KV room comes to; models share the room, so each count holds for that model alone."""
    values: dict[Labels, float] = {}
    for worker in topology.get("workers", ()):
        if worker["state"] != "lost":
            room = worker["num_used_kv_bytes"] + worker["num_free_kv_bytes"]
            for one in topology.get("models", ()):
                labels = (str(one["model"]), str(worker["worker_id"]), str(one["block_size"]), str(room // one["block_bytes"]))
                values[labels] = 1.0
    names = ("model_name", "engine", "block_size", "num_gpu_blocks")
    yield from _gauges(BOTH, "cache_config_info", "KV blocks by model and worker, as labels.", names, values)


def _model_families(topology: Mapping[str, Any]) -> Iterator[Metric]:
    models = topology.get("models", ())
    resident: dict[Labels, float] = {(str(one["model"]),): float(len(one["resident_on"])) for one in models}
    attained: dict[Labels, float] = {
        (str(one["model"]), "ttft_and_tpot"): one["num_attained"] / one["num_finished"] for one in models if one["num_finished"]
    }
    yield from _gauges(OWN, "model_resident_workers", "Workers whose arena holds the model.", ("model_name",), resident)
    yield from _gauges(OWN, "slo_attainment_ratio", "Share of finished requests within their SLOs.", ("model_name", "slo"), attained)


def _gauges(prefixes: Sequence[str], name: str, doc: str, labels: Labels, values: Mapping[Labels, float]) -> Iterator[Metric]:
    for prefix in prefixes:
        gauge = GaugeMetricFamily(prefix + name, doc, labels=labels)
        for key, value in values.items():
            gauge.add_metric(key, value)
        yield gauge


def _counters(prefixes: Sequence[str], name: str, doc: str, labels: Labels, values: Mapping[Labels, float]) -> Iterator[Metric]:
    for prefix in prefixes:
        counter = CounterMetricFamily(prefix + name, doc, labels=labels)
        for key, value in values.items():
            counter.add_metric(key, value)
        yield counter


def _histograms(prefixes: Sequence[str], name: str, doc: str, values: Mapping[str, Histogram]) -> Iterator[Metric]:
    for prefix in prefixes:
        family = HistogramMetricFamily(prefix + name, doc, labels=("model_name",))
        for model, histogram in values.items():
            buckets, total = histogram.buckets()
            family.add_metric((model,), buckets, total)
        yield family
