"""A million entities updated from a stream of events on one core: updates per second, peak memory, bytes an entity.

    python -m benchmarks.incremental_stream [--entities 1000000] [--events 4] [--features 8] [--format csv|parquet]

Draws events of entities in random order, each entity's in two visits, and runs `umbel update` on them as a process of
its own, whose peak memory is what is printed; then predicts for one entity from a cold start of the program. Prints a
table and one JSON line.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

_ROWS_AT_ONCE = 2**17
_REPEATS = 5


def write_events(path: Path, *, entities: int, events: int, features: int, seed: int = 0) -> None:
    """Events of a logistic model with a random effect; each entity comes twice, with half of its events."""
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(entities), rng.permutation(entities)])
    names = [f"x{j}" for j in range(features)]
    with path.open("w", encoding="ascii") as file:
        file.write(",".join(["user", "click", *names]) + "\n")
        for start in range(0, order.size, _ROWS_AT_ONCE):
            user = np.repeat(order[start : start + _ROWS_AT_ONCE], max(1, events // 2))
            X = rng.standard_normal((user.size, features))
            y = rng.random(user.size) < 1 / (1 + np.exp(-X.sum(axis=1) * np.sin(user)))
            rows = np.column_stack([user, y, X])
            np.savetxt(file, rows, fmt=["%d", "%d", *["%.3f"] * features], delimiter=",")


def as_parquet(source: Path, target: Path) -> None:
    """The same events in Parquet."""
    from pyarrow import csv, parquet  # noqa: PLC0415

    with csv.open_csv(source) as reader, parquet.ParquetWriter(target, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


def run(*arguments: str) -> tuple[str, float, float, float]:
    """Output, wall seconds, CPU seconds and peak MiB of a command of umbel."""
    started = time.perf_counter()
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "umbel", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        output = "" if process.stdout is None else process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"umbel {' '.join(arguments)} ended with {process.returncode}")
    return output, time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def measure(folder: Path, *, entities: int, events: int, features: int, kind: str) -> dict[str, Any]:
    """One configuration."""
    source, store = folder / "events.csv", folder / "entities.umbel"
    write_events(source, entities=entities, events=events, features=features)
    if kind == "parquet":
        as_parquet(source, folder / "events.parquet")
        source.unlink()
        source = folder / "events.parquet"
    columns = [option for j in range(features) for option in ("--feature", f"x{j}")]
    run(
        "update", "--store", str(store), "--init", "--entity", "user", "--target", "click", *columns, "--format", "json"
    )
    output, seconds, cpu, peak = run("update", "--store", str(store), "--events", str(source), "--format", "json")
    done = json.loads(output)
    one = folder / "one.csv"
    one.write_text(",".join(["user", *(f"x{j}" for j in range(features))]) + "\n7" + ",0.5" * features + "\n")
    asked = ("predict", "--store", str(store), "--events", str(one), "--uncertainty")
    cold = [run(*asked) for _ in range(_REPEATS)]
    return {
        "format": kind,
        "entities": entities,
        "features": features + 1,
        "events": done["events"],
        "updates": done["updates"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "updates_per_cpu_second": round(done["updates"] / cpu),
        "events_per_cpu_second": round(done["events"] / cpu),
        "peak_mib": round(peak),
        "bytes_per_entity": round(store.stat().st_size / entities),
        "predict_one_seconds": round(min(seconds for _, seconds, _, _ in cold), 3),
        "predict_one_cpu_seconds": round(min(cpu for _, _, cpu, _ in cold), 3),
    }


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entities", type=int, default=1_000_000)
    parser.add_argument("--events", type=int, default=4, help="of each entity")
    parser.add_argument("--features", type=int, default=8, help="beside the intercept")
    parser.add_argument("--format", choices=("csv", "parquet"), default="csv")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(
            Path(folder), entities=given.entities, events=given.events, features=given.features, kind=given.format
        )
    for name, value in found.items():
        print(f"{name:>20}  {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
