"""From posteriors to integers: the gradient, the scalars, and what one user can move."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.batches import gram_of
from client.contribution import contribute, marginal_gradient, scalars
from client.personalize import Choice, personalize, solve
from common.families import FAMILIES
from privacy.layout import GRID_SCALES, SCALARS, Layout
from server.layout import contribution_layout
from tests import reference
from tests.populations import design, draw_model, draw_user, draw_users, torch_batch, torch_model

SQUARED = FAMILIES["squared"]


@pytest.mark.parametrize(("d", "r", "k"), [(4, 2, 0), (4, 2, 2), (3, 3, 1), (1, 1, 0), (4, 0, 2)])
def test_gradient_is_that_of_the_log_marginal_likelihood(d, r, k):
    """(U, beta) moved a little, with the personal scale and support held, moves the log density of y as promised.

    The posterior variance of w is part of it: without that term the test fails.
    """
    rng = np.random.default_rng(d + 10 * r + 100 * k)
    model = draw_model(rng, d, r)
    users = draw_users(rng, model, (1, 3, 12), sparsity=min(k, 1), weighted=True)
    for batch in (design(users), gram_of(design(users))):
        solution = solve(batch, model, sparsity=k)
        gradient = marginal_gradient(solution)
        assert gradient.shape == (3, r + 1, d)
        for i, user in enumerate(users):
            used = solution.support[i] >= 0
            b_prior = np.zeros(d)
            b_prior[solution.support[i][used]] = model.b_variance * solution.share[i][used]
            expected = reference.marginal_gradient(user, model, float(solution.scale[i]), b_prior)
            np.testing.assert_allclose(gradient[i].T, expected, rtol=1e-6, atol=1e-6)
            if r and len(user.y) > 1:
                without_variance = np.outer(solution.marginal.q[i], solution.w[i])
                assert np.abs(without_variance - expected[:, :-1]).max() > 1e-3


def test_gradient_of_a_user_without_examples_is_zero():
    """Nothing observed says nothing about (U, beta)."""
    model = draw_model(np.random.default_rng(0), 4, 2)
    user = draw_user(np.random.default_rng(0), model, 0)
    assert not marginal_gradient(solve(design([user]), model, sparsity=2)).any()


def own_scalars(users, model, unclipped, *, family="squared", sparsity=0):
    batch = design(users)
    solution = personalize(batch, model, family=FAMILIES[family], sparsity=sparsity)
    values = scalars(batch, solution, model, np.array(unclipped), family=FAMILIES[family], sparsity=sparsity)
    return dict(zip(SCALARS, values.T, strict=True)), solution


def test_scalars_are_what_they_are_called():
    """Bit, presence, reliability m / (m + 10), residual score and no b score without a sparse part."""
    rng = np.random.default_rng(1)
    model = draw_model(rng, 4, 2)
    users = draw_users(rng, model, (5, 30))
    actual, solution = own_scalars(users, model, [True, False])
    assert actual["clip_bit"].tolist() == [0.5, -0.5]
    assert actual["presence"].tolist() == [0.5, 0.5]
    reliability = np.array([5 / 15, 30 / 40])
    np.testing.assert_allclose(actual["reliability"], reliability - 0.5)
    excess = solution.squared_error / np.array([5, 30]) / model.noise_variance - 1
    np.testing.assert_allclose(actual["residual_score"], np.clip(excess, -1, 2) * reliability / 4)
    assert not actual["b_score"].any()


def test_an_absent_user_says_nothing():
    """Without examples every scalar is zero, the centred bit too."""
    model = draw_model(np.random.default_rng(2), 3, 1)
    actual, _ = own_scalars([draw_user(np.random.default_rng(2), model, 0)], model, [True], sparsity=1)
    assert all(not values.any() for values in actual.values())


def test_logistic_has_no_residual_score():
    """Only squared loss has a noise variance to learn."""
    rng = np.random.default_rng(3)
    model = draw_model(rng, 3, 1, noise_variance=1.0)
    actual, _ = own_scalars(draw_users(rng, model, (9, 20), family="logistic"), model, [True, True], family="logistic")
    assert not actual["residual_score"].any()
    assert actual["presence"].tolist() == [0.5, 0.5]


def test_b_score_is_the_slope_of_the_evidence_of_the_sparse_part():
    """In log b_variance, of log(1 + exp(gain_j - odds)) summed over features, given the others, per allowed nonzero."""
    rng = np.random.default_rng(4)
    model = draw_model(rng, 6, 2, b_variance=0.2)
    users = draw_users(rng, model, (4, 15), sparsity=1)
    actual, solution = own_scalars(users, model, [True, True], sparsity=2)
    chosen = Choice(support=solution.support, share=solution.share).variance(model)
    for i, user in enumerate(users):
        scale = float(solution.scale[i])
        odds = math.log(4 / 2)

        def evidence(log_variance, user=user, scale=scale, odds=odds, variances=chosen[i]):
            gains = []
            for j in range(6):
                others = np.where(np.arange(6) == j, 0.0, variances)
                with_j = np.where(np.arange(6) == j, math.exp(log_variance[0]), variances)
                gain = reference.log_evidence(user, model, scale, with_j)
                gains.append(gain - reference.log_evidence(user, model, scale, others))
            return float(np.logaddexp(0, np.array(gains) - odds).sum())

        (slope,) = reference.finite_differences(evidence, np.array([math.log(0.2)]))
        assert (chosen[i] > 0).any()
        assert actual["b_score"][i] == pytest.approx(np.clip(slope / 2, -0.5, 0.5), abs=1e-6)


@given(
    seed=st.integers(0, 2**32),
    family=st.sampled_from(["squared", "logistic"]),
    noise_variance=st.floats(1e-6, 1e6),
    b_variance=st.floats(1e-6, 1e6),
)
@settings(max_examples=50, deadline=None)
def test_scalars_are_bounded(seed, family, noise_variance, b_variance):
    """Whatever the user and the prior, each scalar is in [-1/2, 1/2] before anything cuts it."""
    rng = np.random.default_rng(seed)
    variance = noise_variance if family == "squared" else 1.0
    model = draw_model(rng, 3, 2, noise_variance=variance, b_variance=b_variance)
    users = draw_users(rng, model, (1, 4, 30), sparsity=1, family=family, weighted=True)
    with np.errstate(all="ignore"):
        actual, _ = own_scalars(users, model, [True, False, True], family=family, sparsity=2)
    for values in actual.values():
        assert (np.abs(values) <= 0.5).all()


def integers(users, model, metric, *, layout, clipping_norm=1.0, sparsity=2, family="squared"):
    batch = design(users)
    with np.errstate(all="ignore"):
        solution = personalize(batch, model, family=FAMILIES[family], sparsity=sparsity)
        return contribute(
            batch, solution, model, metric, family=FAMILIES[family], sparsity=sparsity,
            clipping_norm=clipping_norm, layout=layout,
        )  # fmt: skip


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize("clipping_norm", [1e-3, 3.0, 1e3])
def test_integers_are_the_truncated_clipped_vector(private, clipping_norm):
    """Each coordinate is the exact one, s K x / max(C, |x|), truncated toward zero, or rounding's neighbour of it."""
    rng = np.random.default_rng(5)
    model = draw_model(rng, 4, 2)
    metric = np.linalg.cholesky(model.U @ model.U.T + np.eye(4))
    users = draw_users(rng, model, (0, 2, 25), sparsity=1)
    layout = contribution_layout(4, 2, private=private)
    actual = integers(users, model, metric, layout=layout, clipping_norm=clipping_norm)
    batch = design(users)
    solution = solve(batch, model, sparsity=2)
    x = (marginal_gradient(solution) @ metric).reshape(3, -1)
    within = np.linalg.norm(x, axis=1) <= clipping_norm
    numbers = scalars(batch, solution, model, within, family=SQUARED, sparsity=2)
    parts = ((x, clipping_norm, layout.groups[0]), (numbers * 2 / math.sqrt(5), 1.0, layout.groups[1]))
    for i in range(3):
        exact = [
            value
            for block, C, group in parts
            for value in reference.clipped_on_grid(block[i], C, group.share, layout.grid_scale)
        ]
        for value, wanted in zip(actual[i].tolist(), exact, strict=True):
            assert abs(value) <= abs(wanted) + Fraction(1, 2**16)
            assert abs(value - wanted) < 1 + Fraction(1, 2**16)
    assert reference.squared_norm(actual[0]) == 0


