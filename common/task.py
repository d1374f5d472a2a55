"""What a broadcast asks nodes to compute: public settings, checked before anything is computed by them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from common.errors import Refused

Work = Literal["gradient", "moment", "statistics", "network"]
Moment = Literal["pair-moments", "moments"]
Solver = Literal["alternation", "joint", "elimination", "pursuit"]
Steps = Annotated[int, Field(ge=1, le=1000)]
_LARGEST = 1e12
_MOST_STEPS = 10_000
Setting = Annotated[float, Field(ge=0, le=_LARGEST)]
Thresholds = tuple[float, float, float, float]


def _four(value: Any) -> Any:
    numbers = value if isinstance(value, list | tuple) else ()
    if len(numbers) != 4 or not all(type(v) in (int, float) and 0 <= v <= _LARGEST for v in numbers):
        raise ValueError("four numbers [alpha, beta, gamma, c1] of at least 0")
    return tuple(float(v) for v in numbers)


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Fitting(_Settings):
    """How AMHT-LRS fits a user's w and b for a given U.

    Attributes:
        solver: "alternation" is the published one; "joint" adds a least squares on (w, b) after each choice of a
            support, "elimination" projects w out before it thresholds, "pursuit" picks the support greedily instead.
        alternations: Between b and w.
        steps: Of hard thresholding for each b.
        thresholds: alpha, beta, gamma and c1 of the published schedule of thresholds; None keeps the largest
            `sparsity` entries instead.
        ridge: Penalty on w.
    """

    solver: Solver = "alternation"
    alternations: Steps = 10
    steps: Steps = 20
    thresholds: Annotated[Thresholds, BeforeValidator(_four)] | None = None
    ridge: Setting = 0.0

    @model_validator(mode="after")
    def _bounded(self) -> "Fitting":
        if self.alternations * self.steps > _MOST_STEPS:
            raise ValueError(f"alternations times steps of at most {_MOST_STEPS}")
        return self


class Adapters(_Settings):
    """How a network's users are fitted and what they send.

    Attributes:
        architecture: `common.architecture.Architecture.digest` of the network that the release is of.
        layers: Names of the adapted layers, or patterns.
        rank: r of each.
        form: How a layer's matrix is read.
        train_base: Whether the base is learned too.
        trained: Coordinates of the shared vector that are learned: its last ones.
        steps: Gauss-Newton steps in w before b is chosen.
        local_steps: 1 sends a gradient; more send how far so many steps have moved the shared part.
        local_step_size: Of each of them, on the gradient of an average example.
    """

    architecture: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    layers: Annotated[tuple[str, ...], Field(strict=False)] = ("*",)
    rank: Annotated[int, Field(ge=0, le=256)]
    form: Literal["vector", "matrix"] = "vector"
    train_base: bool = True
    trained: Annotated[int, Field(ge=1)]
    steps: Annotated[int, Field(ge=1, le=100)] = 2
    local_steps: Annotated[int, Field(ge=1, le=100)] = 1
    local_step_size: Setting = 0.1


class Task(_Settings):
    """The public settings of a round's computation.

    Attributes:
        family: Loss family.
        sparsity: Cap on the nonzeros of b.
        work: What a user's vector is made of: the gradient of the log marginal likelihood, a second moment from
            which U starts, or the statistics A and V of AMHT-LRS.
        moment: Which second moment, where the work is one.
        fitting: How users are fitted by AMHT-LRS; None for the posterior of the default algorithm.
        adapters: Of a network; None for a linear model.
        fold: (index, folds): the part of a user's examples that this round uses; (0, 1), as always for a gradient, is
            all of them.
    """

    family: str
    sparsity: Annotated[int, Field(ge=0)]
    work: Work = "gradient"
    moment: Moment = "pair-moments"
    fitting: Fitting | None = None
    adapters: Adapters | None = None
    fold: Annotated[tuple[int, Annotated[int, Field(le=1_000_000)]], Field(strict=False)] = (0, 1)

    @model_validator(mode="after")
    def _fits(self) -> "Task":
        if not 0 <= self.fold[0] < self.fold[1]:
            raise ValueError("0 <= index < folds")
        if self.work == "statistics" and self.fitting is None:
            raise ValueError("fitting, where statistics are asked for")
        if (self.work == "network") != (self.adapters is not None):
            raise ValueError("adapters where the work is a network's, and nowhere else")
        if self.work in ("gradient", "network") and self.fold != (0, 1):
            raise ValueError("all examples, where a gradient is asked for")
        return self

    def encode(self) -> dict[str, Any]:
        """As plain values; what is as usual is left out."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def decode(cls, plain: Mapping[str, Any]) -> "Task":
        """Inverse of `encode`; `Refused` with code `policy_shape` where it has none."""
        try:
            return cls.model_validate(plain)
        except ValidationError as error:
            raise Refused("policy_shape", "Expected a task that this version knows, got another.") from error
