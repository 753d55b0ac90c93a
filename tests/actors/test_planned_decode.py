"""The engine over planned steps, on a CPU: graphs that replay what was captured first find the inputs of later steps where they look.

Kernels are plain torch but where a replay is real: attention then is the GPU's, interpreted. tests/gpu does all of it on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

import pytest
import torch
from late_device import LateDevice
from planned_batches import KINDS, NAMES, Batch, Store, engine_on, tokens_of
from planning_device import PlanningDevice
from torch import Tensor

from polymux.actors.drawn import Ask
from polymux.actors.sampler import SampledToken, SamplerState
from polymux.kernels import choice
from polymux.kernels.gpu import flashinfer_attend
from polymux.kernels.libraries import why_not
from polymux.transport.errors import ConfigError

from ..kernels.gpu.libraries import stand_in


@pytest.fixture(autouse=True)
def plain_kernels() -> Iterator[None]:
    with choice.override("all=torch"):
        yield


@pytest.fixture(scope="module")
def store() -> Store:
    return Store("plain")


@pytest.fixture
def any_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The stand-in of FlashInfer, for heads of any size in any dtype."""
    with stand_in() as library:
        for module in (library, flashinfer_attend):
            monkeypatch.setattr(module, "HEAD_DIMS", range(257))
            monkeypatch.setattr(module, "DTYPES", (torch.float32,))
        yield


@pytest.mark.parametrize("attention", ["triton", "flashinfer"])
def test_replayed_steps_read_the_inputs_of_their_own_step(attention: str, store: Store, any_library: None) -> None:
    name = NAMES[1]
    params = [replace(KINDS["greedy"]), replace(KINDS["sampled"], seed=3)]
    plain = engine_on(store, None)
    expected = Batch(plain, store.specs[name], params, runs_ahead=False).run(5)
    plain.close()
    device = PlanningDevice(captures=True)
    with choice.override(f"all=torch,attend={attention}"):
        engine = engine_on(store, device)
        found = Batch(engine, store.specs[name], params, runs_ahead=True).run(5)
    assert tokens_of(found) == tokens_of(expected)
    assert device.graphs.num_replayed == 3
    engine.close()


def test_models_of_one_shape_that_take_turns_share_a_librarys_plans(store: Store, any_library: None) -> None:
    device = PlanningDevice(captures=True)
    with choice.override("all=torch,attend=flashinfer"):
        engine = engine_on(store, device)
        params = [replace(KINDS["greedy"])] * 3
        alone = [tokens_of(Batch(engine, store.specs[name], params, runs_ahead=True).run(4)) for name in NAMES]
        for turn in range(4):
            assert tokens_of(Batch(engine, store.specs[NAMES[turn % 2]], params, runs_ahead=True).run(4)) == alone[turn % 2], turn
    assert device.graphs.num_replayed >= 12
    engine.close()


def test_a_model_that_the_library_cannot_serve_is_not_bound(store: Store) -> None:
    with stand_in(), choice.override("all=torch,attend=flashinfer"):
        engine = engine_on(store, PlanningDevice())
        with pytest.raises(ConfigError, match=r"flashinfer has no attention .*: take attend=flashinfer out of POLYMUX_KERNELS"):
            Batch(engine, store.specs[NAMES[0]], [replace(KINDS["greedy"])], runs_ahead=True)
        engine.close()


def test_a_worker_whose_kernels_are_not_there_does_not_start(store: Store) -> None:
    if not why_not("flashinfer"):
        pytest.skip("flashinfer is installed")
    with choice.override("all=torch,attend=flashinfer"), pytest.raises(ConfigError, match="flashinfer is not installed: pip install"):
        engine_on(store, PlanningDevice())


@pytest.mark.parametrize("kind", KINDS)
def test_planned_steps_that_run_ahead_draw_the_tokens_of_the_cpus_engine(kind: str, store: Store) -> None:
    name = NAMES[1]
    params = [replace(KINDS[kind], seed=i, logprobs=2 if i == 1 and kind == "sampled" else None) for i in range(3)]
    plain = engine_on(store, None)
    expected = Batch(plain, store.specs[name], params, runs_ahead=False).run(10)
    plain.close()
    device = PlanningDevice()
    engine = engine_on(store, device)
    found = Batch(engine, store.specs[name], params, runs_ahead=kind != "penalized").run(10)
    assert tokens_of(found) == tokens_of(expected)
    assert device.graphs.num_replayed >= 7
    engine.close()


def test_a_model_that_comes_back_to_its_place_has_its_graphs_still(store: Store) -> None:
    device = PlanningDevice()
    engine = engine_on(store, device, num_resident=1)
    first, second = (store.specs[name] for name in NAMES)
    params = [replace(KINDS["greedy"])] * 2
    expected = Batch(engine, first, params, runs_ahead=True).run(6)
    engine.residency.evict(first.model)
    Batch(engine, second, params, runs_ahead=True).run(6)
    engine.residency.evict(second.model)
    num_replayed = device.graphs.num_replayed
    assert tokens_of(Batch(engine, first, params, runs_ahead=True).run(6)) == tokens_of(expected)
    assert device.graphs.num_replayed == num_replayed + 6
    engine.close()


def test_padding_rows_change_nothing(store: Store) -> None:
    spec, params = store.specs[NAMES[0]], [replace(KINDS["greedy"])] * 3  # padded to four rows
    engine = engine_on(store, PlanningDevice())
    together = tokens_of(Batch(engine, spec, params, runs_ahead=True).run(8))
    engine.close()
    plain = engine_on(store, None)
    assert tokens_of(Batch(plain, spec, params, runs_ahead=False).run(8)) == together
    plain.close()


def test_a_row_without_finite_logits_gets_an_error_and_the_others_their_tokens(store: Store) -> None:
    device = LateDevice()
    engine = engine_on(store, device)
    logits: Tensor = torch.randn(3, 515)
    logits[1] = torch.nan
    state = SamplerState(KINDS["greedy"], [8], [], (), 515)
    tokens = engine.draw(logits, [Ask(state)] * 3).tokens()
    assert [isinstance(token, SampledToken) for token in tokens] == [True, False, True]
    engine.close()
