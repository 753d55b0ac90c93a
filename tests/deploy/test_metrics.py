"""What a scrape gets: the names that the field's dashboards know, counted right, and what workers report."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from zero_engine import zero_spec
from zero_stack import ZeroStack

from polymux.actors.meter import Meter
from polymux.actors.weights.residency import Switch
from polymux.deploy.http.auth import hash_key
from polymux.deploy.metrics import CONTENT_TYPE, Histogram, Metrics
from polymux.transport.errors import Overloaded
from polymux.transport.units import ModelName

PROMPT: dict[str, Any] = {"model": "bytes", "prompt": "hello", "max_tokens": 64}
MODEL = {"model_name": "bytes"}
TOPOLOGY: dict[str, Any] = {
    "workers": [
        {
            "worker_id": "decode-0",
            "role": "decode",
            "state": "alive",
            "epoch": 7,
            "num_free_host_bytes": 8192,
            "num_free_kv_bytes": 3072,
            "num_used_kv_bytes": 1024,
            "num_blocks_out": 3,
            "step_age_s": 0.5,
            "counters": {
                "preemptions": 2.0,
                "prefix_cache_queries": 64.0,
                "prefix_cache_hits": 48.0,
                "swap_out_bytes": 512.0,
                "kv_transfer_bytes": 10.0,
                "model_switches": 5.0,
                "model_switches{reason=resident}": 3.0,
                "model_switches{reason=loaded}": 2.0,
                "model_switch_seconds": 0.25,
                "model_switch_seconds_sum{phase=switch}": 0.25,
                "model_switch_seconds_bucket{phase=switch,le=0.1}": 4.0,
                "model_switch_seconds_bucket{phase=switch,le=+Inf}": 5.0,
                "bad name": 1.0,
                "bad{label}": 1.0,
                'bad{a="b"}': 1.0,
                "not_finite": float("nan"),
            },
        },
        {"worker_id": "decode-1", "role": "decode", "state": "lost"},
    ],
    "models": [{"model": "bytes", "resident_on": ["decode-0"], "num_finished": 4, "num_attained": 3, "block_size": 16, "block_bytes": 512}],
}


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample by name and labels; the text must be what Prometheus parses, each sample there once."""
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found
            found[key] = sample.value
    return found


def value(text: bytes, name: str, **labels: str) -> float:
    return samples(text)[name, tuple(sorted(labels.items()))]


async def test_a_request_is_counted_under_both_prefixes(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json=PROMPT)
    await client.post("/v1/completions", json={**PROMPT, "max_tokens": 2, "stream": True})
    response = await client.get("/metrics")
    assert response.headers["content-type"] == CONTENT_TYPE
    for prefix in ("vllm:", "polymux:"):
        assert value(response.content, f"{prefix}prompt_tokens_total", **MODEL) == 10
        assert value(response.content, f"{prefix}generation_tokens_total", **MODEL) == 8
        assert value(response.content, f"{prefix}request_success_total", **MODEL, finished_reason="stop") == 1
        assert value(response.content, f"{prefix}request_success_total", **MODEL, finished_reason="length") == 1
        assert value(response.content, f"{prefix}time_to_first_token_seconds_count", **MODEL) == 2
        assert value(response.content, f"{prefix}e2e_request_latency_seconds_count", **MODEL) == 2
        assert value(response.content, f"{prefix}request_generation_tokens_sum", **MODEL) == 8
        assert value(response.content, f"{prefix}num_requests_running", **MODEL) == 0
        assert value(response.content, f"{prefix}num_requests_waiting", **MODEL) == 0
    assert value(response.content, "polymux:requests_total", **MODEL, outcome="finished") == 2
    assert value(response.content, "polymux:http_responses_total", path="/v1/completions", status="200") == 2


async def test_running_and_waiting_requests_are_told_apart(
    make_stack: Callable[..., ZeroStack], connect: Callable[[ZeroStack], Any]
) -> None:
    stack = make_stack(step_s=0.01)
    async with connect(stack) as client:
        worker = stack.workers[0]
        may_go = threading.Event()
        worker.may_step = lambda: may_go.wait(5.0)
        request = asyncio.create_task(client.post("/v1/completions", json={**PROMPT, "ignore_eos": True, "max_tokens": 50}))
        while not worker.num_running:
            await asyncio.sleep(0.002)
        waiting = stack.frontdoor.metrics.render(None)
        assert (value(waiting, "vllm:num_requests_running", **MODEL), value(waiting, "vllm:num_requests_waiting", **MODEL)) == (0, 1)
        may_go.set()
        await asyncio.sleep(0.1)
        running = stack.frontdoor.metrics.render(None)
        assert (value(running, "vllm:num_requests_running", **MODEL), value(running, "vllm:num_requests_waiting", **MODEL)) == (1, 0)
        await request
        ended = stack.frontdoor.metrics.render(None)
    assert value(ended, "vllm:inter_token_latency_seconds_count", **MODEL) == 49
    assert value(ended, "vllm:inter_token_latency_seconds_sum", **MODEL) == pytest.approx(0.5, rel=0.6)
    assert value(ended, "vllm:request_time_per_output_token_seconds_count", **MODEL) == 1


