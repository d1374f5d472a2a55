"""The recovery benchmark in miniature: what its tables claim holds on populations that take seconds."""

from dataclasses import replace

import numpy as np
import pytest

from benchmarks.recovery import (
    ITERATIONS,
    Plan,
    Setting,
    draw,
    first_U,
    inside,
    learn,
    measure_convergence,
    measure_new_users,
    measure_prediction,
    measure_solver,
    measure_start,
    measure_steps,
    measure_storage,
    measure_vec,
    relative_error,
    run_jobs,
)
from server.least_squares import subspace_distance

SMALL = Setting(users=300, examples=40, noise=0.0, dimension=20, rank=2, sparsity=2)
NOISY = replace(SMALL, noise=0.1)


def test_what_is_planted_has_the_rank_the_sparsity_and_the_noise():
    """U is orthonormal, theta - b lies along it, b has k nonzeros, and y is x'theta plus noise."""
    planted = draw(NOISY, 0)
    np.testing.assert_allclose(planted.U.T @ planted.U, np.eye(2), atol=1e-12)
    low_rank = planted.theta - planted.b
    np.testing.assert_allclose(low_rank @ planted.U @ planted.U.T, low_rank, atol=1e-12)
    assert ((planted.b != 0).sum(axis=1) == 2).all()
    noise = planted.y - (planted.X @ planted.theta[:, :, None])[:, :, 0]
    # normal errors: six standard errors of their deviation
    assert abs(noise.std() - 0.1) < 6 * 0.1 / np.sqrt(2 * noise.size)


def test_noiseless_recovery_goes_to_rounding():
    """U within 1e-6 and every second user within 1e-6 after the last iteration, from a start far away."""
    (found,) = measure_convergence(SMALL, 0)
    assert found["distance"][0] > 0.1
    assert found["distance"][ITERATIONS] < 1e-6
    assert found["median_error"] < 1e-6


def test_noise_leaves_a_floor():
    """With noise U stops at a distance that more iterations do not change."""
    (found,) = measure_convergence(NOISY, 0)
    last, before = found["distance"][ITERATIONS], found["distance"][ITERATIONS - 3]
    assert last == pytest.approx(before, rel=0.1)
    assert 1e-3 < last < 0.1


def test_pursuit_recovers_more_users_than_thresholding_where_examples_are_few():
    """At fewer than half as many examples as features, picking greedily beats the published alternation by far."""
    few = Setting(users=100, examples=12, noise=0.05, dimension=30, rank=2, sparsity=2)
    recovered = {solver: measure_solver(few, 0, solver)[0]["recovered"] for solver in ("alternation", "pursuit")}
    assert recovered["pursuit"] > recovered["alternation"] + 0.2


def test_pair_moments_start_closer_than_moments_and_both_than_random():
    """And from each start the last iteration comes to the same place."""
    near, moments, far = measure_start(SMALL, 0)
    assert near["start_distance"] < moments["start_distance"] < far["start_distance"]
    assert max(record["distance"] for record in (near, moments)) < 1e-6


def test_vec_read_by_rows_is_garbage():
    """One iteration with the wrong vec leaves U as far away as a random one; the right one comes closer."""
    right, wrong = measure_vec(SMALL, 0)
    assert right["distance"][1] < right["distance"][0] < 0.7 < wrong["distance"][1]


def test_the_constant_step_diverges_where_the_normalised_one_converges():
    """With half as many examples as features most users blow up under the step 1 / m."""
    constant, normalised = measure_steps(replace(SMALL, examples=8), 0)
    assert constant["diverged"] > 0.5
    assert normalised["diverged"] == 0


def test_new_users_do_as_well_as_those_who_trained():
    """Noiseless, both are exact under a frozen U, and a user with too few examples is not."""
    records = measure_new_users(SMALL, 0, (4, 40))
    errors = {(r["trained"], r["m"]): r["median_error"] for r in records if r["method"] == "learned U"}
    assert errors[True, 40] < 1e-6
    assert errors[False, 40] < 1e-6
    assert errors[False, 4] > 0.1


def test_prediction_reaches_the_noise_and_zero_has_the_spread_of_y():
    """Both parts of the model are needed: without b the error is most of what there is."""
    rmse = {record["method"]: record["rmse"] for record in measure_prediction(NOISY, 0)}
    assert NOISY.noise < rmse["AMHT-LRS, pursuit"] < 1.3 * NOISY.noise
    assert rmse["true U without b"] > 1
    assert rmse["zero"] == pytest.approx(NOISY.spread, rel=0.15)


def test_storage_counts_parameters():
    """P of a network by hand, and the ratio is P over what is kept."""
    records = {record["model"]: record for record in measure_storage()}
    small = records["network 27-64-1, last layer"]
    assert small["P"] == 27 * 64 + 64 + 64 + 1
    assert small["numbers"] == 1 + 2 * 5
    assert all(record["ratio"] == record["P"] / record["numbers"] for record in records.values())


def test_a_target_is_inside_only_near_the_measurements():
    """Three standard deviations, widened for the mean's own error; one measurement says nothing."""
    assert inside([1.0, 2.0, 3.0], 5.4, rounding=0.0) == "inside"
    assert inside([1.0, 2.0, 3.0], 5.6, rounding=0.0) == "OUTSIDE"
    assert inside([1.0], 1.0, rounding=0.0) == "?"


def test_a_solver_that_is_given_the_truth_stays_there():
    """The true U is a fixed point without noise."""
    planted = draw(SMALL, 1)
    U = learn(planted, planted.U, SMALL.pursuit(), iterations=2)[-1]
    assert subspace_distance(planted.U, U, norm="frobenius") < 1e-8


def test_relative_error_is_of_each_user():
    """Zero for the truth, one for zeros."""
    planted = draw(SMALL, 0)
    assert not relative_error(planted, planted.theta).any()
    np.testing.assert_allclose(relative_error(planted, np.zeros_like(planted.theta)), 1)


def test_random_start_depends_on_the_seed():
    """Two seeds, two subspaces."""
    planted = draw(SMALL, 0)
    assert subspace_distance(first_U(planted, "random", 0), first_U(planted, "random", 1)) > 0.1


def test_every_measurement_is_a_line_that_says_what_was_planted():
    """Records have their table, setting and seed, and are written as they are made."""
    plan = Plan(seeds=0, slow_seeds=0, users=10, examples=())
    written = []
    records = run_jobs(plan, None, written.append)
    assert written == records
    steps = [record for record in records if record["table"] == "step"]
    assert all({"users", "examples", "noise", "seed", "method"} <= set(record) for record in steps)
