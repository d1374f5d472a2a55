"""A population drawn from the model itself, so that what is recovered can be compared with the truth."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from common.data import DataSchema, DenseFeatures, Population, example_keys, row_hashes, text_hashes
from common.model import Array, IntArray

_USERS_AT_ONCE = 2000
_TARGET_RANGE_IN_SDS = 4.0


@dataclass(frozen=True, kw_only=True, eq=False)
class SyntheticTruth:
    """The parameters a synthetic population was drawn from: theta_i = beta + U w_i + b_i.

    Attributes:
        beta: `d`.
        U: `d x r`, orthonormal columns times `U_scale`, so that w ~ N(0, I).
        w: `n x r`.
        b: `n x d`, with `sparsity` nonzeros a row.
        noise: Standard deviation of an example's noise; 0 for the logistic family, whose noise is its own.
    """

    beta: Array
    U: Array
    w: Array
    b: Array
    noise: float

    @property
    def theta(self) -> Array:
        """`n x d`, every user's parameters."""
        return np.asarray(self.beta + self.w @ self.U.T + self.b, dtype=np.float64)


def draw_population(
    *,
    users: int,
    examples: int | tuple[int, int] = 20,
    dimension: int,
    rank: int,
    sparsity: int,
    noise: float = 0.3,
    seed: int = 0,
    family: Literal["squared", "logistic"] = "squared",
    beta_scale: float = 1.0,
    U_scale: float = 1.0,
    b_scale: float = 1.0,
    feature_bound: float = 4.0,
    precision: Literal["float64", "float32"] = "float64",
) -> tuple[Population, DataSchema, SyntheticTruth]:
    """Draw users, their examples and what is public about them.

    x ~ N(0, I) clipped to `feature_bound`, theta_i = beta + U w_i + b_i with w_i ~ N(0, I) and `sparsity`
    nonzeros of b_i from N(0, b_scale^2); y = x'theta + noise, or Bernoulli(1 / (1 + exp(-x'theta))).

    Args:
        users: How many, n.
        examples: Of each user; a pair draws a number in between, ends included, for each.
        dimension: Number of features d.
        rank: Columns r of U.
        sparsity: Nonzeros of each b_i.
        noise: Standard deviation of an example's noise (squared loss).
        seed: Of a generator of its own; harmless.
        family: The loss.
        beta_scale: Length of beta.
        U_scale: Singular values of U.
        b_scale: Standard deviation of a nonzero of b.
        feature_bound: Largest |x_j|.
        precision: In which the features are stored.

    Returns:
        The population, its schema (which follows from the arguments alone) and the truth.

    Raises:
        ValueError: If `rank` or `sparsity` exceeds `dimension`.
    """
    if not 0 <= rank <= dimension or not 0 <= sparsity <= dimension:
        raise ValueError(f"Expected rank and sparsity of at most {dimension=}, got {rank=}, {sparsity=}.")
    generator = np.random.default_rng(seed)
    squared = family == "squared"
    scales = {"beta_scale": beta_scale, "U_scale": U_scale, "b_scale": b_scale, "noise": noise}
    schema = synthetic_schema(
        dimension=dimension, rank=rank, sparsity=sparsity, family=family, feature_bound=feature_bound, **scales
    )
    truth = SyntheticTruth(
        beta=_direction(generator, dimension) * beta_scale,
        U=np.linalg.qr(generator.standard_normal((dimension, rank)))[0] * U_scale,
        w=generator.standard_normal((users, rank)),
        b=_sparse_rows(generator, users, dimension, sparsity) * b_scale,
        noise=noise if squared else 0.0,
    )
    low, high = (examples, examples) if isinstance(examples, int) else examples
    counts = generator.integers(low, high, size=users, endpoint=True)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    X = generator.standard_normal((offsets[-1], dimension), dtype=np.dtype(precision))
    np.clip(X, -feature_bound, feature_bound, out=X)
    y = _targets(generator, _margins(X, truth.theta, offsets), squared, noise, schema.target_range)
    names = tuple(f"user-{i}" for i in range(users))
    population = Population(
        users=names,
        offsets=offsets,
        y=y,
        weight=None,
        features=DenseFeatures(X),
        key=example_keys(np.repeat(text_hashes(names, kind="user"), counts), row_hashes(counts)),
    )
    return population, schema, truth


def synthetic_schema(
    *,
    dimension: int,
    rank: int,
    sparsity: int,
    noise: float = 0.3,
    family: Literal["squared", "logistic"] = "squared",
    beta_scale: float = 1.0,
    U_scale: float = 1.0,
    b_scale: float = 1.0,
    feature_bound: float = 4.0,
) -> DataSchema:
    """What is public about a population of `draw_population`, which takes the same arguments; nobody is drawn."""
    # the standard deviation of a target, of which its range is a multiple
    spread = math.sqrt(beta_scale**2 + rank * U_scale**2 + sparsity * b_scale**2 + noise**2)
    bound = _TARGET_RANGE_IN_SDS * spread
    return DataSchema(
        feature_names=tuple(f"x{j}" for j in range(dimension)),
        feature_second_moment=np.eye(dimension) * _clipped_normal_variance(feature_bound),
        target_range=(-bound, bound) if family == "squared" else (0.0, 1.0),
        feature_bound=feature_bound,
    )


def _direction(generator: np.random.Generator, dimension: int) -> Array:
    vector = generator.standard_normal(dimension)
    return np.asarray(vector / np.linalg.norm(vector))


def _sparse_rows(generator: np.random.Generator, users: int, dimension: int, sparsity: int) -> Array:
    rows = np.zeros((users, dimension))
    if sparsity:
        order = generator.random((users, dimension))
        support = np.argpartition(order, sparsity - 1, axis=1)[:, :sparsity]
        np.put_along_axis(rows, support, generator.standard_normal((users, sparsity)), axis=1)
    return rows


def _margins(X: npt.NDArray[np.floating[Any]], theta: Array, offsets: IntArray) -> Array:
    """`N`, x'theta of each example; in blocks of users so that theta is never repeated for all examples."""
    margin = np.empty(X.shape[0])
    for first in range(0, theta.shape[0], _USERS_AT_ONCE):
        block = slice(first, first + _USERS_AT_ONCE)
        bounds = offsets[first : first + _USERS_AT_ONCE + 1]
        repeated = np.repeat(theta[block], np.diff(bounds), axis=0)
        margin[bounds[0] : bounds[-1]] = np.einsum("nd,nd->n", X[bounds[0] : bounds[-1]], repeated)
    return margin


def _targets(
    generator: np.random.Generator, margin: Array, squared: bool, noise: float, target_range: tuple[float, float]
) -> Array:
    """The targets, within their public range."""
    if not squared:
        probability = 0.5 + 0.5 * np.tanh(margin / 2)  # the logistic function, without overflow
        return (generator.random(margin.size) < probability).astype(np.float64)
    return np.clip(margin + noise * generator.standard_normal(margin.size), *target_range)


def _clipped_normal_variance(bound: float) -> float:
    """E[min(|z|, bound)^2] for z ~ N(0, 1)."""
    density = math.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    tail = math.erfc(bound / math.sqrt(2))
    return 1 - tail - 2 * bound * density + (bound**2 * tail if math.isfinite(bound) else 0.0)
