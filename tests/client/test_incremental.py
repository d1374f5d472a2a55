"""Updating a posterior with new examples, against scipy, against all examples at once, and against itself."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

from client.incremental import (
    Examples,
    Posterior,
    fresh,
    predict,
    ridge,
    sample,
    score,
    thompson_scores,
    update,
)
from common.families import FAMILIES
from tests.populations import arrays

SQUARED, LOGISTIC = FAMILIES["squared"], FAMILIES["logistic"]


def draw(seed: int, n: int, m: int, p: int, family: str = "logistic", *, theta=None) -> Examples:
    """Examples with an intercept in column 0, weights and offsets."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, m, p))
    X[:, :, 0] = 1
    theta = rng.standard_normal((n, p)) if theta is None else theta
    offset = 0.5 * rng.standard_normal((n, m))
    eta = (X @ theta[:, :, None])[:, :, 0] + offset
    y = eta + rng.standard_normal((n, m)) if family == "squared" else 1.0 * (rng.random((n, m)) < expit(eta))
    return Examples(X=X, y=y, weight=rng.uniform(0.5, 2, (n, m)), offset=offset)


def draw_prior(seed: int, n: int, p: int) -> Posterior:
    """A posterior with correlated coordinates."""
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((n, p, p))
    return Posterior(mean=rng.standard_normal((n, p)), precision=A @ A.transpose(0, 2, 1) / p + np.eye(p))


def take(record, rows):
    """Some users of a record of arrays."""
    return type(record)(**{name: value[rows] for name, value in arrays(record).items()})


def joined(*parts: Examples) -> Examples:
    """The examples of all parts."""
    fields = {name: [getattr(part, name) for part in parts] for name in arrays(parts[0])}
    return Examples(**{name: np.concatenate(values, axis=1) for name, values in fields.items()})


def assert_same_bits(a: Posterior, b: Posterior) -> None:
    """Equal to the bit."""
    assert a.mean.tobytes() == b.mean.tobytes()
    assert a.precision.tobytes() == b.precision.tobytes()


def objective(theta, prior, examples, i, family, forgetting, R, noise_variance):  # noqa: PLR0917 -- scipy's order
    """What theta_t minimises, written plainly."""
    eta = examples.X[i] @ theta + examples.offset[i]
    y, weight = examples.y[i], examples.weight[i]
    loss = (y - eta) ** 2 / (2 * noise_variance) if family is SQUARED else np.logaddexp(0, eta) - y * eta
    away = theta - prior.mean[i]
    past = forgetting * away @ prior.precision[i] @ away + (1 - forgetting) * theta @ (R * theta)
    return weight @ loss + past / 2


