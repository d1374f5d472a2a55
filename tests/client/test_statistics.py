"""What a user contributes to AMHT-LRS: right, consistent under the clip, within limits, each user's own."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.alternation import LocalFit, LocalSettings, fit
from client.batches import gram_of
from client.statistics import contribute_moment, contribute_statistics, second_moment, statistics
from common.linalg import svec, unsvec
from privacy.layout import GRID_SCALES, Group, Layout
from server.least_squares import leading_directions, subspace_distance, unvec, vec
from tests import reference_amht
from tests.client.test_isolation import replacements
from tests.populations import design, torch_batch
from tests.reference import User, clipped_on_grid, squared_norm
from tests.reference_amht import planted

PRIVATE, FINEST = GRID_SCALES[0], GRID_SCALES[2]


def layout_for(d: int, r: int, grid_scale: int = FINEST) -> Layout:
    """A, V and two scalars."""
    p = d * r
    groups = (
        Group(name="A", size=p * (p + 1) // 2, share=0.7),
        Group(name="V", size=p, share=0.7),
        Group(name="scalars", size=2, share=0.1),
    )
    return Layout(groups=groups, grid_scale=grid_scale)


def moment_layout(d: int, grid_scale: int = FINEST) -> Layout:
    """The moment and two scalars."""
    groups = (Group(name="moment", size=d * (d + 1) // 2, share=0.98), Group(name="scalars", size=2, share=0.19))
    return Layout(groups=groups, grid_scale=grid_scale)


def fitted(population, batch, sparsity: int = 2) -> LocalFit:
    return fit(batch, population.U, LocalSettings(solver="pursuit", sparsity=sparsity))


def test_statistics_are_those_of_the_algorithm():
    """Kronecker product and vec written out, per user, with weights, in both forms."""
    population = planted(0, num_users=5, num_examples=9, d=6, r=2, k=2, noise=0.2, weighted=True)
    for batch in (design(population.users), gram_of(design(population.users))):
        found = fitted(population, batch)
        A, V = statistics(batch, found)
        for i, user in enumerate(population.users):
            expected_A, expected_V = reference_amht.statistics(user, found.w[i], found.b[i])
            np.testing.assert_allclose(A[i], expected_A, rtol=1e-10, atol=1e-10)
            np.testing.assert_allclose(V[i], expected_V, rtol=1e-10, atol=1e-10)


def test_the_kronecker_product_goes_with_columns():
    """A vec(M) = vec(X'X M w w') for every M, with vec by columns; by rows it is another matrix."""
    population = planted(1, num_users=4, num_examples=9, d=5, r=3, k=1)
    batch = design(population.users)
    found = fitted(population, batch)
    A, _ = statistics(batch, found)
    M = np.random.default_rng(0).standard_normal((5, 3))
    for i, user in enumerate(population.users):
        expected = user.X.T @ user.X @ M @ np.outer(found.w[i], found.w[i])
        np.testing.assert_allclose(unvec(A[i] @ vec(M), 5, 3), expected, rtol=1e-10, atol=1e-10)
        by_rows = (A[i] @ M.ravel()).reshape(5, 3)
        assert np.abs(by_rows - expected).max() > 1e-2 * np.abs(expected).max()


def test_the_statistics_are_of_least_squares():
    """u'A u - 2 V'u differs from the squared error |y - X (M w + b)|^2 by the same number for every M."""
    population = planted(2, num_users=3, num_examples=9, d=5, r=2, k=1, noise=0.3)
    batch = design(population.users)
    found = fitted(population, batch)
    A, V = statistics(batch, found)
    rng = np.random.default_rng(0)
    for i, user in enumerate(population.users):
        differences = []
        for _ in range(3):
            M = rng.standard_normal((5, 2))
            error = np.sum((user.y - user.X @ (M @ found.w[i] + found.b[i])) ** 2)
            differences.append(error - vec(M) @ A[i] @ vec(M) + 2 * V[i] @ vec(M))
        np.testing.assert_allclose(differences, differences[0], rtol=1e-9)


@pytest.mark.parametrize("kind", ["moments", "pair-moments"])
def test_moments_are_sums_over_examples_and_pairs(kind):
    """Written out with copies for weights; nothing from users with too few examples."""
    users = planted(3, num_users=3, num_examples=7, d=4, r=1, k=1, noise=0.5, weighted=True).users
    one = planted(4, num_users=1, num_examples=1, d=4, r=1, k=1).users[0]
    nobody = User(X=np.zeros((0, 4)), y=np.zeros(0), weight=np.zeros(0))
    users = [*users, one, nobody]
    actual = second_moment(design(users), kind)
    for i, user in enumerate(users):
        np.testing.assert_allclose(actual[i], reference_amht.moment(user, kind), rtol=1e-10, atol=1e-10)
    assert not actual[4].any()
    assert actual[3].any() == (kind == "moments")


def test_pair_moments_start_closer_than_moments():
    """On Gaussian features with noise, their leading directions are nearer to the planted U."""
    for seed in (5, 6, 7):
        population = planted(seed, num_users=400, num_examples=20, d=20, r=2, k=2, noise=0.5)
        batch = design(population.users)
        distance = {
            kind: subspace_distance(
                population.U,
                leading_directions(second_moment(batch, kind).sum(axis=0), 2, np.eye(20)),
                norm="frobenius",
            )
            for kind in ("moments", "pair-moments")
        }
        assert distance["pair-moments"] < 0.8 * distance["moments"]
        assert distance["pair-moments"] < 0.6


@pytest.mark.parametrize("grid_scale", [PRIVATE, FINEST])
@pytest.mark.parametrize("clipping_norm", [1e-3, 30.0, 1e6])
@pytest.mark.parametrize("w_scale", [1.0, 1e-2])  # with small w it is V that is long
def test_integers_are_the_jointly_clipped_statistics(w_scale, grid_scale, clipping_norm):
    """svec(A) and V times one factor min(1, C/|A|, C/(sqrt(d) |V|)), on the grid; the bit says whether it was 1."""
    population = planted(8, num_users=6, num_examples=8, d=4, r=2, k=1, noise=0.2)
    batch = design(population.users)
    found = fitted(population, batch)
    found = replace(found, w=w_scale * found.w)
    layout = layout_for(4, 2, grid_scale)
    actual = contribute_statistics(batch, found, clipping_norm=clipping_norm, layout=layout)
    A, V = statistics(batch, found)
    for i in range(6):
        packed = svec(A[i : i + 1])[0]
        longest = max(np.linalg.norm(A[i]), 2 * np.linalg.norm(V[i]))
        factor = min(1.0, clipping_norm / longest)
        numbers = np.array([0.5 if longest <= clipping_norm else -0.5, 0.5]) * 2 / math.sqrt(2)
        expected = [
            value
            for block, C, group in zip(
                (packed * factor, 2 * V[i] * factor, numbers),
                (clipping_norm, clipping_norm, 1.0),
                layout.groups,
                strict=True,
            )
            for value in clipped_on_grid(block, C, group.share, grid_scale)
        ]
        for value, wanted in zip(actual[i].tolist(), expected, strict=True):
            assert abs(value - wanted) < 1 + Fraction(1, 2**12)
    assert actual.any()


def test_clipping_is_a_weight_of_the_user():
    """From one user's integers alone, A and V solve to the same U w w' as without the clip."""
    population = planted(9, num_users=5, num_examples=30, d=4, r=1, k=1, noise=0.2)
    batch = design(population.users)
    found = fitted(population, batch, sparsity=1)
    A, V = statistics(batch, found)
    integers = contribute_statistics(batch, found, clipping_norm=1e-2, layout=layout_for(4, 1)).astype(float)
    for i in range(5):
        clipped = np.linalg.solve(unsvec(integers[i : i + 1, :10], 4)[0], integers[i, 10:14] / 2)
        np.testing.assert_allclose(clipped, np.linalg.solve(A[i], V[i]), rtol=1e-5)


@pytest.mark.parametrize("kind", ["moments", "pair-moments"])
@pytest.mark.parametrize("clipping_norm", [1e-3, 1e6])
def test_integers_of_moments(kind, clipping_norm):
    """svec(W M W') clipped to C on the grid, with the clip bit and presence."""
    population = planted(10, num_users=4, num_examples=6, d=3, r=1, k=1, noise=0.2)
    batch, layout = design(population.users), moment_layout(3)
    W = np.random.default_rng(0).standard_normal((3, 3))
    actual = contribute_moment(batch, kind, W, clipping_norm=clipping_norm, layout=layout)
    for i, user in enumerate(population.users):
        M = W @ reference_amht.moment(user, kind) @ W.T
        M = M * min(1.0, clipping_norm / np.linalg.norm(M)) / clipping_norm * layout.groups[0].share * FINEST
        np.testing.assert_allclose(unsvec(actual[i : i + 1, :6].astype(float), 3)[0], M, atol=2)
        bit = np.sqrt(0.5) * (1 if clipping_norm > 1 else -1)
        np.testing.assert_allclose(actual[i, 6:] / (0.19 * FINEST), [bit, np.sqrt(0.5)], atol=1e-8)


NAMES = sorted(replacements(User(X=np.zeros((0, 4)), y=np.zeros(0), weight=np.zeros(0))))


def contributions(users: list[User], U: np.ndarray, clipping_norm: float, grid_scale: int) -> dict[str, np.ndarray]:
    """Integers of every kind."""
    d, r = U.shape
    with np.errstate(all="ignore"):
        batch = design(users, length=50)  # a node pads each user by its own count only
        found = fit(batch, U, LocalSettings(solver="pursuit", sparsity=2))
        options = {"clipping_norm": clipping_norm, "layout": moment_layout(d, grid_scale)}
        return {
            "statistics": contribute_statistics(
                batch, found, clipping_norm=clipping_norm, layout=layout_for(d, r, grid_scale)
            ),
            **{kind: contribute_moment(batch, kind, np.eye(d), **options) for kind in ("moments", "pair-moments")},
        }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("grid_scale", [PRIVATE, FINEST])
def test_whatever_a_user_is_its_integers_are_within_limits_and_its_own(name, grid_scale):
    """Each group within its share, the whole within K, nobody else moved by a bit, nothing raised."""
    d, r = 12, 2
    users = planted(11, num_users=3, num_examples=9, d=d, r=r, k=2, noise=0.2).users
    bad = replacements(users[1])[name]
    bad = User(X=bad.X[:50], y=bad.y[:50], weight=bad.weight[:50])
    U = np.eye(d)[:, :r]
    for clipping_norm in (1e-2, 1e3):
        before = contributions([users[0], users[2]], U, clipping_norm, grid_scale)
        after = contributions([users[0], bad, users[2]], U, clipping_norm, grid_scale)
        for kind, integers in after.items():
            layout = layout_for(d, r, grid_scale) if kind == "statistics" else moment_layout(d, grid_scale)
            ends = np.cumsum([group.size for group in layout.groups])
            for row in integers:
                blocks = np.split(row, ends[:-1])
                sizes = [squared_norm(block) for block in blocks]
                assert all(size <= layout.limit(g) for size, g in zip(sizes, layout.groups, strict=True))
                assert sum(sizes) <= layout.norm_limit()
            assert np.array_equal(integers[[0, 2]], before[kind])


@pytest.mark.parametrize("name", ["NaN", "infinity", "empty", "no weights"])
def test_nothing_usable_is_zeros(name):
    """Not even the scalars are sent by a user without examples or with numbers that are not finite."""
    users = planted(12, num_users=1, num_examples=9, d=12, r=2, k=2).users
    for integers in contributions([replacements(users[0])[name]], np.eye(12)[:, :2], 1.0, FINEST).values():
        assert not integers.any()


def test_a_present_user_says_so():
    """Zeros for data still count as present and not clipped, and large data as clipped."""
    zeros = User(X=np.zeros((4, 12)), y=np.zeros(4), weight=np.ones(4))
    large = planted(13, num_users=1, num_examples=9, d=12, r=2, k=2).users[0]
    for integers in contributions([zeros, large], np.eye(12)[:, :2], 1e-3, FINEST).values():
        assert not integers[0, :-2].any()
        assert integers[0, -2] == integers[0, -1] > 0
        assert integers[1, -2] == -integers[1, -1] < 0


NASTY = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e75, 1e150, 1e300, -1e308]),
)


