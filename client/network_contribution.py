"""From users' examples to one clipped integer vector a user, for a network.

The model group is a cross-fitted gradient. A user's examples are dealt into two halves; w and b are fitted on one, the
gradient of the log likelihood in the shared part is taken on the other, and both ways are summed. What it ascends is
how well users are predicted who were fitted to other examples of theirs, so U finds the scale at which w helps, and is
not drawn to what only fits the past; a plug-in gradient has U grow without end. With more than one local step a user
moves the shared part by a fraction of that gradient, again and again, and the vector is how far it got.

Guarantee to one user, under zero-out: see `privacy.layout`; clipping is per user and in integers. That nobody else's
integers move needs more than products of each user's own: batched kernels round differently by place in the batch. So
users are worked on one after the other here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from client.contribution import RELIABILITY_EXAMPLES
from client.network_fit import Examples, Likelihood, NetworkFit, fit, gradient_in_theta
from common.model import IntArray
from common.networks import AdaptedNetwork
from common.task import Adapters
from privacy.layout import Layout, clip_to_ball, scalars_to_ball, to_grid

Tensor = torch.Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What users say beside their gradients, each of one number an example or bounded.

    Attributes:
        squared_error: `n`, summed over all examples, each predicted by a fit without it.
        b_slope: `n`, derivative of the log likelihood of the examples left out in log b.
    """

    squared_error: Tensor
    b_slope: Tensor


def contribute(
    network: AdaptedNetwork,
    shared: Tensor,
    examples: Examples,
    adapters: Adapters,
    *,
    likelihood: Likelihood,
    b_variance: float,
    clipping_norm: float,
    layout: Layout,
    one_by_one: bool = True,
) -> IntArray:
    """`n x size` int64, each user's clipped vector on the grid; zeros for a user without examples or finite numbers.

    Args:
        network: Its functions.
        shared: `D`, the released part.
        examples: The users'.
        adapters: How users are fitted.
        likelihood: Of an example.
        b_variance: Prior variance of a nonzero of b.
        clipping_norm: C.
        layout: Groups and grid of the release.
        one_by_one: Whether each user's integers are the same bits whoever else is in the batch, on which the guarantee
            rests. False, several times faster, is for what is never released.
    """
    settings: dict[str, Any] = {"adapters": adapters, "likelihood": likelihood, "b_variance": b_variance}
    grid = np.zeros((len(examples.X), layout.size), np.int64)
    for users, part in _one_by_one(examples) if one_by_one else [(slice(None), examples)]:
        vector, scores = _ascended(network, shared, part, **settings)
        x = vector[:, network.architecture.trained_from :].to(torch.float64).cpu().numpy()
        # nothing usable is absence: not even the clip bit is sent
        count = torch.where(torch.isfinite(vector).all(1), part.weight.sum(1), 0.0)
        unit, unclipped = clip_to_ball(np.where(count.cpu().numpy()[:, None] > 0, x, 0.0), clipping_norm)
        numbers = scalars(
            scores,
            count,
            torch.from_numpy(unclipped).to(count.device),
            sparsity=network.architecture.sparsity,
            likelihood=likelihood,
        )
        grid[users] = to_grid((unit, scalars_to_ball(numbers.cpu().numpy())), layout)
    return grid


def cross_fitted(
    network: AdaptedNetwork,
    shared: Tensor,
    examples: Examples,
    *,
    adapters: Adapters,
    likelihood: Likelihood,
    b_variance: float,
) -> tuple[Tensor, Scores]:
    """`n x D` gradients of the log likelihood in the shared part, and the scores.

    Args:
        network: Its functions.
        shared: `D`, or `n x D` where every user has moved it.
        examples: The users'.
        adapters: How users are fitted.
        likelihood: Of an example.
        b_variance: Prior variance of a nonzero of b.
    """
    n = len(examples.X)
    even, odd = _halves(examples)
    found = fit(
        network,
        shared.expand(n, shared.shape[-1]).repeat(2, 1),
        _stacked(even, odd),
        likelihood=likelihood,
        b_variance=b_variance,
        steps=adapters.steps,
    )
    gradient, error, slope = _of_left_out(network, found, _stacked(odd, even), likelihood)
    return gradient[:n] + gradient[n:], Scores(squared_error=error[:n] + error[n:], b_slope=slope[:n] + slope[n:])


