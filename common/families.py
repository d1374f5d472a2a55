"""Loss families behind one interface: what an example's likelihood looks like around a predictor.

Each family turns an example (eta, y) into a loss, a probability-scale residual and a curvature. For the linear
families eta = x'theta is one number; Newton's working response follows from these, so that one linear solver serves
all of them. Softmax takes one eta for each class, which only a network gives.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from array_api_compat import array_namespace, device

Array = Any


class Family(Protocol):
    """A likelihood with canonical link."""

    @property
    def name(self) -> str:
        """`squared`, `logistic` or `softmax`."""

    @property
    def metric(self) -> str:
        """Name of the error that is reported."""

    def loss(self, eta: Array, y: Array) -> Array:
        """Loss of each example, in the units the error is reported in before averaging."""

    def residual(self, eta: Array, y: Array) -> Array:
        """Minus the derivative of the negative log likelihood in eta, up to the noise variance."""

    def curvature(self, eta: Array) -> Array:
        """Second derivative of the negative log likelihood in eta, up to the noise variance."""


@dataclass(frozen=True)
class Squared:
    """Squared loss: y = eta + noise."""

    name: str = "squared"
    metric: str = "rmse"

    def loss(self, eta: Array, y: Array) -> Array:
        """Squared error."""
        return (y - eta) ** 2

    def residual(self, eta: Array, y: Array) -> Array:
        """y - eta."""
        return y - eta

    def curvature(self, eta: Array) -> Array:
        """One."""
        return array_namespace(eta).ones_like(eta)


@dataclass(frozen=True)
class Logistic:
    """Logistic loss: P(y = 1) = 1 / (1 + exp(-eta)), y in {0, 1}; exact at any margin."""

    name: str = "logistic"
    metric: str = "log_loss"

    def loss(self, eta: Array, y: Array) -> Array:
        """log(1 + exp(eta)) - y eta, computed without overflow."""
        xp = array_namespace(eta)
        # max(eta, 0) - y eta + log1p(exp(-|eta|)): no term overflows, and none cancels for y in {0, 1}
        return xp.where(eta > 0, eta * (1 - y), -eta * y) + xp.log1p(xp.exp(-xp.abs(eta)))

    def residual(self, eta: Array, y: Array) -> Array:
        """y - p."""
        return y - expit(eta)

    def curvature(self, eta: Array) -> Array:
        """p (1 - p)."""
        p = expit(eta)
        return p * expit(-eta)


@dataclass(frozen=True)
class Softmax:
    """Cross-entropy over C classes: P(y = c) = exp(eta_c) / sum_k exp(eta_k); exact at any margin.

    `eta` is `... x C`, of any shape in front of the classes, and `y` is `...`: class numbers 0..C-1, as floats.
    """

    name: str = "softmax"
    metric: str = "log_loss"

    def loss(self, eta: Array, y: Array) -> Array:
        """`...`: log sum_k exp(eta_k) - eta_y, computed without overflow."""
        xp = array_namespace(eta)
        shifted = eta - xp.max(eta, axis=-1, keepdims=True)
        # the largest term of the sum is exp(0) = 1; without it log1p keeps what the others say, however small
        beside = xp.sum(xp.where(_is_largest(eta), 0.0, xp.exp(shifted)), axis=-1)
        return xp.log1p(beside) - xp.sum(xp.where(_is_class(eta, y), shifted, 0.0), axis=-1)

    def residual(self, eta: Array, y: Array) -> Array:
        """`... x C`: onehot(y) - p."""
        xp = array_namespace(eta)
        p, complement = _softmax(eta)
        return xp.where(_is_class(eta, y), complement, -p)

    def curvature(self, eta: Array) -> Array:
        """`... x C`: p (1 - p), the diagonal of the second derivative diag(p) - p p'."""
        p, complement = _softmax(eta)
        return p * complement


def _softmax(eta: Array) -> tuple[Array, Array]:
    """p and 1 - p, both `... x C`; no digit of a small 1 - p is lost to a p that rounds to 1."""
    xp = array_namespace(eta)
    terms, largest = xp.exp(eta - xp.max(eta, axis=-1, keepdims=True)), _is_largest(eta)
    total = xp.sum(terms, axis=-1, keepdims=True)
    beside = xp.sum(xp.where(largest, 0.0, terms), axis=-1, keepdims=True)
    return terms / total, xp.where(largest, beside, total - terms) / total


def _is_largest(eta: Array) -> Array:
    """`... x C`, true once for each example: at the first of its largest eta."""
    xp = array_namespace(eta)
    return _is_class(eta, xp.argmax(eta, axis=-1))


def _is_class(eta: Array, y: Array) -> Array:
    """`... x C`, true at each example's class."""
    xp = array_namespace(eta)
    return xp.arange(eta.shape[-1], device=device(eta)) == y[..., None]


def expit(eta: Array) -> Array:
    """1 / (1 + exp(-eta)) without overflow."""
    xp = array_namespace(eta)
    small = xp.exp(-xp.abs(eta))
    return xp.where(eta >= 0, 1 / (1 + small), small / (1 + small))


LINEAR_FAMILIES: dict[str, Family] = {"squared": Squared(), "logistic": Logistic()}
"""Those of one number eta an example, for theta_i = beta + U w_i + b_i."""

FAMILIES: dict[str, Family] = {**LINEAR_FAMILIES, "softmax": Softmax()}
