"""Frames: cut anywhere, put together again; too long, too slow or too short is an error."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polymux.transport.errors import PeerLost, TransferTimeout, WireError
from polymux.transport.frames import FrameBuffer, Steps, drive_async, drive_blocking, frame, read_frame


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.binary(max_size=50), max_size=8), st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_frames_cut_anywhere_come_out_whole_and_in_order(payloads: list[bytes], cuts: list[int]) -> None:
    data, buffer, got, turn = b"".join(map(frame, payloads)), FrameBuffer(), [], 0
    while data:
        cut = cuts[turn % len(cuts)]
        got += list(buffer.feed(data[:cut]))
        data, turn = data[cut:], turn + 1
    assert got == payloads


def test_a_frame_that_announces_more_than_the_limit_is_refused_before_it_is_read() -> None:
    with pytest.raises(WireError, match="a frame of 11 bytes; the limit is 10"):
        list(FrameBuffer(10).feed(struct.pack("<I", 11)))


def test_frames_before_a_bad_one_are_still_delivered() -> None:
    feed = FrameBuffer(10).feed(frame(b"good") + struct.pack("<I", 2**32 - 1))
    assert next(feed) == b"good"
    with pytest.raises(WireError):
        next(feed)


def echo() -> Steps[bytes]:
    yield frame(b"ping")
    return (yield from read_frame(100))


@pytest.fixture(params=["blocking", "async"])
def drive(request: pytest.FixtureRequest) -> Any:
    def blocking(steps: Steps[Any], sock: socket.socket, deadline_s: float) -> Any:
        return drive_blocking(steps, sock, deadline_s)

    def in_a_loop(steps: Steps[Any], sock: socket.socket, deadline_s: float) -> Any:
        sock.setblocking(False)
        return asyncio.run(drive_async(steps, sock, deadline_s))

    return blocking if request.param == "blocking" else in_a_loop


def test_an_exchange_runs_to_its_end(drive: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(frame(b"pong"))
        assert drive(echo(), ours, 5.0) == b"pong"
        assert theirs.recv(100) == frame(b"ping")


def test_a_reader_gives_up_at_its_deadline_even_when_bytes_trickle(drive: Any) -> None:
    ours, theirs = socket.socketpair()
    stop = threading.Event()

    def trickle() -> None:
        theirs.sendall(struct.pack("<I", 90))
        while not stop.wait(0.02):
            theirs.sendall(b"x")

    with ours, theirs:
        thread = threading.Thread(target=trickle)
        thread.start()
        started = time.monotonic()
        with pytest.raises(TransferTimeout):
            drive(echo(), ours, 0.3)
        assert 0.2 < time.monotonic() - started < 1.0
        stop.set()
        thread.join()


def test_a_peer_that_closes_early_is_lost(drive: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.sendall(frame(b"pong")[:6])
        theirs.close()
        with pytest.raises(PeerLost):
            drive(echo(), ours, 5.0)


def test_a_long_frame_is_refused_by_its_length_alone(drive: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack("<I", 101))
        with pytest.raises(WireError, match="101"):
            drive(echo(), ours, 5.0)
