"""The layout: whatever a user's floats are, the integers that leave have a norm of at most K, in Python integers."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from privacy.layout import (
    GRID_SCALES,
    SCALARS,
    Group,
    Layout,
    clip_to_ball,
    grid_scale_for,
    groups_of_event,
    layout_of_event,
    scalars_to_ball,
    split_groups,
    sum_is_possible,
    to_grid,
)
from server.layout import contribution_layout
from tests.reference import clipped_on_grid, squared_norm

EDGES = [
    *(0.0, -0.0, 5e-324, -5e-324, 2.2250738585072014e-308, 1e-160, 1e-30, 0.5, 1.0, -1.0, math.nextafter(1, 2)),
    *(2.0**31, 2.0**31 - 1, 2.0**32, 2.0**62, -(2.0**63), 2.0**63, 1e140, 1e150, 1e160, -1e308, 1.7976931348623157e308),
    *(math.nan, math.inf, -math.inf),
]
FLOATS = st.one_of(st.sampled_from(EDGES), st.floats(), st.floats(-2, 2))
SHAPES = npst.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9)


def one_group(size, grid_scale, share=1.0):
    return Layout(groups=(Group(name="model", size=size, share=share),), grid_scale=grid_scale)


def two_groups(size, grid_scale, scalars=2):
    groups = (Group(name="model", size=size, share=0.979795897), Group(name="scalars", size=scalars, share=0.2))
    return Layout(groups=groups, grid_scale=grid_scale)


@given(
    x=npst.arrays(np.float64, SHAPES, elements=FLOATS),
    clipping_norm=st.sampled_from([1e-60, 1e-10, 0.3, 1.0, 7.5, 1e10, 1e60]),
    grid_scale=st.sampled_from(GRID_SCALES),
)
@settings(max_examples=400, deadline=None)
def test_clipped_integers_are_within_k(x, clipping_norm, grid_scale):
    """After clip and grid every row's squared norm is at most K^2; rows that are not finite are zeros.

    A row that is finite is the exactly clipped vector to within one step of the grid, toward zero.
    """
    before = x.copy()
    with np.errstate(all="ignore"):
        unit, within = clip_to_ball(x, clipping_norm)
        grid = to_grid((unit,), one_group(x.shape[1], grid_scale))
    assert np.array_equal(x, before, equal_nan=True)
    assert grid.dtype == np.int64
    for row, integers, inside in zip(x, grid.tolist(), within, strict=True):
        assert squared_norm(integers) <= grid_scale**2
        exact = clipped_on_grid(row, clipping_norm, 1.0, grid_scale)
        slack = Fraction(grid_scale, 2**38)
        for value, wanted in zip(integers, exact, strict=True):
            assert abs(value - wanted) < 1 + slack
            assert abs(value) <= abs(wanted) + slack
        squares = sum((Fraction(value) ** 2 for value in row if math.isfinite(value)), Fraction(0))
        if not np.isfinite(row).all():
            assert not inside
        elif abs(squares / Fraction(clipping_norm) ** 2 - 1) > Fraction(1, 2**40):
            assert inside == (squares <= Fraction(clipping_norm) ** 2)


@given(
    blocks=st.tuples(
        npst.arrays(np.float64, (4, 3), elements=FLOATS), npst.arrays(np.float64, (4, 2), elements=FLOATS)
    ),
    grid_scale=st.sampled_from(GRID_SCALES),
)
@settings(max_examples=400, deadline=None)
def test_the_grid_trusts_nobody(blocks, grid_scale):
    """Blocks that were never clipped still give integers within each group's ball, so within K, or zeros."""
    layout = two_groups(3, grid_scale)
    with np.errstate(all="ignore"):
        grid = to_grid(blocks, layout)
    for row in grid.tolist():
        for block, group in ((row[:3], layout.groups[0]), (row[3:], layout.groups[1])):
            assert squared_norm(block) <= Fraction(str(group.share)) ** 2 * grid_scale**2
        assert squared_norm(row) <= layout.norm_limit()


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("grid_scale", GRID_SCALES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 300), (50, 17)])
def test_unit_vectors_stay_within_k(shape, grid_scale, dtype):
    """Vectors of norm 1 up to rounding in their dtype: close to K, never beyond."""
    x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    with np.errstate(all="ignore"):
        unit, _ = clip_to_ball(x, 1e-6)
    grid = to_grid((unit,), one_group(shape[1], grid_scale))
    for row in grid.tolist():
        assert squared_norm(row) <= grid_scale**2
        # truncation loses at most one step a coordinate; a row that double precision put outside is not lost
        assert dtype == np.float32 or squared_norm(row) >= (grid_scale * (1 - 1e-9) - 2 * math.sqrt(shape[1])) ** 2