@pytest.mark.parametrize("forgetting", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("family", [SQUARED, LOGISTIC], ids=["squared", "logistic"])
def test_is_the_optimum_and_its_curvature(family, forgetting):
    """The mean minimises the objective as scipy does, and the precision is the objective's Hessian there."""
    n, m, p, s2 = 4, 12, 3, 0.7 if family is SQUARED else 1.0
    examples, prior = draw(1, n, m, p, family.name), draw_prior(2, n, p)
    R = ridge(p, 2.0, like=prior.mean, intercept=0)
    found = update(prior, examples, family=family, forgetting=forgetting, prior_precision=R, noise_variance=s2)
    assert found.converged.all()
    for i in range(n):
        arguments = (prior, examples, i, family, forgetting, R, s2)
        best = minimize(objective, prior.mean[i], arguments, method="BFGS", options={"gtol": 1e-9})
        np.testing.assert_allclose(found.posterior.mean[i], best.x, rtol=0, atol=2e-6)
        eta = examples.X[i] @ found.posterior.mean[i] + examples.offset[i]
        D = examples.weight[i] * (expit(eta) * expit(-eta) if family is LOGISTIC else 1 / s2)
        H = forgetting * prior.precision[i] + examples.X[i].T @ (D[:, None] * examples.X[i])
        np.testing.assert_allclose(found.posterior.precision[i], H + (1 - forgetting) * np.diag(R), rtol=1e-12)
        assert objective(found.posterior.mean[i], *arguments) <= best.fun + 1e-12


def test_golden_hessian():
    """The curvature at a given theta is the one of lambda-learner's tests, recomputed."""
    X = np.array([[[1, 0.5, 3], [0.5, 0, 1]]])
    y, offset, theta = np.array([[0.0, 1.0]]), np.array([[-0.25, 1.0]]), np.array([[0.25, 0.75, -1.5]])
    # a prior this heavy leaves theta where it is, so that H - H0 is the curvature there
    heavy = 1e12
    prior = Posterior(mean=theta, precision=heavy * np.eye(3)[None])
    examples = Examples(X=X, y=y, weight=np.ones((1, 2)), offset=offset)
    H = update(prior, examples, family=LOGISTIC, forgetting=1.0, prior_precision=1.0).posterior.precision[0]
    golden = [
        [1.076006603, 0.007826689, 0.167666585],
        [0.007826689, 1.003913344, 0.023480067],
        [0.167666585, 0.023480067, 1.382293306],
    ]
    np.testing.assert_allclose(H - heavy * np.eye(3) + np.eye(3), golden, atol=2e-4)  # 1e12 rounds at 1e-4
    p = expit(X[0] @ theta[0] + offset[0])
    np.testing.assert_allclose(np.eye(3) + X[0].T @ ((p * (1 - p))[:, None] * X[0]), golden, atol=5e-10)


@pytest.mark.parametrize("seed", range(3))
def test_sequential_is_batch_for_squared_loss(seed):
    """With all of the past kept, ten updates end where all examples at once do."""
    n, p = 5, 6
    parts = [draw(10 * seed + t, n, 1 + t % 4, p, "squared") for t in range(10)]
    start = fresh(n, p, 0.5, like=parts[0].X)
    settings_ = {"family": SQUARED, "forgetting": 1.0, "prior_precision": 0.5, "noise_variance": 0.3}
    at_once = update(start, joined(*parts), **settings_).posterior
    posterior = start
    for part in parts:
        posterior = update(posterior, part, **settings_).posterior
    np.testing.assert_allclose(posterior.mean, at_once.mean, rtol=1e-8)
    np.testing.assert_allclose(posterior.precision, at_once.precision, rtol=1e-8, atol=1e-12)


def test_forgetting_discounts_each_batch_geometrically():
    """For squared loss the posterior is the ridge solution with batch s weighted delta^(t - s)."""
    n, p, delta = 3, 4, 0.6
    parts = [draw(t, n, 5, p, "squared") for t in range(4)]
    posterior = fresh(n, p, 2.0, like=parts[0].X)
    for part in parts:
        posterior = update(posterior, part, family=SQUARED, forgetting=delta, prior_precision=2.0).posterior
    weighted = [replace(part, weight=part.weight * delta ** (3 - t)) for t, part in enumerate(parts)]
    start = fresh(n, p, 2.0, like=parts[0].X)
    expected = update(start, joined(*weighted), family=SQUARED, forgetting=1.0, prior_precision=2.0).posterior
    np.testing.assert_allclose(posterior.mean, expected.mean, rtol=1e-10)
    np.testing.assert_allclose(posterior.precision, expected.precision, rtol=1e-10)


def test_a_weight_counts_as_often_in_the_hessian_as_in_the_mean():
    """Weight 3 is the example three times, in theta and in H."""
    once = replace(draw(4, 2, 6, 3), weight=np.full((2, 6), 3.0))
    thrice = joined(*[replace(once, weight=np.ones((2, 6)))] * 3)
    prior = draw_prior(5, 2, 3)
    a, b = (update(prior, e, family=LOGISTIC, forgetting=0.8, prior_precision=1.0).posterior for e in (once, thrice))
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-8)
    np.testing.assert_allclose(a.precision, b.precision, rtol=1e-8)


