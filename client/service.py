"""One node at work: from a signed broadcast to the bytes of a reply, in the order that keeps the promise.

Guard, filter, computation, charge on disk, and only then the reply. Everything a user's data can influence is that
user's integers; everything else is a refusal with a public code.
"""

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from client.batches import Batch, Chunk
from client.coins import Coins, seeded
from client.guard import Accepted, check
from client.kept_gram import check_keep_gram, moments_of, to_records
from client.kept_model import KeptModel
from client.node_update import refold_users
from client.residents import Residents
from client.settings import NodeSettings
from client.shard import Shard, total_contribution
from client.sources import node_data
from client.store import DeviceStore
from client.store_file import FULL, MEMORY
from client.transient import TransientStore
from client.work import contribution_to, personal_state, shard_for
from common.errors import Refused
from common.families import FAMILIES
from common.model import IntArray, PersonalState, SharedModel
from common.records import PROTOCOL_VERSION, Contribution, encode
from common.sealing import enclose, introduce
from common.task import Task
from privacy.keys import load_key
from privacy.layout import Layout, layout_of_event
from privacy.lines import SEEDED_NOISE
from privacy.participation import admit, cost_units, is_noiseless, is_unlimited, limit_units
from privacy.sampling import probability_of

if TYPE_CHECKING:
    from client.node_networks import NodeNetworks


