"""One vector a user: a direct sum of groups, clipped each to its own ball, on a grid of integers.

v = (+)_g s_g u_g with |u_g| <= 1 and public shares, sum of s_g^2 = 1, so |v| <= 1. Multiplied by the grid scale K
and truncated toward zero the vector is of integers, whose sum over users is exact in any order; Gaussian noise of
standard deviation z K on that sum makes one release. Scalars that a user bounds by construction to [-1/2, 1/2] form
a group of their own: a norm clip over everything would scale the clip bit of exactly the users it should count.

Guarantee, under zero-out: replacing one user's rows in any input by zeros moves the sum of the grid vectors by at
most K in L2 norm, exactly, in integers, whatever the input holds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from common.linalg import dot
from common.model import IntArray

Array = Any
GRID_SCALES = (2**16, 2**20, 2**30)
"""K of private releases up to 1e5 coordinates, above, and of runs without noise."""
SCALARS = ("clip_bit", "presence", "reliability", "residual_score", "b_score")
"""The scalars of a gradient, each bounded to [-1/2, 1/2] by construction; zeros from an absent user."""
FEW_SCALARS = SCALARS[:2]
"""The scalars that go with a second moment or with statistics."""
_MOST_COORDINATES_OF_FIRST_SCALE = 100_000
_SHRINK = 1 - 2.0**-40
_FLOAT_EXACT_RADIUS = 2**26
_CLIPPING_NORMS = (1e-60, 1e60)
_OVERFLOWING_SQUARES = 1e280


@dataclass(frozen=True, kw_only=True)
class Group:
    """A block of coordinates with a unit ball of its own.

    Attributes:
        name: As `group_sizes` has it.
        size: Number of coordinates.
        share: s_g, the radius of the group's ball within the whole unit ball.
    """

    name: str
    size: int
    share: float


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The public shape of a contribution.

    Attributes:
        groups: In the order of the vector.
        grid_scale: K.
    """

    groups: tuple[Group, ...]
    grid_scale: int

    def __post_init__(self) -> None:
        """Check what every guarantee here rests on.

        Raises:
            ValueError: If shares are not positive with squares summing to at most 1, a size is not positive, or
                the grid scale is not one of `GRID_SCALES`.
        """
        total = math.fsum(group.share**2 for group in self.groups)
        if not all(0 < group.share <= 1 for group in self.groups) or total > 1 + 1e-9:
            raise ValueError(f"Expected shares in (0, 1] with squares summing to 1, got {total=}.")
        if not all(group.size > 0 for group in self.groups):
            raise ValueError(f"Expected groups of at least one coordinate, got groups={self.groups}.")
        if self.grid_scale not in GRID_SCALES:
            raise ValueError(f"Expected grid_scale in {GRID_SCALES}, got grid_scale={self.grid_scale}.")
        if sum(self.limit(group) for group in self.groups) > self.norm_limit():
            raise ValueError(f"Expected shares whose squares sum to 1 at most, got groups={self.groups}.")

    @property
    def size(self) -> int:
        """Coordinates D of the whole vector."""
        return sum(group.size for group in self.groups)

    def radius(self, group: Group) -> int:
        """Radius of the group's ball on the grid, floor(s_g K); the bound of each of its coordinates."""
        return math.floor(group.share * self.grid_scale)

    def limit(self, group: Group) -> int:
        """Largest squared norm of the group's integers, floor(s_g^2 K^2), of the share as its decimals say."""
        return math.floor(Fraction(str(group.share)) ** 2 * self.grid_scale**2)

    def norm_limit(self) -> int:
        """K^2, the largest squared norm of one user's integers."""
        return self.grid_scale**2


