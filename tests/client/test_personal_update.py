"""Updating what a device keeps, against personalizing on all examples at once."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from client.batches import Design
from client.incremental import predict
from client.personal_update import (
    Personal,
    coordinates,
    examples_of,
    follow_evidence,
    from_state,
    released_prior,
    update_personal,
    with_prior,
)
from client.personalize import Choice, evidence_gain, log_prior_odds, personalize, solve
from client.refolding import of_solution
from common.families import FAMILIES
from common.model import SharedModel
from tests.populations import arrays, design, draw_model, draw_users, torch_batch, torch_model

SQUARED, LOGISTIC = FAMILIES["squared"], FAMILIES["logistic"]


def take(record, rows):
    """Some users of a record of arrays, or of records."""
    return type(record)(**{k: v[rows] if hasattr(v, "shape") else take(v, rows) for k, v in arrays(record).items()})


def joined(*parts: Design) -> Design:
    """The examples of all parts."""
    fields = {name: [getattr(part, name) for part in parts] for name in ("X", "y", "weight")}
    whole = {name: np.concatenate(values, axis=1) for name, values in fields.items()}
    return Design(**whole, count=whole["weight"].sum(axis=1))


def bits(record) -> bytes:
    """All of a record's numbers."""
    return b"".join(v.tobytes() if hasattr(v, "tobytes") else bits(v) for v in arrays(record).values())


def stream(seed: int, model: SharedModel, counts, *, sparsity: int, family: str = "squared") -> list[Design]:
    """The examples of three users of the model, in batches of `counts`."""
    rng = np.random.default_rng(seed)
    users = draw_users(rng, model, (sum(counts),) * 3, sparsity=sparsity, family=family)
    whole, ends = design(users), np.cumsum((0, *counts))
    cuts = [{k: getattr(whole, k)[:, a:b] for k in ("X", "y", "weight")} for a, b in pairwise(ends)]
    return [Design(**cut, count=cut["weight"].sum(axis=1)) for cut in cuts]


def test_a_fixed_support_is_exact_for_squared_loss():
    """Batch by batch ends where personalizing on all examples with that prior does, to 1e-8."""
    model = draw_model(np.random.default_rng(0), 8, 2)
    parts = stream(1, model, (6, 1, 9, 14), sparsity=2)
    start = of_solution(solve(parts[0], model, sparsity=3, with_precision=True), model)
    personal = start
    for part in parts[1:]:
        personal = update_personal(personal, part, model, family=SQUARED, change_support=False).personal
    choice = Choice(support=start.support, share=start.share(model))
    X = coordinates(joined(*parts).X, model, start.support)
    for i in range(3):
        H = X[i].T @ X[i] / model.noise_variance + np.diag(start.prior_precision[i])
        residual = joined(*parts).y[i] - joined(*parts).X[i] @ model.beta
        np.testing.assert_allclose(personal.posterior.precision[i], H, rtol=1e-8, atol=1e-10)
        mean = np.linalg.solve(H, X[i].T @ residual / model.noise_variance)
        np.testing.assert_allclose(personal.posterior.mean[i], mean, rtol=1e-8)
    assert np.array_equal(choice.support, personal.support)


@pytest.mark.parametrize("family", [SQUARED, LOGISTIC], ids=["squared", "logistic"])
def test_theta_is_what_the_coordinates_say(family):
    """The predictor from (w, b on its support) is x'theta, and the state goes to the store and back."""
    model = replace(draw_model(np.random.default_rng(2), 7, 2), noise_variance=1.0)
    parts = stream(3, model, (12, 5), sparsity=2, family=family.name)
    before = update_personal(released_prior(model, 3, sparsity=3), parts[0], model, family=family).personal
    theta, examples = before.theta(model), examples_of(parts[1], model, before.support)
    told = predict(before.posterior, examples.X, examples.offset)
    np.testing.assert_allclose(told.mean, (parts[1].X @ theta[:, :, None])[:, :, 0], rtol=1e-10)
    back = from_state(before.state(model), model, share=before.share(model))
    for name in ("mean", "precision"):
        assert getattr(back.posterior, name).tobytes() == getattr(before.posterior, name).tobytes()
    np.testing.assert_allclose(back.prior_precision, before.prior_precision, rtol=1e-14)
    assert np.array_equal(back.support, before.support)


