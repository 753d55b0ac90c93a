"""The workers that are alive, what is known of their costs, and which of them could hold a model at all."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polymux.cluster.books import Coefficients, DecodeBook, PrefillBook, WorkerBook
from polymux.cluster.config import ClusterConfig
from polymux.disagg.admission import max_kv_tokens
from polymux.disagg.cost import Roofline, guess_decode, guess_prefill
from polymux.transport.errors import ConfigError, Overloaded
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


class Pool:
    """Books of the workers alive, by role and id."""

    def __init__(self, config: ClusterConfig) -> None:
        self._lease_s = config.liveness.worker_lease_s
        self._stall_s = config.liveness.ready_step_age_s
        self._max_num_seqs = config.engine.max_num_seqs
        self.prefill: dict[WorkerId, PrefillBook] = {}
        self.decode: dict[WorkerId, DecodeBook] = {}
        self.lost: deque[WorkerBook] = deque(maxlen=MAX_LOST)
        self.num_lost = 0
        self.stalled: frozenset[WorkerId] = frozenset()
        self.retired: Counter[str] = Counter()  # counters of lost workers
        self._weight_bytes: dict[ModelName, int] = {}
        self._prefill_costs: dict[ModelName, Coefficients] = {}  # by any worker's last word, a guess before that
        self._decode_costs: dict[ModelName, Coefficients] = {}
        self._able: dict[ModelName, Able] = {}

    def __len__(self) -> int:
        return len(self.prefill) + len(self.decode)

    def books(self) -> Iterator[WorkerBook]:
        yield from self.prefill.values()
        yield from self.decode.values()

    def get(self, worker_id: WorkerId) -> WorkerBook | None:
        return self.prefill.get(worker_id) or self.decode.get(worker_id)

    def add_model(self, spec: ModelSpec) -> None:
        """Make its cost known to every book. A model registered again keeps what was learned."""
        self._weight_bytes[spec.model] = spec.weight_bytes
        self._able.clear()
        if spec.model in self._prefill_costs:
            return
        prefill = _three(guess_prefill(spec, Roofline()).coefficients)
        decode = _three(guess_decode(spec, Roofline()).coefficients)
        assert prefill is not None
        assert decode is not None
        self._prefill_costs[spec.model], self._decode_costs[spec.model] = prefill, decode
        for prefill_book in self.prefill.values():
            prefill_book.learn({spec.model: prefill})
        for decode_book in self.decode.values():
            decode_book.learn({spec.model: decode})

    def add(self, hello: WorkerHello, epoch: Epoch, now_s: float) -> None:
        """A worker joins. Raises ConfigError for a hello without id or arena, Overloaded when there are too many."""
        if not hello.worker_id or hello.arena_bytes <= 0:
            raise ConfigError(f"worker {hello.worker_id!r} with arena_bytes={hello.arena_bytes} cannot join; it needs an id and an arena")
        if len(self) >= MAX_WORKERS:
            raise Overloaded(f"{len(self)} workers are alive, and no more than {MAX_WORKERS} may be")
        lease_s, weight_bytes = self._lease_s, self._weight_bytes
        if hello.role is Role.PREFILL:
            costs = dict(self._prefill_costs)
            self.prefill[hello.worker_id] = PrefillBook(hello, epoch, costs, weight_bytes, now_s=now_s, lease_s=lease_s)
        else:
            costs, max_num_seqs = dict(self._decode_costs), self._max_num_seqs
            self.decode[hello.worker_id] = DecodeBook(
                hello, epoch, costs, weight_bytes, now_s=now_s, lease_s=lease_s, max_num_seqs=max_num_seqs
            )
        self._able.clear()

    def remove(self, worker_id: WorkerId) -> bool:
        """A worker is lost. Its book stays with the requests that were there, until they are placed anew or end."""
        book = self.prefill.pop(worker_id, None) or self.decode.pop(worker_id, None)
        if book is None:
            return False
        book.is_lost = True
        self.lost.append(book)
        self.num_lost += 1
        self.stalled -= {worker_id}
        self.retired.update(counters_of(book))
        self._able.clear()
        return True

    def report(self, book: WorkerBook, report: WorkerReport, now_s: float) -> None:
        is_prefill = isinstance(book, PrefillBook)
        known = self._prefill_costs if is_prefill else self._decode_costs
        learned: dict[ModelName, Coefficients] = {}
        for cost in report.costs:
            coefficients = _three(cost.prefill if is_prefill else cost.decode)
            if cost.model in known and coefficients is not None:
                learned[cost.model] = known[cost.model] = coefficients
        if learned:
            book.learn(learned)
        book.report(report, now_s=now_s, lease_s=self._lease_s)
        is_stalled = report.last_step_age_s is not None and report.last_step_age_s > self._stall_s
        self.stalled = self.stalled | {report.worker_id} if is_stalled else self.stalled - {report.worker_id}

    def able(self, spec: ModelSpec) -> Able:
        """Who could hold the model, whatever is in the arenas now."""
        found = self._able.get(spec.model)
        if found is None:
            found = self._able[spec.model] = self._find_able(spec)
        return found

    def _find_able(self, spec: ModelSpec) -> Able:
        roomy = {book.hello.worker_id: max_kv_tokens(book.hello.arena_bytes, spec.weight_bytes, spec.kv) for book in self.books()}
        prefill = tuple(book for worker_id, book in sorted(self.prefill.items()) if roomy[worker_id])
        decode = tuple(book for worker_id, book in sorted(self.decode.items()) if roomy[worker_id])
        most = min(max((roomy[book.hello.worker_id] for book in side), default=0) for side in (prefill, decode))
        return Able(prefill, decode, most)


def counters_of(book: WorkerBook) -> Mapping[str, float]:
    return dict(book.reported.counters[:MAX_COUNTERS]) if book.reported else {}


def _three(coefficients: tuple[float, ...]) -> Coefficients | None:
    """None for what cannot be a cost: a prediction from it would be negative, zero or not a number."""
    if len(coefficients) != 3 or not all(0 <= c < math.inf for c in coefficients) or not any(coefficients):
        return None
    first, second, third = coefficients
    return first, second, third
