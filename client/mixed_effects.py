"""Updating and scoring events with a fixed effect and random effects of several entity types.

The types act on each other by offsets: what is updated sees the score of everything else as its offset, one type after
the other in the order in which the store names them (one pass of the block coordinate descent of GLMix, Zhang et al.,
KDD 2016, section 3.2, for each piece of events).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from client import entities
from client.entity_store import EntityChanges, EntitySettings, Kept
from client.grouping import Group, groups
from client.incremental import Examples, Posterior, fresh, predict, sample, update
from common.families import FAMILIES
from common.model import Array, IntArray
from common.tables import BoolArray

Load = Callable[[int, Sequence[bytes]], list[Kept]]
_CHUNK_BYTES = 2**23


@dataclass(frozen=True, kw_only=True, eq=False)
class Events:
    """Usable events, and whose they are.

    Attributes:
        X: `N x d`, the intercept first; 0 where an event lacks a feature.
        y: `N`.
        weight: `N`, positive.
        entity: For each type `N` int64, places in `tags`.
        tags: For each type, the entities' tags, each once.
    """

    X: Array
    y: Array
    weight: Array
    entity: tuple[IntArray, ...]
    tags: tuple[Sequence[bytes], ...]


@dataclass(frozen=True, kw_only=True)
class Updated:
    """What an update did.

    Attributes:
        entities: How many entities of each type it changed.
        not_converged: How many of them all are not at their optimum; those with numbers that are not finite are as
            they were.
    """

    entities: tuple[int, ...]
    not_converged: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """The linear predictors of events.

    Attributes:
        mean: `N`, all effects together.
        stddev: `N`, of that: the types' posteriors are independent, so their variances add.
        drawn: `N`, with each entity's coefficients drawn once from its posterior.
        known: `N` bool, whether anything is kept of one of the entities.
    """

    mean: Array
    stddev: Array
    drawn: Array
    known: BoolArray


def update_events(
    changes: EntityChanges,
    events: Events,
    *,
    settings: EntitySettings,
    fixed: Array,
    forgetting: float,
    number: int,
) -> Updated:
    """Update all entities of some events, inside a transaction of their store.

    Args:
        changes: The transaction.
        events: New ones only.
        settings: Of the store.
        fixed: `d`, the fixed effect.
        forgetting: Of what is known of an entity, once in each batch.
        number: Of the batch; an entity that has it already was discounted in an earlier piece.
    """
    kinds = [_Kind(changes.load(kind, tags), events, kind) for kind, tags in enumerate(events.tags)]
    base = (events.X * fixed).sum(axis=1)
    scores = [kind.score() for kind in kinds]
    not_converged = 0
    for i, kind in enumerate(kinds):
        offset = base + sum(score for j, score in enumerate(scores) if j != i)
        for group, features, prior in kind.batches(settings, number):
            found = update(
                prior,
                _examples(events, group, features, offset),
                family=FAMILIES[settings.family],
                forgetting=1.0 if kind.batch[group.entity[0]] == number else forgetting,
                prior_precision=np.where(features == 0, 0.0, settings.prior_precision),  # the intercept is left alone
                curvature=settings.curvature,
                noise_variance=settings.noise_variance,
            )
            not_converged += int((~found.converged).sum())
            tags = [events.tags[i][entity] for entity in group.entity.tolist()]
            changes.save(i, tags, features, found.posterior, number)
            kind.means[group.entity[:, None], features] = found.posterior.mean
        scores[i] = kind.score()
    return Updated(entities=tuple(len(tags) for tags in events.tags), not_converged=not_converged)


def score_events(
    load: Load,
    events: Events,
    *,
    settings: EntitySettings,
    fixed: Array,
    spread: bool = False,
    seed: bytes | None = None,
) -> Scores:
    """The linear predictors of events; an entity of which nothing is kept counts as its prior.

    Args:
        load: Reads the entities of a type, as `EntityStore.load`.
        events: Their `y` and `weight` do not matter.
        settings: Of the store.
        fixed: `d`, the fixed effect.
        spread: Whether to compute `stddev`; otherwise it is 0.
        seed: Of the draws; without one `drawn` is `mean`. An entity's draw depends on it and on the entity only.
    """
    kinds = [_Kind(load(kind, tags), events, kind) for kind, tags in enumerate(events.tags)]
    mean: Array = (events.X * fixed).sum(axis=1) + sum(kind.score() for kind in kinds)
    variance, shift, known = np.zeros_like(mean), np.zeros_like(mean), np.zeros(mean.size, np.bool_)
    for i, kind in enumerate(kinds):
        known |= kind.is_kept[kind.entity]
        for group, features, posterior in kind.batches(settings, 0) if spread or seed is not None else ():
            X = _examples(events, group, features, mean).X
            rows = group.row[group.given]
            if spread:
                variance[rows] += (predict(posterior, X).stddev ** 2)[group.given]
            if seed is not None:
                drawn = sample(posterior, _normals(seed, i, [events.tags[i][e] for e in group.entity], features))
                moved = Posterior(mean=drawn - posterior.mean, precision=posterior.precision)
                shift[rows] += (X * moved.mean[:, None, :]).sum(axis=2)[group.given]
    return Scores(mean=mean, stddev=np.sqrt(variance), drawn=mean + shift, known=known)


class _Kind:
    """The entities of one type that some events name."""

    def __init__(self, kept: list[Kept], events: Events, kind: int) -> None:
        self.entity, self._X = events.entity[kind], events.X
        n, d = len(events.tags[kind]), events.X.shape[1]
        self._kept = kept
        self._source, self._row = np.full(n, -1), np.zeros(n, np.int64)
        self.means, self.batch = np.zeros((n, d)), np.zeros(n, np.int64)
        self._has = np.zeros((n, d), np.bool_)
        for number, some in enumerate(kept):
            at = some.place[:, None]
            self._source[some.place], self._row[some.place] = number, np.arange(some.place.size)
            self.means[at, some.features], self._has[at, some.features] = some.posterior.mean, True
            self.batch[some.place] = some.batch
        row, column = np.nonzero(events.X)
        self._has[self.entity[row], column] = True
        self.is_kept = self._source >= 0

    def score(self) -> Array:
        """`N`, x'mean of each event's entity."""
        return np.asarray((self._X * self.means[self.entity]).sum(axis=1))

    def batches(self, settings: EntitySettings, number: int) -> Iterator[tuple[Group, IntArray, Posterior]]:
        """Entities of equal shape: their events, all their features by now, and what was known of these."""
        width = self._has.sum(axis=1)
        shape = np.stack([self._source, width, self.batch == number], axis=1)
        _, alike = np.unique(shape, axis=0, return_inverse=True)
        for group in groups(self.entity, alike.ravel(), width, chunk_bytes=_CHUNK_BYTES):
            n, q = group.entity.size, int(width[group.entity[0]])
            features = np.nonzero(self._has[group.entity])[1].reshape(n, q)
            yield group, features, self._prior(group.entity, features, settings)

    def _prior(self, entity: IntArray, features: IntArray, settings: EntitySettings) -> Posterior:
        n, q = features.shape
        source = int(self._source[entity[0]])
        if source < 0:
            return fresh(n, q, settings.prior_precision, like=self.means, curvature=settings.curvature)
        kept, rows = self._kept[source], self._row[entity]
        prior = Posterior(mean=kept.posterior.mean[rows], precision=kept.posterior.precision[rows])
        if kept.features.shape[1] == q:
            return prior
        return entities.realigned(prior, kept.features[rows], features, prior_precision=settings.prior_precision)


def _examples(events: Events, group: Group, features: IntArray, offset: Array) -> Examples:
    return Examples(
        X=events.X[group.row[:, :, None], features[:, None, :]],
        y=events.y[group.row],
        weight=np.where(group.given, events.weight[group.row], 0.0),
        offset=offset[group.row],
    )


def _normals(seed: bytes, kind: int, tags: Sequence[bytes], features: IntArray) -> Array:
    """`n x p` draws that depend on the seed and on whose they are."""

    def generator(tag: bytes) -> np.random.Generator:
        key = blake2b(tag, digest_size=16, key=seed, person=kind.to_bytes(8, "little")).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))

    return np.stack([generator(tag).standard_normal(features.shape[1]) for tag in tags])
