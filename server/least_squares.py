"""The server's half of AMHT-LRS (arXiv:2210.03505), as pure functions of sums: U from A and V, and where U starts.

Knows noised sums and public numbers; never one user's.
"""

import math
from typing import Literal

import numpy as np

from common.model import Array

_EDGES = 2.0
_LEAST_EIGENVALUE = 1e-12
"""Relative to the largest; without noise, directions with less are without data."""


def vec(U: Array) -> Array:
    """`dr`, the columns of U (`d x r`) one after another."""
    return U.ravel(order="F")


def unvec(v: Array, d: int, r: int) -> Array:
    """`d x r`, the inverse of `vec`."""
    return v.reshape((d, r), order="F")


def floor_eigenvalues(A: Array, floor: float) -> Array:
    """`p x p`, the symmetric A with every eigenvalue below `floor` raised to it."""
    values, vectors = np.linalg.eigh(A)
    raised: Array = (vectors * np.maximum(values, floor)) @ vectors.T
    return raised


def noise_edge(noise_stddev: float, p: int) -> float:
    """Largest eigenvalue that noise alone gives a symmetric `p x p` matrix: sqrt(2 p) noise_stddev.

    With noise of that standard deviation on each coordinate of its svec the off-diagonals have variance
    noise_stddev^2 / 2, and the edge of Wigner's semicircle is at 2 sqrt(p) of their standard deviation.
    """
    return math.sqrt(2 * p) * noise_stddev


def solve_for_U(A: Array, V: Array, d: int, r: int, *, noise_stddev: float = 0.0) -> Array:
    """`d x r` orthonormal, the column space of the solution of A vec(U) = V.

    Args:
        A: `dr x dr`, symmetric; sum of (w w') kron (X'X), noised.
        V: `dr`, sum of vec(X'(y - X b) w'), noised.
        d: Features.
        r: Rank.
        noise_stddev: Of each coordinate of A's svec. Eigenvalues are raised to twice the edge of its spectrum: the
            noise moves an eigenvalue by up to the edge, so a smaller one may be half noise, and dividing by it
            amplifies the noise of V (planted populations: distance .28 with one edge, .08 with two to eight).
    """
    values, vectors = np.linalg.eigh(A)
    top = max(float(values[-1]), 0.0)
    floor = max(_EDGES * noise_edge(noise_stddev, d * r), _LEAST_EIGENVALUE * top)
    # A has no data at all where this is zero; U is then any orthonormal matrix
    solution = vectors @ ((vectors.T @ V) / np.maximum(values, floor)) if floor > 0 else np.zeros_like(V)
    return orthonormal(unvec(solution, d, r))


def orthonormal(U: Array) -> Array:
    """`d x r`, Q of U = QR, with signs such that R has no negative number on its diagonal."""
    Q, R = np.linalg.qr(U)
    columns: Array = Q * np.where(np.diagonal(R) < 0, -1.0, 1.0)
    return columns


def leading_directions(moment: Array, rank: int, unwhitening: Array) -> Array:
    """`d x r` orthonormal, where the top eigenvectors of a sum of whitened second moments point.

    With features of second moment S, whitening W such that W S W' = I, and theta a user's parameters, the moment's
    mean is along W'^-1 theta; so `unwhitening` is W'.

    Args:
        moment: `d x d`, symmetric.
        rank: r.
        unwhitening: `d x d`.
    """
    _, vectors = np.linalg.eigh(moment)
    return orthonormal(unwhitening @ vectors[:, ::-1][:, :rank])


def random_directions(d: int, rank: int, rng: np.random.Generator) -> Array:
    """`d x r` orthonormal, uniform over subspaces."""
    return orthonormal(rng.standard_normal((d, rank)))


def subspace_distance(U: Array, V: Array, *, norm: Literal["spectral", "frobenius"] = "spectral") -> float:
    """Sine of the principal angles between the column spaces of U and V (`d x r` each, full column rank).

    |(I - P) Q| with P the projector on the columns of U and Q an orthonormal basis of those of V: "spectral" is the
    sine of the largest angle, in [0, 1]; "frobenius" the root of the sum of squared sines, in [0, sqrt(r)].
    """
    P, Q = np.linalg.qr(U)[0], np.linalg.qr(V)[0]
    outside = Q - P @ (P.T @ Q)
    return float(np.linalg.norm(outside, 2 if norm == "spectral" else "fro"))
