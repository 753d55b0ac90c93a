"""Any order of steps, copies, failures and endings: a block has one owner in both tiers, its bytes stay, everybody gets to the end."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch
from bare_engines import LAYOUTS, PEER, A, B, engine_of, generate
from host_tiers import tier_over
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from polymux.actors.copier import Copied, CopyBlocks, OnDone
from polymux.actors.decode import DecodeRole
from polymux.actors.engine import Engine
from polymux.actors.kept import KeptSequences
from polymux.actors.kv_blocks import kv_view
from polymux.actors.meter import Meter
from polymux.actors.outbox import Outbox
from polymux.actors.sequence import Phase
from polymux.actors.sequence import Sequence as Seq
from polymux.actors.turns import Turns
from polymux.disagg.turn_policies import turn_policy
from polymux.transport.errors import Overloaded, PolymuxError
from polymux.transport.head_slices import heads_of
from polymux.transport.host_tier import TierMemory
from polymux.transport.messages import KVLayout
from polymux.transport.units import KIB, ClientId, ModelName, SequenceId

SLAB = 64 * KIB
MAX_LEN = 128


@dataclass
class ManualCopier:
    """A copier whose copies end when, and as, the test says."""

    copy: CopyBlocks
    waiting: list[tuple[Tensor, Sequence[int], Tensor, Sequence[int], OnDone]] = field(default_factory=list)
    is_full: bool = False

    def submit(self, source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int], on_done: OnDone) -> None:
        if self.is_full:
            raise Overloaded("full")
        self.waiting.append((source, source_ids, target, target_ids, on_done))

    def end(self, index: int, error: PolymuxError | None = None) -> None:
        source, source_ids, target, target_ids, on_done = self.waiting.pop(index)
        if error is None:
            list(self.copy(source, source_ids, target, target_ids))
        nbytes = len(source_ids) * source[0].nbytes
        on_done(Copied(num_blocks=len(source_ids), nbytes=nbytes, began_s=0.0, ended_s=1e-6, error=error))


@dataclass
class HeldGrants:
    """Grants whose prefills end when the test says; blocks of cancelled ones stay in quarantine until then."""

    engine: Engine
    live: dict[Seq, list[int]] = field(default_factory=dict)
    quarantine: list[tuple[ModelName, list[int]]] = field(default_factory=list)

    @property
    def is_idle(self) -> bool:
        return not self.live and not self.quarantine

    def order(self, sequence: Seq) -> None:
        pool = self.engine.pool(sequence.spec.model)
        self.live[sequence] = pool.allocate(sequence.spec.kv.num_blocks(sequence.num_tokens))
        sequence.phase = Phase.PREFILLING

    def cancel(self, sequence: Seq, reason: str) -> None:
        self.quarantine.append((sequence.spec.model, self.live.pop(sequence)))

    def commit(self, sequence: Seq) -> None:
        sequence.block_ids = self.live.pop(sequence)
        for position in range(sequence.num_tokens):
            write(self.engine, sequence, position)
        sequence.append(1, 0.0)
        sequence.phase = Phase.RUNNING

    def quiesce(self) -> None:
        for model, ids in self.quarantine:
            self.engine.pool(model).free(ids)
        self.quarantine.clear()


def slots(engine: Engine, sequence: Seq, position: int) -> Iterator[tuple[int, Tensor]]:
    """Of every rank the place of each head that it holds, with the head's number in the model."""
    layout = sequence.spec.kv
    block, offset = divmod(position, layout.block_size)
    for rank, memory in enumerate(memories(engine)):
        part = kv_view(memory, layout)[sequence.block_ids[block], 0, 0, :, offset, 0]
        yield from zip(heads_of(layout, rank), part, strict=True)


def mark(sequence: Seq, position: int, head: int) -> float:
    return sequence.order * 1000 + position + head / 4


def write(engine: Engine, sequence: Seq, position: int) -> None:
    for head, slot in slots(engine, sequence, position):
        slot.fill_(mark(sequence, position, head))


def memories(engine: Engine) -> tuple[Tensor, ...]:
    """Of every rank."""
    return (engine.arena.memory, *(engine._ranks.memories if engine._ranks is not None else ()))