def test_padding_and_unusable_weights_do_not_count():
    """Examples of weight 0, below 0 or NaN are as if they were not there."""
    examples = draw(6, 2, 5, 3)
    weight = np.concatenate([examples.weight, np.broadcast_to([0.0, -1.0, np.nan], (2, 3))], axis=1)
    more = replace(joined(examples, take(draw(7, 2, 3, 3), slice(None))), weight=weight)
    prior = draw_prior(8, 2, 3)
    a, b = (update(prior, e, family=LOGISTIC, forgetting=0.8, prior_precision=1.0).posterior for e in (examples, more))
    np.testing.assert_allclose(a.mean, b.mean, rtol=1e-10)
    np.testing.assert_allclose(a.precision, b.precision, rtol=1e-10)


def test_the_intercept_is_left_alone():
    """Forgetting pulls the coefficients of features to zero and not the intercept."""
    p = 2
    R = ridge(p, 5.0, like=np.zeros(1), intercept=0)
    assert R.tolist() == [0.0, 5.0]
    rng = np.random.default_rng(0)
    X = np.stack([np.ones((1, 400)), rng.standard_normal((1, 400))], axis=2)
    y = 3.0 + 2.0 * X[:, :, 1]
    examples = Examples(X=X, y=y, weight=np.full((1, 400), 0.01), offset=np.zeros((1, 400)))
    posterior = fresh(1, p, 5.0, like=X)
    for _ in range(60):
        posterior = update(posterior, examples, family=SQUARED, forgetting=0.5, prior_precision=R).posterior
    assert posterior.mean[0, 0] == pytest.approx(3.0, abs=0.05)
    assert posterior.mean[0, 1] < 1.5


@pytest.mark.parametrize("margin", [1e4, -1e4])
@pytest.mark.parametrize("label", [0.0, 1.0])
def test_margins_of_ten_thousand(margin, label):
    """Far out on the curve the update is exact: unmoved where the label is right, the prior's pull where wrong."""
    X, ones = np.ones((1, 1, 1)), np.ones((1, 1))
    for H0 in (1e-3, 1.0, 1e6):
        prior = Posterior(mean=np.zeros((1, 1)), precision=np.full((1, 1, 1), H0))
        examples = Examples(X=X, y=label * ones, weight=ones, offset=margin * ones)
        found = update(prior, examples, family=LOGISTIC, forgetting=1.0, prior_precision=1.0)
        assert found.converged.all()
        assert np.isfinite(found.posterior.precision).all()
        theta = found.posterior.mean[0, 0]
        # the optimum solves H0 theta = y - expit(theta + margin)
        assert H0 * theta == pytest.approx(label - expit(theta + margin), rel=1e-8, abs=1e-300)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3.0])
