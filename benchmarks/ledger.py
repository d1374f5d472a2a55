"""How fast the ledger is: append, budget check, open and verify at 1e5 rounds. Run from the root.

    python -m benchmarks.ledger [--rounds 100000] [--folder DIR]

Prints a table, then one JSON line. `--folder` chooses the disk whose fsync is measured.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from privacy.audit.verify import verify
from privacy.keys import public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.participation import mu_max_string

EVENT = {
    "mechanism": "gaussian",
    "noise_multiplier": "2500.000000",
    "clipping_norm": "1.250000",
    "grid_scale": 65536,
    "groups": [
        {"name": "model", "size": 1050, "share": "0.990000"},
        {"name": "scalars", "size": 4, "share": "0.141067"},
    ],
    "denominator": 943,
    "noise": "aes-256-ctr",
    "sampling": "none",
    "initialization": False,
}
DIGEST = "ab" * 32


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        measured = measure(Path(folder) / "ledger.jsonl", options.rounds)
    for name, value in measured.items():
        print(f"{name:<40}{value:>14,.4f}")
    print(json.dumps({"benchmark": "ledger", **measured}))


def measure(path: Path, rounds: int) -> dict[str, float]:
    """Every number, by name; times in the unit that the name ends with."""
    key = Ed25519PrivateKey.generate()
    create(path.with_name("synced.jsonl"), key).close()
    with PrivacyLedger.open(path.with_name("synced.jsonl"), key=key) as ledger:
        synced = append(ledger, 200)
    create(path, key).close()
    with without_fsync(), PrivacyLedger.open(path, key=key) as ledger:
        plain = append(ledger, rounds)
        check = best(lambda: ledger.would_exceed(EVENT), 1000)
    owner = public_key_hex(key)
    opened = best(lambda: PrivacyLedger.open(path), 2)
    verified = best(lambda: verify(path, public_key=owner), 2)
    verification = verify(path, public_key=owner)
    assert verification.status == "verified", verification.reason  # noqa: S101
    assert len(verification.rounds) == rounds  # noqa: S101
    return {
        "rounds": rounds,
        "lines": verification.sequence + 1,
        "file_MB": path.stat().st_size / 1e6,
        "append_with_fsync_median_ms": 1e3 * float(np.median(synced)),
        "append_with_fsync_p99_ms": 1e3 * float(np.quantile(synced, 0.99)),
        "append_without_fsync_median_ms": 1e3 * float(np.median(plain)),
        "append_without_fsync_p99_ms": 1e3 * float(np.quantile(plain, 0.99)),
        "budget_check_ms": 1e3 * check,
        "open_s": opened,
        "verify_last_signature_s": verified,
        "peak_memory_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def create(path: Path, key: Ed25519PrivateKey) -> PrivacyLedger:
    """A ledger with one run and a budget that 1e5 rounds of `EVENT` fit into."""
    ledger = PrivacyLedger.create(
        path,
        population="benchmark",
        epsilon=1.0,
        delta=1e-6,
        mu_max=mu_max_string(1.0, 1e-6),
        max_nodes_per_user=1,
        key=key,
    )
    ledger.start("run", {"rounds": 100_000}, DIGEST)
    return ledger


def append(ledger: PrivacyLedger, rounds: int) -> list[float]:
    """Seconds of each RESERVE and COMMIT."""
    seconds = []
    for server_round in range(1, rounds + 1):
        before = time.perf_counter()
        sequence = ledger.reserve("run", server_round, EVENT, 943).sequence
        between = time.perf_counter()
        ledger.commit(sequence, DIGEST)
        seconds += [between - before, time.perf_counter() - between]
    return seconds


def best(measured: Callable[[], object], repeats: int) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        measured()
        times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def without_fsync() -> Iterator[None]:
    """What appending costs apart from the disk."""
    fsync, os.fsync = os.fsync, lambda descriptor: None
    try:
        yield
    finally:
        os.fsync = fsync


if __name__ == "__main__":
    main()
