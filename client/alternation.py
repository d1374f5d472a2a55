"""w and b of every user for a fixed U, by least squares: the local half of AMHT-LRS (arXiv:2210.03505).

Four solvers of min |y - X (U w + b)|^2 with at most `sparsity` nonzeros of b. "alternation" is the published one;
"joint" adds a joint least squares on (w, b on its support) to each of its rounds. The other two eliminate w, which is
always in the active set, so that b is chosen against what w cannot explain: "elimination" by thresholding, "pursuit"
greedily. docs/algorithm.md compares them.
"""

from dataclasses import dataclass
from typing import Any, get_args

from array_api_compat import array_namespace

from client.batches import Batch
from client.thresholding import Thresholds, largest, rows_of, sparse_least_squares, sparse_part
from common.linalg import apply, apply_transposed, dot, inverse_positive, one_hot, trace, transpose
from common.model import PersonalState
from common.task import Solver

Array = Any
SOLVERS: tuple[Solver, ...] = get_args(Solver)
_SAFETY = 1e-10
"""Ridge relative to the mean eigenvalue, with which every Gram matrix can be inverted."""
_TINY = 1e-60
_STANDSTILL = 1e-20
_LEAST_REMAINDER = 1e-9
"""Share of a feature's own curvature that must be left for it to be chosen."""
_LEAST_GAIN = 1e-24
"""Share of y'y that a feature must explain to be chosen: less is rounding."""
_LEAST_PRECISION = 1e-10


@dataclass(frozen=True, kw_only=True)
class LocalSettings:
    """How w and b are found.

    Attributes:
        solver: One of `SOLVERS`.
        sparsity: Cap on nonzeros of b.
        num_alternations: Most alternations of b and w.
        num_steps: Most thresholding steps in each.
        thresholds: The published schedule; None keeps the largest entries.
        ridge: Penalty on |w|^2, and on |b|^2 in solvers that fit both together, in units of X'X.
    """

    solver: str
    sparsity: int
    num_alternations: int = 10
    num_steps: int = 20
    thresholds: Thresholds | None = None
    ridge: float = 0.0

    def __post_init__(self) -> None:
        """Check the name.

        Raises:
            ValueError: If there is no such solver.
        """
        if self.solver not in SOLVERS:
            raise ValueError(f"Expected solver in {SOLVERS}, got solver={self.solver!r}.")


@dataclass(frozen=True, kw_only=True, eq=False)
class LocalFit:
    """Least squares fits of n users.

    Attributes:
        w: `n x r`.
        b: `n x d`.
        support: `n x k` int64, features on which b may be nonzero, -1 where unused.
        theta: `n x d`, U w + b.
        converged: `n` bool.
        num_steps: Alternations, thresholding steps or picks that the slowest user of the batch took.
    """

    w: Array
    b: Array
    support: Array
    theta: Array
    converged: Array
    num_steps: int

    def state(self, batch: Batch, U: Array, *, noise_variance: float) -> PersonalState:
        """What the device keeps: the fit, and its precision under examples of this noise variance.

        Args:
            batch: The examples that were fitted.
            U: `d x r`, as fitted.
            noise_variance: Of an example.
        """
        xp = array_namespace(self.w)
        gram, _ = _joint_gram(batch, U, self.support)
        used = xp.concat([xp.ones_like(self.w), xp.astype(self.support >= 0, self.w.dtype)], axis=1)
        precision = gram / noise_variance
        ridge = _SAFETY * trace(precision) / max(precision.shape[1], 1) + _LEAST_PRECISION
        diagonal = used * ridge[:, None] + (1 - used)
        eye = xp.eye(precision.shape[1], dtype=self.w.dtype, device=self.w.device)[None, :, :]
        at = xp.clip(self.support, 0, None)
        return PersonalState(
            w=self.w,
            support=self.support,
            b=xp.where(self.support >= 0, xp.take_along_axis(self.b, at, axis=-1), 0.0),
            scale=xp.ones(self.w.shape[:1], dtype=self.w.dtype, device=self.w.device),
            precision=precision + diagonal[:, :, None] * eye,
            theta=self.theta,
        )


def fit(batch: Batch, U: Array, settings: LocalSettings, *, start_w: Array | None = None) -> LocalFit:
    """w and b of n users.

    Args:
        batch: Their examples.
        U: `d x r`, in the batch's library.
        settings: Solver and its limits.
        start_w: `n x r`, where the solvers that alternate start; zeros if None.

    Returns:
        The fits; a user whose numbers are not finite has NaN there, and nobody else has.
    """
    if settings.solver == "pursuit":
        return _pursue(batch, U, settings)
    if settings.solver == "elimination":
        return _eliminate_and_threshold(batch, U, settings)
    return _alternate(batch, U, settings, start_w)


