"""Two workers over real sockets and shared memory, their store, and a client that collects tokens; no controller."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import torch

from polymux.actors.engine import EngineSettings
from polymux.actors.kept import KEEP_S
from polymux.actors.store_server import StoreServer
from polymux.actors.weight_store import ModelSource
from polymux.actors.worker import Worker, WorkerSettings
from polymux.transport.kv import KVSettings
from polymux.transport.link import WorkerLink
from polymux.transport.messages import Generate, ModelSpec, Peer, Role, SamplingParams, SequenceUpdate
from polymux.transport.region import this_host
from polymux.transport.units import KIB, MIB, ClientId, Epoch, ModelName, SequenceId, WorkerId, pack_ids

MODELS = Path(__file__).parent.parent.parent / "deploy" / "demo" / "models"
TOKEN = "test-cluster-token-0123456789"
NAMES = (ModelName("llama-small"), ModelName("qwen3-small"))
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True)
Ask = tuple[ModelSpec, list[int], SamplingParams]


class Pair:
    """Two workers, a store, and a client that collects tokens."""

    def __init__(
        self,
        *,
        prefill_kv_bytes: int,
        decode_kv_bytes: int,
        kv: KVSettings,
        keep_s: float,
        host_kv_bytes: int,
        ranks: tuple[int, int],
        rank_timeout_s: float,
        probe_interval_s: float,
        layout: str,
        engine: dict[str, Any],
    ) -> None:
        self._engine = engine
        self._keep_s = keep_s
        self._kv = kv
        self._rank_timeout_s, self._probe_interval_s = rank_timeout_s, probe_interval_s
        torch.set_num_threads(1)
        self.store = StoreServer(budget_bytes=64 * MIB, layout=layout, token=TOKEN, kv_bytes=host_kv_bytes)
        self.specs = {
            name: self.store.register(
                ModelSource(model=name, path=str(MODELS / name), dtype="float32", max_model_len=192, degrees=tuple(sorted(set(ranks))))
            )
            for name in NAMES
        }
        self._ids = itertools.count()
        self._received: dict[str, asyncio.Queue[SequenceUpdate]] = {}
        reserve = sum(spec.weight_bytes for spec in self.specs.values()) + MIB
        self.prefill = self._worker(Role.PREFILL, reserve, prefill_kv_bytes, ranks[0])
        self.decode = self._worker(Role.DECODE, reserve, decode_kv_bytes, ranks[1])

    def _worker(self, role: Role, reserve: int, kv_bytes: int, num_ranks: int) -> Worker:
        worker = Worker(
            WorkerSettings(
                worker_id=WorkerId(role),
                role=role,
                arena_bytes=reserve + kv_bytes,
                engine=EngineSettings(weight_reserve_bytes=reserve, slab_bytes=128 * KIB, **{"max_num_batched_tokens": 48, **self._engine}),
                token=TOKEN,
                store_address=self.store.address,
                kv=self._kv,
                keep_s=self._keep_s,
                num_ranks=num_ranks,
                rank_timeout_s=self._rank_timeout_s,
                probe_interval_s=self._probe_interval_s,
            )
        )
        hello = worker.start()
        for spec in self.specs.values():
            worker.add_model(spec)
        worker.serve(Epoch(1))
        assert hello.address
        return worker

    def peer(self, worker: Worker) -> Peer:
        return Peer(worker_id=worker.settings.worker_id, epoch=Epoch(1), address=worker.address, host_id=this_host())

    async def connect(self) -> list[asyncio.Task[None]]:
        self.links = [await WorkerLink.connect(self.peer(w), ClientId("client"), TOKEN, 5.0) for w in (self.prefill, self.decode)]
        return [asyncio.create_task(self._read(link)) for link in self.links]

    async def _read(self, link: WorkerLink) -> None:
        async for frame in link:
            for update in frame.updates:
                self._received[update.sequence_id].put_nowait(update)

    async def send(
        self,
        spec: ModelSpec,
        prompt: list[int],
        sampling: SamplingParams,
        outputs: tuple[int, ...] = (),
        deadline_s: float = 30,
        roles: tuple[Worker, Worker] | None = None,
        cache_salt: str = "",
        due_in_s: float = 10.0,
    ) -> str:
        """`roles`: who prefills and who decodes."""
        prefill, decode = roles or (self.prefill, self.decode)
        sequence_id = SequenceId(f"s{next(self._ids)}")
        self._received[sequence_id] = asyncio.Queue()
        await self.links[0 if decode is self.prefill else 1].send(
            Generate(
                sequence_id=sequence_id,
                model=spec.model,
                prompt_ids=pack_ids(prompt),
                output_ids=pack_ids(outputs),
                sampling=sampling,
                prefill=self.peer(prefill),
                deadline_s=deadline_s,
                tpot_slo_s=0.1,
                due_in_s=due_in_s,
                cache_salt=cache_salt,
            )
        )
        return sequence_id

    async def collect(self, sequence_id: str, start: int = 0) -> tuple[list[int], SequenceUpdate]:
        """All tokens in order of their index, and the update that ended the sequence."""
        tokens: dict[int, int] = {}
        last: SequenceUpdate | None = None
        async with asyncio.timeout(60):
            while last is None or len(tokens) + start < last.index + len(last.token_ids):
                update = await self._received[sequence_id].get()
                tokens.update({update.index + i: token for i, token in enumerate(update.token_ids)})
                last = update if update.finish_reason or update.error else last
        return [tokens[index] for index in sorted(tokens)], last

    async def generate(
        self, spec: ModelSpec, prompt: list[int], sampling: SamplingParams = GREEDY, outputs: tuple[int, ...] = ()
    ) -> list[int]:
        tokens, last = await self.collect(await self.send(spec, prompt, sampling, outputs), len(outputs))
        assert last.error is None, last.error
        return tokens

    async def until(self, is_true: Callable[[], bool], deadline_s: float = 10.0) -> None:
        async with asyncio.timeout(deadline_s):
            while not is_true():
                await asyncio.sleep(0.02)

    async def check_whole(self) -> None:
        """No block is out on either side, nor in the host tier, and the books agree with the memories."""
        workers = (self.prefill, self.decode)
        memories = [worker._engine.blocks for worker in workers] + [worker._tier.blocks for worker in workers if worker._tier is not None]
        await self.until(lambda: all(blocks.num_out == 0 for blocks in memories))
        for blocks in memories:
            blocks.check()

    def close(self) -> None:
        self.decode.stop()
        self.prefill.stop()
        self.store.close()


@asynccontextmanager
async def running_pair(
    *,
    prefill_kv_bytes: int = 16 * MIB,
    decode_kv_bytes: int = 16 * MIB,
    kv: KVSettings | None = None,
    keep_s: float = KEEP_S,
    host_kv_bytes: int = 0,
    ranks: tuple[int, int] = (1, 1),
    rank_timeout_s: float = 30.0,
    probe_interval_s: float = 10.0,
    layout: str = "auto",
    **engine: Any,
) -> AsyncIterator[Pair]:
    """`ranks`: of the prefill and of the decode instance. `engine`: its settings, other than the pair's own."""
    pair = Pair(
        prefill_kv_bytes=prefill_kv_bytes,
        decode_kv_bytes=decode_kv_bytes,
        kv=kv or KVSettings(),
        keep_s=keep_s,
        host_kv_bytes=host_kv_bytes,
        ranks=ranks,
        rank_timeout_s=rank_timeout_s,
        probe_interval_s=probe_interval_s,
        layout=layout,
        engine=engine,
    )
    readers = await pair.connect()
    try:
        yield pair
        await pair.check_whole()
    finally:
        for link in pair.links:
            await link.close()
        await asyncio.gather(*readers, return_exceptions=True)
        await asyncio.to_thread(pair.close)


def prompt_of(spec: ModelSpec, length: int, salt: int = 0) -> list[int]:
    return [(17 * i + 31 * salt + 5) % (spec.vocab_size - 16) + 8 for i in range(length)]


def counter(worker: Worker, name: str) -> float:
    return dict(worker.report().counters).get(name, 0.0)


async def served(pair: Pair, ask: Ask, roles: tuple[Worker, Worker] | None = None, cache_salt: str = "") -> tuple[list[int], int]:
    """The tokens, and how many of the prompt's were cached."""
    spec, prompt, sampling = ask
    sequence_id = await pair.send(spec, prompt, sampling, roles=roles, cache_salt=cache_salt)
    received, cached = pair._received[sequence_id], []
    tokens: dict[int, int] = {}
    async with asyncio.timeout(60):
        while len(tokens) < sampling.max_tokens:
            update = await received.get()
            assert update.error is None, update.error
            tokens.update({update.index + i: token for i, token in enumerate(update.token_ids)})
            cached += [update.cached_tokens] if update.index == 0 else []
    assert len(cached) == 1
    return [tokens[i] for i in range(len(tokens))], cached[0]
