"""Request-level switching: a worker keeps a model until the requests that wait for it in a row have ended.

`serverless` is ServerlessLLM's policy (OSDI '24) as the Aegaeon artifact simulates it; `serverless_idle` is the same with one change that
makes it a fairer baseline: a model that needs a worker gets the one with the shortest queue. In the artifact it gets the one whose last
step is oldest, and since a worker that loads has taken no step lately, several models pile up on it while idle workers wait.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from itertools import pairwise

from polymux.disagg.sim.costs import MS, CostModel
from polymux.disagg.sim.links import Flow
from polymux.disagg.sim.loop import DECODE, PREFILL, SWITCH, Journal, Simulation
from polymux.disagg.sim.outcome import Progress, Targets
from polymux.disagg.sim.topology import Hosts
from polymux.disagg.sim.traffic import Traffic

MAX_IN_ROW = 4  # requests of one model at a worker's tail before another worker is tried
PATIENCE_US = 15_000 * MS  # a request without a token for so long is given up, at the next arrival


@dataclass(slots=True, eq=False)
class _Worker:
    number: int
    queue: list[Progress] = field(default_factory=list)  # in service and waiting, in line
    loaded: str | None = None
    running: list[Progress] = field(default_factory=list)  # in the steps under way
    is_busy: bool = False
    began_us: int = 0  # of the first step that is not done
    ends_us: list[int] = field(default_factory=list)  # of the load or the steps under way; the run's decode steps until a request ends
    last_step_us: int = -1

    def tail(self) -> tuple[str | None, int]:
        """The model at the end of the line, and how many requests in a row are of it; the loaded one when nobody is in line."""
        if not self.queue:
            return self.loaded, 0
        model = self.queue[-1].request.model
        length = next((i for i, one in enumerate(reversed(self.queue)) if one.request.model != model), len(self.queue))
        return model, length

    @property
    def is_unused(self) -> bool:
        return self.loaded is None and not self.queue

    def head_run(self) -> list[Progress]:
        model = self.queue[0].request.model
        end = next((i for i, one in enumerate(self.queue) if one.request.model != model), len(self.queue))
        return self.queue[:end]


class RequestLevel(Simulation[_Worker]):
    """Every worker does both phases. `idle_first`: `serverless_idle`."""

    def __init__(
        self,
        costs: CostModel,
        targets: Targets,
        *,
        num_workers: int,
        idle_first: bool = False,
        hosts: Hosts | None = None,
        journal: Journal | None = None,
    ) -> None:
        super().__init__(costs, targets, num_devices=num_workers, hosts=hosts, journal=journal)
        self._idle_first = idle_first
        self._workers = [_Worker(i) for i in range(num_workers)]

    def _arrive(self, one: Progress) -> None:
        now_us = one.request.arrival_us
        for worker in self._workers:
            self._catch_up(worker, now_us)
            if self._purge(worker, now_us):
                self._interrupt(worker)
        worker = self._place(one)
        self._note_placement(one, worker.number)
        worker.queue.append(one)
        self._interrupt(worker)
        self._start(worker, now_us)

    def _interrupt(self, worker: _Worker) -> None:
        """News for its line: only the step under way is sure to be taken."""
        if len(worker.ends_us) > 1:
            worker.ends_us = worker.ends_us[:1]
            self._at(worker.ends_us[0], worker)

    @staticmethod
    def _purge(worker: _Worker, now_us: int) -> bool:
        """Whether any were given up. Those behind them may then be next in line."""
        num_before = len(worker.queue)
        for one in worker.queue:
            one.has_failed = one.has_failed or (not one.num_tokens and now_us - one.request.arrival_us > PATIENCE_US)
        worker.queue = [one for one in worker.queue if not one.has_failed]
        return len(worker.queue) < num_before

    def _place(self, one: Progress) -> _Worker:
        tails = [(worker, *worker.tail()) for worker in self._workers]
        same = [(length, worker.number, worker) for worker, model, length in tails if model == one.request.model]
        others = [worker for worker, model, _ in tails if model != one.request.model]
        if others and all(length >= MAX_IN_ROW for length, _, _ in same):
            return min(others, key=self._rank)
        return min(same)[2]

    def _rank(self, worker: _Worker) -> tuple[int, int, int, int]:
        queued = len(worker.queue) if self._idle_first else 0
        return queued, not worker.is_unused, worker.last_step_us, worker.number

    def _start(self, worker: _Worker, now_us: int) -> None:
        """Load the model at the head of the line, or step its run: prompts without a token first, all together."""
        if worker.is_busy or not worker.queue:
            return
        run = worker.head_run()
        model, kind = run[0].request.model, run[0].request.kind
        worker.began_us = now_us
        worker.is_busy = True
        if worker.loaded != model:
            worker.loaded = model
            load_us = self._load(worker.number, kind, now_us)
            if load_us is None:
                return
            worker.ends_us = [now_us + load_us]
        elif new := [one for one in run if not one.num_tokens]:
            worker.running = new
            worker.ends_us = [now_us + self._costs.prefill_us(kind, [one.request.input_len for one in new])]
        else:
            worker.running = run
            worker.ends_us = self._steps(run, kind, now_us)
        self._at(worker.ends_us[-1], worker)

    def _steps(self, run: list[Progress], kind: str, now_us: int) -> list[int]:
        kv_tokens = sum(one.request.input_len + one.num_tokens for one in run)
        ends_us = []
        for _ in range(min(one.num_left for one in run)):
            now_us += self._costs.decode_us(kind, len(run), kv_tokens)
            ends_us.append(now_us)
            kv_tokens += len(run)
        return ends_us

    def _catch_up(self, worker: _Worker, now_us: int) -> None:
        """Steps that ended before now are over."""
        if worker.ends_us and worker.ends_us[0] < now_us:
            self._done(worker, bisect_left(worker.ends_us, now_us))

    def _done(self, worker: _Worker, count: int) -> None:
        ends_us, worker.ends_us = worker.ends_us[:count], worker.ends_us[count:]
        what = SWITCH
        if worker.running:
            what = DECODE if worker.running[0].num_tokens else PREFILL
            worker.last_step_us = ends_us[-1]
            max_gap_us = max((after - before for before, after in pairwise(ends_us)), default=0)
            for one in worker.running:
                if not one.has_failed:
                    one.tokens(ends_us, max_gap_us)
        assert worker.loaded is not None
        self._note(worker.number, what, worker.loaded, worker.began_us, ends_us[-1])
        worker.began_us = ends_us[-1]

    def _flow_ended(self, flow: Flow, traffic: Traffic, now_us: int) -> None:
        worker = self._workers[flow.owner]
        worker.ends_us = [now_us + traffic.overhead_us]
        self._at(worker.ends_us[0], worker)

    def _ended(self, worker: _Worker, now_us: int) -> None:
        if not worker.ends_us or worker.ends_us[-1] != now_us:
            return  # an event from before the news
        self._done(worker, len(worker.ends_us))
        worker.is_busy = False
        if worker.running:
            worker.queue = [one for one in worker.queue if not one.is_done]
            worker.running = []
        self._start(worker, now_us)
