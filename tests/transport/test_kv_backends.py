"""Senders and receivers by themselves, stopped in the middle of a move: what is abandoned is not written, what is forgotten is not read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from polymux.transport import kv_pull, kv_tcp
from polymux.transport.errors import GrantViolation, PeerLost, WireError
from polymux.transport.frames import HEADER_BYTES, frame
from polymux.transport.kv_pull import PullReceiver, copy_blocks
from polymux.transport.kv_tcp import TcpReceiver, TcpSender
from polymux.transport.messages import KVLayout, Prefilled
from polymux.transport.protocol import Commit, Move, Ping
from polymux.transport.region import BlockGrid
from polymux.transport.transfer import Coverage, SinkTransfer
from polymux.transport.units import Epoch, SequenceId, TransferId, WorkerId, pack_ids
from polymux.transport.wire import decode, encode

LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=64, dtype="float32", block_size=16)  # 64 KiB a block
NUM_BLOCKS = 64


def grid(fill: int) -> BlockGrid:
    return BlockGrid(memoryview(bytearray([fill]) * (NUM_BLOCKS * LAYOUT.block_bytes)), LAYOUT)


def move(transfer_id: int, count: int, first_block: int = 0, layers: tuple[int, int] = (0, 4), seq: int = 0) -> Move:
    return Move(
        seq=seq,
        transfer_id=TransferId(transfer_id),
        source_epoch=Epoch(1),
        target_epoch=Epoch(1),
        layer_lo=layers[0],
        layer_hi=layers[1],
        first_block=first_block,
        src_block_ids=pack_ids(range(count)),
        num_bytes=count * (layers[1] - layers[0]) * LAYOUT.layer_bytes,
        num_checked_blocks=0,
        crc32=0,
    )


def commit(transfer_id: int) -> Commit:
    return Commit(
        transfer_id=TransferId(transfer_id),
        sequence_id=SequenceId("s"),
        source_id=WorkerId("p"),
        source_epoch=Epoch(1),
        target_epoch=Epoch(1),
        layout_hash=LAYOUT.layout_hash,
        num_layers=4,
        num_blocks=1,
        prefilled=Prefilled(sequence_id=SequenceId("s"), token_id=1, finish_reason=None),
    )


class Landing:
    """The decode side's books, reduced to: transfer 1 is live, everything else has ended."""

    def __init__(self) -> None:
        self.grid = grid(0)
        self.done: list[str] = []
        self.why: Exception | None = None

    def admit(self, one: Move) -> SinkTransfer | None:
        if one.transfer_id != 1:
            return None
        blocks = list(range(NUM_BLOCKS - 1, -1, -1))
        epoch, ranges = Epoch(1), np.zeros((0, 2), np.int64)
        return SinkTransfer(1, one.transfer_id, SequenceId("s"), LAYOUT, blocks, epoch, epoch, ranges, Coverage(4, NUM_BLOCKS))

    def target(self, transfer: SinkTransfer) -> BlockGrid:
        return self.grid

    def landed(self, transfer: SinkTransfer, one: Move) -> None:
        self.done.append(f"move {one.transfer_id}")

    def commit(self, one: Commit) -> None:
        self.done.append(f"commit {one.transfer_id}")

    def broken(self, why: Exception) -> None:
        self.why = why


async def until(claim: Any) -> None:
    async with asyncio.timeout(5):
        while not claim():
            await asyncio.sleep(0)


@pytest.fixture
def wire() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    for sock in (ours, theirs):
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * 1024)
    yield ours, theirs
    ours.close()
    theirs.close()


async def test_a_pull_that_is_abandoned_half_way_writes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_pull, "_SLICE_BYTES", LAYOUT.block_bytes)
    landing, source = Landing(), grid(7)
    receiver = PullReceiver("shm", asyncio.get_running_loop(), landing, [source.buffer], lambda: False, lambda: None)
    receiver.take(move(1, 32))
    receiver.take(commit(2))
    await until(lambda: (landing.grid.array != 0).any())
    assert not (landing.grid.array[-32:] != 0).all()  # half way
    assert receiver.abandon(TransferId(1))
    landing.grid.array[:] = 0
    await until(lambda: landing.done)
    await asyncio.sleep(0.01)
    assert not landing.grid.array.any()
    assert landing.done == ["commit 2"]  # the move never landed, and the queue went on


async def test_a_mapped_peer_counts_as_ours_only_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[memoryview] = []
    monkeypatch.setattr(kv_pull, "drop_pages", dropped.append)
    landing, source = Landing(), grid(7)
    bound = 3 * LAYOUT.block_bytes
    receiver = PullReceiver("shm", asyncio.get_running_loop(), landing, [source.buffer], lambda: False, lambda: None, bound)
    for _ in range(8):
        receiver.take(move(1, 2))
    await until(lambda: len(landing.done) == 8)
    assert len(dropped) == 4


