"""Users per second of a whole round, from RESERVE to checkpoint, through the real apps in this process.

    python -m benchmarks.throughput [--users 10000 100000] [--rounds 7] [--nodes 2]

Users divided by the median wall time of a round: signed broadcast, filter, personalization, gradient, clip, grid,
integer sum, noise, staging, COMMIT, step and checkpoint. Data in memory, personal states not persisted, d=50, r=5,
20 examples a user, sparsity 5 and 0. Prints a table and one JSON line.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from client import sources
from common.config import load_config
from server.settings import RunFolder
from umbel.results import peak_memory_bytes
from umbel.simulate import lay_out, run_engine


class Silent:
    """Watches nothing."""

    def step(self, name: str) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Nothing."""


def measure(users: int, sparsity: int, rounds: int, nodes: int) -> dict[str, Any]:
    """One configuration: lay out, run, read the rounds' wall times."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(
            None,
            {
                "data.synthetic.users": users,
                "data.synthetic.examples": 20,
                "data.synthetic.dimension": 50,
                "data.synthetic.rank": 5,
                "data.synthetic.sparsity": 5,
                "data.synthetic.noise": 0.1,
                "data.test_fraction": 0.0,
                "model.rank": 5,
                "model.sparsity": sparsity,
                "training.rounds": rounds,
                "training.nodes": nodes,
                "run.out": str(Path(folder) / "run"),
                "run.stores": "memory",
            },
        )
        resolved = lay_out(config, Silent())
        run = RunFolder(root=Path(str(resolved.run.out)))
        run_engine(resolved, run)
        seconds = [json.loads(line)["seconds"] for line in run.timings.read_text().splitlines()][1:]
        shutil.rmtree(folder, ignore_errors=True)
        Path(folder).mkdir(exist_ok=True)
    median = statistics.median(seconds)  # without the first round, which builds what later ones reuse
    return {
        "users": users,
        "sparsity": sparsity,
        "round_seconds": median,
        "users_per_second": users / median,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def main() -> None:
    """Measure every configuration, smallest first, so that peak memory means something."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nodes", type=int, default=2)
    arguments = parser.parse_args()
    results = []
    print(f"{'users':>8} {'k':>3} {'round':>9} {'users/s':>10} {'peak memory':>12}")
    for users in sorted(arguments.users):
        for sparsity in (5, 0):
            result = measure(users, sparsity, arguments.rounds, arguments.nodes)
            results.append(result)
            print(
                f"{users:>8} {sparsity:>3} {result['round_seconds']:>7.3f} s {result['users_per_second']:>10,.0f} "
                f"{result['peak_memory_bytes'] / 2**20:>8,.0f} MiB",
                flush=True,
            )
        sources.forget()
    print(json.dumps({"benchmark": "throughput", "nodes": arguments.nodes, "results": results}))


if __name__ == "__main__":
    main()
