"""Turns over a real engine's books: what the policy is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.meter import Meter
from polymux.actors.sequence import Phase as SequencePhase
from polymux.actors.sequence import Sequence
from polymux.actors.turns import Turns, Work, by_model
from polymux.disagg.multiplex import Turn
from polymux.disagg.phase import MAX_PASSED_OVER, Phase
from polymux.disagg.views import DecodeView, Due, PromptView
from polymux.transport.errors import PolymuxError
from polymux.transport.messages import Generate, KVLayout, ModelSpec, Peer, SamplingParams
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB, ClientId, Epoch, ModelName, SequenceId, WorkerId, pack_ids

A, B = ModelName("a"), ModelName("b")
PEER = Peer(worker_id=WorkerId("w"), epoch=Epoch(1), address="tcp://127.0.0.1:1", host_id="here")


class NoWeights:
    def fetch(self, model: ModelName) -> Any:
        raise PolymuxError("no weights here")


@dataclass
class Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


class Recorder:
    """Always the first model by name, until news; remembers what it saw."""

    def __init__(self) -> None:
        self.views: list[DecodeView] = []

    def start(self) -> None: ...

    def next_turn(self, view: DecodeView, memory: None) -> tuple[Turn | None, None]:
        self.views.append(view)
        models = sorted(batch.model for batch in view.batches)
        prefetch = models[1] if len(models) > 1 else None
        return (Turn(model=models[0], quota_s=9.0, prefetch=prefetch, ends_on_news=True) if models else None), None


def spec_of(model: ModelName) -> ModelSpec:
    return ModelSpec(
        model=model,
        path="",
        digest=model,
        config_json="{}",
        dtype="float32",
        kv=KVLayout(num_layers=1, num_kv_heads=1, head_dim=64, dtype="float32"),
        weight_bytes=MIB,
        vocab_size=100,
        max_model_len=128,
        eos_token_ids=(),
    )


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine(clock: Clock) -> Iterator[Engine]:
    torch.set_num_threads(1)
    settings = EngineSettings(weight_reserve_bytes=2 * MIB, slab_bytes=64 * KIB)
    engine = Engine(Region.create(3 * MIB), settings, NoWeights(), clock)
    for model in (A, B):
        engine.specs[model] = spec_of(model)
    yield engine
    engine.close()


def turns_of(engine: Engine) -> tuple[Turns, Recorder]:
    meter, recorder = Meter(), Recorder()
    for spec in engine.specs.values():
        meter.add_model(spec)
    return Turns(engine, meter, recorder), recorder


def running(name: str, model: ModelName, clock: Clock, *, due_in_s: float = 10.0) -> Sequence:
    command = Generate(
        sequence_id=SequenceId(name),
        model=model,
        prompt_ids=pack_ids([1] * 4),
        output_ids=b"",
        sampling=SamplingParams(max_tokens=8),
        prefill=PEER,
        deadline_s=60.0,
        tpot_slo_s=0.1,
        due_in_s=due_in_s,
    )
    sequence = Sequence.from_command(command, ClientId("client"), spec_of(model), 1, clock())
    sequence.phase = SequencePhase.RUNNING
    return sequence


def test_each_token_is_due_a_tpot_after_the_one_before_and_one_that_is_late_is_remembered(clock: Clock) -> None:
    sequence = running("s", A, clock, due_in_s=2.0)
    assert sequence.due_s == 102.0
    sequence.append(1, 102.0)
    assert sequence.due_s == pytest.approx(102.1) and sequence.is_kept
    sequence.append(1, 102.2)
    assert sequence.due_s == pytest.approx(102.2) and not sequence.is_kept


def test_the_policy_sees_when_every_sequences_next_token_is_due(engine: Engine, clock: Clock) -> None:
    turns, recorder = turns_of(engine)
    turns.current(by_model([running("one", A, clock, due_in_s=2.0), running("two", A, clock, due_in_s=-1.0)], []))
    (batch,) = recorder.views[0].batches
    assert sorted(batch.dues) == [Due(99.0, 0.1), Due(102.0, 0.1)]
    assert batch.switch_s > 0 and recorder.views[0].can_prefetch


def test_a_turn_goes_on_until_a_sequence_comes(engine: Engine, clock: Clock) -> None:
    turns, recorder = turns_of(engine)
    line = by_model([running("one", A, clock), running("two", B, clock)], [])
    for _ in range(3):
        turns.current(line)
    assert len(recorder.views) == 1
    turns.came()
    turns.current(line)
    assert len(recorder.views) == 2


def test_a_prefetch_that_did_not_begin_is_not_counted_on(engine: Engine, clock: Clock) -> None:
    turns, recorder = turns_of(engine)
    line = by_model([running("one", A, clock), running("two", B, clock)], [])
    turns.current(line)
    turns.came()
    turns.current(line)
    assert [view.can_prefetch for view in recorder.views] == [True, False]


def test_a_prompt_counts_in_its_models_batch_with_its_deadline_and_its_prefill(engine: Engine, clock: Clock) -> None:
    turns, recorder = turns_of(engine)
    prompt = PromptView(
        sequence_id=SequenceId("new"), model=A, order=2, num_tokens=20, num_done=0, due_at_s=103.0, tpot_slo_s=0.2, prefill_s=0.5
    )
    turns.current(by_model([running("one", A, clock)], [prompt]))
    (batch,) = recorder.views[0].batches
    assert (batch.num_seqs, batch.prefill_s) == (2, 0.5)
    assert Due(103.0, 0.2, is_prompt=True) in batch.dues


def test_in_a_turn_the_phase_whose_token_would_be_late_comes_first(engine: Engine, clock: Clock) -> None:
    turns, _ = turns_of(engine)
    prompt = PromptView(
        sequence_id=SequenceId("new"), model=A, order=2, num_tokens=20, num_done=0, due_at_s=109.0, tpot_slo_s=0.1, prefill_s=0.5
    )
    assert turns.phase(A, Work([running("late", A, clock, due_in_s=0.002)], [prompt])) is Phase.DECODE
    assert turns.phase(A, Work([running("early", A, clock, due_in_s=9.0)], [prompt])) is Phase.PREFILL


def test_only_steps_for_which_a_prompt_of_the_model_waited_count_as_passing_it_over(engine: Engine, clock: Clock) -> None:
    turns, _ = turns_of(engine)
    prompt = PromptView(
        sequence_id=SequenceId("new"), model=A, order=2, num_tokens=20, num_done=0, due_at_s=109.0, tpot_slo_s=0.1, prefill_s=0.5
    )
    tight = running("tight", A, clock, due_in_s=0.002)
    for _ in range(5):  # for a prompt that is cancelled then
        assert turns.phase(A, Work([tight], [prompt])) is Phase.DECODE
    for _ in range(MAX_PASSED_OVER):
        assert turns.phase(A, Work([tight], [])) is Phase.DECODE
        assert turns.phase(B, Work([running("other", B, clock)], [])) is Phase.DECODE
    phases = [turns.phase(A, Work([tight], [prompt])) for _ in range(MAX_PASSED_OVER + 1)]
    assert phases == [Phase.DECODE] * MAX_PASSED_OVER + [Phase.PREFILL]
