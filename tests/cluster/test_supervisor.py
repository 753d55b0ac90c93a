"""The supervisor over workers that are plain objects: what is left running, whatever fails and whenever it is stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import pytest
from controller_bench import spec

from polymux.actors.weight_store import ModelSource
from polymux.actors.worker import WorkerSettings
from polymux.cluster import supervisor as supervisor_module
from polymux.cluster.config import ClusterConfig, LivenessConfig, ModelConfig, PoolConfig, PoolsConfig
from polymux.cluster.devices import Seat, Seating, choose
from polymux.cluster.processes import MAX_RESTARTS, WorkerHandle, WorkerPlace
from polymux.cluster.supervisor import Supervisor
from polymux.transport.errors import CheckpointError, ConfigError, PolymuxError, WorkerLost
from polymux.transport.messages import LookBack, ModelSpec, Span, SpanKind, WorkerHello, WorkerReport, WorkerTimeline
from polymux.transport.units import MIB, Epoch, ModelName, WorkerId

SPECS = {described.model: described for described in (spec("a", 4 * MIB), spec("b", 2 * MIB))}
NAMES = tuple(SPECS)
Hook = Callable[[str, "FakeWorker"], None]


@dataclass(eq=False)
class FakeWorker:
    """A worker process that remembers. `hook` hears each call's name before it is answered, and may raise; `gates` hold calls up."""

    hook: Hook
    gates: dict[str, asyncio.Event]
    settings: WorkerSettings | None = None
    epoch: Epoch | None = None
    models: set[ModelName] = field(default_factory=set)
    is_dead: bool = False
    is_stopped: bool = False

    async def _on(self, name: str) -> None:
        if name in self.gates:
            await self.gates[name].wait()
        self.hook(name, self)
        if self.is_dead:
            raise WorkerLost("its process is gone")

    @property
    def worker_id(self) -> WorkerId:
        if self.settings is None:
            raise WorkerLost("this worker was not started")
        return self.settings.worker_id

    async def start(self, settings: WorkerSettings) -> WorkerHello:
        await self._on("start")
        self.settings = settings
        return WorkerHello(
            worker_id=settings.worker_id,
            role=settings.role,
            address="tcp://127.0.0.1:1",
            host_id="here",
            pid=1,
            arena_bytes=64 * MIB,
            num_threads=1,
        )

    async def serve(self, epoch: Epoch) -> None:
        await self._on("serve")
        self.epoch = epoch

    async def add_model(self, spec: ModelSpec) -> None:
        await self._on("add_model")
        self.models.add(spec.model)

    async def report(self) -> WorkerReport:
        worker_id = self.worker_id
        await self._on("report")
        return WorkerReport(
            worker_id=worker_id,
            epoch=self.epoch or Epoch(0),
            active_model=None,
            loads=(),
            costs=(),
            switch_bytes_per_s=1e9,
            num_free_kv_bytes=0,
            num_blocks_out=0,
            last_step_age_s=None,
            counters=(),
        )

    async def timeline(self, look: LookBack) -> WorkerTimeline:
        worker_id = self.worker_id
        await self._on("timeline")
        spans = tuple(
            Span(kind=SpanKind.DECODE, model=NAMES[0], began_s=float(i + 1), ended_s=float(i))
            for i in reversed(range(min(look.max_spans, 100)))
        )
        return WorkerTimeline(worker_id=worker_id, epoch=self.epoch or Epoch(0), spans=spans)

    async def stop(self) -> None:
        self.is_stopped = True


