"""What the empirical audit finds where noise is as claimed, and where it is not.

    python -m benchmarks.empirical [--audits 10] [--canaries 1000] [--coordinates 10000] [--claim 1] [--alone]

Claims are for one release at delta = 1e-5 with the noise multiplier of --claim; the true one is a share of it. By
default all canaries are in one run; with --alone each has a repetition of its own. Prints, for each share, the mean
lower bounds, how many audits of all raised the alarm by each of them, and seconds an audit.
"""

import argparse
import os
import time

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from privacy.gaussian import epsilon_of_mu
from privacy.layout import Group, Layout, grid_scale_for, groups_of_event
from umbel.empirical import Trials, attack, refutations

DELTA = 1e-5
SHARES = (1.0, 0.7, 0.5, 0.3, 0.2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audits", type=int, default=10)
    parser.add_argument("--canaries", type=int, default=1000)
    parser.add_argument("--coordinates", type=int, default=10_000)
    parser.add_argument("--claim", type=float, default=1.0)
    parser.add_argument("--alone", action="store_true")
    options = parser.parse_args()
    size = options.coordinates
    layout = Layout(groups=(Group(name="model", size=size, share=1.0),), grid_scale=grid_scale_for(size, private=True))
    together = 1 if options.alone else options.canaries
    trials = Trials(repetitions=options.canaries // together, per_repetition=together)
    claim = epsilon_of_mu(1 / options.claim, DELTA)
    print(f"claimed epsilon {claim:.3f} at delta {DELTA:g}, {trials}, {size} coordinates, {options.audits} audits")
    for share in SHARES:
        event = {
            "noise_multiplier": f"{share * options.claim:.6f}",
            "grid_scale": layout.grid_scale,
            "groups": groups_of_event(layout),
            "denominator": 1000,
        }
        started = time.perf_counter()
        found = [
            refutations(*attack([event], trials, seed=seed), epsilon=claim, delta=DELTA)
            for seed in range(options.audits)
        ]
        names = [bound["name"] for bound in found[0]["bounds"]]
        epsilon = np.array([[bound["epsilon"] for bound in audit["bounds"]] for audit in found])
        columns = [
            f"{name} {mean:.2f} ({count} alarms)"
            for name, mean, count in zip(names, epsilon.mean(axis=0), (epsilon > claim).sum(axis=0), strict=True)
        ]
        alarms = sum(audit["alarm"] for audit in found)
        seconds = (time.perf_counter() - started) / options.audits
        print(f"noise {share:.1f} of the claim: {', '.join(columns)}; alarms {alarms}; {seconds:.2f} s", flush=True)


if __name__ == "__main__":
    main()