def test_converges_from_far_away(scale):
    """Newton's method is safe from a start thousands of units off, on separable examples, with little prior."""
    n, m, p = 20, 8, 4
    examples = draw(3, n, m, p)
    examples = replace(examples, X=scale * examples.X)
    rng = np.random.default_rng(9)
    prior = Posterior(mean=1e4 * rng.standard_normal((n, p)), precision=np.broadcast_to(1e-2 * np.eye(p), (n, p, p)))
    found = update(prior, examples, family=LOGISTIC, forgetting=1.0, prior_precision=1.0)
    assert found.converged.all()
    eta = score(found.posterior, examples.X) + examples.offset
    pull = 1e-2 * (found.posterior.mean - prior.mean)
    push = ((examples.weight * (examples.y - expit(eta)))[:, None, :] @ examples.X)[:, 0, :]
    np.testing.assert_allclose(pull, push, atol=1e-8 * max(1.0, scale))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    log_scale=st.floats(-3, 3),
    log_precision=st.floats(-4, 4),
    forgetting=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_always_ends_at_a_stationary_point(seed, log_scale, log_precision, forgetting):
    """Whatever the scales, what is called converged has no gradient left."""
    n, m, p = 3, 6, 3
    examples, prior = draw(seed, n, m, p), draw_prior(seed + 1, n, p)
    examples = replace(examples, X=10**log_scale * examples.X)
    prior = replace(prior, precision=10**log_precision * prior.precision)
    R = 10**log_precision
    found = update(prior, examples, family=LOGISTIC, forgetting=forgetting, prior_precision=R)
    assert found.converged.all()
    eta = score(found.posterior, examples.X) + examples.offset
    away = (prior.precision @ (found.posterior.mean - prior.mean)[:, :, None])[:, :, 0]
    past = forgetting * away + (1 - forgetting) * R * found.posterior.mean
    terms = (examples.weight * (examples.y - expit(eta)))[:, :, None] * examples.X
    step = np.linalg.solve(found.posterior.precision, (past - terms.sum(axis=1))[:, :, None])[:, :, 0]
    assert np.abs(score(Posterior(mean=step, precision=prior.precision), examples.X)).max() < 1e-6


@pytest.mark.parametrize("curvature", ["full", "diagonal", "diagonal-simple"])
@pytest.mark.parametrize("family", [SQUARED, LOGISTIC], ids=["squared", "logistic"])
def test_others_do_not_change_a_bit(family, curvature):
    """Every user's result is the same bits alone, in other company, and beside users with NaN or no curvature."""
    n, m, p = 40, 9, 5
    examples, prior = draw(11, n, m, p, family.name), draw_prior(12, n, p)
    options = {"family": family, "forgetting": 0.7, "prior_precision": 1.0, "curvature": curvature}
    together = update(prior, examples, **options)
    for rows in (slice(0, 1), slice(7, 8), slice(30, 40), np.array([3, 39, 0])):
        some = update(take(prior, rows), take(examples, rows), **options)
        assert_same_bits(some.posterior, take(together.posterior, rows))
        assert some.iterations.tolist() == together.iterations[rows].tolist()
    X, precision, mean = examples.X.copy(), prior.precision.copy(), prior.mean.copy()
    X[1, 2, 3], X[2], mean[4], precision[5] = np.nan, np.inf, np.nan, -np.eye(p) * 1e6
    precision[6] = np.nan
    with np.errstate(all="ignore"):
        found = update(Posterior(mean=mean, precision=precision), replace(examples, X=X), **options)
    well = np.setdiff1d(np.arange(n), [1, 2, 4, 5, 6])
    assert_same_bits(take(found.posterior, well), take(together.posterior, well))
    assert not found.finite[[1, 2, 4, 6]].any()
    assert found.finite[well].all()
    assert found.posterior.mean[1].tobytes() == prior.mean[1].tobytes()
    assert not found.converged[[1, 2, 4, 6]].any()


def test_the_layout_of_the_examples_does_not_matter():
    """Column-major or strided examples give the same bits as row-major ones."""
    examples, prior = draw(11, 10, 9, 5), draw_prior(12, 10, 5)
    options = {"family": LOGISTIC, "forgetting": 0.7, "prior_precision": 1.0}
    expected = update(prior, examples, **options).posterior
    strided = np.zeros((10, 9, 10))[:, :, ::2]
    strided[...] = examples.X
    for X in (np.asfortranarray(examples.X), strided):
        assert_same_bits(update(prior, replace(examples, X=X), **options).posterior, expected)


