"""Updating the users of a node with new events, inside a transaction of its store."""

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np

from client.batches import Design
from client.grouping import groups
from client.kept_model import KeptModel
from client.personal_update import Personal, from_state, update_personal, with_slots
from client.refolding import refold
from client.store import BoolArray, StateChanges, StoredStates
from common.errors import UmbelError
from common.families import FAMILIES
from common.model import Array, IntArray, PersonalState

_CHUNK_BYTES = 2**23


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

    Raises:
        UmbelError: If the store has no model, or one of other columns.
    """
    models = {digest: (KeptModel.decode(record), sparsity) for digest, record, sparsity in changes.models()}
    if not models:
        raise UmbelError(
            "Expected a model on this device, got none yet. It comes with the end of a run: keep umbel node running."
        )
    newest = next(reversed(models))
    digests = [digest if digest in models else newest for digest in changes.model_digests(users)]
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
            found = update_personal(
                _personal(states, group.entity, kept),
                Design(X=X[at], y=y[at], weight=given, count=given.sum(axis=1)),
                kept.model,
                family=FAMILIES[kept.family],
                forgetting=1.0 if states.batch[group.entity[0]] == number else forgetting,
            )
            not_converged += int((~found.converged).sum())
            changes.save(
                [users[members[i]] for i in group.entity],
                found.personal.state(kept.model),
                digest,
                share=found.personal.share(kept.model),
                batch=number,
            )
    return not_converged


def refold_users(
    changes: StateChanges, users: Sequence[str], kept: KeptModel, digest: bytes, *, sparsity: int
) -> BoolArray:
    """Carry users whose posteriors hold events over to a new release, without those events.

    Args:
        changes: The transaction.
        users: Each once, enrolled.
        kept: The new release.
        digest: Of it, in the store.
        sparsity: Slots of b in the states of the new release.

    Returns:
        `n` bool, who was carried over. The others have no events in their posteriors, or come from a model of other
        columns or of more slots.
    """
    carried = np.zeros(len(users), np.bool_)
    before = changes.model_digests(users)
    for old, record, slots in changes.models():
        members = np.array([i for i, of_user in enumerate(before) if of_user == old], np.int64)
        model = KeptModel.decode(record)
        fits = (model.schema, model.family) == (kept.schema, kept.family) and (slots or 0) <= sparsity
        if old == digest or not members.size or not fits:
            continue
        states = changes.load([users[i] for i in members], (model.model.rank, slots or 0))
        for batch in np.unique(states.batch[states.found & (states.batch > 0)]).tolist():
            chosen = np.flatnonzero(states.found & (states.batch == batch))
            family = FAMILIES[kept.family]
            found = refold(_personal(states, chosen, model), model.model, kept.model, family=family)
            found = with_slots(found, kept.model, sparsity)
            finite = np.all(np.isfinite(found.posterior.precision), axis=(1, 2)) & np.all(
                np.isfinite(found.posterior.mean), axis=1
            )
            state, share = found.state(kept.model), found.share(kept.model)
            whole = {field.name: getattr(state, field.name)[finite] for field in fields(state)}
            places = members[chosen[finite]]
            changes.save([users[i] for i in places], PersonalState(**whole), digest, share=share[finite], batch=batch)
            carried[places] = True
    return carried


def _personal(states: StoredStates, chosen: IntArray, kept: KeptModel) -> Personal:
    some = StoredStates(**{field.name: getattr(states, field.name)[chosen] for field in fields(states)})
    state: PersonalState = some.with_model(kept.model)
    return from_state(state, kept.model, share=some.share)
