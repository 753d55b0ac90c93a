"""Batches of sequences on an engine without roles, stepped by hand: each step may be handed over before the last one's tokens are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from polymux.actors.device import Device
from polymux.actors.drawn import Ask, Drawn, Known
from polymux.actors.engine import Engine, EngineSettings
from polymux.actors.model_runner import Carried, ForwardBatch, SequenceSlice
from polymux.actors.sampler import SampledToken, SamplerState
from polymux.actors.weight_store import ModelSource, WeightStore
from polymux.transport.messages import ModelSpec, SamplingParams
from polymux.transport.region import Region
from polymux.transport.units import KIB, MIB, ModelName
from polymux.transport.weights import OpenImage

MODELS = Path(__file__).parent.parent.parent / "deploy" / "demo" / "models"
NAMES = (ModelName("llama-small"), ModelName("qwen3-small"))
SAMPLED = SamplingParams(max_tokens=40, temperature=0.9, top_p=0.95, top_k=40, seed=7)
KINDS = {
    "greedy": SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True),
    "sampled": SAMPLED,
    "penalized": replace(SAMPLED, repetition_penalty=1.3, frequency_penalty=0.4),
    "biased": replace(SAMPLED, logit_bias=((70, 3.0), (80, -5.0))),
    "min tokens": replace(SAMPLED, min_tokens=20, stop_token_ids=tuple(range(8, 200))),
    "min p": replace(SAMPLED, min_p=0.1, top_k=0),
}


class Store:
    def __init__(self, layout: str, dtype: str = "float32", names: tuple[ModelName, ...] = NAMES) -> None:
        self._store = WeightStore(budget_bytes=64 * MIB, layout=layout)
        self.specs = {
            name: replace(self._store.register(ModelSource(model=name, path=str(MODELS / name), dtype=dtype)), max_model_len=192)
            for name in names
        }

    def fetch(self, model: ModelName) -> OpenImage:
        manifest, fd = self._store.open(model)
        return OpenImage(manifest, fd, self.specs[model].weight_bytes)


def engine_on(store: Store, device: Device | None, num_resident: int = 2, *, batch_invariant: bool = False) -> Engine:
    sizes = sorted((spec.weight_bytes for spec in store.specs.values()), reverse=True)
    reserve = -(-(sum(sizes[:num_resident]) + 4 * KIB) // MIB) * MIB
    settings = EngineSettings(weight_reserve_bytes=reserve, slab_bytes=256 * KIB, max_num_seqs=6, batch_invariant=batch_invariant)
    nbytes = reserve + 4 * MIB
    engine = Engine(device.create(nbytes) if device is not None else Region.create(nbytes), settings, store, device=device)
    engine.device.enter()
    for spec in store.specs.values():
        engine.add_model(spec)
    return engine


class Batch:
    """Sequences of one model on an engine, each step of which may be handed over before the last one's tokens are read."""

    def __init__(self, engine: Engine, spec: ModelSpec, params: list[SamplingParams], *, runs_ahead: bool) -> None:
        self.engine, self.spec, self.runs_ahead = engine, spec, runs_ahead
        engine.activate(spec.model)
        self.prompts = [[(7 * i + 3 * n) % 300 + 8 for i in range(5 + 11 * n)] for n in range(len(params))]
        self.states = [SamplerState(p, prompt, [], (), spec.vocab_size) for p, prompt in zip(params, self.prompts, strict=True)]
        self.blocks = [engine.pool(spec.model).allocate(6) for _ in params]
        self.outputs: list[list[SampledToken]] = [[] for _ in params]
        self.drawn: Drawn = Known(self.prefill())
        self.num_ahead = 0

    def prefill(self) -> list[SampledToken]:
        slices, start = [], 0
        for prompt, blocks in zip(self.prompts, self.blocks, strict=True):
            slices.append(SequenceSlice(start=start, num_tokens=len(prompt), context_len=0, block_ids=blocks))
            start += len(prompt)
        flat = torch.tensor([token for prompt in self.prompts for token in prompt])
        rows = torch.tensor([s.start + s.num_tokens - 1 for s in slices])
        batch = ForwardBatch(token_ids=flat, slices=tuple(slices), logits_rows=rows)
        return self.take(self.engine.decode(batch, [Ask(state) for state in self.states]))

    def take(self, drawn: Drawn) -> list[SampledToken]:
        tokens = drawn.tokens()
        for state, output, token in zip(self.states, self.outputs, tokens, strict=True):
            assert isinstance(token, SampledToken)
            output.append(token)
            state.append(token.token_id)
        return [token for token in tokens if isinstance(token, SampledToken)]

    def step(self) -> None:
        """Hand a step over; take the tokens of the one before afterwards, or at once."""
        before, ahead = self.drawn, self.num_ahead
        lengths = [len(p) + len(o) - 1 + ahead for p, o in zip(self.prompts, self.outputs, strict=True)]
        slices = tuple(
            SequenceSlice(start=row, num_tokens=1, context_len=length, block_ids=blocks)
            for row, (length, blocks) in enumerate(zip(lengths, self.blocks, strict=True))
        )
        carried = Carried(ids=before.ids, rows=tuple(range(len(slices)))) if ahead and before.ids is not None else None
        token_ids = torch.tensor([output[-1].token_id for output in self.outputs])
        batch = ForwardBatch(token_ids=token_ids, slices=slices, logits_rows=None, carried=carried)
        self.drawn = self.engine.decode(batch, [Ask(state, ahead) for state in self.states])
        if ahead:
            self.take(before)
        self.num_ahead = 1
        if not self.runs_ahead:
            self.settle()

    def settle(self) -> None:
        if self.num_ahead:
            self.take(self.drawn)
        self.num_ahead = 0

    def run(self, num_steps: int) -> list[list[SampledToken]]:
        for _ in range(num_steps):
            self.step()
        self.settle()
        for blocks in self.blocks:
            self.engine.pool(self.spec.model).free(blocks)
        return self.outputs


def tokens_of(outputs: list[list[SampledToken]]) -> list[list[int]]:
    return [[token.token_id for token in output] for output in outputs]