def least_squares_w(batch: Batch, U: Array, b: Array, *, ridge: float = 0.0) -> Array:
    """`n x r`, argmin over w of |y - X (U w + b)|^2 + ridge |w|^2, for `b` of `n x d`."""
    xp = array_namespace(U)
    d, r = U.shape
    # filled in, not joined: how a library lays out what it joins may depend on the number of users
    rows = xp.zeros((b.shape[0], r + 1, d), dtype=U.dtype, device=U.device)
    rows[:, :r, :] = transpose(U)
    rows[:, r, :] = b
    moments = batch.products(rows)
    gradient = apply(transpose(U), batch.cross - moments[:, r, :])
    return _solve(moments[:, :r, :] @ U, gradient, ridge=ridge)


def _solve(K: Array, target: Array, *, ridge: float) -> Array:
    """`n x p` solutions of (K + ridge I) x = target for positive semidefinite K.

    The safety ridge is taken out again by one step of iterative refinement, so that it is seen in directions without
    data only: there x stays at zero.
    """
    xp = array_namespace(K)
    p = K.shape[1]
    eye = xp.eye(p, dtype=K.dtype, device=K.device)[None, :, :]
    K = K + ridge * eye
    safety = _SAFETY * trace(K) / max(p, 1) + _TINY
    inverse = inverse_positive(K + safety[:, None, None] * eye)
    x = apply(inverse, target)
    return x + apply(inverse, target - apply(K, x))


def _joint_gram(batch: Batch, U: Array, support: Array) -> tuple[Array, Array]:
    """Z'X'XZ and `n x (r+k) x d` Z' with Z = [U, columns of the support]; zeros for an unused slot."""
    xp = array_namespace(U)
    (d, r), (n, k) = U.shape, support.shape
    Z = xp.zeros((n, r + k, d), dtype=U.dtype, device=U.device)
    Z[:, :r, :] = transpose(U)
    for slot in range(k):
        Z[:, r + slot, :] = one_hot(support[:, slot], d)
    return batch.products(Z) @ transpose(Z), Z


def _joint_fit(batch: Batch, U: Array, support: Array, *, ridge: float) -> tuple[Array, Array]:
    """w (`n x r`) and b (`n x d`) by least squares on (w, b on the support)."""
    xp = array_namespace(U)
    r = U.shape[1]
    gram, Z = _joint_gram(batch, U, support)
    p = gram.shape[1]
    eye = xp.eye(p, dtype=U.dtype, device=U.device)[None, :, :]
    # an unused slot solves an equation of its own, x = 0, of the size of the others
    unused = xp.concat(
        [xp.zeros((support.shape[0], r), dtype=U.dtype, device=U.device), xp.astype(support < 0, U.dtype)], axis=1
    )
    gram = gram + (unused * (trace(gram) / max(p, 1))[:, None])[:, :, None] * eye
    x = _solve(gram, apply(Z, batch.cross), ridge=ridge)
    return x[:, :r], apply_transposed(Z[:, r:, :], x[:, r:])


def _support_of(b: Array, sparsity: int) -> Array:
    """`n x k` int64, features on which b is nonzero, the largest first, then -1."""
    xp = array_namespace(b)
    picks = largest(b, sparsity)
    support = xp.where(xp.take_along_axis(b, picks, axis=-1) != 0, picks, -1)
    missing = sparsity - support.shape[1]
    rest = xp.full((b.shape[0], missing), -1, dtype=xp.int64, device=b.device)
    return xp.concat([support, rest], axis=1) if missing else support


def _result(*, U: Array, w: Array, b: Array, support: Array, converged: Array, num_steps: int) -> LocalFit:
    """The record, with theta; what is not finite has not converged."""
    xp = array_namespace(b)
    theta = apply(U, w) + b
    finite = xp.all(xp.isfinite(theta), axis=-1)
    return LocalFit(w=w, b=b, support=support, theta=theta, converged=converged & finite, num_steps=num_steps)


def _alternate(batch: Batch, U: Array, settings: LocalSettings, start_w: Array | None) -> LocalFit:
    """b by thresholding given U w, then w by least squares given b: the published inner loop of AMHT-LRS."""
    xp = array_namespace(U)
    cross = batch.cross
    w = xp.zeros((cross.shape[0], U.shape[1]), dtype=U.dtype, device=U.device) if start_w is None else start_w
    b = xp.zeros_like(cross)
    moving = xp.ones(b.shape[:1], dtype=xp.bool, device=b.device)
    steps = 0
    while steps < settings.num_alternations and bool(xp.any(moving)):
        steps += 1
        new_b = sparse_part(
            batch,
            apply(U, w),
            sparsity=settings.sparsity,
            num_steps=settings.num_steps,
            thresholds=settings.thresholds,
        ).value  # from zero each time: a support that was chosen under a worse w would hold on to itself
        if settings.solver == "joint":
            support = _support_of(new_b, settings.sparsity)
            new_w, new_b = _joint_fit(batch, U, support, ridge=settings.ridge)
        else:
            new_w = least_squares_w(batch, U, new_b, ridge=settings.ridge)
        change = dot(new_w - w, new_w - w) + dot(new_b - b, new_b - b)
        w, b = xp.where(moving[:, None], new_w, w), xp.where(moving[:, None], new_b, b)
        moving = moving & (change > _STANDSTILL * (dot(w, w) + dot(b, b)))  # NaN stands still as well
    return _result(U=U, w=w, b=b, support=_support_of(b, settings.sparsity), converged=~moving, num_steps=steps)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Projected:
    """What is left of the examples with w eliminated: X'X and X'y after projection off the columns of X U.

    Attributes:
        UG: `n x r x d`, U'X'X.
        inverse: `n x r x r`, (U'X'XU + ridge I)^-1.
        q: `n x d`, projected X'y.
        curvature: `n x d`, diagonal of the projected X'X.
    """

    UG: Array
    inverse: Array
    q: Array
    curvature: Array

    def gram(self, batch: Batch, x: Array) -> Array:
        """`n x d`, projected X'X times the rows of `x`."""
        explained = apply_transposed(self.UG, apply(self.inverse, apply(self.UG, x)))
        return batch.products(x[:, None, :])[:, 0, :] - explained