@pytest.mark.parametrize("family", ["squared", "logistic"])
def test_numpy_and_torch_give_the_same_integers(family):
    """The same core on torch tensors ends on the same grid points."""
    rng = np.random.default_rng(6)
    model = draw_model(rng, 5, 2, noise_variance=0.3 if family == "squared" else 1.0)
    metric = np.linalg.cholesky(model.U @ model.U.T + np.eye(5))
    batch = design(draw_users(rng, model, (0, 3, 20), sparsity=1, family=family))
    layout = contribution_layout(5, 2, private=True)
    options = {"family": FAMILIES[family], "sparsity": 2, "clipping_norm": 2.0, "layout": layout}
    ours = contribute(batch, personalize(batch, model, family=options["family"], sparsity=2), model, metric, **options)
    tensors, prior = torch_batch(batch), torch_model(model)
    solution = personalize(tensors, prior, family=options["family"], sparsity=2)
    theirs = contribute(tensors, solution, prior, torch.from_numpy(metric), **options)
    assert theirs.dtype == torch.int64
    assert np.array_equal(ours, theirs.numpy())
    assert ours[1:].any()


NASTY = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.0, -0.0, 5e-324, 1e-300, 1e150, 1e300, -1e308, 2.0**31, 2.0**32, 2.0**62, -(2.0**63)]),
)


