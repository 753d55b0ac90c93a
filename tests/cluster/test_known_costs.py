"""Whose word counts for what a model's steps cost: a worker's own once it has seen enough, until then that of its like."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polymux.cluster.known_costs import ENOUGH_STEPS, KnownCosts, Measured
from polymux.disagg.dispatch import Coefficients
from polymux.transport.units import ModelName

A, B = ModelName("a"), ModelName("b")
GUESS: Coefficients = (1.0, 0.0, 0.0)


def cost(base_s: float) -> Coefficients:
    return base_s, 0.1, 0.0


def known() -> KnownCosts:
    costs = KnownCosts()
    costs.guess(A, GUESS)
    return costs


def reported(costs: KnownCosts, base_s: float, num_steps: int, kind: str = "cpu") -> Coefficients:
    return costs.report(kind, {A: Measured(cost(base_s), num_steps)})[A]


def test_a_guess_is_believed_until_somebody_has_measured() -> None:
    costs = known()
    assert costs.of("cpu") == {A: GUESS}
    assert reported(costs, 7.0, 0) == GUESS  # its own guess is no better
    assert reported(costs, 3.0, 1) == cost(3.0)
    assert costs.of("cpu") == {A: cost(3.0)}


def test_a_worker_that_has_seen_little_counts_as_the_most_experienced_of_its_kind() -> None:
    costs = known()
    assert reported(costs, 3.0, 200) == cost(3.0)
    assert reported(costs, 9.0, 4) == cost(3.0)
    assert reported(costs, 9.0, ENOUGH_STEPS - 1) == cost(3.0)
    assert reported(costs, 9.0, ENOUGH_STEPS) == cost(9.0)  # it is a slower one
    assert reported(costs, 3.0 * 1.05, ENOUGH_STEPS) == cost(3.0)  # or measured a little otherwise: that decides nothing
    assert costs.of("cpu") == {A: cost(3.0)}


def test_another_kind_of_device_is_another_matter() -> None:
    costs = known()
    reported(costs, 3.0, 200)
    assert costs.of("gpu") == {A: GUESS}
    assert reported(costs, 0.5, 2, "gpu") == cost(0.5)
    assert costs.of("cpu") == {A: cost(3.0)}


def test_what_cannot_be_a_cost_and_models_that_nobody_knows_are_passed_over() -> None:
    costs = known()
    assert costs.report("cpu", {A: Measured((-1.0, 0.0, 0.0), 50), B: Measured(cost(1.0), 50)}) == {}
    assert costs.of("cpu") == {A: GUESS}


@given(st.lists(st.tuples(st.floats(0.001, 10.0), st.integers(0, 100)), min_size=1, max_size=20))
def test_what_is_taken_was_said_by_the_worker_or_by_one_that_has_seen_more(reports: list[tuple[float, int]]) -> None:
    costs, said = known(), {GUESS: 0}
    for base_s, num_steps in reports:
        taken = reported(costs, base_s, num_steps)
        assert taken == cost(base_s) or said[taken] > num_steps or (num_steps == 0 and said[taken] == 0)
        said[cost(base_s)] = max(num_steps, said.get(cost(base_s), 0))
