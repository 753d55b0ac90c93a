"""What the demo measured: one record a request, one summary of them all, and what in it would be a failure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from polymux.deploy.demo.requests import Ask

MIN_SWITCHES = 10


@dataclass(slots=True)
class Record:
    """One request as its client saw it. Clock readings are the client's, in seconds."""

    ask: Ask
    state: str = "planned"  # planned | waiting | decoding | done | failed
    sent_s: float = 0.0
    first_s: float | None = None  # first text; only a stream shows it
    last_s: float | None = None
    num_tokens: int = 0
    text: str = ""
    finish_reason: str = ""
    error: str = ""
    worker: str = ""  # the decode workers that ran its model when last looked at, or had it resident

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_s is None else self.first_s - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds per token after the first; None for a whole answer or a single token."""
        if self.first_s is None or self.last_s is None or self.num_tokens < 2:
            return None
        return (self.last_s - self.first_s) / (self.num_tokens - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Latencies are those of streamed requests; counters are the cluster's."""

    num_requests: int
    num_failed: int
    seconds: float  # from the first request to the last token
    num_tokens: int
    tokens_per_s: float
    ttft_p50_s: float
    ttft_p95_s: float
    tpot_p50_s: float
    tpot_p95_s: float
    slo_attainment: float  # of all requests, by the controller's books
    switches: int  # changes of a worker's active model
    loads: int  # of them, those that copied weights into the arena
    evictions: int
    preemptions: int
    kv_bytes_migrated: int
    transfers_committed: int
    transfers_failed: int
    blocks_out: int  # at the end

    def faults(self) -> list[str]:
        """Why this run is a failure; empty when it is none."""
        claims = {
            f"{self.num_failed} of {self.num_requests} requests failed": self.num_failed > 0,
            f"{self.switches} model switches, at least {MIN_SWITCHES} were expected": self.switches < MIN_SWITCHES,
            "no KV was migrated": self.transfers_committed == 0,
            f"{self.transfers_failed} KV transfers failed": self.transfers_failed > 0,
            f"{self.blocks_out} KV blocks are still out": self.blocks_out > 0,
        }
        return [claim for claim, is_true in claims.items() if is_true]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "faults": self.faults()}


def summarize(records: Sequence[Record], topology: Mapping[str, Any]) -> Summary:
    done = [record for record in records if record.state == "done"]
    began_s = min(record.sent_s for record in records)
    seconds = max(record.last_s or record.sent_s for record in records) - began_s
    num_tokens = sum(record.num_tokens for record in done)
    ttft = [record.ttft_s for record in done if record.ttft_s is not None]
    tpot = [record.tpot_s for record in done if record.tpot_s is not None]
    counters = topology["stats"]["counters"]
    finished = sum(model["num_finished"] for model in topology["models"])
    migrated = [worker["counters"] for worker in topology["workers"] if worker["role"] == "decode"]  # each transfer once
    return Summary(
        num_requests=len(records),
        num_failed=len(records) - len(done),
        seconds=seconds,
        num_tokens=num_tokens,
        tokens_per_s=num_tokens / seconds if seconds else 0.0,
        ttft_p50_s=percentile(ttft, 0.5),
        ttft_p95_s=percentile(ttft, 0.95),
        tpot_p50_s=percentile(tpot, 0.5),
        tpot_p95_s=percentile(tpot, 0.95),
        slo_attainment=sum(model["num_attained"] for model in topology["models"]) / finished if finished else 0.0,
        switches=int(counters.get("model_switches", 0)),
        loads=int(counters.get("model_loads", 0)),
        evictions=int(counters.get("model_evictions", 0)),
        preemptions=int(counters.get("preemptions", 0)),
        kv_bytes_migrated=_total(migrated, "kv_transfer_bytes"),
        transfers_committed=_total(migrated, "kv_transfers_committed"),
        transfers_failed=_total(migrated, "kv_transfers_failed"),
        blocks_out=topology["stats"]["num_blocks_out"],
    )


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile; NaN of nothing."""
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)] if ordered else math.nan


def _total(counters: Sequence[Mapping[str, float]], name: str) -> int:
    return int(sum(one.get(name, 0) for one in counters))
