"""What only edges between GPUs can meet: NCCL that hangs, fails late or does not abort, a device that is slow, backends to choose from.

On the stand-in. The suite of all backends (`test_kv.py`, `test_kv_faults.py`) runs on it as well.
"""

from __future__ import annotations

import ctypes
import threading
import time
from typing import Any

import pytest
from backends import eventually

from polymux.transport.cuda import slab
from polymux.transport.cuda.runtime import CudaRuntime
from polymux.transport.cuda.slab import Slab
from polymux.transport.errors import ProtocolMismatch
from polymux.transport.kv_choice import HOST_BACKENDS, RETRY_S, RecentFailures, Side, offered, to_try, why_not
from polymux.transport.messages import Peer
from polymux.transport.protocol import DeviceTerms
from polymux.transport.units import MIB, Epoch, WorkerId

pytestmark = pytest.mark.usefixtures("at_rest", "nothing_left")
LIMITS = {"join_s": 2.0, "stall_s": 0.4, "abort_s": 0.5}


def gpu(backend: str, **config: Any) -> dict[str, Any]:
    return {"settings": {"backend": backend}, "gpu": "stand-in", "limits": LIMITS, **config}


def num_out(*ends: Any) -> int:
    """Slabs that are not in their pools."""
    return sum(end.region.mover.num_slabs_out for end in ends)


def test_bytes_damaged_on_their_way_are_noticed_before_the_commit(pair: Any, at_rest: Any) -> None:
    with pair(gpu("nccl"), gpu("nccl")) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        decoder.until_over(decoder.order(edge, 3))
        at_rest.turn(damage_after=at_rest.count("operations") + 1)
        transfer = decoder.order(edge, 6)
        assert decoder.until_over(transfer) in (["TransferError"], ["committed"])  # a receive may have had that number
        at_rest.turn(damage_after=at_rest.NEVER)
        if transfer.outcome == "TransferError":
            assert "damaged" in str(transfer.events[0].error)
        assert edge.is_open and decoder.until_over(decoder.order(edge, 6)) == ["committed"]


def test_an_operation_that_never_ends_costs_its_edge_and_the_slabs_come_back(pair: Any, at_rest: Any) -> None:
    with pair(gpu("nccl"), gpu("nccl")) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        assert decoder.until_over(decoder.order(edge, 3)) == ["committed"]
        at_rest.turn(hang_after=at_rest.count("operations"))
        began_s = time.monotonic()
        assert decoder.until_over(decoder.order(edge, 6, deadline_s=20)) in (["NcclError"], ["PeerLost"])
        assert time.monotonic() - began_s < 6 and not edge.is_open
        at_rest.turn(hang_after=at_rest.NEVER)
        assert eventually(lambda: at_rest.count("comms") == 0 and num_out(prefiller, decoder) == 0)
        assert decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 6)) == ["committed"]


def test_an_error_that_nccl_reports_later_is_the_edges_end(pair: Any, at_rest: Any) -> None:
    with pair(gpu("nccl"), gpu("nccl")) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        at_rest.turn(fail_after=at_rest.count("operations") + 2)
        assert set(decoder.until_over(decoder.order(edge, 12, deadline_s=20))) <= {"NcclError", "PeerLost"}
        assert "system error" in str(edge.lost) or "closed the connection" in str(edge.lost)
        at_rest.turn(fail_after=at_rest.NEVER)
        assert eventually(lambda: num_out(prefiller, decoder) == 0)


def test_deliveries_that_are_late_are_only_late(pair: Any, at_rest: Any) -> None:
    at_rest.turn(late_us=20_000)
    with pair(gpu("nccl"), gpu("nccl")) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        transfers = [decoder.order(edge, 5, deadline_s=20) for _ in range(3)]
        edge.cancel(transfers[1].transfer_id, "while its bytes are on their way")
        assert decoder.until_over(*transfers) == ["committed", "Cancelled", "committed"]
        assert edge.is_open


