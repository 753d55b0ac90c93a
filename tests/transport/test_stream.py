"""Worker and front door over real sockets: what is sent arrives, strangers are refused, slow and dead peers are dropped."""

from __future__ import annotations

import asyncio
import dataclasses
import resource
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest

from polymux.transport import link as link_module
from polymux.transport.errors import AuthenticationFailed, Overloaded, PeerLost, ProtocolMismatch, StaleEpoch, TransferTimeout, WireError
from polymux.transport.frames import Steps, drive_blocking, frame, read_frame
from polymux.transport.link import WorkerLink
from polymux.transport.messages import Cancel, Generate, Peer, SamplingParams, SequenceUpdate, TokenFrame
from polymux.transport.protocol import PREAMBLE, Answer, Challenge, Welcome
from polymux.transport.sockets import parse_address
from polymux.transport.stream import StreamLimits, WorkerServer
from polymux.transport.units import ClientId, Epoch, ModelName, SequenceId, WorkerId, pack_ids
from polymux.transport.wire import decode_as, encode

TOKEN = "0123456789abcdef0123"
WORKER = WorkerId("decode-0")
EPOCH = Epoch(7)
CLIENT = ClientId("front-0")
pytestmark = pytest.mark.usefixtures("nothing_left")


class Served:
    """A worker server whose callbacks are recorded."""

    def __init__(self, **kwargs: Any) -> None:
        self.commands: list[tuple[str, Any]] = []
        self.lost: list[str] = []
        self.changed = threading.Condition()
        self.refusal: Exception | None = None
        self.server = WorkerServer(worker_id=WORKER, token=TOKEN, on_command=self.on_command, on_client_lost=self.on_client_lost, **kwargs)
        self.address = self.server.start()
        self.server.serve(EPOCH)
        self.peer = Peer(worker_id=WORKER, epoch=EPOCH, address=self.address, host_id="h")

    def on_command(self, client_id: str, message: Any) -> None:
        if self.refusal:
            raise self.refusal
        with self.changed:
            self.commands.append((client_id, message))
            self.changed.notify_all()

    def on_client_lost(self, client_id: str) -> None:
        with self.changed:
            self.lost.append(client_id)
            self.changed.notify_all()

    async def until(self, claim: Any, within_s: float = 5.0) -> None:
        def wait() -> bool:
            with self.changed:
                return bool(self.changed.wait_for(claim, within_s))

        assert await asyncio.get_running_loop().run_in_executor(None, wait)


@contextmanager
def serving(**kwargs: Any) -> Iterator[Served]:
    served = Served(**kwargs)
    try:
        yield served
    finally:
        served.server.close()


@asynccontextmanager
async def linked(served: Served, client_id: ClientId = CLIENT) -> AsyncIterator[WorkerLink]:
    link = await WorkerLink.connect(served.peer, client_id, TOKEN, 5)
    try:
        yield link
    finally:
        await link.close()
        await served.until(lambda: client_id in served.lost)


def generate(sequence_id: str = "r/0", num_tokens: int = 3) -> Generate:
    return Generate(
        sequence_id=SequenceId(sequence_id),
        model=ModelName("m"),
        prompt_ids=pack_ids(range(num_tokens)),
        output_ids=pack_ids([5, 6]),
        sampling=SamplingParams(max_tokens=4),
        prefill=Peer(worker_id=WorkerId("p"), epoch=Epoch(1), address="tcp://h:1", host_id="h"),
        deadline_s=9.0,
        tpot_slo_s=0.1,
        due_in_s=1.0,
    )


def tokens(index: int, count: int = 1) -> TokenFrame:
    updates = tuple(SequenceUpdate(sequence_id=SequenceId("r/0"), index=index + i, token_ids=(i,)) for i in range(count))
    return TokenFrame(worker_id=WORKER, epoch=EPOCH, updates=updates)