def test_a_new_user_is_personalized():
    """From the released prior, one batch gives nearly the theta and predictions of `personalize`, and its support."""
    rng = np.random.default_rng(4)
    model = draw_model(rng, 12, 2, b_variance=2.0)
    batch = design(draw_users(rng, model, (40,) * 30, sparsity=2))
    found = update_personal(released_prior(model, 30, sparsity=3), batch, model, family=SQUARED).personal
    expected = personalize(batch, model, family=SQUARED, sparsity=3)
    away = np.linalg.norm(found.theta(model) - expected.theta, axis=1) / np.linalg.norm(expected.theta, axis=1)
    assert np.median(away) < 0.02
    strong = np.abs(expected.b) > 1.0
    assert strong.sum() > 20
    for i, slot in np.argwhere(strong):
        assert expected.support[i, slot] in found.support[i]


@pytest.mark.parametrize("family", [SQUARED, LOGISTIC], ids=["squared", "logistic"])
def test_the_support_follows_the_user(family):
    """A feature that becomes personal enters, one that ceases to be leaves, and there are never more than allowed."""
    rng = np.random.default_rng(5)
    d, n, m = 10, 20, 120
    model = SharedModel(beta=np.zeros(d), U=0.5 * np.eye(d)[:, :1], b_variance=4.0, noise_variance=1.0)
    personal = released_prior(model, n, sparsity=2)

    def batch(features) -> Design:
        X = rng.standard_normal((n, m, d))
        eta = 2.5 * X[:, :, features].sum(axis=2)
        noisy = eta + rng.standard_normal((n, m))
        y = noisy if family is SQUARED else 1.0 * (rng.random((n, m)) < 1 / (1 + np.exp(-eta)))
        return Design(X=X, y=y, weight=np.ones((n, m)), count=np.full(n, float(m)))

    def run(features, times: int) -> np.ndarray:
        nonlocal personal
        for _ in range(times):
            found = update_personal(personal, batch(features), model, family=family, forgetting=0.3)
            personal = found.personal
            assert found.converged.all()
        return np.sort(personal.support, axis=1)

    assert (run([3], 2) == 3).any(axis=1).all()
    assert run([3, 7], 3).tolist() == [[3, 7]] * n
    # features 3 and 7 cease, 5 and 6 begin, in only two places
    assert run([5, 6], 6).tolist() == [[5, 6]] * n
    left = run([], 6)
    assert (left == -1).mean() > 0.4
    theta = personal.theta(model)
    assert np.abs(theta).max() < 0.5
    unused = personal.support == -1
    assert (personal.posterior.mean[:, 1:][unused] == 0).all()


def test_slots_are_unique():
    """No feature is ever in two slots."""
    model = draw_model(np.random.default_rng(6), 6, 1, b_variance=3.0)
    personal = released_prior(model, 3, sparsity=4)
    for part in stream(7, model, (3, 4, 2, 8, 5, 9, 3), sparsity=3):
        personal = update_personal(personal, part, model, family=SQUARED, forgetting=0.5).personal
        for row in personal.support:
            used = row[row >= 0]
            assert len(set(used.tolist())) == len(used)


