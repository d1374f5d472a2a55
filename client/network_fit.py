"""Every user's personal part of a network, given the shared one: a posterior, as for a linear model.

theta_i = base + U w_i + b_i, w_i ~ N(0, I), at most k nonzeros of b_i ~ N(0, b_variance) in each layer. Around a point
the network is linear in (w, b), outputs = J (w, b), so its Gauss-Newton posterior is that of a linear model whose
features are J: the same elimination of w and the same greedy choice of b by evidence as in `client.personalize`, on the
places where the gradient is largest. For a last linear layer under squared loss one step is exact.

Batched over users with `torch.func.vmap`: each user's numbers come from products of that user's own, and are the same
whoever else is in the batch, up to rounding. To the bit they are not: where in a batch a user stands decides where a
kernel's vector loop ends and from which address a matrix is read. What has to be exact fits one user at a time.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from client.network_jacobian import LayerJacobian, jacobian
from client.personalize import log_prior_odds
from common.architecture import Layer
from common.networks import AdaptedNetwork

Tensor = torch.Tensor
_CANDIDATES = 3
"""Places looked at for every nonzero of b that a layer may have."""
_STEP_SIZES = (1.0, 0.25)


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """What an example's outputs say.

    Attributes:
        family: "squared", "logistic" or "softmax".
        noise_variance: Of the squared family; 1 otherwise.
    """

    family: str
    noise_variance: float = 1.0

    def loss(self, eta: Tensor, y: Tensor) -> Tensor:
        """`...`, negative log likelihood of examples with outputs `eta` (`... x o`), up to a constant."""
        if self.family == "squared":
            return (y - eta[..., 0]) ** 2 / (2 * self.noise_variance)
        if self.family == "logistic":
            return torch.nn.functional.softplus(eta[..., 0]) - y * eta[..., 0]
        return torch.logsumexp(eta, -1) - torch.where(_is_class(eta, y), eta, 0.0).sum(-1)

    def residual(self, eta: Tensor, y: Tensor) -> Tensor:
        """`... x o`, its derivative in the outputs."""
        if self.family == "squared":
            return (eta - y[..., None]) / self.noise_variance
        if self.family == "logistic":
            return torch.sigmoid(eta) - y[..., None]
        return torch.softmax(eta, -1) - _is_class(eta, y).to(eta.dtype)

    def curvature_root(self, eta: Tensor, J: Tensor) -> Tensor:
        """`... x o x p` S with S'S = J'H J, H the second derivative of the loss in the outputs.

        Args:
            eta: `... x o`.
            J: `... x o x p`.
        """
        if self.family == "squared":
            return J / math.sqrt(self.noise_variance)
        if self.family == "logistic":
            return (torch.sigmoid(eta) * torch.sigmoid(-eta)).sqrt()[..., None] * J
        # H = diag(p) - p p' = sum_c p_c (e_c - p)(e_c - p)'
        p = torch.softmax(eta, -1)[..., None]
        return p.sqrt() * (J - (p * J).sum(-2, keepdim=True))


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Examples of n users, padded with examples of weight 0.

    Attributes:
        X: `n x m x inputs` float32.
        y: `n x m` float32.
        weight: `n x m` float32.
    """

    X: Tensor
    y: Tensor
    weight: Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkFit:
    """Posteriors of n users.

    Attributes:
        w: `n x R`.
        support: `n x K` int64, places in the base, -1 where unused.
        b: `n x K`, 0 where unused.
        precision: `n x (R+K) x (R+K)`, of (w, b); unused coordinates have their prior's.
        theta: `n x P`.
    """

    w: Tensor
    support: Tensor
    b: Tensor
    precision: Tensor
    theta: Tensor


def fit(
    network: AdaptedNetwork,
    shared: Tensor,
    examples: Examples,
    *,
    likelihood: Likelihood,
    b_variance: float,
    steps: int,
    sparsity: bool = True,
) -> NetworkFit:
    """The posterior of every user under the shared part.

    Args:
        network: Its functions.
        shared: `D`, the released part, or `n x D` where every user has moved it.
        examples: The users'.
        likelihood: Of an example.
        b_variance: Prior variance of a nonzero of b.
        steps: Gauss-Newton steps in w before b is chosen; one in (w, b) follows.
        sparsity: Whether there is a b at all.
    """
    model = LocalNetworks(network, shared, examples, likelihood)
    n, architecture = len(examples.X), network.architecture
    w = examples.X.new_zeros(n, architecture.rank)
    slots = architecture.sparsity if sparsity else 0
    support = torch.full((n, slots), -1, dtype=torch.int64, device=w.device)
    b = w.new_zeros(n, slots)
    if not architecture.rank + slots:
        return NetworkFit(w=w, support=support, b=b, precision=w.new_zeros(n, 0, 0), theta=model.theta(w, support, b))
    for _ in range(steps if architecture.rank else 0):
        around = model.linearized(w, support, b)
        gradient, gram = around.system(support[:, :0])
        w, _ = model.moved(around, w, b, support, solved(gram + _eye(gram), -(gradient + w)), b_variance=b_variance)
    around = model.linearized(w, support, b)
    if slots:
        support = _chosen(model, around, w, b_variance)
    gradient, gram = around.system(support)
    precision = gram + torch.diag_embed(prior_precision(w, support, b_variance))
    step = solved(precision, -(gradient + torch.cat([w, b / b_variance], 1)))
    w, b = model.moved(around, w, b, support, step, b_variance=b_variance)
    return NetworkFit(w=w, support=support, b=b, precision=precision, theta=model.theta(w, support, b))


