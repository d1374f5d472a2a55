"""Errors on real ratings against the baselines, over three splits by rule: the tables of docs/results.md.

    python -m benchmarks.movielens ../shared/data/ml-1m-part --epsilon none 1 .5 .25
    python -m benchmarks.movielens ../shared/data/ml-100k --epsilon none 8 4 2

Every cell is `umbel simulate` with its defaults (rank 8, sparsity 5, 10 rounds, adaptive clipping) at delta = 1e-6;
nothing is tuned on held-out ratings: hyper-parameters are the dimensionless defaults, ridge penalties come from a
validation part of the training ratings. Differences are paired on the same split; the standard error is over users,
averaged over splits, with the standard deviation of the splits' differences beside it. One JSON line a cell.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from benchmarks.throughput import Silent
from common.config import load_config
from umbel.simulate import simulate

SPLITS = (0, 1, 2)


def cell(data: Path, epsilon: float | str, split_seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One simulation, as a user runs it."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = {
            "data.source": str(data),
            "data.split_seed": split_seed,
            "privacy.epsilon": epsilon,
            "privacy.delta": 1e-6,
            "run.out": str(Path(folder) / "run"),
        }
        results = simulate(load_config(None, {**overrides, **settings}), progress=Silent())
    kept = ("metric", "error", "baselines", "paired", "penalties", "privacy")
    return {"epsilon": epsilon, "split_seed": split_seed, **{key: results[key] for key in kept}}


def mean(values: list[Any]) -> float | None:
    """Their mean, or None where one is missing."""
    return None if any(value is None for value in values) else statistics.fmean(values)


def shown(value: float | None, sign: bool = False) -> str:
    """Four decimals."""
    return "     -" if value is None else f"{value:+.4f}" if sign else f"{value:.4f}"


def table(cells: list[dict[str, Any]]) -> None:
    """Means over splits."""
    ranges = list(cells[0]["error"]["by_examples"])
    names = list(cells[0]["baselines"])
    print(f"\n{'epsilon':>8} {'model':>20} {'overall':>8} " + " ".join(f"{name:>8}" for name in ranges))
    for epsilon in dict.fromkeys(c["epsilon"] for c in cells):
        group = [c for c in cells if c["epsilon"] == epsilon]
        rows = {"umbel": [c["error"] for c in group]}
        rows |= {name: [c["baselines"][name] for c in group] for name in names}
        for name, entries in rows.items():
            by_range = [mean([entry["by_examples"][r] for entry in entries]) for r in ranges]
            overall = shown(mean([entry["overall"] for entry in entries]))
            print(f"{epsilon!s:>8} {name:>20} {overall:>8} " + " ".join(f"{shown(v):>8}" for v in by_range))
    print(f"\n{'epsilon':>8} {'umbel minus':>20} {'mean':>8} {'se':>8} {'sd of splits':>13}")
    for epsilon in dict.fromkeys(c["epsilon"] for c in cells):
        group = [c for c in cells if c["epsilon"] == epsilon]
        for name in names:
            differences = [c["paired"][name]["difference"] for c in group]
            error = statistics.fmean(c["paired"][name]["standard_error"] for c in group) / len(group) ** 0.5
            spread = statistics.stdev(differences) if len(differences) > 1 else float("nan")
            print(f"{epsilon!s:>8} {name:>20} {shown(mean(differences), True):>8} {error:>8.4f} {spread:>13.4f}")


def main() -> None:
    """Run all cells and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--epsilon", nargs="+", default=["none", "1", ".5", ".25"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="configuration, as in the run's TOML")
    arguments = parser.parse_args()
    settings = {key: json.loads(value) for key, _, value in (pair.partition("=") for pair in arguments.set)}
    cells = []
    for epsilon in (e if e == "none" else float(e) for e in arguments.epsilon):
        for split_seed in SPLITS:
            cells.append(cell(arguments.data, epsilon, split_seed, settings))
            print(json.dumps({"benchmark": "movielens", "data": arguments.data.name, **cells[-1]}), flush=True)
    table(cells)


if __name__ == "__main__":
    main()