def test_another_prior_is_exact():
    """Changing tau and the shares afterwards gives the posterior that these priors would have given."""
    model = draw_model(np.random.default_rng(8), 7, 2)
    (part,) = stream(9, model, (15,), sparsity=2)
    before = of_solution(solve(part, model, sparsity=3, with_precision=True), model)
    level = before.prior_precision * np.random.default_rng(0).uniform(0.3, 3, before.prior_precision.shape)
    moved = with_prior(before, before.support, level)
    X = coordinates(part.X, model, before.support)
    for i in range(3):
        H = X[i].T @ X[i] / model.noise_variance + np.diag(level[i])
        np.testing.assert_allclose(moved.posterior.precision[i], H, rtol=1e-9, atol=1e-10)
        residual = part.y[i] - part.X[i] @ model.beta
        mean = np.linalg.solve(H, X[i].T @ residual / model.noise_variance)
        np.testing.assert_allclose(moved.posterior.mean[i], mean, rtol=1e-8)
    # and a feature that leaves is conditioned on being zero
    support = before.support.copy()
    support[:, 0] = -1
    level[:, 2] = 1 / model.b_variance
    gone = with_prior(before, support, level)
    keep = [0, 1, 3, 4]
    for i in range(3):
        part_of = X[i][:, keep]
        H = part_of.T @ part_of / model.noise_variance + np.diag(level[i][keep])
        mean = np.linalg.solve(H, part_of.T @ (part.y[i] - part.X[i] @ model.beta) / model.noise_variance)
        np.testing.assert_allclose(gone.posterior.mean[i][keep], mean, rtol=1e-8)
        assert gone.posterior.mean[i][2] == 0


def test_evidence_for_a_slot_is_the_marginal_likelihoods():
    """A slot stays with the share that its evidence, all else integrated out, gives it."""
    rng = np.random.default_rng(10)
    model = replace(draw_model(rng, 6, 0), b_variance=1.5)
    (part,) = stream(11, model, (12,), sparsity=1)
    before = of_solution(solve(part, model, sparsity=2, with_precision=True), model)
    after = follow_evidence(before, model)
    v = model.b_variance
    for i in range(3):
        for slot in range(2):
            other = before.support[i, 1 - slot]
            prior = np.eye(12) * model.noise_variance
            x = part.X[i][:, other]
            prior += np.outer(x, x) / before.prior_precision[i, 1 - slot]
            inverse, x = np.linalg.inv(prior), part.X[i][:, before.support[i, slot]]
            q = x @ inverse @ (part.y[i] - part.X[i] @ model.beta)
            h = x @ inverse @ x
            gain = evidence_gain(np.array([q]), np.array([h]), v)[0]
            p = 1 / (1 + np.exp(log_prior_odds(6, 2) - gain))
            assert (after.support[i, slot] >= 0) == (gain > 0)
            if gain > 0:
                assert after.share(model)[i, slot] == pytest.approx(p / (1 + (1 - p) * v * h), rel=1e-8)


@pytest.mark.parametrize("family", [SQUARED, LOGISTIC], ids=["squared", "logistic"])
def test_others_do_not_change_a_bit(family):
    """Alone, in company, beside NaN: the same bits; quiet users and NaN users keep what they had."""
    rng = np.random.default_rng(12)
    model = replace(draw_model(rng, 7, 2, b_variance=2.0), noise_variance=1.0)
    first, second = (
        design(draw_users(rng, model, (9,) * 25, sparsity=2, family=family.name), length=10) for _ in range(2)
    )
    before = update_personal(released_prior(model, 25, sparsity=3), first, model, family=family).personal
    weight = second.weight.copy()
    weight[6] = 0
    second = replace(second, weight=weight)
    together = update_personal(before, second, model, family=family, forgetting=0.8)
    for rows in (slice(0, 1), slice(11, 12), np.array([20, 3])):
        some = update_personal(take(before, rows), take(second, rows), model, family=family, forgetting=0.8)
        assert bits(some.personal) == bits(take(together.personal, rows))
    X = second.X.copy()
    X[4, 2, 1], X[5] = np.nan, 1e200
    with np.errstate(all="ignore"):
        found = update_personal(before, replace(second, X=X), model, family=family, forgetting=0.8)
    well = np.setdiff1d(np.arange(25), [4, 5])
    assert bits(take(found.personal, well)) == bits(take(together.personal, well))
    for i in (4, 6):
        one = slice(i, i + 1)
        assert bits(take(found.personal, one)) == bits(take(before, one))
    assert not found.converged[4]
    assert found.converged[6]
    assert np.isfinite(found.personal.posterior.mean).all()


