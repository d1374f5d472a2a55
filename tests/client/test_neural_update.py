"""Updating the personal part of a network, against all examples at once, the linear update, autograd and itself."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.func import vmap

from client.incremental import Examples as LinearExamples
from client.incremental import Posterior, fresh, update
from client.network_fit import Examples, Likelihood, fit
from client.network_update import posterior_of, theta_of, update_network
from common.families import FAMILIES
from common.networks import AdaptedNetwork, adapt
from tests.populations import arrays

B_VARIANCE = 0.5
OUTPUTS = {"squared": 1, "logistic": 1, "softmax": 3}


def likelihood_of(family: str) -> Likelihood:
    return Likelihood(family=family, noise_variance=0.3 if family == "squared" else 1.0)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp(inputs: int, outputs: int, *, layers=("*",), rank: int = 2, sparsity: int = 2, form="vector"):
    """A network of two layers and a shared part with a U of a size that matters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        module = nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))
    return shared_of(
        adapt(module, inputs=inputs, outputs=outputs, rank=rank, sparsity=sparsity, layers=layers, form=form)
    )


def linear(inputs: int, *, form="vector"):
    """A network that is one linear layer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        module = nn.Sequential(nn.Linear(inputs, 1))
    return shared_of(adapt(module, inputs=inputs, outputs=1, rank=2, sparsity=2, form=form))


def shared_of(network: AdaptedNetwork):
    architecture = network.architecture
    U = 0.25 * randn(5, architecture.shared_size - architecture.num_parameters)
    return network, torch.cat([network.base, U])


def draw_support(network: AdaptedNetwork, n: int) -> torch.Tensor:
    """Different places of each user in each layer; every third user's last slot is unused."""
    columns = []
    for number, layer in enumerate(network.architecture.layers):
        generator = torch.Generator().manual_seed(40 + number)
        order = torch.stack([torch.randperm(layer.size, generator=generator) for _ in range(n)])
        columns.append(layer.start + order[:, : layer.sparsity])
    support = torch.cat(columns, 1)
    support[::3, -1] = -1
    return support


def draw(network, shared, support, seed: int, m: int, family: str, *, c=None) -> Examples:  # noqa: PLR0917 -- as update_network
    """Weighted examples of users who are `c`, or drawn from the prior."""
    n, p = len(support), network.architecture.rank + support.shape[1]
    inputs = network.architecture.parameters[0][1][1]
    c = randn(seed + 1000, n, p) if c is None else c
    X = randn(seed, n, m, inputs)
    eta = vmap(network.outputs)(theta_of(network, shared, Posterior(mean=c, precision=None), support), X)
    noise = torch.Generator().manual_seed(seed + 2000)
    if family == "squared":
        y = eta[..., 0] + 0.3**0.5 * torch.randn(eta.shape[:2], generator=noise)
    elif family == "logistic":
        y = torch.bernoulli(torch.sigmoid(eta[..., 0]), generator=noise)
    else:
        y = torch.multinomial(torch.softmax(eta, -1).flatten(0, 1), 1, generator=noise).reshape(n, m).float()
    return Examples(X=X, y=y, weight=0.5 + torch.rand(n, m, generator=noise))


def start(network: AdaptedNetwork, support: torch.Tensor, *, curvature="full", dtype=torch.float32) -> Posterior:
    """Of users of whom nothing is known."""
    R = network.architecture.rank
    level = torch.tensor([1.0] * R + [1 / B_VARIANCE] * support.shape[1], dtype=dtype)
    return fresh(len(support), len(level), level, like=level, curvature=curvature)


def draw_past(network, support, seed: int) -> Posterior:
    """A posterior with correlated coordinates, at its prior where a slot is unused."""
    prior = start(network, support)
    p = prior.mean.shape[1]
    A = 2 * randn(seed, len(support), p, p)
    used = torch.cat([torch.ones_like(prior.mean[:, : network.architecture.rank]), (support >= 0).float()], 1)
    A = A * used[:, None, :]
    return Posterior(mean=0.5 * randn(seed + 1, len(support), p) * used, precision=prior.precision + A.mT @ A / p)


def joined(*parts: Examples) -> Examples:
    return Examples(**{name: torch.cat([getattr(part, name) for part in parts], 1) for name in arrays(parts[0])})


def take(record, rows):
    return type(record)(**{name: value[rows] for name, value in arrays(record).items()})


def folded(network, shared, prior, support, parts, family, forgetting=1.0, curvature="full"):  # noqa: PLR0917 -- as update_network
    """The posterior after one update for each part."""
    for part in parts:
        found = update_network(
            network, shared, prior, support, part,
            likelihood=likelihood_of(family), b_variance=B_VARIANCE, forgetting=forgetting, curvature=curvature,
        )  # fmt: skip
        assert found.finite.all()
        assert found.converged.double().mean() > 0.6
        prior = found.posterior
    return prior