async def test_commands_and_frames_arrive_in_order() -> None:
    with serving() as served:
        async with linked(served) as link:
            for i in range(100):
                await link.send(generate(f"r{i}/0"))
            await link.send(Cancel(sequence_id=SequenceId("r1/0"), reason="gone"))
            await served.until(lambda: len(served.commands) == 101)
            assert [m.sequence_id for _, m in served.commands] == [f"r{i}/0" for i in range(100)] + ["r1/0"]
            assert {client for client, _ in served.commands} == {CLIENT}
            sent = [tokens(i, 8) for i in range(500)]
            assert all(served.server.send(CLIENT, one) for one in sent)
            assert [await anext(link) for _ in sent] == sent


async def test_two_clients_get_their_own_frames() -> None:
    with serving() as served:
        async with linked(served, ClientId("a")) as a, linked(served, ClientId("b")) as b:
            assert set(served.server.client_ids) == {"a", "b"}
            served.server.send(ClientId("b"), tokens(2))
            served.server.send(ClientId("a"), tokens(1))
            assert (await anext(a), await anext(b)) == (tokens(1), tokens(2))
            assert not served.server.send(ClientId("c"), tokens(3))


async def test_a_frame_reaches_the_front_door_in_well_under_a_millisecond() -> None:
    with serving() as served:
        async with linked(served) as link:
            took = []
            for i in range(300):
                one = tokens(i)
                started = time.perf_counter()
                served.server.send(CLIENT, one)
                await anext(link)
                took.append(time.perf_counter() - started)
    assert sorted(took)[len(took) // 2] < 1e-3


async def test_a_large_command_and_a_large_frame_pass_whole() -> None:
    with serving() as served:
        async with linked(served) as link:
            command = generate(num_tokens=200_000)
            await link.send(command)
            await served.until(lambda: bool(served.commands))
            assert served.commands[0][1] == command
            big = tokens(0, 20_000)
            assert served.server.send(CLIENT, big)
            assert await anext(link) == big


async def test_a_message_above_the_limit_is_refused_before_it_is_sent() -> None:
    with serving() as served:
        async with linked(served) as link:
            with pytest.raises(WireError, match="limit"):
                await link.send(generate(num_tokens=300_000))
            await link.send(generate("still/0"))
            await served.until(lambda: bool(served.commands))


@pytest.mark.parametrize(
    ("change", "token", "error"),
    [
        ({}, "a wrong token, long enough", AuthenticationFailed),
        ({"epoch": Epoch(6)}, TOKEN, StaleEpoch),
        ({"epoch": Epoch(8)}, TOKEN, StaleEpoch),
        ({"worker_id": WorkerId("decode-1")}, TOKEN, StaleEpoch),
    ],
)
async def test_a_stranger_is_refused_with_the_reason(change: dict[str, Any], token: str, error: type[Exception]) -> None:
    with serving() as served:
        with pytest.raises(error):
            await WorkerLink.connect(dataclasses.replace(served.peer, **change), CLIENT, token, 5)
        assert served.server.client_ids == () and served.lost == []


async def test_the_token_does_not_travel() -> None:
    heard = bytearray()

    def listen(sock: socket.socket) -> None:
        connection, _ = sock.accept()
        with connection:
            connection.sendall(PREAMBLE)
            connection.settimeout(0.3)
            try:
                while data := connection.recv(4096):
                    heard.extend(data)
            except TimeoutError:
                pass

    with socket.create_server(("127.0.0.1", 0)) as sock:
        thread = threading.Thread(target=listen, args=(sock,))
        thread.start()
        peer = Peer(worker_id=WORKER, epoch=EPOCH, address=f"tcp://127.0.0.1:{sock.getsockname()[1]}", host_id="h")
        with pytest.raises((PeerLost, TransferTimeout)):
            await WorkerLink.connect(peer, CLIENT, TOKEN, 0.2)
        thread.join()
    assert len(heard) > 40 and TOKEN.encode() not in heard


def impostor(listener: socket.socket, answers: str) -> None:
    """Speaks the protocol well, and does not know the token."""

    def steps() -> Steps[None]:
        yield len(PREAMBLE)
        yield PREAMBLE
        yield from read_frame()
        yield frame(encode(Challenge(nonce=bytes(32))))
        answer = decode_as(Answer, (yield from read_frame()))
        yield frame(encode(Welcome(proof=answer.proof if answers == "with our own proof" else bytes(32), body=b"")))

    connection, _ = listener.accept()
    with connection:
        drive_blocking(steps(), connection, 5)


@pytest.mark.parametrize("answers", ["with any proof", "with our own proof"])
async def test_an_impostor_that_does_not_know_the_token_is_noticed(answers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=impostor, args=(listener, answers))
        thread.start()
        peer = Peer(worker_id=WORKER, epoch=EPOCH, address=f"tcp://127.0.0.1:{listener.getsockname()[1]}", host_id="h")
        with pytest.raises(AuthenticationFailed, match="acceptor does not know"):
            await WorkerLink.connect(peer, CLIENT, TOKEN, 2)
        thread.join()


async def test_another_protocol_version_is_named_on_both_sides() -> None:
    with serving() as served:
        reader, writer = await asyncio.open_connection(*parse_address(served.address))
        writer.write(PREAMBLE[:6] + (99).to_bytes(2, "little"))
        assert await reader.readexactly(8) == PREAMBLE
        assert b"ProtocolMismatch" in await reader.read()
        writer.close()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", PREAMBLE + b"\xff\xff\xff\x7f", PREAMBLE + frame(b"\xc1" * 10), b"PLYM"])
async def test_garbage_is_hung_up_on_and_harms_nobody(garbage: bytes) -> None:
    with serving(limits=StreamLimits(handshake_s=0.3)) as served:
        reader, writer = await asyncio.open_connection(*parse_address(served.address))
        writer.write(garbage)
        await asyncio.wait_for(reader.read(), 2)
        writer.close()
        async with linked(served) as link:
            assert served.server.send(CLIENT, tokens(0))
            assert await asyncio.wait_for(anext(link), 5) == tokens(0)


async def test_something_that_is_not_a_worker_is_a_protocol_mismatch() -> None:
    async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(http, "127.0.0.1", 0)
    async with server:
        address = f"tcp://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(ProtocolMismatch, match="host and port"):
            await WorkerLink.connect(Peer(worker_id=WORKER, epoch=EPOCH, address=address, host_id="h"), CLIENT, TOKEN, 5)


async def test_a_port_where_nobody_listens_is_a_lost_peer() -> None:
    with serving() as served:
        pass
    with pytest.raises(PeerLost):
        await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)


