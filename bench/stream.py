"""Streamed tokens a second through the front door, with workers that compute nothing, beside a bare uvicorn and Starlette stream.

Four processes: the engine (bench/zero_engine.py, real sockets and messages), the front door, the bare server, the client. The engine
stays within so many tokens a stream of what the client has read: running freely it would be done at once, and all would come in one piece.
The bare server yields one event a token from memory, so it shows what the HTTP layer alone costs.

    python bench/stream.py --out docs/results/stream.md
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import mmap
import multiprocessing
import os
import re
import selectors
import socket
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route
from zero_engine import TOKEN, ZeroControl, ZeroWorker
from zero_stack import EOS, byte_spec, write_checkpoint

from machine import describe
from polymux.deploy.http.api import build_asgi
from polymux.deploy.http.frontdoor import FrontDoor
from polymux.deploy.http.settings import FrontDoorSettings, HttpSettings
from polymux.transport.messages import Peer
from polymux.transport.units import ClientId

LENGTHS = {1: 4000, 32: 1000, 256: 250}  # tokens of a stream, by number of streams


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What is measured: a server's path, and how many tokens a stream the engine may be ahead of the client, where there is an engine."""

    key: str
    name: str
    server: str
    path: str = "/v1/completions"
    window: int | None = None


SUBJECTS = (
    Subject(key="tokens_per_s", name="front door, a token at a time", server="front door", window=1),
    Subject(key="ahead_tokens_per_s", name="front door, engine up to 8 tokens ahead", server="front door", window=8),
    Subject(key="bare_tokens_per_s", name="bare uvicorn + Starlette, a token at a time", server="bare"),
    Subject(key="bare_burst_tokens_per_s", name="bare uvicorn + Starlette, all tokens at hand", server="bare", path="/burst"),
)
TEXT = re.compile(rb'"text":"(a+)"')
EVENT = b"data: "
BARE_EVENT = (
    'data: {"id":"cmpl-0123456789abcdef0123456789abcdef","object":"text_completion","created":1700000000,"model":"bytes","choices":'
    '[{"index":0,"text":"a","logprobs":null,"finish_reason":null}]}\n\n'
)


class Counter:
    """Tokens that the client has read from the front door so far, and how far ahead the engine may be: two numbers in a shared file."""

    def __init__(self, path: Path) -> None:
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 16)

    def read(self) -> tuple[int, int]:
        num_read, ahead = struct.unpack("QQ", self._memory[:16])
        return num_read, ahead

    def set(self, num_read: int, ahead: int) -> None:
        self._memory[:16] = struct.pack("QQ", num_read, ahead)


def paced(worker: ZeroWorker, counter: Counter) -> None:
    """Wait until a step leaves the engine no further ahead of the client than allowed."""
    while True:
        num_read, ahead = counter.read()
        if worker.num_tokens + worker.num_running - num_read <= ahead:
            return
        time.sleep(20e-6)


def engine(pipe: Connection, counter: Path) -> None:
    worker = ZeroWorker(name="0", eos=EOS)
    worker.may_step = partial(paced, worker, Counter(counter))
    worker.start()
    pipe.send((worker.prefill, worker.decode))
    pipe.recv()
    worker.stop()


def front(pipe: Connection, peers: tuple[Peer, Peer], checkpoint: Path) -> None:
    control = ZeroControl((byte_spec("bytes", checkpoint, max_model_len=1 << 16),), [peers])
    door = FrontDoor(FrontDoorSettings(client_id=ClientId("front"), token=TOKEN), control)
    serve(pipe, build_asgi(door, HttpSettings()))


def bare(pipe: Connection) -> None:
    """Two routes: one wakes up for each token, as tokens that arrive one by one make a server do; one has them all at hand."""

    async def completions(request: Request) -> StreamingResponse:
        num_tokens = (await request.json())["max_tokens"]
        is_burst = request.url.path == "/burst"

        async def events() -> AsyncIterator[bytes]:
            for _ in range(num_tokens):
                yield BARE_EVENT.encode()
                if not is_burst:
                    await asyncio.sleep(0)
            yield b"data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    serve(pipe, Starlette(routes=[Route(path, completions, methods=["POST"]) for path in ("/v1/completions", "/burst")]))


def serve(pipe: Connection, app: Any) -> None:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", access_log=False, backlog=4096))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    pipe.send(server.servers[0].sockets[0].getsockname()[1])
    pipe.recv()
    server.should_exit = True
    thread.join(10.0)


@dataclass(frozen=True, slots=True)
class Run:
    tokens_per_s: float
    events_per_token: float
    server_us: float = 0.0  # CPU of the server's process, a token


def client(pipe: Connection, counter_path: Path) -> None:
    """Runs what it is asked to, until it is told to stop: (port, path, window, streams, tokens of each)."""
    counter = Counter(counter_path)
    while (order := pipe.recv()) is not None:
        pipe.send(measure(counter, *order))


