"""Runs a trace against one cluster through the real front door (all of it but HTTP), and says what every token's time was.

What differs between policies is the control plane that the front door asks: the cluster's own controller, or a router of requests over the
same workers. Arrivals are open-loop: nobody waits for an answer before asking again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mux_cluster import Cluster
from mux_traces import Ask

from polymux.deploy.http.frontdoor import FrontDoor, LoadedModel
from polymux.deploy.http.generation import Envelope, Generation, SequencePlan
from polymux.deploy.http.settings import FrontDoorSettings
from polymux.disagg.request_level import PUBLISHED_SLOTS, Line, choose_line
from polymux.disagg.slo import SLO, Outcome
from polymux.transport.errors import Overloaded, PolymuxError
from polymux.transport.messages import Admit, ModelSpec, Peer, Placement, Release, SamplingParams
from polymux.transport.units import ClientId, ModelName, SequenceId, WorkerId, pack_ids

FOREVER_S = 3600.0


@dataclass(frozen=True, slots=True)
class Instance:
    """What a request-level system calls a worker: whoever computes a request's prompt and its tokens."""

    prefill: Peer
    decode: Peer


def instances(cluster: Cluster) -> dict[WorkerId, Instance]:
    """Every worker, computing both phases."""
    return {worker_id: Instance(peer, peer) for worker_id, peer in sorted(cluster.peers.items())}


class Router:
    """A control plane that places whole requests on instances, in the place of the controller. Base of the two below."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._instances = instances(cluster)

    async def models(self) -> tuple[ModelSpec, ...]:
        return await self._cluster.models()

    async def topology(self) -> dict[str, Any]:
        return await self._cluster.topology()

    async def heartbeat(self, client_id: ClientId) -> None:
        await self._cluster.heartbeat(client_id)

    async def release(self, release: Release) -> None:
        return None

    def _placement(self, ask: Admit, worker_id: WorkerId) -> Placement:
        instance = self._instances[worker_id]
        assert ask.ttft_slo_s is not None
        assert ask.tpot_slo_s is not None
        return Placement(
            request_id=ask.request_id,
            prefill=(instance.prefill,),
            decode=(instance.decode,),
            ttft_slo_s=ask.ttft_slo_s,
            tpot_slo_s=ask.tpot_slo_s,
        )


class RequestLevelRouter(Router):
    """ServerlessLLM's: a request waits in its line until the model has the worker, and a model has it until its requests end."""

    def __init__(self, cluster: Cluster, *, idle_first: bool, slots: int = PUBLISHED_SLOTS) -> None:
        super().__init__(cluster)
        self._rule = {"idle_first": idle_first, "slots": slots}
        self._lines = {worker_id: Line(worker_id=worker_id) for worker_id in self._instances}
        self._waiting: dict[SequenceId, asyncio.Event] = {}

    async def admit(self, ask: Admit) -> Placement:
        member, model = SequenceId(ask.request_id), ModelName(ask.model)
        worker_id = choose_line(model, self._lines.values(), **self._rule)  # type: ignore[arg-type]
        self._lines[worker_id] = self._lines[worker_id].joined(member, model)
        if member not in self._lines[worker_id].served:
            turn = self._waiting[member] = asyncio.Event()
            try:
                await turn.wait()
            finally:
                del self._waiting[member]
        return self._placement(ask, worker_id)

    async def release(self, release: Release) -> None:
        member, now_s = SequenceId(release.request_id), asyncio.get_running_loop().time()
        for worker_id, line in self._lines.items():
            self._lines[worker_id] = line.ended(member, now_s)
            for served in self._lines[worker_id].served:
                if served in self._waiting:
                    self._waiting[served].set()


class StaticRouter(Router):
    """Each model on one instance for good, as many as fit; requests of the others are turned away."""

    def __init__(self, cluster: Cluster, placed: Mapping[ModelName, WorkerId]) -> None:
        super().__init__(cluster)
        self._placed = placed

    async def admit(self, ask: Admit) -> Placement:
        worker_id = self._placed.get(ask.model)
        if worker_id is None:
            raise Overloaded(f"{ask.model} has no place: the catalogue does not fit")
        return self._placement(ask, worker_id)


