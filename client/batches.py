"""A node's ragged users as equal-shaped batches, in whichever of two forms is smaller.

A batch is what the solver sees of the data. `Design` keeps the examples themselves, `Gram` only X'X, X'y and y'y.
How far a user's examples are padded depends on that user's own count and on nothing else, so that a user's numbers
are the same bits whoever shares the batch.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from array_api_compat import array_namespace

from common.data import DataSchema, DenseFeatures, ItemFeatures, Population
from common.linalg import apply_transposed, dot, transpose
from common.model import IntArray

Array = Any
_FLOAT_BYTES = 8
_LARGEST_WEIGHT = 1e6
_ROWS_AT_ONCE = 2**16


class Batch(Protocol):
    """What a linear solver needs of n users' weighted examples."""

    @property
    def count(self) -> Array:
        """`n` sums of the examples' weights."""

    @property
    def nbytes(self) -> int:
        """Memory it takes."""

    @property
    def cross(self) -> Array:
        """`n x d`, X'y."""

    def products(self, M: Array) -> Array:
        """`n x c x d`, M X'X for `M` of `c x d` or `n x c x d`."""

    def column(self, feature: Array) -> Array:
        """`n x d`, column `feature` (`n` integers) of each user's X'X."""

    @property
    def diagonal(self) -> Array:
        """`n x d`, diagonal of X'X."""

    @property
    def square(self) -> Array:
        """`n`, y'y."""


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
        """Memory it takes, views of the population included."""
        return int(self.X.nbytes + self.y.nbytes + self.weight.nbytes + 2 * self.X[:, 0, :].nbytes)

    @cached_property
    def cross(self) -> Array:
        """`n x d`, X'Dy."""
        return ((self.weight * self.y)[:, None, :] @ self.X)[:, 0, :]

    def products(self, M: Array) -> Array:
        """`n x c x d`, (M X') D X."""
        return ((M @ transpose(self.X)) * self.weight[:, None, :]) @ self.X

    def column(self, feature: Array) -> Array:
        """`n x d`, X'D x_j."""
        xp = array_namespace(self.X)
        users = xp.arange(self.X.shape[0], device=self.X.device)
        return apply_transposed(self.X, self.X[users, :, feature] * self.weight)

    @cached_property
    def diagonal(self) -> Array:
        """`n x d`, weighted sums of squares."""
        return (self.weight[:, None, :] @ (self.X * self.X))[:, 0, :]

    @cached_property
    def square(self) -> Array:
        """`n`, y'Dy."""
        return dot(self.weight * self.y, self.y)


@dataclass(frozen=True, kw_only=True, eq=False)
class Gram:
    """Second moments of the examples: all that squared loss needs.

    Attributes:
        G: `n x d x d`, X'X.
        v: `n x d`, X'y.
        square: `n`, y'y.
        count: `n`.
    """

    G: Array
    v: Array
    square: Array
    count: Array

    @property
    def nbytes(self) -> int:
        """Memory it takes."""
        return int(self.G.nbytes + self.v.nbytes)

    @property
    def cross(self) -> Array:
        """`n x d`, X'y."""
        return self.v

    def products(self, M: Array) -> Array:
        """`n x c x d`, M G."""
        return M @ self.G

    def column(self, feature: Array) -> Array:
        """`n x d`, row j of the symmetric G."""
        xp = array_namespace(self.G)
        return self.G[xp.arange(self.G.shape[0], device=self.G.device), feature, :]

    @property
    def diagonal(self) -> Array:
        """`n x d`."""
        xp = array_namespace(self.G)
        return xp.linalg.diagonal(self.G)


def gram_of(design: Design) -> Gram:
    """The second moments of a design, each user's by a product of its own."""
    G = transpose(design.X) @ (design.weight[:, :, None] * design.X)
    return Gram(G=G, v=design.cross, square=design.square, count=design.count)


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


