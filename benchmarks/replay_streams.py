"""Time-ordered streams of events for the replay: MovieLens 100K by timestamp, and a population that drifts.

A stream has a fixed effect and random effects of one or more entity types (Zhang et al., KDD 2016): an event's score is
the sum of x'theta over the types, each with features and entities of its own.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.families import expit
from common.model import Array, IntArray
from common.movielens import read_movies

_AGES = (0, 18, 25, 35, 45, 50, 56)
"""Lower ends of the age groups of MovieLens 1M."""
_LIKED = 4
_MIDDLE = 3.5


@dataclass(frozen=True, kw_only=True, eq=False)
class Kind:
    """An entity type.

    Attributes:
        name: What its entities are.
        entity: `N` int64, each event's entity.
        features: `F x p`, rows of features.
        row: `N` int64, the row of `features` that an event has.
        size: How many entities there are.
    """

    name: str
    entity: IntArray
    features: Array
    row: IntArray
    size: int

    def X(self, events: IntArray) -> Array:
        """`len(events) x p`."""
        return np.asarray(self.features[self.row[events]])


@dataclass(frozen=True, kw_only=True, eq=False)
class Stream:
    """Events in order of time.

    Attributes:
        name: For people.
        about: What it is, in a sentence.
        family: `logistic` or `squared`.
        y: `N` targets.
        kinds: Entity types; the first is the fixed effect, with one entity.
        ends: End of the past, then of each batch that is replayed.
    """

    name: str
    about: str
    family: str
    y: Array
    kinds: tuple[Kind, ...]
    ends: tuple[int, ...]

    def batch(self, number: int) -> IntArray:
        """Events of batch `number`; 0 is the past."""
        return np.arange(self.ends[number - 1] if number else 0, self.ends[number])

    @property
    def replayed_y(self) -> Array:
        """Targets of all batches after the past."""
        return self.y[self.ends[0] : self.ends[-1]]

    def past(self, share: float, *, batches: int) -> "Stream":
        """A replay inside the past, to choose settings on: its last `share` in so many batches, the rest its past."""
        end = self.ends[0]
        ends = tuple(int(e) for e in np.linspace((1 - share) * end, end, batches + 1).round())
        return replace(self, ends=ends)


def movielens(folder: Path, *, family: str = "logistic", batch: int = 2500, past: float = 0.5) -> Stream:
    """MovieLens 100K in order of its timestamps; like = rating of at least 4, or the rating itself.

    A user's effect is over the movie's features, a movie's over the user's sex and age group, the fixed effect over
    both; all have an intercept.
    """
    rated = np.loadtxt(folder / "u.data", dtype=np.int64)
    rated = rated[np.lexsort((rated[:, 1], rated[:, 0], rated[:, 3]))]
    movies = read_movies(folder / "u.item")
    movie = np.array([movies.index[str(item)] for item in rated[:, 1]])
    people = _people(folder / "u.user")
    person = rated[:, 0] - 1
    n = len(rated)
    pairs = np.unique(np.stack([movie, person], axis=1), axis=0, return_inverse=True)
    both = np.concatenate([movies.table[pairs[0][:, 0]], people[pairs[0][:, 1], 1:]], axis=1)
    kinds = (
        Kind(name="all", entity=np.zeros(n, np.int64), features=both, row=pairs[1].ravel(), size=1),
        Kind(name="user", entity=person, features=movies.table, row=movie, size=len(people)),
        Kind(name="movie", entity=movie, features=people, row=person, size=len(movies.table)),
    )
    liked = family == "logistic"
    y = (rated[:, 2] >= _LIKED) * 1.0 if liked else rated[:, 2] - _MIDDLE
    first = int(past * n)
    return Stream(
        name=f"MovieLens 100K, {'likes' if liked else 'ratings'}",
        about=f"{n:,} ratings of {len(people)} users and {len(movies.table):,} movies in order of time; "
        + ("a like is a rating of at least 4." if liked else "the target is the rating."),
        family=family,
        y=y,
        kinds=kinds,
        ends=(*range(first, n, batch), n),
    )


def drifting(
    drift: float, *, entities: int = 400, features: int = 10, examples: int = 15, past: int = 10, batches: int = 20
) -> Stream:
    """Entities whose coefficients take a random step of length about `drift` (in standard deviations) a batch.

    In each batch every entity has `examples` events; x ~ N(0, I) with an intercept, y ~ Bernoulli(expit(x'theta)),
    theta around a common mean with standard deviation .7, to which it returns so that its size stays the same.
    """
    rng = np.random.default_rng(20)
    steps, per = past + batches, entities * examples
    n = steps * per
    X = rng.standard_normal((n, features))
    X[:, 0] = 1.0
    entity = np.tile(np.repeat(np.arange(entities), examples), steps)
    common = 0.5 * rng.standard_normal(features)
    own, kept = rng.standard_normal((entities, features)), np.sqrt(1 - drift**2)
    y = np.empty(n)
    for step in range(steps):
        events = slice(step * per, (step + 1) * per)
        theta = common + 0.7 * own
        y[events] = rng.random(per) < expit((X[events] * theta[entity[events]]).sum(axis=1))
        own = kept * own + drift * rng.standard_normal(own.shape)
    row = np.arange(n)
    kinds = (
        Kind(name="all", entity=np.zeros(n, np.int64), features=X, row=row, size=1),
        Kind(name="entity", entity=entity, features=X, row=row, size=entities),
    )
    return Stream(
        name=f"drift {drift:g}" if drift else "no drift",
        about=f"{entities} entities with {features} features and {examples} events in each of {steps} batches; "
        f"coefficients take steps of {drift:g} standard deviations a batch.",
        family="logistic",
        y=y,
        kinds=kinds,
        ends=tuple((past + number) * per for number in range(batches + 1)),
    )


def _people(path: Path) -> Array:
    """`n x p`: intercept, sex, and age group one-hot."""
    lines = [line.split("|") for line in path.read_text("latin-1").splitlines()]
    if [int(line[0]) for line in lines] != list(range(1, len(lines) + 1)):
        raise ValueError(f"Expected users 1, 2, ... in {path}, got others.")
    ages = np.array([int(line[1]) for line in lines])
    group = np.searchsorted(_AGES, ages, side="right") - 1
    sex = np.array([[float(line[2] == "F")] for line in lines])
    return np.concatenate([np.ones((len(lines), 1)), sex, np.eye(len(_AGES))[group]], axis=1)