@pytest.mark.parametrize("grid_scale", GRID_SCALES)
@pytest.mark.parametrize("size", [1, 2, 3, 20])
def test_a_clipped_user_is_not_lost(size, grid_scale):
    """A user at the edge of a ball whose radius is no integer is truncated, not zeroed, however few coordinates."""
    layout = two_groups(size, grid_scale)
    unit, _ = clip_to_ball(np.random.default_rng(0).standard_normal((1000, size)), 1e-6)
    grid = to_grid((unit, np.zeros((1000, 2))), layout)
    lost = [squared_norm(row) < (0.97 * grid_scale) ** 2 for row in grid.tolist()]
    assert sum(lost) == 0


def rows_at_the_limit(limit: int) -> list[list[int]]:
    """Integer rows whose squares sum to just below, at and above `limit`, a perfect square."""
    root = math.isqrt(limit)
    assert root**2 == limit
    rows = []
    for excess in (-1, 0, 1, 2):
        rest = limit + excess - (root - 3) ** 2  # what four squares have to make up
        row = [root - 3]
        for _ in range(5):
            part = math.isqrt(rest)
            row.append(part)
            rest -= part**2
        rows.append([*row, *[1] * rest])
        assert squared_norm(rows[-1]) == limit + excess
    return rows


@pytest.mark.parametrize("grid_scale", GRID_SCALES)
def test_the_check_is_exact_at_the_boundary(grid_scale):
    """Rows whose squares sum to just below K^2 and to K^2 pass as they are; one above does not."""
    rows = [row for row in rows_at_the_limit(grid_scale**2) if len(row) <= 60]
    assert len(rows) >= 3
    for row in rows:
        for sign in (1, -1):
            signed = [sign * value for value in row]
            # a power of two: dividing by K and multiplying again is exact
            (grid,) = to_grid((np.array([signed]) / grid_scale,), one_group(len(row), grid_scale)).tolist()
            assert squared_norm(grid) <= grid_scale**2
            assert (grid == signed) == (squared_norm(signed) <= grid_scale**2)


@pytest.mark.parametrize("grid_scale", GRID_SCALES)
@pytest.mark.parametrize("share", [0.6, 0.979795897, 0.2, 1e-4])
def test_a_share_is_a_smaller_ball(grid_scale, share):
    """A group's integers are within floor(s^2 K^2), also where rounding put the floats on or just beyond its edge."""
    limit = math.floor(Fraction(str(share)) ** 2 * grid_scale**2)
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 40):
        x = rng.standard_normal((200, size))
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        for scale in (1.0, math.nextafter(1, 2), 1 + 2**-50, 1 + 2**-41, 1 - 2**-50):
            grid = to_grid((scale * unit,), one_group(size, grid_scale, share))
            assert all(squared_norm(row) <= limit for row in grid.tolist())


@given(
    seed=st.integers(0, 2**32),
    size=st.integers(1, 40),
    excess=st.sampled_from([-2, -1, 0, 1, 2, 2**20]),
)
@settings(max_examples=200, deadline=None)
def test_two_limbs_equal_python_integers(seed, size, excess):
    """At K = 2^30, where squares leave the exact floats, the check agrees with Python on rows next to the limit."""
    rng = np.random.default_rng(seed)
    radius = 2**30
    direction = rng.standard_normal(size)
    row = np.trunc(direction / np.linalg.norm(direction) * radius).astype(np.int64)
    # spend what truncation left on the last coordinate, so that the sum of squares is near the limit
    left = radius**2 + excess - squared_norm(row[:-1])
    row[-1] = math.isqrt(max(left, 0)) * rng.choice([-1, 1])
    fits = squared_norm(row) <= radius**2
    (grid,) = to_grid((row[None, :] / 2.0**30,), one_group(size, radius))  # exact: below 2^53 over a power of two
    assert np.array_equal(grid, row) == fits
    assert squared_norm(grid) <= radius**2


