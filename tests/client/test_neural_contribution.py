"""What a network's users send: against plain autograd, against Opacus, and what one user can move."""

import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from client.network_contribution import contribute, cross_fitted
from client.network_fit import Examples, Likelihood, fit, gradient_in_theta
from common.task import Adapters
from privacy.layout import SCALARS, Group, Layout
from tests.neural import MODULES, examples, mlp, network, random, shared_of, users
from tests.reference import squared_norm

FAMILY = {"mlp": "logistic", "classes": "softmax", "convolutions": "softmax", "words": "squared", "sequence": "squared"}
SHARE, SCALARS_SHARE = 0.97, 0.2
B_VARIANCE = 0.5


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def likelihood(family: str) -> Likelihood:
    return Likelihood(family=family, noise_variance=0.3 if family == "squared" else 1.0)


def adapters_of(adapted, **changes) -> Adapters:
    architecture = adapted.architecture
    return Adapters(
        **{"architecture": architecture.digest, "rank": 2, "trained": architecture.trained_size, "steps": 1, **changes}
    )


def layout_of(adapted, grid_scale: int = 2**30) -> Layout:
    groups = (
        Group(name="model", size=adapted.architecture.trained_size, share=SHARE),
        Group(name="scalars", size=len(SCALARS), share=SCALARS_SHARE),
    )
    return Layout(groups=groups, grid_scale=grid_scale)


def sent(adapted, of, family, *, clipping_norm=4.0, grid_scale=2**30, one_by_one=True, **changes):
    """`n x D` integers."""
    return contribute(
        adapted,
        shared_of(adapted),
        of,
        adapters_of(adapted, **changes),
        likelihood=likelihood(family),
        b_variance=B_VARIANCE,
        clipping_norm=clipping_norm,
        layout=layout_of(adapted, grid_scale),
        one_by_one=one_by_one,
    )


def halves(of, i):
    """One user's examples of even and of odd number."""
    return [
        Examples(X=of.X[i : i + 1, s::2], y=of.y[i : i + 1, s::2], weight=of.weight[i : i + 1, s::2]) for s in (0, 1)
    ]


def plain_gradient(adapted, shared, of, i, said):
    """The cross-fitted gradient of one user by autograd through theta = base + U w + b, w and b held."""
    even, odd = halves(of, i)
    total = torch.zeros_like(shared)
    for fitted, left_out in ((even, odd), (odd, even)):
        if not left_out.X.shape[1]:
            continue
        w, b = torch.zeros(adapted.architecture.rank), torch.zeros(adapted.architecture.num_parameters)
        if fitted.X.shape[1]:
            found = fit(adapted, shared, fitted, likelihood=said, b_variance=B_VARIANCE, steps=1)
            w, used = found.w[0], found.support[0] >= 0
            b[found.support[0][used]] = found.b[0][used]
        at = shared.clone().requires_grad_()
        eta = adapted.outputs(adapted.theta(at, w) + b, left_out.X[0])
        (gradient,) = torch.autograd.grad((left_out.weight[0] * said.loss(eta, left_out.y[0])).sum(), at)
        total -= gradient
    return total