async def test_refusals_tenants_and_unknown_paths_are_counted(
    make_stack: Callable[..., ZeroStack], connect: Callable[[ZeroStack], Any]
) -> None:
    stack = make_stack(http_settings={"api_keys": (hash_key("the-only-key"),)})
    async with connect(stack) as client:
        client.headers["Authorization"] = "Bearer the-only-key"
        await client.post("/v1/completions", json=PROMPT)
        stack.control.refusal = Overloaded("full")
        await client.post("/v1/completions", json=PROMPT)
        for i in range(3):
            await client.get(f"/nowhere/{i}")
        found = (await client.get("/metrics")).content
    assert value(found, "vllm:admission_rejections_total", **MODEL, reason="overloaded") == 1
    assert value(found, "polymux:requests_total", **MODEL, outcome="refused") == 1
    assert value(found, "polymux:tenant_tokens_total", tenant=stack.control.asks[0].tenant) == 6
    assert value(found, "polymux:http_responses_total", path="unknown", status="404") == 3
    assert value(found, "vllm:num_requests_waiting", **MODEL) == 0


def test_workers_and_models_come_from_the_controllers_snapshot() -> None:
    text = Metrics().render(TOPOLOGY)
    worker = {"worker": "decode-0", "role": "decode"}
    assert value(text, "polymux:worker_up", **worker) == 1
    assert value(text, "polymux:worker_up", worker="decode-1", role="decode") == 0
    assert value(text, "polymux:transport_epoch", **worker) == 7
    assert value(text, "polymux:last_step_age_seconds", **worker) == 0.5
    assert value(text, "polymux:kv_transfer_bytes_total", **worker) == 10
    assert value(text, "polymux:preemptions_total", **worker) == 2
    assert value(text, "vllm:num_preemptions_total", engine="decode-0", role="decode") == 2
    assert value(text, "polymux:slo_attainment_ratio", model_name="bytes", slo="ttft_and_tpot") == 0.75
    assert not [name for name, _ in samples(text) if "bad" in name or "finite" in name]


def test_switches_are_told_by_where_the_weights_were_and_by_how_long_they_took() -> None:
    text = Metrics().render(TOPOLOGY)
    worker = {"worker": "decode-0", "role": "decode"}
    assert value(text, "polymux:model_switches_total", **worker, reason="resident") == 3
    assert value(text, "polymux:model_switches_total", **worker, reason="loaded") == 2
    assert value(text, "polymux:model_switch_seconds_bucket", **worker, phase="switch", le="0.1") == 4
    assert value(text, "polymux:model_switch_seconds_count", **worker, phase="switch") == 5
    assert value(text, "polymux:model_switch_seconds_sum", **worker, phase="switch") == 0.25
    assert not [name for name, _ in samples(text) if name == "polymux:model_switch_seconds_total"]


def test_kv_usage_and_cache_are_told_as_routers_of_the_field_ask_for_them() -> None:
    text = Metrics().render(TOPOLOGY)
    engine = {"engine": "decode-0", "role": "decode"}
    assert value(text, "vllm:kv_cache_usage_perc", **engine) == 0.25
    assert value(text, "polymux:kv_cache_usage_perc", worker="decode-0", role="decode") == 0.25
    assert value(text, "vllm:cache_config_info", model_name="bytes", engine="decode-0", block_size="16", num_gpu_blocks="8") == 1
    assert value(text, "vllm:prefix_cache_queries_total", **engine) == 64
    assert value(text, "vllm:prefix_cache_hits_total", **engine) == 48
    assert value(text, "polymux:swap_out_bytes_total", worker="decode-0", role="decode") == 512


def test_a_meters_counters_come_out_as_the_metrics_they_are() -> None:
    meter = Meter()
    for nbytes, seconds in ((0, 0.0002), (4096, 0.02), (4096, 0.03)):
        meter.switched(
            Switch(source=None, target=ModelName("a"), seconds=seconds, nbytes=nbytes, evicted=(), was_prefetched=seconds == 0.03)
        )
    worker = {**TOPOLOGY["workers"][0], "counters": dict(meter.counters(()))}
    text = Metrics().render({**TOPOLOGY, "workers": [worker]})
    label = {"worker": "decode-0", "role": "decode"}
    for reason in ("resident", "prefetched", "loaded"):
        assert value(text, "polymux:model_switches_total", **label, reason=reason) == 1
    assert value(text, "polymux:model_switch_seconds_bucket", **label, phase="switch", le="0.025") == 2
    assert value(text, "polymux:model_switch_seconds_sum", **label, phase="switch") == pytest.approx(0.0502)


def test_predictions_are_held_against_what_happened() -> None:
    meter, spec = Meter(), zero_spec("bytes", Path(), vocab_size=8, max_model_len=64, eos=(1,))
    meter.add_model(spec)
    for _ in range(20):
        meter.decoded(spec.model, 1, 16, meter.predict_decode_s(spec.model, 1, 16) * 2)
    worker = {**TOPOLOGY["workers"][0], "counters": dict(meter.counters(()))}
    text = Metrics().render({**TOPOLOGY, "workers": [worker]})
    label = {"worker": "decode-0", "role": "decode", "step": "decode"}
    assert value(text, "polymux:cost_error_ratio_count", **label) == 20
    assert value(text, "polymux:cost_error_ratio_sum", **label) == pytest.approx(10.0, rel=0.01)


def test_a_bucket_counts_what_is_at_most_its_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for number in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(number)
    histogram.observe(2.0, times=3)
    assert histogram.buckets() == ([("1.0", 2.0), ("2.0", 6.0), ("+Inf", 7.0)], 18.0)
