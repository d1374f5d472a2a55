"""The round loop: reserve, ask, noise, stage, commit, step. Effects only; the mathematics is in `server.rounds`.

Every order here is part of the promise (see `privacy.ledger`): a release is charged before anybody is asked, its
noise is drawn after that, and a noised sum is on disk before its COMMIT line. What a crash leaves behind is either a
charge without a release, which stays a charge, or a staged release, which is exactly what goes out.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import BudgetExhausted, UmbelError, VerificationError
from common.files import append_line, clear_leftovers, cut_torn_line, make_folder, pack, unpack, write_durably
from common.model import IntArray
from common.records import Broadcast
from common.sealing import SealingKey
from common.task import Task
from privacy.amplification import Schedule
from privacy.discrete import DiscreteNoise
from privacy.entropy import NoiseSource, NoNoise, SeededNoise, SystemNoise
from privacy.layout import Layout, groups_of_event
from privacy.ledger import PrivacyLedger
from privacy.mechanism import check_capacity, release
from privacy.participation import is_noiseless
from privacy.promise import reasons_against
from privacy.sampling import poisson
from server.algorithms import State, algorithm_of, largest_layout, layout_of_task
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint, save_model
from server.initialization import tie_breaker
from server.registry import Registry
from server.replies import Answer, Replies, check_refusals
from server.roll_call import Nodes, RollCall
from server.sampling import charge_of, expected_users
from server.settings import RunSettings

ROUNDS_LOG = logging.getLogger("umbel.rounds")
"""One record a round: its message names the attribute (`round` or `fold_in`) with the public numbers."""

_SIGNIFICANT_DIGITS = 12


def train(
    settings: RunSettings,
    ledger: PrivacyLedger,
    registry: Registry,
    nodes: Nodes,
    sign: Callable[[bytes], bytes],
) -> State:
    """Run, or go on with, all rounds of a run, then let the devices fold in the final model.

    Args:
        settings: The run.
        ledger: Open for writing.
        registry: Who may be invited.
        nodes: The federation.
        sign: Ed25519 with the ledger's key.

    Returns:
        The final state; the last model is in the release folder.

    Raises:
        BudgetExhausted: Before anything is asked, if the next round would exceed the budget: another run has charged
            the ledger meanwhile. The model of the rounds before is in the release folder.
        StorageError: If a disk failed; the run can be resumed.
    """
    loop = _Loop(settings, ledger, registry, nodes, sign)
    loop.recover()
    try:
        while loop.rounds_left > 0:
            loop.next_round()
    except BudgetExhausted:
        if loop.sequence >= 0:
            loop.finish()
        raise
    loop.finish()
    return loop.state


class _Loop:
    """A run in progress."""

    def __init__(
        self,
        settings: RunSettings,
        ledger: PrivacyLedger,
        registry: Registry,
        nodes: Nodes,
        sign: Callable[[bytes], bytes],
    ) -> None:
        self.settings = settings
        self.ledger = ledger
        self.registry = registry
        self.nodes = nodes
        self.sign = sign
        self.algorithm = algorithm_of(
            settings.config, None if settings.start is None else settings.start.model, settings.network
        )
        self.private = not is_noiseless(settings.noise_multiplier)
        self.noise_name = _noise(settings, 0).name  # before a line is written: a package may be missing
        self.acknowledged: dict[int, int] = {}
        largest = largest_layout(
            settings.config, settings.schema.dimension, private=self.private, network=settings.network
        )
        check_capacity(registry.population_size, largest.grid_scale)
        make_folder(settings.folder.rounds)
        make_folder(settings.folder.evaluation, mode=0o700)
        self.roll = RollCall(registry, nodes, max_users=settings.config.privacy.max_users_per_node)
        self.roll.wait(settings.config.training.startup_timeout)
        rng = tie_breaker(settings.run, settings.config.privacy.seed)
        first = Checkpoint(state=self.algorithm.first_state(settings.schema, rng))
        found = load_checkpoint(settings.folder.checkpoints) or first
        self.state, self.sequence = found.state, found.sequence
        self._check_history(found)
        self._start()

    def _check_history(self, checkpoint: Checkpoint) -> None:
        """Refuse to go on where the ledger is older than the folder, as after a backup was put back.

        Raises:
            VerificationError: If the checkpoint or a release is not of this ledger's past.
        """
        ledger, folder = self.ledger, self.settings.folder
        last = checkpoint.ledger_sequence
        known = last <= ledger.sequence and (last < 0 or ledger.head_at(last).hex() == checkpoint.ledger_head)
        paid = {self._release_path(entry.sequence) for entry in ledger.rounds_of(self.settings.run)}
        if not known or not paid.issuperset(folder.rounds.glob("*.safetensors")):
            raise VerificationError(
                f"Expected a ledger that paid for every release in {folder.root}, got {ledger.path} without some of "
                "them. It is an older copy or another's: put the newest one back; start again with a new run if it is "
                "lost, after charging what was released."
            )

    def _start(self) -> None:
        """Write REGISTRY and START where the ledger does not have them yet; a run that goes on must be the same.

        Raises:
            VerificationError: If the run was started with another configuration, schedule or registry.
        """
        config, ledger, run = self.settings.config, self.ledger, self.settings.run
        schedule: dict[str, Any] = {
            "rounds": config.training.rounds,
            "noise_multiplier": self.settings.noise_multiplier,
            "sampling": poisson(config.privacy.sampling_probability),
            "epsilon": str(config.privacy.epsilon),
            "delta": str(config.privacy.delta),
            "registry": self.registry.digest,
            "schema": sha256(self.settings.folder.schema.read_bytes()).hexdigest(),
        }
        if self.settings.start is not None:
            is_public = config.training.start_is_public
            schedule["start"] = self.settings.start.in_start_line(is_public=is_public)
        if self.settings.network is not None:
            schedule["network"] = self.settings.network.digest
        digest = self.settings.configuration_digest
        started = ledger.runs.get(run)
        if config.privacy.sampling_probability is not None:
            schedule |= self._charge() if started is None else _charged(started["schedule"])
        if started is not None and (started["schedule"], started["configuration_digest"]) != (schedule, digest):
            raise VerificationError(
                f"Expected run {run} as it was started, got another configuration or registry in "
                f"{self.settings.folder.root}. Put the files back as they were, or start a new run."
            )
        if ledger.registry is None or ledger.registry["digest"] != self.registry.digest:
            ledger.record_registry(self.registry.population_size, self.registry.users_per_node, self.registry.digest)
        if started is None:
            ledger.start(run, schedule, digest)

    def _charge(self) -> dict[str, str]:
        """What START says of a sampled run's cost."""
        config = self.settings.config
        planned = Schedule(
            noise_multiplier=self.settings.noise_multiplier,
            sampling_probability=str(config.privacy.sampling_probability),
            rounds=config.training.rounds,
        )
        return charge_of(self.ledger, planned, config.run.capped_mu_max or "0")

    @property
    def rounds_left(self) -> int:
        """Rounds planned less rounds charged: a charge is never given back."""
        return self.settings.config.training.rounds - len(self.ledger.rounds_of(self.settings.run))

    def recover(self) -> None:
        """Apply the releases that are on disk but not in the checkpoint; commit one that was only staged."""
        clear_leftovers(self.settings.folder.rounds)
        cut_torn_line(self.settings.folder.metrics)
        cut_torn_line(self.settings.folder.timings)
        for entry in self.ledger.rounds_of(self.settings.run):
            path = self._release_path(entry.sequence)
            if entry.sequence <= self.sequence or entry.abort_code is not None:
                continue
            if entry.is_open and not path.exists():
                continue  # charged, and nothing came out
            arrays, _ = unpack(path)
            data = path.read_bytes()
            if entry.is_open:
                self._publish(data, entry.sequence)
            elif sha256(data).hexdigest() != entry.release_digest:
                raise UmbelError(f"Expected {path} as the ledger committed it, got other bytes. Restore the file.")
            self._apply(arrays["noised_sum"], entry.sequence, entry.event)

    def next_round(self) -> None:
        """One release, from RESERVE to checkpoint."""
        started = time.perf_counter()
        settings = self.settings
        node_ids = self._invited()
        task = self.algorithm.task(self.state)
        layout = layout_of_task(task, settings.schema.dimension, settings.config.model.rank, private=self.private)
        event = self._event(task, layout, self._users(node_ids))
        server_round = 1 + len(self.ledger.rounds_of(settings.run))
        reservation = self.ledger.reserve(settings.run, server_round, event, self._users(node_ids))
        key = SealingKey.fresh()  # gone with this call, and with it whatever could open the replies
        payload = self._broadcast("train", task, server_round, node_ids, key.public)
        answers = self._answers(node_ids, "train.contribute", payload)
        replies = Replies(
            ledger_id=self.ledger.ledger_id,
            sequence=reservation.sequence,
            invited={node_id: self.roll.known[node_id] for node_id in node_ids},
            layout=layout,
            broadcast=payload,
            key=key,
        )
        totals = replies.totals(answers)
        first = next(totals, None)
        if first is None:
            self.ledger.abort(reservation.sequence, "no_answer")
        else:
            noised = release(
                chain([first], totals),
                size=layout.size,
                noise_multiplier=settings.noise_multiplier,
                grid_scale=layout.grid_scale,
                source=_noise(settings, reservation.sequence),
            )
            sequence = reservation.sequence
            self._publish(pack({"noised_sum": noised}, {"sequence": sequence, "event": event}), sequence)
            self._apply(noised, reservation.sequence, event)
        self.acknowledged |= replies.acknowledged
        self._report(server_round, len(node_ids), replies, time.perf_counter() - started)
        if not replies.answered:
            check_refusals(replies.refusals)

    def finish(self) -> None:
        """Publish the final model and the ledger's copy, and let the devices personalize with it."""
        settings, folder = self.settings, self.settings.folder
        facts: dict[str, object] = {
            "run": settings.run,
            "ledger_id": self.ledger.ledger_id,
            "ledger_head": self.ledger.head.hex(),
            "algorithm": settings.config.training.algorithm,
            "family": settings.config.model.family,
            "sparsity": settings.config.model.sparsity,
            "feature_names": list(settings.schema.feature_names),
            "target_offset": settings.schema.target_offset,
            "not_private": list(self._reasons_against()),
        }
        if settings.network is not None:
            facts["network"] = settings.network.architecture.encode()
        save_model(folder.model, self.state.model, facts)
        self.ledger.copy_to(folder.ledger_copy)
        node_ids = self._invited()
        payload = self._broadcast("fold_in", self.algorithm.personal_task, 0, node_ids, b"")
        refused = [a.code for a in self._answers(node_ids, "train.fold_in", payload) if a.code is not None]
        ROUNDS_LOG.info("fold_in", extra={"fold_in": {"nodes": len(node_ids), "refused": refused}})
        if len(refused) == len(node_ids):
            check_refusals(refused)

    def _reasons_against(self) -> tuple[str, ...]:
        """Why nothing is promised, if so; stamped on everything that is published."""
        return reasons_against(self.ledger.events(), str(self.ledger.genesis["mu_max"]))

    def _invited(self) -> list[int]:
        """All nodes of the registry that are connected: who is invited never depends on contributions.

        Raises:
            UmbelError: If there is none, before anything is charged.
        """
        return self.roll.refresh() or self.roll.wait(
            self.settings.config.training.startup_timeout, enough=lambda there, _: there > 0
        )

    def _users(self, node_ids: list[int]) -> int:
        return sum(self.roll.known[node_id].users for node_id in node_ids)

    def _event(self, task: Task, layout: Layout, invited_users: int) -> dict[str, Any]:
        return {
            "mechanism": "gaussian",
            "noise_multiplier": self.settings.noise_multiplier,
            "clipping_norm": decimal_string(self.state.clipping_norm),
            "grid_scale": layout.grid_scale,
            "groups": groups_of_event(layout),
            "denominator": expected_users(invited_users, self.settings.config.privacy.sampling_probability),
            "noise": self.noise_name,
            "sampling": poisson(self.settings.config.privacy.sampling_probability),
            "initialization": task.work == "moment",
        }

    def _broadcast(self, purpose: str, task: Task, server_round: int, node_ids: list[int], sealing_key: bytes) -> bytes:
        ledger = self.ledger
        since = min((self.acknowledged.get(node_id, -1) for node_id in node_ids), default=-1)
        lines = list(ledger.key_lines)
        if ledger.restored is not None and since < ledger.restored.sequence:
            since = ledger.restored.sequence - 1
            lines.append(ledger.restored.raw)
        start = ledger.sampled_start
        if purpose == "train" and start is not None and start.body["run"] == self.settings.run:
            # a node works for no sampled release without the schedule, which has to lead up to it
            since = min(since, start.sequence - 1)
            lines.append(start.raw)
        if ledger.last is not None:
            lines.append(ledger.last.raw)
        return Broadcast(
            ledger_id=self.ledger.ledger_id,
            run=self.settings.run,
            server_round=server_round,
            purpose=purpose,
            lines=tuple(line.decode("ascii") for line in lines),
            digests_from=since + 1,
            digests=self.ledger.digests_since(since),
            deadline=int(time.time() + self.settings.config.training.round_timeout) + 1,
            task=task.encode(),
            model=self.state.model,
            metric=self.algorithm.metric(self.state),
            schema=self.settings.schema.digest,
            sealing_key=sealing_key,
        ).encode()

    def _answers(self, node_ids: list[int], action: str, payload: bytes) -> Iterator[Answer]:
        timeout = self.settings.config.training.round_timeout
        return self.nodes.ask(node_ids, action, payload, self.sign(payload), timeout)

    def _release_path(self, sequence: int) -> Path:
        return self.settings.folder.rounds / f"{sequence:09d}.safetensors"

    def _publish(self, data: bytes, sequence: int) -> None:
        """Stage, fsync, rename; then COMMIT. Only noised integers ever touch the disk, and none is written over."""
        path = self._release_path(sequence)
        if path.exists() and path.read_bytes() != data:
            raise VerificationError(f"Expected no release at {path} yet, got another one. Put the ledger back.")
        write_durably(path, data)
        self.ledger.commit(sequence, sha256(data).hexdigest())

    def _apply(self, noised: IntArray, sequence: int, event: Any) -> None:
        self.state = self.algorithm.step(self.state, noised, event)
        self.sequence = sequence
        save_checkpoint(
            self.settings.folder.checkpoints,
            Checkpoint(
                state=self.state,
                sequence=sequence,
                ledger_sequence=self.ledger.sequence,
                ledger_head=self.ledger.head.hex(),
            ),
        )

    def _report(self, server_round: int, invited: int, replies: Replies, seconds: float) -> None:
        genesis = self.ledger.genesis
        delta = float(genesis["delta"])
        against = self._reasons_against()
        numbers = {
            "round": server_round,
            "rounds": self.settings.config.training.rounds,
            "invited": invited,
            "answered": replies.answered,
            "refusals": replies.refusals,
            "epsilon_spent": None if against else _finite_or_none(self.ledger.epsilon_spent(delta)),
            "epsilon_budget": _finite_or_none(float(genesis["epsilon"])),
            "clipping_norm": self.state.clipping_norm,
            "noise_variance": self.state.model.noise_variance,
            "b_variance": self.state.model.b_variance,
            "not_private": list(against),
        }
        append_line(self.settings.folder.metrics, json.dumps(numbers).encode())
        # how long it took depends on users' data: for the person at the machine only
        append_line(self.settings.folder.timings, json.dumps({"round": server_round, "seconds": seconds}).encode())
        ROUNDS_LOG.info("round", extra={"round": numbers})


def _charged(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """What the START line of a run that goes on says of its cost: that is never computed anew."""
    return {name: schedule.get(name) for name in ("capped_mu_max", "amplified_epsilon")}


def decimal_string(value: float) -> str:
    """A positive float as a plain decimal string that reads back as the same number to 12 digits or better."""
    return np.format_float_positional(value, precision=_SIGNIFICANT_DIGITS, fractional=False, trim="-")


def _noise(settings: RunSettings, sequence: int) -> NoiseSource:
    if is_noiseless(settings.noise_multiplier):
        return NoNoise()
    privacy = settings.config.privacy
    if privacy.noise == "discrete":
        return DiscreteNoise()
    return SystemNoise() if privacy.seed is None else SeededNoise(privacy.seed, sequence)


def _finite_or_none(value: float) -> float | None:
    return value if np.isfinite(value) else None