@pytest.mark.parametrize("local_steps", [1, 3])
@pytest.mark.parametrize("train_base", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_neural_contribution_is_the_plain_one(name, train_base, local_steps):
    """One user after the other by autograd, clipped and put on the grid; the base stays where it is not trained."""
    adapted, said = network(name, train_base=train_base), likelihood(FAMILY[name])
    of, shared, size = examples(name, FAMILY[name], 4, 7), shared_of(adapted), 0.1
    of.weight[1, 6] = 0.0
    found = sent(adapted, of, FAMILY[name], clipping_norm=1.0, local_steps=local_steps, local_step_size=size)
    start = adapted.architecture.trained_from
    for i in range(4):
        moved = shared.clone()
        for _ in range(local_steps):
            gradient = plain_gradient(adapted, moved, of, i, said)
            moved[start:] += gradient[start:] * (size / of.weight[i].sum())
        vector = (gradient if local_steps == 1 else moved - shared)[start:].to(torch.float64)
        norm = float(vector.norm())
        expected = vector / max(norm, 1.0) * (SHARE * 2**30)
        np.testing.assert_allclose(found[i, :-5], expected, atol=2e-4 * float(expected.norm()))
        assert norm > 1e-2
        # the clip bit, and that the user is there
        assert np.sign(found[i, -5]) == (1 if norm <= 1.0 else -1)
        assert found[i, -4] == int(0.5 * 2 / np.sqrt(5) * (SCALARS_SHARE * 2**30))


def test_neural_last_layer_without_b_in_closed_form():
    """With a linear layer as the network, the whole contribution follows from least squares."""
    adapted = network("mlp", layers=("3",), rank=1, sparsity=0, train_base=False)
    of, shared = examples("mlp", "squared", 3, 8), shared_of(adapted)
    U = shared[adapted.architecture.trained_from :].numpy().astype(np.float64)
    layers = adapted.module
    grid = sent(adapted, of, "squared", clipping_norm=1e6)
    for i in range(3):
        with torch.no_grad():
            hidden = layers[:3](of.X[i]).numpy().astype(np.float64)
            rest = (of.y[i] - layers(of.X[i])[:, 0]).numpy().astype(np.float64)
        X = np.concatenate([hidden, np.ones((8, 1))], 1)
        total = np.zeros_like(U)
        for s in (0, 1):
            z = X[s::2] @ U
            w = z @ rest[s::2] / 0.3 / (z @ z / 0.3 + 1)
            total += X[1 - s :: 2].T @ (rest[1 - s :: 2] - X[1 - s :: 2] @ U * w) / 0.3 * w
        np.testing.assert_allclose(grid[i, :-5] / (SHARE * 2**30) * 1e6, total, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("grid_scale", [2**16, 2**30])
@pytest.mark.parametrize("family", ["squared", "logistic", "softmax"])
def test_neural_contribution_is_bounded_whatever_the_data(family, grid_scale):
    """Integers of squared norm at most K^2; users without usable numbers send zeros, also the scalars."""
    name = "classes" if family == "softmax" else "mlp"
    for sparsity in (0, 2):
        adapted = network(name, sparsity=sparsity)
        of = examples(name, family, 8, 5)
        of.X[1, 2, 0] = torch.nan
        of.X[2] = torch.inf
        of.X[3] = 1e30
        of.X[4] *= 1e3
        of.weight[5] = 0.0
        of.weight[6, 0] = torch.nan
        if family != "softmax":
            of.y[7] = 1e30
        found = sent(adapted, of, family, clipping_norm=1e-3, grid_scale=grid_scale)
        assert found.dtype == np.int64
        assert [bool(row.any()) for row in found[[0, 1, 2, 4, 5, 6]]] == [True, False, False, True, False, False]
        for row in found:
            assert squared_norm(row) <= grid_scale**2
            assert squared_norm(row[-5:]) <= (SCALARS_SHARE * grid_scale) ** 2
        assert squared_norm(found[0]) > 0.9 * (SHARE * grid_scale) ** 2


@pytest.mark.parametrize("count", [0, 1, 2])
@pytest.mark.parametrize("name", MODULES)
def test_neural_user_with_few_examples(name, count):
    """None: zeros. One: the gradient of a user without w, so none in U. Two: also in U."""
    adapted = network(name)
    of = examples(name, FAMILY[name], 1, 2)
    of.weight[0, count:] = 0.0
    found = sent(adapted, of, FAMILY[name])[0]
    P = adapted.architecture.num_parameters
    assert found[:P].any() == (count > 0)
    assert found[P:-5].any() == (count > 1)
    assert found[-5:].any() == (count > 0)
    # however the one example is padded
    alone = sent(adapted, Examples(X=of.X[:, :1], y=of.y[:, :1], weight=of.weight[:, :1]), FAMILY[name])[0]
    assert count == 2 or np.abs(alone - found).max() <= 1e-5 * max(np.abs(found).max(), 1)


def test_neural_scores_tell_how_users_are_predicted():
    """Squared errors are of examples left out; a b that helps them has a slope above zero, one of noise below."""
    adapted, said = network("mlp", rank=0, sparsity=1), Likelihood(family="squared", noise_variance=0.01)
    of = examples("mlp", "squared", 2, 100)
    theta = adapted.base.clone()
    theta[adapted.architecture.layers[1].start + 6] += 1.0
    of.y[0] = adapted.outputs(theta, of.X[0])[:, 0] + random(100, scale=0.1)
    of.y[1] = adapted.outputs(adapted.base, of.X[1])[:, 0] + random(100, seed=1)
    small = {"adapters": adapters_of(adapted, rank=0), "likelihood": said}
    _, scores = cross_fitted(adapted, adapted.base, of, b_variance=0.05, **small)
    assert 0.5 < scores.squared_error[0] < 2.5
    assert scores.b_slope[1] < 0
    tight = cross_fitted(adapted, adapted.base, of, b_variance=0.002, **small)[1]
    assert tight.b_slope[0] > 0


BAD = {"NaN": torch.nan, "infinity": torch.inf, "1e30": 1e30, "zeros": 0.0}
CUTS = {
    "alone": [[i] for i in range(17)],
    "threes": [list(range(i, min(i + 3, 17))) for i in range(0, 17, 3)],
    "turned": [[*range(5, 17), *range(5)]],
    "backwards": [list(range(16, -1, -1))],
}


@pytest.mark.parametrize("form", ["vector", "matrix"])
@pytest.mark.parametrize("name", MODULES)
def test_neural_integers_are_the_users_own(name, form):
    """Every user's integers are the same bits alone, among three or seventeen, in any place.

    Where users are worked on together they are the same up to rounding only.
    """
    adapted = network(name, form=form)
    of = examples(name, FAMILY[name], 17, 33)
    together = sent(adapted, of, FAMILY[name])
    for cut in CUTS.values():
        for part in cut:
            assert np.array_equal(sent(adapted, users(of, part), FAMILY[name]), together[part])
    batched = sent(adapted, of, FAMILY[name], one_by_one=False)
    np.testing.assert_allclose(batched, together, atol=2e-3 * 2**30)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", MODULES)
def test_neural_nobody_moves_when_one_user_turns_bad(name, bad):
    """Whatever one user's examples turn into, every other user's integers stay, to the bit; nothing raises."""
    adapted = network(name)
    of = examples(name, FAMILY[name], 4, 9)
    before = sent(adapted, of, FAMILY[name])
    for attribute in ("X", "y", "weight"):
        parts = {"X": of.X.clone(), "y": of.y.clone(), "weight": of.weight.clone()}
        parts[attribute][1] = BAD[bad]
        after = sent(adapted, Examples(**parts), FAMILY[name])
        assert np.array_equal(np.delete(after, 1, 0), np.delete(before, 1, 0))
        assert squared_norm(after[1]) <= 2**60


@pytest.mark.parametrize("family", ["squared", "logistic", "softmax"])
def test_neural_gradient_agrees_with_opacus(family):
    """Opacus' gradients of single examples, summed by user, are each user's gradient in the base."""
    outputs = 3 if family == "softmax" else 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opacus on import and on every module, about torch's and its own plans
        from opacus import GradSampleModule

        name = "classes" if family == "softmax" else "mlp"
        adapted, said = network(name), likelihood(family)
        module = mlp(4, outputs)
        module.load_state_dict(copy.deepcopy(adapted.module.state_dict()))
        judged = GradSampleModule(module.train())
        of = examples(name, family, 3, 6)
        of.weight[0, 3:] = 0.0
        of.weight[1] = 2.0
        loss = said.loss(judged(of.X.flatten(0, 1)), of.y.flatten())
        (of.weight.flatten() * loss).sum().backward()
        single = torch.cat([p.grad_sample.flatten(1) for p in judged.parameters()], 1)
    assert isinstance(module, nn.Module)
    found = gradient_in_theta(adapted, adapted.base.expand(3, -1), of, said)
    # GradSampleModule takes the loss for a mean over the batch by default, and multiplies by its size
    expected = single.reshape(3, 6, -1).sum(1) / 18
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.abs().max() > 1e-2