@given(data=st.data(), family=st.sampled_from(["squared", "logistic"]), grid_scale=st.sampled_from(GRID_SCALES))
@settings(max_examples=150, deadline=None)
def test_one_user_moves_the_sum_by_at_most_k(data, family, grid_scale):
    """Zeroing one user's rows in any input moves the sum by at most K in L2 norm, in Python integers."""
    d, r = 2, 1
    m = data.draw(st.integers(0, 4))

    def values(size):
        return np.array(data.draw(st.lists(NASTY, min_size=size, max_size=size)))

    user = reference.User(X=values(m * d).reshape(m, d), y=values(m), weight=values(m))
    nobody = reference.User(X=np.zeros((m, d)), y=np.zeros(m), weight=np.zeros(m))
    rng = np.random.default_rng(1)
    model = draw_model(rng, d, r, noise_variance=0.3 if family == "squared" else 1.0)
    others = draw_users(rng, model, (3, 1), family=family)
    metric = np.linalg.cholesky(model.U @ model.U.T + np.eye(d))
    groups = contribution_layout(d, r, private=True).groups
    layout = Layout(groups=groups, grid_scale=grid_scale)
    clipping_norm = data.draw(st.sampled_from([1e-2, 1.0, 1e3]))
    options = {"layout": layout, "clipping_norm": clipping_norm, "family": family, "sparsity": 1}
    with_user = integers([others[0], user, others[1]], model, metric, **options)
    without = integers([others[0], nobody, others[1]], model, metric, **options)
    assert np.array_equal(with_user[[0, 2]], without[[0, 2]])
    assert not without[1].any()
    moved = with_user.sum(axis=0) - without.sum(axis=0)
    assert reference.squared_norm(moved) <= grid_scale**2
