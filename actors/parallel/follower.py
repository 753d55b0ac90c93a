"""A rank other than the first: a process with an arena and a model runner, which does what rank 0 says, step by step.

It decides nothing. Its arena is rank 0's twin: weights lie at the offsets and KV in the blocks that rank 0 names. It ends when rank 0 does:
at the end of their connection, which a thread of its own watches, since the main one may be in the middle of a step.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

import torch

from polymux.actors.device import Device, open_device
from polymux.actors.kv_blocks import kv_view
from polymux.actors.model_runner import Following, ForwardBatch, Model, ModelRunner, SequenceSlice, plan_on
from polymux.actors.models.decoder import OnLayer
from polymux.actors.parallel.channel import RankChannel
from polymux.actors.parallel.collectives import Meeting
from polymux.actors.store_client import StoreClient
from polymux.actors.weights.load import Load
from polymux.actors.weights.loader import Loader
from polymux.actors.weights.residency import FIRST_GROUPS
from polymux.transport.errors import PeerLost, PolymuxError, RankLost, WireError
from polymux.transport.handshake import report
from polymux.transport.messages import ModelSpec
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
)
from polymux.transport.units import ModelName, unpack_ids

log = logging.getLogger("polymux.rank")

HELLO_S = 30.0  # for rank 0 to say what this process is
SEND_S = 10.0  # for rank 0 to read an answer


@dataclass(slots=True)
class _Resident:
    """One model's weights here, or on their way."""

    spec: ModelSpec
    offset: int
    load: Load
    bound: Model | None = None


class Follower:
    """Commands come through `channel`; `serve` returns when rank 0 is gone, and raises what makes it impossible to go on."""

    def __init__(self, channel: RankChannel, start: StartRank, device: Device | None = None) -> None:
        """`device`: in place of the one that `start` names."""
        self._channel = channel
        self._device = device or open_device(start.device)
        self._device.enter()
        self._region = self._device.create(start.arena_bytes)
        self._memory = self._device.tensor(self._region)
        self._device.use_for_weights(self._region, start.weight_reserve_bytes)
        self._loader = Loader(StoreClient(start.store_address, start.token, start.shard).fetch)
        self._residents: dict[ModelName, _Resident] = {}
        memory = self._device.lend(self._region)
        channel.send(RankStarted(pid=os.getpid(), memory=memory))
        if memory is None:
            assert self._region.fd is not None
            channel.send_fd(self._region.fd)
        shard, is_invariant = start.shard, start.batch_invariant
        self._ranks = self._device.join(
            Meeting(
                place=start.meeting_place,
                rank=shard.rank,
                num_ranks=shard.num_ranks,
                timeout_s=start.timeout_s,
                in_order=is_invariant,
                on_lost=lambda reason: fail(channel, RankLost(reason)),
            )
        )
        self._runner = ModelRunner(
            batch_invariant=is_invariant,
            device=self._device.torch_device,
            collectives=self._ranks,
            planned=plan_on(self._device, max_num_seqs=start.max_num_seqs, batch_invariant=is_invariant),
        )

    def serve(self) -> None:
        while True:
            try:
                command = self._channel.receive()
            except PeerLost:
                return
            self._obey(command)

    def _obey(self, command: object) -> None:
        match command:
            case StepModel():
                self._step(command)
            case DecodeModel():
                self._decode(command)
            case LoadImage():
                self._load(command)
            case HurryImage():
                self._loader.hurry(self._residents[command.model].load)
            case MoveImage():
                self._move(command)
            case DropImage():
                self._residents.pop(command.model).load.cancel()
            case AskDone():
                self._device.mark().wait()
                self._channel.send(Done(number=command.number))
            case _:
                raise WireError(f"rank 0 must not send {type(command).__name__}")

    def _load(self, command: LoadImage) -> None:
        spec = command.spec
        assert spec.model not in self._residents, f"{spec.model} is resident here already"
        target = self._device.target(self._region, command.offset, spec.weight_bytes)
        load = self._loader.begin(spec, target, is_urgent=command.is_urgent)
        self._residents[spec.model] = _Resident(spec, command.offset, load)
        threading.Thread(target=self._see, args=(command.load, load), name="polymux-see", daemon=True).start()

    def _see(self, number: int, load: Load) -> None:
        """Tell rank 0 when the first layer of a load is there, or why it never will be."""
        try:
            load.wait(FIRST_GROUPS, helps=False)
            self._channel.send(ImageSeen(load=number, error=None))
        except PolymuxError as error:
            if not isinstance(error, PeerLost):
                self._channel.send(ImageSeen(load=number, error=report(error)))

    def _move(self, command: MoveImage) -> None:
        self._device.move(self._region, command.source, command.target, command.nbytes)
        for resident in self._residents.values():
            if resident.offset == command.source:
                resident.offset, resident.bound = command.target, None

    def _step(self, command: StepModel) -> None:
        resident = self._residents[command.model]
        self._bound(resident).forward(batch_of(command), None, _before_layer(resident.load))
        self._ranks.end_step()

    def _decode(self, command: DecodeModel) -> None:
        resident = self._residents[command.model]
        if command.graph is not None:
            _await(resident.load, None)  # rank 0's are there; a graph waits for nothing in its middle
        bound = self._bound(resident)
        assert isinstance(bound, Following), "this device plans no steps"
        bound.follow(slices_of(command), command.graph, _before_layer(resident.load))
        self._ranks.end_step()

    def _bound(self, resident: _Resident) -> Model:
        if resident.bound is None:
            _await(resident.load, FIRST_GROUPS)
            weights = self._memory[resident.offset : resident.offset + resident.spec.weight_bytes]
            resident.bound = self._runner.bind(resident.load.manifest, weights, kv_view(self._memory, resident.spec.kv))
        return resident.bound