def measure(counter: Counter, port: int, path: str, window: int | None, num_streams: int, num_tokens: int) -> Run:
    """All streams at once, to the last byte; every token must arrive. Without a window the engine is not concerned.

    With one, the clock starts when every stream is placed, so that all run at once.
    """
    body = json.dumps({"model": "bytes", "prompt": [97] * 8, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    before, ahead = counter.read()[0], (window or 0) * num_streams
    sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(num_streams)]
    started_s = time.perf_counter()
    for sock in sockets:
        sock.sendall(head + body)
    if window is not None:
        time.sleep(0.2 + 0.002 * num_streams)
        started_s = time.perf_counter()
        counter.set(before, ahead)
    num_read = num_events = 0
    for whole in received(sockets):
        num_events += whole.count(EVENT)
        num_read += sum(map(len, TEXT.findall(whole)))
        if window is not None:
            counter.set(before + num_read, ahead)
    seconds = time.perf_counter() - started_s
    counter.set(counter.read()[0], 0)
    assert num_read == num_streams * num_tokens, f"{num_read} tokens of {num_streams * num_tokens}"
    return Run(num_read / seconds, (num_events - num_streams) / num_read)


def received(sockets: list[socket.socket]) -> Iterator[bytes]:
    """Whole events of any stream as they come, until all streams have ended."""
    with selectors.DefaultSelector() as selector:
        for sock in sockets:
            sock.setblocking(False)
            selector.register(sock, selectors.EVENT_READ, bytearray())
        while selector.get_map():
            for key, _ in selector.select(30.0) or _timed_out():
                sock = cast(socket.socket, key.fileobj)
                data, rest = sock.recv(1 << 18), cast(bytearray, key.data)
                rest += data
                end = rest.rfind(b"\n\n") + 2
                whole = bytes(rest[:end]) if end > 1 else b""
                del rest[: len(whole)]
                if b"data: [DONE]" in whole or not data:
                    selector.unregister(sock)
                    sock.close()
                if whole:
                    yield whole


def _timed_out() -> list[Any]:
    raise TimeoutError("no stream moved for 30 s")


def cpu_s(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Processes(AbstractContextManager["Processes"]):
    """The four of them, and the orders that the client takes."""

    def __init__(self, folder: Path) -> None:
        counter = folder / "counter"
        counter.write_bytes(bytes(16))
        checkpoint = write_checkpoint(folder / "model")
        self._context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._children: list[Any] = []
        peers = self._start(engine, counter).recv()
        self._servers: dict[str, tuple[int, int]] = {}  # port, process id
        for name, target, args in (("front door", front, (peers, checkpoint)), ("bare", bare, ())):
            port = self._start(target, *args).recv()
            self._servers[name] = (port, self._children[-1].pid)
        self._client = self._start(client, counter)

    def _start(self, target: Any, *args: Any) -> Connection:
        ours, theirs = self._context.Pipe()
        child = self._context.Process(target=target, args=(theirs, *args), daemon=True)
        child.start()
        self._pipes.append(ours)
        self._children.append(child)
        return ours

    def run(self, subject: Subject, num_streams: int, num_tokens: int) -> Run:
        port, pid = self._servers[subject.server]
        before_s = cpu_s(pid)
        self._client.send((port, subject.path, subject.window, num_streams, num_tokens))
        found = self._client.recv()
        assert isinstance(found, Run)
        return replace(found, server_us=1e6 * (cpu_s(pid) - before_s) / (num_streams * num_tokens))

    def __exit__(self, *_: object) -> None:
        for pipe in reversed(self._pipes):
            pipe.send(None)
        for child in self._children:
            child.join(15.0)


Runs = dict[tuple[str, int], list[Run]]  # by subject's key and number of streams


def measure_all(rounds: int) -> Runs:
    """Interleaved rounds; the first warms up and is not counted."""
    runs: Runs = {}
    with tempfile.TemporaryDirectory() as folder, Processes(Path(folder)) as processes:
        for number in range(rounds + 1):
            for (num_streams, num_tokens), subject in itertools.product(LENGTHS.items(), SUBJECTS):
                run = processes.run(subject, num_streams, num_tokens)
                if number:
                    runs.setdefault((subject.key, num_streams), []).append(run)
    return runs


def cell(runs: list[Run]) -> str:
    found = sorted(run.tokens_per_s for run in runs)
    events, cost = (statistics.median(getattr(run, name) for run in runs) for name in ("events_per_token", "server_us"))
    return f"{statistics.median(found):,.0f} ({found[0]:,.0f} to {found[-1]:,.0f}); {events:.2f}; {cost:.0f} µs"


def report(runs: Runs, rounds: int) -> tuple[str, dict[str, dict[str, int]]]:
    figures = {
        subject.key: {str(n): round(statistics.median(run.tokens_per_s for run in runs[subject.key, n])) for n in LENGTHS}
        for subject in SUBJECTS
    }
    load = os.getloadavg()[0]
    text = "\n".join(
        [
            "# Streaming through the front door",
            "",
            f"{describe()}; load average {load:.1f} at the end; {rounds} interleaved rounds after one that warms up.",
            "",
            "Tokens a second over all streams, median (lowest to highest); events a token; CPU time of the server's process a token.",
            "Engine, front door, bare server and client are a process each and share the cores with whatever else the load average says.",
            "",
            "| | " + " | ".join(f"{n} stream{'s' * (n > 1)} of {length}" for n, length in LENGTHS.items()) + " |",
            "|---|" + "---|" * len(LENGTHS),
            *(f"| {subject.name} | " + " | ".join(cell(runs[subject.key, n]) for n in LENGTHS) + " |" for subject in SUBJECTS),
            "",
            "A token at a time, the engine steps when every client has read the step before: each token has its event, and one stream",
            "shows the round trip of a token through the processes. Up to 8 ahead, tokens that wait for their client share an event. The",
            "bare server writes ready-made events, waking up for each, or all in one go.",
            "",
            "Made by `python bench/stream.py --out docs/results/stream.md`.",
            "",
        ]
    )
    return text, figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    text, figures = report(measure_all(args.rounds), args.rounds)
    print(text)
    if args.out:
        args.out.write_text(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
