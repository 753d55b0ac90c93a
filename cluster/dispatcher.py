"""Which workers a request's sequences are given: the books as views for `disagg/dispatch.py`, and each choice booked at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from polymux.cluster.books import DecodeBook, PrefillBook, Promise
from polymux.cluster.config import ClusterConfig
from polymux.cluster.ledger import PlacedSequence, Request
from polymux.cluster.pool import Able, Pool
from polymux.cluster.snapshots import ModelRecord
from polymux.cluster.steering import Steering
from polymux.disagg.dispatch import choose_decode, choose_prefill
from polymux.disagg.placement import BYTES_PER_S, Link
from polymux.disagg.views import AskView, PrefillWorkerView
from polymux.transport.errors import OutOfMemory, Overloaded
from polymux.transport.messages import Admit, ModelSpec
from polymux.transport.prefix import MAX_PROMPT_MARKS
from polymux.transport.units import SequenceId, WorkerId, unpack_ids


@dataclass(slots=True)
class Forecast:
    """What placing a request's sequences came to."""

    is_idle: bool  # the first one has nobody before it
    ttft_s: float = 0.0  # of the last one
    switch_s: float = 0.0


class Dispatcher:
    """Between admission and the books. A worker that an ask excludes, or that has stalled, is chosen only where there is no other."""

    def __init__(self, config: ClusterConfig, pool: Pool, steering: Steering) -> None:
        self._pool = pool
        self._steering = steering
        self._is_shared = config.pools.split == "shared"
        self._max_group_size = config.policies.max_group_size
        self._max_quota_s = config.policies.max_quota_s
        self._retry_after_s = config.liveness.worker_lease_s
        self.link: Callable[[WorkerId, WorkerId], Link | None] | None = None  # what joins two workers; None: all are as near

    def able(self, spec: ModelSpec, now_s: float) -> Able:
        """The workers for a model. Raises Overloaded when a role has none alive, OutOfMemory when none of them is large enough."""
        if not (self._pool.prefill and self._pool.decode):
            self._steering.split(now_s)  # where roles follow the load, whoever is alive takes both
        able = self._pool.able(spec)
        for role, alive, large in (("prefill", self._pool.prefill, able.prefill), ("decode", self._pool.decode, able.decode)):
            if not alive:
                raise Overloaded(f"no {role} worker is alive", retry_after_s=self._retry_after_s)
            if not large:
                largest = max(book.hello.arena_bytes for book in alive.values())
                raise OutOfMemory(
                    f"model {spec.model!r} has {spec.weight_bytes} bytes of weights, and the largest {role} arena has {largest}; raise "
                    f"pools.{role}.arena_bytes"
                )
        return able

    def place(self, request: Request, ask: Admit, numbers: Iterable[int], record: ModelRecord, able: Able, now_s: float) -> Forecast:
        """Choose both workers of these sequences, one after another, and book each before the next is chosen."""
        view = self._ask_view(request, ask, record)
        forecast: Forecast | None = None
        for number in numbers:
            sequence_id = SequenceId(f"{ask.request_id}/{number}")
            prefill, decode, found = self._place_one(sequence_id, view, able, now_s)
            sequence = PlacedSequence(sequence_id, prefill, decode)
            if number < len(request.sequences):
                request.sequences[number] = sequence
            else:
                request.sequences.append(sequence)
            forecast = forecast or found
            forecast.ttft_s, forecast.switch_s = max(forecast.ttft_s, found.ttft_s), max(forecast.switch_s, found.switch_s)
        assert forecast is not None
        return forecast

    def move(self, request: Request, ask: Admit, number: int, record: ModelRecord, able: Able, now_s: float) -> None:
        """Give a sequence another decode worker, to which the present one hands the KV over; the prefill is done."""
        sequence = request.sequences[number]
        old = sequence.decode.hello.worker_id
        view = self._ask_view(request, replace(ask, excluded=(*ask.excluded, old)), record)
        headed = self._steering.headed(ask.model, old)
        decodes = [book.view() for book in able.decode]
        quota_s = self._max_quota_s
        chosen = choose_decode(view, [one for one in decodes if one.worker_id == headed], max_quota_s=quota_s)
        chosen = chosen or choose_decode(view, decodes, max_quota_s=quota_s)
        chosen = chosen or choose_decode(_unrestricted(view), decodes, max_quota_s=quota_s)
        assert chosen is not None
        sequence.decode.end(sequence.sequence_id)
        sequence.decode = self._pool.decode[chosen.worker_id]
        sequence.decode.promise(sequence.sequence_id, _promise(view, now_s))

    def _place_one(self, sequence_id: SequenceId, ask: AskView, able: Able, now_s: float) -> tuple[PrefillBook, DecodeBook, Forecast]:
        prefills = [book.view() for book in able.prefill]
        decodes = [book.view() for book in able.decode]
        anyone = _unrestricted(ask)
        group, quota_s = self._max_group_size, self._max_quota_s
        decode = choose_decode(ask, decodes, max_quota_s=quota_s) or choose_decode(anyone, decodes, max_quota_s=quota_s)
        assert decode is not None
        if self._is_shared:
            prefills = [view for view in prefills if view.worker_id == decode.worker_id] or prefills
        handover_s = self._handover_s(ask, prefills, decode.worker_id)
        prefill = choose_prefill(ask, prefills, now_s=now_s, max_group_size=group, handover_s=handover_s)
        prefill = prefill or choose_prefill(anyone, prefills, now_s=now_s, max_group_size=group, handover_s=handover_s)
        assert prefill is not None
        source, target = self._pool.prefill[prefill.worker_id], self._pool.decode[decode.worker_id]
        is_idle = source.busy_until_s <= now_s and decode.wait_s == 0
        forecast = Forecast(is_idle=is_idle, ttft_s=prefill.finish_s + decode.wait_s, switch_s=prefill.switch_s)
        busy_s = prefill.prefill_s + prefill.switch_s
        source.promise(sequence_id, _promise(ask, now_s, busy_s=busy_s))
        source.expect(ask.prefix_marks)
        target.promise(sequence_id, _promise(ask, now_s))
        self._steering.arrived(busy_s, now_s)
        return source, target, forecast

    def _handover_s(self, ask: AskView, prefills: Iterable[PrefillWorkerView], target: WorkerId) -> dict[WorkerId, float]:
        """Seconds that the prompt's KV takes from each worker to the one that decodes; empty where no links are known."""
        if self.link is None:
            return {}
        nbytes = ask.kv_bytes * ask.num_prompt_tokens / (ask.num_prompt_tokens + ask.num_output_tokens)
        links = {view.worker_id: self.link(view.worker_id, target) for view in prefills if view.worker_id != target}
        return {worker_id: nbytes / BYTES_PER_S[link] for worker_id, link in links.items() if link is not None}

    def _ask_view(self, request: Request, ask: Admit, record: ModelRecord) -> AskView:
        num_output_tokens = max(1, min(ask.max_tokens, round(record.mean_output_tokens)))
        num_tokens = ask.num_prompt_tokens + num_output_tokens
        return AskView(
            model=ask.model,
            num_prompt_tokens=ask.num_prompt_tokens,
            num_output_tokens=num_output_tokens,
            tpot_slo_s=request.slo.tpot_s,
            kv_bytes=record.spec.kv.num_blocks(num_tokens) * record.block_bytes,
            weight_bytes=record.spec.weight_bytes,
            excluded=self._pool.stalled.union(ask.excluded) if ask.excluded else self._pool.stalled,
            prefix_marks=tuple(unpack_ids(ask.prefix_hashes[: MAX_PROMPT_MARKS * 4])),
            block_size=record.spec.kv.block_size,
        )


def _promise(ask: AskView, now_s: float, *, busy_s: float = 0.0) -> Promise:
    num_tokens = ask.num_prompt_tokens + ask.num_output_tokens
    return Promise(now_s, ask.model, ask.num_prompt_tokens, num_tokens, ask.kv_bytes, ask.tpot_slo_s, busy_s)


def _unrestricted(ask: AskView) -> AskView:
    return replace(ask, excluded=frozenset()) if ask.excluded else ask