def _eliminate(batch: Batch, U: Array, ridge: float) -> _Projected:
    """Project w out."""
    xp = array_namespace(U)
    r = U.shape[1]
    UG = batch.products(transpose(U))
    K = UG @ U
    eye = xp.eye(r, dtype=U.dtype, device=U.device)[None, :, :]
    safety = ridge + _SAFETY * trace(K) / max(r, 1) + _TINY
    inverse = inverse_positive(K + safety[:, None, None] * eye)
    # a Newton step takes the safety out again: what it leaves of w in q would be picked as features of b
    inverse = inverse @ (2 * eye - (K + ridge * eye) @ inverse)
    return _Projected(
        UG=UG,
        inverse=inverse,
        q=batch.cross - apply_transposed(UG, apply(inverse, apply(transpose(U), batch.cross))),
        curvature=batch.diagonal - xp.sum((inverse @ UG) * UG, axis=1),
    )


def _eliminate_and_threshold(batch: Batch, U: Array, settings: LocalSettings) -> LocalFit:
    """b by thresholding on what w cannot explain, then both by least squares."""
    left = _eliminate(batch, U, settings.ridge)

    def gram(x: Array, users: Array | None = None) -> Array:
        return rows_of(left, users).gram(rows_of(batch, users), x)

    sparse = sparse_least_squares(
        gram,
        left.q,
        sparsity=settings.sparsity,
        num_steps=settings.num_alternations * settings.num_steps,
        thresholds=settings.thresholds,
    )
    support = _support_of(sparse.value, settings.sparsity)
    w, b = _joint_fit(batch, U, support, ridge=settings.ridge)
    return _result(U=U, w=w, b=b, support=support, converged=sparse.converged, num_steps=sparse.num_steps)


def _pursue(batch: Batch, U: Array, settings: LocalSettings) -> LocalFit:
    """Features that explain most of what is left enter b one by one; then w and b by least squares.

    Orthogonal matching pursuit in Gram form (Rubinstein, Zibulevsky and Elad 2008): a feature that enters is projected
    out by an exact rank-one update, as w was before.
    """
    xp = array_namespace(U)
    left = _eliminate(batch, U, settings.ridge)
    q, curvature = left.q, left.curvature
    (n, d), k = q.shape, min(settings.sparsity, q.shape[1])
    least_curvature = _LEAST_REMAINDER * batch.diagonal
    least_gain = _LEAST_GAIN * batch.square
    features, users = xp.arange(d, device=q.device)[None, :], xp.arange(n, device=q.device)
    support = xp.full((n, settings.sparsity), -1, dtype=xp.int64, device=q.device)
    taken = xp.zeros((n, d), dtype=xp.bool, device=q.device)
    # projected X'X = G - left' right, a row for each direction that is projected out: first w's, then b's
    rows = xp.zeros((n, U.shape[1] + k, d), dtype=q.dtype, device=q.device)
    scaled = xp.zeros_like(rows)
    rows[:, : U.shape[1], :] = left.UG
    scaled[:, : U.shape[1], :] = left.inverse @ left.UG
    for slot in range(k):
        allowed = ~taken & (curvature > least_curvature)
        gain = xp.where(allowed, q * q / (xp.where(allowed, curvature, 1.0) + settings.ridge), 0.0)
        pick = xp.argmax(gain, axis=-1)
        used = gain[users, pick] > least_gain  # false for NaN
        if not bool(xp.any(used)):
            break
        here = U.shape[1] + slot
        column = batch.column(pick) - apply_transposed(rows[:, :here, :], scaled[users, :here, pick])
        column = xp.where(used[:, None], column, 0.0)
        inverse = 1 / xp.where(used, curvature[users, pick] + settings.ridge, 1.0)
        rows[:, here, :], scaled[:, here, :] = column, inverse[:, None] * column
        q = q - scaled[:, here, :] * q[users, pick][:, None]
        curvature = curvature - scaled[:, here, :] * column
        support[:, slot] = xp.where(used, pick, -1)
        taken = taken | ((features == pick[:, None]) & used[:, None])
    w, b = _joint_fit(batch, U, support, ridge=settings.ridge)
    chosen = xp.ones((n,), dtype=xp.bool, device=q.device)
    return _result(U=U, w=w, b=b, support=support, converged=chosen, num_steps=k)
