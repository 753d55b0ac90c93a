"""The two roles on an engine without weights: who gets blocks, and who waits, when there are too few."""

from __future__ import annotations

from dataclasses import dataclass, field

from bare_engines import PEER, A, B, engine_of, generate

from polymux.actors.decode import DecodeRole
from polymux.actors.engine import Engine
from polymux.actors.kept import KeptSequences
from polymux.actors.local_orders import LocalOrders
from polymux.actors.meter import Meter
from polymux.actors.outbox import Outbox
from polymux.actors.prefill import PrefillRole
from polymux.actors.sequence import Phase, Sequence
from polymux.actors.turns import Turns
from polymux.disagg.prefill import prefill_policy
from polymux.disagg.turn_policies import turn_policy
from polymux.transport.errors import PolymuxError
from polymux.transport.kv import OrderRef
from polymux.transport.messages import Grant, KVLayout, Prefill, SamplingParams
from polymux.transport.units import ClientId, Epoch, ModelName, SequenceId, TransferId, pack_ids


@dataclass
class FakeGrants:
    """Takes blocks as the real ones do, and remembers for whom."""

    engine: Engine
    ordered: list[str] = field(default_factory=list)
    is_idle: bool = False

    def order(self, sequence: Sequence) -> None:
        self.engine.pool(sequence.spec.model).allocate(sequence.spec.kv.num_blocks(sequence.num_tokens))
        sequence.phase = Phase.PREFILLING
        self.ordered.append(sequence.command.sequence_id)


@dataclass
class FakeSource:
    failed: list[tuple[OrderRef, str]] = field(default_factory=list)

    def accept(self, ref: OrderRef, layout: KVLayout) -> None: ...

    def fail(self, ref: OrderRef, error: PolymuxError) -> bool:
        self.failed.append((ref, type(error).__name__))
        return True


def decode_role(engine: Engine) -> tuple[DecodeRole, FakeGrants]:
    grants, meter = FakeGrants(engine), Meter()
    for spec in engine.specs.values():
        meter.add_model(spec)
    turns, outbox = Turns(engine, meter, turn_policy("wrr")), Outbox(PEER, lambda _client, _frame: True)
    role = DecodeRole(engine, grants, turns, meter, outbox, KeptSequences(engine))  # type: ignore[arg-type]
    return role, grants


def run(role: DecodeRole, engine: Engine, sequence_id: str, model: ModelName, num_tokens: int) -> Sequence:
    """A sequence whose prefill was committed."""
    role.accept(generate(sequence_id, model, num_tokens), ClientId("client"))
    sequence = role._sequences[SequenceId(sequence_id)]
    sequence.block_ids = engine.pool(model).allocate(sequence.spec.kv.num_blocks(num_tokens))
    sequence.append(1, 0.0)
    sequence.phase = Phase.RUNNING
    return sequence


def two_in_one_slab() -> tuple[DecodeRole, FakeGrants, Engine]:
    """Both slabs are taken: one by the oldest sequence, which needs a block more; one by two of another model."""
    engine = engine_of(2)
    role, grants = decode_role(engine)
    run(role, engine, "old", A, 16 * engine.pool(A).blocks_per_slab)
    for name in ("young", "youngest"):
        run(role, engine, name, B, 20)
    return role, grants, engine


def test_the_oldest_gets_a_slab_that_two_younger_sequences_share() -> None:
    role, _, engine = two_in_one_slab()
    assert [s.command.sequence_id for s in role._room.form(A, role._sequences.values())] == ["old"]
    assert all(s.phase is Phase.WAITING for s in role._sequences.values() if s.spec.model == B)
    engine.blocks.check()


def test_nobody_younger_is_granted_blocks_while_an_older_sequence_lacks_one() -> None:
    """Or a sequence that was preempted for it would take the same blocks again, step after step."""
    role, grants, _ = two_in_one_slab()
    role._room.preempt(role._sequences[SequenceId("youngest")])
    role._grant()
    assert grants.ordered == []
    role._room.form(A, role._sequences.values())
    role._drop(role._sequences[SequenceId("old")], "finished")
    role._grant()
    assert grants.ordered == ["young", "youngest"]


def order(sequence_id: str, model: ModelName, num_tokens: int, number: int) -> tuple[Prefill, OrderRef]:
    grant = Grant(transfer_id=TransferId(number), layout_hash="", block_ids=b"", target_epoch=Epoch(1), source_epoch=Epoch(1))
    prefill = Prefill(
        sequence_id=SequenceId(sequence_id),
        client_id=ClientId("client"),
        model=model,
        prompt_ids=pack_ids([1] * num_tokens),
        output_ids=b"",
        sampling=SamplingParams(max_tokens=8),
        grant=grant,
        deadline_s=60.0,
        tpot_slo_s=0.1,
        due_in_s=10.0,
    )
    return prefill, OrderRef(1, TransferId(number))


def prefill_role(engine: Engine) -> tuple[PrefillRole, FakeSource]:
    source = FakeSource()
    outbox = Outbox(PEER, lambda _client, _frame: True)
    orders = LocalOrders(engine, source, lambda call: call())
    return PrefillRole(engine, orders, prefill_policy("grouped_fcfs"), Meter(), outbox, KeptSequences(engine)), source


def test_short_prompts_do_not_overtake_a_long_one_that_waits_for_blocks() -> None:
    engine = engine_of(1)
    role, _ = prefill_role(engine)
    pool = engine.pool(A)
    leaving = pool.allocate(2)
    role.accept(*order("long", A, 16 * (pool.max_blocks - 1), 1))
    role.accept(*order("short", A, 5, 2))
    assert role._ready() == []
    pool.free(leaving)
    assert [job.command.sequence_id for job in role._ready()] == ["long", "short"]


def test_an_order_anew_takes_the_place_of_one_whose_decode_worker_was_given_up() -> None:
    role, source = prefill_role(engine_of(2))
    role.accept(*order("s", A, 20, 1))
    role.accept(*order("s", A, 20, 2))
    assert source.failed == [(OrderRef(1, TransferId(1)), "Cancelled")]
    assert [job.order.transfer_id for job in role._jobs.values()] == [2]
    role.released(OrderRef(1, TransferId(1)), 1.0)
    role.cancel(OrderRef(1, TransferId(2)), "test")
    role.released(OrderRef(1, TransferId(2)), 1.0)
    assert role.num_open == 0 and role._engine.blocks.num_out == 0
