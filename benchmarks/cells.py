"""Cells: one method on one data set at one epsilon with one seed, computed once and kept as lines of a file.

The cells that differ in their seed alone share what was chosen on the validation part of the first seed's training
examples. A file of cells can be appended to by several processes: a line is one write.
"""

import fcntl
import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rivals import RIVALS
from benchmarks.rivals.rival import Budget, Rival, Setting
from benchmarks.utility_data import SQUARED, DataSet, Parts, parts_of
from common.files import append_line, cut_torn_line, make_folder
from umbel.evaluate import HeldOut, held_out_error, paired_difference

OURS = "umbel"
VERSION = 1
_TUNING_SEED = 0

Cell = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Cells that share their settings.

    Attributes:
        data: On what.
        method: Key of the rival.
        epsilon: None without privacy.
        seeds: One cell each.
        most_settings: At most so many settings are tried, and so many of what each user does alone.
    """

    data: DataSet
    method: str
    epsilon: float | None
    seeds: tuple[int, ...]
    most_settings: int

    @property
    def rival(self) -> Rival:
        """What is run."""
        return RIVALS[self.method]

    def settings(self) -> list[tuple[Setting, Sequence[Setting]]]:
        """What is tried: settings to train, and for each what users may do alone."""
        dimension = int(self.data.settings["d"]) if self.data.settings else self._parts(_TUNING_SEED).schema.dimension
        distinct = list({json.dumps(s, sort_keys=True): s for s in self.rival.settings(dimension)}.values())
        return [(setting, self.rival.local_settings) for setting in distinct[: self.most_settings]]

    def _parts(self, seed: int) -> Parts:
        return parts_of(self.data.name, tuple(self.data.settings.items()), self.data.shared, seed)

    def identity(self, seed: int) -> str:
        """What makes a cell the cell it is."""
        return identity_of(self.data.name, self.data.settings, self.method, self.epsilon, seed)

    def run(self, folder: Path, done: Iterable[Cell]) -> int:
        """Compute and keep the cells that are not done; returns how many."""
        known = {identity_of_cell(cell): cell for cell in done}
        mine = [known[self.identity(seed)] for seed in self.seeds if self.identity(seed) in known]
        missing = [seed for seed in self.seeds if self.identity(seed) not in known]
        if not missing:
            return 0
        chosen = _choice_in(mine[0]) if mine else self.choose()
        for seed in missing:
            keep(folder, self.cell(seed, chosen, folder))
        return len(missing)

    def choose(self) -> "Choice":
        """The settings with the least error on the validation part, under the same budget with fresh noise."""
        tried = self.settings()
        if sum(len(local) for _, local in tried) == 1:
            return Choice(setting=tried[0][0], local=tried[0][1][0], grid=[])
        tuning = self._parts(_TUNING_SEED).tuning(_TUNING_SEED)
        users, found = tuning.users(), []
        for setting, locals_ in tried:
            released = self.rival.train(users, self._budget, setting, np.random.default_rng(_TUNING_SEED))
            for local in locals_:
                theta = self.rival.personal(users, released, setting, local)
                found.append((_finite(_score(theta, tuning).error()), setting, local))
        _, setting, local = min(found, key=lambda entry: entry[0])
        grid = [[{**setting, **local}, None if math.isinf(error) else error] for error, setting, local in found]
        return Choice(setting=setting, local=local, grid=grid)

    def cell(self, seed: int, chosen: "Choice", folder: Path) -> Cell:
        """Train on the whole training part, judge on the held-out part."""
        started, parts = time.perf_counter(), self._parts(seed)
        users = parts.users()
        released = self.rival.train(users, self._budget, chosen.setting, np.random.default_rng(seed))
        held_out = _score(self.rival.personal(users, released, chosen.setting, chosen.local), parts)
        seconds = time.perf_counter() - started
        make_folder(folder / "losses")
        np.save(losses_of(folder, self.identity(seed)), np.stack([held_out.loss, held_out.count]))
        releases = self.rival.releases(chosen.setting) if self.rival.is_released else 0
        return {
            "suite": "utility",
            "version": VERSION,
            "data": self.data.name,
            "family": self.data.family,
            "settings": dict(self.data.settings),
            "method": self.method,
            "epsilon": self.epsilon,
            "delta": self.data.delta,
            "seed": seed,
            "metric": held_out.metric,
            "overall": _number(held_out.error()),
            "standard_error": _number(held_out.standard_error()),
            "by_examples": {name: _number(error) for name, error in held_out.by_examples().items()},
            "hyperparameters": {**chosen.setting, **chosen.local},
            "grid": chosen.grid,
            "noise_multiplier": self._budget.mechanism(releases).noise_multiplier if releases else "0",
            "rounds": releases,
            "seconds": round(seconds, 3),
            "personal_numbers": self.rival.personal_numbers(parts.schema.dimension, chosen.setting),
        }

    @property
    def _budget(self) -> Budget:
        return Budget(epsilon=self.epsilon, delta=self.data.delta)


@dataclass(frozen=True, kw_only=True, eq=False)
class Choice:
    """What was chosen, and the grid `[[settings, validation error], ...]` it was chosen from."""

    setting: Setting
    local: Setting
    grid: list[list[Any]]


def identity_of(data: str, settings: Any, method: str, epsilon: float | None, seed: int) -> str:
    """Equal for equal cells."""
    return json.dumps([data, dict(settings), method, epsilon, seed], sort_keys=True)


def identity_of_cell(cell: Cell) -> str:
    """Of a line."""
    return identity_of(cell["data"], cell["settings"], cell["method"], cell["epsilon"], cell["seed"])


def path_of(folder: Path) -> Path:
    """Where the cells are."""
    return folder / "cells.jsonl"


def read(folder: Path) -> list[Cell]:
    """All cells that were finished; what a crash left of a last line is cut off."""
    path = path_of(folder)
    cut_torn_line(path)
    return [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []


def keep(folder: Path, cell: Cell) -> None:
    """Append a cell and bring it to disk."""
    line = json.dumps(cell, sort_keys=True, allow_nan=False).encode()
    with (folder / "cells.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        append_line(path_of(folder), line)


def _choice_in(cell: Cell) -> Choice:
    """What another seed's cell was run with."""
    local = {name: cell["hyperparameters"][name] for name in cell["hyperparameters"]}
    return Choice(setting=local, local=local, grid=cell["grid"])