def partition(
    popularity: Sequence[tuple[str, float]], weight_bytes: Mapping[str, int], workers: Sequence[WorkerId], capacity_bytes: int
) -> dict[ModelName, WorkerId]:
    """Models to workers, the most popular first, each to the worker with the least demand among those with room."""
    free = dict.fromkeys(workers, capacity_bytes)
    demand = dict.fromkeys(workers, 0.0)
    placed: dict[ModelName, WorkerId] = {}
    for model, share in popularity:
        roomy = [worker for worker in workers if free[worker] >= weight_bytes[model]]
        if roomy:
            worker = min(roomy, key=lambda one: (demand[one], one))
            free[worker] -= weight_bytes[model]
            demand[worker] += share
            placed[ModelName(model)] = worker
    return placed


@dataclass(slots=True)
class Served:
    """One request, from its arrival on. `token_times_s` are since then."""

    ask: Ask
    token_times_s: list[float] = field(default_factory=list)
    error: str | None = None
    request_id: str = ""

    def outcome(self, slo: SLO) -> Outcome:
        return Outcome(slo=slo, token_times_s=tuple(self.token_times_s), num_due=self.ask.num_output_tokens)


class Driver:
    """A front door over one control plane, with a client for each request in the same loop."""

    def __init__(self, name: str, control: Any, token: str) -> None:
        settings = FrontDoorSettings(
            client_id=ClientId(f"bench-{name}"), token=token, max_open_requests=1 << 20, control_timeout_s=FOREVER_S, drain_timeout_s=1.0
        )
        self.name = name
        self._door = FrontDoor(settings, control)
        self._models: dict[str, LoadedModel] = {}
        self._num_sent = 0
        self.began_s = 0.0  # the last run's time 0, on the loop's clock

    async def start(self) -> None:
        await self._door.start()
        self._models = {spec.model: await self._door.model(spec.model) for spec in await self._door.models()}

    async def close(self) -> None:
        await self._door.aclose()

    async def run(self, asks: Sequence[Ask], slo: SLO) -> list[Served]:
        """Every request at its time. Those that still run when all their tokens are late are given up; the cluster is idle on return."""
        loop = asyncio.get_running_loop()
        began_s = self.began_s = loop.time() + 0.05
        served, tasks = [Served(ask) for ask in asks], []
        for one in served:
            await asyncio.sleep(max(0.0, began_s + one.ask.at_s - loop.time()))
            tasks.append(loop.create_task(self._request(one, began_s + one.ask.at_s, slo)))
        ends_s = max((began_s + ask.at_s + slo.due_s(ask.num_output_tokens) for ask in asks), default=began_s)
        if tasks:
            await asyncio.wait(tasks, timeout=max(0.1, ends_s - loop.time()))
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return served

    async def _request(self, served: Served, arrived_s: float, slo: SLO) -> None:
        self._num_sent += 1
        model, loop, times = self._models[served.ask.model], asyncio.get_running_loop(), served.token_times_s
        try:
            generation = self._generation(served.ask, slo)
            served.request_id = generation.envelope.request_id
            async with self._door.open(generation, model.tokenizer) as request:
                choice = request.choices[0]
                while not request.is_finished:
                    await request.news()
                    times += [loop.time() - arrived_s] * (len(choice.output_ids) - len(times))
        except PolymuxError as error:
            served.error = type(error).__name__

    def _generation(self, ask: Ask, slo: SLO) -> Generation:
        """Half of the requests greedy, half sampled; all as long as the trace says."""
        request_id = f"{self.name}-{self._num_sent}"
        sampling = SamplingParams(
            max_tokens=ask.num_output_tokens, temperature=0.0 if self._num_sent % 2 else 0.8, seed=self._num_sent, ignore_eos=True
        )
        envelope = Envelope(request_id=request_id, public_id=request_id, timeout_s=600.0, ttft_slo_s=slo.ttft_s, tpot_slo_s=slo.tpot_s)
        prompt = SequencePlan(prompt_ids=pack_ids(ask.prompt_ids), num_prompt_tokens=len(ask.prompt_ids), sampling=sampling)
        return Generation(
            envelope=envelope,
            model=ModelName(ask.model),
            sequences=(prompt,),
            choices_per_prompt=1,
            num_prompt_tokens=len(ask.prompt_ids),
        )
