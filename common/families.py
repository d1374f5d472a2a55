"""Loss families behind one interface: what an example's likelihood looks like around a linear predictor.

Each family turns an example (eta = x'theta, y) into a loss, a probability-scale residual and a curvature;
Newton's working response follows from these, so that one linear solver serves all families.
"""

from dataclasses import dataclass
from typing import Any, Protocol

from array_api_compat import array_namespace

Array = Any


class Family(Protocol):
    """A likelihood with canonical link."""

    @property
    def name(self) -> str:
        """`squared` or `logistic`."""

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


def expit(eta: Array) -> Array:
    """1 / (1 + exp(-eta)) without overflow."""
    xp = array_namespace(eta)
    small = xp.exp(-xp.abs(eta))
    return xp.where(eta >= 0, 1 / (1 + small), small / (1 + small))


FAMILIES: dict[str, Family] = {"squared": Squared(), "logistic": Logistic()}
