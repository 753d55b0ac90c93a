"""The workers that are alive, what is known of their costs, and which of them could hold a model at all."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from polymux.cluster.books import DecodeBook, PrefillBook, WorkerBook
from polymux.cluster.config import ClusterConfig
from polymux.cluster.known_costs import KnownCosts, KnownSpeeds, Measured, three
from polymux.disagg.admission import max_kv_tokens
from polymux.disagg.cost import DECODE_ANCHORS, PREFILL_ANCHORS, Roofline, guess_decode, guess_prefill
from polymux.transport.errors import ConfigError, LayoutMismatch, Overloaded
from polymux.transport.head_slices import plan_heads, sharded
from polymux.transport.messages import ModelSpec, Role, WorkerHello, WorkerReport
from polymux.transport.units import Epoch, ModelName, WorkerId

MAX_WORKERS = 8192
MAX_LOST = 32  # that are remembered
MAX_COUNTERS = 512  # of one worker


@dataclass(frozen=True, slots=True)
class Able:
    """Workers whose arenas can hold a model with some KV, and the tokens of the longest sequence that fits both roles."""

    prefill: tuple[PrefillBook, ...]
    decode: tuple[DecodeBook, ...]
    max_kv_tokens: int


@dataclass(slots=True)
class Member:
    """One incarnation of a worker: its books in both roles, and the roles that it is given at present. None: it is drained."""

    prefill: PrefillBook
    decode: DecodeBook
    roles: frozenset[Role]

    @property
    def main(self) -> WorkerBook:
        """The book to ask where the role does not matter."""
        return self.prefill if self.roles == {Role.PREFILL} else self.decode

    @property
    def role(self) -> Role:
        """The one to show."""
        return next(iter(self.roles)) if len(self.roles) == 1 else self.main.hello.role

    @property
    def num_placed(self) -> int:
        return len(self.prefill.placed.keys() | self.decode.placed.keys())


class Pool:
    """Books of the workers alive, by role and id. `prefill` and `decode` hold those that have the role at present."""

    def __init__(self, config: ClusterConfig) -> None:
        self._lease_s = config.liveness.worker_lease_s
        self._stall_s = config.liveness.ready_step_age_s
        self._max_num_seqs = config.engine.max_num_seqs
        self.prefill: dict[WorkerId, PrefillBook] = {}
        self.decode: dict[WorkerId, DecodeBook] = {}
        self.members: dict[WorkerId, Member] = {}
        self.lost: deque[WorkerBook] = deque(maxlen=MAX_LOST)
        self.num_lost = 0
        self.stalled: frozenset[WorkerId] = frozenset()
        self.retired: Counter[str] = Counter()  # counters of lost workers
        self._degrees = config.pools.degrees
        self._specs: dict[ModelName, ModelSpec] = {}
        self._weight_bytes: dict[ModelName, int] = {}
        self._prefill_costs, self._decode_costs, self._speeds = KnownCosts(PREFILL_ANCHORS), KnownCosts(DECODE_ANCHORS), KnownSpeeds()
        self._able: dict[ModelName, Able] = {}

    def __len__(self) -> int:
        return len(self.members)

    def books(self) -> Iterator[WorkerBook]:
        """One of each worker."""
        return (member.main for member in self.members.values())

    def get(self, worker_id: WorkerId) -> WorkerBook | None:
        member = self.members.get(worker_id)
        return member.main if member else None

    def assign(self, worker_id: WorkerId, roles: frozenset[Role]) -> None:
        """Give a worker these roles and no others, from the next placement on; what it has been given stays. None at all: it is drained."""
        member = self.members[worker_id]
        member.roles = roles
        self.prefill = {key: one.prefill for key, one in self.members.items() if Role.PREFILL in one.roles}
        self.decode = {key: one.decode for key, one in self.members.items() if Role.DECODE in one.roles}
        self._able.clear()

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigError when the model's KV could not move between any two workers, those that are to come included."""
        check_heads(spec, {*self._degrees, *(book.hello.num_ranks for book in self.books())})

    def add_model(self, spec: ModelSpec) -> None:
        """Make its cost known to every book. A model registered again keeps what was learned."""
        self._weight_bytes[spec.model], self._specs[spec.model] = spec.weight_bytes, spec
        self._able.clear()
        if spec.model in self._prefill_costs:
            return
        prefill = three(guess_prefill(spec, Roofline()).coefficients)
        decode = three(guess_decode(spec, Roofline()).coefficients)
        assert prefill is not None
        assert decode is not None
        self._prefill_costs.guess(spec.model, prefill)
        self._decode_costs.guess(spec.model, decode)
        for member in self.members.values():
            self._tell(member)

    def add(self, hello: WorkerHello, epoch: Epoch, now_s: float) -> None:
        """A worker joins. Raises ConfigError for a hello without id or arena and for ranks that a model's KV does not fit, Overloaded
        when there are too many."""
        if not hello.worker_id or hello.arena_bytes <= 0:
            raise ConfigError(f"worker {hello.worker_id!r} with arena_bytes={hello.arena_bytes} cannot join; it needs an id and an arena")
        for spec in self._specs.values():
            check_heads(spec, {hello.num_ranks, *(book.hello.num_ranks for book in self.books())})
        if len(self) >= MAX_WORKERS:
            raise Overloaded(f"{len(self)} workers are alive, and no more than {MAX_WORKERS} may be")
        lease_s, weight_bytes = self._lease_s, self._weight_bytes
        self.members[hello.worker_id] = Member(
            PrefillBook(hello, epoch, weight_bytes, now_s=now_s, lease_s=lease_s),
            DecodeBook(hello, epoch, weight_bytes, now_s=now_s, lease_s=lease_s, max_num_seqs=self._max_num_seqs),
            frozenset(),
        )
        self._tell(self.members[hello.worker_id])
        self.assign(hello.worker_id, frozenset({hello.role}))

    def remove(self, worker_id: WorkerId) -> bool:
        """A worker is lost, or was drained. Its books stay with the requests that were there, until they are placed anew or end."""
        member = self.members.pop(worker_id, None)
        if member is None:
            return False
        self.prefill.pop(worker_id, None)
        self.decode.pop(worker_id, None)
        member.prefill.is_lost = member.decode.is_lost = True
        book = member.main
        self.lost.append(book)
        self.num_lost += bool(member.roles)
        for known in (self._prefill_costs, self._decode_costs, self._speeds):
            known.forget(worker_id)
        self.stalled -= {worker_id}
        self.retired.update(counters_of(book))
        self._able.clear()
        return True

    def report(self, report: WorkerReport, now_s: float) -> None:
        """Of a worker that is alive, in its present incarnation."""
        member = self.members[report.worker_id]
        self._take_in(member, report)
        member.prefill.report(report, now_s=now_s, lease_s=self._lease_s)
        member.decode.report(report, now_s=now_s, lease_s=self._lease_s)
        is_stalled = report.last_step_age_s is not None and report.last_step_age_s > self._stall_s
        self.stalled = self.stalled | {report.worker_id} if is_stalled else self.stalled - {report.worker_id}

    def _take_in(self, member: Member, report: WorkerReport) -> None:
        """What its steps cost, which goes for all that are alike at once."""
        kind, worker_id = member.main.hello.device_kind, report.worker_id
        prefill = {cost.model: Measured(cost.prefill, cost.num_prefill_steps) for cost in report.costs}
        decode = {cost.model: Measured(cost.decode, cost.num_decode_steps) for cost in report.costs}
        is_news = [
            self._prefill_costs.report(kind, worker_id, prefill),
            self._decode_costs.report(kind, worker_id, decode),
            self._speeds.report(kind, worker_id, report.switch_bytes_per_s),
        ]
        for one in self.members.values() if any(is_news) else (member,):
            if one.main.hello.device_kind == kind:
                self._tell(one)

    def _tell(self, member: Member) -> None:
        kind, worker_id = member.main.hello.device_kind, member.main.hello.worker_id
        member.prefill.learn(self._prefill_costs.of(kind, worker_id), self._speeds.of(kind))
        member.decode.learn(self._decode_costs.of(kind, worker_id), self._speeds.of(kind))

    def able(self, spec: ModelSpec) -> Able:
        """Who could hold the model, whatever is in the arenas now."""
        found = self._able.get(spec.model)
        if found is None:
            found = self._able[spec.model] = self._find_able(spec)
        return found

    def _find_able(self, spec: ModelSpec) -> Able:
        roomy = {book.hello.worker_id: _room(book, spec) for book in self.books()}
        prefill = tuple(book for worker_id, book in sorted(self.prefill.items()) if roomy[worker_id])
        decode = tuple(book for worker_id, book in sorted(self.decode.items()) if roomy[worker_id])
        most = min(max((roomy[book.hello.worker_id] for book in side), default=0) for side in (prefill, decode))
        return Able(prefill, decode, most)


def _room(book: WorkerBook, spec: ModelSpec) -> int:
    """Tokens of the longest sequence that the worker could hold; 0 for a degree that the model was not registered for."""
    num_ranks = book.hello.num_ranks
    try:
        rank = spec.on_ranks(num_ranks)
    except ConfigError:
        return 0
    return max_kv_tokens(book.hello.arena_bytes // num_ranks, rank.weight_bytes, rank.kv)


def check_heads(spec: ModelSpec, degrees: Iterable[int]) -> None:
    """Plan every move of this model's KV that there could be, before the first byte. Raises ConfigError, naming the degrees."""
    try:
        layouts = [sharded(spec.kv, num_ranks) for num_ranks in sorted(set(degrees))]
        for source, target in product(layouts, repeat=2):
            plan_heads(source, target)
    except LayoutMismatch as error:
        raise ConfigError(f"models.{spec.model}: {error}; change pools.*.tensor_parallel") from error


def counters_of(book: WorkerBook) -> Mapping[str, float]:
    return dict(book.reported.counters[:MAX_COUNTERS]) if book.reported else {}
