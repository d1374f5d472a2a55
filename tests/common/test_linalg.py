"""Batched array functions: right, and each user's own whatever the other rows hold."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common import linalg

RNG = np.random.default_rng(0)
A, a, b = RNG.standard_normal((4, 3, 5)), RNG.standard_normal((4, 3)), RNG.standard_normal((4, 5))


def test_products_of_rows():
    """Each function against the same sum written with einsum."""
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(linalg.apply(A, b), np.einsum("npq,nq->np", A, b), **close)
    np.testing.assert_allclose(linalg.apply(A[0], b), np.einsum("pq,nq->np", A[0], b), **close)
    np.testing.assert_allclose(linalg.apply_transposed(A, a), np.einsum("npq,np->nq", A, a), **close)
    np.testing.assert_allclose(linalg.dot(a, a), np.einsum("np,np->n", a, a), **close)
    np.testing.assert_allclose(linalg.trace(A[:, :, :3]), np.einsum("npp->n", A[:, :, :3]), **close)
    assert np.array_equal(linalg.transpose(A), A.transpose(0, 2, 1))


def test_one_hot():
    """A one at the index, nothing where it is negative."""
    assert linalg.one_hot(np.array([2, -1, 0]), 3).tolist() == [[0, 0, 1], [0, 0, 0], [1, 0, 0]]


@pytest.mark.parametrize("p", [1, 2, 5])
def test_symmetric_matrices_as_vectors_and_back(p):
    """svec keeps inner products, its order is the upper triangle by rows, and unsvec undoes it."""
    S = RNG.standard_normal((4, p, p))
    S, T = S + S.transpose(0, 2, 1), S[::-1] @ S[::-1].transpose(0, 2, 1)
    np.testing.assert_allclose((linalg.svec(S) * linalg.svec(T)).sum(axis=1), (S * T).sum(axis=(1, 2)), rtol=1e-12)
    np.testing.assert_allclose(linalg.unsvec(linalg.svec(S), p), S, rtol=1e-15)
    tensors = linalg.svec(torch.from_numpy(S))
    assert np.array_equal(tensors.numpy(), linalg.svec(S))
    assert np.array_equal(linalg.unsvec(tensors, p).numpy(), linalg.unsvec(linalg.svec(S), p))


def test_order_of_svec():
    """Row by row, off-diagonals times the root of two."""
    S = np.array([[[1.0, 2.0, 3.0], [2.0, 4.0, 5.0], [3.0, 5.0, 6.0]]])
    root = np.sqrt(2)
    assert linalg.svec(S)[0].tolist() == [1, 2 * root, 3 * root, 4, 5 * root, 6]


def positive(rng, n, p, condition):
    """`n` symmetric positive definite matrices with eigenvalues from 1 to 1 / condition."""
    Q = np.linalg.qr(rng.standard_normal((n, p, p)))[0]
    return (Q * np.geomspace(1, 1 / condition, p)) @ Q.transpose(0, 2, 1)


@pytest.mark.parametrize("p", [0, 1, 2, 5, 12])
@pytest.mark.parametrize("condition", [1.0, 1e3, 1e8])
def test_inverse_equals_lapack(p, condition):
    """Positive definite matrices are inverted as accurately as their condition allows."""
    matrices = positive(np.random.default_rng(p), 6, p, condition)
    inverses = linalg.inverse_positive(matrices)
    expected = np.linalg.inv(matrices)
    np.testing.assert_allclose(
        inverses, expected, rtol=0, atol=1e-14 * condition * max(p, 1) * np.abs(expected).max(initial=1)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0, -1.0, 1e300])
def test_a_bad_matrix_is_its_own_users_problem(bad):
    """A singular, indefinite or non-finite matrix neither raises nor touches another user's inverse, bit for bit."""
    matrices = positive(np.random.default_rng(1), 5, 4, 10.0)
    expected = linalg.inverse_positive(matrices)
    matrices[2] = bad
    with np.errstate(all="ignore"):
        actual = linalg.inverse_positive(matrices)
    assert np.array_equal(np.delete(actual, 2, axis=0), np.delete(expected, 2, axis=0))
    assert np.isnan(actual[2]).all() or bad == np.inf


@given(seed=st.integers(0, 2**32), n=st.integers(1, 9), p=st.integers(1, 7), q=st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_a_row_is_the_same_bits_alone(seed, n, p, q):
    """Every function gives a user the same bits in a batch of one as among others, and changes no argument."""
    rng = np.random.default_rng(seed)
    M, x, y, S = (
        rng.standard_normal((n, p, q)),
        rng.standard_normal((n, p)),
        rng.standard_normal((n, q)),
        positive(rng, n, p, 10.0),
    )
    calls = {
        "apply": (linalg.apply, (M, y)),
        "apply_transposed": (linalg.apply_transposed, (M, x)),
        "dot": (linalg.dot, (x, x)),
        "trace": (linalg.trace, (S,)),
        "inverse_positive": (linalg.inverse_positive, (S,)),
        "svec": (linalg.svec, (S,)),
    }
    before = [value.copy() for value in (M, x, y, S)]
    for name, (function, arguments) in calls.items():
        together = function(*arguments)
        for i in range(n):
            alone = function(*(value[i : i + 1] for value in arguments))
            assert np.array_equal(alone[0], together[i]), name
    shared = linalg.apply(M[0], y)
    assert all(np.array_equal(linalg.apply(M[0], y[i : i + 1])[0], shared[i]) for i in range(n))
    assert all(np.array_equal(*pair) for pair in zip(before, (M, x, y, S), strict=True))


def test_torch_tensors_work_as_well():
    """The same functions on tensors, to rounding."""
    S = positive(np.random.default_rng(2), 3, 4, 10.0)
    tensors = [torch.from_numpy(value) for value in (A, b, a, S)]
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(linalg.apply(tensors[0], tensors[1]).numpy(), linalg.apply(A, b), **close)
    np.testing.assert_allclose(
        linalg.apply_transposed(tensors[0], tensors[2]).numpy(), linalg.apply_transposed(A, a), **close
    )
    np.testing.assert_allclose(linalg.inverse_positive(tensors[3]).numpy(), linalg.inverse_positive(S), **close)
    np.testing.assert_allclose(linalg.trace(tensors[3]).numpy(), linalg.trace(S), **close)
    assert linalg.one_hot(torch.tensor([1, -1]), 2).tolist() == [[0, 1], [0, 0]]