def _await(load: Load, num_groups: int | None) -> None:
    """What is computed from now on finds the first groups of an image, or all, in place."""
    load.wait(num_groups)
    load.order(num_groups)


def _before_layer(load: Load) -> OnLayer:
    """What to call before each layer while some are on their way."""
    if load.is_finished:
        return None

    def await_layer(layer: int) -> None:
        wanted = layer + FIRST_GROUPS
        is_all = wanted >= len(load.manifest.groups)
        _await(load, None if is_all and not load.is_async else wanted)

    return await_layer


def batch_of(command: StepModel) -> ForwardBatch:
    """Undo `leader.step_of`."""
    slices, start = [], 0
    for one in command.slices:
        ids = unpack_ids(one.block_ids)
        slices.append(SequenceSlice(start=start, num_tokens=one.num_tokens, context_len=one.context_len, block_ids=ids))
        start += one.num_tokens
    rows = None if command.logits_rows is None else torch.tensor(unpack_ids(command.logits_rows), dtype=torch.int64)
    token_ids = torch.tensor(unpack_ids(command.token_ids), dtype=torch.int64)
    return ForwardBatch(token_ids=token_ids, slices=tuple(slices), logits_rows=rows)


def slices_of(command: DecodeModel) -> tuple[SequenceSlice, ...]:
    """Undo `leader.decode_of`."""
    pairs = zip(unpack_ids(command.context_lens), command.block_ids, strict=True)
    return tuple(
        SequenceSlice(start=row, num_tokens=1, context_len=length, block_ids=unpack_ids(ids)) for row, (length, ids) in enumerate(pairs)
    )


def end_with(channel: RankChannel) -> None:
    """End this process when the other side of the channel is gone, whatever it is doing."""
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLRDHUP)
    poll.poll()
    os._exit(0)


def fail(channel: RankChannel, error: Exception) -> NoReturn:
    """Say why, and end this process, from whichever thread."""
    known = error if isinstance(error, PolymuxError) else PolymuxError(f"{type(error).__name__}: {error}")
    with suppress(PolymuxError):  # rank 0 may be gone itself
        channel.send(RankFailed(error=report(known)))
    os._exit(1)


def main(device: Device | None = None) -> None:
    """`device`: in place of the one that rank 0 names."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    channel = RankChannel(socket.socket(fileno=int(sys.argv[1])), SEND_S)
    start = channel.receive(HELLO_S)
    if not isinstance(start, StartRank):
        raise WireError(f"rank 0 must begin with StartRank, not {type(start).__name__}")
    threading.Thread(target=end_with, args=(channel,), name="polymux-watch", daemon=True).start()
    torch.set_num_threads(start.num_threads)
    try:
        Follower(channel, start, device).serve()
    except Exception as error:
        log.exception("rank.failed worker=%s rank=%d", start.worker_id, start.shard.rank)
        fail(channel, error)


if __name__ == "__main__":
    main()
