"""A planted model under differential privacy: how far U is from the truth, and what that costs in prediction.

    python -m benchmarks.private_recovery [--seeds 4] [--epsilon none 8 2]

2,000 users with 30 examples each, d = 40, rank 4, two nonzeros of b ~ N(0, 1), beta = 0, noise .5, delta = 1e-5. RMSE
is exact, from |theta_hat - theta|^2 and the noise, on fresh features. "oracle" knows U, rank, sparsity and the noise;
"start only" is the private pair moment; "statistics" is `amht-lrs` with pursuit, as `umbel simulate` runs it; "umbel"
the default algorithm with ten rounds, told the true number of nonzeros and with its default cap. Noise is the
system's, so a second run differs. Distance is |(I - U U') V| over the root of the rank, in the Frobenius norm. One
JSON line a cell.
"""

import argparse
import json
import math
import os
import statistics as stats
from collections.abc import Iterator

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from client.alternation import LocalSettings, fit
from common.config import AmhtConfig, ModelConfig, TrainingConfig
from common.families import FAMILIES
from common.model import SharedModel
from common.synthetic import SyntheticTruth, draw_population
from common.task import Task
from privacy.entropy import NoNoise, SystemNoise
from server.algorithms import Algorithm, AmhtLrs, Gradient
from server.least_squares import subspace_distance
from umbel.baselines import Mechanism, Users, learn, theta_under, users_of
from umbel.plan import least_noise

RANK, NONZEROS, NOISE, DELTA = 4, 2, 0.5, 1e-5
ROUNDS = TrainingConfig().rounds
CAP = ModelConfig().sparsity


def mechanism(epsilon: float | None, rounds: int) -> Mechanism:
    """Noise for so many releases."""
    if epsilon is None:
        return Mechanism(noise_multiplier="0", rounds=rounds, noise=NoNoise)
    return Mechanism(noise_multiplier=least_noise(epsilon, DELTA, rounds, 1), rounds=rounds, noise=SystemNoise)


def amht(rounds: int) -> AmhtLrs:
    """The published server with the local solver that recovers from the fewest examples."""
    settings = AmhtConfig(solver="pursuit")
    return AmhtLrs(rank=RANK, sparsity=NONZEROS, settings=settings, rounds=rounds, clipping_norm=None)


def umbel(sparsity: int) -> Gradient:
    """The default algorithm."""
    return Gradient(family="squared", rank=RANK, sparsity=sparsity, clipping_norm=None)


METHODS: dict[str, tuple[Algorithm, int]] = {
    "start only": (amht(1), 1),
    "statistics, 3 releases": (amht(3), 3),
    f"statistics, {ROUNDS} releases": (amht(ROUNDS), ROUNDS),
    f"umbel, cap {NONZEROS}": (umbel(NONZEROS), ROUNDS),
    f"umbel, cap {CAP}": (umbel(CAP), ROUNDS),
}


def rmse(theta: np.ndarray, truth: SyntheticTruth) -> float:
    """On fresh features of second moment I."""
    return math.sqrt(float(((theta - truth.theta) ** 2).sum(axis=1).mean()) + NOISE**2)


def oracle(users: Users, truth: SyntheticTruth) -> float:
    """Pursuit with the true U and a ridge of the noise variance."""
    settings = LocalSettings(solver="pursuit", sparsity=NONZEROS, ridge=NOISE**2)
    return rmse(users.theta(lambda batch: fit(batch, truth.U, settings).theta), truth)


def bayes_oracle(users: Users, truth: SyntheticTruth) -> float:
    """umbel's own posterior with the true U and variances."""
    model = SharedModel(beta=truth.beta, U=truth.U, b_variance=1.0, noise_variance=NOISE**2)
    return rmse(theta_under(users, Task(family="squared", sparsity=NONZEROS), model), truth)


def cells(seed: int, epsilons: list[float | None]) -> Iterator[dict[str, object]]:
    """Everything on one population."""
    population, schema, truth = draw_population(
        users=2000, examples=30, dimension=40, rank=RANK, sparsity=NONZEROS, noise=NOISE, beta_scale=0.0, seed=seed
    )
    users = users_of(population, schema, FAMILIES["squared"], shards=1)
    for name, error in (("oracle", oracle(users, truth)), ("oracle, umbel's posterior", bayes_oracle(users, truth))):
        yield {"method": name, "epsilon": None, "seed": seed, "rmse": error, "distance": 0.0}
    for epsilon in epsilons:
        for name, (algorithm, rounds) in METHODS.items():
            rng = np.random.default_rng(seed)
            model = learn(users, algorithm, mechanism=mechanism(epsilon, rounds), rng=rng)
            theta = theta_under(users, algorithm.personal_task, model)
            distance = subspace_distance(model.U, truth.U, norm="frobenius") / math.sqrt(RANK)
            yield {"method": name, "epsilon": epsilon, "seed": seed, "rmse": rmse(theta, truth), "distance": distance}


def main() -> None:
    """Run all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--epsilon", nargs="+", default=["none", "8", "2"])
    arguments = parser.parse_args()
    epsilons = [None if text == "none" else float(text) for text in arguments.epsilon]
    found = []
    for seed in range(arguments.seeds):
        for cell in cells(seed, epsilons):
            found.append(cell)
            print(json.dumps({"benchmark": "private_recovery", **cell}), flush=True)
    print(f"\n{'':>28}" + "".join(f"{'none' if e is None else e:>24}" for e in epsilons))
    for name in dict.fromkeys(cell["method"] for cell in found):
        row = f"{name:>28}"
        for epsilon in epsilons:
            mine = [cell for cell in found if (cell["method"], cell["epsilon"]) == (name, epsilon)]
            errors, distances = [[float(cell[key]) for cell in mine] for key in ("rmse", "distance")]
            spread = stats.stdev(errors) if len(errors) > 1 else 0.0
            row += f"{stats.fmean(distances):>9.3f} {stats.fmean(errors):.4f} ±{spread:.4f}" if mine else f"{'':>24}"
        print(row)


if __name__ == "__main__":
    main()