@pytest.mark.parametrize("value", [2.0**31, 2.0**32, 2.0**62, -(2.0**63), 1e300, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("grid_scale", GRID_SCALES)
def test_what_wraps_in_int64_is_zeroed(value, grid_scale):
    """Entries whose integers or squares leave 64 bits zero their user and nobody else."""
    block = np.array([[0.1, value / grid_scale], [0.1, 0.2]])
    with np.errstate(all="ignore"):
        grid = to_grid((block,), one_group(2, grid_scale))
    assert grid[0].tolist() == [0, 0]
    assert grid[1].tolist() == [int(0.1 * grid_scale), int(0.2 * grid_scale)]


def test_truncation_is_toward_zero():
    """Never away from zero: the norm must not grow."""
    grid = to_grid((np.array([[0.7, -0.7, 0.0]]) / 2**16,), one_group(3, 2**16))
    assert grid.tolist() == [[0, 0, 0]]
    grid = to_grid((np.array([[1.9, -1.9, -1.0]]) / 2**16,), one_group(3, 2**16))
    assert grid.tolist() == [[1, -1, -1]]


def test_a_bad_group_zeroes_the_whole_user():
    """Half a user is never sent."""
    layout = two_groups(2, 2**16)
    grid = to_grid((np.array([[5.0, 0.0], [0.5, 0.0]]), np.array([[0.1, 0.1], [0.1, 0.1]])), layout)
    assert not grid[0].any()
    assert grid[1].any()


@given(values=npst.arrays(np.float64, SHAPES, elements=FLOATS))
@settings(max_examples=200, deadline=None)
def test_scalars_are_put_into_the_unit_ball(values):
    """Cut to [-1/2, 1/2] each, then scaled so that all at the ends have norm 1; NaN zeroes its row."""
    ball = scalars_to_ball(values)
    c = values.shape[1]
    for row, out in zip(values, ball, strict=True):
        if np.isnan(row).any():
            assert not out.any()
        else:
            np.testing.assert_allclose(out, np.clip(row, -0.5, 0.5) * 2 / math.sqrt(c))
        assert float(out @ out) <= 1 + 1e-12


@pytest.mark.parametrize("clipping_norm", [0.0, -1.0, 1e-61, 1e61, math.inf, math.nan])
def test_refuses_clipping_norms_that_are_none(clipping_norm):
    """Zero, negative, not finite or beyond all use."""
    with pytest.raises(ValueError, match="clipping_norm"):
        clip_to_ball(np.ones((1, 2)), clipping_norm)


@pytest.mark.parametrize("grid_scale", GRID_SCALES)
def test_torch_gives_the_same_integers(grid_scale):
    """Clip and grid of the edge values are the same on tensors."""
    finite = [value for value in EDGES if math.isfinite(value)]
    rng = np.random.default_rng(0)
    rows = [rng.standard_normal(len(EDGES)), np.zeros(len(EDGES)), np.array(EDGES), np.resize(finite, len(EDGES))]
    x = np.stack([*rows, *(np.resize(value, len(EDGES)) for value in EDGES)])
    layout = one_group(len(EDGES), grid_scale)
    with np.errstate(all="ignore"):
        unit, within = clip_to_ball(x, 0.7)
        ours = to_grid((unit,), layout)
    torch_unit, torch_within = clip_to_ball(torch.from_numpy(x), 0.7)
    assert np.array_equal(within, torch_within.numpy())
    assert np.array_equal(ours, to_grid((torch_unit,), layout).numpy())


@pytest.mark.parametrize(
    ("shares", "grid_scale"),
    [
        ((0.8, 0.61), 2**16),
        ((1.1,), 2**16),
        ((0.0, 0.5), 2**16),
        ((-0.5,), 2**16),
        ((math.nan,), 2**16),
        ((0.5,), 2**17),
    ],
)
def test_refuses_layouts_without_a_guarantee(shares, grid_scale):
    """Shares must lie in (0, 1] with squares summing to 1 at most, and K must be one of the three."""
    groups = tuple(Group(name=str(i), size=1, share=share) for i, share in enumerate(shares))
    with pytest.raises(ValueError, match="Expected"):
        Layout(groups=groups, grid_scale=grid_scale)


@pytest.mark.parametrize(
    "shares", [(0.8, 0.6), (0.979795897, 0.2), (0.8, 0.6000000008), (1.0,), (0.5, 0.5, 0.5, 0.500000001)]
)
@pytest.mark.parametrize("grid_scale", GRID_SCALES)
def test_every_layout_there_is_keeps_the_guarantee(shares, grid_scale):
    """If a layout can be made at all, its groups' balls together are within K: in integers, not to nine digits."""
    groups = tuple(Group(name=str(i), size=1, share=share) for i, share in enumerate(shares))
    try:
        layout = Layout(groups=groups, grid_scale=grid_scale)
    except ValueError:
        return
    full = tuple(np.ones((1, 1)) for _ in shares)
    (row,) = to_grid(full, layout).tolist()
    assert squared_norm(row) <= layout.norm_limit()


def test_refuses_an_empty_group():
    """A group without coordinates is a mistake."""
    with pytest.raises(ValueError, match="at least one coordinate"):
        Layout(groups=(Group(name="model", size=0, share=1.0),), grid_scale=2**16)


def test_the_grid_is_chosen_by_public_numbers():
    """2^16 up to 1e5 coordinates, 2^20 above, 2^30 without noise."""
    assert grid_scale_for(100_000, private=True) == 2**16
    assert grid_scale_for(100_001, private=True) == 2**20
    assert grid_scale_for(5, private=False) == 2**30


@pytest.mark.parametrize(("dimension", "rank"), [(1, 1), (27, 8), (101, 1)])
@pytest.mark.parametrize("private", [True, False])
def test_the_ledger_says_the_same_floats(dimension, rank, private):
    """A layout written into an event and read back clips and scales with the very same numbers."""
    layout = contribution_layout(dimension, rank, private=private)
    event = {"groups": groups_of_event(layout), "grid_scale": layout.grid_scale}
    assert layout_of_event(event) == layout
    assert sum(Fraction(group["share"]) ** 2 for group in event["groups"]) <= 1
    assert layout.size == dimension * (rank + 1) + len(SCALARS)


def test_groups_are_split_as_they_were_put_together():
    """Unscaled and divided by the denominator, a sum of grid vectors is the mean of the unit vectors."""
    layout = two_groups(3, 2**30)
    rng = np.random.default_rng(0)
    blocks = tuple(clip_to_ball(rng.standard_normal((10, size)), 0.5)[0] for size in (3, 2))
    blocks = tuple(0.9 * block for block in blocks)
    grid = to_grid(blocks, layout)
    for mean, block in zip(split_groups(grid.sum(axis=0), layout, 40), blocks, strict=True):
        np.testing.assert_allclose(mean, block.sum(axis=0) / 40, atol=1e-9)


def honest_sum(layout, users, rng):
    model, scalars = (group.size for group in layout.groups)
    blocks = clip_to_ball(rng.standard_normal((users, model)), 0.1)[0], scalars_to_ball(rng.random((users, scalars)))
    return to_grid(blocks, layout).sum(axis=0)


@pytest.mark.parametrize("grid_scale", GRID_SCALES)
@pytest.mark.parametrize("users", [1, 3, 1000])
def test_honest_sums_are_possible(grid_scale, users):
    """Whatever users send, clipped, can be their sum: all alike too, which is the longest one."""
    layout = two_groups(4, grid_scale)
    total = honest_sum(layout, users, np.random.default_rng(users))
    assert sum_is_possible(total, users, layout)
    assert sum_is_possible(np.zeros(6, np.int64), users, layout)
    assert sum_is_possible(users * honest_sum(layout, 1, np.random.default_rng(0)), users, layout)


@pytest.mark.parametrize("grid_scale", GRID_SCALES)
@pytest.mark.parametrize("users", [1, 7])
def test_sums_beyond_the_ball_are_not_possible(grid_scale, users):
    """Up to n s_g K in either group passes; a step a user beyond it is refused, in one coordinate or spread out."""
    layout = two_groups(4, grid_scale)
    for place, group in ((0, layout.groups[0]), (4, layout.groups[1])):
        for sign in (1, -1):
            total = np.zeros(6, np.int64)
            total[place] = sign * users * layout.radius(group)
            assert sum_is_possible(total, users, layout)
            total[place] = sign * users * (layout.radius(group) + 1)
            assert not sum_is_possible(total, users, layout)
            total[place : place + group.size] = math.ceil(users * (layout.radius(group) + 2) / math.sqrt(group.size))
            assert not sum_is_possible(total, users, layout)


@pytest.mark.parametrize("value", [2**31, 2**32, 2**62, -(2**63), 2**63 - 1])
def test_sums_whose_squares_wrap_are_not_possible(value):
    """2^32 squares to zero in 64 bits; it is refused all the same."""
    total = np.zeros(6, np.int64)
    total[1] = value
    assert not sum_is_possible(total, 3, two_groups(4, 2**16))


@pytest.mark.parametrize(
    "total",
    [
        *(np.zeros(6, dtype) for dtype in (np.float64, np.int32, np.uint64, np.bool_, object, ">i8")),
        *(np.zeros(shape, np.int64) for shape in (5, 7, 0, (6, 1), (1, 6), ())),
        *([0] * 6, None, b"", torch.zeros(6, dtype=torch.int64)),
    ],
)
def test_other_types_and_shapes_are_not_possible(total):
    """Only a vector of D int64 can be a sum."""
    assert not sum_is_possible(total, 3, two_groups(4, 2**16))


def test_no_users_can_only_send_zeros():
    """A node without users has nothing to add."""
    assert sum_is_possible(np.zeros(6, np.int64), 0, two_groups(4, 2**16))
    assert not sum_is_possible(np.eye(6, dtype=np.int64)[2], 0, two_groups(4, 2**16))