async def test_bytes_of_an_abandoned_move_are_read_and_dropped(wire: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = wire
    loop, landing = asyncio.get_running_loop(), Landing()
    receiver = TcpReceiver(loop, ours, landing)
    payload = b"\7" * (8 * LAYOUT.block_bytes)
    await loop.sock_sendall(theirs, frame(encode(move(1, 8))) + payload[:100_000])
    await until(lambda: (landing.grid.array != 0).any())
    assert receiver.abandon(TransferId(1))
    landing.grid.array[:] = 0
    await loop.sock_sendall(theirs, payload[100_000:] + frame(encode(commit(1))))
    await until(lambda: landing.done)
    assert not landing.grid.array.any()
    assert landing.done == ["commit 1"]
    receiver.close()


async def test_a_move_for_an_ended_transfer_is_skipped_and_the_next_one_lands(wire: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = wire
    loop, landing = asyncio.get_running_loop(), Landing()
    receiver = TcpReceiver(loop, ours, landing)
    await loop.sock_sendall(theirs, frame(encode(move(9, 5))) + b"\5" * (5 * LAYOUT.block_bytes))
    await loop.sock_sendall(theirs, frame(encode(move(1, 2, 3, (1, 2)))) + b"\6" * (2 * LAYOUT.layer_bytes))
    await until(lambda: landing.done)
    landed = landing.grid.array != 0
    assert landed[[NUM_BLOCKS - 4, NUM_BLOCKS - 5], 1].all()
    assert landed.sum() == landed[[NUM_BLOCKS - 4, NUM_BLOCKS - 5], 1].sum()
    receiver.close()


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\xff\xff\xff\x7f", WireError),
        (b"\0\0\0\0", WireError),
        (frame(b"\xc1"), WireError),
        (frame(encode(Ping())), WireError),
        (frame(encode(move(9, 0))), GrantViolation),
        (frame(encode(move(9, 1)))[:-3], PeerLost),
    ],
)
async def test_what_is_neither_move_nor_commit_breaks_the_edge(
    wire: tuple[socket.socket, socket.socket], data: bytes, error: type[Exception]
) -> None:
    ours, theirs = wire
    landing = Landing()
    receiver = TcpReceiver(asyncio.get_running_loop(), ours, landing)
    theirs.sendall(data)
    theirs.shutdown(socket.SHUT_WR)
    await until(lambda: landing.why)
    assert isinstance(landing.why, error)
    receiver.close()


class Reader:
    """Takes bytes off a socket; what was read early comes first."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._data = bytearray()

    async def ahead(self, count: int) -> None:
        async with asyncio.timeout(5):
            while len(self._data) < count:
                self._data += await asyncio.get_running_loop().sock_recv(self._sock, count - len(self._data))

    async def take(self, count: int) -> bytes:
        await self.ahead(count)
        taken = bytes(self._data[:count])
        del self._data[:count]
        return taken

    async def message(self) -> Any:
        return decode(await self.take(int.from_bytes(await self.take(HEADER_BYTES), "little")))


@pytest.mark.parametrize("read_before", [0, 2, 5000, 300_000])
async def test_a_sender_that_forgets_reads_no_source_block_again_and_keeps_the_stream_whole(
    wire: tuple[socket.socket, socket.socket], read_before: int
) -> None:
    ours, theirs = wire
    source, reader = grid(7), Reader(theirs)
    failures: list[Exception] = []
    sender = TcpSender(asyncio.get_running_loop(), failures.append)
    sender.attach(ours)
    sender.send_move(move(1, 16), source, None)
    sender.send_move(move(1, 8, 16), source, None)
    sender.send_commit(commit(2))
    await reader.ahead(read_before)
    sender.forget(TransferId(1), lambda: None)
    source.array[:] = 9
    first = await reader.message()
    assert (first.transfer_id, first.num_bytes) == (1, 16 * LAYOUT.block_bytes)
    payload = await reader.take(first.num_bytes)
    assert set(payload) == {7, 0}  # what was sent before it was forgotten, and zeros
    assert await reader.message() == commit(2)  # the second move was never sent
    assert failures == []
    sender.close(lambda: None)


async def test_a_header_that_has_not_left_yet_is_not_overwritten(wire: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = wire
    junk = 0
    while True:  # until the socket takes no more
        try:
            junk += ours.send(b"j" * 10_000)
        except BlockingIOError:
            break
    sender, reader = TcpSender(asyncio.get_running_loop(), lambda _: None), Reader(theirs)
    sender.attach(ours)
    sender.send_move(move(1, 2), grid(7), None)
    sender.forget(TransferId(1), lambda: None)
    await reader.take(junk)
    assert (await reader.message()).transfer_id == 1
    assert not any(await reader.take(2 * LAYOUT.block_bytes))
    sender.close(lambda: None)


async def test_a_sender_whose_peer_is_gone_says_so(wire: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = wire
    failures: list[Exception] = []
    sender = TcpSender(asyncio.get_running_loop(), failures.append)
    sender.attach(ours)
    theirs.close()
    sender.send_move(move(1, 16), grid(7), None)
    assert isinstance(failures[0], PeerLost)
    sender.close(lambda: None)


def test_a_copy_merges_neighbours_on_both_sides_and_moves_only_what_it_should() -> None:
    source, target = grid(0), grid(0)
    source.array[:] = np.arange(NUM_BLOCKS, dtype="u8")[:, None, None] + 1
    src, dst = [3, 4, 5, 20, 9, 8, 50], [10, 11, 12, 2, 31, 30, 0]
    for _ in copy_blocks(source, target, src, dst, range(1, 3)):
        pass
    assert (target.array[dst][:, 1:3] == source.array[src][:, 1:3]).all()
    assert not target.array[:, [0, 3]].any()
    assert not target.array[[i for i in range(NUM_BLOCKS) if i not in dst]].any()


def test_turns_of_the_reactor_are_bounded() -> None:
    assert kv_pull._SLICE_BYTES <= 4 * 2**20 and kv_tcp._TURN_BYTES <= 4 * 2**20
