"""Whose word counts for what a model's steps cost: a worker's own once it has seen enough, until then that of its like."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from polymux.cluster.known_costs import DRIFT, ENOUGH_STEPS, TELLING, KnownCosts, KnownSpeeds, Measured
from polymux.disagg.cost import DECODE_ANCHORS, dot
from polymux.disagg.dispatch import Coefficients
from polymux.transport.units import ModelName, WorkerId

A, B = ModelName("a"), ModelName("b")
ONE, OTHER, THIRD = (WorkerId(name) for name in ("one", "other", "third"))
GUESS: Coefficients = (1.0, 0.0, 0.0)


def cost(base_s: float) -> Coefficients:
    return base_s, 0.01, 0.0


def known() -> KnownCosts:
    costs = KnownCosts(DECODE_ANCHORS)
    costs.guess(A, GUESS)
    return costs


def reported(costs: KnownCosts, worker_id: WorkerId, base_s: float, num_steps: int, kind: str = "cpu") -> Coefficients:
    """What the worker's steps are taken to cost after its report."""
    costs.report(kind, worker_id, {A: Measured(cost(base_s), num_steps)})
    return costs.of(kind, worker_id)[A]


def test_a_guess_is_believed_until_somebody_has_measured() -> None:
    costs = known()
    assert costs.of("cpu", ONE) == {A: GUESS}
    assert reported(costs, ONE, 7.0, 0) == GUESS  # its own guess is no better
    assert reported(costs, ONE, 3.0, 1) == cost(3.0)
    assert costs.of("cpu", OTHER) == {A: cost(3.0)}


def test_a_worker_that_has_seen_little_counts_as_the_most_experienced_of_its_kind() -> None:
    costs = known()
    assert reported(costs, ONE, 3.0, 200) == cost(3.0)
    assert reported(costs, OTHER, 9.0, 4) == cost(3.0)
    assert reported(costs, OTHER, 9.0, ENOUGH_STEPS - 1) == cost(3.0)
    assert reported(costs, OTHER, 9.0, ENOUGH_STEPS) == cost(9.0)  # it is a slower one
    assert reported(costs, OTHER, 3.0 * 1.05, ENOUGH_STEPS) == cost(3.0)  # or measured a little otherwise: that decides nothing
    assert costs.of("cpu", THIRD) == {A: cost(3.0)}


def test_a_slower_worker_that_has_seen_more_speaks_for_itself_alone() -> None:
    costs = known()
    reported(costs, ONE, 3.0, ENOUGH_STEPS)
    assert reported(costs, OTHER, 9.0, 10 * ENOUGH_STEPS) == cost(9.0)
    assert costs.of("cpu", ONE)[A] == costs.of("cpu", THIRD)[A] == cost(3.0)


def test_fits_that_part_only_at_batches_that_nobody_has_run_are_of_one_device() -> None:
    costs = known()
    costs.report("cpu", ONE, {A: Measured((3.56, 0.23, 0.0), 100)})
    costs.report("cpu", OTHER, {A: Measured((2.89, 0.73, 0.0), 100)})  # the same at two sequences, 1.6 times at eight
    assert costs.of("cpu", OTHER) is costs.of("cpu", ONE)


def test_a_word_holds_for_all_until_much_more_is_known_or_the_machine_has_changed() -> None:
    costs = known()
    assert reported(costs, ONE, 3.0, 100) == cost(3.0)
    shared = costs.of("cpu", OTHER)
    assert reported(costs, ONE, 3.1, 120) == cost(3.0)  # a little more, and a little else
    assert costs.of("cpu", ONE) is costs.of("cpu", OTHER) is shared
    assert reported(costs, ONE, 3.1, 150) == costs.of("cpu", OTHER)[A] == cost(3.1)
    assert reported(costs, ONE, 3.1 * DRIFT * 1.1, 151) == costs.of("cpu", OTHER)[A] == cost(3.1 * DRIFT * 1.1)


def test_what_a_worker_said_that_is_gone_holds_until_another_has_measured_enough() -> None:
    costs = known()
    reported(costs, ONE, 3.0, 1000)
    costs.forget(ONE)
    assert costs.of("cpu", OTHER)[A] == cost(3.0)
    assert reported(costs, OTHER, 5.0, ENOUGH_STEPS - 1) == cost(3.0)
    assert reported(costs, OTHER, 5.0, ENOUGH_STEPS) == costs.of("cpu", THIRD)[A] == cost(5.0)


def test_another_kind_of_device_is_another_matter() -> None:
    costs = known()
    reported(costs, ONE, 3.0, 200)
    assert costs.of("gpu", OTHER) == {A: GUESS}
    assert reported(costs, OTHER, 0.5, 2, "gpu") == cost(0.5)
    assert costs.of("cpu", ONE) == {A: cost(3.0)}


def test_what_cannot_be_a_cost_and_models_that_nobody_knows_are_passed_over() -> None:
    costs = known()
    assert not costs.report("cpu", ONE, {A: Measured((-1.0, 0.0, 0.0), 50), B: Measured(cost(1.0), 50)})
    assert costs.of("cpu", ONE) == {A: GUESS}


def test_a_model_that_comes_later_is_guessed_everywhere() -> None:
    costs = known()
    reported(costs, ONE, 3.0, 200)
    costs.guess(B, GUESS)
    assert costs.of("cpu", ONE) == {A: cost(3.0), B: GUESS}
    assert costs.of("gpu", OTHER) == {A: GUESS, B: GUESS}


Reports = st.lists(st.tuples(st.sampled_from([ONE, OTHER, THIRD]), st.floats(0.5, 10.0), st.integers(0, 100)), min_size=1, max_size=20)


@given(Reports)
def test_alike_workers_cost_alike_to_the_last_digit_but_for_one_that_is_known_to_be_other(
    reports: list[tuple[WorkerId, float, int]],
) -> None:
    costs, said = known(), {GUESS}
    for worker_id, base_s, num_steps in reports:
        said.add(cost(base_s))
        taken = reported(costs, worker_id, base_s, num_steps)
        shared = costs.of("cpu", WorkerId("new"))[A]
        assert {taken, shared} <= said
        if taken != shared:
            ratios = [dot(taken, size) / dot(shared, size) for size in DECODE_ANCHORS]
            assert taken == cost(base_s) and num_steps >= ENOUGH_STEPS and (min(ratios) > TELLING or max(ratios) < 1 / TELLING)


def test_switches_are_as_fast_as_alike_workers_say_on_the_mean_and_the_same_for_all() -> None:
    speeds = KnownSpeeds()
    guess = speeds.of("cpu")
    assert not speeds.report("cpu", ONE, 0.0) and speeds.of("cpu") == guess  # it has copied nothing yet
    assert speeds.report("cpu", ONE, 10e9) and speeds.of("cpu") == 10e9
    assert not speeds.report("cpu", OTHER, 11e9) and speeds.of("cpu") == 10e9
    assert speeds.report("cpu", OTHER, 20e9) and speeds.of("cpu") == 15e9
    assert speeds.of("gpu") == guess
    speeds.forget(OTHER)
    assert speeds.report("cpu", ONE, 10e9) and speeds.of("cpu") == 10e9
