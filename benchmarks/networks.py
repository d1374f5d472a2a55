"""Networks under user-level privacy: low rank plus sparse personal layers against what else one could do.

    python -m benchmarks.networks --out F [--data digits] [--users 5000] [--epsilon none 8 2] [--seeds 0 1 2]
    python -m benchmarks.networks --out F --data ../shared/data/ml-1m-part

Every cell is a training of `umbel.network_results` at one epsilon with one seed, in a process of one thread, and a line
of F/cells.jsonl; a cell that is there is not run again. All private methods spend the same budget with the same rounds,
step sizes and mechanism; how far users fine-tune is chosen on a validation part of their training examples. The
constants of the algorithm were chosen on a population of another generator seed.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from client import sources
from common.config import Config, load_config
from common.files import append_line, cut_torn_line, make_folder
from privacy.entropy import NoNoise, SystemNoise
from server.networks import NetworkStart
from umbel.baselines import Mechanism
from umbel.network_results import NetworkErrors, NetworkEvaluation, Scorer, start_of
from umbel.plan import least_noise

VERSION = 1
METHODS = ("umbel", "low_rank", "global", "alone")
"""The cells of `global` also have the fine-tuned ones, which start from it."""
_FEW = 10
_DIGITS = "digits"
_EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
_DELTA = 1e-6


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is computed."""

    data: str
    users: int
    method: str
    epsilon: float | None
    seed: int
    rounds: int
    rank: int
    sparsity: int
    form: str

    @property
    def identity(self) -> dict[str, Any]:
        """What makes it the cell it is."""
        return {"version": VERSION, **self.__dict__}


def config_of(cell: Cell, folder: Path) -> Config:
    """As a user would write it."""
    name = "digits" if cell.data == _DIGITS else "recommender"
    source = digits(cell.users, cell.seed, folder) if cell.data == _DIGITS else Path(cell.data)
    return load_config(
        _EXAMPLES / name / "config.toml",
        {
            "data.source": str(source),
            "data.split_seed": cell.seed,
            "network.module": f"{_EXAMPLES / name / 'model.py'}:make_model",
            "network.form": cell.form,
            "model.rank": cell.rank,
            "model.sparsity": cell.sparsity,
            "training.rounds": cell.rounds,
            "run.name": f"seed-{cell.seed}",
        },
    )


def digits(users: int, seed: int, folder: Path) -> Path:
    """The made-up users of the digits example, written once."""
    path = folder / f"digits-{users}-{seed}.parquet"
    if not path.exists():
        spec = spec_from_file_location("make_data", _EXAMPLES / "digits" / "make_data.py")
        if spec is None or spec.loader is None:
            raise FileNotFoundError(_EXAMPLES / "digits" / "make_data.py")
        code = module_from_spec(spec)
        spec.loader.exec_module(code)
        code.main(["--users", str(users), "--seed", str(seed), "--out", str(path)])
    return path


