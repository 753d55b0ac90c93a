"""Where a simulated request goes: the controller's books and its very rule, `choose_decode`.

As in the live controller a worker's work is what was placed there and has not ended, at its prompt and the answer that is expected; what
it knows of a worker's weights is as old as the last report.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from polymux.disagg.dispatch import Coefficients, choose_decode, worker_view
from polymux.disagg.sim.costs import SECOND, CostModel
from polymux.disagg.sim.workload import SimRequest
from polymux.disagg.views import AskView, DecodeModelView, DecodeWorkerView
from polymux.transport.units import ModelName, WorkerId

EXPECTED_OUTPUT_LEN = 128.0  # of a model's requests until some have ended
OUTPUT_SMOOTHING = 0.05


@dataclass(slots=True)
class _Work:
    num_seqs: int = 0
    kv_tokens: int = 0


@dataclass(slots=True)
class Book:
    """One worker's, as the controller keeps it."""

    worker_id: WorkerId
    work: dict[ModelName, _Work] = field(default_factory=dict)
    promised: dict[int, tuple[ModelName, int]] = field(default_factory=dict)  # by request: its tokens
    resident: frozenset[ModelName] = frozenset()
    view: DecodeWorkerView | None = None


class Placement:
    """`resident` says what weights a worker has, by its number, as far as a controller knows at that time.

    Nothing is placed on the `excluded`, numbers too: they only prefill.
    """

    def __init__(
        self,
        costs: CostModel,
        tpot_s: float,
        worker_ids: Iterable[WorkerId],
        resident: Callable[[int, int], frozenset[ModelName]],
        *,
        max_num_seqs: int,
        max_quota_s: float,
        kv_bytes: int,
        excluded: frozenset[int] = frozenset(),
    ) -> None:
        self._costs = costs
        self._tpot_s = tpot_s
        self._resident = resident
        self._max_num_seqs = max_num_seqs
        self._max_quota_s = max_quota_s
        self._kv_bytes = kv_bytes  # of a worker
        self._books = [Book(worker_id) for worker_id in worker_ids]
        self._able = [number for number in range(len(self._books)) if number not in excluded]
        self._numbers = {book.worker_id: number for number, book in enumerate(self._books)}
        self._kinds: dict[ModelName, str] = {}
        self._decode_costs: dict[ModelName, Coefficients] = {}
        self._weight_bytes: dict[ModelName, int] = {}
        self._output_len: dict[ModelName, float] = {}
        self.switch_bytes_per_s = 1.0

    def register(self, kinds: dict[ModelName, str]) -> None:
        """What a placement knows of each model's costs: a line through the cost model's answers."""
        for model, kind in kinds.items():
            base = self._costs.decode_us(kind, 1, 0)
            per_seq = (self._costs.decode_us(kind, 65, 0) - base) / 64
            per_token = (self._costs.decode_us(kind, 1, 100_000) - base) / 100_000
            self._decode_costs[model] = tuple(max(0.0, c) / SECOND for c in (base - per_seq, per_seq, per_token))  # type: ignore[assignment]
            self._kinds[model], self._weight_bytes[model] = kind, self._costs.weight_bytes(kind)
            self._output_len[model] = EXPECTED_OUTPUT_LEN
        if kinds:
            largest = max(sorted(set(kinds.values())), key=self._costs.weight_bytes)
            self.switch_bytes_per_s = self._costs.weight_bytes(largest) * SECOND / self._costs.load_us(largest)

    def ask(self, request: SimRequest) -> AskView:
        model = ModelName(request.model)
        num_output = max(1, round(min(request.max_tokens or self._output_len[model], self._output_len[model])))
        return AskView(
            model=model,
            num_prompt_tokens=request.input_len,
            num_output_tokens=num_output,
            tpot_slo_s=self._tpot_s,
            kv_bytes=(request.input_len + num_output) * self._costs.kv_bytes(request.kind),
            weight_bytes=self._weight_bytes[model],
        )

    def place(self, request: SimRequest, now_us: int) -> int:
        """The number of its worker, which is promised to it at once."""
        ask = self.ask(request)
        choice = choose_decode(ask, (self._view(number, now_us) for number in self._able), max_quota_s=self._max_quota_s)
        assert choice is not None
        number = self._numbers[choice.worker_id]
        self._promise(self._books[number], request.request_id, ask.model, ask.num_prompt_tokens + ask.num_output_tokens)
        return number

    def _promise(self, book: Book, request_id: int, model: ModelName, num_tokens: int) -> None:
        book.promised[request_id] = model, num_tokens
        work = book.work.setdefault(model, _Work())
        work.num_seqs += 1
        work.kv_tokens += num_tokens
        book.view = None

    def ended(self, request: SimRequest, number: int, num_tokens: int | None) -> None:
        """On its worker, with so many tokens; None: it failed."""
        book = self._books[number]
        model, promised = book.promised.pop(request.request_id)
        work = book.work[model]
        work.num_seqs -= 1
        work.kv_tokens -= promised
        if not work.num_seqs:
            del book.work[model]
        book.view = None
        if num_tokens is not None:
            self._output_len[model] += OUTPUT_SMOOTHING * (num_tokens - self._output_len[model])

    def _view(self, number: int, now_us: int) -> DecodeWorkerView:
        book, resident = self._books[number], self._resident(number, now_us)
        if book.view is None or resident != book.resident:
            book.resident, book.view = resident, self._viewed(book, resident)
        return book.view

    def _viewed(self, book: Book, resident: frozenset[ModelName]) -> DecodeWorkerView:
        models: dict[ModelName, DecodeModelView] = {}
        kv_bytes = 0
        for model, work in book.work.items():
            kind = self._kinds[model]
            step_s = self._costs.decode_us(kind, min(work.num_seqs, self._max_num_seqs), work.kv_tokens) / SECOND
            models[model] = DecodeModelView(num_seqs=work.num_seqs, kv_tokens=work.kv_tokens, tpot_slo_s=self._tpot_s, step_s=step_s)
            kv_bytes += work.kv_tokens * self._costs.kv_bytes(kind)
        return worker_view(
            book.worker_id,
            models,
            resident=resident,
            costs=self._decode_costs,
            weight_bytes=self._weight_bytes,
            switch_bytes_per_s=self.switch_bytes_per_s,
            free_kv_bytes=self._kv_bytes - kv_bytes,
            max_num_seqs=self._max_num_seqs,
        )