class FakeLauncher:
    """Every worker that it ever launched, and the models that are in the store."""

    def __init__(self) -> None:
        self.launched: list[FakeWorker] = []
        self.registered: set[ModelName] = set()
        self.gates: dict[str, asyncio.Event] = {}
        self.hook: Hook = lambda _name, _worker: None
        self.is_stopped = False

    @property
    def running(self) -> list[FakeWorker]:
        return [worker for worker in self.launched if not worker.is_stopped]

    async def start_stores(self, budget_bytes: int | None, kv_bytes: int | None, layout: str, token: str) -> None:
        pass

    async def register(self, source: ModelSource) -> ModelSpec:
        await self._pass("register")
        if source.path == "broken":
            raise CheckpointError("model.safetensors is missing")
        self.registered.add(source.model)
        return SPECS[source.model] if source.path == "good" else replace(SPECS[source.model], digest="f" * 64)

    async def forget(self, model: ModelName) -> None:
        self.registered.discard(model)

    async def seat(self, config: ClusterConfig, places: Sequence[WorkerPlace]) -> Seating:
        await self._pass("seat")
        return Seating(devices=choose(config, ()), seats={place.worker_id: Seat() for place in places})

    async def launch(self, place: WorkerPlace, config: ClusterConfig) -> WorkerHandle:
        await self._pass("launch")
        self.launched.append(FakeWorker(self.hook, self.gates))
        return self.launched[-1]

    async def store_address(self, handle: WorkerHandle) -> str:
        return "unix:store"

    async def stop(self) -> None:
        self.is_stopped = True

    async def _pass(self, name: str) -> None:
        if name in self.gates:
            await self.gates[name].wait()


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def config_for(*models: ModelName, path: str = "good", orphan_timeout_s: float | None = 60.0) -> ClusterConfig:
    pool = PoolConfig(arena_bytes=64 * MIB)
    return ClusterConfig(
        models=tuple(ModelConfig(name=model, path=path) for model in models),
        pools=PoolsConfig(prefill=pool, decode=pool.model_copy(update={"workers": 2})),
        liveness=LivenessConfig(report_interval_s=0.01, worker_lease_s=5.0, orphan_timeout_s=orphan_timeout_s),
    )


class Rig:
    def __init__(self, config: ClusterConfig) -> None:
        self.clock = Clock()
        self.launcher = FakeLauncher()
        self.supervisor = Supervisor(config, self.launcher, clock=self.clock)

    async def alive(self) -> dict[str, int]:
        """Epochs of the workers in the books."""
        workers = (await self.supervisor.topology())["workers"]
        return {worker["worker_id"]: worker["epoch"] for worker in workers if worker["state"] != "lost"}

    def worker(self, worker_id: str) -> FakeWorker:
        return next(w for w in self.launcher.running if w.settings is not None and w.settings.worker_id == worker_id)


@asynccontextmanager
async def running(config: ClusterConfig | None = None) -> AsyncIterator[Rig]:
    rig = Rig(config or config_for(NAMES[0]))
    await rig.supervisor.start()
    try:
        yield rig
    finally:
        await rig.supervisor.stop()
        assert not rig.launcher.running and rig.launcher.is_stopped


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5.0):
        while not is_true():
            await asyncio.sleep(0.002)


async def settled(rounds: int = 5) -> None:
    """Some polls have gone by."""
    await asyncio.sleep(0.01 * rounds)


async def test_every_worker_serves_every_model_once_start_returns() -> None:
    async with running(config_for(*NAMES)) as rig:
        assert (await rig.alive()).keys() == {"prefill-0", "decode-0", "decode-1"}
        assert len(set((await rig.alive()).values())) == 3
        assert all(worker.models == set(NAMES) and worker.epoch for worker in rig.launcher.running)
        assert {spec.model for spec in await rig.supervisor.models()} == set(NAMES)


@pytest.mark.parametrize("call", ["start", "add_model", "serve"])
async def test_a_start_that_fails_leaves_nothing_running(call: str) -> None:
    rig = Rig(config_for(NAMES[0]))

    def hook(name: str, worker: FakeWorker) -> None:
        if name == call and worker is rig.launcher.launched[1]:
            raise ConfigError("pools.decode.arena_bytes=1 is too small; raise it")

    rig.launcher.hook = hook
    with pytest.raises(ConfigError, match="raise it"):
        await rig.supervisor.start()
    assert len(rig.launcher.launched) == 3 and not rig.launcher.running
    assert rig.launcher.is_stopped and rig.supervisor.stopped.is_set()


async def test_a_checkpoint_that_is_broken_leaves_nothing_running() -> None:
    rig = Rig(config_for(NAMES[0], path="broken"))
    with pytest.raises(CheckpointError, match="missing"):
        await rig.supervisor.start()
    assert not rig.launcher.running and rig.supervisor.stopped.is_set()