def run(cell: Cell, folder: Path) -> list[dict[str, Any]]:
    """The cell's numbers; more than one where methods share a training."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    config = config_of(cell, folder)
    source = sources.read(config.data, config.model.family)
    network, shared = start_of(config, source.schema)
    start = NetworkStart(architecture=network.architecture, shared=shared, digest="")
    scorer = Scorer(source.train, source.test, source.schema, config.model.family)
    evaluation = NetworkEvaluation(config, source.schema, start, scorer)
    mechanism = _mechanism(cell)
    found: dict[str, NetworkErrors] = {}
    trained = 0.0
    if cell.method == "alone":
        found["alone"], _ = evaluation.fine_tuned(shared, part="all", on_step=_silent, name="")
    else:
        algorithm = evaluation.algorithm(
            rank=0 if cell.method == "global" else None,
            sparsity=None if cell.method == "umbel" else 0,
        )
        model = evaluation.trained(algorithm, mechanism)
        trained = time.perf_counter() - began
        found[cell.method] = evaluation.personalized(algorithm, model)
        if cell.method == "global":
            for name, part in (("fine_tuned", "all"), ("last_layer", "last")):
                found[name], _ = evaluation.fine_tuned(model.beta, part=part, on_step=_silent, name="")
    architecture = start.architecture
    facts = {
        "identity": cell.identity,
        "noise_multiplier": mechanism.noise_multiplier,
        "storage": architecture.storage,
        "shared_numbers": architecture.trained_size,
        "users": source.train.num_users,
        "users_per_second": cell.rounds * source.train.num_users / trained if trained else None,
        "seconds": time.perf_counter() - began,
    }
    return [{**facts, "method": name, **_errors(errors)} for name, errors in found.items()]


def _silent(_: str) -> None:
    """Nobody watches."""


def _mechanism(cell: Cell) -> Mechanism:
    if cell.epsilon is None:
        return Mechanism(noise_multiplier="0", rounds=cell.rounds, noise=NoNoise)
    z = least_noise(cell.epsilon, _DELTA, cell.rounds, 1)
    return Mechanism(noise_multiplier=z, rounds=cell.rounds, noise=SystemNoise)


def _errors(errors: NetworkErrors) -> dict[str, Any]:
    few = errors.loss.train_count < _FEW
    both = {errors.loss.metric: errors.loss}
    if errors.error_rate is not None:
        both["error_rate"] = errors.error_rate
    return {
        name: {"overall": held_out.error(), "few": held_out.error(few), "standard_error": held_out.standard_error()}
        for name, held_out in both.items()
    }


def table(cells: Sequence[Mapping[str, Any]]) -> Iterator[Table]:
    """Mean over seeds and its standard error, one table for each data set and metric."""
    for data in sorted({(c["identity"]["data"], c["users"]) for c in cells}):
        own = [c for c in cells if (c["identity"]["data"], c["users"]) == data]
        for metric in ("rmse", "log_loss", "error_rate"):
            if metric not in own[0]:
                continue
            epsilons = sorted({c["identity"]["epsilon"] or float("inf") for c in own}, reverse=True)
            shown = Table(title=f"{Path(data[0]).name}, {data[1]} users, {metric}: all | fewer than {_FEW} examples")
            for column in ("method", *(f"epsilon {e:g}" for e in epsilons)):
                shown.add_column(column)
            for method in dict.fromkeys(c["method"] for c in own):
                row = [method]
                for epsilon in epsilons:
                    of = [
                        c
                        for c in own
                        if c["method"] == method and (c["identity"]["epsilon"] or float("inf")) == epsilon
                    ]
                    row.append(" | ".join(_mean([c[metric][who] for c in of]) for who in ("overall", "few")))
                shown.add_row(*row)
            yield shown
    speeds = [c["users_per_second"] for c in cells if c["users_per_second"]]
    if speeds:
        yield Table(title=f"users trained a second and core: {min(speeds):.0f} to {max(speeds):.0f}")


def _mean(values: Sequence[float | None]) -> str:
    numbers = np.array([v for v in values if v is not None])
    if not numbers.size:
        return "-"
    spread = f" ±{numbers.std(ddof=1) / np.sqrt(numbers.size):.4f}" if numbers.size > 1 else ""
    return f"{numbers.mean():.4f}{spread}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default=_DIGITS)
    parser.add_argument("--users", type=int, default=5000)
    parser.add_argument("--epsilon", nargs="+", default=["none", "8", "2"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rank", type=int, default=3)
    parser.add_argument("--sparsity", type=int, default=5)
    parser.add_argument("--form", default="vector")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args(argv)
    make_folder(arguments.out)
    path = arguments.out / "cells.jsonl"
    cut_torn_line(path)
    wanted = [
        Cell(
            data=arguments.data,
            users=arguments.users if arguments.data == _DIGITS else 0,
            method=method,
            epsilon=None if epsilon == "none" or method == "alone" else float(epsilon),
            seed=seed,
            rounds=arguments.rounds,
            rank=arguments.rank,
            sparsity=arguments.sparsity,
            form=arguments.form,
        )
        for seed in arguments.seeds
        for epsilon in arguments.epsilon
        for method in arguments.methods
        if method != "alone" or epsilon == arguments.epsilon[0]
    ]
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    missing = [cell for cell in wanted if cell.identity not in [c["identity"] for c in done]]
    for seed in {cell.seed for cell in missing if cell.data == _DIGITS}:
        digits(arguments.users, seed, arguments.out)
    with ProcessPoolExecutor(arguments.jobs) as pool:
        futures = [pool.submit(run, cell, arguments.out) for cell in missing]
        for future in track(as_completed(futures), total=len(futures), console=Console(stderr=True)):
            for line in future.result():
                append_line(path, json.dumps(line).encode())
                done.append(line)
    identities = [cell.identity for cell in wanted]
    for shown in table([cell for cell in done if cell["identity"] in identities]):
        Console().print(shown)
    return 0


if __name__ == "__main__":
    sys.exit(main())
