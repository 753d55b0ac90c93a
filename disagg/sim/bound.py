"""What no scheduler could exceed, by relaxation: requests on time if switches, placement and the order of steps were free.

Each request needs at least some of a device's time: its own tokens' share of every step, the step's fixed part divided by all requests of
its model that could be in the same batch: for each token those that have come before it is due, and are not all due before it can be made.
Within any stretch of time, the requests that come and are due in it cannot take more than all devices have; the fewest that must be late
are the ones that need most. A request that would be late alone on an idle device, its model loaded, is late in any case.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from polymux.disagg.sim.costs import MS, CostModel
from polymux.disagg.sim.outcome import Targets
from polymux.disagg.sim.workload import SimRequest

NUM_WINDOWS = 48  # starts tried, and ends


@dataclass(frozen=True, slots=True)
class _Need:
    began_us: int
    due_us: int  # its last token
    work_us: float


def max_on_time(requests: Sequence[SimRequest], costs: CostModel, targets: Targets, *, num_workers: int) -> float:
    """An upper bound of the share of requests with every token on time."""
    longest = max(request.input_len + request.output_len for request in requests)
    able = [request for request in requests if _is_possible(request, costs, targets, longest)]
    needs = _needs(able, costs, targets, longest)
    starts, ends = _grid([need.began_us for need in needs]), _grid([need.due_us for need in needs])
    most_late = 0
    for start_us in starts:
        inside = sorted((need for need in needs if need.began_us >= start_us), key=lambda need: need.due_us)
        for end_us in ends:
            within = inside[: bisect_right(inside, end_us, key=lambda need: need.due_us)]
            most_late = max(most_late, _num_late(within, num_workers * (end_us - start_us)))
    return (len(able) - most_late) / len(requests)


def _num_late(needs: Sequence[_Need], capacity_us: float) -> int:
    excess_us = sum(need.work_us for need in needs) - capacity_us
    if excess_us <= 0:
        return 0
    count = 0
    for work_us in sorted((need.work_us for need in needs), reverse=True):
        if excess_us <= 0:
            break
        excess_us -= work_us
        count += 1
    return count


def _is_possible(request: SimRequest, costs: CostModel, targets: Targets, longest: int) -> bool:
    """Alone on an idle device."""
    at_us = costs.prefill_us(request.kind, [request.input_len])
    if at_us > targets.ttft_us:
        return False
    at_us += (request.output_len - 1) * _least_step_us(request, costs, 1, longest)
    return at_us <= targets.due_us(request.output_len - 1)


def _least_step_us(request: SimRequest, costs: CostModel, num_sharing: int, longest: int) -> int:
    """Published fits may fall with the context, so the fullest batch is looked at too."""
    return max(0, min(costs.decode_us(request.kind, 1, 0), costs.decode_us(request.kind, num_sharing, num_sharing * longest)))


def _needs(requests: Sequence[SimRequest], costs: CostModel, targets: Targets, longest: int) -> list[_Need]:
    """Each request's part of the steps that it is in, when as many share them as ever could."""
    by_model: dict[str, list[SimRequest]] = {}
    for request in requests:
        by_model.setdefault(request.model, []).append(request)
    needs = []
    for request in requests:
        start_us, end_us = _window(request, targets)
        sharing = _sharing(request, by_model[request.model], costs, targets, longest)
        needs.append(_Need(start_us, end_us, _work_us(request, costs, sharing, longest)))
    return needs


def _window(request: SimRequest, targets: Targets) -> tuple[int, int]:
    return request.arrival_us, request.arrival_us + targets.due_us(request.output_len - 1)


def _sharing(request: SimRequest, others: Sequence[SimRequest], costs: CostModel, targets: Targets, longest: int) -> list[int]:
    """For each of its tokens, how many requests of its model could take the same step, itself among them."""
    step_us = max(1, _least_step_us(request, costs, len(others), longest))
    num_tokens = request.output_len
    changes = [0] * (num_tokens + 1)
    for other in others:
        came_us, due_us = _window(other, targets)
        first = max(0, -(-(came_us - request.arrival_us - targets.ttft_us) // targets.tpot_us))  # token due after it has come
        last = min(num_tokens - 1, (due_us - request.arrival_us) // step_us)  # token that could be made while it is not due
        if first <= last:
            changes[first] += 1
            changes[last + 1] -= 1
    return [max(1, count) for count in accumulate(changes[:-1])]


def _work_us(request: SimRequest, costs: CostModel, sharing: Sequence[int], longest: int) -> float:
    """The least time its tokens can take: what one more sequence adds to a step, rounded down, and its share of empty steps."""
    empty_us = costs.prefill_us(request.kind, [0])
    own_us = max(0, costs.prefill_us(request.kind, [request.input_len]) - empty_us - MS)
    base_us = _least_step_us(request, costs, max(sharing), longest)
    return own_us + empty_us / sharing[0] + base_us * sum(1 / count for count in sharing[1:])


def _grid(values: Sequence[int]) -> list[int]:
    ordered = sorted(set(values))
    step = max(1, len(ordered) // NUM_WINDOWS)
    return sorted({*ordered[::step], *ordered[-1:]})
