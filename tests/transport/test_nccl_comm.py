"""A communicator's states under anything that NCCL, the device, the peer and the clock may do: it always ends, and lets go in order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polymux.transport.errors import NcclError
from polymux.transport.nccl.api import IN_PROGRESS, SUCCESS
from polymux.transport.nccl.comm import Comm, CommLimits, CommState, Operation

LIMITS = CommLimits(join_s=10.0, stall_s=5.0, abort_s=3.0)
SYSTEM_ERROR = 2
HANDLE = 77


class Aside:
    """A call in another thread, which runs when the test says so."""

    def __init__(self, call: Callable[[], int | None]) -> None:
        self._call = call
        self._outcome: Any = None
        self.is_done = False

    def run(self) -> None:
        try:
            self._outcome = self._call()
        except NcclError as error:
            self._outcome = error
        self.is_done = True

    def result(self) -> int | None:
        assert self.is_done
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


@dataclass
class Library:
    """NCCL and the device at once: what was asked of them, and answers that the test sets."""

    state: int = IN_PROGRESS
    init_fails: bool = False
    refuses: bool = False
    is_posting: bool = False
    is_aborted: bool = False
    on_stream: list[int] = field(default_factory=list)  # addresses of operations that the stream has, in order
    num_finished: int = 0  # of those
    marks: dict[int, int] = field(default_factory=dict)  # event -> how many operations were on the stream when it was recorded

    def init(self, unique_id: bytes, rank: int) -> int:
        if self.init_fails:
            raise NcclError("no")
        return HANDLE

    def async_error(self, comm: int) -> int:
        assert comm == HANDLE and not self.is_aborted, "used after the abort began"
        return self.state

    def send(self, comm: int, address: int, nbytes: int, peer: int, stream: int) -> None:
        assert comm == HANDLE and peer == 0 and not self.is_posting and self.state == SUCCESS, "posted into a call that is going on"
        if self.refuses:
            raise NcclError("invalid usage")
        self.is_posting, self.state = True, IN_PROGRESS
        self.on_stream.append(address)

    recv = send

    def abort(self, comm: int) -> None:
        assert comm == HANDLE and not self.is_aborted, "aborted twice"
        self.is_aborted = True
        self.num_finished = len(self.on_stream)

    def text(self, code: int, comm: int = 0) -> str:
        return f"code {code}"

    def record(self, event: int, stream: int) -> None:
        assert not self.is_posting or self.is_aborted, "recorded before the operation is on the stream"
        self.marks[event] = len(self.on_stream)

    def is_done(self, event: int) -> bool:
        return self.num_finished >= self.marks[event]


class CommMachine(RuleBasedStateMachine):
    """Rules are what others do; after each the communicator looks once."""

    def __init__(self) -> None:
        super().__init__()
        self.library = Library()
        self.asides: list[Aside] = []
        self.fenced: list[str] = []
        self.now_s = 100.0
        self.operations: list[Operation] = []
        self.left_s = 0.0  # when it left the states in which it is usable
        self.comm = Comm(
            self.library,
            self.library,
            5,
            b"",
            1,
            aside=self.aside,
            fence=self.fenced.append,
            limits=LIMITS,
            now_s=self.now_s,
        )

    def aside(self, call: Callable[[], int | None]) -> Aside:
        self.asides.append(Aside(call))
        return self.asides[-1]

    def look(self) -> None:
        was_usable = self.comm.is_usable
        self.comm.step(self.now_s)
        if was_usable and not self.comm.is_usable:
            self.left_s = self.now_s

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 6.0]))
    def time_passes(self, seconds: float) -> None:
        self.now_s += seconds
        self.look()

    @precondition(lambda self: any(not one.is_done for one in self.asides))
    @rule(fails=st.booleans())
    def a_call_aside_returns(self, fails: bool) -> None:
        self.library.init_fails = fails
        next(one for one in self.asides if not one.is_done).run()
        self.look()

    @precondition(lambda self: self.comm.state is CommState.JOINING)
    @rule()
    def the_peer_joins(self) -> None:
        self.library.state = SUCCESS
        self.look()

    @precondition(lambda self: self.comm.state is CommState.READY)
    @rule(refuses=st.booleans())
    def somebody_sends(self, refuses: bool) -> None:
        self.library.refuses = refuses
        operation = Operation(True, len(self.operations), 1024, len(self.operations))
        if not refuses:
            self.operations.append(operation)
        self.comm.post(operation, self.now_s)
        if refuses:
            self.left_s = self.now_s
        self.look()

    @precondition(lambda self: self.library.is_posting)
    @rule()
    def the_operation_is_on_the_stream(self) -> None:
        self.library.is_posting = False
        self.library.state = SUCCESS
        self.look()

    @precondition(lambda self: self.library.num_finished < len(self.library.on_stream) - self.library.is_posting)
    @rule()
    def an_operation_finishes(self) -> None:
        self.library.num_finished += 1
        self.look()

    @rule()
    def an_error_comes(self) -> None:
        self.library.state = SYSTEM_ERROR
        self.look()

    @precondition(lambda self: self.comm.is_usable)
    @rule()
    def nobody_needs_it(self) -> None:
        self.comm.close(self.now_s)
        self.left_s = self.now_s

    @invariant()
    def what_is_done_was_done_by_the_device(self) -> None:
        done = sum(one.is_done for one in self.operations)
        assert done <= self.library.num_finished
        assert [one.is_done for one in self.operations] == [True] * done + [False] * (len(self.operations) - done)

    @invariant()
    def memory_is_let_go_only_when_nothing_writes_to_it(self) -> None:
        if self.comm.state is CommState.GONE:
            assert self.library.is_aborted or not self.library.on_stream
            assert self.library.num_finished == len(self.library.on_stream)

    @invariant()
    def it_is_stuck_in_no_state(self) -> None:
        """Whatever it waits for, it has given up, or the process is fenced, not long after the limit: at the next look."""
        if self.comm.state is CommState.ABORTING and self.now_s - self.left_s > LIMITS.abort_s:
            assert len(self.fenced) == 1

    @invariant()
    def the_process_is_fenced_at_most_once_and_only_by_an_abort_that_overruns(self) -> None:
        assert len(self.fenced) <= 1
        if self.fenced:
            assert not self.comm.is_usable

    def teardown(self) -> None:
        """From wherever it is: with a peer that never moves again it ends, once its calls return."""
        for _ in range(4):
            self.now_s += max(LIMITS.join_s, LIMITS.stall_s) + 1
            self.look()
            if self.comm.state in (CommState.JOINING, CommState.POSTING) or self.library.num_finished < len(self.library.on_stream):
                assert not self.comm.is_usable
            if self.comm.state is CommState.READY:
                self.comm.close(self.now_s)
            for one in self.asides:
                if not one.is_done:
                    one.run()
            self.look()
        assert self.comm.state is CommState.GONE
        self.memory_is_let_go_only_when_nothing_writes_to_it()


TestCommMachine = CommMachine.TestCase
TestCommMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def joined() -> tuple[Comm, Library, list[Aside], list[str]]:
    library, asides, fenced = Library(), [], []

    def aside(call: Callable[[], int | None]) -> Aside:
        asides.append(Aside(call))
        return asides[-1]

    comm = Comm(library, library, 5, b"", 1, aside=aside, fence=fenced.append, limits=LIMITS, now_s=0.0)
    return comm, library, asides, fenced


def test_a_rank_that_does_not_join_in_time_is_an_error_and_its_communicator_is_aborted() -> None:
    comm, library, asides, _ = joined()
    asides[0].run()
    comm.step(9.9)
    assert comm.state is CommState.JOINING
    comm.step(10.1)
    assert comm.state is CommState.ABORTING and isinstance(comm.why, NcclError) and "did not join" in str(comm.why)
    asides[1].run()
    comm.step(10.2)
    assert comm.state is CommState.GONE and library.is_aborted


def test_a_first_call_that_never_returns_fences_the_process_since_there_is_nothing_to_abort() -> None:
    comm, _, asides, fenced = joined()
    comm.step(10.1)
    comm.step(13.2)
    assert len(fenced) == 1 and len(asides) == 1


def test_larger_operations_may_take_longer_before_they_count_as_stuck() -> None:
    comm, library, asides, _ = joined()
    asides[0].run()
    library.state = SUCCESS
    comm.step(0.0)
    comm.post(Operation(False, 0, 128 * 2**20, 0), 0.0)  # two seconds at the slowest rate
    library.is_posting, library.state = False, SUCCESS
    comm.step(0.1)
    comm.step(6.9)
    assert comm.is_usable
    comm.step(7.2)
    assert not comm.is_usable and "gone nowhere for 7.0 s" in str(comm.why)


def test_two_aborts_do_not_wait_for_each_other() -> None:
    """Giving memory back waits for the whole device, and so for the other communicator's kernel."""
    one, other = joined(), joined()
    for comm, _, asides, _ in (one, other):
        asides[0].run()
        comm.close(1.0)
    assert [len(asides) for _, _, asides, _ in (one, other)] == [2, 2]  # both have begun, and neither has returned