class SwapMachine(RuleBasedStateMachine):
    """Two models on a device of few slabs, of one rank or several, with a host tier of even fewer, or more."""

    @initialize(num_slabs=st.integers(2, 4), num_host_slabs=st.integers(1, 5), num_ranks=st.sampled_from((1, 1, 2, 4)))
    def start(self, num_slabs: int, num_host_slabs: int, num_ranks: int) -> None:
        self.build(num_slabs, num_host_slabs, num_ranks)

    def build(self, num_slabs: int, num_host_slabs: int, num_ranks: int = 1) -> None:
        self.engine = engine_of(num_slabs, num_ranks)
        if num_ranks > 1:  # twice the heads, so that two ranks share them and four hold each twice
            for model, spec in self.engine.specs.items():
                self.engine.specs[model] = replace(spec, kv=replace(spec.kv, num_kv_heads=2, num_ranks=num_ranks))
        self.memory = TierMemory(num_host_slabs * SLAB, SLAB)
        self.tier = tier_over(self.memory)
        self.grants, self.copier, meter = HeldGrants(self.engine), ManualCopier(self.copy_and_spoil), Meter()
        for spec in self.engine.specs.values():
            meter.add_model(spec)
        turns, outbox = Turns(self.engine, meter, turn_policy("wrr")), Outbox(PEER, lambda _client, _frame: True)
        self.role = DecodeRole(
            self.engine,
            self.grants,  # type: ignore[arg-type]
            turns,
            meter,
            outbox,
            KeptSequences(self.engine),
            self.tier,
            self.copier,  # type: ignore[arg-type]
        )
        self.num_accepted = 0

    def copy_and_spoil(
        self, source: Tensor, source_ids: Sequence[int], target: Tensor, target_ids: Sequence[int]
    ) -> Generator[None, None, None]:
        """What has left a rank's arena is nobody's any more."""
        yield from self.engine.device.copy_blocks(source, source_ids, target, target_ids)
        if source.untyped_storage().data_ptr() == self.engine.arena.memory.data_ptr():
            for memory in memories(self.engine):
                memory[: source.nbytes].view(source.dtype).view(source.shape)[list(source_ids)] = torch.nan

    @property
    def sequences(self) -> list[Seq]:
        return list(self.role._sequences.values())

    @rule(model=st.sampled_from((A, B)), num_tokens=st.integers(1, MAX_LEN - 2), client=st.sampled_from(("x", "y")))
    def accept(self, model: ModelName, num_tokens: int, client: str) -> None:
        self.num_accepted += 1
        self.role.accept(generate(f"s{self.num_accepted}", model, num_tokens), ClientId(client))

    @rule(model=st.sampled_from((A, B)), count=st.integers(1, 20))
    def step(self, model: ModelName, count: int) -> None:
        for _ in range(count):
            self.role.prepare()
            for sequence in self.role._room.form(model, self.sequences):
                for position in range(0, sequence.num_cached, 7):
                    for head, slot in slots(self.engine, sequence, position):
                        assert slot.item() == mark(sequence, position, head), "a block lost its bytes"
                write(self.engine, sequence, sequence.num_cached)
                sequence.append(1, 0.0)
                if sequence.num_tokens >= MAX_LEN:
                    self.role._drop(sequence, "finished")

    @precondition(lambda self: self.grants.live)
    @rule(data=st.data())
    def commit(self, data: st.DataObject) -> None:
        self.grants.commit(data.draw(st.sampled_from(sorted(self.grants.live, key=lambda s: s.order))))

    @precondition(lambda self: self.copier.waiting)
    @rule(data=st.data(), is_good=st.booleans())
    def end_copy(self, data: st.DataObject, is_good: bool) -> None:
        index = data.draw(st.integers(0, len(self.copier.waiting) - 1))
        self.copier.end(index, None if is_good else PolymuxError("a copy that fails"))

    @precondition(lambda self: self.role._sequences)
    @rule(data=st.data(), how=st.sampled_from(("cancel", "deadline", "fail")))
    def end_one(self, data: st.DataObject, how: str) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        if how == "cancel":
            self.role.cancel(sequence.command.sequence_id, "test")
        elif how == "deadline":
            sequence.deadline_s = -1.0
            self.role.prepare()
        else:
            self.role._fail(sequence, PolymuxError("test"))
        assert sequence.command.sequence_id not in self.role._sequences

    @rule(client=st.sampled_from(("x", "y")))
    def lose_client(self, client: str) -> None:
        self.role.client_lost(ClientId(client))

    @rule()
    def quiesce(self) -> None:
        self.grants.quiesce()

    @rule(is_full=st.booleans())
    def fill_copier(self, is_full: bool) -> None:
        self.copier.is_full = is_full

    @rule()
    def lose_store(self) -> None:
        self.memory.close()

    def owners(self, layout: KVLayout) -> tuple[list[int], list[int]]:
        """Blocks of a layout that somebody holds, on the device and on the host."""
        copies = [copy for copy in self.role._swaps._under_way if copy.device.layout == layout]
        mine = [s for s in self.sequences if s.spec.kv == layout]
        device = [i for s in mine for i in s.block_ids] + [i for copy in copies for i in copy.device_ids]
        device += [i for s, ids in self.grants.live.items() if s.spec.kv == layout for i in ids]
        device += [i for model, ids in self.grants.quarantine if self.engine.spec(model).kv == layout for i in ids]
        return device, [i for s in mine for i in s.host_ids] + [i for copy in copies for i in copy.host_ids]

    @invariant()
    def each_block_has_one_owner(self) -> None:
        if not hasattr(self, "role"):
            return
        self.engine.blocks.check()
        self.role.check()
        for model in LAYOUTS:
            layout = self.engine.spec(model).kv
            device, host = self.owners(layout)
            pool = self.tier.pool(layout)
            assert pool is not None
            assert sorted(device) == sorted(self.engine.pool(model)._holders), "device"
            assert sorted(host) == sorted(pool._holders), "host"

    @invariant()
    def phases_say_where_the_blocks_are(self) -> None:
        for s in self.sequences if hasattr(self, "role") else ():
            if s.phase is Phase.WAITING:
                assert not s.block_ids and not s.host_ids
            if s.phase is Phase.SWAPPED:
                assert s.host_ids and len(s.block_ids) + len(s.host_ids) >= s.spec.kv.num_blocks(s.num_cached)

    def teardown(self) -> None:
        if not hasattr(self, "role"):
            return
        self.copier.is_full = False
        for _ in range(MAX_LEN * (len(self.sequences) + 2) * 4):
            if not self.sequences:
                break
            for sequence in list(self.grants.live):
                self.grants.commit(sequence)
            self.grants.quiesce()
            while self.copier.waiting:
                self.copier.end(0)
            for model in (A, B):
                self.step(model, 1)
        assert not self.sequences, "somebody never got to the end"
        while self.copier.waiting:
            self.copier.end(0)
        self.grants.quiesce()
        assert self.engine.blocks.num_out == 0 and self.tier.blocks.num_out == 0
        self.tier.close()
        self.memory.close()
        self.engine.close()