async def test_a_worker_that_hangs_in_its_start_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor_module, "TEACH_S", 0.02)
    rig = Rig(config_for(NAMES[0]))
    rig.launcher.gates["start"] = asyncio.Event()
    with pytest.raises(PolymuxError, match=r"worker (prefill|decode)-\d"):
        await rig.supervisor.start()
    assert not rig.launcher.running


@pytest.mark.parametrize("call", ["register", "launch", "start", "add_model", "serve"])
async def test_a_stop_during_the_start_leaves_nothing_running(call: str) -> None:
    rig = Rig(config_for(NAMES[0]))
    rig.launcher.gates[call] = asyncio.Event()
    starting = asyncio.create_task(rig.supervisor.start())
    await settled(1)
    await rig.supervisor.stop()
    rig.launcher.gates[call].set()
    with pytest.raises(WorkerLost, match="stopped while it started"):
        await starting
    await settled(1)
    assert not rig.launcher.running and rig.supervisor.stopped.is_set()
    with pytest.raises(WorkerLost):
        await rig.supervisor.start()


async def test_a_worker_that_dies_is_replaced_under_a_new_epoch() -> None:
    async with running() as rig:
        before = await rig.alive()
        dead = rig.worker("decode-1")
        dead.is_dead = True
        await until(lambda: dead.is_stopped and len(rig.launcher.running) == 3 and rig.worker("decode-1").epoch is not None)
        await settled()
        after = await rig.alive()
        assert after["decode-1"] > max(before.values())
        assert all(after[worker_id] == before[worker_id] for worker_id in ("prefill-0", "decode-0"))
        assert rig.worker("decode-1").models == {NAMES[0]}


@pytest.mark.parametrize("call", ["start", "add_model", "serve"])
async def test_a_slow_replacement_is_not_taken_for_dead(call: str) -> None:
    """Polls go on while it comes up."""
    async with running() as rig:
        gate = rig.launcher.gates[call] = asyncio.Event()
        rig.worker("decode-0").is_dead = True
        await until(lambda: len(rig.launcher.launched) == 4)
        await settled(8)
        gate.set()
        await until(lambda: rig.launcher.launched[3].epoch is not None)
        await settled()
        assert len(rig.launcher.launched) == 4
        assert (await rig.alive())["decode-0"] == rig.launcher.launched[3].epoch


async def test_a_replacement_that_fails_oddly_is_tried_again() -> None:
    async with running() as rig:

        def hook(name: str, worker: FakeWorker) -> None:
            if name == "start" and worker is rig.launcher.launched[3]:
                raise OSError("no memory for the arena")

        rig.launcher.hook = hook
        rig.worker("decode-0").is_dead = True
        await until(lambda: len(rig.launcher.launched) == 5 and rig.launcher.launched[4].epoch is not None)
        await settled()
        assert rig.launcher.launched[3].is_stopped and len(rig.launcher.running) == 3


async def test_a_worker_that_keeps_dying_is_abandoned() -> None:
    async with running() as rig:

        def hook(name: str, worker: FakeWorker) -> None:
            if name == "start":
                raise WorkerLost("its process is gone")

        rig.launcher.hook = hook
        rig.worker("decode-0").is_dead = True
        await until(lambda: len(rig.launcher.launched) == 3 + MAX_RESTARTS)
        await settled()
        assert len(rig.launcher.launched) == 3 + MAX_RESTARTS and len(rig.launcher.running) == 2
        assert (await rig.alive()).keys() == {"prefill-0", "decode-1"}


async def test_a_stop_during_a_restart_leaves_nothing_running() -> None:
    async with running() as rig:
        rig.launcher.gates["serve"] = asyncio.Event()
        rig.worker("decode-0").is_dead = True
        await until(lambda: len(rig.launcher.launched) == 4)
        await settled(1)


async def test_a_poll_that_fails_oddly_stops_no_other() -> None:
    async with running() as rig:
        polls = []

        def hook(name: str, worker: FakeWorker) -> None:
            if name == "report" and worker.worker_id == "decode-0":
                raise RuntimeError("a report went wrong")
            polls.append(name)

        for worker in rig.launcher.running:
            worker.hook = hook
        await settled(3)
        polls.clear()
        await until(lambda: len(polls) > 4)