class NodeService:
    """A node's users, store and policy for as long as the process lives."""

    def __init__(self, settings: NodeSettings, index: int, num_nodes: int) -> None:
        """Read the data and open the store.

        Args:
            settings: The node's own configuration.
            index: Flower's partition number; 0 where a node's source holds its own users only.
            num_nodes: Into how many nodes the source is split; 1 likewise.
        """
        self._settings = settings
        self._name = settings.name.format(partition=index)
        path = settings.store.format(partition=index)
        self._store = TransientStore(()) if path == MEMORY else DeviceStore.open(path, ())
        read = partial(node_data, settings.data, settings.family, index, num_nodes)
        try:
            self._residents = Residents(settings, self._store, read, shared=num_nodes > 1)
            check_keep_gram(settings.keep_gram, self._residents.schema.dimension)
        except BaseException:
            self._store.close()
            raise
        self._schema = self._residents.schema
        self._networks = None if settings.network is None else self._with_networks(settings.network)
        self._take_up()
        self._contributing = threading.Lock()
        self._sign = None if settings.signing_key is None else load_key(Path(settings.signing_key)).sign

    def _with_networks(self, place: str) -> "NodeNetworks":
        # torch's world only where there is a network
        from client.node_networks import NodeNetworks  # noqa: PLC0415

        return NodeNetworks(place, self._schema, self._settings.family, device=self._settings.device)

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    def status(self) -> dict[str, Any]:
        """Public facts about the node and, under `data_problem`, what its owner may want to know about the data."""
        ledger_id = self._settings.ledger_id or self._store.pinned_ledger()
        acknowledged = -1 if ledger_id is None else self._store.acknowledged(ledger_id)[0]
        return {
            "name": self._name,
            "users": self._residents.num_places,
            "ledger_id": ledger_id,
            "acknowledged": acknowledged,
            "data_problem": self._residents.problem,
        }

    def _take_up(self) -> None:
        """Work with the users and data as they are now."""
        self._population = self._residents.population
        self._shard = Shard(self._population, self._schema, FAMILIES[self._settings.family])
        self._variant: tuple[Any, Shard] = (None, self._shard)

    def _refresh(self) -> None:
        """See what has become of users and data; only when a broadcast has passed all checks."""
        if self._residents.refresh():
            self._take_up()

    def identity(self, challenge: bytes) -> bytes:
        """The node's name and how many users it hosts, as the server's registry has them, signed for this challenge."""
        header = {"protocol": PROTOCOL_VERSION, "name": self._name, "users": self._residents.num_places}
        record = encode(header, {})
        return introduce(record, challenge=challenge, sign=self._sign)

    def contribute(self, payload: bytes, signature: bytes) -> bytes:
        """The node's clipped integer sum for one release, charged to its users before this returns, and sealed.

        Raises:
            Refused: For a reason that depends on the broadcast, the policy or the ledger, never on data.
        """
        # nothing may be charged between reading the filters and charging them
        with self._contributing:
            accepted = self._check(payload, signature, "train")
            if accepted.event is None:
                raise Refused("purpose", "Expected a release to contribute to, got none.")
            total = self._charged_total(accepted, accepted.event)
        ledger_id, sequence = accepted.broadcast.ledger_id, accepted.sequence
        contribution = Contribution(ledger_id=ledger_id, sequence=sequence, acknowledged=sequence, total=total)
        return enclose(
            contribution.encode(),
            broadcast=payload,
            name=self._name,
            sealing_key=accepted.broadcast.sealing_key,
            sign=self._sign,
        )

    def _charged_total(self, accepted: Accepted, event: Mapping[str, Any]) -> IntArray:
        """The sum over the users whose filters allow the release, charged to them on disk.

        Another process on the same store may spend in between. Then the sum is made once more, and if that fails
        too, it is nobody's: a filter is never a reason to refuse.
        """
        self._refresh()
        z = str(event["noise_multiplier"])
        cost = FULL if is_noiseless(z) else cost_units(z)
        mu_max = self._settings.mu_max
        limit = FULL if is_unlimited(mu_max) else limit_units(mu_max)
        layout, num_users = layout_of_event(event), self._population.num_users
        shard, contribution = self._shard_and_contribution(accepted, float(event["clipping_norm"]), layout)
        coins = self._coins(accepted, event)
        everybody = np.arange(num_users)
        for _ in range(2):
            # without a limit there is no promise to keep, and users go on contributing
            spent = self._store.spent(self._population.users) if limit < FULL else np.zeros(num_users, np.int64)
            admitted = admit(spent, cost, limit) & self._may_contribute()
            total = total_contribution(shard, contribution, size=layout.size, admitted=admitted, coins=coins)
            # a head costs its user what a release without sampling would
            contributed = admitted if coins is None else admitted & coins.heads(everybody)
            with suppress(ValueError):  # from a user who is no longer within the limit
                self._charge(accepted, contributed, cost, limit)
                return total
        self._charge(accepted, np.zeros(num_users, np.bool_), cost, limit)
        return np.zeros(layout.size, np.int64)

    def _shard_and_contribution(
        self, accepted: Accepted, clipping_norm: float, layout: Layout
    ) -> tuple[Shard, Callable[[Batch], IntArray]]:
        """The users as the task needs them, and what each of them has to say."""
        task, model = accepted.task, accepted.broadcast.model
        shard = self._shard_for(task, model.rank)
        if self._networks is not None:
            return shard, self._networks.contribution_to(task, model, clipping_norm=clipping_norm, layout=layout)
        metric = accepted.broadcast.metric
        return shard, contribution_to(task, model, metric, clipping_norm=clipping_norm, layout=layout)

    def _may_contribute(self) -> npt.NDArray[np.bool_]:
        """Who has contributed to fewer releases than the node's operator allows."""
        users, most = self._population.users, self._settings.max_contributions
        return np.ones(len(users), np.bool_) if most is None else self._store.contributions(users) < most

    def _coins(self, accepted: Accepted, event: Mapping[str, Any]) -> Coins | None:
        """Coins for this release, which are gone with it: a sequence that was charged is never answered again."""
        probability = probability_of(event["sampling"])
        if probability is None:
            return None
        seed = self._settings.coin_seed if event["noise"] == SEEDED_NOISE else None
        draw = None if seed is None else seeded(seed, self._name, accepted.sequence)
        return Coins(self._population.num_users, probability, draw)

    def _shard_for(self, task: Task, rank: int) -> Shard:
        """The users as a task needs them; the newest that is not as usual is kept for the next round."""
        if self._networks is not None:
            return self._networks.shard_for(task, self._population)
        if task.work == "gradient":
            return self._shard
        wanted = (task.work, task.fold, rank)
        if self._variant[0] != wanted:
            self._variant = (wanted, shard_for(task, self._population, self._schema, rank))
        return self._variant[1]

    def _charge(self, accepted: Accepted, mask: npt.NDArray[np.bool_], cost: int, limit: int) -> None:
        ledger_id, users = accepted.broadcast.ledger_id, self._population.users
        self._store.charge(
            ledger_id,
            accepted.sequence,
            accepted.head,
            users,
            mask,
            cost,
            limit=limit,
            max_contributions=self._settings.max_contributions,
            public_key=accepted.public_key,
        )

    def fold_in(self, payload: bytes, signature: bytes) -> bytes:
        """Personalize every user with the released model and keep the posteriors; nothing but "done" leaves.

        Raises:
            Refused: As `contribute`.
        """
        with self._contributing:
            accepted = self._check(payload, signature, "fold_in")
            broadcast = accepted.broadcast
            self._refresh()
            if isinstance(self._store, DeviceStore):
                self._keep_states(self._store, accepted, sha256(payload).digest())
            self._store.acknowledge(
                broadcast.ledger_id, accepted.sequence, accepted.head, public_key=accepted.public_key
            )
        return encode({"protocol": PROTOCOL_VERSION, "acknowledged": accepted.sequence}, {})

    def _keep_states(self, store: DeviceStore, accepted: Accepted, model_digest: bytes) -> None:
        broadcast, model = accepted.broadcast, accepted.broadcast.model
        personal = (
            personal_state(accepted.task, model)
            if self._networks is None
            else self._networks.personal_state(accepted.task, model)
        )
        shard = self._shard_for(accepted.task, model.rank)
        kept = KeptModel(
            model=model,
            family=accepted.task.family,
            schema=broadcast.schema,
            run=broadcast.run,
            sequence=accepted.sequence,
        )
        store.save_model(model_digest, kept.encode())

        keep_gram = self._settings.keep_gram

        def state(_: Chunk, batch: Batch) -> tuple[PersonalState, list[bytes | None]]:
            grams: list[bytes | None] = to_records(moments_of(batch)) if keep_gram else [None] * len(batch.count)
            return _finite(personal(batch), model), grams

        users, sparsity = self._population.users, accepted.task.sparsity
        with np.errstate(all="ignore"):
            # who has learned from events since goes on from there: they are not in the data that are read here
            with store.changing() as changes:
                carried = refold_users(changes, users, kept, model_digest, sparsity=sparsity, keep_gram=keep_gram)
            for chunk, (found, grams) in shard.isolated(state):
                rest = np.flatnonzero(~carried[chunk.users])
                some = PersonalState(**{field.name: getattr(found, field.name)[rest] for field in fields(found)})
                names = [users[chunk.users[i]] for i in rest]
                store.save_states(names, some, model_digest, grams=[grams[i] for i in rest])

    def _check(self, payload: bytes, signature: bytes, purpose: str) -> Accepted:
        policy = self._settings.policy()
        ledger_id = policy.ledger_id or self._store.pinned_ledger()
        acknowledged = (-1, bytes(32)) if ledger_id is None else self._store.acknowledged(ledger_id)
        known_key = None if ledger_id is None else self._store.trusted_key(ledger_id)
        accepted = check(
            payload,
            signature,
            replace(policy, ledger_id=ledger_id, public_key=known_key or policy.public_key),
            acknowledged=acknowledged,
            now=time.time(),
            users=self._residents.num_places,
        )
        if accepted.broadcast.purpose != purpose:
            raise Refused("purpose", f"Expected a broadcast for {purpose}, got one for another purpose.")
        if accepted.task.family != self._settings.family:
            raise Refused("policy_shape", "Expected this node's loss family, got another.")
        if self._networks is None and accepted.broadcast.model.dimension != self._schema.dimension:
            raise Refused("policy_shape", "Expected a model of this node's features, got another dimension.")
        if accepted.broadcast.schema != self._schema.digest:
            raise Refused("policy_columns", "Expected a model of this node's columns and target range, got another.")
        return accepted


def _finite(state: PersonalState, model: SharedModel) -> PersonalState:
    """Users whose numbers are not finite start from the prior."""
    good = np.all(np.isfinite(state.theta), axis=1) & np.all(np.isfinite(state.precision), axis=(1, 2))
    if good.all():
        return state
    prior = np.diag([1.0] * state.w.shape[1] + [1 / model.b_variance] * state.b.shape[1])
    return PersonalState(
        w=np.where(good[:, None], state.w, 0.0),
        support=np.where(good[:, None], state.support, -1),
        b=np.where(good[:, None], state.b, 0.0),
        scale=np.where(good, state.scale, 1.0),
        precision=np.where(good[:, None, None], state.precision, prior),
        theta=np.where(good[:, None], state.theta, model.beta[: state.theta.shape[1]]),
    )
