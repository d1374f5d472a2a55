"""Posteriors of a network's personal parts."""

import numpy as np
import pytest
import torch
from torch.func import jacrev

from client.network_fit import Examples, Likelihood, fit
from common.families import FAMILIES
from tests.neural import MODULES, examples, network, random, shared_of, users

FAMILY = {"mlp": "logistic", "classes": "softmax", "convolutions": "softmax", "words": "squared", "sequence": "squared"}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def likelihood(family: str) -> Likelihood:
    return Likelihood(family=family, noise_variance=0.3 if family == "squared" else 1.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_neural_likelihood_is_that_of_the_family(family):
    """Loss up to units, residual as its derivative, and a root of its second derivative."""
    eta = random(5, 1 if family != "softmax" else 3, scale=2.0).to(torch.float64)
    y = examples("classes", family, 1, 5).y[0].to(torch.float64)
    said = likelihood(family)
    of = FAMILIES[family].loss(eta.numpy() if family == "softmax" else eta[:, 0].numpy(), y.numpy())
    units = 2 * said.noise_variance if family == "squared" else 1.0
    np.testing.assert_allclose(said.loss(eta, y).numpy(), of / units, rtol=1e-6)
    for i in range(5):
        residual = jacrev(lambda e, i=i: said.loss(e, y[i]))(eta[i])
        torch.testing.assert_close(said.residual(eta, y)[i], residual)
        hessian = jacrev(lambda e, i=i: said.residual(e, y[i]))(eta[i])
        root = said.curvature_root(eta[i], torch.eye(eta.shape[1], dtype=torch.float64))
        torch.testing.assert_close(root.T @ root, hessian)


@pytest.mark.parametrize("form", ["vector", "matrix"])
@pytest.mark.parametrize("steps", [1, 3])
def test_neural_last_linear_layer_is_solved_exactly(form, steps):
    """Under squared loss the posterior is that of a linear model, after one step as after three."""
    adapted = network("mlp", layers=("3",), form=form, rank=1)
    shared, of = shared_of(adapted, scale=1.0), examples("mlp", "squared", 3, 9)
    found = fit(adapted, shared, of, likelihood=likelihood("squared"), b_variance=0.5, steps=steps, sparsity=False)
    for i in range(3):
        J = jacrev(lambda w, i=i: adapted.outputs(adapted.theta(shared, w), of.X[i])[:, 0])
        H = J(torch.zeros(adapted.architecture.rank)).numpy().astype(np.float64)
        rest = (of.y[i] - adapted.outputs(adapted.base, of.X[i])[:, 0]).numpy()
        precision = H.T @ H / 0.3 + np.eye(H.shape[1])
        np.testing.assert_allclose(found.precision[i], precision, rtol=1e-4)
        np.testing.assert_allclose(found.w[i], np.linalg.solve(precision, H.T @ rest / 0.3), rtol=1e-3, atol=1e-5)
    assert found.support.shape == found.b.shape == (3, 0)


@pytest.mark.parametrize(("layers", "left"), [(("3",), 1e-3), (("*",), 1e-2)])
@pytest.mark.parametrize("name", ["mlp", "classes"])
def test_neural_fit_ends_where_the_objective_is_flat(name, layers, left):
    """Enough steps leave a gradient of losses and prior that is far below the one at the start."""
    adapted = network(name, layers=layers)
    shared, of, said = shared_of(adapted), examples(name, FAMILY[name], 4, 12), likelihood(FAMILY[name])
    found = fit(adapted, shared, of, likelihood=said, b_variance=0.5, steps=20, sparsity=False)

    def gradient(w, i):
        def objective(w):
            eta = adapted.outputs(adapted.theta(shared, w), of.X[i])
            return said.loss(eta, of.y[i]).sum() + (w**2).sum() / 2

        return jacrev(objective)(w).abs().max()

    for i in range(4):
        assert gradient(found.w[i], i) < left * gradient(torch.zeros_like(found.w[i]), i)
        assert found.w[i].abs().max() > 1e-2


@pytest.mark.parametrize("weighted", [2.0, 5.0])
def test_neural_weight_counts_examples(weighted):
    """An example of weight 2 is two examples; one of weight 0 is none."""
    adapted, said = network("mlp"), likelihood("logistic")
    of = examples("mlp", "logistic", 1, 6)
    repeated = Examples(
        X=of.X[:, :4].repeat(1, int(weighted), 1),
        y=of.y[:, :4].repeat(1, int(weighted)),
        weight=torch.ones(1, 4 * int(weighted)),
    )
    weights = Examples(X=of.X, y=of.y, weight=torch.tensor([[weighted] * 4 + [0.0] * 2]))
    first, second = (
        fit(adapted, shared_of(adapted), one, likelihood=said, b_variance=0.5, steps=2) for one in (weights, repeated)
    )
    torch.testing.assert_close(first.theta, second.theta, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first.precision, second.precision, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("place", ["bias", "weight"])
@pytest.mark.parametrize(("layer", "size", "error"), [("3", 1.0, 0.05), ("0", 0.2, 0.05)])
def test_neural_planted_entry_is_found(layer, size, error, place):
    """One entry that differs from the shared part is found at its place, with its value, and no other."""
    adapted = network("mlp", rank=1, sparsity=2, layers=(layer,))
    shared, of = shared_of(adapted, scale=0.01), examples("mlp", "squared", 1, 200)
    (at,) = adapted.architecture.layers
    planted = at.start + (at.rows * at.columns if place == "bias" else at.columns - 1)
    theta = adapted.base.clone()
    theta[planted] += size
    y = adapted.outputs(theta, of.X[0]).T + random(1, 200, scale=0.02)
    said = Likelihood(family="squared", noise_variance=0.02**2)
    found = fit(adapted, shared, Examples(X=of.X, y=y, weight=of.weight), likelihood=said, b_variance=1.0, steps=1)
    values = dict(zip(found.support[0].tolist(), found.b[0].tolist(), strict=True))
    assert abs(values.pop(planted) - size) < error
    assert all(abs(value) < error for value in values.values())


@pytest.mark.parametrize("form", ["vector", "matrix"])
@pytest.mark.parametrize("name", MODULES)
def test_neural_sparse_part_is_sparse_in_every_layer(name, form):
    """At most k places a layer, all different, none outside; theta is base + U w + b."""
    adapted = network(name, form=form, rank=1)
    shared, of = shared_of(adapted), examples(name, FAMILY[name], 6, 30)
    of = Examples(X=of.X, y=of.y * (3 if FAMILY[name] == "squared" else 1), weight=of.weight)
    found = fit(adapted, shared, of, likelihood=likelihood(FAMILY[name]), b_variance=5.0, steps=1)
    assert found.support.shape == (6, 2 * len(adapted.architecture.layers))
    assert (found.support >= 0).any()
    for i in range(6):
        used = found.support[i] >= 0
        places = found.support[i][used].tolist()
        assert len(set(places)) == len(places)
        by_layer = [
            sum(layer.start <= place < layer.start + layer.size for place in places)
            for layer in adapted.architecture.layers
        ]
        assert sum(by_layer) == len(places)
        assert max(by_layer) <= 2
        assert not found.b[i][~used].any()
        expected = adapted.theta(shared, found.w[i])
        expected[places] += found.b[i][used]
        torch.testing.assert_close(found.theta[i], expected)


def test_neural_fit_without_U_has_b_alone():
    """Rank 0 is a personal network of base + b."""
    adapted = network("mlp", rank=0)
    found = fit(
        adapted,
        adapted.base,
        examples("mlp", "logistic", 2, 9),
        likelihood=likelihood("logistic"),
        b_variance=0.5,
        steps=2,
    )
    assert found.w.shape == (2, 0)
    assert found.precision.shape == (2, 4, 4)


@pytest.mark.parametrize("name", MODULES)
def test_neural_user_without_examples_has_the_prior(name):
    """w and b are exactly zero, nothing is chosen, and the precision is the prior's."""
    adapted = network(name)
    shared, of = shared_of(adapted), examples(name, FAMILY[name], 2, 3)
    of = Examples(X=of.X, y=of.y, weight=torch.tensor([[0.0] * 3, [1.0] * 3]))
    found = fit(adapted, shared, of, likelihood=likelihood(FAMILY[name]), b_variance=0.5, steps=2)
    K = adapted.architecture.sparsity
    assert not found.w[0].any()
    assert found.w[1].any()
    assert found.support[0].tolist() == [-1] * K
    assert not found.b[0].any()
    expected = torch.diag(torch.tensor([1.0] * adapted.architecture.rank + [2.0] * K))
    assert torch.equal(found.precision[0], expected)
    assert torch.equal(found.theta[0], adapted.base)


@pytest.mark.parametrize("family", FAMILIES)
def test_neural_bad_numbers_stay_with_their_user(family):
    """Nothing raises, and in a batch of the same shape every other user's posterior is the same bits."""
    name = "classes" if family == "softmax" else "mlp"
    adapted, said = network(name), likelihood(family)
    of = examples(name, family, 5, 6)
    before = fit(adapted, shared_of(adapted), of, likelihood=said, b_variance=0.5, steps=2)
    others = [0, 1, 3, 4]
    for value in (torch.nan, torch.inf, -torch.inf, 1e30, -7.0):
        for attribute in ("X", "y", "weight"):
            parts = {"X": of.X.clone(), "y": of.y.clone(), "weight": of.weight.clone()}
            parts[attribute][2] = value
            after = fit(adapted, shared_of(adapted), Examples(**parts), likelihood=said, b_variance=0.5, steps=2)
            for field in ("w", "support", "b", "precision", "theta"):
                assert torch.equal(getattr(after, field)[others], getattr(before, field)[others])
            assert torch.isfinite(after.w[2]).all()


def test_neural_fit_with_a_shared_part_of_each_user():
    """`n x D` gives each user what that user's own shared part gives."""
    adapted, said, of = network("mlp"), likelihood("logistic"), examples("mlp", "logistic", 3, 9)
    shared = torch.stack([shared_of(adapted, scale) for scale in (0.1, 0.5, 1.0)])
    together = fit(adapted, shared, of, likelihood=said, b_variance=0.5, steps=2)
    for i in range(3):
        alone = fit(adapted, shared[i], users(of, [i]), likelihood=said, b_variance=0.5, steps=2)
        torch.testing.assert_close(together.theta[i], alone.theta[0], rtol=1e-4, atol=1e-5)
