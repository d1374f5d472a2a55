"""The server's half of AMHT-LRS: solving for U, the noise edge, where U starts, distances."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.linalg import unsvec
from server.least_squares import (
    floor_eigenvalues,
    leading_directions,
    noise_edge,
    orthonormal,
    random_directions,
    solve_for_U,
    subspace_distance,
    unvec,
    vec,
)
from tests import reference_amht


def problem(seed: int, d: int, r: int, num_users: int = 40):
    """Sums of statistics of users with theta = U w, and that U."""
    population = reference_amht.planted(seed, num_users=num_users, num_examples=2 * d, d=d, r=r, k=0)
    fits = [(population.U.T @ theta, np.zeros(d)) for theta in population.theta]
    parts = [reference_amht.statistics(user, *found) for user, found in zip(population.users, fits, strict=True)]
    return sum(A for A, _ in parts), sum(V for _, V in parts), population, fits


def noised(A, V, stddev, rng):
    """Noise of that standard deviation on each coordinate of svec(A), and on V."""
    p = len(V)
    return A + unsvec(stddev * rng.standard_normal((1, p * (p + 1) // 2)), p)[0], V + stddev * rng.standard_normal(p)


def test_vec_goes_by_columns_and_back():
    """The first column comes first."""
    U = np.array([[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
    assert vec(U).tolist() == [1, 2, 3, 4, 5, 6]
    assert np.array_equal(unvec(vec(U), 3, 2), U)


def test_U_solves_the_normal_equations():
    """Against the algorithm written out, with Gram-Schmidt; U'U = I to 1e-12; the planted space is found."""
    for seed, (d, r) in enumerate([(6, 2), (5, 1), (4, 4)]):
        A, V, population, fits = problem(seed, d, r)
        U = solve_for_U(A, V, d, r)
        np.testing.assert_allclose(U, reference_amht.new_U(population.users, fits, r), atol=1e-8)
        assert np.abs(U.T @ U - np.eye(r)).max() <= 1e-12
        assert subspace_distance(population.U, U) < 1e-10


def test_by_rows_it_would_not_be_found():
    """Solving for vec by rows with the same A ends elsewhere: the trap of the only public implementation."""
    A, V, population, _ = problem(0, 6, 2)
    by_rows = np.linalg.solve(A, unvec(V, 6, 2).ravel()).reshape(6, 2)
    assert subspace_distance(population.U, by_rows) > 0.1


@given(seed=st.integers(0, 2**32), d=st.integers(1, 7), scale=st.sampled_from([0.0, 1e-9, 1.0, 1e9]))
@settings(max_examples=40, deadline=None)
def test_any_sums_give_orthonormal_columns(seed, d, scale):
    """Indefinite, singular or zero A, any V, any noise: U'U = I to 1e-12, the same U every time."""
    rng = np.random.default_rng(seed)
    r = int(rng.integers(1, d + 1))
    A = rng.standard_normal((d * r, d * r)) * scale
    A, V = A + A.T, rng.standard_normal(d * r) * rng.choice([0.0, 1.0])
    for noise_stddev in (0.0, 0.3):
        U = solve_for_U(A, V, d, r, noise_stddev=noise_stddev)
        assert np.abs(U.T @ U - np.eye(r)).max() <= 1e-12
        assert np.array_equal(U, solve_for_U(A, V, d, r, noise_stddev=noise_stddev))


def test_eigenvalues_are_raised_to_the_floor():
    """Those below, and only those; eigenvectors stay."""
    Q = np.linalg.qr(np.random.default_rng(0).standard_normal((4, 4)))[0]
    A = Q @ np.diag([-3.0, 0.5, 2.0, 7.0]) @ Q.T
    np.testing.assert_allclose(floor_eigenvalues(A, 1.0), Q @ np.diag([1.0, 1.0, 2.0, 7.0]) @ Q.T, atol=1e-12)