async def test_before_the_controller_has_given_an_epoch_peers_are_refused() -> None:
    with serving() as served:
        served.server.epoch = None
        with pytest.raises(StaleEpoch, match="no epoch yet"):
            await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)


async def test_a_full_worker_refuses_the_next_client() -> None:
    with serving(limits=StreamLimits(max_clients=1)) as served:
        async with linked(served):
            with pytest.raises(Overloaded):
                await WorkerLink.connect(served.peer, ClientId("other"), TOKEN, 5)


async def test_a_command_that_the_engine_refuses_ends_its_sequence() -> None:
    with serving() as served:
        served.refusal = Overloaded("mailbox full", retry_after_s=2.0)
        async with linked(served) as link:
            await link.send(generate())
            (update,) = (await anext(link)).updates
            assert update.error is not None
            assert (update.sequence_id, update.index, update.error.name) == ("r/0", 2, "Overloaded")


async def test_a_client_that_leaves_is_reported_once() -> None:
    with serving() as served:
        async with linked(served):
            pass
        assert served.lost == [CLIENT]
        assert not served.server.send(CLIENT, tokens(0))
    assert served.lost == [CLIENT]


async def test_a_client_that_connects_anew_loses_its_older_connection_first() -> None:
    with serving() as served:
        older = await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)
        async with linked(served):
            await served.until(lambda: served.lost == [CLIENT])
            with pytest.raises(PeerLost):
                await anext(older)
            served.lost.clear()
            assert served.server.client_ids == (CLIENT,)
        await older.close()


