"""Each user alone: ridge regression on the own examples. Nothing is released, so it is the same at every epsilon."""

import numpy as np

from benchmarks.rivals.rival import Rival, local_penalties
from umbel.baselines import ridge

RIVAL = Rival(
    key="alone",
    settings=lambda dimension: [{}],
    train=lambda users, budget, setting, rng: np.zeros(users.shards[0].schema.dimension),
    local_settings=local_penalties(0.1, 0.5, 2.0, 5.0, 10.0, 25.0),
    personal=lambda users, center, setting, local: ridge(users, center, local["local_penalty"]),
    personal_numbers=lambda dimension, setting: dimension,
    is_released=False,
)
