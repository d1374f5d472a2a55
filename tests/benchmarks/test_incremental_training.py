"""What the benchmark of starts from released models makes of its curves."""

import pytest

from benchmarks.incremental_training import ROUNDS, curves, markdown, problem, row
from privacy.gaussian import epsilon_of_mu


def cells(nothing, released, data="ratings"):
    common = {"data": data, "epsilon": 1.0, "noise_multiplier": "4"}
    return [{**common, "start": "nothing", "errors": nothing}, {**common, "start": "released", "errors": released}]


def test_rounds_and_epsilon_to_the_goal():
    """The first round within .0005 of where the run from nothing ends, and what the rounds up to there cost."""
    nothing = [2.0 - 0.1 * t for t in range(ROUNDS + 1)]
    found = row(cells(nothing, [1.2, 1.1, 1.0004, *[0.9] * (ROUNDS - 2)]))
    assert found["rounds"] == {"nothing": ROUNDS, "released": 2}
    assert found["spent"]["released"] == pytest.approx(epsilon_of_mu(2**0.5 / 4, 1e-6))
    assert found["with_first_run"] == pytest.approx(epsilon_of_mu(12**0.5 / 4, 1e-6))
    never = row(cells(nothing, [1.2] * (ROUNDS + 1)))
    assert (never["rounds"]["released"], never["with_first_run"]) == (None, None)
    table = markdown([found, never])
    assert "| 2 |" in table
    assert "more than 10" in table


def test_a_problem_has_half_of_the_examples_before():
    """Earlier examples are about half of those that train, of the same users."""
    given = problem("synthetic", 0)
    assert given.earlier.users == given.train.users
    assert 0.48 < given.earlier.num_examples / given.train.num_examples < 0.52


def test_both_runs_are_followed(monkeypatch):
    """A point before and after each round; the one that goes on starts from the released model's error."""
    monkeypatch.setattr("benchmarks.incremental_training.ROUNDS", 2)
    nothing, released = curves(problem("synthetic", 1), 8.0, 1)
    assert (nothing["start"], released["start"]) == ("nothing", "released")
    assert len(nothing["errors"]) == len(released["errors"]) == 3
    assert released["errors"][0] < nothing["errors"][0]