def _ascended(
    network: AdaptedNetwork, shared: Tensor, examples: Examples, *, adapters: Adapters, **settings: Any
) -> tuple[Tensor, Scores]:
    """`n x D`, the gradient, or how far local steps along it go; zeros in what is not trained. And the first scores."""
    is_fixed = torch.arange(len(shared), device=shared.device) < network.architecture.trained_from
    gradient, scores = cross_fitted(network, shared, examples, adapters=adapters, **settings)
    gradient = torch.where(is_fixed, 0.0, gradient)
    if adapters.local_steps == 1:
        return gradient, scores
    # an average example's gradient, so that a step is as long whoever takes it
    scale = (adapters.local_step_size / examples.weight.sum(1).clamp(min=1.0))[:, None]
    way = scale * gradient
    for _ in range(adapters.local_steps - 1):
        gradient, _ = cross_fitted(network, shared + way, examples, adapters=adapters, **settings)
        way = way + scale * torch.where(is_fixed, 0.0, gradient)
    return way, scores


def scalars(scores: Scores, count: Tensor, unclipped: Tensor, *, sparsity: int, likelihood: Likelihood) -> Tensor:
    """`n x 5` numbers in [-1/2, 1/2], in the order of `privacy.layout.SCALARS`; zeros without examples.

    As in `client.contribution`, but for two: the residual score compares errors on examples left out of a fit with the
    noise variance, and the b score says whether a larger b would predict such examples better.
    """
    reliability = count / (count + RELIABILITY_EXAMPLES)
    residual = torch.zeros_like(count)
    if likelihood.family == "squared":
        per_example = scores.squared_error / count.clamp(min=1.0)
        residual = torch.clamp(per_example / likelihood.noise_variance - 1, -1, 2) * reliability / 4
    b_score = torch.clamp(scores.b_slope / max(sparsity, 1), -0.5, 0.5)
    bit = unclipped.to(count.dtype) - 0.5
    columns = [bit, torch.full_like(count, 0.5), reliability - 0.5, residual, b_score]
    return torch.stack(columns, -1).to(torch.float64) * (count > 0).to(torch.float64)[:, None]


def _of_left_out(
    network: AdaptedNetwork, found: NetworkFit, examples: Examples, likelihood: Likelihood
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient in the shared part, squared error and slope in log b, on examples that a fit has not seen."""
    gradient = -gradient_in_theta(network, found.theta, examples, likelihood)
    at_b = torch.gather(gradient, 1, found.support.clamp(min=0)) * found.b
    error = torch.zeros(len(found.w), device=found.w.device)
    if likelihood.family == "squared":
        eta = network.each(found.theta, examples.X)[..., 0]
        error = (examples.weight * (eta - examples.y) ** 2).sum(1)
    return network.shared_gradient(gradient, found.w), error, at_b.sum(1)


def _one_by_one(examples: Examples) -> Iterator[tuple[slice, Examples]]:
    """Each user alone, in memory of its own: some matrix products round by the address that they read from."""
    for i in range(len(examples.X)):
        of = slice(i, i + 1)
        yield of, Examples(X=examples.X[of].clone(), y=examples.y[of].clone(), weight=examples.weight[of].clone())


def _halves(examples: Examples) -> tuple[Examples, Examples]:
    """Every second example of each user by the user's own order, and the others, padded to as many."""
    odd_one_out = examples.X.shape[1] % 2
    X = torch.nn.functional.pad(examples.X, (0, 0, 0, odd_one_out))
    y, weight = (torch.nn.functional.pad(values, (0, odd_one_out)) for values in (examples.y, examples.weight))
    even, odd = (Examples(X=X[:, i::2], y=y[:, i::2], weight=weight[:, i::2]) for i in (0, 1))
    return even, odd


def _stacked(first: Examples, second: Examples) -> Examples:
    """Both as users of one batch."""
    return Examples(
        X=torch.cat([first.X, second.X]),
        y=torch.cat([first.y, second.y]),
        weight=torch.cat([first.weight, second.weight]),
    )
