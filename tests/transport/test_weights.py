"""Weight images between processes: bytes, descriptors, refusals and deadlines."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from polymux.transport.errors import AuthenticationFailed, CheckpointError, ModelNotFound, PeerLost, PolymuxError, TransferTimeout
from polymux.transport.messages import Shard
from polymux.transport.units import MIB, ModelName
from polymux.transport.weights import ImageServer, fetch_image, read_image

TOKEN = "0123456789abcdef0123"
MODEL = ModelName("m")


def image_of(content: bytes) -> int:
    fd = os.memfd_create("image")
    os.pwrite(fd, content, 0)
    return fd


@contextmanager
def serving(open_image: object, **kwargs: int) -> Iterator[ImageServer]:
    server = ImageServer(token=TOKEN, open_image=open_image, **kwargs)  # type: ignore[arg-type]
    try:
        yield server
    finally:
        server.close()


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_image_arrives_whole_with_its_manifest() -> None:
    content = os.urandom(3 * MIB + 17)
    with serving(lambda *_: (b"manifest" * 50_000, image_of(content))) as server, fetch_image(server.address, TOKEN, MODEL, 10) as image:
        into = bytearray(len(content))
        read_image(image.fd, memoryview(into), 0, image.nbytes)
        assert image.manifest == b"manifest" * 50_000
        assert bytes(into) == content


def test_another_process_reads_the_same_memory() -> None:
    code = (
        "import sys; from polymux.transport.weights import fetch_image, read_image\n"
        "image = fetch_image(sys.argv[1], sys.argv[2], 'm', 20); into = bytearray(image.nbytes)\n"
        "read_image(image.fd, memoryview(into), 0, image.nbytes); print(sum(into))"
    )
    content = os.urandom(MIB)
    with serving(lambda *_: (b"", image_of(content))) as server:
        ran = subprocess.run([sys.executable, "-c", code, server.address, TOKEN], check=True, capture_output=True, text=True, timeout=60)
    assert int(ran.stdout) == sum(content)


def test_fetches_leave_no_descriptors_open() -> None:
    with serving(lambda *_: (b"x", image_of(b"y"))) as server:
        fetch_image(server.address, TOKEN, MODEL, 10).close()
        before = open_fds()
        for _ in range(20):
            fetch_image(server.address, TOKEN, MODEL, 10).close()
        until_s = time.monotonic() + 5  # the server's side of the last connections is closing
        while open_fds() > before and time.monotonic() < until_s:
            time.sleep(0.01)
        assert open_fds() <= before


def test_the_store_s_typed_error_reaches_the_worker() -> None:
    def refuse(model: ModelName, _: Shard) -> tuple[bytes, int]:
        raise ModelNotFound(f"no {model}", param="model")

    with serving(refuse) as server, pytest.raises(ModelNotFound, match="no m") as caught:
        fetch_image(server.address, TOKEN, MODEL, 10)
    assert caught.value.param == "model"


def test_an_untyped_failure_of_the_store_is_reported_not_hung() -> None:
    def crash(*_: object) -> tuple[bytes, int]:
        raise KeyError("layers")

    with serving(crash) as server, pytest.raises(PolymuxError, match="layers"):
        fetch_image(server.address, TOKEN, MODEL, 10)


def test_a_wrong_token_gets_no_image() -> None:
    calls: list[ModelName] = []

    def opened(model: ModelName, _: Shard) -> tuple[bytes, int]:
        calls.append(model)
        return b"", image_of(b"y")

    with serving(opened) as server, pytest.raises(AuthenticationFailed):
        fetch_image(server.address, "another token of length", MODEL, 10)
    assert not calls


def test_a_slow_store_ends_in_a_timeout() -> None:
    release = threading.Event()

    def slow(*_: object) -> tuple[bytes, int]:
        release.wait(10)
        return b"", image_of(b"y")

    with serving(slow) as server:
        with pytest.raises(TransferTimeout):
            fetch_image(server.address, TOKEN, MODEL, 0.2)
        release.set()


def test_a_full_store_hangs_up_at_once() -> None:
    entered, release = threading.Event(), threading.Event()

    def slow(*_: object) -> tuple[bytes, int]:
        entered.set()
        release.wait(10)
        return b"", image_of(b"y")

    with serving(slow, max_waiting=1) as server:
        first = threading.Thread(target=lambda: fetch_image(server.address, TOKEN, MODEL, 10).close())
        first.start()
        assert entered.wait(5)
        with pytest.raises(PeerLost):
            fetch_image(server.address, TOKEN, MODEL, 5)
        release.set()
        first.join()


def test_a_closed_store_is_a_lost_peer() -> None:
    with serving(lambda *_: (b"", image_of(b"y"))) as server:
        pass
    with pytest.raises(PeerLost):
        fetch_image(server.address, TOKEN, MODEL, 1)


def test_reading_past_the_end_of_an_image_is_an_error() -> None:
    fd = image_of(b"1234")
    try:
        with pytest.raises(CheckpointError, match="ends 4 bytes before"):
            read_image(fd, memoryview(bytearray(8)), 0, 8)
    finally:
        os.close(fd)
