"""What a worker measures of itself: costs that it learns and reports, and the counters behind the metrics."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence

from polymux.actors.copier import Copied
from polymux.actors.costs import Costs
from polymux.actors.timeline import Timeline
from polymux.actors.weights.residency import Loaded, Switch
from polymux.disagg.cost import Fit, Roofline, decode_features, prefill_features, switch_features
from polymux.transport.kv import EdgeStats
from polymux.transport.messages import ModelCost, ModelSpec, SpanKind
from polymux.transport.telemetry import METRICS, Telemetry, flatten
from polymux.transport.units import ModelName

_RECORDED = ("model_switches", "model_switch_seconds", "cost_predicted_seconds", "cost_actual_seconds", "cost_error_ratio")


class Meter:
    """Written by the engine thread, read by the reporting one. What it is told has just ended: its spans end now."""

    def __init__(
        self, device: Roofline | None = None, timeline: Timeline | None = None, saved_costs: Mapping[str, Fit] | None = None
    ) -> None:
        self.timeline = timeline or Timeline()
        self._counters: defaultdict[str, float] = defaultdict(float)
        self._telemetry = Telemetry({name: METRICS[name] for name in _RECORDED})
        self.learned = Costs(self._telemetry, device, saved_costs)
        self._lock = threading.Lock()

    def add_model(self, spec: ModelSpec) -> None:
        with self._lock:
            self.learned.add_model(spec)

    def predict_prefill_s(self, model: ModelName, chunks: Sequence[tuple[int, int]]) -> float:
        """Of one step over (tokens already cached, tokens to compute) of each chunk."""
        return self.learned.prefill[model].fit.predict(prefill_features(chunks))

    def predict_decode_s(self, model: ModelName, num_seqs: int, kv_tokens: int) -> float:
        return self.learned.decode[model].fit.predict(decode_features(num_seqs, kv_tokens))

    def predict_swap_s(self, nbytes: int) -> float:
        """One way."""
        return self.learned.swap.fit.predict(switch_features(nbytes))

    def predict_switch_s(self, nbytes: int) -> float:
        return self.learned.switch.fit.predict(switch_features(nbytes))

    @property
    def switch_bytes_per_s(self) -> float:
        """Of a large switch, its fixed part included."""
        nbytes = 1 << 30
        return nbytes / self.predict_switch_s(nbytes)

    def prefilled(self, model: ModelName, chunks: Sequence[tuple[int, int]], seconds: float, *, is_typical: bool = True) -> None:
        """One prefill step over (tokens already cached, tokens computed) of each chunk; `is_typical` as of `decoded`."""
        if is_typical:
            self.learned.prefill[model].observe(prefill_features(chunks), seconds)
        num_tokens = sum(tokens for _, tokens in chunks)
        self._add(prompt_tokens=num_tokens, prefill_steps=1, prefill_seconds=seconds)
        now_s = self.timeline.clock()
        self.timeline.add(SpanKind.PREFILL, model, now_s - seconds, now_s, num_seqs=len(chunks), num_tokens=num_tokens)

    def reused(self, num_tokens: int, num_cached: int) -> None:
        """A prefill of so many tokens, of which some were cached."""
        self._add(prefix_cache_queries=num_tokens, prefix_cache_hits=num_cached)

    def decoded(self, model: ModelName, num_seqs: int, kv_tokens: int, seconds: float, *, is_typical: bool = True) -> None:
        """A step that was not typical waited for something else on its device; nothing is learned from its time."""
        if is_typical:
            self.learned.decode[model].observe(decode_features(num_seqs, kv_tokens), seconds)
        self._add(generation_tokens=num_seqs, decode_steps=1, decode_seconds=seconds)
        now_s = self.timeline.clock()
        self.timeline.add(SpanKind.DECODE, model, now_s - seconds, now_s, num_seqs=num_seqs, num_tokens=num_seqs)

    def sampled_first(self, num_seqs: int) -> None:
        """First tokens, which a prefill step makes."""
        self._add(generation_tokens=num_seqs)

    def switched(self, switch: Switch) -> None:
        self._add(
            model_switches=1,
            model_loads=bool(switch.nbytes),
            model_switch_seconds=switch.seconds,
            model_switch_bytes=switch.nbytes,
            model_evictions=len(switch.evicted),
        )
        came = "prefetched" if switch.was_prefetched else "loaded"
        self._telemetry.add("model_switches", 1.0, came if switch.nbytes else "resident")
        self._telemetry.observe("model_switch_seconds", switch.seconds, "switch")
        now_s = self.timeline.clock()
        self.timeline.add(SpanKind.SWITCH, switch.target, now_s - switch.seconds, now_s, nbytes=switch.nbytes)
        self.timeline.activated(switch.target, now_s)

    def loaded(self, loaded: Loaded) -> None:
        """Weights are in. What the engine waited for them is what a switch costs; a prefetch hides that, and tells nothing."""
        self._telemetry.observe("model_switch_seconds", loaded.ended_s - loaded.began_s, "prefetch" if loaded.was_prefetched else "load")
        if loaded.was_prefetched:
            self._add(model_prefetches=1, model_prefetch_bytes=loaded.nbytes)
            self.timeline.add(SpanKind.PREFETCH, loaded.model, loaded.began_s, loaded.ended_s, nbytes=loaded.nbytes)
        else:
            self.learned.switch.observe(switch_features(loaded.nbytes), loaded.waited_s)

    def preempted(self) -> None:
        self._add(preemptions=1)

    def gave_up(self, num_tokens: int) -> None:
        """A sequence lost its KV, which was not worth swapping or had no room: all its tokens are prefilled again."""
        self._add(recomputed_tokens=num_tokens)

    def handed_over(self) -> None:
        """A sequence went on to another worker with its KV."""
        self._add(sequences_moved=1)

    def swapped(self, kind: SpanKind, model: ModelName, copied: Copied) -> None:
        """Blocks of one sequence have gone to the host tier, or come back."""
        seconds = copied.ended_s - copied.began_s
        self.learned.swap.observe(switch_features(copied.nbytes), seconds)
        self._add(**{f"{kind}_blocks": copied.num_blocks, f"{kind}_bytes": copied.nbytes, f"{kind}_seconds": seconds, f"{kind}s": 1})
        self.timeline.add(kind, model, copied.began_s, copied.ended_s, nbytes=copied.nbytes, num_seqs=1)

    def swap_failed(self) -> None:
        self._add(swap_failures=1)

    def costs(self) -> tuple[ModelCost, ...]:
        with self._lock:
            fits = {model: (cost.fit, self.learned.decode[model].fit) for model, cost in self.learned.prefill.items()}
        return tuple(
            ModelCost(
                model=model,
                prefill=_three(prefill),
                decode=_three(decode),
                num_prefill_steps=prefill.num_observed,
                num_decode_steps=decode.num_observed,
            )
            for model, (prefill, decode) in fits.items()
        )

    def counters(self, edges: Sequence[EdgeStats]) -> tuple[tuple[str, float], ...]:
        """Every counter since the worker started, KV migration's included, by name."""
        with self._lock:
            counts = dict(self._counters)
        counts |= flatten(self._telemetry.snapshot())
        counts["kv_transfer_bytes"] = sum(edge.bytes for edge in edges)
        counts["kv_transfers_committed"] = sum(edge.committed for edge in edges)
        counts["kv_transfers_failed"] = sum(number for edge in edges for _, number in edge.failed)
        counts["kv_transfer_seconds"] = sum(edge.seconds for edge in edges)
        counts["kv_stale_moves"] = sum(edge.stale_moves for edge in edges)
        return tuple(sorted((name, float(value)) for name, value in counts.items()))

    def _add(self, **counts: float) -> None:
        with self._lock:
            for name, value in counts.items():
                self._counters[name] += value


def _three(fit: Fit) -> tuple[float, float, float]:
    first, second, third = fit.coefficients
    return first, second, third
