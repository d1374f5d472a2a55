"""A new run that starts from a released model against one that starts from nothing: rounds and epsilon to one quality.

    python -m benchmarks.incremental_training [--epsilon 1 4] [--seeds 3]

Yesterday half of each user's training examples were there (chosen by a rule), and a first run of the given epsilon and
ten rounds released a model. Now all of them are there, and another run of the same epsilon and ten rounds goes on from
that model, or from public facts alone. Errors are on held-out examples after each round, users being personalized with
all they have. Same mechanism, noise multiplier and defaults for both; nothing is tuned here. "Rounds" is the first
round after which the error, averaged over seeds, is within .0005 (of ratings; within 1 % of the synthetic error) of
that of the run from nothing after its last; "epsilon" is what the rounds up to there cost. The noise is the system's,
so a second run differs. One JSON line a curve.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from client import sources
from common.config import ModelConfig, TrainingConfig, load_config
from common.data import DataSchema, Population, held_out, split, take_examples
from common.families import FAMILIES
from common.synthetic import draw_population
from privacy.entropy import SystemNoise
from privacy.gaussian import epsilon_of_mu
from server.algorithms import Gradient
from umbel.baselines import Mechanism, Users, theta_under, trajectory, users_of
from umbel.evaluate import held_out_error
from umbel.plan import least_noise

ROUNDS, DELTA, FAMILY = TrainingConfig().rounds, 1e-6, "squared"
STARTS = {"nothing": "from nothing", "released": "from the released model"}
_EARLIER_SEED = 7_000_003


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """Users' examples then and now, and what is held out."""

    name: str
    earlier: Population
    train: Population
    test: Population
    schema: DataSchema


def problem(data: str, seed: int) -> Problem:
    """A folder of ratings, or "synthetic": 2,000 users with about 30 training examples, d = 40, r = 4, k = 3."""
    if data == "synthetic":
        drawn, schema, _ = draw_population(
            users=2000, examples=(10, 65), dimension=40, rank=4, sparsity=3, noise=0.5, seed=seed
        )
        train, test = split(drawn, seed)
    else:
        found = sources.read(load_config(None, {"data.source": data, "data.split_seed": seed}).data, FAMILY)
        train, test, schema = found.train, found.test, found.schema
    earlier = take_examples(train, held_out(train.key, _EARLIER_SEED + seed, 0.5))
    return Problem(name=Path(data).name, earlier=earlier, train=train, test=test, schema=schema)


def curves(given: Problem, epsilon: float, seed: int) -> Iterator[dict[str, Any]]:
    """Errors after each round, of the run from nothing and of the one that goes on."""
    family, defaults = FAMILIES[FAMILY], ModelConfig()
    z = least_noise(epsilon, DELTA, ROUNDS, 1)
    mechanism = Mechanism(noise_multiplier=z, rounds=ROUNDS, noise=SystemNoise)
    fresh = Gradient(family=FAMILY, rank=defaults.rank, sparsity=defaults.sparsity, clipping_norm=None)
    users = users_of(given.train, given.schema, family, shards=1)

    def trained(users: Users, algorithm: Gradient) -> Iterator[Any]:
        return trajectory(users, algorithm, mechanism=mechanism, rng=np.random.default_rng(seed))

    def errors(algorithm: Gradient) -> list[float]:
        thetas = (theta_under(users, algorithm.personal_task, model) for model in trained(users, algorithm))
        return [held_out_error(theta, given.test, given.train, family).error() for theta in thetas]

    *_, released = trained(users_of(given.earlier, given.schema, family, shards=1), fresh)
    for start, algorithm in (("nothing", fresh), ("released", replace(fresh, start=released))):
        yield {"start": start, "epsilon": epsilon, "noise_multiplier": z, "seed": seed, "errors": errors(algorithm)}


def row(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and how far each run has to go."""
    means = {
        start: [statistics.fmean(column) for column in zip(*errors, strict=True)]
        for start in STARTS
        if (errors := [cell["errors"] for cell in cells if cell["start"] == start])
    }
    z, data = float(cells[0]["noise_multiplier"]), cells[0]["data"]
    goal = means["nothing"][-1]
    goal += 0.01 * goal if data == "synthetic" else 0.0005
    rounds = {start: next((t for t, e in enumerate(errors) if e <= goal), None) for start, errors in means.items()}
    return {
        "data": data,
        "epsilon": cells[0]["epsilon"],
        "errors": means,
        "rounds": rounds,
        "spent": {start: None if t is None else _epsilon(t, z) for start, t in rounds.items()},
        "with_first_run": None if rounds["released"] is None else _epsilon(ROUNDS + rounds["released"], z),
    }


def _epsilon(releases: int, z: float) -> float:
    return epsilon_of_mu(releases**0.5 / z, DELTA) if releases else 0.0


def markdown(rows: list[dict[str, Any]]) -> str:
    """The table of docs/results.md."""
    shown = (0, 1, 2, 3, 5, ROUNDS)
    heads = ["data", "epsilon", "start", *(f"after {t}" for t in shown), "rounds", "epsilon", "with the first run"]
    lines = [f"| {' | '.join(heads)} |", "|--" * len(heads) + "|"]
    for each in rows:
        for start, errors in each["errors"].items():
            rounds, spent = each["rounds"][start], each["spent"][start]
            together = f"{each['with_first_run']:.2f}" if start == "released" and rounds is not None else ""
            cost = ["more than 10", ""] if rounds is None else [str(rounds), f"{spent:.2f}"]
            cells = [each["data"], f"{each['epsilon']:g}", STARTS[start], *(f"{errors[t]:.4f}" for t in shown)]
            lines.append(f"| {' | '.join([*cells, *cost, together])} |")
    return "\n".join(lines)


def main() -> None:
    """Run all cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ratings = ["../shared/data/ml-1m-part", "../shared/data/ml-100k"]
    parser.add_argument("--data", nargs="+", default=[*ratings, "synthetic"])
    parser.add_argument("--epsilon", nargs="+", type=float, default=[1.0, 4.0])
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    rows = []
    for data in arguments.data:
        for epsilon in arguments.epsilon:
            cells = []
            for seed in range(arguments.seeds):
                given = problem(data, seed)
                cells += [{"data": given.name, **curve} for curve in curves(given, epsilon, seed)]
            for cell in cells:
                print(json.dumps({"benchmark": "incremental_training", **cell}), flush=True)
            rows.append(row(cells))
    print(markdown(rows))


if __name__ == "__main__":
    main()