def test_an_abort_that_overruns_its_budget_fences_the_process_and_keeps_the_slabs(pair: Any, at_rest: Any) -> None:
    fenced: list[str] = []
    with pair(gpu("nccl", fence=fenced.append), gpu("nccl", fence=fenced.append)) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        at_rest.turn(abort_hangs=1, hang_after=at_rest.count("operations"))
        assert decoder.until_over(decoder.order(edge, 6, deadline_s=20)) in (["NcclError"], ["PeerLost"])
        assert eventually(lambda: len(fenced) == 2) and all("did not end within" in why for why in fenced)
        assert num_out(prefiller, decoder) > 0  # in quarantine: NCCL may write there still
        at_rest.turn(abort_hangs=0)
        assert eventually(lambda: num_out(prefiller, decoder) == 0)


def test_a_peer_that_does_not_join_is_given_up_and_not_tried_again_at_once(pair: Any, at_rest: Any) -> None:
    limits = {"limits": LIMITS | {"join_s": 0.3}}
    with pair(gpu("nccl") | limits, gpu("auto") | limits) as (prefiller, decoder):
        at_rest.turn(init_hangs=1)
        with pytest.raises(ProtocolMismatch, match=r"not nccl: .*(did not join|no communicator)"):
            decoder.sink.connect(prefiller.peer, 5)
        at_rest.turn(init_hangs=0)
        with pytest.raises(ProtocolMismatch, match=r"not nccl: it failed \d s ago"):
            decoder.sink.connect(prefiller.peer, 5)
        assert eventually(lambda: at_rest.count("comms") == 0)


