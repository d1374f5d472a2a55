"""The policy guard: what a node demands of a broadcast before any of its users' data is touched.

It looks at public facts only (the message, the node's own policy, the ledger head the node remembers), so a
refusal says nothing about any user. The limits here and the filters in the store hold against the server,
as far as the code that runs them is the node's own.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NoReturn

import numpy as np

from client.ledger_lines import LedgerLines, check_last_line, follow, key_in_force, parse_lines, restored
from common.errors import Refused
from common.records import Broadcast
from common.task import Task
from privacy.layout import GRID_SCALES, group_sizes
from privacy.lines import CRYPTOGRAPHIC_NOISE, chain, replay
from privacy.participation import checked_noise_multiplier, cost_units, is_unlimited, limit_units
from privacy.sampling import NO_SAMPLING, probability_of, sampled_run

_MODEL_BOUNDS = (1e-12, 1e12)  # of variances and entries: beyond them arithmetic itself would tell users apart
_SHARE_SLACK = Fraction(1, 10**9)  # shares are rounded square roots; a user's norm is checked in integers


@dataclass(frozen=True, kw_only=True)
class Policy:
    """A node's own limits, from its own configuration and never from a message.

    Attributes:
        public_key: Ed25519 key of the ledger, 32 bytes.
        recovery_key: Ed25519 key of the operator that alone may go on beyond lost lines of the ledger, or None.
        ledger_id: The one ledger this node answers, or None to trust the first: the caller then puts in what
            `DeviceStore.pinned_ledger` says.
        mu_max: Limit of each user on this node, a decimal string, or "inf" for none.
        min_noise_multiplier: The least noise of a release, a decimal string of at least 0.05.
        max_users_per_node: The most users in one sum.
        families: Loss families this node computes.
        max_dimension: The most features d.
        max_rank: The largest rank r.
        max_coordinates: The most numbers in a user's vector.
        works: What vectors may be made of; from a "moment" or "statistics" of a node with one user the server that
            adds the noise can compute that user's X'X, or y x' of an example, so a node's operator has to allow them.
        max_grid_scale: The largest grid scale K.
        min_clipping_norm: The least clipping norm C.
        max_clipping_norm: The largest.
        max_deadline_ahead: How far away a deadline may be, in seconds.
        allow_not_private: Answer releases without noise or with seeded noise: for simulations.
        require_sealing: Answer only where the reply can be sealed to the ServerApp.
        allow_sampling: Answer sampled runs.
        min_sampling_probability: The least q of one, a decimal string: with very few heads a release is mostly noise.
        max_sampling_probability: The largest.
    """

    public_key: bytes
    recovery_key: bytes | None = None
    ledger_id: str | None = None
    mu_max: str
    min_noise_multiplier: str = "0.05"
    max_users_per_node: int = 100_000
    families: frozenset[str] = frozenset({"squared", "logistic"})
    max_dimension: int = 10_000
    max_rank: int = 64
    max_coordinates: int = 1_000_000
    works: frozenset[str] = frozenset({"gradient"})
    max_grid_scale: int = max(GRID_SCALES)
    min_clipping_norm: float = 1e-6
    max_clipping_norm: float = 1e11  # a sum of squares in the target's own units; a ledger spells up to 1e12
    max_deadline_ahead: float = 86_400.0
    allow_not_private: bool = False
    require_sealing: bool = False
    allow_sampling: bool = True
    min_sampling_probability: str = "0"
    max_sampling_probability: str = "1"

    def __post_init__(self) -> None:
        """Check what the node's configuration said.

        Raises:
            ValueError: If a limit is not one.
        """
        for name in ("public_key", "recovery_key"):
            key = getattr(self, name)
            if key is not None and len(key) != 32:
                raise ValueError(f"Expected a {name} of 32 bytes, got {len(key)}.")
        checked_noise_multiplier(self.min_noise_multiplier)
        if not is_unlimited(self.mu_max):
            limit_units(self.mu_max)
        if not 0 <= Fraction(self.min_sampling_probability) <= Fraction(self.max_sampling_probability) <= 1:
            raise ValueError(
                "Expected 0 <= min_sampling_probability <= max_sampling_probability <= 1, got "
                f"min_sampling_probability={self.min_sampling_probability!r}, "
                f"max_sampling_probability={self.max_sampling_probability!r}."
            )
        if not 0 < self.min_clipping_norm <= self.max_clipping_norm < math.inf:
            raise ValueError(
                "Expected 0 < min_clipping_norm <= max_clipping_norm < inf, "
                f"got min_clipping_norm={self.min_clipping_norm}, max_clipping_norm={self.max_clipping_norm}."
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Accepted:
    """A broadcast that passed.

    Attributes:
        broadcast: The message.
        task: What it asks for.
        event: The mechanism event of its RESERVE line; None for `fold_in`.
        sequence: Last line of the ledger, to be stored before anything is answered.
        head: The ledger's head there.
        public_key: The ledger's key in force, to be stored likewise.
    """

    broadcast: Broadcast
    task: Task
    event: Mapping[str, Any] | None
    sequence: int
    head: bytes
    public_key: bytes


def check(
    payload: bytes,
    signature: bytes,
    policy: Policy,
    *,
    acknowledged: tuple[int, bytes],
    now: float,
    users: int = 0,
) -> Accepted:
    """Decide whether this node works for this broadcast.

    Args:
        payload: The encoded `Broadcast`.
        signature: Ed25519 over `payload`.
        policy: The node's own limits; `public_key` is the one that was in force when the node last answered.
        acknowledged: From `DeviceStore.acknowledged` for the ledger the policy is pinned to.
        now: Unix time in seconds.
        users: How many users the node would sum over.

    Raises:
        Refused: With a code of `REFUSAL_CODES`, and never another exception, whatever the message holds.
    """
    key = key_in_force(payload, signature, policy.public_key)
    broadcast = _decoded(payload)
    if policy.ledger_id not in (None, broadcast.ledger_id):
        _refuse("ledger_unknown", f"the ledger {policy.ledger_id}", "another")
    if policy.require_sealing and broadcast.purpose == "train" and not broadcast.sealing_key:
        _refuse("policy_sealing", "a key to seal the contribution to", "none")
    if users > policy.max_users_per_node:
        _refuse("policy_users", f"at most {policy.max_users_per_node} users", users)
    if not now <= broadcast.deadline <= now + policy.max_deadline_ahead:
        _refuse("deadline", f"a deadline within {policy.max_deadline_ahead} s from now", broadcast.deadline)
    task = _checked_task(broadcast, policy)
    if broadcast.purpose not in ("train", "fold_in"):
        _refuse("purpose", "purpose train or fold_in", repr(broadcast.purpose))
    lines = parse_lines(broadcast.lines)
    line = check_last_line(lines, key)
    event: Mapping[str, Any] | None = None
    if broadcast.purpose == "train":
        _check_reserve(lines, broadcast)
    acknowledged = restored(lines, broadcast, acknowledged, policy.recovery_key)
    if broadcast.purpose == "train":
        sequence, head = replay(*acknowledged, broadcast.digests_from, broadcast.digests, [line.raw])
        event = line.body["event"]
        _check_sampling(lines, broadcast, policy)
        _check_event(event, task, broadcast, policy)
    else:
        sequence, head = follow(line, broadcast, acknowledged)
    return Accepted(broadcast=broadcast, task=task, event=event, sequence=sequence, head=head, public_key=key)


def _refuse(code: str, expected: str, got: object) -> NoReturn:
    raise Refused(code, f"Expected {expected}, got {got}.")


def _decoded(payload: bytes) -> Broadcast:
    try:
        broadcast = Broadcast.decode(payload)
        model = broadcast.model
        low, high = _MODEL_BOUNDS
        usable = (
            all(a.dtype == np.float64 for a in (model.beta, model.U, broadcast.metric))
            and model.beta.ndim == 1
            and broadcast.digests.dtype == np.uint8
            and len(broadcast.sealing_key) in (0, 32)
            and all(low <= variance <= high for variance in (model.b_variance, model.noise_variance))
            and all(np.abs(a).max(initial=0.0) <= high for a in (model.beta, model.U, broadcast.metric))
        )
    except Refused:
        raise
    except Exception as error:  # whoever holds the key may sign anything, and a node answers with a code only
        raise Refused("malformed", "Expected a broadcast, got bytes that are none.") from error
    if not usable:
        _refuse("malformed", "float64 arrays, positive variances and keys of 32 bytes", "something else")
    return broadcast


def _checked_task(broadcast: Broadcast, policy: Policy) -> Task:
    task = Task.decode(broadcast.task)
    if task.family not in policy.families:
        _refuse("policy_shape", f"a family of {sorted(policy.families)}", "another")
    if task.work not in policy.works:
        _refuse("policy_work", f"work of {sorted(policy.works)}", repr(task.work))
    if task.adapters is None:
        _check_linear(task, broadcast, policy)
        return task
    D = broadcast.model.dimension
    if not (task.adapters.trained <= D <= policy.max_coordinates and broadcast.model.rank == 0):
        _refuse("policy_shape", f"a network of at most {policy.max_coordinates} shared numbers", f"{D=}")
    if max(task.adapters.rank, task.sparsity) > policy.max_rank:
        _refuse("policy_shape", f"r and k of at most {policy.max_rank} in a layer", "more")
    if broadcast.metric.size:
        _refuse("malformed", "no metric with a network", "one")
    return task


def _check_linear(task: Task, broadcast: Broadcast, policy: Policy) -> None:
    d, r = broadcast.model.dimension, broadcast.model.rank
    if broadcast.metric.shape != (d, d):
        _refuse("malformed", f"a metric of {d} x {d}", "another")
    if not (0 < d <= policy.max_dimension and r <= min(d, policy.max_rank)):
        _refuse("policy_shape", f"d <= {policy.max_dimension}, r <= {policy.max_rank} and r <= d", f"{d=}, {r=}")
    if task.sparsity > d:
        _refuse("policy_shape", "sparsity <= d", "another sparsity")
    if (r + task.sparsity) * d > policy.max_coordinates:  # what the solvers keep of a user
        _refuse("policy_shape", f"(r + sparsity) d <= {policy.max_coordinates}", f"{r=}, {d=}, more sparsity")
    if (task.work != "gradient" or task.fitting is not None) and task.family != "squared":
        _refuse("policy_shape", "squared loss with second moments and statistics", "another family")


def _check_reserve(lines: LedgerLines, broadcast: Broadcast) -> None:
    """Check that the last line is the RESERVE line of this round, which alone says how the release is made."""
    line = lines.last
    if (line.kind, line.body.get("run"), line.body.get("round")) != ("RESERVE", broadcast.run, broadcast.server_round):
        _refuse("malformed", "the RESERVE line of this run and round", "another line")
    if (lines.start is None) != (line.body["event"]["sampling"] == NO_SAMPLING):
        _refuse("malformed", "the START line of a sampled run, and of no other", "another")


def _check_sampling(lines: LedgerLines, broadcast: Broadcast, policy: Policy) -> None:
    """Check that a sampled release is one of the schedule that its run was started with, in this very ledger.

    Amplified epsilon is right only for a schedule that was fixed, and charged as a whole, before the first release.
    The START line leads, by the digests after it, to the RESERVE line, which leads on from what this node has seen.
    """
    start, line, event = lines.start, lines.last, lines.last.body["event"]
    q = probability_of(event["sampling"])
    if q is None or start is None:
        return
    if not policy.allow_sampling:
        _refuse("policy_sampling", "a release without sampling", "a sampled one")
    if not Fraction(policy.min_sampling_probability) <= q <= Fraction(policy.max_sampling_probability):
        bounds = f"{policy.min_sampling_probability} <= q <= {policy.max_sampling_probability}"
        _refuse("policy_sampling", bounds, f"q={event['sampling']['poisson']}")
    try:
        schedule = sampled_run(start.body["run"], start.body["schedule"])
    except (ValueError, KeyError) as error:
        raise Refused("malformed", "Expected the START line of a sampled run, got another.") from error
    after = start.sequence + 1 - broadcast.digests_from
    if not 0 < after <= len(broadcast.digests) - 1:
        _refuse("ledger_gap", f"digests from line {start.sequence}", f"digests_from={broadcast.digests_from}")
    if chain(start.head, broadcast.digests[after:-1]).hex() != line.previous:
        _refuse("ledger_fork", "a START line of this ledger", "another's")
    asked = (line.body["run"], event["noise_multiplier"], event["sampling"]["poisson"])
    if schedule is None or asked != (schedule.run, schedule.noise_multiplier, schedule.sampling_probability):
        _refuse("policy_sampling", "run, noise and sampling probability of its START line", "others")
    if not 1 <= broadcast.server_round <= schedule.rounds:
        _refuse("policy_sampling", f"one of the {schedule.rounds} rounds of its START line", broadcast.server_round)


def _check_event(event: Mapping[str, Any], task: Task, broadcast: Broadcast, policy: Policy) -> None:
    """Check a mechanism event, whose fields and their types are known to be right, against the policy."""
    if event["mechanism"] != "gaussian":
        _refuse("policy_shape", "one Gaussian release", "another mechanism")
    if event["initialization"] != (task.work == "moment"):
        _refuse("policy_shape", "an initialization from a moment and from nothing else", "another")
    _check_noise(event["noise"], event["noise_multiplier"], policy)
    clipping_norm = float(event["clipping_norm"])
    if not policy.min_clipping_norm <= clipping_norm <= policy.max_clipping_norm:
        bounds = f"{policy.min_clipping_norm} <= clipping_norm <= {policy.max_clipping_norm}"
        _refuse("policy_clipping", bounds, f"clipping_norm={event['clipping_norm']}")
    _check_layout(event["groups"], event["grid_scale"], task, broadcast, policy)


def _check_noise(noise: str, noise_multiplier: str, policy: Policy) -> None:
    if noise not in CRYPTOGRAPHIC_NOISE and not policy.allow_not_private:
        _refuse("policy_not_private", "noise from a cryptographic source", f"noise={noise!r}")
    if noise == "none":
        return
    try:
        z = checked_noise_multiplier(noise_multiplier)
        affordable = is_unlimited(policy.mu_max) or cost_units(noise_multiplier) <= limit_units(policy.mu_max)
    except ValueError as error:
        raise Refused("policy_noise", str(error)) from error
    if z < checked_noise_multiplier(policy.min_noise_multiplier) or not affordable:
        limits = f"noise_multiplier >= {policy.min_noise_multiplier} and >= 1/mu_max, mu_max={policy.mu_max}"
        _refuse("policy_noise", limits, f"noise_multiplier={noise_multiplier}")


def _check_layout(groups: Any, grid_scale: int, task: Task, broadcast: Broadcast, policy: Policy) -> None:
    dimension = broadcast.model.dimension if task.adapters is None else task.adapters.trained
    sizes = group_sizes(task.work, dimension, broadcast.model.rank)
    if [(group["name"], group["size"]) for group in groups] != list(sizes.items()):
        _refuse("policy_shape", f"groups {sizes}", "others")
    if sum(sizes.values()) > policy.max_coordinates:
        _refuse("policy_shape", f"at most {policy.max_coordinates} numbers", f"groups {sizes}")
    shares = [Fraction(group["share"]) for group in groups]
    if min(shares) <= 0 or sum(share**2 for share in shares) > 1 + _SHARE_SLACK:
        _refuse("policy_shape", "positive shares whose squares sum to at most 1", "others")
    if grid_scale not in GRID_SCALES or grid_scale > policy.max_grid_scale:
        _refuse("policy_shape", f"a grid scale of {GRID_SCALES} up to {policy.max_grid_scale}", grid_scale)
