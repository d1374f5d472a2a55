"""The data that algorithms are compared on, each split into a training and a held-out part by its seed.

`ml-1m-part` and `ml-100k`: ratings with the public features of their movies, as `umbel simulate` reads them; the seed
is that of the split, by rule.

`items-100`: ratings of `ml-1m-part` without features, x = [one-hot of the movie, 1], on the 100 most rated movies.
Which these are may not come from the exact counts of the users who are protected: a tenth of the users (by a hash of
their name) is taken to be public, says which movies are rated most, and is left out. The rest takes part where they
have a rating of any of the 100, in the training or the held-out part.

`synthetic`: drawn from the model itself, with m training and 10 held-out examples of each user; the seed is the
generator's. One factor at a time is changed from the base.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from client import sources
from common.config import load_config
from common.data import DataSchema, ItemFeatures, Population, select, take_examples, text_hashes
from common.encoding import read_catalogue
from common.families import FAMILIES
from common.model import IntArray
from common.synthetic import draw_population
from umbel.baselines import Users, users_of, validation_split

BASE = {"n": 2000, "m": 30, "d": 40, "r": 4, "k": 3, "noise": 0.5}
"""Users, training examples of each, features, rank, nonzeros of b and standard deviation of the noise."""
SWEEPS: dict[str, tuple[float, ...]] = {
    "n": (500, 2000, 8000),
    "m": (8, 30, 100),
    "d": (20, 40, 80),
    "r": (2, 4, 8),
    "k": (0, 3, 6),
    "noise": (0.25, 0.5, 1.0),
}
RATINGS = ("ml-1m-part", "ml-100k")
ITEMS = "items-100"
SYNTHETIC = "synthetic"
SQUARED = FAMILIES["squared"]
_HELD_OUT = 10
_ITEMS = 100
_PUBLIC_SHARE = 10


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """What to read or draw.

    Attributes:
        name: `data` of its cells.
        family: "ratings", "items" or "synthetic".
        delta: Of the guarantee.
        settings: Of a synthetic population, as in `BASE`; empty for files.
        shared: Folder with the files.
    """

    name: str
    family: str
    delta: float
    settings: Mapping[str, float] = field(default_factory=dict)
    shared: Path | None = None

    @property
    def key(self) -> str:
        """Unique among data sets; fit for a file name."""
        return "-".join([self.name, *(f"{name}{value:g}" for name, value in self.settings.items())])

    @property
    def is_base(self) -> bool:
        """Whether it is compared in full, not only as one end of a sweep."""
        return self.family != "synthetic" or dict(self.settings) == BASE

    def files_missing(self) -> list[str]:
        """Folders that there are not."""
        needed = {ITEMS: RATINGS[:1]}.get(self.name, () if self.family == "synthetic" else (self.name,))
        return [name for name in needed if self.shared is None or not (self.shared / name).is_dir()]


def synthetic(**settings: float) -> DataSet:
    """The base population with some settings changed."""
    unknown = settings.keys() - BASE.keys()
    if unknown:
        raise ValueError(f"Expected settings among {', '.join(BASE)}, got {', '.join(unknown)}.")
    return DataSet(name=SYNTHETIC, family="synthetic", delta=1e-5, settings=BASE | settings)


def ratings(name: str, shared: Path) -> DataSet:
    """One of `RATINGS`, or `ITEMS`."""
    return DataSet(name=name, family="items" if name == ITEMS else "ratings", delta=1e-6, shared=shared)


def sweeps() -> list[DataSet]:
    """Synthetic data that differ from the base in one factor."""
    changed = ((name, value) for name, values in SWEEPS.items() for value in values if value != BASE[name])
    return [synthetic(**{name: value}) for name, value in changed]


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """A data set split by one seed.

    Attributes:
        train: What users train on.
        test: What they are judged by; the same users in the same order.
        schema: What is public.
    """

    train: Population
    test: Population
    schema: DataSchema

    def users(self) -> Users:
        """The training part, for the rivals."""
        return users_of(self.train, self.schema, SQUARED, shards=1)

    def tuning(self, seed: int) -> "Parts":
        """The training part split in turn, to choose settings on."""
        fit, validation = validation_split(self.train, seed)
        return Parts(train=fit, test=validation, schema=self.schema)


@lru_cache(maxsize=2)
def parts_of(name: str, settings: tuple[tuple[str, float], ...], shared: Path | None, seed: int) -> Parts:
    """Read or draw, and split; of `DataSet`'s fields and the seed."""
    if name == SYNTHETIC:
        return _drawn(dict(settings), seed)
    if shared is None:
        raise ValueError(f"Expected the folder with {name}, got none.")
    return _on_items(shared, seed) if name == ITEMS else _read(shared / name, seed)