def predictive_loss(network, shared, posterior, support, examples, family) -> float:  # noqa: PLR0917 -- as update_network
    eta = vmap(network.outputs)(theta_of(network, shared, posterior, support), examples.X)
    return likelihood_of(family).loss(eta, examples.y).mean().item()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()


def test_a_last_linear_layer_under_squared_loss_is_as_if_all_examples_came_at_once():
    """Five updates at forgetting 1 give the batch fit's posterior, on the support that it chose."""
    network, shared = mlp(5, 1, layers=("2",), rank=3)
    empty = torch.full((6, 2), -1)
    c = torch.cat([randn(8, 6, 3), torch.full((6, 2), 2.0)], 1)
    places = network.architecture.layers[0].start + torch.tensor([[0, 5]]).repeat(6, 1)
    parts = [draw(network, shared, places, seed, 12, "squared", c=c) for seed in range(5)]
    batch = fit(network, shared, joined(*parts), likelihood=likelihood_of("squared"), b_variance=B_VARIANCE, steps=3)
    assert (batch.support >= 0).sum() > 6
    found = folded(network, shared, start(network, empty), batch.support, parts, "squared")
    expected = posterior_of(batch)
    torch.testing.assert_close(found.mean, expected.mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.precision, expected.precision, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(theta_of(network, shared, found, batch.support), batch.theta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", ["vector", "matrix"])
@pytest.mark.parametrize("curvature", ["full", "diagonal", "diagonal-simple"])
@pytest.mark.parametrize("forgetting", [0.8, 1.0])
@pytest.mark.parametrize("family", ["squared", "logistic"])
def test_a_network_that_is_one_linear_layer_is_updated_as_a_linear_model(family, forgetting, curvature, form):
    """Means and precisions are those of client.incremental in float64, after each of three updates."""
    network, shared = linear(4, form=form)
    support = draw_support(network, 6)
    ours = start(network, support, curvature=curvature)
    theirs = start(network, support, curvature=curvature, dtype=torch.float64)
    R = theirs.full_precision[0].diagonal()
    base, U = shared[:5].double(), shared[5:].reshape(5, -1).double()
    for seed in range(3):
        examples = draw(network, shared, support, seed, 15, family)
        X = torch.cat([examples.X, torch.ones(6, 15, 1)], 2).double()
        picked = torch.gather(X, 2, support.clamp(min=0)[:, None, :].expand(-1, 15, -1)) * (support >= 0)[:, None, :]
        theirs = update(
            theirs,
            LinearExamples(
                X=torch.cat([X @ U, picked], 2), y=examples.y.double(), weight=examples.weight.double(), offset=X @ base
            ),
            family=FAMILIES[family],
            forgetting=forgetting,
            prior_precision=R,
            curvature=curvature,
            noise_variance=likelihood_of(family).noise_variance,
        ).posterior
        ours = folded(network, shared, ours, support, [examples], family, forgetting, curvature)
        torch.testing.assert_close(ours.mean.double(), theirs.mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours.precision.double(), theirs.precision, rtol=1e-5, atol=1e-4)
        assert not ours.mean[::3, -1].any()


def objective(c, network, shared, prior, support, examples, family, forgetting):  # noqa: PLR0917 -- as update_network
    """What c_t minimises, of one user, written plainly in float64."""
    architecture = network.architecture
    theta = shared[: architecture.num_parameters].clone()
    W = c[: architecture.rank]
    for layer, at, of_w in zip(architecture.layers, architecture.U_slices(), architecture.w_slices(), strict=True):
        delta = shared[at].reshape(layer.d, layer.rank) @ W[of_w].reshape(layer.rank, layer.c)
        theta = theta.index_add(0, layer.start + torch.from_numpy(layer.order), delta.reshape(-1))
    for place, value in zip(support.tolist(), c[architecture.rank :], strict=True):
        if place >= 0:
            theta = theta.index_add(0, torch.tensor([place]), value[None])
    eta = network.outputs(theta, examples.X)
    if family == "squared":
        loss = (examples.y - eta[:, 0]) ** 2 / 0.6
    elif family == "logistic":
        loss = nn.functional.binary_cross_entropy_with_logits(eta[:, 0], examples.y, reduction="none")
    else:
        loss = nn.functional.cross_entropy(eta, examples.y.long(), reduction="none")
    away, R = c - prior.mean, c.new_tensor([1.0] * len(W) + [1 / B_VARIANCE] * len(support))
    return examples.weight @ loss + (forgetting * away @ prior.precision @ away + (1 - forgetting) * c @ (R * c)) / 2


@pytest.mark.parametrize("forgetting", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("family", OUTPUTS)
@pytest.mark.parametrize("layers", [("2",), ("*",)], ids=["last", "all"])
def test_is_the_optimum_and_its_curvature(layers, family, forgetting):
    """The gradient vanishes at the mean, and the precision is the Hessian where that is what Gauss-Newton is."""
    network, shared = mlp(4, OUTPUTS[family], layers=layers)
    support = draw_support(network, 4)
    prior = draw_past(network, support, 20)
    used = torch.where(prior.mean == 0, 0.0, 1.0)
    c = prior.mean + 0.3 * used * randn(21, *prior.mean.shape)
    examples = draw(network, shared, support, 3, 25, family, c=c)
    found = folded(network, shared, prior, support, [examples], family, forgetting)
    for i in range(4):
        one = [
            Posterior(mean=prior.mean[i].double(), precision=prior.precision[i].double()),
            support[i],
            Examples(**{name: value[i].double() for name, value in arrays(examples).items()}),
        ]
        at = found.mean[i].double().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(at, network, shared.double(), *one, family, forgetting), at)
        precision = found.precision[i].double()
        # in posterior standard deviations; a last step is at most 0.01 of them, and may be too long threefold
        assert gradient @ torch.linalg.solve(precision, gradient) < 0.03**2
        if layers == ("2",):
            H = torch.autograd.functional.hessian(
                lambda c, one=one: objective(c, network, shared.double(), *one, family, forgetting), at.detach()
            )
            torch.testing.assert_close(precision, H, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("curvature", ["full", "diagonal"])
@pytest.mark.parametrize("forgetting", [0.8, 1.0])
def test_nothing_new_changes_nothing(curvature, forgetting):
    """Users whose examples all have weight 0, and all users of a batch without any, keep theirs to the bit."""
    network, shared = mlp(4, 3)
    support = draw_support(network, 5)
    prior = draw_past(network, support, 20)
    if curvature == "diagonal":
        prior = replace(prior, precision=prior.precision.diagonal(dim1=1, dim2=2) + 0.0)
    examples = draw(network, shared, support, 1, 10, "softmax")
    quiet = torch.tensor([True, False, True, False, False])
    examples.weight[quiet] = 0.0
    for new, kept in ((examples, quiet), (take(examples, (slice(None), slice(0, 0))), quiet | True)):
        found = update_network(
            network, shared, prior, support, new,
            likelihood=likelihood_of("softmax"), b_variance=B_VARIANCE, forgetting=forgetting, curvature=curvature,
        )  # fmt: skip
        assert found.converged.all()
        assert torch.equal(found.iterations == 0, kept)
        for name in ("mean", "precision"):
            before, after = getattr(prior, name), getattr(found.posterior, name)
            assert same_bits(after[kept], before[kept])
            assert not torch.isclose(after[~kept], before[~kept]).flatten(1).all(1).any()


@pytest.mark.parametrize("family", ["squared", "softmax"])
def test_updates_predict_nearly_as_the_batch_does(family):
    """After five updates of a nonlinear network most of what a fit of all examples gains over the first is gained."""
    network, shared = mlp(4, OUTPUTS[family], rank=3)
    support = draw_support(network, 16)
    c = 1.5 * randn(30, 16, network.architecture.rank + support.shape[1])
    parts = [draw(network, shared, support, 50 + t, 12, family, c=c) for t in range(6)]
    unseen = draw(network, shared, support, 90, 200, family, c=c)
    none = start(network, support)
    first = folded(network, shared, none, support, parts[:1], family)
    updated = folded(network, shared, first, support, parts[1:], family)
    batch = folded(network, shared, none, support, [joined(*parts)], family)
    of = {
        name: predictive_loss(network, shared, posterior, support, unseen, family)
        for name, posterior in {"none": none, "first": first, "updated": updated, "batch": batch}.items()
    }
    assert of["batch"] < of["first"] < of["none"]
    assert of["updated"] - of["batch"] < 0.3 * (of["first"] - of["batch"])


def test_forgetting_follows_users_who_change():
    """Forgetting predicts users who drift better than keeping all of their past, and those who do not worse."""
    network, shared = mlp(4, 1, layers=("2",), rank=3)
    shared = torch.cat([network.base, 4 * shared[len(network.base) :]])
    support = draw_support(network, 40)
    p = network.architecture.rank + support.shape[1]

    def loss(drift: float, forgetting: float) -> float:
        c, posterior, total = randn(30, 40, p), start(network, support), 0.0
        for t in range(20):
            c = (1 - drift**2) ** 0.5 * c + drift * randn(100 + t, 40, p)
            examples = draw(network, shared, support, 50 + t, 15, "squared", c=c)
            if t >= 10:
                total += predictive_loss(network, shared, posterior, support, examples, "squared") / 10
            posterior = folded(network, shared, posterior, support, [examples], "squared", forgetting)
        return total

    assert loss(0.3, 0.8) < 0.8 * loss(0.3, 1.0)
    assert loss(0.0, 1.0) < 0.96 * loss(0.0, 0.5)


@pytest.mark.parametrize("curvature", ["full", "diagonal"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("X", float("nan")), ("X", float("inf")), ("X", 1e30), ("y", float("nan")), ("weight", float("inf"))],
)
def test_one_users_numbers_are_nobody_elses(name, value, curvature):
    """A user whose examples are not finite keeps the past to the bit, and no bit of others moves."""
    network, shared = mlp(4, 1)
    support = draw_support(network, 5)
    prior, examples = draw_past(network, support, 20), draw(network, shared, support, 3, 17, "squared")
    if curvature == "diagonal":
        prior = replace(prior, precision=prior.precision.diagonal(dim1=1, dim2=2) + 0.0)

    def updated(examples):
        return update_network(
            network, shared, prior, support, examples,
            likelihood=likelihood_of("squared"), b_variance=B_VARIANCE, forgetting=0.8, curvature=curvature,
        )  # fmt: skip

    sane = updated(examples)
    broken = Examples(**{field: array.clone() for field, array in arrays(examples).items()})
    getattr(broken, name)[2, 3] = value
    found = updated(broken)
    assert found.finite.tolist() == [True, True, value == 1e30, True, True]
    others = [0, 1, 3, 4]
    for field in ("mean", "precision"):
        after = getattr(found.posterior, field)
        assert same_bits(after[others], getattr(sane.posterior, field)[others])
        if value != 1e30:
            assert same_bits(after[2], getattr(prior, field)[2])


def test_an_unused_slot_is_not_in_theta():
    """What stands in the slot of a place that is not used makes no difference."""
    network, shared = linear(3)
    prior, support = start(network, torch.tensor([[1, -1]])), torch.tensor([[1, -1]])
    noisy = replace(prior, mean=prior.mean + torch.tensor([0.0, 0.0, 0.5, 7.0]))
    added = theta_of(network, shared, noisy, support) - network.base
    torch.testing.assert_close(added, torch.tensor([[0.0, 0.5, 0.0, 0.0]]))


def test_a_past_that_is_no_precision_is_kept():
    """A user whose precision has no Cholesky factor keeps it, and others are updated."""
    network, shared = mlp(4, 1)
    support = draw_support(network, 3)
    prior, examples = draw_past(network, support, 20), draw(network, shared, support, 3, 17, "squared")
    prior.precision[1] = -1e6 * torch.eye(prior.mean.shape[1])
    found = update_network(
        network, shared, prior, support, examples,
        likelihood=likelihood_of("squared"), b_variance=B_VARIANCE, forgetting=1.0,
    )  # fmt: skip
    assert found.finite.tolist() == found.converged.tolist() == [True, False, True]
    assert same_bits(found.posterior.mean[1], prior.mean[1])
    assert same_bits(found.posterior.precision[1], prior.precision[1])


def test_a_step_that_overshoots_is_halved():
    """Where full Gauss-Newton steps raise the objective, the result still lowers it, and converges."""
    network, shared = mlp(2, 1, rank=2, sparsity=0)
    shared = torch.cat([network.base, 4 * shared[len(network.base) :]])
    support = torch.empty(20, 0, dtype=torch.int64)
    prior = start(network, support)
    examples = draw(network, shared, support, 3, 10, "squared")
    found = update_network(
        network, shared, prior, support, examples,
        likelihood=likelihood_of("squared"), b_variance=B_VARIANCE, forgetting=1.0, max_steps=100,
    )  # fmt: skip
    assert found.converged.float().mean() > 0.8
    for i in range(20):
        at = [shared.double(), *(Posterior(mean=prior.mean[i].double(), precision=prior.precision[i].double()),)]
        one = Examples(**{name: value[i].double() for name, value in arrays(examples).items()})
        before, after = (
            objective(c.double(), network, *at, support[i], one, "squared", 1.0)
            for c in (prior.mean[i], found.posterior.mean[i])
        )
        assert after < before


@pytest.mark.parametrize("wrong", [{"forgetting": 1.1}, {"forgetting": -0.1}, {"curvature": "low"}])
def test_settings_outside_of_their_range_are_refused(wrong):
    """The message names the setting."""
    network, shared = linear(3)
    support = draw_support(network, 2)
    settings = {"likelihood": likelihood_of("squared"), "b_variance": B_VARIANCE, "forgetting": 1.0, **wrong}
    with pytest.raises(ValueError, match=next(iter(wrong))):
        update_network(
            network,
            shared,
            start(network, support),
            support,
            draw(network, shared, support, 0, 3, "squared"),
            **settings,
        )