TestSwaps = SwapMachine.TestCase
TestSwaps.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)


def running(machine: SwapMachine, **num_tokens: int) -> list[Seq]:
    """Sequences of A whose prefills were committed."""
    for name, count in num_tokens.items():
        machine.role.accept(generate(name, A, count), ClientId("x"))
        sequence = machine.role._sequences[SequenceId(name)]
        machine.grants.live[sequence] = machine.engine.pool(A).allocate(sequence.spec.kv.num_blocks(count))
        machine.grants.commit(sequence)
    return machine.sequences


def test_the_others_go_on_while_blocks_are_on_their_way_and_nobody_else_is_preempted_for_them() -> None:
    machine = SwapMachine()
    machine.build(2, 4)  # eight blocks of A
    role = machine.role
    old, young, youngest = running(machine, old=47, young=34, youngest=20)  # 3, 3 and 2 blocks
    old.append(1, 0.0)  # its next token wants a fourth block
    for _ in range(3):
        assert role._room.form(A, machine.sequences) == [young]
        assert (old.phase, youngest.phase) == (Phase.RUNNING, Phase.SWAPPING_OUT)
    assert len(machine.copier.waiting) == 1
    machine.copier.end(0)
    assert role._room.form(A, machine.sequences) == [old, young]
    assert youngest.phase is Phase.SWAPPED and young.num_preemptions == 0


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_sequence_that_was_swapped_out_has_its_bytes_again_on_every_rank(num_ranks: int) -> None:
    machine = SwapMachine()
    machine.build(2, 4, num_ranks)
    old, _, youngest = running(machine, old=47, young=34, youngest=20)
    old.append(1, 0.0)
    machine.role._room.form(A, machine.sequences)
    machine.copier.end(0)
    machine.role._drop(old, "finished")
    machine.role.prepare()
    machine.copier.end(0)
    assert youngest.phase is Phase.RUNNING and youngest.num_cached == 20
    for position in range(20):
        found = [(slot.item(), mark(youngest, position, head)) for head, slot in slots(machine.engine, youngest, position)]
        assert len(found) == num_ranks and all(value == expected for value, expected in found)
    machine.teardown()
