"""AMHT-LRS (arXiv:2210.03505), slow and plain: one user at a time, straight from the algorithm.

Least squares by `lstsq` on the examples themselves, Kronecker products by `kron`, pairs by two loops. Nothing is
shared with the code that it checks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.reference import User

Array = Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """Users whose parameters are known: theta_i = U w_i + b_i.

    Attributes:
        users: Their examples.
        U: `d x r`, orthonormal.
        theta: `n x d`.
    """

    users: list[User]
    U: Array
    theta: Array


def planted(
    seed: int, *, num_users: int, num_examples: int, d: int, r: int, k: int, noise: float = 0.0, weighted: bool = False
) -> Planted:
    """Gaussian features, w ~ N(0, I), k nonzeros of b of size 1 to 2."""
    rng = np.random.default_rng(seed)
    U = np.linalg.qr(rng.standard_normal((d, r)))[0]
    users, theta = [], np.zeros((num_users, d))
    for i in range(num_users):
        where = rng.permutation(d)[:k]
        theta[i] = U @ rng.standard_normal(r)
        theta[i, where] += rng.choice([-1, 1], k) * rng.uniform(1, 2, k)
        X = rng.standard_normal((num_examples, d))
        y = X @ theta[i] + noise * rng.standard_normal(num_examples)
        weight = rng.integers(1, 4, num_examples).astype(float) if weighted else np.ones(num_examples)
        users.append(User(X=X, y=y, weight=weight))
    return Planted(users=users, U=U, theta=theta)


def rows(user: User) -> tuple[Array, Array]:
    """X and y with weights multiplied in: their squared error is the weighted one."""
    root = np.sqrt(user.weight)
    return user.X * root[:, None], user.y * root


def keep(c: Array, sparsity: int) -> Array:
    """The largest entries of one vector."""
    kept = np.zeros_like(c)
    order = sorted(range(len(c)), key=lambda j: (-abs(c[j]), j))
    for j in order[:sparsity]:
        kept[j] = c[j]
    return kept


def step_size(X: Array, g: Array, b: Array, sparsity: int) -> tuple[float, Array]:
    """|g_S|^2 / |X g_S|^2 and S: b's support, or the largest of g where b is zero or solved exactly on its support."""
    S = b != 0
    if g[S] @ g[S] <= 1e-14 * (g @ g):
        S = keep(g, sparsity) != 0
    g_S = np.where(S, g, 0.0)
    return float(g_S @ g_S) / float((X @ g_S) @ (X @ g_S)), S


def threshold_pass(X: Array, y: Array, fixed: Array, *, sparsity: int, num_steps: int, constants: Any = None) -> Array:
    """b after so many steps; `constants` (alpha, beta, gamma, c1) asks for the published schedule."""
    b = np.zeros(X.shape[1])
    gamma = constants.gamma if constants else 0.0
    for _ in range(num_steps):
        g = X.T @ (y - X @ fixed - X @ b)
        eta, S = step_size(X, g, b, sparsity)
        c = b + eta * g
        if constants:
            root = constants.c1 * constants.beta / math.sqrt(sparsity)
            delta = constants.alpha + constants.c1 * gamma + root
            gamma = 2 * constants.c1 * gamma + 2 * (constants.alpha + root)
            new = keep(np.where(np.abs(c) > delta, c, 0.0), sparsity)
        else:
            new = keep(c, sparsity)
            while ((new != 0) & ~S).any() and (new != b).any():
                change = new - b
                limit = 0.99 * (change @ change) / ((X @ change) @ (X @ change))
                if eta <= limit:
                    break
                eta = min(eta / 2, limit)
                new = keep(b + eta * g, sparsity)
        b = new
    return b


def constant_step_pass(X: Array, y: Array, sparsity: int, num_steps: int) -> Array:
    """The published pass as it stands, with step 1 / m."""
    b = np.zeros(X.shape[1])
    for _ in range(num_steps):
        b = keep(b + X.T @ (y - X @ b) / len(y), sparsity)
    return b


def best_w(X: Array, y: Array, U: Array, b: Array) -> Array:
    """w by least squares given b."""
    return np.linalg.lstsq(X @ U, y - X @ b, rcond=None)[0]


def best_both(X: Array, y: Array, U: Array, support: Sequence[int]) -> tuple[Array, Array, float]:
    """w, b and the squared error, by least squares on (w, b on the support)."""
    Z = np.hstack([X @ U, X[:, list(support)]])
    x = np.linalg.lstsq(Z, y, rcond=None)[0]
    b = np.zeros(X.shape[1])
    b[list(support)] = x[U.shape[1] :]
    return x[: U.shape[1]], b, float(np.sum((y - Z @ x) ** 2))