@pytest.mark.parametrize("p", [60, 240])
def test_the_noise_edge_is_where_the_spectrum_of_noise_ends(p):
    """The largest eigenvalue of svec noise comes within 10 % of the edge, from either side, at every seed."""
    rng = np.random.default_rng(p)
    largest = []
    for _ in range(8):
        noise, _ = noised(np.zeros((p, p)), np.zeros(p), 0.7, rng)
        assert np.std(noise[np.triu_indices(p, 1)]) == pytest.approx(0.7 / np.sqrt(2), rel=0.1)
        largest.append(np.linalg.eigvalsh(noise)[-1])
    np.testing.assert_allclose(largest, noise_edge(0.7, p), rtol=0.1)


def test_the_floor_keeps_noise_from_being_divided_by():
    """With noise as large as the smaller half of A's spectrum, the median distance of U is smaller with the floor."""
    d, r = 10, 2
    A, V, population, _ = problem(3, d, r)
    stddev = np.median(np.linalg.eigvalsh(A)) / noise_edge(1.0, d * r)
    with_floor, without = [], []
    for seed in range(40):
        noisy_A, noisy_V = noised(A, V, stddev, np.random.default_rng(seed))
        U = solve_for_U(noisy_A, noisy_V, d, r, noise_stddev=stddev)
        expected = orthonormal(
            unvec(np.linalg.solve(floor_eigenvalues(noisy_A, 2 * noise_edge(stddev, d * r)), noisy_V), d, r)
        )
        np.testing.assert_allclose(U, expected, atol=1e-8)
        with_floor.append(subspace_distance(population.U, U))
        without.append(subspace_distance(population.U, solve_for_U(noisy_A, noisy_V, d, r)))
    assert np.median(with_floor) < 0.8 * np.median(without)


def test_leading_directions_are_mapped_back():
    """For features of second moment S, whitened by W, the span of the thetas comes out, by the largest eigenvalues."""
    rng = np.random.default_rng(4)
    S = np.cov(rng.standard_normal((6, 20)))
    W = np.linalg.inv(np.linalg.cholesky(S))  # not symmetric: its transpose is what maps back
    theta = rng.standard_normal((6, 2))
    moment = W @ S @ theta @ theta.T @ S @ W.T
    found = leading_directions(moment, 2, W.T)
    assert subspace_distance(theta, found) < 1e-8
    assert np.abs(found.T @ found - np.eye(2)).max() <= 1e-12
    # a large negative eigenvalue, as noise may give, leads nowhere
    negative = np.diag([1.0, 2.0, -50.0])
    assert np.abs(leading_directions(negative, 1, np.eye(3))[:, 0]).tolist() == [0, 1, 0]


def test_random_directions_are_orthonormal_and_uniform():
    """Columns of unit length; over many draws no coordinate is preferred."""
    rng = np.random.default_rng(5)
    draws = np.stack([random_directions(5, 2, rng) for _ in range(2000)])
    assert np.abs(draws.transpose(0, 2, 1) @ draws - np.eye(2)).max() <= 1e-12
    np.testing.assert_allclose((draws**2).mean(axis=0), 0.2, atol=0.03)
    np.testing.assert_allclose(draws.mean(axis=0), 0.0, atol=0.06)


@given(angles=st.lists(st.floats(0, np.pi / 2), min_size=1, max_size=3), seed=st.integers(0, 2**32))
@settings(max_examples=50, deadline=None)
def test_distance_is_the_sine_of_principal_angles(angles, seed):
    """Planes turned by known angles, in any basis: the largest sine, and the root of the sum of squares."""
    rng = np.random.default_rng(seed)
    r = len(angles)
    Q = np.linalg.qr(rng.standard_normal((2 * r + 1, 2 * r + 1)))[0]
    first, second = Q[:, :r], Q[:, r : 2 * r]
    turned = first * np.cos(angles) + second * np.sin(angles)
    mixed = turned @ (rng.standard_normal((r, r)) + 3 * np.eye(r))
    if np.linalg.cond(mixed) > 1e6:
        return
    assert subspace_distance(first, mixed) == pytest.approx(np.max(np.sin(angles)), abs=1e-8)
    assert subspace_distance(mixed, first) == pytest.approx(np.max(np.sin(angles)), abs=1e-8)
    assert subspace_distance(first, mixed, norm="frobenius") == pytest.approx(np.linalg.norm(np.sin(angles)), abs=1e-8)
