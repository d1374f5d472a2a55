"""umbel with its defaults, not tuned at all; and with the tuning effort that its rivals get."""

import numpy as np

from benchmarks.rivals.rival import Budget, Rival, Setting
from common.config import ModelConfig, TrainingConfig
from common.model import Array, SharedModel
from umbel.baselines import Users, personal_theta, train_model

_MODEL = ModelConfig()
_ROUNDS = TrainingConfig().rounds


def _defaults(dimension: int) -> list[Setting]:
    return [
        {"rank": min(_MODEL.rank, dimension), "sparsity": min(_MODEL.sparsity, dimension), "rounds": _ROUNDS},
    ]


def _grid(dimension: int) -> list[Setting]:
    shapes = ((8, 5, 10), (4, 5, 10), (8, 0, 10), (4, 0, 10), (8, 5, 20), (4, 5, 5))
    return [{"rank": min(r, dimension), "sparsity": min(k, dimension), "rounds": t} for r, k, t in shapes]


def _train(users: Users, budget: Budget, setting: Setting, rng: np.random.Generator) -> SharedModel:
    mechanism = budget.mechanism(setting["rounds"])
    return train_model(users, rank=setting["rank"], sparsity=setting["sparsity"], mechanism=mechanism, rng=rng)


def _personal(users: Users, model: SharedModel, setting: Setting, _: Setting) -> Array:
    return personal_theta(users, model, setting["sparsity"])


def _rival(key: str, settings: object) -> Rival:
    return Rival(
        key=key,
        settings=settings,  # type: ignore[arg-type]
        train=_train,
        local_settings=({},),
        personal=_personal,
        personal_numbers=lambda dimension, setting: setting["rank"] + 2 * setting["sparsity"],
    )


DEFAULTS = _rival("umbel", _defaults)
TUNED = _rival("umbel_tuned", _grid)
