"""Going on under a new release without the old examples, against personalizing again on all of them."""

from dataclasses import replace

import numpy as np
import pytest

from client.batches import gram_of
from client.incremental import Posterior
from client.personal_update import Personal, coordinates, update_personal
from client.personalize import personalize, solve
from client.refolding import gram_after, of_solution, refold, refold_gram
from common.families import FAMILIES
from common.model import SharedModel
from tests.client.test_personal_update import bits, joined, stream, take
from tests.populations import draw_model, torch_model

SQUARED, LOGISTIC = FAMILIES["squared"], FAMILIES["logistic"]


def after(model: SharedModel, part, sparsity: int) -> Personal:
    """Personalized on one batch."""
    return of_solution(solve(part, model, sparsity=sparsity, with_precision=True), model)


def test_the_same_model_changes_nothing():
    """Refolding into the model that the posterior came from gives the posterior."""
    model = draw_model(np.random.default_rng(0), 8, 2)
    old = after(model, stream(1, model, (12,), sparsity=2)[0], 2)
    new = refold(old, model, model, family=SQUARED, adapt=False)
    np.testing.assert_allclose(new.posterior.mean, old.posterior.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(new.posterior.precision, old.posterior.precision, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(new.prior_precision, old.prior_precision, rtol=1e-14)


def test_is_exact_within_the_old_span():
    """Where the new beta and U lie in the old span, the posterior is that of all old examples, to 1e-8."""
    rng = np.random.default_rng(2)
    old_model = draw_model(rng, 8, 3)
    new_model = SharedModel(
        beta=old_model.beta + old_model.U @ rng.standard_normal(3),
        U=old_model.U @ rng.standard_normal((3, 2)),
        b_variance=0.9,
        noise_variance=0.8,
    )
    (part,) = stream(3, old_model, (15,), sparsity=2)
    old = after(old_model, part, 2)
    new = refold(old, old_model, new_model, family=SQUARED, adapt=False)
    X = coordinates(part.X, new_model, old.support)
    np.testing.assert_allclose(new.scale(new_model), old.scale(old_model), rtol=1e-12)
    np.testing.assert_allclose(new.share(new_model), old.share(old_model), rtol=1e-12)
    for i in range(3):
        H = X[i].T @ X[i] / new_model.noise_variance + np.diag(new.prior_precision[i])
        natural = X[i].T @ (part.y[i] - part.X[i] @ new_model.beta) / new_model.noise_variance
        np.testing.assert_allclose(new.posterior.precision[i], H, rtol=1e-8, atol=1e-9)
        np.testing.assert_allclose(new.posterior.mean[i], np.linalg.solve(H, natural), rtol=1e-7)


def test_is_near_outside_of_it():
    """For a release that moved a little the thetas are nearer to those of all examples than the prior is, by far."""
    rng = np.random.default_rng(4)
    old_model = draw_model(rng, 8, 2)
    drift = 0.05 * rng.standard_normal((8, 3))
    new_model = replace(old_model, beta=old_model.beta + drift[:, 0], U=old_model.U + drift[:, 1:])
    (part,) = stream(5, old_model, (40,), sparsity=2)
    old = after(old_model, part, 2)
    new = refold(old, old_model, new_model, family=SQUARED)
    expected = personalize(part, new_model, family=SQUARED, sparsity=2).theta
    away = np.linalg.norm(new.theta(new_model) - expected, axis=1)
    assert (away < 0.2 * np.linalg.norm(new_model.beta - expected, axis=1)).all()


def test_a_metric_measures_as_the_examples_do():
    """With features of unequal scale the public second moment finds the old coordinates better than the identity."""
    rng = np.random.default_rng(6)
    d, n = 6, 3
    scales = np.array([1.0, 5.0, 1.0, 0.2, 1.0, 3.0])
    model = draw_model(rng, d, 2)
    (part,) = stream(7, model, (60,), sparsity=0)
    part = replace(part, X=part.X * scales)
    part = replace(part, y=(part.X @ (model.beta + model.U @ np.ones(2)))[:, :] + 0.3 * rng.standard_normal((n, 60)))
    new_model = replace(model, U=model.U + 0.15 * rng.standard_normal((d, 2)))
    old, expected = after(model, part, 0), personalize(part, new_model, family=SQUARED, sparsity=0)

    def error(metric) -> float:
        theta = refold(old, model, new_model, family=SQUARED, metric=metric).theta(new_model)
        return float((((theta - expected.theta) * scales) ** 2).sum())

    assert error(np.diag(scales**2)) < 0.5 * error(None)


@pytest.mark.parametrize("ranks", [(0, 2), (2, 0), (2, 4), (0, 0)])
def test_the_rank_may_change(ranks):
    """A model of more, fewer or no directions takes over what it can."""
    old_model, new_model = (draw_model(np.random.default_rng(8), 6, rank) for rank in ranks)
    old = after(old_model, stream(9, old_model, (10,), sparsity=1)[0], 2)
    new = refold(old, old_model, new_model, family=SQUARED)
    assert new.posterior.mean.shape == (3, ranks[1] + 2)
    assert np.isfinite(new.theta(new_model)).all()
    assert (np.linalg.eigvalsh(new.posterior.precision) > 0).all()


def test_kept_moments_are_exact_for_squared_loss():
    """With X'X kept, batch by batch, a new model's posteriors are those of all examples, support and all."""
    old_model, new_model = (draw_model(np.random.default_rng(seed), 7, 2) for seed in (10, 11))
    parts = stream(12, old_model, (6, 1, 9), sparsity=2)
    gram = None
    for part in parts:
        gram = gram_after(gram, part, np.zeros((3, 7)), family=SQUARED)
    new = refold_gram(gram, new_model, sparsity=3)
    whole = gram_of(joined(*parts))
    expected = of_solution(solve(whole, new_model, sparsity=3, with_precision=True), new_model)
    assert np.array_equal(new.support, expected.support)
    np.testing.assert_allclose(new.theta(new_model), expected.theta(new_model), rtol=1e-8)
    np.testing.assert_allclose(new.posterior.precision, expected.posterior.precision, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(gram.square, whole.square, rtol=1e-12)
    assert gram.count.tolist() == [16.0] * 3


def test_kept_moments_forget():
    """Older batches count delta, delta^2, ... of what they did."""
    model = draw_model(np.random.default_rng(13), 5, 1)
    parts = stream(14, model, (4, 4, 4), sparsity=0)
    gram = None
    for part in parts:
        gram = gram_after(gram, part, np.zeros((3, 5)), family=SQUARED, forgetting=0.5)
    weighted = [replace(part, weight=part.weight * 0.5 ** (2 - t)) for t, part in enumerate(parts)]
    np.testing.assert_allclose(gram.G, gram_of(joined(*weighted)).G, rtol=1e-12)


def test_kept_moments_of_logistic_loss_are_near():
    """Theta from the working responses is within a tenth of its distance to the prior of theta from all examples."""
    model = replace(draw_model(np.random.default_rng(15), 6, 2), noise_variance=1.0)
    new_model = replace(model, U=model.U + 0.1 * np.random.default_rng(16).standard_normal((6, 2)))
    parts = stream(17, model, (30, 30, 30), sparsity=0, family="logistic")
    personal, gram = None, None
    for t, part in enumerate(parts):
        if t == 0:
            personal = of_solution(personalize(part, model, family=LOGISTIC, sparsity=0, with_precision=True), model)
        else:
            personal = update_personal(personal, part, model, family=LOGISTIC).personal
        gram = gram_after(gram, part, personal.theta(model), family=LOGISTIC)
    expected = personalize(joined(*parts), new_model, family=LOGISTIC, sparsity=0).theta
    away = np.linalg.norm(refold_gram(gram, new_model, sparsity=0).theta(new_model) - expected)
    assert away < 0.1 * np.linalg.norm(expected - new_model.beta)


def test_kept_moments_leave_out_what_is_not_finite():
    """A quiet user's moments and a NaN user's stay to the bit; others are as alone."""
    model = draw_model(np.random.default_rng(18), 5, 1)
    first, second = stream(19, model, (4, 6), sparsity=0)
    before = gram_after(None, first, np.zeros((3, 5)), family=SQUARED)
    X, weight = second.X.copy(), second.weight.copy()
    X[0, 1, 2], weight[1] = np.nan, 0
    found = gram_after(before, replace(second, X=X, weight=weight), np.zeros((3, 5)), family=SQUARED, forgetting=0.5)
    assert bits(take(found, slice(0, 2))) == bits(take(before, slice(0, 2)))
    alone = gram_after(
        take(before, slice(2, 3)), take(second, slice(2, 3)), np.zeros((1, 5)), family=SQUARED, forgetting=0.5
    )
    assert bits(take(found, slice(2, 3))) == bits(alone)


def test_too_many_features_to_keep():
    """X'X of more than 64 features is not kept, and the error says so."""
    model = draw_model(np.random.default_rng(20), 65, 1)
    (part,) = stream(21, model, (2,), sparsity=0)
    with pytest.raises(ValueError, match="at most 64 features"):
        gram_after(None, part, np.zeros((3, 65)), family=SQUARED)


def test_others_do_not_change_a_bit():
    """A user's refolded posterior is the same bits alone and beside users without a posterior."""
    old_model, new_model = (draw_model(np.random.default_rng(seed), 7, 2) for seed in (22, 23))
    old = after(old_model, stream(24, old_model, (9,), sparsity=2)[0], 2)
    together = refold(old, old_model, new_model, family=SQUARED)
    alone = refold(take(old, slice(1, 2)), old_model, new_model, family=SQUARED)
    assert bits(alone) == bits(take(together, slice(1, 2)))
    mean = old.posterior.mean.copy()
    mean[0] = np.nan
    broken = replace(old, posterior=Posterior(mean=mean, precision=old.posterior.precision))
    with np.errstate(all="ignore"):
        found = refold(broken, old_model, new_model, family=SQUARED)
    assert bits(take(found, slice(1, 3))) == bits(take(together, slice(1, 3)))


def test_torch_gives_the_same():
    """The same function on tensors."""
    import torch

    old_model, new_model = (draw_model(np.random.default_rng(seed), 7, 2) for seed in (25, 26))
    old = after(old_model, stream(27, old_model, (9,), sparsity=2)[0], 2)
    tensors = Personal(
        posterior=Posterior(
            mean=torch.from_numpy(old.posterior.mean), precision=torch.from_numpy(old.posterior.precision)
        ),
        support=torch.from_numpy(old.support),
        prior_precision=torch.from_numpy(old.prior_precision),
    )
    found = refold(tensors, torch_model(old_model), torch_model(new_model), family=SQUARED)
    expected = refold(old, old_model, new_model, family=SQUARED)
    np.testing.assert_allclose(found.posterior.mean.numpy(), expected.posterior.mean, rtol=1e-8)
