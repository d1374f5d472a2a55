"""The few array functions that the array API standard lacks, and the ones whose failures must stay with one user.

All are batched: the leading axis is the user, and a row's result is the same bits whatever the other rows hold,
because each product is a matrix product of that user's own and everything else is elementwise.
"""

from typing import Any

from array_api_compat import array_namespace

Array = Any
"""An array of any library that follows the array API standard (NumPy at the edge, torch in simulation)."""


def transpose(A: Array) -> Array:
    """Swap the last two axes."""
    xp = array_namespace(A)
    return xp.matrix_transpose(A)


def apply(A: Array, x: Array) -> Array:
    """`n x p` products of the matrices `A` (`n x p x q` or `p x q`) with the rows of `x` (`n x q`)."""
    return (A @ x[:, :, None])[:, :, 0]


def apply_transposed(A: Array, x: Array) -> Array:
    """`n x q` products of the rows of `x` (`n x p`) with the matrices `A` (`n x p x q`)."""
    return (x[:, None, :] @ A)[:, 0, :]


def dot(a: Array, b: Array) -> Array:
    """`n` inner products of the rows of `a` and `b`."""
    return (a[:, None, :] @ b[:, :, None])[:, 0, 0]


def trace(A: Array) -> Array:
    """`n` traces of square matrices `A` (`n x p x p`)."""
    xp = array_namespace(A)
    return xp.linalg.trace(A)


def inverse_positive(A: Array) -> Array:
    """Inverses of symmetric positive definite matrices; a failure stays with its user.

    By Cholesky: A = L L', A^-1 = M' M with M = L^-1 by forward substitution over all users at once, which is faster
    than a library's `inv` of many small matrices. A batched factorization raises for all users on one matrix that is
    not positive definite. Ours are by construction (every Gram matrix has the prior's precision added), so this is a
    second line of defence: the batch is halved until the culprits are alone, and they are NaN.

    Args:
        A: `n x p x p`.

    Returns:
        `n x p x p`; NaN for a matrix that is not positive definite.
    """
    xp = array_namespace(A)
    n, p = A.shape[:2]
    try:
        L = xp.linalg.cholesky(A)
    except Exception:  # each library has its own error for this
        if n == 1:
            return xp.full_like(A, xp.nan)
        return xp.concat([inverse_positive(A[: n // 2, ...]), inverse_positive(A[n // 2 :, ...])])
    M = xp.zeros_like(L)
    for i in range(p):
        scale = 1 / L[:, i, i]
        M[:, i, i] = scale
        if i:
            M[:, i, :i] = apply_transposed(M[:, :i, :i], L[:, i, :i]) * -scale[:, None]
    return transpose(M) @ M


def one_hot(index: Array, size: int) -> Array:
    """`n x size` rows with a one at `index` (`n` integers); all zeros where it is negative."""
    xp = array_namespace(index)
    return xp.astype(xp.arange(size, device=index.device)[None, :] == index[:, None], xp.float64)
