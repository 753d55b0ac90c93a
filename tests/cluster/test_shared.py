"""`pools.split: shared`: every worker does both, and a prompt is computed where it will decode."""

from __future__ import annotations

from controller_bench import Bench, spec

from polymux.transport.messages import Role
from polymux.transport.units import WorkerId


def shared() -> Bench:
    bench = Bench({"pools": {"split": "shared"}})
    for model in "abc":
        bench.controller.register(spec(model))
    for worker_id in ("p1", "d1"):
        bench.join(worker_id)
    return bench


def test_each_sequence_is_prefilled_where_it_decodes_and_every_worker_gets_some() -> None:
    bench = shared()
    used = set()
    for i, model in enumerate("abcabc"):
        placement = bench.admit(f"r{i}", model)
        assert [peer.worker_id for peer in placement.prefill] == [peer.worker_id for peer in placement.decode]
        used.add(placement.decode[0].worker_id)
    assert used == {"p1", "d1"}


def test_sequences_of_a_model_gather() -> None:
    bench = shared()
    first = bench.admit("r0", "a").decode[0].worker_id
    assert {bench.admit(f"r{i}", "a").decode[0].worker_id for i in range(1, 4)} == {first}


def test_a_drained_worker_gets_nothing_and_the_other_goes_on_with_both() -> None:
    bench = shared()
    bench.controller.drain(WorkerId("d1"))
    assert {bench.admit(f"r{i}", model).decode[0].worker_id for i, model in enumerate("abc")} == {"p1"}
    assert bench.controller._pool.members[WorkerId("p1")].roles == frozenset(Role)