def gradient_in_theta(network: AdaptedNetwork, theta: Tensor, examples: Examples, likelihood: Likelihood) -> Tensor:
    """`n x P`, gradient of each user's summed loss in that user's parameters (`n x P`)."""
    with torch.enable_grad():
        theta = theta.detach().requires_grad_()
        loss = (examples.weight * likelihood.loss(network.each(theta, examples.X), examples.y)).sum()
        (found,) = torch.autograd.grad(loss, theta)
    return found


class LocalNetworks:
    """The users' networks as functions of (w, b)."""

    def __init__(self, network: AdaptedNetwork, shared: Tensor, examples: Examples, likelihood: Likelihood) -> None:
        self.network, self.examples, self.likelihood = network, examples, likelihood
        self.shared = shared.expand(len(examples.X), shared.shape[-1])

    def theta(self, w: Tensor, support: Tensor, b: Tensor) -> Tensor:
        """`n x P`."""
        return self.network.personal_theta(self.shared, w, support, b)

    def linearized(self, w: Tensor, support: Tensor, b: Tensor) -> "_Linear":
        """The networks around (w, b)."""
        eta, layers = jacobian(self.network, self.theta(w, support, b), self.examples.X)
        weight = self.examples.weight[..., None]
        residual = weight * self.likelihood.residual(eta, self.examples.y)
        return _Linear(self, eta, layers, weight.sqrt()[..., None], residual)

    def moved(
        self, around: "_Linear", w: Tensor, b: Tensor, support: Tensor, step: Tensor, *, b_variance: float
    ) -> tuple[Tensor, Tensor]:
        """(w, b) after that fraction of a step, if any, which makes the objective smallest.

        Args:
            around: The networks linearized at (w, b).
            w: `n x R`.
            b: `n x K`.
            support: `n x K`.
            step: `n x p`, the first coordinates' of (w, b); the others stay.
            b_variance: Prior variance of a nonzero of b.
        """
        R, step = w.shape[1], torch.where(torch.isfinite(step), step, 0.0)
        least = self._objective(around.eta, w, b, b_variance)
        found_w, found_b = w, b
        for size in _STEP_SIZES:
            tried_w = w + size * step[:, :R]
            tried_b = b + size * step[:, R:] if step.shape[1] > R else b
            eta = self.network.each(self.theta(tried_w, support, tried_b), self.examples.X)
            value = self._objective(eta, tried_w, tried_b, b_variance)
            better = (value < least)[:, None]
            found_w, found_b = torch.where(better, tried_w, found_w), torch.where(better, tried_b, found_b)
            least = torch.where(better[:, 0], value, least)
        return found_w, found_b

    def _objective(self, eta: Tensor, w: Tensor, b: Tensor, b_variance: float) -> Tensor:
        loss = (self.examples.weight * self.likelihood.loss(eta, self.examples.y)).sum(1)
        return loss + (w**2).sum(1) / 2 + (b**2).sum(1) / (2 * b_variance)


class _Linear:
    """A batch of networks that are linear in (w, b) around a point."""

    def __init__(
        self, model: LocalNetworks, eta: Tensor, layers: Sequence[LayerJacobian], root_weight: Tensor, residual: Tensor
    ) -> None:
        self._model, self.eta, self._layers = model, eta, layers
        self._root_weight, self._residual = root_weight, residual
        shared, slices = model.shared, model.network.architecture.U_slices()
        parts = [
            layer.along_U(shared[:, U].reshape(len(shared), layer.layer.d, layer.layer.rank))
            for layer, U in zip(layers, slices, strict=True)
        ]
        self._along_U = torch.cat(parts, -1)

    def system(self, support: Tensor) -> tuple[Tensor, Tensor]:
        """`n x p` gradient and `n x p x p` Gauss-Newton Hessian of the summed losses in (w, b), p = R + K.

        Args:
            support: `n x K` places of b, -1 where unused: nothing depends on b there.
        """
        J = self._along_U
        if support.shape[1]:
            J = torch.cat([J, torch.stack([_at(layer, support) for layer in self._layers]).sum(0)], -1)
        S = (self._root_weight * self._model.likelihood.curvature_root(self.eta, J)).flatten(1, 2)
        gradient = (J.flatten(1, 2).mT @ self._residual.flatten(1)[..., None])[..., 0]
        return gradient, S.mT @ S

    def gradients(self) -> list[Tensor]:
        """`n x size` of each layer, gradient of the summed losses in its entries."""
        return [layer.gradient(self._residual) for layer in self._layers]


