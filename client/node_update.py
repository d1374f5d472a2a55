"""Updating the users of a node with new events, inside a transaction of its store."""

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np

from client.batches import Design
from client.grouping import groups
from client.kept_gram import from_records, to_records
from client.kept_model import KeptModel
from client.personal_update import Personal, from_state, update_personal, with_slots
from client.refolding import gram_after, refold, refold_gram
from client.store import BoolArray, StateChanges
from client.stored_states import StoredStates
from common.errors import UmbelError
from common.families import FAMILIES
from common.model import Array, IntArray, PersonalState

_CHUNK_BYTES = 2**23
_FLOAT_BYTES = 8


def update_users(
    changes: StateChanges,
    users: Sequence[str],
    *,
    user: IntArray,
    X: Array,
    y: Array,
    weight: Array,
    check: Callable[[KeptModel], KeptModel],
    forgetting: float,
    number: int,
    keep_gram: bool = False,
) -> int:
    """Update users with their new events; returns for how many the result is not their optimum.

    A user's state goes on under the model that it was computed with; who has none starts from the newest one's prior.

    Args:
        changes: The transaction.
        users: Each once, enrolled and not forgotten.
        user: `N` int64, whose each event is, as a place in `users`.
        X: `N x d`.
        y: `N`, less the target's offset.
        weight: `N`, positive.
        check: Raises where a model is of other columns.
        forgetting: Of what is known of a user, once in each batch.
        number: Of the batch; a user who has it already was discounted in an earlier piece.
        keep_gram: Add the events to the moments that are kept of a user, who has them from the first example or not
            at all. Without it they are dropped: they would lack these events.

    Raises:
        UmbelError: If the store has no model, or one of other columns.
    """
    models = {digest: (KeptModel.decode(record), sparsity) for digest, record, sparsity in changes.models()}
    if not models:
        raise UmbelError(
            "Expected a model on this device, got none yet. It comes with the end of a run: keep umbel node running."
        )
    newest = next(reversed(models))
    before = changes.model_digests(users)
    digests = [digest if digest in models else newest for digest in before]
    not_converged = 0
    for digest in dict.fromkeys(digests):
        kept, sparsity = models[digest]
        check(kept)
        members = np.array([i for i, of_user in enumerate(digests) if of_user == digest])
        states = changes.load([users[i] for i in members], (kept.model.rank, sparsity or 0))
        rows = np.flatnonzero(np.isin(user, members))
        local = np.searchsorted(members, user[rows])
        width = np.full(members.size, kept.model.dimension + (kept.model.rank + (sparsity or 0)))
        for group in groups(local, np.astype(states.batch == number, np.int64), width, chunk_bytes=_CHUNK_BYTES):
            at = rows[group.row]
            given = np.where(group.given, weight[at], 0.0)
            design, family = Design(X=X[at], y=y[at], weight=given, count=given.sum(axis=1)), FAMILIES[kept.family]
            discount = 1.0 if states.batch[group.entity[0]] == number else forgetting
            past = _personal(states, group.entity, kept)
            found = update_personal(past, design, kept.model, family=family, forgetting=discount)
            not_converged += int((~found.converged).sum())
            names, state, grams = [users[members[i]] for i in group.entity], found.personal.state(kept.model), None
            if keep_gram:
                known, gram = from_records(changes.grams(names), kept.model.dimension)
                new = np.array([before[members[i]] is None for i in group.entity])
                gram = gram_after(gram, design, state.theta, family=family, forgetting=discount)
                grams = _only(to_records(gram), known | new)
            changes.save(names, state, digest, share=found.personal.share(kept.model), batch=number, grams=grams)
    return not_converged