def ridge_both(X: Array, y: Array, U: Array, support: Sequence[int], ridge: float) -> tuple[Array, Array]:
    """The same with a penalty: examples of zeros added."""
    size = U.shape[1] + len(support)
    Z = np.vstack([np.hstack([X @ U, X[:, list(support)]]), math.sqrt(ridge) * np.eye(size)])
    x = np.linalg.lstsq(Z, np.concatenate([y, np.zeros(size)]), rcond=None)[0]
    b = np.zeros(X.shape[1])
    b[list(support)] = x[U.shape[1] :]
    return x[: U.shape[1]], b


def alternations(
    user: User, U: Array, w: Array, *, sparsity: int, num_steps: int, number: int = 1, constants: Any = None
) -> tuple[Array, Array]:
    """The published local solver: b by a thresholding pass from zero given w, then w given b, so many times."""
    X, y = rows(user)
    b = np.zeros(X.shape[1])
    for _ in range(number):
        b = threshold_pass(X, y, U @ w, sparsity=sparsity, num_steps=num_steps, constants=constants)
        w = best_w(X, y, U, b)
    return w, b


def joint(user: User, U: Array, *, sparsity: int, num_steps: int) -> tuple[Array, Array]:
    """One alternation from w = 0, with joint least squares on the support it finds."""
    X, y = rows(user)
    b = threshold_pass(X, y, np.zeros(X.shape[1]), sparsity=sparsity, num_steps=num_steps)
    return best_both(X, y, U, np.flatnonzero(b))[:2]


def elimination(user: User, U: Array, *, sparsity: int, num_steps: int) -> tuple[Array, Array]:
    """Thresholding on the examples projected off the columns of X U."""
    X, y = rows(user)
    Q = np.linalg.qr(X @ U)[0]
    P = np.eye(len(y)) - Q @ Q.T
    b = threshold_pass(P @ X, P @ y, np.zeros(X.shape[1]), sparsity=sparsity, num_steps=num_steps)
    return best_both(X, y, U, np.flatnonzero(b))[:2]


def pursuit(user: User, U: Array, sparsity: int) -> tuple[Array, Array, list[int]]:
    """One feature after another, each time the one whose least squares fit together with all before is best."""
    X, y = rows(user)
    support: list[int] = []
    for _ in range(sparsity):
        rest = [j for j in range(X.shape[1]) if j not in support]
        support.append(min(rest, key=lambda j: best_both(X, y, U, [*support, j])[2]))
    w, b, _ = best_both(X, y, U, support)
    return w, b, support


def vec(M: Array) -> Array:
    """The columns one after another."""
    return np.concatenate([M[:, j] for j in range(M.shape[1])])


def statistics(user: User, w: Array, b: Array) -> tuple[Array, Array]:
    """A = (w w') kron (X'X) and V = vec(X'(y - X b) w')."""
    X, y = rows(user)
    return np.kron(np.outer(w, w), X.T @ X), vec(np.outer(X.T @ (y - X @ b), w))


def gram_schmidt(U: Array) -> Array:
    """Orthonormal columns that span the same, one after another."""
    columns: list[Array] = []
    for j in range(U.shape[1]):
        column = U[:, j]
        for _ in range(2):  # twice is enough
            for done in columns:
                column = column - done * (done @ column)
        columns.append(column / np.sqrt(column @ column))
    return np.stack(columns, axis=1)


def new_U(users: Sequence[User], fits: Sequence[tuple[Array, Array]], r: int) -> Array:
    """U from all users' statistics, then QR."""
    parts = [statistics(user, w, b) for user, (w, b) in zip(users, fits, strict=True)]
    solution = np.linalg.solve(sum(A for A, _ in parts), sum(V for _, V in parts))
    return gram_schmidt(np.stack(np.split(solution, r), axis=1))


def moment(user: User, kind: str) -> Array:
    """Second moments of one user, weights as numbers of copies."""
    copies = np.repeat(np.arange(len(user.y)), user.weight.astype(int))
    X, y = user.X[copies], user.y[copies]
    total, m = np.zeros((X.shape[1], X.shape[1])), len(y)
    if kind == "moments":
        for i in range(m):
            total += y[i] ** 2 * np.outer(X[i], X[i])
        return total / max(m, 1)
    for i in range(m):
        for j in range(m):
            if i != j:
                total += y[i] * y[j] * np.outer(X[i], X[j])
    return total / max(m * (m - 1), 1)
