"""The switch as a transaction: what is evicted, what is pinned, and what is left when loading fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from polymux.actors.arena import Arena
from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.weight_store import ModelSource, WeightStore
from polymux.actors.weights.image import ImageManifest
from polymux.actors.weights.residency import Residency
from polymux.transport.errors import CheckpointError, ConfigError, ModelNotFound, OutOfMemory
from polymux.transport.messages import ModelSpec
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB, ModelName
from polymux.transport.weights import OpenImage

MODELS = Path(__file__).parent.parent.parent / "deploy" / "demo" / "models"
LARGE, SMALL, OTHER = ModelName("llama-large"), ModelName("llama-small"), ModelName("qwen3-small")


class DirectSource:
    """The store without its socket; `damage` flips a byte of every image that it hands out from then on."""

    def __init__(self, store: WeightStore) -> None:
        self._store = store
        self.damage = False

    def fetch(self, model: ModelName) -> OpenImage:
        manifest, fd = self._store.open(model)
        if self.damage:
            copy = os.memfd_create("damaged")
            data = bytearray(os.pread(fd, os.fstat(fd).st_size, 0))
            data[len(data) // 2] ^= 1
            os.pwrite(copy, data, 0)
            os.close(fd)
            fd = copy
        return OpenImage(manifest, fd, os.fstat(fd).st_size)


@pytest.fixture
def store() -> Iterator[WeightStore]:
    store = WeightStore(budget_bytes=64 * MIB, layout="auto")
    yield store
    store.close()


def register(store: WeightStore, *models: ModelName) -> list[ModelSpec]:
    return [store.register(ModelSource(model=model, path=str(MODELS / model), dtype="float32")) for model in models]


def residency_for(source: DirectSource, nbytes: int) -> Residency:
    reserve = -(-nbytes // MIB) * MIB
    return Residency(Arena(Region.create(reserve + MIB), weight_reserve_bytes=reserve, slab_bytes=128 * KIB), source)


def test_models_that_fit_stay_resident_and_switching_among_them_copies_nothing(store: WeightStore) -> None:
    small, other = register(store, SMALL, OTHER)
    residency = residency_for(DirectSource(store), small.weight_bytes + other.weight_bytes + 4 * KIB)
    assert [residency.switch(spec).nbytes for spec in (small, other, small, other)] == [small.weight_bytes, other.weight_bytes, 0, 0]
    assert set(residency.residents) == {SMALL, OTHER} and residency.active == OTHER


def test_the_active_model_is_evicted_last(store: WeightStore) -> None:
    large, small, other = register(store, LARGE, SMALL, OTHER)
    residency = residency_for(DirectSource(store), large.weight_bytes + other.weight_bytes)
    residency.switch(other)
    residency.switch(large)
    assert residency.switch(small).evicted == (OTHER,)
    assert set(residency.residents) == {LARGE, SMALL}
    residency.arena.check()


def test_a_pinned_model_is_never_evicted(store: WeightStore) -> None:
    large, small = register(store, LARGE, SMALL)
    residency = residency_for(DirectSource(store), large.weight_bytes)
    residency.switch(replace(small, is_pinned=True))
    with pytest.raises(OutOfMemory, match="pinned"):
        residency.switch(large)
    assert residency.active == SMALL and set(residency.residents) == {SMALL}


def test_a_corrupt_image_is_found_and_the_former_model_stays_active(store: WeightStore) -> None:
    small, other = register(store, SMALL, OTHER)
    source = DirectSource(store)
    residency = residency_for(source, small.weight_bytes + other.weight_bytes + 4 * KIB)
    residency.switch(small)
    source.damage = True
    with pytest.raises(CheckpointError):
        residency.switch(other)
    assert residency.active == SMALL and set(residency.residents) == {SMALL}
    source.damage = False
    assert residency.switch(other).nbytes == other.weight_bytes
    residency.arena.check()


def test_a_model_evicted_for_a_switch_that_failed_is_brought_back(store: WeightStore) -> None:
    large, small = register(store, LARGE, SMALL)
    source = DirectSource(store)
    residency = residency_for(source, large.weight_bytes)
    residency.switch(small)
    before = bytes(residency.residents[SMALL].weights[:4096].numpy())

    class FailsOnce(DirectSource):
        def fetch(self, model: ModelName) -> OpenImage:
            self.damage = model == LARGE
            return super().fetch(model)

    residency.source = FailsOnce(store)
    with pytest.raises(CheckpointError):
        residency.switch(large)
    assert residency.active == SMALL
    assert bytes(residency.residents[SMALL].weights[:4096].numpy()) == before
    residency.arena.check()


def test_the_store_evicts_within_its_budget_and_builds_again_on_demand(store: WeightStore) -> None:
    large, small = register(store, LARGE, SMALL)
    tight = WeightStore(budget_bytes=large.weight_bytes + 64 * KIB, layout="auto")
    register(tight, LARGE, SMALL)
    assert tight.images() == {LARGE: 0, SMALL: small.weight_bytes}
    _, fd = tight.open(LARGE)
    os.close(fd)
    assert tight.used_bytes <= large.weight_bytes + 64 * KIB and tight.images()[LARGE] == large.weight_bytes
    tight.close()


def test_an_image_that_can_never_fit_the_store_is_refused(store: WeightStore) -> None:
    tiny = WeightStore(budget_bytes=MIB, layout="auto")
    with pytest.raises(OutOfMemory, match=r"store\.budget_bytes"):
        register(tiny, SMALL)
    with pytest.raises(ModelNotFound):
        tiny.open(SMALL)


def test_the_model_that_a_failed_switch_brought_back_still_computes(store: WeightStore) -> None:
    large, small = register(store, LARGE, SMALL)

    class LosesLarge(DirectSource):
        def fetch(self, model: ModelName) -> OpenImage:
            self.damage = model == LARGE
            return super().fetch(model)

    reserve = -(-large.weight_bytes // MIB) * MIB
    settings = EngineSettings(weight_reserve_bytes=reserve, slab_bytes=128 * KIB)
    engine = Engine(Region.create(reserve + 2 * MIB), settings, LosesLarge(store))
    for spec in (replace(large, max_model_len=64), replace(small, max_model_len=64)):
        engine.add_model(spec)
    engine.activate(SMALL)
    with pytest.raises(CheckpointError):
        engine.activate(LARGE)
    engine.activate(SMALL)
    assert engine.residency.active == SMALL and engine.probe()


def test_a_name_registered_again_keeps_one_image(store: WeightStore) -> None:
    (first,) = register(store, SMALL)
    again = store.register(ModelSource(model=SMALL, path=str(MODELS / SMALL), dtype="float32", ttft_slo_s=3.0))
    assert again.digest == first.digest and again.ttft_slo_s == 3.0
    assert store.used_bytes == first.weight_bytes
    before = len(list(Path("/proc/self/fd").iterdir()))
    register(store, SMALL)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_other_weights_under_a_name_in_use_are_refused(store: WeightStore) -> None:
    (first,) = register(store, SMALL)
    with pytest.raises(ConfigError, match="another name"):
        store.register(ModelSource(model=SMALL, path=str(MODELS / OTHER), dtype="float32"))
    with DirectSource(store).fetch(SMALL) as image:
        assert ImageManifest.from_bytes(image.manifest).digest == first.digest
