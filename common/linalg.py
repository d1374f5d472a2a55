"""The few array functions that the array API standard lacks, and the ones whose failures must stay with one user.

All are batched: the leading axis is the user, and a row's result is the same bits whatever the other rows hold,
because each product is a matrix product of that user's own and everything else is elementwise.
"""

import math
from typing import Any

import numpy as np
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


def svec(A: Array) -> Array:
    """`n x p(p+1)/2`, symmetric matrices (`n x p x p`) as vectors of the same length: |svec(A)| = |A|_F.

    The upper triangle row by row, off-diagonals times sqrt(2).
    """
    xp = array_namespace(A)
    p = A.shape[-1]
    row, column, factor = triangle(p, like=A)
    return xp.take(xp.reshape(A, (A.shape[0], p * p)), row * p + column, axis=1) * factor


def unsvec(v: Array, p: int) -> Array:
    """`n x p x p`, the symmetric matrices of `v` (`n x p(p+1)/2`): the inverse of `svec`."""
    xp = array_namespace(v)
    _, _, factor = triangle(p, like=v)
    i, j = xp.arange(p, device=v.device)[:, None], xp.arange(p, device=v.device)[None, :]
    low, high = xp.minimum(i, j), xp.maximum(i, j)
    # row i of the upper triangle starts after i rows of p, p - 1, ... entries
    place = low * p - low * (low - 1) // 2 + high - low
    return xp.reshape(xp.take(v / factor, xp.reshape(place, (-1,)), axis=1), (v.shape[0], p, p))


def triangle(p: int, *, like: Array) -> tuple[Array, Array, Array]:
    """Row, column (integers) and factor (1 or sqrt(2)) of each coordinate of `svec`, in the library of `like`."""
    xp = array_namespace(like)
    ones = xp.ones((p, p), dtype=xp.bool, device=like.device)
    row, column = xp.nonzero(xp.triu(ones))
    root = xp.full(row.shape, math.sqrt(2), dtype=like.dtype, device=like.device)
    return row, column, xp.where(row == column, xp.ones_like(root), root)


def upper_triangle(A: Array) -> Array:
    """`n x p(p+1)/2`, the entries of `n x p x p` NumPy matrices on and above the diagonal, by rows, as they are."""
    rows, columns = np.triu_indices(A.shape[1])
    return A[:, rows, columns]


def symmetric(triangle: Array, p: int) -> Array:
    """`n x p x p` symmetric matrices, whose `upper_triangle` is `triangle`."""
    rows, columns = np.triu_indices(p)
    A = np.zeros((len(triangle), p, p))
    A[:, rows, columns] = triangle
    A[:, columns, rows] = triangle
    return A


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