def plan_chunks(counts: IntArray, dimension: int, chunk_bytes: int, result_bytes: int = 0) -> list[Chunk]:
    """Group users of equal padded length into chunks whose examples take at most `chunk_bytes`.

    Args:
        counts: Examples of each user.
        dimension: Number of features d.
        chunk_bytes: For a chunk's examples and results.
        result_bytes: What is computed for a user takes, where that may be more than the examples.
    """
    lengths = padded_length(counts)
    chunks = []
    for length in np.unique(lengths):
        users = np.flatnonzero(lengths == length)
        size = max(1, chunk_bytes // (int(length * dimension * _FLOAT_BYTES) + result_bytes))
        chunks += [Chunk(users=users[i : i + size], length=int(length)) for i in range(0, len(users), size)]
    return chunks


def cleaned(population: Population, schema: DataSchema) -> Population:
    """The population as its schema declares it: what a solver may trust.

    Values are cut to their declared ranges; an example with a value that is not finite, or a weight that is not
    positive, gets weight 0. Arrays in which nothing has to change are shared, not copied.

    Args:
        population: Anything a source may yield.
        schema: Public ranges.
    """
    features = population.features
    usable = np.isfinite(population.y)
    weight = population.weight
    if weight is not None:
        usable &= np.isfinite(weight) & (weight > 0)
    if isinstance(features, ItemFeatures):
        table, finite = _bounded(features.table, schema.feature_bound)
        features = ItemFeatures(features.item, np.asarray(table, np.float64))
        usable &= finite[features.item]
    else:
        X = features.X if isinstance(features, DenseFeatures) else features.rows(slice(None))
        X, finite = _bounded(X, schema.feature_bound)
        features = DenseFeatures(X)
        usable &= finite
    low, high = schema.target_range
    y = np.clip(np.where(usable, population.y, 0.0), low, high)
    if weight is None and usable.all():
        return replace(population, features=features, y=y)
    ones = np.ones_like(y) if weight is None else np.minimum(np.where(usable, weight, 0.0), _LARGEST_WEIGHT)
    return replace(population, features=features, y=y, weight=np.where(usable, ones, 0.0))


def _bounded(X: npt.NDArray[np.floating[Any]], bound: float) -> tuple[npt.NDArray[np.floating[Any]], Any]:
    """`X` within [-bound, bound], with zeros in rows that are not finite, and which rows were finite."""
    finite = np.ones(len(X), np.bool_)
    inside = True
    X = np.ascontiguousarray(X)  # a product's rounding depends on the layout, which must not depend on a gather
    for start in range(0, len(X), _ROWS_AT_ONCE):
        block = X[start : start + _ROWS_AT_ONCE]
        finite[start : start + _ROWS_AT_ONCE] = np.isfinite(block).all(axis=1)
        inside = inside and bool((np.abs(block) <= bound).all())  # false for NaN
    return (X, finite) if inside else (np.clip(np.where(finite[:, None], X, 0), -bound, bound), finite)


def design_of(population: Population, chunk: Chunk) -> Design:
    """Gather a chunk's examples from a cleaned population; a view where they lie side by side."""
    users, m = chunk.users, chunk.length
    n, d = len(users), population.dimension
    starts, counts = population.offsets[users], population.counts[users]
    if counts.min(initial=m) == m and users[-1] - users[0] == n - 1:
        rows: Any = slice(int(starts[0]), int(starts[0]) + n * m)
        present = np.ones((n, m), np.bool_)
    else:
        place = np.arange(m)[None, :]
        present = place < counts[:, None]
        rows = np.where(present, starts[:, None] + place, 0).ravel()
    if len(population.y) == 0:
        return Design(X=np.zeros((n, m, d)), y=np.zeros((n, m)), weight=np.zeros((n, m)), count=np.zeros(n))
    weight = np.ones((n, m)) if population.weight is None else population.weight[rows].reshape(n, m)
    X = population.features.rows(rows).reshape(n, m, d)
    if not present.all():
        # zeros, not weight alone: 0 times another user's overflow would be NaN
        weight, X = np.where(present, weight, 0.0), np.where(present[:, :, None], X, 0.0)
    y = population.y[rows].reshape(n, m)
    return Design(
        X=X,
        y=y if present.all() else np.where(present, y, 0.0),
        weight=weight,
        count=weight.sum(axis=1),
    )


def form_of(design: Design, *, second_moments_suffice: bool) -> Batch:
    """The smaller of the two forms, where both will do."""
    _, m, d = design.X.shape
    return gram_of(design) if second_moments_suffice and m > d else design
