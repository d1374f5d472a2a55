"""Errors on held-out examples: computed from raw data, for the person who runs a simulation, never published."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from common.data import Population
from common.families import Family
from common.model import Array

EXAMPLE_RANGES = ((0, 10), (10, 30), (30, 100), (100, None))
"""Users by their number of training examples: at least the first and fewer than the second."""
_ROWS_AT_ONCE = 200_000


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """Sums of held-out losses by user.

    Attributes:
        metric: `rmse` or `log_loss`.
        loss: `n`, sum over the user's held-out examples.
        count: `n`, how many they are.
        train_count: `n`, the user's training examples.
    """

    metric: str
    loss: Array
    count: Array
    train_count: Array

    def error(self, users: Any = slice(None)) -> float | None:
        """The error over all held-out examples of some users; None where they have none."""
        count = float(self.count[users].sum())
        mean = float(self.loss[users].sum()) / count if count else math.nan
        if not count:
            return None
        return math.sqrt(mean) if self.metric == "rmse" else mean

    def standard_error(self) -> float | None:
        """Of the overall error, over users: examples of one user are not independent."""
        total = float(self.count.sum())
        if not total:
            return None
        mean = float(self.loss.sum()) / total
        # linearization of a ratio of sums over independent users
        spread = math.sqrt(float(((self.loss - mean * self.count) ** 2).sum())) / total
        return spread / (2 * math.sqrt(mean)) if self.metric == "rmse" and mean > 0 else spread

    def summary(self) -> dict[str, Any]:
        """`overall` and `by_examples`."""
        return {"overall": self.error(), "by_examples": self.by_examples()}

    def by_examples(self) -> dict[str, float | None]:
        """The error of users with so many training examples."""
        inside = {range_name(low, high): self._in_range(low, high) for low, high in EXAMPLE_RANGES}
        return {name: self.error(users) for name, users in inside.items()}

    def _in_range(self, low: int, high: int | None) -> Any:
        return (self.train_count >= low) & (self.train_count < (high or math.inf))


def range_name(low: int, high: int | None) -> str:
    """`0-9`, `10-29`, ..., `100+`."""
    return f"{low}+" if high is None else f"{low}-{high - 1}"


def held_out_error(theta: Array, test: Population, train: Population, family: Family) -> HeldOut:
    """Score every user's parameters on that user's held-out examples.

    Args:
        theta: `n x d`, or `d` for one model for all.
        test: Held-out part; the same users as `train`.
        train: Training part, for its counts.
        family: Loss family.
    """
    owner = test.user_of_example
    loss = np.zeros(test.num_users)
    for start in range(0, test.num_examples, _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        users = owner[rows]
        own = theta if theta.ndim == 1 else theta[users]
        eta = (test.features.rows(rows) * own).sum(axis=1)
        loss += np.bincount(users, family.loss(eta, test.y[rows]), minlength=test.num_users)
    return HeldOut(
        metric=family.metric,
        loss=loss,
        count=test.counts.astype(np.float64),
        train_count=train.counts.astype(np.float64),
    )


def paired_difference(ours: HeldOut, theirs: HeldOut) -> dict[str, float | None]:
    """`ours - theirs` in the overall error, with its standard error over users: both saw the same split."""
    total = float(ours.count.sum())
    if not total:
        return {"difference": None, "standard_error": None}
    errors, influence = [], []
    for held_out in (ours, theirs):
        mean = float(held_out.loss.sum()) / total
        error = math.sqrt(mean) if held_out.metric == "rmse" else mean
        slope = 1 / (2 * error) if held_out.metric == "rmse" and error > 0 else 1.0
        errors.append(error)
        influence.append(slope * (held_out.loss - mean * held_out.count) / total)
    spread = math.sqrt(float(((influence[0] - influence[1]) ** 2).sum()))
    return {"difference": errors[0] - errors[1], "standard_error": spread}