async def test_a_client_that_does_not_read_is_dropped_and_memory_stays_bounded() -> None:
    with serving(limits=StreamLimits(max_pending_bytes=500_000)) as served:
        link = await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)
        assert link._transport is not None
        link._transport.pause_reading()
        update = SequenceUpdate(sequence_id=SequenceId("r/0"), index=0, token_ids=tuple(range(100_000, 150_000)))
        big = TokenFrame(worker_id=WORKER, epoch=EPOCH, updates=(update,))
        slowest = 0.0
        for _ in range(2000):
            started = time.perf_counter()
            taken = served.server.send(CLIENT, big)
            slowest = max(slowest, time.perf_counter() - started)
            if not taken:
                break
        else:
            pytest.fail("never dropped")
        await served.until(lambda: served.lost == [CLIENT])
        assert slowest < 0.2  # it never waited for the client
        link._transport.resume_reading()
        with pytest.raises(PeerLost):
            while True:
                await asyncio.wait_for(anext(link), 5)
        await link.close()


async def test_a_silent_client_is_dropped_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymux.transport.stream._SWEEP_S", 0.05)
    with serving(limits=StreamLimits(silence_s=0.2)) as served:
        link = await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)
        await served.until(lambda: served.lost == [CLIENT])
        with pytest.raises(PeerLost):
            await anext(link)
        await link.close()


async def test_pings_keep_an_idle_link_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("polymux.transport.stream._SWEEP_S", 0.05)
    monkeypatch.setattr(link_module, "PING_S", 0.05)
    monkeypatch.setattr(link_module, "SILENCE_S", 0.3)
    with serving(limits=StreamLimits(silence_s=0.3)) as served:
        async with linked(served) as link:
            await asyncio.sleep(1.0)
            served.server.send(CLIENT, tokens(4))
            assert await anext(link) == tokens(4)


async def test_a_worker_that_falls_silent_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "PING_S", 0.05)
    monkeypatch.setattr(link_module, "SILENCE_S", 0.2)
    with serving() as served:
        link = await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)
        resume = threading.Event()
        served.server.reactor.post(resume.wait, 5)  # its thread is stuck, its sockets stay open
        with pytest.raises(PeerLost, match="silent"):
            await asyncio.wait_for(anext(link), 3)
        resume.set()
        await link.close()


async def test_a_worker_that_stops_ends_the_iteration_with_peer_lost_after_the_last_frame() -> None:
    with serving() as served:
        link = await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)
        served.server.send(CLIENT, tokens(0))
        served.server.close()
        assert await anext(link) == tokens(0)
        with pytest.raises(PeerLost):
            await anext(link)
        with pytest.raises(PeerLost):
            await link.send(generate())
        await link.close()
    assert served.lost == [CLIENT]


async def test_closing_the_link_ends_the_iteration() -> None:
    with serving() as served:
        link = await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)
        task = asyncio.create_task(anext(link, None))
        await asyncio.sleep(0.01)
        await link.close()
        assert await asyncio.wait_for(task, 1) is None


async def test_a_command_sent_just_before_close_still_arrives() -> None:
    with serving() as served:
        link = await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)
        await link.send(Cancel(sequence_id=SequenceId("r/0"), reason="gone"))
        await link.close()
        await served.until(lambda: bool(served.commands) and bool(served.lost))


async def test_a_client_that_speaks_out_of_turn_is_dropped() -> None:
    with serving() as served:
        link = await WorkerLink.connect(served.peer, CLIENT, TOKEN, 5)
        assert link._transport is not None
        link._transport.write(frame(encode(tokens(0))))
        await served.until(lambda: served.lost == [CLIENT])
        await link.close()


async def test_an_idle_server_with_idle_clients_uses_no_cpu() -> None:
    with serving() as served:
        async with linked(served):
            before = resource.getrusage(resource.RUSAGE_SELF)
            await asyncio.sleep(1.0)
            after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.02
