"""A node's ragged users as equal-shaped batches, in whichever of two forms is smaller.

A batch is what the solver sees of the data. `Design` keeps the examples themselves, `Gram` only X'X, X'y and y'y.
How far a user's examples are padded depends on that user's own count and on nothing else, so that a user's numbers
are the same bits whoever shares the batch.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace

from common.data import DataSchema, Population
from common.linalg import apply, dot, transpose
from common.model import IntArray

Array = Any
_FLOAT_BYTES = 8
_LARGEST_WEIGHT = 1e6


class Batch(Protocol):
    """What a linear solver needs of n users' weighted examples."""

    @property
    def count(self) -> Array:
        """`n` sums of the examples' weights."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""

    def cross(self) -> Array:
        """`n x d`, X'y."""

    def products(self, M: Array) -> Array:
        """`n x c x d`, M X'X for `M` of `c x d` or `n x c x d`."""

    def diagonal(self) -> Array:
        """`n x d`, diagonal of X'X."""

    def squared_error(self, theta: Array) -> Array:
        """`n`, |y - X theta|^2 for `theta` of `n x d`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Design:
    """Examples as they are, padded with examples of weight 0.

    Attributes:
        X: `n x m x d`.
        y: `n x m`.
        weight: `n x m`, 0 where there is no example.
        count: `n`.
    """

    X: Array
    y: Array
    weight: Array
    count: Array

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return int(self.X.nbytes + self.y.nbytes + self.weight.nbytes)

    def cross(self) -> Array:
        """`n x d`, X'Dy."""
        return ((self.weight * self.y)[:, None, :] @ self.X)[:, 0, :]

    def products(self, M: Array) -> Array:
        """`n x c x d`, (M X') D X."""
        return ((M @ transpose(self.X)) * self.weight[:, None, :]) @ self.X

    def diagonal(self) -> Array:
        """`n x d`, weighted sums of squares."""
        return (self.weight[:, None, :] @ (self.X * self.X))[:, 0, :]

    def squared_error(self, theta: Array) -> Array:
        """`n`, sum of weight (y - x'theta)^2."""
        residual = self.y - apply(self.X, theta)
        return dot(self.weight * residual, residual)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gram:
    """Second moments of the examples: all that squared loss needs.

    Attributes:
        G: `n x d x d`, X'X.
        v: `n x d`, X'y.
        yy: `n`, y'y.
        count: `n`.
    """

    G: Array
    v: Array
    yy: Array
    count: Array

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return int(self.G.nbytes + self.v.nbytes)

    def cross(self) -> Array:
        """`n x d`, X'y."""
        return self.v

    def products(self, M: Array) -> Array:
        """`n x c x d`, M G."""
        return M @ self.G

    def diagonal(self) -> Array:
        """`n x d`."""
        xp = array_namespace(self.G)
        return xp.linalg.diagonal(self.G)

    def squared_error(self, theta: Array) -> Array:
        """`n`, y'y - 2 theta'v + theta'G theta, which rounding must not make negative."""
        xp = array_namespace(self.G)
        value = self.yy - 2 * dot(theta, self.v) + dot(theta, apply(self.G, theta))
        return xp.where(value > 0, value, xp.zeros_like(value))


def gram_of(design: Design) -> Gram:
    """The second moments of a design, each user's by a product of its own."""
    G = transpose(design.X) @ (design.weight[:, :, None] * design.X)
    yy = dot(design.weight * design.y, design.y)
    return Gram(G=G, v=design.cross(), yy=yy, count=design.count)


def padded_length(count: IntArray) -> IntArray:
    """The public rule for padding: the next of ..., 16, 20, 24, 28, 32, 40, ...; at most a fifth is padding."""
    floor = np.maximum(count, 1)
    step = np.maximum(2 ** np.floor(np.log2(floor)).astype(np.int64) // 4, 1)
    return -(-floor // step) * step


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Which users form a batch, and how far they are padded."""

    users: IntArray
    length: int


def plan_chunks(counts: IntArray, dimension: int, chunk_bytes: int) -> list[Chunk]:
    """Group users of equal padded length into chunks whose examples take at most `chunk_bytes`."""
    lengths = padded_length(counts)
    chunks = []
    for length in np.unique(lengths):
        users = np.flatnonzero(lengths == length)
        size = max(1, chunk_bytes // int(length * dimension * _FLOAT_BYTES))
        chunks += [Chunk(users=users[i : i + size], length=int(length)) for i in range(0, len(users), size)]
    return chunks


def design_of(population: Population, schema: DataSchema, chunk: Chunk) -> Design:
    """Gather a chunk's examples, cut to the declared ranges; a row with a value that is not finite counts as none."""
    starts, ends = population.offsets[chunk.users], population.offsets[chunk.users + 1]
    place = np.arange(chunk.length)[None, :]
    present = place < (ends - starts)[:, None]
    rows = np.where(present, starts[:, None] + place, 0).ravel()
    n, m, d = len(chunk.users), chunk.length, population.features.dimension
    if len(population.y) == 0:
        return Design(X=np.zeros((n, m, d)), y=np.zeros((n, m)), weight=np.zeros((n, m)), count=np.zeros(n))
    X = np.asarray(population.features.rows(rows), np.float64)
    y = np.asarray(population.y[rows], np.float64)
    weight = np.ones_like(y) if population.weight is None else np.asarray(population.weight[rows], np.float64)
    usable = present.ravel() & np.isfinite(X).all(axis=1) & np.isfinite(y) & np.isfinite(weight) & (weight > 0)
    weight = np.where(usable, np.minimum(weight, _LARGEST_WEIGHT), 0.0).reshape(n, m)
    bound, (low, high) = schema.feature_bound, schema.target_range
    X = np.where(usable[:, None], np.clip(X, -bound, bound), 0.0).reshape(n, m, d)
    y = np.where(usable, np.clip(y, low, high), 0.0).reshape(n, m)
    return Design(X=X, y=y, weight=weight, count=weight.sum(axis=1))


def form_of(design: Design, *, second_moments_suffice: bool) -> Batch:
    """The smaller of the two forms, where both will do."""
    _, m, d = design.X.shape
    return gram_of(design) if second_moments_suffice and m > d else design