def refold_users(
    changes: StateChanges,
    users: Sequence[str],
    kept: KeptModel,
    digest: bytes,
    *,
    sparsity: int,
    keep_gram: bool = False,
) -> BoolArray:
    """Carry users whose posteriors hold events over to a new release, without those events.

    Args:
        changes: The transaction.
        users: Each once, enrolled.
        kept: The new release.
        digest: Of it, in the store.
        sparsity: Slots of b in the states of the new release.
        keep_gram: Make new posteriors of the moments where they are kept: those of all examples and events.

    Returns:
        `n` bool, who was carried over. The others have no events in their posteriors, or come from a model of other
        columns or, without moments, of more slots.
    """
    carried = np.zeros(len(users), np.bool_)
    before = changes.model_digests(users)
    for old, record, slots in changes.models():
        members = np.array([i for i, of_user in enumerate(before) if of_user == old], np.int64)
        model = KeptModel.decode(record)
        if not members.size or (model.schema, model.family) != (kept.schema, kept.family):
            continue
        states = changes.load([users[i] for i in members], (model.model.rank, slots or 0))
        if old == digest:  # the release came again, after events
            carried[members[states.found & (states.batch > 0)]] = True
            continue
        for batch in np.unique(states.batch[states.found & (states.batch > 0)]).tolist():
            chosen = np.flatnonzero(states.found & (states.batch == batch))
            if keep_gram:
                exact = _with_grams(
                    changes, [users[i] for i in members[chosen]], kept, digest, sparsity=sparsity, batch=batch
                )
                carried[members[chosen[exact]]] = True
                chosen = chosen[~exact]
            if (slots or 0) > sparsity or not chosen.size:
                continue
            family = FAMILIES[kept.family]
            found = refold(_personal(states, chosen, model), model.model, kept.model, family=family)
            found = with_slots(found, kept.model, sparsity)
            saved = _save_finite(changes, [users[i] for i in members[chosen]], found, kept, digest, batch=batch)
            carried[members[chosen[saved]]] = True
    return carried


def _with_grams(
    changes: StateChanges, users: Sequence[str], kept: KeptModel, digest: bytes, *, sparsity: int, batch: int
) -> BoolArray:
    """New posteriors for those whose moments are kept, a chunk at a time; `n` bool, who has one."""
    done = np.zeros(len(users), np.bool_)
    size = max(1, _CHUNK_BYTES // (_FLOAT_BYTES * kept.model.dimension**2))
    for start in range(0, len(users), size):
        some = users[start : start + size]
        grams = changes.grams(some)
        known = [i for i, gram in enumerate(grams) if gram is not None]
        if known:
            whole = [grams[i] for i in known]
            found = refold_gram(from_records(whole, kept.model.dimension)[1], kept.model, sparsity=sparsity)
            names = [some[i] for i in known]
            done[start + np.array(known)] = _save_finite(changes, names, found, kept, digest, batch=batch, grams=whole)
    return done


def _save_finite(
    changes: StateChanges,
    users: Sequence[str],
    found: Personal,
    kept: KeptModel,
    digest: bytes,
    *,
    batch: int,
    grams: Sequence[bytes | None] | None = None,
) -> BoolArray:
    """Save posteriors whose numbers are finite; `n` bool, whose are."""
    precision, mean = found.posterior.precision, found.posterior.mean
    saved: BoolArray = np.all(np.isfinite(precision), axis=(1, 2)) & np.all(np.isfinite(mean), axis=1)
    state, share = found.state(kept.model), found.share(kept.model)
    whole = PersonalState(**{field.name: getattr(state, field.name)[saved] for field in fields(state)})
    names = [user for user, chosen in zip(users, saved, strict=True) if chosen]
    theirs = None if grams is None else [gram for gram, chosen in zip(grams, saved, strict=True) if chosen]
    changes.save(names, whole, digest, share=share[saved], batch=batch, grams=theirs)
    return saved


def _only(records: Sequence[bytes | None], wanted: BoolArray) -> list[bytes | None]:
    return [record if chosen else None for record, chosen in zip(records, wanted, strict=True)]


def _personal(states: StoredStates, chosen: IntArray, kept: KeptModel) -> Personal:
    some = StoredStates(**{field.name: getattr(states, field.name)[chosen] for field in fields(states)})
    state: PersonalState = some.with_model(kept.model)
    return from_state(state, kept.model, share=some.share)
