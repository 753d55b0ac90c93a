"""A worker pair that computes nothing: real sockets, real messages, tokens out of the prompt. For the front door's benchmark and tests.

The answer to a prompt is the prompt: output token i is prompt token i, then the end. So whatever is sent is known beforehand, and any
worker can go on where another stopped, as real ones can. Logprobs are a function of the token's place.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from polymux.transport.errors import InvalidRequest, ModelNotFound, Overloaded, PolymuxError
from polymux.transport.messages import (
    Admit,
    Cancel,
    ErrorReport,
    FinishReason,
    Generate,
    KVLayout,
    LookBack,
    ModelSpec,
    Peer,
    Placement,
    Release,
    SequenceUpdate,
    TokenFrame,
    TokenLogprobs,
)
from polymux.transport.stream import StreamLimits, WorkerServer
from polymux.transport.units import MIB, ClientId, Epoch, ModelName, SequenceId, WorkerId, unpack_ids

TOKEN = "zero-engine-token-0123456789"
_EPOCHS = itertools.count(1)


def zero_spec(model: str, path: Path, *, vocab_size: int = 2048, max_model_len: int = 1024, eos: tuple[int, ...] = (1,)) -> ModelSpec:
    """A model to register; `path` holds a tokenizer.json."""
    return ModelSpec(
        model=ModelName(model),
        path=str(path),
        digest="0" * 16,
        config_json="{}",
        dtype="float32",
        kv=KVLayout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32"),
        weight_bytes=0,
        vocab_size=vocab_size,
        max_model_len=max_model_len,
        eos_token_ids=eos,
        created=1_700_000_000,
    )


@dataclass(slots=True, eq=False)
class _Running:
    client_id: ClientId
    command: Generate
    answer: list[int]
    index: int


@dataclass(eq=False)
class ZeroWorker:
    """A prefill and a decode worker under one thread that steps: one token for each running sequence, its first by the prefill worker.

    `may_step` is asked before each step, and waits as it likes; `failures` maps a token's index to the error that comes in its place, once.
    """

    name: str
    eos: int = 1
    step_s: float = 0.0
    may_step: Callable[[], object] = lambda: None
    max_pending_bytes: int = 64 * MIB
    neighbours: dict[str, ZeroWorker] = field(default_factory=dict)  # by prefill worker id: who sends first tokens
    commands: list[Generate] = field(default_factory=list)
    cancelled: list[SequenceId] = field(default_factory=list)
    lost_clients: list[ClientId] = field(default_factory=list)
    failures: dict[int, PolymuxError] = field(default_factory=dict)
    num_tokens: int = 0  # made so far

    def start(self) -> ZeroWorker:
        self._running: dict[SequenceId, _Running] = {}
        self._lock = threading.Lock()
        self._has_work = threading.Event()
        self._is_stopped = False
        self.prefill_server, self.prefill = self._listen("prefill")
        self.decode_server, self.decode = self._listen("decode")
        self.neighbours[self.prefill.worker_id] = self
        self._thread = threading.Thread(target=self._run, name=f"zero-{self.name}", daemon=True)
        self._thread.start()
        return self

    def _listen(self, role: str) -> tuple[WorkerServer, Peer]:
        worker_id, epoch = WorkerId(f"{role}-{self.name}"), Epoch(next(_EPOCHS))
        server = WorkerServer(
            worker_id=worker_id,
            token=TOKEN,
            on_command=self._command,
            on_client_lost=self._client_lost,
            limits=StreamLimits(max_pending_bytes=self.max_pending_bytes),
        )
        address = server.start()
        server.serve(epoch)
        return server, Peer(worker_id=worker_id, epoch=epoch, address=address, host_id="here")

    @property
    def num_running(self) -> int:
        with self._lock:
            return len(self._running)

    def stop(self) -> None:
        """Also what a crash looks like from outside: every connection ends."""
        self._is_stopped = True
        self._has_work.set()
        self.prefill_server.close()
        self.decode_server.close()
        self._thread.join(5.0)

    def move(self) -> None:
        """Give every sequence up, as a worker that is being emptied does."""
        with self._lock:
            given_up, self._running = list(self._running.items()), {}
            for sequence_id, one in given_up:
                update = SequenceUpdate(sequence_id=sequence_id, index=one.index, token_ids=(), moved=True)
                self.decode_server.send(
                    one.client_id, TokenFrame(worker_id=self.decode.worker_id, epoch=self.decode.epoch, updates=(update,))
                )

    def _command(self, client_id: ClientId, command: Generate | Cancel) -> None:
        with self._lock:
            if isinstance(command, Cancel):
                self.cancelled.append(command.sequence_id)
                self._running.pop(command.sequence_id, None)
                return
            self.commands.append(command)
            answer = [*unpack_ids(command.prompt_ids), self.eos]
            index = len(command.output_ids) // 4
            self._running[command.sequence_id] = _Running(client_id, command, answer, index)
            self._has_work.set()

    def _client_lost(self, client_id: ClientId) -> None:
        with self._lock:
            self.lost_clients.append(client_id)
            for sequence_id in [key for key, one in self._running.items() if one.client_id == client_id]:
                del self._running[sequence_id]

    def _run(self) -> None:
        while not self._is_stopped:
            if not self._has_work.wait(0.5):
                continue
            self.may_step()
            if self.step_s:
                time.sleep(self.step_s)
            if not self._is_stopped:
                self._step()

    def _step(self) -> None:
        frames: defaultdict[tuple[WorkerServer, Peer, ClientId], list[SequenceUpdate]] = defaultdict(list)
        with self._lock:
            for sequence_id, one in list(self._running.items()):
                is_first = one.command.handover is None and one.index == len(one.command.output_ids) // 4
                first = self.neighbours.get(one.command.prefill.worker_id) if is_first else None
                sender = (first.prefill_server, first.prefill) if first else (self.decode_server, self.decode)
                update = self._next(sequence_id, one)
                frames[(*sender, one.client_id)].append(update)
                if update.finish_reason is not None or update.error is not None:
                    del self._running[sequence_id]
            if not self._running:
                self._has_work.clear()
        for (server, peer, client_id), updates in frames.items():
            server.send(client_id, TokenFrame(worker_id=peer.worker_id, epoch=peer.epoch, updates=tuple(updates)))

    def _next(self, sequence_id: SequenceId, one: _Running) -> SequenceUpdate:
        index, sampling = one.index, one.command.sampling
        error = self.failures.pop(index, None)
        if error is not None:
            report = ErrorReport(name=type(error).__name__, message=error.message)
            return SequenceUpdate(sequence_id=sequence_id, index=index, token_ids=(), error=report)
        token_id = one.answer[index % (len(one.answer) - sampling.ignore_eos)]
        is_end = (token_id == self.eos and not sampling.ignore_eos) or token_id in sampling.stop_token_ids
        reason = FinishReason.STOP if is_end else FinishReason.LENGTH if index + 1 == sampling.max_tokens else None
        one.index += 1
        self.num_tokens += 1
        logprobs = () if sampling.logprobs is None else (zero_logprobs(token_id, index, sampling.logprobs),)
        return SequenceUpdate(sequence_id=sequence_id, index=index, token_ids=(token_id,), logprobs=logprobs, finish_reason=reason)


def zero_logprobs(token_id: int, index: int, num_top: int) -> TokenLogprobs:
    """The drawn token is the likeliest; the next ones are those of the next ids."""
    top = tuple((token_id + i, -0.25 * (index + 1) - i) for i in range(num_top))
    return TokenLogprobs(token_id=token_id, logprob=-0.25 * (index + 1), top=top)


@dataclass(eq=False)
class ZeroControl:
    """A controller without a cluster: places every sequence on the first pair that is not excluded, and keeps books for tests to read."""

    specs: tuple[ModelSpec, ...]
    pairs: list[tuple[Peer, Peer]]  # prefill, decode
    asks: list[Admit] = field(default_factory=list)
    releases: list[Release] = field(default_factory=list)
    heartbeats: int = 0
    emptied: list[WorkerId] = field(default_factory=list)  # where no sequence that moves is placed
    drained: list[WorkerId] = field(default_factory=list)
    refusal: PolymuxError | None = None
    is_ready: bool = True

    async def admit(self, ask: Admit) -> Placement:
        self.asks.append(ask)
        if self.refusal is not None:
            raise self.refusal
        if ask.model not in {spec.model for spec in self.specs}:
            raise ModelNotFound(f"model {ask.model!r} is not registered")
        avoided = {*ask.excluded, *(self.emptied if ask.moving else ())}
        able = [pair for pair in self.pairs if not {peer.worker_id for peer in pair} & avoided]
        if not able:
            raise Overloaded("every worker is excluded", retry_after_s=1.0)
        prefill, decode = able[0]
        count = ask.num_sequences
        return Placement(
            request_id=ask.request_id,
            prefill=(prefill,) * count,
            decode=(decode,) * count,
            ttft_slo_s=ask.ttft_slo_s or 10.0,
            tpot_slo_s=ask.tpot_slo_s or 0.1,
        )

    async def release(self, release: Release) -> None:
        self.releases.append(release)

    async def models(self) -> tuple[ModelSpec, ...]:
        return self.specs

    async def topology(self) -> dict[str, Any]:
        reasons = () if self.is_ready else ("no decode worker",)
        return {"is_ready": self.is_ready, "reasons": reasons, "workers": (), "models": ()}

    async def drain(self, worker_id: WorkerId, timeout_s: float) -> None:
        if worker_id not in {peer.worker_id for pair in self.pairs for peer in pair}:
            raise InvalidRequest(f"worker {worker_id!r} is not serving", param="worker")
        self.drained.append(worker_id)

    async def timeline(self, look: LookBack) -> dict[str, Any]:
        return {"within_s": look.within_s, "columns": [], "lanes": []}

    async def heartbeat(self, client_id: ClientId) -> None:
        self.heartbeats += 1