@given(data=st.data(), grid_scale=st.sampled_from(GRID_SCALES))
@settings(max_examples=80, deadline=None)
def test_one_user_moves_the_sum_by_at_most_k(data, grid_scale):
    """Any numbers at all: the integers of one user have norm K at most, and others' stay."""
    d, m = 3, data.draw(st.integers(0, 4))

    def values(size):
        return np.array(data.draw(st.lists(NASTY, min_size=size, max_size=size)))

    user = User(X=values(m * d).reshape(m, d), y=values(m), weight=np.abs(values(m)))
    other = planted(14, num_users=1, num_examples=4, d=d, r=1, k=1).users[0]
    clipping_norm = data.draw(st.sampled_from([1e-2, 1.0, 1e3]))
    U = np.eye(d)[:, :1]
    alone = contributions([other], U, clipping_norm, grid_scale)
    for kind, integers in contributions([user, other], U, clipping_norm, grid_scale).items():
        assert squared_norm(integers[0]) <= grid_scale**2
        assert np.array_equal(integers[1], alone[kind][0])


def test_numpy_and_torch_give_the_same_integers():
    """On the private grid, from tensors."""
    population = planted(15, num_users=4, num_examples=12, d=5, r=2, k=1, noise=0.2)
    batch, layout = design(population.users), layout_for(5, 2, PRIVATE)
    ours = contribute_statistics(batch, fitted(population, batch), clipping_norm=20.0, layout=layout)
    tensors = torch_batch(batch)
    found = fit(tensors, torch.from_numpy(population.U), LocalSettings(solver="pursuit", sparsity=2))
    theirs = contribute_statistics(tensors, found, clipping_norm=20.0, layout=layout)
    assert theirs.dtype == torch.int64
    assert np.array_equal(ours, theirs.numpy())
    for kind in ("moments", "pair-moments"):
        options = {"clipping_norm": 2.0, "layout": moment_layout(5, PRIVATE)}
        mine = contribute_moment(batch, kind, np.eye(5), **options)
        other = contribute_moment(tensors, kind, torch.eye(5, dtype=torch.float64), **options)
        assert np.array_equal(mine, other.numpy())
        assert mine.any()
