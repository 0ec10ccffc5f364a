"""Guesses go where they pay, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest

from pace_nb.engine.draft_lengths import PROBE_EVERY, SKIPPED, DraftLengths, LinearCost


def lengths_with(target, draft=(0.0, 0.0)):
    """DraftLengths that have measured seconds = fixed + per_row * rows of both."""
    lengths = DraftLengths()
    for cost, (fixed, per_row) in ((lengths.target, target), (lengths.draft, draft)):
        for rows in [1] * SKIPPED + [1, 5, 9, 30]:
            cost.observe(rows, fixed + per_row * rows)
    return lengths


def told(lengths, request, held, drafted=10, times=30):
    for _ in range(times):
        lengths.verified(request, drafted, held)


def test_costs_are_fitted():
    random, cost = np.random.default_rng(1), LinearCost()
    assert not cost.known
    for _ in range(200):
        rows = int(random.integers(1, 60))
        cost.observe(rows, (3 + 0.1 * rows) * random.uniform(0.95, 1.05))
    assert cost.known
    assert cost.fixed == pytest.approx(3, rel=0.1)
    assert cost.per_row == pytest.approx(0.1, rel=0.15)
    cost.observe(10, 1000.0)  # an interruption
    assert cost.fixed + 10 * cost.per_row < 6


def test_costs_of_one_number_of_rows_are_all_fixed():
    cost = LinearCost()
    for _ in range(10):
        cost.observe(7, 2.0)
    assert (cost.fixed, cost.per_row) == pytest.approx((2.0, 0.0))


def test_steps_of_one_size_do_not_change_what_a_row_costs():
    cost = LinearCost()
    for rows in [1, 1, 5, 9, 30] * 10:
        cost.observe(rows, 3 + 0.1 * rows)
    random = np.random.default_rng(1)
    for _ in range(500):  # of which each says something else by chance
        cost.observe(30, 6 * random.uniform(0.9, 1.1))
    assert not cost.varied
    assert (cost.fixed, cost.per_row) == pytest.approx((3.0, 0.1), rel=0.1)


def test_a_step_without_guesses_tells_what_they_cost(scripted):
    """31 requests that always guess 12: all steps have 403 rows, until one goes without."""
    requests, lengths = [scripted.request(str(i), [1]) for i in range(31)], DraftLengths()
    sums = []
    for _ in range(200):
        sums.append(sum(lengths.choose(requests, [12] * 31)))
        for request in requests:
            lengths.verified(request, 12, 12)
        lengths.target.observe(31 + sums[-1], 1 + 0.001 * (31 + sums[-1]))
    assert sums[0] == 31 and lengths.target.per_row == pytest.approx(0.001, rel=0.01)
    assert 1 <= sums.count(0) <= 10 and sums.count(372) > 180


def test_where_nothing_holds_one_guess_is_tried_now_and_then(scripted):
    request, lengths = scripted.request("0", [1]), lengths_with((1.0, 0.3))
    told(lengths, request, 0)
    chosen = [lengths.choose([request], [12])[0] for _ in range(2 * PROBE_EVERY)]
    assert [i + 1 for i, n in enumerate(chosen) if n] == [4, 12, 28, 60, 124]
    told(lengths, request, 10)  # better times
    assert lengths.choose([request], [12])[0] > 3


def test_everything_is_tried_before_anything_is_known(scripted):
    request = scripted.request("0", [1])
    assert DraftLengths().choose([request], [12]) == [12]


def test_rows_that_cost_nothing_are_all_taken(scripted):
    request = scripted.request("0", [1])
    assert lengths_with((1.0, 0.0)).choose([request], [12]) == [12]


def test_who_is_guessed_right_gets_more(scripted):
    lucky, unlucky = scripted.request("0", [1]), scripted.request("1", [1])
    lengths = lengths_with((1.0, 0.05))
    told(lengths, lucky, 10)
    told(lengths, unlucky, 0)
    more, fewer = lengths.choose([lucky, unlucky], [12, 12])
    assert lengths.acceptance(lucky) > 0.9 and lengths.acceptance(unlucky) < 0.2
    assert more == 12 and fewer <= 1
    lengths.forget(unlucky)
    assert lengths.acceptance(unlucky) > 0.3  # that of all


@pytest.mark.parametrize("acceptance_of", [0, 2, 5, 9])
@pytest.mark.parametrize("per_row", [0.001, 0.02, 0.1, 0.3])
def test_the_choice_is_the_best_there_is(scripted, per_row, acceptance_of):
    """Against all numbers of guesses, for one request, by the formula."""
    request = scripted.request("0", [1])
    lengths = lengths_with((1.0, per_row), (0.2, per_row / 5))
    told(lengths, request, acceptance_of)
    a = lengths.acceptance(request)

    def rate(k):
        draft = 0.2 + per_row / 5 * (1 + k) if k else 0.0
        return sum(a**i for i in range(k + 1)) / (1.0 + per_row * (1 + k) + draft)

    (chosen,) = lengths.choose([request], [12])
    assert rate(chosen) == pytest.approx(max(rate(k) for k in range(13)), rel=1e-6)


def test_with_many_requests_guesses_turn_themselves_down(scripted):
    """A step whose rows cost: alone they are worth it, among 32 they are not."""
    requests = [scripted.request(str(i), [1]) for i in range(32)]
    lengths = lengths_with((1.0, 0.2), (0.5, 0.02))
    for request in requests:
        told(lengths, request, 7)
    assert lengths.choose(requests[:1], [12])[0] >= 3
    assert lengths.choose(requests, [12] * 32) == [0] * 32
    probes = [any(lengths.choose(requests, [12] * 32)) for _ in range(4 * PROBE_EVERY)]
    assert sum(probes[-PROBE_EVERY:]) == 1 and sum(probes[:PROBE_EVERY]) == 4
