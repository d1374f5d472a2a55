"""Iterative hard thresholding against the plain version, and where its step matters."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.batches import gram_of
from client.thresholding import Sparse, Thresholds, keep_largest, sparse_part
from tests import reference_amht
from tests.populations import design, torch_batch
from tests.reference import User
from tests.reference_amht import planted, rows

SCHEDULE = Thresholds(alpha=0.01, beta=0.5, gamma=1.5, c1=0.35)


def part(users: list[User], fixed: np.ndarray, *, in_gram_form: bool = False, **options) -> Sparse:
    batch = gram_of(design(users)) if in_gram_form else design(users)
    return sparse_part(batch, fixed, **{"sparsity": 3, "num_steps": 20, **options})


def test_the_largest_are_kept():
    """By magnitude; a tie goes to the lower index; never more than asked for, never more than there are."""
    x = np.array([[1.0, -3.0, 2.0, 3.0], [2.0, 2.0, -2.0, 2.0], [0.0, 0.0, 0.0, 1.0], [np.inf, -1.0, -np.inf, 0.5]])
    expected = [[0, -3, 0, 3], [2, 2, 0, 0], [0, 0, 0, 1], [np.inf, 0, -np.inf, 0]]
    assert keep_largest(x, 2).tolist() == expected
    assert keep_largest(torch.from_numpy(x), 2).tolist() == expected
    assert not keep_largest(x, 0).any()
    assert np.array_equal(keep_largest(x, 9), x)


@given(seed=st.integers(0, 2**32), sparsity=st.integers(0, 6))
@settings(max_examples=50, deadline=None)
def test_keeping_is_as_written_out(seed, sparsity):
    """Against a sort of each row, with many ties."""
    x = np.random.default_rng(seed).integers(-3, 4, (5, 6)).astype(float)
    assert np.array_equal(keep_largest(x, sparsity), [reference_amht.keep(row, sparsity) for row in x])


@pytest.mark.parametrize("in_gram_form", [False, True])
@pytest.mark.parametrize("thresholds", [None, SCHEDULE])
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_each_step_is_the_plain_one(thresholds, num_steps, in_gram_form):
    """So many steps give each user what the written-out pass gives it, with weights and something fixed."""
    population = planted(0, num_users=8, num_examples=14, d=12, r=2, k=3, noise=0.1, weighted=True)
    fixed = 0.3 * np.random.default_rng(1).standard_normal((8, 12))
    actual = part(population.users, fixed, num_steps=num_steps, thresholds=thresholds, in_gram_form=in_gram_form)
    expected = [
        reference_amht.threshold_pass(*rows(user), fixed[i], sparsity=3, num_steps=num_steps, constants=thresholds)
        for i, user in enumerate(population.users)
    ]
    np.testing.assert_allclose(actual.value, expected, rtol=0, atol=1e-10)
    assert actual.num_steps == num_steps
    assert (np.count_nonzero(actual.value, axis=1) <= 3).all()
    assert np.count_nonzero(actual.value)


def test_a_schedule_keeps_fewer_than_the_cap():
    """Only what is above the threshold survives: with a high one nothing does, the cap alone would keep three."""
    population = planted(1, num_users=4, num_examples=20, d=12, r=2, k=3)
    high = Thresholds(alpha=100.0, beta=0.0, gamma=0.0, c1=0.3)
    assert not part(population.users, np.zeros((4, 12)), thresholds=high).value.any()
    assert (np.count_nonzero(part(population.users, np.zeros((4, 12))).value, axis=1) == 3).all()


def test_the_step_one_over_m_diverges_where_examples_are_few():
    """With fewer examples than features the constant step blows up for most; the normalised one for nobody."""
    rng = np.random.default_rng(2)
    num_users, m, d, k = 30, 15, 60, 3
    X = rng.standard_normal((num_users, m, d))
    b = np.array([reference_amht.keep(row, k) for row in rng.standard_normal((num_users, d))])
    users = [User(X=X[i], y=X[i] @ b[i], weight=np.ones(m)) for i in range(num_users)]
    constant = np.array([np.linalg.norm(reference_amht.constant_step_pass(u.X, u.y, k, 200)) for u in users])
    normalised = part(users, np.zeros((num_users, d)), sparsity=k, num_steps=200).value
    size = np.linalg.norm(b, axis=1)
    assert (constant > 1e6 * size).sum() > num_users / 2
    assert (np.linalg.norm(normalised, axis=1) < 3 * size).all()
    residual = np.array([u.y - u.X @ normalised[i] for i, u in enumerate(users)])
    assert (np.linalg.norm(residual, axis=1) < 0.7 * np.array([np.linalg.norm(u.y) for u in users])).all()


def test_the_error_never_rises():
    """One step more, one user's squared error less or the same, few examples or many."""
    for m in (5, 12, 40):
        population = planted(m, num_users=30, num_examples=m, d=25, r=3, k=4, noise=0.5)
        errors = []
        for num_steps in range(8):
            b = part(population.users, np.zeros((30, 25)), sparsity=4, num_steps=num_steps).value
            errors.append([np.sum((u.y - u.X @ b[i]) ** 2) for i, u in enumerate(population.users)])
        assert (np.diff(errors, axis=0) <= 1e-9 * np.array(errors[0])).all()


def test_who_stands_still_has_converged():
    """Enough steps: the gradient on the support is gone, and says so; one step is not enough, and says so too."""
    population = planted(3, num_users=10, num_examples=60, d=12, r=1, k=2, noise=0.1)
    done = part(population.users, np.zeros((10, 12)), num_steps=500)
    assert done.converged.all()
    assert done.num_steps < 500
    for i, user in enumerate(population.users):
        gradient = user.X.T @ (user.y - user.X @ done.value[i])
        assert np.abs(gradient[done.value[i] != 0]).max() < 1e-5 * np.abs(user.X.T @ user.y).max()
    assert not part(population.users, np.zeros((10, 12)), num_steps=1).converged.any()


def test_a_start_is_taken_up():
    """Two passes of five steps are one of ten."""
    population = planted(4, num_users=6, num_examples=15, d=12, r=1, k=3, noise=0.1)
    zeros = np.zeros((6, 12))
    half = part(population.users, zeros, num_steps=5)
    both = part(population.users, zeros, num_steps=5, start=half.value).value
    np.testing.assert_allclose(both, part(population.users, zeros, num_steps=10).value, atol=1e-9)
    assert not np.allclose(both, half.value, atol=1e-6)


@pytest.mark.parametrize("thresholds", [None, SCHEDULE])
def test_numpy_and_torch_agree(thresholds):
    """The same on tensors, to rounding."""
    population = planted(5, num_users=6, num_examples=15, d=12, r=2, k=3, noise=0.1)
    batch, fixed = design(population.users), np.zeros((6, 12))
    options = {"sparsity": 3, "num_steps": 6, "thresholds": thresholds}
    ours = sparse_part(batch, fixed, **options)
    theirs = sparse_part(torch_batch(batch), torch.from_numpy(fixed), **options)
    np.testing.assert_allclose(theirs.value.numpy(), ours.value, atol=1e-10)
    assert theirs.converged.tolist() == ours.converged.tolist()
