"""A controller on a table: workers and front doors are plain calls, and the test moves the clock."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

from polymux.cluster.config import ClusterConfig
from polymux.cluster.controller import Controller
from polymux.cluster.topology import WorkerStatus
from polymux.transport.messages import Admit, KVLayout, ModelLoad, ModelSpec, Placement, Release, Role, WorkerHello, WorkerReport
from polymux.transport.units import MIB, ClientId, Epoch, ModelName, WorkerId

KV = KVLayout(num_layers=4, num_kv_heads=2, head_dim=32, dtype="bfloat16")
FRONT = ClientId("front-0")


def spec(model: str, weight_bytes: int = 8 * MIB, digest: str = "") -> ModelSpec:
    return ModelSpec(
        model=ModelName(model),
        path=f"/models/{model}",
        digest=digest or model,
        config_json="{}",
        dtype="bfloat16",
        kv=KV,
        weight_bytes=weight_bytes,
        vocab_size=4096,
        max_model_len=2048,
        eos_token_ids=(0,),
    )


@dataclass
class Bench:
    """A controller with a clock that the test moves."""

    settings: dict[str, Any] = field(default_factory=dict)
    now_s: float = 1000.0

    def __post_init__(self) -> None:
        self.config = ClusterConfig.from_dict(self.settings)
        self.epochs = itertools.count(100)
        self.controller = Controller(self.config, clock=lambda: self.now_s, next_epoch=self.epochs.__next__)

    def join(self, worker_id: str, epoch: int | None = None, arena_bytes: int = 64 * MIB) -> Epoch:
        hello = WorkerHello(
            worker_id=WorkerId(worker_id),
            role=Role.PREFILL if worker_id.startswith("p") else Role.DECODE,
            address=f"tcp://host:{worker_id}",
            host_id="host",
            pid=1,
            arena_bytes=arena_bytes,
            num_threads=1,
            epoch=Epoch(epoch) if epoch is not None else None,
        )
        return self.controller.join(hello).epoch

    def report(self, worker_id: str, epoch: int, *loads: ModelLoad, **changes: Any) -> None:
        """`loads` are of the role that the worker's name begins with."""
        is_prefill = worker_id.startswith("p")
        report = WorkerReport(
            worker_id=WorkerId(worker_id),
            epoch=Epoch(epoch),
            active_model=None,
            loads=() if is_prefill else loads,
            prefills=loads if is_prefill else (),
            costs=(),
            switch_bytes_per_s=1e9,
            num_free_kv_bytes=32 * MIB,
            num_blocks_out=0,
            last_step_age_s=None,
        )
        self.controller.report(replace(report, **changes))

    def admit(self, request_id: str = "r", model: str = "a", **changes: Any) -> Placement:
        ask = Admit(
            request_id=request_id,
            client_id=FRONT,
            model=ModelName(model),
            num_prompt_tokens=100,
            max_tokens=50,
            num_sequences=1,
            deadline_s=60.0,
        )
        return self.controller.admit(replace(ask, **changes))

    def status(self, worker_id: str) -> WorkerStatus:
        """Of a worker's present incarnation, else of the last one."""
        return next(worker for worker in self.controller.topology().workers if worker.worker_id == worker_id)

    def release(self, request_id: str = "r", outcome: str = "finished", **changes: Any) -> bool:
        release = Release(request_id=request_id, outcome=outcome, num_output_tokens=40, ttft_s=0.5, tpot_s=0.05)
        return self.controller.release(replace(release, **changes))


def load(model: str, *, resident: bool = True, waiting: int = 0, tokens: int = 0, running: int = 0) -> ModelLoad:
    return ModelLoad(
        model=ModelName(model), is_resident=resident, num_waiting=waiting, num_running=running, waiting_tokens=tokens, kv_tokens=0
    )


def two_models_on_three_workers() -> Bench:
    """Models `a` and `b`; workers p1, d1 and d2, which have all reported."""
    made = Bench()
    made.controller.register(spec("a"))
    made.controller.register(spec("b"))
    for worker_id in ("p1", "d1", "d2"):
        made.report(worker_id, made.join(worker_id))
    return made