def _score(theta: Any, parts: Parts) -> HeldOut:
    return held_out_error(theta, parts.test, parts.train, SQUARED)


def losses_of(folder: Path, identity: str) -> Path:
    """Where a cell's sums of losses and numbers of held-out examples are, `2 x n`."""
    return folder / "losses" / f"{sha256(identity.encode()).hexdigest()[:24]}.npy"


def paired(cells: Sequence[Cell], folder: Path) -> list[Cell]:
    """The cells, each with its method's error minus umbel's on the same examples, where umbel has been run."""
    return [{**cell, "paired": None if cell["method"] == OURS else _difference(cell, folder)} for cell in cells]


def _difference(cell: Cell, folder: Path) -> dict[str, float | None] | None:
    ours = identity_of_cell({**cell, "method": OURS})
    paths = [losses_of(folder, identity) for identity in (identity_of_cell(cell), ours)]
    if not all(path.exists() for path in paths):
        return None
    theirs, mine = (
        HeldOut(metric=cell["metric"], loss=loss, count=count, train_count=np.zeros_like(count))
        for loss, count in map(np.load, paths)
    )
    return {name: _number(value) for name, value in paired_difference(theirs, mine).items()}


def _finite(error: float | None) -> float:
    return math.inf if error is None or not math.isfinite(error) else error


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value