async def test_a_worker_that_the_books_lost_is_replaced() -> None:
    async with running() as rig:
        rig.supervisor.controller.lost(WorkerId("decode-0"))
        await until(lambda: len(rig.launcher.launched) == 4 and rig.launcher.launched[3].epoch is not None)
        await settled()
        assert (await rig.alive()).keys() == {"prefill-0", "decode-0", "decode-1"}


async def test_it_stops_when_no_front_door_calls() -> None:
    async with running() as rig:
        rig.clock.now_s += 61
        await asyncio.wait_for(rig.supervisor.stopped.wait(), 5.0)
        assert not rig.launcher.running


async def test_a_long_start_is_not_held_against_the_front_doors() -> None:
    rig = Rig(config_for(NAMES[0]))
    rig.launcher.hook = lambda name, _: setattr(rig.clock, "now_s", rig.clock.now_s + 100 * (name == "start"))
    await rig.supervisor.start()
    await settled()
    assert not rig.supervisor.is_stopping
    await rig.supervisor.stop()


async def test_a_model_is_added_everywhere() -> None:
    async with running() as rig:
        spec = await rig.supervisor.add_model(ModelConfig(name=NAMES[1], path="good"))
        assert spec.model == NAMES[1] and all(NAMES[1] in worker.models for worker in rig.launcher.running)
        assert {spec.model for spec in await rig.supervisor.models()} == set(NAMES)


async def test_a_model_that_a_worker_refuses_is_registered_nowhere() -> None:
    async with running() as rig:

        def hook(name: str, worker: FakeWorker) -> None:
            if name == "add_model" and worker.worker_id == "decode-1":
                raise ConfigError("models.b: max_model_len=9 needs more blocks; lower max_model_len")

        for worker in rig.launcher.running:
            worker.hook = hook
        with pytest.raises(ConfigError, match="lower max_model_len"):
            await rig.supervisor.add_model(ModelConfig(name=NAMES[1], path="good"))
        assert rig.launcher.registered == {NAMES[0]}
        assert [spec.model for spec in await rig.supervisor.models()] == [NAMES[0]]


async def test_other_weights_under_a_name_in_use_are_refused_and_the_first_stay() -> None:
    async with running() as rig:
        with pytest.raises(ConfigError, match="another name"):
            await rig.supervisor.add_model(ModelConfig(name=NAMES[0], path="other"))
        assert rig.launcher.registered == {NAMES[0]}


@pytest.mark.parametrize("call", ["start", "add_model", "serve"])
async def test_a_model_added_during_a_restart_reaches_the_new_worker(call: str) -> None:
    async with running() as rig:
        gate = rig.launcher.gates[call] = asyncio.Event()
        rig.worker("decode-0").is_dead = True
        await until(lambda: len(rig.launcher.launched) == 4)
        await settled(1)
        adding = asyncio.create_task(rig.supervisor.add_model(ModelConfig(name=NAMES[1], path="good")))
        await settled(1)
        gate.set()
        await adding
        await until(lambda: rig.launcher.launched[3].epoch is not None)
        await settled(1)
        assert all(worker.models == set(NAMES) for worker in rig.launcher.running)


async def test_a_worker_that_dies_of_a_new_model_does_not_fail_it() -> None:
    async with running() as rig:
        dead = rig.worker("decode-1")

        def hook(name: str, worker: FakeWorker) -> None:
            worker.is_dead = worker.is_dead or name == "add_model"

        dead.hook = hook
        await rig.supervisor.add_model(ModelConfig(name=NAMES[1], path="good"))
        await until(lambda: len(rig.launcher.launched) == 4 and rig.launcher.launched[3].epoch is not None)
        await settled(1)
        assert dead.is_stopped and all(worker.models == set(NAMES) for worker in rig.launcher.running)


async def test_the_timeline_has_a_lane_for_every_place_in_the_pools() -> None:
    async with running() as rig:
        rig.worker("decode-1").is_dead = True
        lanes = (await rig.supervisor.timeline(LookBack(within_s=60.0, max_spans=10)))["lanes"]
        assert {lane["worker_id"]: (lane["missing"], len(lane["spans"])) for lane in lanes} == {
            "prefill-0": (None, 10),
            "decode-0": (None, 10),
            "decode-1": ("its process is gone", 0),
        }
