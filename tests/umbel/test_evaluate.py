"""Held-out errors against sums written out."""

import math

import numpy as np
import pytest

from common.families import FAMILIES
from tests.populations import draw_model, draw_users, population_of
from tests.reference import User
from umbel import evaluate
from umbel.evaluate import HeldOut, held_out_error, paired_difference, range_name

SQUARED, LOGISTIC = FAMILIES["squared"], FAMILIES["logistic"]


def one_feature(*targets):
    """A user for each list of targets, with x = 1 throughout."""
    return population_of([User(X=np.ones((len(y), 1)), y=np.array(y, float), weight=np.ones(len(y))) for y in targets])


def test_errors_written_out():
    """Each user's parameters on its own examples; users without any count for nothing."""
    test = one_feature([1.0, 3.0], [], [5.0])
    train = one_feature([0.0] * 9, [0.0] * 10, [0.0] * 120)
    held_out = held_out_error(np.array([[1.0], [9.0], [2.0]]), test, train, SQUARED)
    assert held_out.loss.tolist() == [4.0, 0.0, 9.0]
    assert held_out.count.tolist() == [2.0, 0.0, 1.0]
    assert held_out.error() == pytest.approx(math.sqrt(13 / 3))
    assert held_out.by_examples() == {
        "0-9": pytest.approx(math.sqrt(2)), "10-29": None, "30-99": None, "100+": 3.0,
    }  # fmt: skip
    assert held_out.summary()["overall"] == held_out.error()


def test_one_model_for_all():
    """A single vector scores everybody."""
    test = one_feature([1.0], [3.0])
    assert held_out_error(np.array([2.0]), test, test, SQUARED).loss.tolist() == [1.0, 1.0]


def test_logistic_error_is_the_mean_log_loss():
    """No root, and finite at any margin."""
    test = one_feature([1.0, 0.0], [1.0])
    held_out = held_out_error(np.array([[0.0], [-1e4]]), test, test, LOGISTIC)
    assert held_out.error() == pytest.approx((2 * math.log(2) + 1e4) / 3)
    assert held_out.metric == "log_loss"


def test_rows_are_scored_in_blocks(monkeypatch):
    """However many rows at once, every example is scored once and for its own user."""
    rng = np.random.default_rng(0)
    model = draw_model(rng, 3, 1)
    users = draw_users(rng, model, (5, 0, 7, 1, 12))
    population, theta = population_of(users), rng.standard_normal((5, 3))
    expected = [float(((user.y - user.X @ theta[i]) ** 2).sum()) for i, user in enumerate(users)]
    for rows in (1, 3, 25, 1000):
        monkeypatch.setattr(evaluate, "_ROWS_AT_ONCE", rows)
        np.testing.assert_allclose(held_out_error(theta, population, population, SQUARED).loss, expected)


def test_range_names():
    """As results and report print them."""
    assert [range_name(low, high) for low, high in evaluate.EXAMPLE_RANGES] == ["0-9", "10-29", "30-99", "100+"]


def test_every_user_is_in_one_range():
    """Ranges neither overlap nor leave a gap."""
    counts = np.arange(300.0)
    held_out = HeldOut(metric="rmse", loss=np.ones(300), count=np.ones(300), train_count=counts)
    inside = [held_out._in_range(low, high) for low, high in evaluate.EXAMPLE_RANGES]
    assert np.sum(inside, axis=0).tolist() == [1] * 300


@pytest.mark.parametrize("metric", ["rmse", "log_loss"])
def test_standard_error_is_that_of_a_ratio_over_users(metric):
    """The linearized error agrees with a bootstrap over users, to a tenth."""
    rng = np.random.default_rng(1)
    count = rng.integers(1, 20, 400).astype(float)
    loss = count * rng.exponential(size=400)
    held_out = HeldOut(metric=metric, loss=loss, count=count, train_count=count)
    draws = rng.integers(0, 400, (2000, 400))
    means = loss[draws].sum(axis=1) / count[draws].sum(axis=1)
    errors = np.sqrt(means) if metric == "rmse" else means
    assert held_out.standard_error() == pytest.approx(errors.std(), rel=0.1)


def test_nothing_held_out_is_none():
    """No held-out example: there is no error to give, nor its standard error."""
    empty = one_feature([], [])
    held_out = held_out_error(np.zeros((2, 1)), empty, one_feature([1.0], [1.0]), SQUARED)
    assert held_out.error() is None
    assert held_out.standard_error() is None
    assert set(held_out.by_examples().values()) == {None}


def test_a_perfect_model_has_error_zero():
    """Zero loss is an error of 0 with a standard error of 0."""
    test = one_feature([1.0], [1.0])
    held_out = held_out_error(np.array([1.0]), test, test, SQUARED)
    assert held_out.error() == 0.0
    assert held_out.standard_error() == 0.0


def held_out(metric, loss):
    n = len(loss)
    return HeldOut(metric=metric, loss=np.array(loss, float), count=np.full(n, 2.0), train_count=np.zeros(n))


@pytest.mark.parametrize("metric", ["rmse", "log_loss"])
def test_paired_difference_is_of_the_errors(metric):
    """Ours less theirs; where both err alike on every user the standard error is zero."""
    ours, theirs = held_out(metric, [2.0, 8.0]), held_out(metric, [4.0, 6.0])
    same = paired_difference(ours, ours)
    assert (same["difference"], same["standard_error"]) == (0.0, 0.0)
    there, back = paired_difference(ours, theirs), paired_difference(theirs, ours)
    assert there["difference"] == pytest.approx((ours.error() or 0) - (theirs.error() or 0))
    assert back["difference"] == pytest.approx(-(there["difference"] or 0))
    assert (there["standard_error"] or 0) > 0


def test_pairing_is_narrower_than_two_errors():
    """A difference that every user shares is known better than either error, and agrees with a bootstrap."""
    rng = np.random.default_rng(2)
    base = rng.exponential(size=500) * 2
    ours, theirs = held_out("rmse", base), held_out("rmse", base + 0.1 + 0.02 * rng.standard_normal(500))
    found = paired_difference(ours, theirs)["standard_error"] or 0
    assert found < (ours.standard_error() or 0) / 5
    draws = rng.integers(0, 500, (2000, 500))
    errors = [np.sqrt(one.loss[draws].sum(axis=1) / one.count[draws].sum(axis=1)) for one in (ours, theirs)]
    assert found == pytest.approx((errors[0] - errors[1]).std(), rel=0.1)


def test_a_difference_without_examples_or_errors_is_no_crash():
    """Nothing held out gives None; perfect predictions give 0."""
    nothing = HeldOut(metric="rmse", loss=np.zeros(1), count=np.zeros(1), train_count=np.zeros(1))
    assert paired_difference(nothing, nothing) == {"difference": None, "standard_error": None}
    perfect = held_out("rmse", [0.0, 0.0])
    assert paired_difference(perfect, perfect) == {"difference": 0.0, "standard_error": 0.0}