@pytest.mark.parametrize("curvature", ["full", "diagonal"])
def test_a_quiet_user_is_unchanged_to_the_bit(curvature):
    """Without new examples nothing is forgotten either."""
    examples, prior = draw(13, 3, 4, 3), draw_prior(14, 3, 3)
    if curvature == "diagonal":
        prior = replace(prior, precision=np.abs(prior.precision[:, 0, :]) + 0.1)
    weight = examples.weight * [[1], [0], [1]]
    found = update(
        prior,
        replace(examples, weight=weight),
        family=LOGISTIC,
        forgetting=0.5,
        prior_precision=1.0,
        curvature=curvature,
    )
    assert_same_bits(take(found.posterior, slice(1, 2)), take(prior, slice(1, 2)))
    assert found.iterations.tolist()[1] == 0
    assert found.converged[1]
    assert (found.posterior.mean[0] != prior.mean[0]).all()
    nobody = Examples(X=np.zeros((2, 0, 3)), y=np.zeros((2, 0)), weight=np.zeros((2, 0)), offset=np.zeros((2, 0)))
    still = update(
        take(prior, slice(2)), nobody, family=LOGISTIC, forgetting=0.5, prior_precision=1.0, curvature=curvature
    )
    assert_same_bits(still.posterior, take(prior, slice(2)))


def test_arguments_are_not_changed():
    """The prior and the examples are read only."""
    examples, prior = draw(15, 3, 4, 3), draw_prior(16, 3, 3)
    copies = [array.copy() for record in (examples, prior) for array in arrays(record).values()]
    update(prior, examples, family=LOGISTIC, forgetting=0.5, prior_precision=1.0)
    after = [array for record in (examples, prior) for array in arrays(record).values()]
    assert all(a.tobytes() == b.tobytes() for a, b in zip(copies, after, strict=True))


def test_what_is_kept_of_the_curvature():
    """Diagonal is the precision of each coordinate's own variance, diagonal-simple the diagonal of H."""
    examples, prior = draw(17, 4, 10, 3), draw_prior(18, 4, 3)
    options = {"family": LOGISTIC, "forgetting": 0.9, "prior_precision": 1.0}
    full = update(prior, examples, **options).posterior
    diagonal = update(prior, examples, **options, curvature="diagonal").posterior
    simple = update(prior, examples, **options, curvature="diagonal-simple").posterior
    assert full.mean.tobytes() == diagonal.mean.tobytes() == simple.mean.tobytes()
    variance = np.diagonal(np.linalg.inv(full.precision), axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal.precision, 1 / variance, rtol=1e-10)
    assert np.array_equal(simple.precision, np.diagonal(full.precision, axis1=1, axis2=2))
    assert (diagonal.precision < simple.precision).all()
    # a diagonal past is the same past as that matrix
    matrix = Posterior(mean=simple.mean, precision=simple.full_precision)
    a, b = (update(past, examples, **options).posterior for past in (simple, matrix))
    np.testing.assert_allclose(a.precision, b.precision, rtol=1e-12)


def test_not_converged_is_a_value():
    """With too few steps allowed the result says so, and is still nearer than the start."""
    examples, prior = draw(19, 3, 30, 3), draw_prior(20, 3, 3)
    found = update(prior, examples, family=LOGISTIC, forgetting=1.0, prior_precision=1.0, max_iterations=1)
    assert not found.converged.any()
    assert found.finite.all()
    for i in range(3):
        arguments = (prior, examples, i, LOGISTIC, 1.0, np.ones(3), 1.0)
        assert objective(found.posterior.mean[i], *arguments) < objective(prior.mean[i], *arguments)


@pytest.mark.parametrize("bad", [{"forgetting": 1.1}, {"forgetting": -0.1}, {"curvature": "low-rank"}])
def test_settings_out_of_range(bad):
    """A forgetting factor outside [0, 1] and an unknown curvature are errors."""
    settings_ = {"family": LOGISTIC, "forgetting": 0.5, "prior_precision": 1.0} | bad
    with pytest.raises(ValueError, match=f"Expected .*{next(iter(bad))}"):
        update(draw_prior(1, 2, 3), draw(1, 2, 3, 3), **settings_)