def _chosen(model: LocalNetworks, around: _Linear, w: Tensor, b_variance: float) -> Tensor:
    """`n x K` places of b: those whose being nonzero the data make more probable than not.

    Candidates have the largest gradients in each layer; from then on as in `client.personalize`: w is eliminated, and
    each choice is an exact rank-one update of gradient and curvature (Tipping and Faul 2003, eq. 20-25).
    """
    layers = model.network.architecture.layers
    places, of_layer = [], []
    for number, (layer, block) in enumerate(zip(layers, around.gradients(), strict=True)):
        size = torch.where(torch.isfinite(block), block.abs(), 0.0)
        count = min(_CANDIDATES * layer.sparsity, layer.size)
        places.append(layer.start + torch.topk(size, count, dim=1).indices)
        of_layer += [number] * count
    candidates = torch.cat(places, 1)
    R = w.shape[1]
    gradient, gram = around.system(candidates)
    A = _inverse(gram[:, :R, :R] + _eye(gram[:, :R, :R]))
    cross = gram[:, R:, :R] @ A
    q = -gradient[:, R:] + (cross @ (gradient[:, :R] + w)[..., None])[..., 0]
    H = gram[:, R:, R:] - cross @ gram[:, :R, R:]
    device = w.device
    layer_of = torch.tensor(of_layer, device=device)
    odds = _log_prior_odds(layers, candidates, layer_of)
    room = torch.tensor([layer.sparsity for layer in layers], device=device).repeat(len(w), 1)
    is_open = torch.ones(candidates.shape, dtype=torch.bool, device=device)
    rows, chosen = torch.arange(len(w), device=device), []
    for _ in range(model.network.architecture.sparsity):
        h = torch.diagonal(H, dim1=1, dim2=2).clamp(min=0.0)
        gain = (b_variance * q**2 / (1 + b_variance * h) - torch.log1p(b_variance * h)) / 2 - odds
        allowed = is_open & (room[:, layer_of] > 0) & torch.isfinite(gain)
        best = torch.where(allowed, gain, -torch.inf).argmax(1)
        taken = allowed[rows, best] & (gain[rows, best] > 0)
        chosen.append(torch.where(taken, candidates[rows, best], -1))
        is_open[rows, best] &= ~taken
        room[rows, layer_of[best]] -= taken.to(room.dtype)
        v = torch.where(taken, b_variance, 0.0)
        column = H[rows, :, best]
        factor = v / (1 + v * h[rows, best])
        q = q - column * (factor * q[rows, best])[:, None]
        H = H - factor[:, None, None] * column[:, :, None] * column[:, None, :]
    return torch.stack(chosen, 1)


def _log_prior_odds(layers: Sequence[Layer], places: Tensor, layer_of: Tensor) -> Tensor:
    """`n x C`, log odds against a place being nonzero, if k of its tensor's are: of the weight's or of the bias's.

    A user's habits often are in the few biases, which among all weights nothing would single out.
    """
    odds, starts = [], []
    for layer in layers:
        weights = layer.rows * layer.columns
        of_bias = log_prior_odds(layer.rows, min(layer.sparsity, layer.rows))
        odds.append((log_prior_odds(weights, min(layer.sparsity, weights)), of_bias))
        starts.append(layer.start + weights)
    # never below zero, as they are where k is most of a tensor: what is chosen has evidence for it
    table = torch.tensor(odds, device=places.device).clamp(min=0.0)[layer_of]
    is_bias = places >= torch.tensor(starts, device=places.device)[layer_of]
    return torch.where(is_bias, table[:, 1], table[:, 0])


def _is_class(eta: Tensor, y: Tensor) -> Tensor:
    """`... x o`, true at each example's class; nowhere for a target that is none, which must not raise."""
    return y[..., None] == torch.arange(eta.shape[-1], dtype=y.dtype, device=eta.device)


def _at(factors: LayerJacobian, support: Tensor) -> Tensor:
    """`n x m x o x K`, derivatives in the places that are in this layer; zeros elsewhere."""
    start, stop = factors.layer.start, factors.layer.start + factors.layer.size
    inside = (support >= start) & (support < stop)
    return factors.at(torch.where(inside, support, start)) * inside[:, None, None, :]


def prior_precision(w: Tensor, support: Tensor, b_variance: float) -> Tensor:
    """`n x (R+K)`; a slot that is unused has no data, so its precision stays the prior's."""
    return torch.cat([torch.ones_like(w), w.new_full(support.shape, 1 / b_variance)], 1)


def solved(A: Tensor, g: Tensor) -> Tensor:
    """`n x p`, A^-1 g; NaN for a user whose matrix has no factor."""
    factor, failed = torch.linalg.cholesky_ex(A)
    x: Tensor = torch.cholesky_solve(g[..., None], factor)[..., 0]
    return torch.where((failed == 0)[:, None], x, torch.nan)


def _inverse(A: Tensor) -> Tensor:
    """`n x p x p`; NaN for a user whose matrix has no factor."""
    factor, failed = torch.linalg.cholesky_ex(A)
    eye = _eye(A).expand_as(A)
    return torch.where((failed == 0)[:, None, None], torch.cholesky_solve(eye, factor), torch.nan)


def _eye(A: Tensor) -> Tensor:
    return torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
