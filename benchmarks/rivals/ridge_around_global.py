"""Ridge regression of each user around a private mean beta: few private numbers, many personal ones.

beta is `umbel.baselines.private_global`: gradient descent on the average over users of the mean loss, preconditioned by
the public second moment of the features. The strong rival of docs/results.md.
"""

from benchmarks.rivals.rival import Rival, local_penalties
from umbel.baselines import private_global, ridge

RIVAL = Rival(
    key="ridge_around_global",
    settings=lambda dimension: [{"rounds": rounds} for rounds in (10, 5, 20)],
    train=lambda users, budget, setting, rng: private_global(users, budget.mechanism(setting["rounds"])),
    local_settings=local_penalties(0.1, 0.5, 2.0, 5.0, 10.0, 25.0),
    personal=lambda users, center, setting, local: ridge(users, center, local["local_penalty"]),
    personal_numbers=lambda dimension, setting: dimension,
)
