"""Workers of several ranks in the controller's books: moves are planned before anything runs, and bytes count for all ranks together."""

from __future__ import annotations

from dataclasses import replace

import pytest
from controller_bench import Bench, spec

from polymux.cluster.config import ClusterConfig
from polymux.cluster.sizing import num_threads, worker_settings
from polymux.disagg.admission import max_kv_tokens
from polymux.transport.errors import ConfigError
from polymux.transport.messages import RankShape, Role, WorkerHello
from polymux.transport.units import MIB, WorkerId

SHAPES = (RankShape(num_ranks=2, weight_bytes=5 * MIB), RankShape(num_ranks=4, weight_bytes=3 * MIB))
MODEL = replace(spec("m"), shapes=SHAPES)  # two KV heads


def hello(worker_id: str, num_ranks: int) -> WorkerHello:
    role = Role.PREFILL if worker_id.startswith("p") else Role.DECODE
    return WorkerHello(
        worker_id=WorkerId(worker_id),
        role=role,
        address="",
        host_id="h",
        pid=1,
        arena_bytes=num_ranks * 64 * MIB,
        num_threads=1,
        num_ranks=num_ranks,
    )


def test_a_model_whose_kv_could_not_move_is_refused_and_not_registered() -> None:
    bench = Bench({"pools": {"prefill": {"tensor_parallel": 3}}})
    with pytest.raises(ConfigError, match=r"models\.m: 2 KV heads cannot lie evenly on 3 ranks.*tensor_parallel"):
        bench.controller.register(MODEL)
    assert bench.controller.models() == ()


def test_a_worker_whose_ranks_do_not_fit_a_model_cannot_join() -> None:
    bench = Bench()
    bench.controller.register(MODEL)
    bench.controller.join(hello("d0", 4))
    with pytest.raises(ConfigError, match="2 KV heads cannot lie evenly on 3 ranks"):
        bench.controller.join(hello("d1", 3))
    assert [worker.worker_id for worker in bench.controller.topology().workers] == ["d0"]


def test_each_worker_has_room_by_what_a_rank_takes() -> None:
    bench = Bench()
    bench.controller.register(MODEL)
    for one in (hello("p0", 2), hello("d0", 4), hello("d1", 8)):
        bench.controller.join(one)
    able = bench.controller._pool.able(MODEL)
    assert [book.hello.worker_id for book in (*able.prefill, *able.decode)] == ["p0", "d0"]  # no weights for eight
    kv = [replace(MODEL.kv, num_ranks=n) for n in (2, 4)]
    assert able.max_kv_tokens == min(max_kv_tokens(64 * MIB, 5 * MIB, kv[0]), max_kv_tokens(64 * MIB, 3 * MIB, kv[1]))


def test_ranks_share_the_host_and_take_a_ranks_weights() -> None:
    config = ClusterConfig.from_dict({"pools": {"prefill": {"tensor_parallel": 2}, "decode": {"workers": 2}}})
    assert config.pools.num_ranks == 4 and config.pools.degrees == (1, 2)
    settings = [worker_settings(config, role, WorkerId(role), "unix:@s", [replace(MODEL, weight_bytes=200 * MIB)]) for role in Role]
    assert [one.num_ranks for one in settings] == [2, 1]
    assert settings[0].arena_bytes < settings[1].arena_bytes
    assert {one.num_threads for one in settings} == {num_threads(config.pools.prefill, 4)}
