"""Rank 0's hold on the other ranks of its instance: their processes, what they are told, and the fence when one of them is lost.

An instance lives on one host. The other ranks' arenas are mapped here, by their descriptors or, on GPUs, by CUDA IPC, so rank 0 alone moves
their KV, in and out of the instance and within it; weights they load themselves. A rank that dies, fails or is silent for longer than the
deadline ends the instance: every rank is killed, which also wakes whoever waits for a sum, and every later call raises the same RankLost.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from polymux.actors.device import CpuDevice, Device
from polymux.actors.model_runner import ForwardBatch, OnLaunch
from polymux.actors.parallel.channel import RankChannel
from polymux.actors.parallel.collectives import Collectives, Meeting
from polymux.transport.cuda.region import MappedRegion
from polymux.transport.errors import ConfigError, ModelLoading, PolymuxError, RankLost
from polymux.transport.handshake import from_report
from polymux.transport.messages import ModelSpec, Shard
from polymux.transport.rank_messages import (
    AskDone,
    DecodeModel,
    Done,
    DropImage,
    HurryImage,
    ImageSeen,
    LoadImage,
    MoveImage,
    RankFailed,
    RankStarted,
    StartRank,
    StepModel,
    StepSlice,
)
from polymux.transport.region import Region
from polymux.transport.units import ModelName, pack_ids

log = logging.getLogger("polymux.ranks")

BOOT_S = 120.0  # for a rank's process to come up
EXIT_S = 2.0  # for one to end by itself
SEEN_S = 180.0  # for an image to come in, whatever it takes to build it
REASON_S = 1.0  # for what a rank said last to be read

GPUS_VARIABLE = "CUDA_VISIBLE_DEVICES"

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSettings:
    """What all ranks of one instance have in common."""

    worker_id: str
    num_ranks: int
    device: str = "cpu"  # or "cuda": of each the GPU at its place in this process's list
    arena_bytes: int  # of each
    weight_reserve_bytes: int
    max_num_seqs: int = 64
    num_threads: int  # of each
    batch_invariant: bool
    store_address: str
    token: str = field(repr=False)
    timeout_s: float = 30.0  # for a sum, a gather or an answer; then the rank counts as lost


@dataclass(slots=True)
class _Rank:
    """Another rank's process. `done` and `seen` are under the lock of `Ranks`."""

    number: int
    process: subprocess.Popen[bytes]
    channel: RankChannel
    done: int = 0  # the last question that it answered
    seen: dict[int, PolymuxError | None] = field(default_factory=dict)  # loads whose first layer is there, or that failed


