"""A worker's engine on a real GPU: the CPU engine's tokens, with graphs and without, through switches, swaps and moves."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from polymux.actors.copier import copy_blocks
from polymux.actors.gpu.device import CudaDevice
from polymux.actors.gpu.graphs import CudaGraphs
from polymux.actors.gpu.runtime import TorchRuntime
from polymux.kernels import choice
from polymux.transport.units import MIB, ModelName

from ..actors.planned_batches import KINDS, NAMES, Batch, Store, engine_on, tokens_of

pytestmark = pytest.mark.gpu


class Eager:
    """Runs every step as it comes."""

    def run(self, key: object, work: object) -> None:
        assert callable(work)
        work()

    def clear(self) -> None:
        return


@pytest.fixture(scope="module")
def store() -> Store:
    return Store("plain")


def run_on(device: CudaDevice | None, store: Store, kind: str, num_steps: int = 16, name: int = 1) -> list[list[int]]:
    engine = engine_on(store, device)
    params = [replace(KINDS[kind], seed=i) for i in range(3)]
    found = tokens_of(Batch(engine, store.specs[NAMES[name]], params, runs_ahead=device is not None and kind != "penalized").run(num_steps))
    engine.close()
    return found


@pytest.mark.parametrize("name", range(len(NAMES)))
def test_greedy_tokens_are_the_cpus(name: int, store: Store) -> None:
    graphs = CudaGraphs()
    assert run_on(CudaDevice(graphs=graphs), store, "greedy", name=name) == run_on(None, store, "greedy", name=name)
    assert graphs.num_captured == 1 and graphs.num_replayed == 15, "the first step runs as it is, the second is captured"


@pytest.mark.parametrize("kind", KINDS)
def test_graphs_draw_what_steps_without_them_draw(kind: str, store: Store) -> None:
    graphs = CudaGraphs()
    assert run_on(CudaDevice(graphs=graphs), store, kind) == run_on(CudaDevice(graphs=Eager()), store, kind)
    assert graphs.num_replayed > 0


@pytest.mark.parametrize("kind", ["greedy", "sampled"])
def test_a_librarys_attention_draws_the_same_with_graphs_and_without(kind: str) -> None:
    pytest.importorskip("flashinfer", exc_type=ImportError)
    name = ModelName("qwen3-large")  # heads of 64
    store, params, found = Store("plain", "bfloat16", (name,)), [replace(KINDS[kind], seed=i) for i in range(3)], []
    for graphs in (CudaGraphs(), Eager()):
        with choice.override("attend=flashinfer"):
            engine = engine_on(store, CudaDevice(graphs=graphs), 1)
            found.append(tokens_of(Batch(engine, store.specs[name], params, runs_ahead=True).run(40)))  # into further blocks
            engine.close()
    assert found[0] == found[1]


def test_models_that_take_turns_compute_with_their_own_weights(store: Store) -> None:
    alone = [run_on(CudaDevice(), store, "greedy", 6, name) for name in range(2)]
    graphs = CudaGraphs()
    engine = engine_on(store, CudaDevice(graphs=graphs))
    params = [replace(KINDS["greedy"], seed=i) for i in range(3)]
    for turn in range(6):
        spec = store.specs[NAMES[turn % 2]]
        assert tokens_of(Batch(engine, spec, params, runs_ahead=True).run(6)) == alone[turn % 2], f"turn {turn}"
        engine.residency.evict(spec.model)
        engine.residency.check()
    assert graphs.num_captured <= 4, "a model that comes back to its place has its graph still"
    engine.close()


def test_weights_compute_while_the_last_of_them_still_come(store: Store) -> None:
    engine = engine_on(store, CudaDevice())
    spec, params = store.specs[NAMES[0]], [KINDS["greedy"]]
    expected = tokens_of(Batch(engine, spec, params, runs_ahead=True).run(4))
    for _ in range(5):
        engine.residency.evict(spec.model)
        assert tokens_of(Batch(engine, spec, params, runs_ahead=True).run(4)) == expected
    engine.close()


def test_moved_weights_still_compute(store: Store) -> None:
    engine = engine_on(store, CudaDevice())
    first, second = (store.specs[name] for name in NAMES)
    params = [KINDS["greedy"]]
    expected = tokens_of(Batch(engine, second, params, runs_ahead=True).run(4))
    engine.residency.evict(second.model)
    engine.activate(first.model)
    engine.activate(second.model)
    assert tokens_of(Batch(engine, second, params, runs_ahead=True).run(4)) == expected
    engine.residency.evict(first.model)
    resident = engine.residency.residents[second.model]
    if resident.load is not None:
        resident.load.wait()
        engine.residency.settle()
    assert resident.span.offset > 0 and resident.load is None
    engine.residency._move(resident, 0)
    assert tokens_of(Batch(engine, second, params, runs_ahead=True).run(4)) == expected
    engine.close()


def test_blocks_come_back_from_the_host_as_they_left() -> None:
    device = CudaDevice()
    device.enter()
    kv = device.tensor(device.create(64 * MIB)).view(-1, 2, 64, 1024)
    host = torch.zeros(64 * MIB, dtype=torch.uint8).view(kv.shape)
    content = torch.randint(0, 256, (20, *kv.shape[1:]), dtype=torch.uint8)
    away, back = [*range(10), *range(40, 50)], [*range(100, 120)]
    kv[away] = content.to("cuda")
    for _ in device.copy_blocks(kv, away, host, [*range(20, 40)]):
        pass
    assert torch.equal(host[20:40], content)
    kv[away] = 0
    for _ in device.copy_blocks(host, [*range(20, 40)], kv, back):
        pass
    assert torch.equal(kv[back].cpu(), content)
    assert device.pinned.num_pinned_bytes > 0, "host memory cannot be pinned here"
    spare = torch.zeros_like(host)
    list(copy_blocks(host, [20], spare, [0]))
    assert torch.equal(spare[0], content[0])
    device.close()


def test_a_step_waits_for_nothing_between_its_start_and_its_last_launch(store: Store) -> None:
    engine = engine_on(store, CudaDevice())
    batch = Batch(engine, store.specs[NAMES[0]], [KINDS["greedy"], KINDS["sampled"]], runs_ahead=True)
    for _ in range(4):
        batch.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            batch.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    batch.settle()
    engine.close()


def test_the_runtime_says_what_it_lacks() -> None:
    runtime = TorchRuntime()
    assert runtime.allocate(MIB).device.type == "cuda"