def test_what_the_device_still_reads_is_released_only_when_it_has_read_it(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancel while a gather is going on: the source's blocks stay, and the sink hears of it only then."""
    with pair(gpu("nccl"), gpu("nccl")) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        decoder.until_over(decoder.order(edge, 2))
        is_slow = threading.Event()
        runtime, is_done = prefiller.region.runtime, prefiller.region.runtime.is_done
        monkeypatch.setattr(runtime, "is_done", lambda event: not is_slow.is_set() and is_done(event))
        is_slow.set()
        transfer = decoder.order(edge, 6, deadline_s=20)
        assert eventually(lambda: num_out(prefiller) > 0)
        edge.cancel(transfer.transfer_id, "while its blocks are read")
        assert decoder.until_over(transfer) == ["Cancelled"]
        time.sleep(0.1)
        assert len(prefiller.released) == 1  # of the first one
        is_slow.clear()
        assert eventually(lambda: len(prefiller.released) == 2)
        assert decoder.until_over(decoder.order(edge, 6)) == ["committed"]


@pytest.mark.parametrize("backend", ["nccl", "cuda_ipc"])
def test_granted_blocks_are_quarantined_while_the_device_writes_to_them(pair: Any, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    with pair(gpu(backend), gpu(backend)) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        decoder.until_over(decoder.order(edge, 2))
        is_slow = threading.Event()
        runtime, record, is_done = decoder.region.runtime, decoder.region.runtime.record, decoder.region.runtime.is_done
        scattered: set[int] = set()

        def noted(event: int, stream: int) -> None:
            if edge._receiver._lane is not None and stream == edge._receiver._lane.stream:
                scattered.add(event)
            record(event, stream)

        monkeypatch.setattr(runtime, "record", noted)
        monkeypatch.setattr(runtime, "is_done", lambda event: not (is_slow.is_set() and event in scattered) and is_done(event))
        is_slow.set()
        transfer = decoder.order(edge, 6, deadline_s=20)
        assert eventually(lambda: bool(scattered))
        if backend == "nccl":
            edge.cancel(transfer.transfer_id, "while it is written")
        else:
            edge.close()  # the same when the whole edge goes
        assert eventually(lambda: bool(transfer.events))
        time.sleep(0.1)
        assert not transfer.is_over and not decoder.pool.is_whole
        is_slow.clear()
        assert decoder.until_over(transfer) in (["Cancelled"], ["PeerLost"])


def test_a_device_call_that_does_not_return_fences_the_process(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from polymux.transport.cuda import mover

    monkeypatch.setattr(mover, "_STUCK_S", 0.3)
    monkeypatch.setattr(mover, "_WATCH_S", 0.1)
    fenced: list[str] = []
    go_on = threading.Event()
    with pair(gpu("cuda_ipc"), gpu("cuda_ipc", fence=fenced.append)) as (prefiller, decoder):
        decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 2))
        decoder.region.mover.post(lambda: go_on.wait(10))
        assert eventually(lambda: len(fenced) == 1) and "has not returned" in fenced[0]
        go_on.set()


@pytest.mark.parametrize("backend", ["nccl", "cuda_ipc"])
def test_kernels_that_take_long_to_be_launched_are_no_copy_that_does_not_end(
    pair: Any, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """The first launch of a process may compile."""
    fenced: list[str] = []
    with pair(gpu(backend, fence=fenced.append), gpu(backend, fence=fenced.append)) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        launched: list[int] = []
        is_done = CudaRuntime.is_done

        def slow(self: Slab, *args: Any) -> None:
            if not launched:
                launched.append(self.event)
                time.sleep(LIMITS["stall_s"] + 0.1)
            real(self, *args)

        def late(self: CudaRuntime, event: int) -> bool:
            if event in launched and len(launched) < 4:
                launched.append(event)
                return False  # at the first looks
            return is_done(self, event)

        name = "scatter" if backend == "cuda_ipc" else "gather"
        real = getattr(Slab, name)
        monkeypatch.setattr(Slab, name, slow)
        monkeypatch.setattr(CudaRuntime, "is_done", late)
        assert decoder.until_over(decoder.order(edge, 2, deadline_s=20)) == ["committed"]
        assert not fenced and len(launched) == 4


def test_the_kernels_run_once_before_there_is_an_edge(at_rest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(slab, "implementation", lambda operation, device: lambda *args: ran.append(operation))
    region = at_rest.region(MIB)
    assert eventually(lambda: region.mover is not None and ran == ["gather_blocks", "scatter_blocks"])
    region.close()


def test_memory_of_others_is_let_go_where_nobody_waits_for_it(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To unmap waits for the device: for a kernel of another edge, that is, whose peer is dead, and whose abort is the mover's to begin."""
    go_on = threading.Event()
    close_memory = CudaRuntime.close_memory

    def waits(self: CudaRuntime, address: int) -> None:
        assert go_on.wait(10)
        close_memory(self, address)

    monkeypatch.setattr(CudaRuntime, "close_memory", waits)
    with pair(gpu("cuda_ipc"), gpu("cuda_ipc")) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        decoder.until_over(decoder.order(edge, 2))
        edge.close()
        assert eventually(lambda: not edge.is_open and decoder.region.mover.num_edges == 0)
        assert decoder.until_over(decoder.order(decoder.sink.connect(prefiller.peer, 5), 3)) == ["committed"]
        go_on.set()


def test_no_pinned_memory_is_given_back_while_edges_are_served(pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    free_pinned = CudaRuntime.free_pinned
    monkeypatch.setattr(CudaRuntime, "free_pinned", lambda self, address: (freed.append(address), free_pinned(self, address)))
    with pair(gpu("nccl"), gpu("nccl")) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        for count in (1, 9, 2, 33):  # samples of as many sizes
            assert decoder.until_over(decoder.order(edge, count)) == ["committed"]
        assert not freed
    assert freed


def test_an_allocation_that_is_exported_shares_its_memory_with_no_other(at_rest: Any) -> None:
    runtime = CudaRuntime.load(at_rest.library())
    address = runtime.malloc(2 * MIB + 1)
    assert runtime.memory_handle(address).rstrip(b"\0").endswith(b" %d" % (4 * MIB))
    runtime.free(address)


def test_a_sticky_error_of_the_device_fences_the_process(pair: Any, at_rest: Any) -> None:
    fenced: list[str] = []

    def fence(reason: str) -> None:  # in its place the process would end, and its descriptors with it: here the device is well again
        fenced.append(reason)
        at_rest.turn(sticky=0)

    with pair(gpu("nccl", fence=fence), gpu("nccl", fence=fence)) as (prefiller, decoder):
        edge = decoder.sink.connect(prefiller.peer, 5)
        at_rest.turn(sticky=1)
        decoder.order(edge, 4, deadline_s=1.0)
        assert eventually(lambda: bool(fenced)) and "CUDA error 719" in fenced[0]


def peer(worker: str, host: str = "h") -> Peer:
    return Peer(worker_id=WorkerId(worker), epoch=Epoch(1), address="", host_id=host)


def side(device: DeviceTerms, host: str = "h", *, wanted: str = "auto") -> Side:
    return Side(peer("w", host), device, offered(wanted, device, has_descriptor=not device.uuid))


ONE, OTHER = DeviceTerms(uuid="GPU-1", nccl_version=22907), DeviceTerms(uuid="GPU-2", nccl_version=22907)
OLDER, WITHOUT = DeviceTerms(uuid="GPU-2", nccl_version=22809), DeviceTerms(uuid="GPU-2", no_nccl="libnccl cannot be loaded")
HOST = DeviceTerms()


@pytest.mark.parametrize(
    ("sink", "source", "tried", "reasons"),
    [
        (side(ONE), side(ONE), ["local", "cuda_ipc"], {"nccl": "both are on one GPU, which NCCL refuses"}),
        (side(ONE), side(OTHER), ["local", "cuda_ipc", "nccl"], {}),
        (side(ONE), side(OTHER, "far"), ["local", "nccl"], {"cuda_ipc": "another host"}),
        (side(ONE), side(OLDER, "far"), ["local"], {"nccl": "NCCL 2.29.7 here and 2.28.9 there; run one release of torch"}),
        (side(ONE), side(WITHOUT, "far"), ["local"], {"nccl": "no NCCL there: libnccl cannot be loaded"}),
        (side(HOST), side(HOST), ["local", "shm", "tcp"], {}),
        (side(HOST), side(HOST, "far"), ["local", "tcp"], {"shm": "another host"}),
        (side(ONE), side(HOST), [], {"local": "one side's KV is on a GPU and the other's in host memory"}),
        (side(ONE), side(ONE, wanted="nccl"), ["nccl"], {"cuda_ipc": "the source does not offer it"}),
    ],
)
def test_auto_tries_what_can_work_in_order_and_says_why_not_the_rest(sink: Side, source: Side, tried: list[str], reasons: Any) -> None:
    answers = {name: why_not(name, "auto", sink, source) for name in to_try("auto", sink.device)}
    assert [name for name, why in answers.items() if why is None] == tried
    assert {name: answers[name] for name in reasons} == reasons


def test_a_forced_backend_is_the_only_one_and_does_not_mind_one_gpu() -> None:
    assert to_try("nccl", ONE) == ("nccl",) and to_try("auto", HOST) == HOST_BACKENDS
    assert why_not("nccl", "nccl", side(ONE), side(ONE)) is None


def test_what_failed_with_a_peer_is_tried_again_after_a_while_and_at_once_with_its_next_incarnation() -> None:
    failures = RecentFailures()
    failures.add(peer("w"), "nccl", "it hung", 10.0)
    assert failures.why(peer("w"), "nccl", 12.0) == "it failed 2 s ago: it hung"
    assert failures.why(peer("w"), "cuda_ipc", 12.0) is None and failures.why(peer("v"), "nccl", 12.0) is None
    assert failures.why(Peer(worker_id=WorkerId("w"), epoch=Epoch(2), address="", host_id="h"), "nccl", 12.0) is None
    assert failures.why(peer("w"), "nccl", 10.1 + RETRY_S) is None
    for number in range(300):
        failures.add(peer(f"w{number}"), "nccl", "it hung", 10.0)
    assert failures.why(peer("w"), "nccl", 12.0) is None  # forgotten: the books are bounded


def test_the_stand_ins_events_may_be_destroyed_before_they_are_reached(at_rest: Any) -> None:
    runtime = CudaRuntime.load(at_rest.library())
    stream, last = runtime.stream(), runtime.event()
    at_rest.turn(work_us=20_000)
    ctypes.CDLL(at_rest.library()).stand_in_work(ctypes.c_void_p(stream))
    for _ in range(32):
        gone = runtime.event(is_interprocess=True)
        runtime.record(gone, stream)
        runtime.wait_event(stream, gone)
        runtime.destroy_event(gone)
    runtime.record(last, stream)
    assert not runtime.is_done(last)
    assert eventually(lambda: runtime.is_done(last))
    runtime.destroy_stream(stream)
    runtime.destroy_event(last)
