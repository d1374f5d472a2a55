"""Random effects of entities over their own features: a large model that is sparse, with a small dense one for each.

An entity (a user, an item, a member of a group) has coefficients for the features it was ever seen with, by ascending
id. New examples may bring others: the features of an update are the union of both, a new one has mean 0 and the
prior's precision, and one that the examples lack is kept (the rules of photon-ml and gdmix). Several entity types, and
the fixed effect under them, act on each other by offsets: `score` of all others is the offset of the one that is
updated.

How wide an entity is padded depends on its own number of features and on nothing else (`padded_length`), so that its
numbers are the same bits whoever shares the batch.
"""

from typing import Any

from array_api_compat import array_namespace

from client.incremental import Posterior

Array = Any
NO_FEATURE = -1


def union(features: Array, others: Array, width: int) -> Array:
    """`n x width` int64, the features of both, ascending, then `NO_FEATURE`.

    Args:
        features: `n x p` int64, in any order, `NO_FEATURE` where unused.
        others: `n x q` int64; repeated ones count once.
        width: At least as many as any entity has; for isolation, the same for all who are batched together.

    Raises:
        ValueError: If an entity has more than `width` features.
    """
    xp = array_namespace(features)
    largest = xp.iinfo(xp.int64).max
    both = xp.concat([features, others], axis=1)
    both = xp.sort(xp.where(both == NO_FEATURE, largest, both), axis=-1)
    n = both.shape[0]
    again = xp.concat([xp.zeros((n, 1), dtype=xp.bool, device=both.device), both[:, 1:] == both[:, :-1]], axis=1)
    both = xp.sort(xp.where(again, largest, both), axis=-1)
    if both.shape[1] > width and bool(xp.any(both[:, width:] != largest)):
        raise ValueError(f"Expected at most width={width} features of an entity, got more. Choose width by counts.")
    if both.shape[1] < width:
        padding = xp.full((n, width - both.shape[1]), largest, dtype=xp.int64, device=both.device)
        both = xp.concat([both, padding], axis=1)
    both = both[:, :width]
    return xp.where(both == largest, NO_FEATURE, both)


def counts(features: Array) -> Array:
    """`n` int64, how many features each entity has."""
    xp = array_namespace(features)
    return xp.sum(xp.astype(features != NO_FEATURE, xp.int64), axis=-1)


def columns_of(features: Array, wanted: Array) -> Array:
    """`n x q` int64, where each of `wanted` (`n x q`) stands among `features` (`n x p`); -1 where it does not."""
    xp = array_namespace(features)
    same = (wanted[:, :, None] == features[:, None, :]) & (wanted != NO_FEATURE)[:, :, None]
    return xp.where(xp.any(same, axis=-1), xp.argmax(xp.astype(same, xp.int64), axis=-1), -1)


def realigned(prior: Posterior, features: Array, wanted: Array, *, prior_precision: Array | float) -> Posterior:
    """The prior over other coordinates: a feature that is new has mean 0 and `prior_precision`.

    Args:
        prior: Over `features`.
        features: `n x p` int64, `NO_FEATURE` where unused.
        wanted: `n x q` int64, all of an entity's `features` and possibly more, as from `union`.
        prior_precision: Of what is new and of unused coordinates, positive: a number, `q` or `n x q`.
    """
    xp = array_namespace(prior.mean)
    n, q = wanted.shape
    p = features.shape[1]
    level = prior_precision + xp.zeros((n, q), dtype=prior.mean.dtype, device=prior.mean.device)
    eye = xp.eye(q, dtype=level.dtype, device=level.device)[None, :, :]
    if not p:
        return Posterior(mean=xp.zeros_like(level), precision=level if prior.is_diagonal else level[:, :, None] * eye)
    place = columns_of(features, wanted)
    known = place >= 0
    at = xp.where(known, place, 0)
    mean = xp.where(known, xp.take_along_axis(prior.mean, at, axis=1), 0.0)
    if prior.is_diagonal:
        return Posterior(mean=mean, precision=xp.where(known, xp.take_along_axis(prior.precision, at, axis=1), level))
    flat = xp.reshape(prior.precision, (n, p * p))
    entry = xp.reshape(at[:, :, None] * p + at[:, None, :], (n, q * q))
    old = xp.reshape(xp.take_along_axis(flat, entry, axis=1), (n, q, q))
    both = known[:, :, None] & known[:, None, :]
    return Posterior(mean=mean, precision=xp.where(both, old, level[:, :, None] * eye))