def _drawn(settings: dict[str, Any], seed: int) -> Parts:
    m = settings["m"]
    population, schema, _ = draw_population(
        users=settings["n"],
        examples=m + _HELD_OUT,
        dimension=settings["d"],
        rank=settings["r"],
        sparsity=settings["k"],
        noise=settings["noise"],
        beta_scale=1.0,
        seed=seed,
    )
    held_out = np.tile(np.arange(m + _HELD_OUT) >= m, population.num_users)
    return Parts(train=take_examples(population, ~held_out), test=take_examples(population, held_out), schema=schema)


def _read(folder: Path, seed: int) -> Parts:
    config = load_config(None, {"data.source": str(folder), "data.split_seed": seed})
    source = sources.read(config.data, "squared")
    return Parts(train=source.train, test=source.test, schema=source.schema)


def _on_items(shared: Path, seed: int) -> Parts:
    """`ml-1m-part` on the movies that the public tenth of its users rates most, with one-hot features."""
    source = _read(shared / "ml-1m-part", seed)
    is_public = text_hashes(source.train.users, kind="public users") % np.uint64(_PUBLIC_SHARE) == 0
    public, private = np.flatnonzero(is_public), np.flatnonzero(~is_public)
    listed = most_rated([select(part, public) for part in (source.train, source.test)])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "catalogue.txt"
        path.write_text("\n".join(str(movie) for movie in listed))
        catalogue = read_catalogue(path)
    row_of = np.full(listed.max() + 1, -1)
    row_of[listed] = [catalogue.index[str(movie)] for movie in listed]
    schema = DataSchema(
        feature_names=catalogue.names,
        feature_second_moment=catalogue.second_moment,
        target_range=source.schema.target_range,
        target_offset=source.schema.target_offset,
    )
    train, test = (_with_items(select(part, private), row_of, catalogue.table) for part in (source.train, source.test))
    somebody = np.flatnonzero(train.counts + test.counts)
    return Parts(train=select(train, somebody), test=select(test, somebody), schema=schema)


def most_rated(parts: Sequence[Population]) -> IntArray:
    """Rows, in the public list of movies, of the 100 with the most ratings; ties go to the earlier."""
    counts = np.bincount(np.concatenate([_items_of(part) for part in parts]))
    return np.argsort(-counts, kind="stable")[:_ITEMS]


def _items_of(population: Population) -> IntArray:
    features = population.features
    if not isinstance(features, ItemFeatures):
        raise TypeError(f"Expected ratings of items, got {type(features).__name__}.")
    return features.item.astype(np.int64)


def _with_items(population: Population, row_of: Any, table: Any) -> Population:
    """The examples whose movie is in the catalogue, with the catalogue's features."""
    item = _items_of(population)
    row = np.where(item < len(row_of), row_of[np.minimum(item, len(row_of) - 1)], -1).astype(np.int32)
    listed = row >= 0
    kept = take_examples(population, listed)
    return Population(
        users=kept.users,
        offsets=kept.offsets,
        y=kept.y,
        weight=kept.weight,
        features=ItemFeatures(row[listed], table),
        key=kept.key,
    )