def test_new_users_without_examples_are_the_released_prior():
    """Nothing is learned from nothing."""
    model = draw_model(np.random.default_rng(13), 5, 2)
    empty = design(draw_users(np.random.default_rng(0), model, (0, 0)))
    prior = released_prior(model, 2, sparsity=2)
    found = update_personal(prior, empty, model, family=SQUARED, forgetting=0.5)
    assert bits(found.personal) == bits(prior)
    np.testing.assert_array_equal(found.personal.theta(model), np.tile(model.beta, (2, 1)))


@pytest.mark.parametrize(("rank", "sparsity"), [(0, 2), (2, 0), (0, 0), (3, 4)])
def test_shapes(rank, sparsity):
    """Without U, without b, without either, and with every feature allowed."""
    model = draw_model(np.random.default_rng(14), 4, rank)
    parts = stream(15, model, (6, 5), sparsity=min(sparsity, 2))
    personal = released_prior(model, 3, sparsity=sparsity)
    for part in parts:
        found = update_personal(personal, part, model, family=SQUARED)
        personal = found.personal
        assert found.converged.all()
    assert personal.theta(model).shape == (3, 4)
    assert personal.state(model).scale.shape == (3,)


def test_torch_gives_the_same():
    """The same functions on tensors."""
    model = draw_model(np.random.default_rng(16), 6, 2, b_variance=2.0)
    parts = stream(17, model, (8, 7), sparsity=2)
    a: Personal = released_prior(model, 3, sparsity=2)
    b = released_prior(torch_model(model), 3, sparsity=2)
    for part in parts:
        a = update_personal(a, part, model, family=SQUARED, forgetting=0.9).personal
        b = update_personal(b, torch_batch(part), torch_model(model), family=SQUARED, forgetting=0.9).personal
    assert np.array_equal(a.support, b.support.numpy())
    np.testing.assert_allclose(b.posterior.mean.numpy(), a.posterior.mean, rtol=1e-8)


def test_tau_follows_as_in_personalization():
    """Whatever tau it had, a posterior of the same examples gets the tau of `personalize`."""
    model = draw_model(np.random.default_rng(18), 6, 3)
    (part,) = stream(19, model, (9,), sparsity=0)
    expected = solve(part, model, sparsity=0)
    start = released_prior(model, 3, sparsity=0)
    found = update_personal(start, part, model, family=SQUARED, change_support=False).personal
    assert found.scale(model).tolist() == [1.0] * 3
    for _ in range(2):
        found = follow_evidence(found, model)
        np.testing.assert_allclose(found.scale(model), expected.scale, rtol=1e-10)
        np.testing.assert_allclose(found.theta(model), expected.theta, rtol=1e-9)
    at_once = update_personal(start, part, model, family=SQUARED).personal
    np.testing.assert_allclose(at_once.theta(model), expected.theta, rtol=1e-9)


def test_what_enters_is_what_the_marginal_likelihood_says():
    """The first features of a new user, and their shares, are those of dense algebra with w integrated out."""
    rng = np.random.default_rng(20)
    model = draw_model(rng, 6, 2, b_variance=2.0)
    part = design(draw_users(rng, model, (12,) * 4, sparsity=2))
    found = update_personal(released_prior(model, 4, sparsity=2), part, model, family=SQUARED).personal
    v = model.b_variance
    for i in range(4):
        X, residual = part.X[i], part.y[i] - part.X[i] @ model.beta
        covariance = model.noise_variance * np.eye(12) + X @ model.U @ model.U.T @ X.T
        for slot in range(2):
            solved = np.linalg.solve(covariance, X)
            q, h = solved.T @ residual, np.diag(X.T @ solved)
            gain = evidence_gain(q, h, v)
            gain[found.support[i, :slot]] = -np.inf
            best = int(np.argmax(gain))
            assert found.support[i, slot] == (best if gain[best] > 0 else -1)
            p = 1 / (1 + np.exp(log_prior_odds(6, 2) - gain[best]))
            share = p / (1 + (1 - p) * v * h[best])
            assert found.share(model)[i, slot] == pytest.approx(share if gain[best] > 0 else 0, rel=1e-8)
            covariance += v * share * np.outer(X[:, best], X[:, best])