def group_sizes(work: str, dimension: int, rank: int) -> dict[str, int]:
    """Names and sizes of a contribution's groups, in order; server and nodes go by the same rule.

    Args:
        work: Of `common.task.Work`.
        dimension: Number of features d; of a network how many shared numbers are learned.
        rank: Columns r of U; 0 for a network, whose every U is among those numbers.
    """
    if work == "moment":
        return {"moment": dimension * (dimension + 1) // 2, "scalars": len(FEW_SCALARS)}
    if work == "statistics":
        entries = dimension * rank
        return {"A": entries * (entries + 1) // 2, "V": entries, "scalars": len(FEW_SCALARS)}
    return {"model": dimension * (rank + 1), "scalars": len(SCALARS)}


def cross_norm(clipping_norm: float, dimension: int) -> float:
    """The clipping norm of V = X'(y - X b) w' where that of A = w w' (x) X'X is `clipping_norm`: C / sqrt(d).

    With |y - X b| about |X U w|, |V| is about m |w|^2 where |A| is about m sqrt(d) |w|^2.
    """
    return clipping_norm / math.sqrt(dimension)


def grid_scale_for(size: int, *, private: bool) -> int:
    """The public rule for K: fine enough that truncation is far below the noise."""
    if not private:
        return GRID_SCALES[2]
    return GRID_SCALES[0] if size <= _MOST_COORDINATES_OF_FIRST_SCALE else GRID_SCALES[1]


def clip_to_ball(x: Array, clipping_norm: float) -> tuple[Array, Array]:
    """Scale each row down to norm `clipping_norm` where it is longer, in units of `clipping_norm`.

    Args:
        x: `n x p`, anything, including NaN and infinity.
        clipping_norm: C, in the units of `x`.

    Returns:
        `n x p` rows of norm at most 1 up to rounding (zeros where a row is not finite), and `n` booleans:
        whether the row was finite and within C before.

    Raises:
        ValueError: If `clipping_norm` is not between 1e-60 and 1e60.
    """
    low, high = _CLIPPING_NORMS
    if not low <= clipping_norm <= high:
        raise ValueError(f"Expected {low} <= clipping_norm <= {high}, got {clipping_norm=}.")
    xp = array_namespace(x)
    squares = dot(x, x)
    norm = xp.sqrt(squares)
    within = norm <= clipping_norm
    unit = x * (1 / xp.where(within, xp.full_like(norm, clipping_norm), norm))[:, None]
    easy = squares < _OVERFLOWING_SQUARES  # false for NaN
    if xp.all(easy):
        return unit, within
    hard_unit, hard_within = _clip_extreme(x, clipping_norm)
    return xp.where(easy[:, None], unit, hard_unit), xp.where(easy, within, hard_within)


def _clip_extreme(x: Array, clipping_norm: float) -> tuple[Array, Array]:
    """The same for rows whose squares overflow: the largest entry is divided out first; not finite gives zeros."""
    xp = array_namespace(x)
    top = xp.max(xp.abs(x), axis=-1)
    finite = xp.isfinite(top)
    top = xp.where(finite & (top > 0), top, xp.ones_like(top))
    direction = xp.where(finite[:, None], x, xp.zeros_like(x)) / top[:, None]
    norm = xp.sqrt(dot(direction, direction))
    within = norm <= clipping_norm / top
    factor = xp.where(within, top / clipping_norm, 1 / xp.where(norm > 0, norm, xp.ones_like(norm)))
    return direction * factor[:, None], finite & within


def scalars_to_ball(values: Array) -> Array:
    """Scale `c` scalars bounded to [-1/2, 1/2] into the unit ball: multiply by 2 / sqrt(c).

    Args:
        values: `n x c`. Values outside the range are cut to it; rows with NaN become zeros.

    Returns:
        `n x c` rows of norm at most 1 up to rounding.
    """
    xp = array_namespace(values)
    usable = xp.all(~xp.isnan(values), axis=-1, keepdims=True)
    cut = xp.clip(xp.where(usable, values, xp.zeros_like(values)), -0.5, 0.5)
    return cut * (2 / math.sqrt(values.shape[-1]))


def to_grid(blocks: Sequence[Array], layout: Layout) -> Array:
    """Put the groups' unit-ball vectors on the grid: multiply by s_g K, truncate toward zero.

    A user whose integers do not pass the exact check of every group is scaled by 1 - 2^-40 once, for rounding, and
    contributes zeros if that does not help.

    Args:
        blocks: For each group, `n x size` floats of norm at most 1.
        layout: Groups, shares and K.

    Returns:
        `n x D` int64; each row's squared norm is at most K^2, checked in integers.
    """
    xp = array_namespace(*blocks)
    columns = []
    good = xp.ones(blocks[0].shape[:1], dtype=xp.bool, device=blocks[0].device)
    for block, group in zip(blocks, layout.groups, strict=True):
        radius, limit = layout.radius(group), layout.limit(group)
        scaled = block * (group.share * layout.grid_scale)
        q, fits = _truncate(scaled, radius, limit)
        if not xp.all(fits):
            shrunk, fits_shrunk = _truncate(scaled * _SHRINK, radius, limit)
            q, fits = xp.where(fits[:, None], q, shrunk), fits | fits_shrunk
        columns.append(q)
        good = good & fits
    grid = xp.concat(columns, axis=-1)
    return grid if xp.all(good) else xp.where(good[:, None], grid, xp.zeros_like(grid))


def _truncate(scaled: Array, radius: int, limit: int) -> tuple[Array, Array]:
    """Toward zero, as int64, and whether |q_j| <= radius for all j and the sum of squares <= limit, exactly.

    Nothing is converted that is NaN or too large to be an integer. Up to radius 2^26 the squares are summed in
    float64, which is exact: the terms are integers, and a partial sum that reaches 2^53 is beyond any limit already.
    """
    xp = array_namespace(scaled)
    convertible = dot(scaled, scaled) <= float(radius + 1) ** 2  # false for NaN
    if not xp.all(convertible):
        scaled = xp.where(convertible[:, None], scaled, xp.zeros_like(scaled))
    whole = xp.trunc(scaled)
    q = xp.astype(whole, xp.int64)
    if radius <= _FLOAT_EXACT_RADIUS:
        return q, convertible & (dot(whole, whole) <= float(limit))
    return q, convertible & _within_in_limbs(q, limit)


def _within_in_limbs(q: Array, limit: int) -> Array:
    """Whether each row's squares sum to at most `limit`, in two limbs of 2^15: q = high 2^15 + low.

    Entries are at most 2^30 + 1 in size, so every limb's sum stays below 2^63 for up to 2^30 coordinates.
    """
    xp = array_namespace(q)
    high, low = q >> 15, q & 0x7FFF
    # q^2 = high^2 2^30 + 2 high low 2^15 + low^2; high low is summed in halves to keep its multiple of 2^15 small
    cross = xp.sum(2 * high * low, axis=-1)
    rest = (cross & 0x7FFF) * 2**15 + xp.sum(low * low, axis=-1)
    top = xp.sum(high * high, axis=-1) + (cross >> 15) + (rest >> 30)
    rest = rest & (2**30 - 1)
    limit_top, limit_rest = limit >> 30, limit & (2**30 - 1)
    return (top < limit_top) | ((top == limit_top) & (rest <= limit_rest))


def sum_is_possible(total: Any, num_users: int, layout: Layout) -> bool:
    """Whether `total` could be the sum of `num_users` honest vectors: dtype, shape, |S_j| <= n s_g K, |S| <= n K.

    A node's users trust their node; this bounds what a misbehaving node can move, to one clip per user.
    """
    if not isinstance(total, np.ndarray) or total.dtype != np.int64 or total.shape != (layout.size,):
        return False
    start = 0
    for group in layout.groups:
        block = [int(value) for value in total[start : start + group.size]]
        if sum(value * value for value in block) > num_users**2 * layout.limit(group):
            return False
        start += group.size
    return True


def split_groups(noised: IntArray, layout: Layout, denominator: int) -> tuple[np.ndarray[Any, Any], ...]:
    """Undo the scaling of a noised sum: each group's mean over `denominator` users, in units of its unit ball."""
    means, start = [], 0
    for group in layout.groups:
        block = noised[start : start + group.size].astype(np.float64)
        means.append(block / (group.share * layout.grid_scale * denominator))
        start += group.size
    return tuple(means)


def layout_of_event(event: Mapping[str, Any]) -> Layout:
    """The layout that a ledger event declares; shares are its decimal strings."""
    groups = tuple(
        Group(name=str(group["name"]), size=int(group["size"]), share=float(group["share"]))
        for group in event["groups"]
    )
    return Layout(groups=groups, grid_scale=int(event["grid_scale"]))


def groups_of_event(layout: Layout) -> list[dict[str, Any]]:
    """The groups as a ledger event declares them; `layout_of_event` reads back the same floats."""
    return [{"name": group.name, "size": group.size, "share": f"{group.share:.9f}"} for group in layout.groups]