class Ranks:
    """The other ranks. The engine thread calls everything but what says otherwise; once one is lost everything raises RankLost."""

    def __init__(
        self,
        settings: RankSettings,
        on_lost: Callable[[], None] = lambda: None,
        device: Device | None = None,
        program: Sequence[str] = ("-m", "polymux.actors.parallel.follower"),
    ) -> None:
        """Start them, and return when all can step. `on_lost` is called from any thread, once. Raises RankLost, and leaves none running.

        `device`: of this rank; without one, a CPU. `program`: what Python runs for each of the others.
        """
        self.settings = settings
        self.lost: RankLost | None = None
        self.regions: tuple[Region | MappedRegion, ...] = ()  # of ranks 1 and up
        self._on_lost = on_lost
        self._device: Device = device or CpuDevice()
        self._program = tuple(program)
        self._numbers = count(1)
        self._changed = threading.Condition()
        self._fencing = threading.Lock()
        self._is_closing = False
        self._ranks: list[_Rank] = []
        self._collectives: Collectives | None = None
        self._readers: list[threading.Thread] = []
        self._folder = tempfile.TemporaryDirectory(prefix="polymux-ranks-")  # the ranks meet there, some pairs at their first need
        try:
            self._start()
        except BaseException as error:
            self.close()
            raise RankLost(f"the ranks of worker {settings.worker_id} did not come up: {error}") from error

    @property
    def memories(self) -> tuple[Tensor, ...]:
        """The arenas of ranks 1 and up as bytes, as this process sees them; with rank 0's, a KV block is that of its id in all of them."""
        return tuple(
            region.tensor if isinstance(region, MappedRegion) else torch.frombuffer(region.buffer, dtype=torch.uint8)
            for region in self.regions
        )

    @property
    def collectives(self) -> Collectives:
        assert self._collectives is not None
        return self._collectives

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(rank.process.pid for rank in self._ranks)

    # -- commands -----------------------------------------------------------------------------------------------------

    def step(self, model: ModelName, batch: ForwardBatch, compute: Callable[[], T]) -> T:
        """`compute` this rank's part of one forward pass while the others do theirs. Whatever it raises fences the instance."""
        self.tell(step_of(model, batch))
        return self._compute(compute)

    def decode(self, model: ModelName, batch: ForwardBatch, compute: Callable[[OnLaunch], T]) -> T:
        """As `step`, for a planned one that draws tokens; `compute` says which graph it runs by before it hands anything over."""
        return self._compute(lambda: compute(lambda graph: self.tell(decode_of(model, batch, graph))))

    def _compute(self, compute: Callable[[], T]) -> T:
        try:
            found = compute()
            self.collectives.end_step()
            return found
        except BaseException as error:
            raise self.fence(str(error)) from error

    def load(self, spec: ModelSpec, offset: int, *, is_urgent: bool) -> int:
        """Begin to load a model's images; the number to ask `await_load` for."""
        number = next(self._numbers)
        self.tell(LoadImage(load=number, spec=spec, offset=offset, is_urgent=is_urgent))
        return number

    def has_seen(self, load: int) -> bool:
        """Whether every rank's first layer of that load is there. Raises the error of one whose load failed."""
        with self._changed:
            self._raise_if_lost()
            for rank in self._ranks:
                if (error := rank.seen.get(load)) is not None:
                    raise error
            return all(load in rank.seen for rank in self._ranks)

    def await_load(self, load: int, model: ModelName) -> None:
        """Return once `has_seen`, which says what is raised; ModelLoading after `SEEN_S`. A rank that is frozen meanwhile is lost."""
        until_s = time.monotonic() + SEEN_S
        while not self.has_seen(load):
            with self._changed:
                self._changed.wait(self.settings.timeout_s / 4)
            if time.monotonic() > until_s:
                raise ModelLoading(f"the weights of {model} did not arrive on every rank within {SEEN_S:.0f} s")
            if not self.has_seen(load):
                self.await_done()

    def hurry(self, model: ModelName) -> None:
        self.tell(HurryImage(model=model))

    def move(self, source: int, target: int, nbytes: int) -> None:
        """A model's weights go elsewhere; on return the old range is free on every rank."""
        self.tell(MoveImage(source=source, target=target, nbytes=nbytes))
        self.await_done()

    def drop(self, model: ModelName) -> None:
        """A model's range is given back; on return no rank writes to it any more. Of a fenced instance none does."""
        if self.lost is not None or self._is_closing:
            return
        self.tell(DropImage(model=model))
        self.await_done()

    def await_done(self) -> None:
        """Return once every rank has carried out what it was told."""
        number = next(self._numbers)
        self.tell(AskDone(number=number))
        until_s = time.monotonic() + self.settings.timeout_s
        with self._changed:
            while late := [rank.number for rank in self._ranks if rank.done < number]:
                self._raise_if_lost()
                if not self._changed.wait(max(until_s - time.monotonic(), 0)) and time.monotonic() > until_s:
                    break
        if late:
            raise self.fence(f"rank {late[0]} did not answer within {self.settings.timeout_s:g} s")

    def tell(self, command: object) -> None:
        """Send to every rank; they carry commands out in order."""
        self._raise_if_lost()
        for rank in self._ranks:
            try:
                rank.channel.send(command)
            except PolymuxError as error:
                raise self.fence(f"rank {rank.number} cannot be told anything: {error}") from error

    # -- the fence ----------------------------------------------------------------------------------------------------

    def fence(self, reason: str) -> RankLost:
        """Kill every rank: what they computed can no longer be trusted. The error to raise, the first one's. From any thread."""
        with self._fencing:
            if self.lost is not None:
                return self.lost
            self.lost = RankLost(f"worker {self.settings.worker_id} lost a rank: {reason}")
        log.error("ranks.fenced worker=%s reason=%s", self.settings.worker_id, reason)
        for rank in self._ranks:
            rank.process.kill()  # a stopped process too
        with self._changed:
            self._changed.notify_all()
        self._on_lost()
        if self._collectives is not None:
            self._collectives.abandon(reason)
        return self.lost

    def check(self) -> None:
        """Raise RankLost if one is: what was read of the device before this call is good otherwise."""
        self._raise_if_lost()
        self.collectives.check()

    def _raise_if_lost(self) -> None:
        if self.lost is not None:
            raise self.lost

    def close(self) -> None:
        """End every rank, and give their memory back, to or from which nothing is copied any more. May be called twice."""
        self._is_closing = True
        for region in self.regions:
            if self.lost is None or isinstance(region, Region):  # what a GPU may still be at goes with this process
                region.close()
        self.regions = ()
        if self._collectives is not None:
            self._collectives.close()  # first, or the others' end would look like a loss
        for rank in self._ranks:
            rank.channel.shut()
        until_s = time.monotonic() + EXIT_S
        for rank in self._ranks:
            try:
                rank.process.wait(max(until_s - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait(EXIT_S)
        for reader in self._readers:
            reader.join(EXIT_S)
        for rank in self._ranks:
            rank.channel.close()
        self._ranks, self._readers = [], []
        self._folder.cleanup()

    # -- their processes ----------------------------------------------------------------------------------------------

    def _start(self) -> None:
        settings, place = self.settings, self._device.meeting_place(Path(self._folder.name))
        gpus = gpus_of_ranks(os.environ.get(GPUS_VARIABLE), settings.num_ranks) if settings.device == "cuda" else None
        for number in range(1, settings.num_ranks):
            environment = {GPUS_VARIABLE: gpus[number]} if gpus is not None else {}
            self._ranks.append(_spawn(number, settings.timeout_s, self._program, environment))
        for rank in self._ranks:
            rank.channel.send(
                StartRank(
                    shard=Shard(rank=rank.number, num_ranks=settings.num_ranks),
                    worker_id=settings.worker_id,
                    device=settings.device,
                    arena_bytes=settings.arena_bytes,
                    weight_reserve_bytes=settings.weight_reserve_bytes,
                    num_threads=settings.num_threads,
                    batch_invariant=settings.batch_invariant,
                    store_address=settings.store_address,
                    token=settings.token,
                    meeting_place=place,
                    timeout_s=settings.timeout_s,
                    max_num_seqs=settings.max_num_seqs,
                )
            )
        for rank in self._ranks:
            self.regions += (self._adopt(rank),)
        for rank in self._ranks:
            reader = threading.Thread(target=self._read, args=(rank,), name=f"polymux-rank-{rank.number}", daemon=True)
            self._readers.append(reader)
            reader.start()
        self._collectives = self._join(place)
        self._raise_if_lost()

    def _join(self, place: bytes) -> Collectives:
        """Meet the others. Where one of them could not, its reason is raised: here one only sees that it did not come."""
        settings = self.settings
        meeting = Meeting(
            place=place,
            rank=0,
            num_ranks=settings.num_ranks,
            timeout_s=settings.timeout_s,
            in_order=settings.batch_invariant,
            on_lost=self.fence,
        )
        try:
            return self._device.join(meeting)
        except RankLost:
            with self._changed:
                self._changed.wait_for(lambda: self.lost is not None, REASON_S)
            self._raise_if_lost()
            raise

    def _adopt(self, rank: _Rank) -> Region | MappedRegion:
        """A rank's arena, once it has said that it has one."""
        answer = rank.channel.receive(BOOT_S)
        if isinstance(answer, RankFailed):
            raise from_report(answer.error)
        assert isinstance(answer, RankStarted), answer
        if answer.memory is not None:
            return self._device.borrow(answer.memory, self.settings.arena_bytes)
        return Region.adopt(rank.channel.receive_fd(BOOT_S), self.settings.arena_bytes)

    def _read(self, rank: _Rank) -> None:
        """What one rank says, until it is gone."""
        try:
            while True:
                self._hear(rank, rank.channel.receive())
        except PolymuxError as error:
            if not self._is_closing:
                self.fence(f"rank {rank.number} is gone: {error}")

    def _hear(self, rank: _Rank, answer: object) -> None:
        match answer:
            case Done():
                with self._changed:
                    rank.done = answer.number
                    self._changed.notify_all()
            case ImageSeen():
                with self._changed:
                    rank.seen[answer.load] = from_report(answer.error) if answer.error is not None else None
                    while len(rank.seen) > 64:  # of loads that ended long ago
                        del rank.seen[next(iter(rank.seen))]
                    self._changed.notify_all()
            case RankFailed():
                self.fence(f"rank {rank.number} failed: {answer.error.message}")
            case _:
                self.fence(f"rank {rank.number} said {type(answer).__name__}")


def gpus_of_ranks(visible: str | None, num_ranks: int) -> tuple[str, ...]:
    """What each rank sees of rank 0's GPUs: the entry at its place, of all that there are if nobody says. Raises ConfigError."""
    gpus = [gpu.strip() for gpu in visible.split(",")] if visible else [str(number) for number in range(num_ranks)]
    if len(gpus) < num_ranks:
        raise ConfigError(
            f"tensor_parallel={num_ranks} takes a GPU for each rank, and {GPUS_VARIABLE}={visible} names {len(gpus)}; "
            "leave num_gpus at auto"
        )
    return tuple(gpus[:num_ranks])


def _spawn(number: int, send_s: float, program: Sequence[str], environment: Mapping[str, str]) -> _Rank:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, *program, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **environment},
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C is for rank 0, which takes the others down
        )
    return _Rank(number, process, RankChannel(ours, send_s))


def step_of(model: ModelName, batch: ForwardBatch) -> StepModel:
    """A step as it travels: every rank makes the same plan from it."""
    slices = tuple(
        StepSlice(num_tokens=one.num_tokens, context_len=one.context_len, block_ids=pack_ids(one.block_ids)) for one in batch.slices
    )
    rows = None if batch.logits_rows is None else pack_ids(batch.logits_rows.tolist())
    return StepModel(model=model, token_ids=pack_ids(batch.token_ids.tolist()), slices=slices, logits_rows=rows)


def decode_of(model: ModelName, batch: ForwardBatch, graph: str | None) -> DecodeModel:
    """A planned decode step as it travels."""
    tables = tuple(pack_ids(one.block_ids) for one in batch.slices)
    return DecodeModel(model=model, context_lens=pack_ids([one.context_len for one in batch.slices]), block_ids=tables, graph=graph)