def test_torch_gives_the_same():
    """The same functions on tensors."""
    examples, prior = draw(21, 4, 8, 3), draw_prior(22, 4, 3)
    tensors = [type(r)(**{k: torch.from_numpy(v) for k, v in arrays(r).items()}) for r in (prior, examples)]
    options = {"family": LOGISTIC, "forgetting": 0.8, "prior_precision": 1.0}
    a, b = update(prior, examples, **options), update(*tensors, **options)
    np.testing.assert_allclose(b.posterior.mean.numpy(), a.posterior.mean, rtol=1e-9)
    np.testing.assert_allclose(b.posterior.precision.numpy(), a.posterior.precision, rtol=1e-9)
    np.testing.assert_allclose(
        predict(b.posterior, tensors[1].X).stddev.numpy(), predict(a.posterior, examples.X).stddev, rtol=1e-9
    )


@pytest.mark.parametrize("diagonal", [False, True])
def test_sampling_uses_the_variance_as_variance(diagonal):
    """Draws have the covariance H^-1, and their scores the variance that the prediction states."""
    posterior = draw_prior(23, 1, 3)
    posterior = replace(posterior, precision=4 * posterior.precision)
    if diagonal:
        posterior = replace(posterior, precision=np.array([[4.0, 0.25, 9.0]]))
    draws, rng = 200_000, np.random.default_rng(24)
    many = Posterior(
        mean=np.repeat(posterior.mean, draws, axis=0), precision=np.repeat(posterior.precision, draws, axis=0)
    )
    theta = sample(many, rng.standard_normal((draws, 3)))
    expected = np.linalg.inv(posterior.full_precision[0])
    # a sample variance of 2e5 draws is off by 5 standard deviations of 0.32 % once in 1e6
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    assert (np.abs(np.cov(theta.T) - expected) < 0.02 * scale).all()
    X = rng.standard_normal((1, 5, 3))
    told = predict(posterior, X, 1.5)
    np.testing.assert_allclose(told.stddev[0], np.sqrt(((X[0] @ expected) * X[0]).sum(axis=1)), rtol=1e-10)
    np.testing.assert_allclose(told.mean[0], X[0] @ posterior.mean[0] + 1.5, rtol=1e-12)
    z = rng.standard_normal((1, 3))
    np.testing.assert_allclose(
        thompson_scores(posterior, X, z, 1.5)[0], X[0] @ sample(posterior, z)[0] + 1.5, rtol=1e-12
    )


def test_a_precision_that_is_none_stays_with_its_user():
    """Not positive definite: NaN for that user's uncertainty and draw, others as alone."""
    posterior = draw_prior(25, 3, 3)
    posterior.precision[1] = -np.eye(3)
    X, z = np.ones((3, 2, 3)), np.ones((3, 3))
    stddev, theta = predict(posterior, X).stddev, sample(posterior, z)
    assert np.isnan(stddev[1]).all()
    assert np.isnan(theta[1]).all()
    alone = take(posterior, slice(2, 3))
    assert predict(alone, X[2:]).stddev.tobytes() == stddev[2:].tobytes()
    assert sample(alone, z[2:]).tobytes() == theta[2:].tobytes()


def test_probability_averages_over_what_is_not_known():
    """It is the mean of the logistic function over the predictor's distribution, to .02, and never less certain."""
    rng = np.random.default_rng(26)
    posterior = Posterior(mean=np.array([[2.0]]), precision=np.array([[[0.2]]]))
    told = predict(posterior, np.ones((1, 1, 1)))
    exact = expit(told.mean[0, 0] + told.stddev[0, 0] * rng.standard_normal(400_000)).mean()
    assert told.probability()[0, 0] == pytest.approx(exact, abs=0.02)
    assert 0.5 < told.probability()[0, 0] < expit(2.0)


def test_the_import_is_light():
    """Neither scipy nor flwr nor torch is imported for it."""
    code = (
        "import sys, client.incremental, client.entities, client.personal_update, client.refolding; "
        "print([name for name in ('scipy', 'flwr', 'torch', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
