"""The checks that the promise rests on, and proof that each would notice: every one is also run on broken code.

A check is a plain function that fails with an exception. It passes on the code as it is, and with one thing broken
on purpose it must fail. Where it matters the real ServerApp, and mostly the real ClientApp, run end to end in this
process.
"""

import math
import os
import secrets
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

import client.coins
import client.contribution
import client.service
import client.shard
import client.store
import client.work
import server.algorithms
import server.replies
import server.training
from client.app import app as real_client_app
from client.batches import Design
from client.shard import Shard
from client.sources import node_data
from client.store import DeviceStore
from common import wire
from common.config import Config
from common.data import DataSchema, Population
from common.errors import UmbelError
from common.families import FAMILIES
from common.model import IntArray
from common.records import Broadcast, Contribution
from privacy.entropy import SeededNoise
from privacy.ledger import PrivacyLedger
from privacy.participation import cost_units
from server.initialization import initial_model, regularized_moment
from server.layout import contribution_layout
from server.rounds import apply_round, initial_state, public_metric
from server.settings import RunFolder
from tests.federation import (
    Run,
    configuration,
    enclosed,
    introduced,
    layout_of,
    opened,
    prepare,
    run_answers,
    run_app,
    run_real,
    zeros,
)
from tests.populations import draw_model, draw_users, gradient_total, population_of, schema_of
from tests.reference import User, squared_norm
from umbel.inprocess import Fault

# Each statistic below is compared with its distribution at this quantile: a correct program fails one of them with
# probability 1e-6 at most (two-sided standard normal).
SIGMAS = 4.9
D, R = 4, 1
CROWD_D, CROWD_R = 8, 2


def check_noise(folder: Path) -> None:
    """Releases of zeros through the real server: scale as the ledger says, and independent from release to release.

    Variance of about 2,000 samples and the correlations of all pairs of releases, each at a false-failure rate of 1e-6.
    """
    config = prepare(
        configuration(folder, data__synthetic__dimension=40, model__rank=8, training__rounds=6, privacy__seed=None),
        noise_multiplier="2",
    )
    layout = layout_of(config, private=True)
    # a configuration that says "none" makes nodes that accept anything; the noise itself is the operating system's
    run = run_answers(config, lambda _, __: [zeros(layout)], users_per_node=6)
    noise = np.array(list(run.releases.values())) / (2.0 * layout.grid_scale)
    assert len(noise) == 6
    with run.ledger() as ledger:
        assert {event["noise_multiplier"] for event in ledger.events()} == {"2"}
        assert {event["noise"] for event in ledger.events()} == {"aes-256-ctr"}
    spread = math.sqrt(2 / noise.size)
    assert abs(noise.var() - 1) < SIGMAS * spread
    assert abs(noise.mean()) < SIGMAS / math.sqrt(noise.size)
    correlation = np.corrcoef(noise)
    pairs = correlation[np.triu_indices(6, 1)]
    # fifteen pairs share the failure rate: 5.5 standard deviations
    assert np.abs(pairs).max() < 5.5 / math.sqrt(noise.shape[1])


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    real = server.training.release

    def release(contributions: Any, *, noise_multiplier: str, **options: Any) -> IntArray:
        return real(contributions, noise_multiplier=str(float(noise_multiplier) / 2), **options)

    patch.setattr(server.training, "release", release)


def reused_noise(patch: pytest.MonkeyPatch) -> None:
    class Stuck(SeededNoise):
        name = "aes-256-ctr"

        def __init__(self) -> None:
            super().__init__(1, 1)

    patch.setattr(server.training, "SystemNoise", Stuck)


def check_no_noise_is_drawn_twice(folder: Path) -> None:
    """One state of ledger, keys and files goes on four times, as copies of a machine do: no two lives share noise.

    Twice in this process, which has drawn noise before, then in two forks of it. Each life releases the same rounds
    under the same sequence numbers. Any two of the eight releases are compared at a joint false-failure rate of 1e-6.
    """
    config = prepare(
        configuration(folder, data__synthetic__dimension=40, model__rank=8, privacy__seed=None), noise_multiplier="2"
    )
    snapshot = folder.with_name("snapshot")
    shutil.copytree(folder, snapshot)
    layout = layout_of(config, private=True)
    lives = []
    for forked in (False, False, True, True):
        shutil.rmtree(folder)
        shutil.copytree(snapshot, folder)
        go_on = partial(run_answers, config, lambda _, __: [zeros(layout)], users_per_node=6)
        if forked:
            in_a_fork(go_on)
        else:
            go_on()
        releases = Run(folder=RunFolder(root=folder), config=config, layout=layout, broadcasts={}).releases
        lives.append(releases)
    assert {tuple(releases) for releases in lives} == {tuple(lives[0])}
    noise = np.array([release for releases in lives for release in releases.values()]) / (2.0 * layout.grid_scale)
    assert len(noise) == 8
    pairs = np.corrcoef(noise)[np.triu_indices(8, 1)]
    assert np.abs(pairs).max() < 5.6 / math.sqrt(noise.shape[1])


def in_a_fork(work: Callable[[], object]) -> None:
    """Do it in a copy of this process, with all that it knows of randomness."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork while there are threads
        child = os.fork()
    if child == 0:
        failed = 1
        try:
            work()
            failed = 0
        finally:
            os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def noise_of_the_sequence(patch: pytest.MonkeyPatch) -> None:
    """What a ledger's line and the run's own number give, whoever computes it."""
    patch.setattr(server.training, "_noise", lambda settings, sequence: stuck(sequence))


def noise_of_the_process(patch: pytest.MonkeyPatch) -> None:
    """A generator with a secret seed, made once: a fork inherits where it is."""
    source = stuck(secrets.randbits(64))
    patch.setattr(server.training, "_noise", lambda *_: source)


def stuck(stream: int) -> SeededNoise:
    source = SeededNoise(1, stream)
    source.name = "aes-256-ctr"  # type: ignore[misc]
    return source


def crowd(with_worst_case: bool) -> tuple[Population, DataSchema]:
    """Forty ordinary users, and one whose gradient is far beyond the clipping norm, or who is empty."""
    rng = np.random.default_rng(0)
    model = draw_model(rng, CROWD_D, CROWD_R)
    users = draw_users(rng, model, [6] * 40)
    X = np.ones((200, CROWD_D))
    worst = User(X=X, y=np.full(200, 20.0), weight=np.ones(200))
    nobody = User(X=X[:0], y=worst.y[:0], weight=worst.weight[:0])
    schema = schema_of(CROWD_D, bound=4.0, target_range=(-20.0, 20.0))
    return population_of([*users, worst if with_worst_case else nobody]), schema


def crowded(folder: Path, **overrides: Any) -> Config:
    """The configuration of a run on the crowd, all on one node, with a public clipping norm."""
    fixed = {"data__synthetic__users": 41, "training__nodes": 1, "privacy__clipping": 2.0}
    fixed |= {"data__synthetic__dimension": CROWD_D, "model__rank": CROWD_R}
    return configuration(folder, **(fixed | overrides))


def scores(folder: Path, rounds: int, noise_multiplier: str, inside: bool) -> tuple[np.ndarray, np.ndarray]:
    """What an adversary who knows everything but the worst-case user has of each release.

    `n` components of (release - everybody else) along that user's vector, and what is left at right angles, both in
    units of K. What everybody else sent is computed from the broadcast by plain function calls.
    """
    data = crowd(inside)
    run = run_real(prepare(crowded(folder, training__rounds=rounds, privacy__seed=None), noise_multiplier), data=data)
    others, with_user = (Shard(crowd(present)[0], data[1], FAMILIES["squared"]) for present in (False, True))
    along, across = [], []
    for sequence, released in run.releases.items():
        rest, whole = (total_of(shard, run.broadcasts[sequence], run) for shard in (others, with_user))
        user = (whole - rest).astype(np.float64)
        direction = user / max(1.0, np.linalg.norm(user))
        left = (released - rest) / run.layout.grid_scale
        along.append(float(direction @ left))
        across.append(left - along[-1] * direction)
    return np.array(along), np.array(across)


def total_of(shard: Shard, broadcast: Broadcast, run: Run) -> IntArray:
    return gradient_total(
        shard,
        broadcast.model,
        broadcast.metric,
        sparsity=int(broadcast.task["sparsity"]),
        clipping_norm=2.0,
        layout=run.layout,
        admitted=np.ones(shard.population.num_users, np.bool_),
    )


def check_a_user_is_not_told_apart_better_than_promised(folder: Path) -> None:
    """In and out of thirty releases at z = 1/4, mu = sqrt(30)/z = 21.9: the best test separates them by that, not more.

    The separation is of the optimal statistic, the mean component along the user's vector, in units of the noise that
    is really there (measured at right angles). Noise at z = 1/4 makes it visible; false failures are below 1e-6.
    """
    rounds, z = 30, 0.25
    inside, across_inside = scores(folder / "in", rounds, str(z), True)
    outside, across_outside = scores(folder / "out", rounds, str(z), False)
    across = np.concatenate([across_inside, across_outside])
    degrees = across.size - len(across)
    stddev = math.sqrt(float((across**2).sum()) / degrees)
    separation = (inside.mean() - outside.mean()) / stddev * math.sqrt(rounds)
    promised = math.sqrt(rounds) / z
    uncertain = SIGMAS * math.sqrt(2) + promised * SIGMAS / math.sqrt(2 * degrees)
    assert separation < promised + uncertain
    # the user is a worst case: almost K, or the check would say nothing
    assert separation > 0.9 * promised - uncertain
    assert abs(stddev / z - 1) < SIGMAS / math.sqrt(2 * degrees)


def no_clip(patch: pytest.MonkeyPatch) -> None:
    """Neither the clip nor the check on the grid behind it."""

    def clip_to_ball(x: Any, clipping_norm: float) -> Any:
        return x / clipping_norm, np.linalg.norm(x, axis=1) <= clipping_norm

    def to_grid(blocks: Any, layout: Any) -> Any:
        parts = [b * (g.share * layout.grid_scale) for b, g in zip(blocks, layout.groups, strict=True)]
        return np.trunc(np.concatenate(parts, axis=1)).astype(np.int64)

    patch.setattr(client.contribution, "clip_to_ball", clip_to_ball)
    patch.setattr(client.contribution, "to_grid", to_grid)


def check_one_user_moves_a_release_by_at_most_k(folder: Path) -> None:
    """Without noise, through the real apps: the worst-case user in and out differ by at most K, in integers."""
    runs = [
        run_real(
            prepare(crowded(folder / name, training__rounds=1)),
            data=crowd(name == "in"),
        )
        for name in ("in", "out")
    ]
    (inside,), (outside,) = (list(run.releases.values()) for run in runs)
    moved = squared_norm(inside - outside)
    assert moved <= runs[0].layout.norm_limit()
    assert moved > 0.9 * runs[0].layout.norm_limit()


def check_dropouts_do_not_change_the_denominator(folder: Path) -> None:
    """With one of two nodes lost on the way the step is still divided by the users of both."""

    def faults(node_id: int, message: Message) -> Fault | None:
        return Fault.UNREACHABLE if message.metadata.message_type == "train.contribute" and node_id == 3 else None

    run = run_real(prepare(configuration(folder, training__rounds=1)), faults=faults)
    assert run.metrics[0]["answered"] == 1
    (released,) = run.releases.values()
    (broadcast,) = run.broadcasts.values()
    with run.ledger() as ledger:
        (event,) = ledger.events()
    assert event["denominator"] == 12
    means = released[: D * (R + 1)] / (run.layout.groups[0].share * run.layout.grid_scale * 12)
    gradient = float(event["clipping_norm"]) * means.reshape(R + 1, D).T
    step = broadcast.metric @ gradient / 1.1
    moved = run.state.model.U - broadcast.model.U, run.state.model.beta - broadcast.model.beta
    np.testing.assert_allclose(np.column_stack(moved), step, atol=1e-9)
    assert np.abs(step).max() > 1e-3


def realised_denominator(patch: pytest.MonkeyPatch) -> None:
    real = server.algorithms.apply_round

    def counting(state: Any, noised: IntArray, **options: Any) -> Any:
        presence = float(noised[D * (R + 1) + 1]) / (options["layout"].groups[1].share * options["layout"].grid_scale)
        answered = max(1, round(presence * math.sqrt(5)))
        return real(state, noised, **(options | {"denominator": answered}))

    patch.setattr(server.algorithms, "apply_round", counting)


def check_the_clip_bit_is_centred(_: Path) -> None:
    """C grows where all are clipped, shrinks as much where none is, half as far with half the users, and else stays."""
    rng = np.random.default_rng(0)
    S = np.eye(D)
    model = initial_model(S, R, 1.0, rng)
    users = draw_users(rng, draw_model(rng, D, R), [8] * 10)
    nobody = User(X=np.zeros((0, D)), y=np.zeros(0), weight=np.zeros(0))
    layout = contribution_layout(D, R, private=False)

    def factor(clipping_norm: float, present: int) -> float:
        state = initial_state(model, regularized_moment(S), clipping_norm)
        shard = Shard(population_of([*users[:present], *[nobody] * (10 - present)]), schema_of(D), FAMILIES["squared"])
        total = gradient_total(
            shard, model, public_metric(state, "squared"), sparsity=0, clipping_norm=clipping_norm, layout=layout,
            admitted=np.ones(10, np.bool_),
        )  # fmt: skip
        after = apply_round(
            state, total, layout=layout, clipping_norm=clipping_norm, noise_multiplier=0.0, denominator=10,
            adapt_clipping=True, family="squared", sparsity=0,
        )  # fmt: skip
        return math.log(after.clipping_norm / clipping_norm)

    assert factor(0.02, 10) == pytest.approx(0.25, abs=1e-6)
    assert factor(900.0, 10) == pytest.approx(-0.25, abs=1e-6)
    assert factor(0.02, 5) == pytest.approx(0.125, abs=1e-6)
    assert factor(900.0, 5) == pytest.approx(-0.125, abs=1e-6)
    assert factor(0.02, 0) == 0.0


def uncentred_bit(patch: pytest.MonkeyPatch) -> None:
    real = client.contribution.scalars

    def scalars(batch: Any, solution: Any, model: Any, unclipped: Any, **options: Any) -> Any:
        values = real(batch, solution, model, unclipped, **options)
        bit = np.where(batch.count > 0, unclipped * 0.5, 0.0)
        return np.column_stack([bit, values[:, 1:]])

    patch.setattr(client.contribution, "scalars", scalars)


def check_every_release_is_charged(folder: Path) -> None:
    """On disk, after the run: a RESERVE for each release, and on each node the full cost for each user."""
    rounds = 3
    config = prepare(configuration(folder, training__rounds=rounds, privacy__epsilon=4.0, privacy__seed=None))
    run = run_real(config)
    cost = cost_units(str(config.run.noise_multiplier))
    assert len(run.releases) == rounds
    with run.ledger() as ledger:
        assert [entry.sequence for entry in ledger.rounds_of(str(config.run.name))] == list(run.releases)
        assert ledger.spent_units == rounds * cost
        assert not ledger.open_reservations()
    for node in range(2):
        path = run.folder.nodes / f"node-{node}.sqlite"
        users = [f"user-{i}" for i in range(6 * node, 6 * node + 6)]
        with DeviceStore.open(path, users) as store:
            assert store.spent(users).tolist() == [rounds * cost] * 6


def no_reserve_on_disk(patch: pytest.MonkeyPatch) -> None:
    real = PrivacyLedger._write

    def write(self: PrivacyLedger, descriptor: int, line: Any) -> None:
        if line.kind == "RESERVE":
            self._state.advance(line)
        else:
            real(self, descriptor, line)

    patch.setattr(PrivacyLedger, "_write", write)


def no_charge_on_the_device(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client.store.DeviceStore, "charge", lambda *_, **__: None)


def check_coins_are_tossed_once_by_each_device(folder: Path) -> None:
    """Through the real apps: each user tosses once a round; heads, and nobody else, are in the sum and charged.

    The coins show heads for every second user, then for nobody, then for all. A reply is as large for each of them.
    """
    sampled = {"privacy__epsilon": 4.0, "privacy__seed": None, "privacy__sampling_probability": "0.5"}
    config = prepare(configuration(folder, training__rounds=3, training__nodes=1, **sampled))
    tosses: list[int] = []

    def scripted(user: int) -> int:
        server_round = len(tosses) // 12
        tosses.append(user)
        return 0 if (server_round == 0 and user % 2 == 0) or server_round == 2 else 2**64 - 1

    replies: list[bytes] = []

    def recorded(message: Message, context: Context) -> Message:
        answer = real_client_app(message=message, context=context)
        if message.metadata.message_type == "train.contribute":
            name = f"node-{context.node_config['partition-id']}"
            replies.append(opened(wire.read_answer(answer), wire.read_request(message)[0], name))
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.coins, "_from_the_system", scripted)
        patch.setattr("tests.federation.real_client_app", recorded)
        run = run_real(config)
    assert sorted(tosses) == sorted([*range(12)] * 3)
    assert len({len(reply) for reply in replies}) == 1
    everybody, schema = node_data(config.data, "squared", 0, 1)
    shard = Shard(everybody, schema, FAMILIES["squared"])
    users = list(everybody.users)
    with run.ledger() as ledger, DeviceStore.open(run.folder.nodes / "node-0.sqlite", users) as store:
        heads = [store.charged(ledger.ledger_id, sequence, users) for sequence in run.broadcasts]
        events = list(ledger.events())
    assert [charged.sum() for charged in heads if charged is not None] == [6, 0, 12]
    for (sequence, broadcast), charged, event, reply in zip(
        run.broadcasts.items(), heads, events, replies, strict=True
    ):
        assert (event["sampling"], event["denominator"]) == ({"poisson": "0.5"}, 6)
        expected = gradient_total(
            shard, broadcast.model, broadcast.metric, sparsity=1, clipping_norm=float(event["clipping_norm"]),
            layout=run.layout, admitted=charged,
        )  # fmt: skip
        contribution = Contribution.decode(reply)
        assert contribution.sequence == sequence
        assert np.array_equal(contribution.total, expected)


def second_toss(patch: pytest.MonkeyPatch) -> None:
    real = client.coins.Coins.heads

    def heads(self: Any, users: Any) -> Any:
        self._tossed[users] = False
        return real(self, users)

    patch.setattr(client.coins.Coins, "heads", heads)


def coin_of_the_server(patch: pytest.MonkeyPatch) -> None:
    """The node leaves it to whoever invites."""
    patch.setattr(client.service, "probability_of", lambda _: None)


def tails_of_another_size(patch: pytest.MonkeyPatch) -> None:
    real = client.service.Contribution

    def contribution(*, total: IntArray, **fields: Any) -> Contribution:
        return real(total=total if total.any() else total[:0], **fields)

    patch.setattr(client.service, "Contribution", contribution)


MARK = 12345.0


def check_a_failure_stays_with_its_user(_: Path) -> None:
    """A library that raises on one user's numbers costs that user's vector; the rest of its chunk is counted."""
    rng = np.random.default_rng(0)
    model = draw_model(rng, D, R)
    users = draw_users(rng, model, [3] * 6)
    layout = contribution_layout(D, R, private=True)
    state = initial_state(model, regularized_moment(np.eye(D)), 2.0)

    def total(people: list[User]) -> IntArray:
        shard = Shard(population_of(people), schema_of(D), FAMILIES["squared"])
        return gradient_total(
            shard, model, public_metric(state, "squared"), sparsity=0, clipping_norm=2.0, layout=layout,
            admitted=np.ones(len(people), np.bool_),
        )  # fmt: skip

    expected = total([*users[:2], *users[3:]])
    marked = [*users[:2], replace(users[2], y=np.full(3, MARK)), *users[3:]]
    real = client.work.contribute

    def raising(batch: Any, *arguments: Any, **options: Any) -> Any:
        if isinstance(batch, Design) and (batch.y == MARK).any():
            raise FloatingPointError("singular")
        return real(batch, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client.work, "contribute", raising)
        assert np.array_equal(total(marked), expected)
    assert expected.any()


def failure_zeroes_the_chunk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(client.shard, "_one_by_one", lambda _: iter(()))


def check_impossible_sums_are_left_out(folder: Path) -> None:
    """A node cannot move the sum by more than its users could: what is beyond that is refused with a code."""
    config = prepare(configuration(folder, training__rounds=1))
    layout = layout_of(config, private=False)

    def answers(node: int, _: Broadcast) -> list[IntArray]:
        total = zeros(layout)
        total[0] = 7 * layout.radius(layout.groups[0]) if node else 5
        return [total]

    run = run_answers(config, answers, users_per_node=6)
    (released,) = run.releases.values()
    assert released[0] == 5
    assert run.metrics[0]["refusals"] == {"malformed": 1}


def anything_goes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(server.replies, "sum_is_possible", lambda *_: True)


def check_replies_count_once(folder: Path) -> None:
    """A reply that is delivered twice, and a reply to an earlier release, are in the sum once and not at all."""
    config = prepare(configuration(folder, training__rounds=2))
    layout = layout_of(config, private=False)
    earlier: dict[int, bytes] = {}
    app = ClientApp()

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        return wire.answer(introduced(f"node-{context.node_config['partition-id']}", 6), message)

    @app.train("contribute")
    def contribute(message: Message, context: Context) -> Message:
        node = int(context.node_config["partition-id"])
        broadcast = Broadcast.decode(wire.read_request(message)[0])
        sequence = int(broadcast.lines[-1].split('"sequence":')[1].split(",")[0])
        total = zeros(layout) + (100 if node else 1)
        reply = Contribution(
            ledger_id=broadcast.ledger_id, sequence=sequence, acknowledged=sequence, total=total
        ).encode()
        # the second node answers every release with its reply to the first
        said = earlier.setdefault(node, reply) if node else reply
        return wire.answer(enclosed(said, broadcast, f"node-{node}"), message)

    @app.train("fold_in")
    def fold_in(message: Message, _: Context) -> Message:
        return wire.answer(b"", message)

    def faults(node_id: int, message: Message) -> Fault | None:
        return Fault.DUPLICATE if message.metadata.message_type == "train.contribute" and node_id == 2 else None

    first, second = run_app(config, app, faults).releases.values()
    assert set(first.tolist()) == {101}
    assert set(second.tolist()) == {1}


def replies_count_as_they_come(patch: pytest.MonkeyPatch) -> None:
    class Forgetful(set[int]):
        def __contains__(self, _: object) -> bool:
            return False

    real = server.replies.Replies.__init__

    def init(self: Any, **arguments: Any) -> None:
        real(self, **arguments)
        self._counted = Forgetful()

    patch.setattr(server.replies.Replies, "__init__", init)


def replies_to_any_release_count(patch: pytest.MonkeyPatch) -> None:
    real = server.replies.Replies._checked

    class Lenient:
        sequence = 0

        @classmethod
        def decode(cls, data: bytes) -> Contribution:
            return replace(Contribution.decode(data), sequence=cls.sequence)

    def checked(self: Any, answer: Any) -> IntArray:
        Lenient.sequence = self.sequence
        return real(self, answer)

    patch.setattr(server.replies, "Contribution", Lenient)
    patch.setattr(server.replies.Replies, "_checked", checked)


@dataclass(frozen=True)
class Mutation:
    """A check, and what it must notice."""

    check: Callable[[Path], None]
    breakage: Callable[[pytest.MonkeyPatch], None]


CHECKS = (
    check_noise,
    check_no_noise_is_drawn_twice,
    check_a_user_is_not_told_apart_better_than_promised,
    check_one_user_moves_a_release_by_at_most_k,
    check_dropouts_do_not_change_the_denominator,
    check_the_clip_bit_is_centred,
    check_every_release_is_charged,
    check_coins_are_tossed_once_by_each_device,
    check_a_failure_stays_with_its_user,
    check_impossible_sums_are_left_out,
    check_replies_count_once,
)
MUTATIONS = (
    Mutation(check_noise, half_the_noise),
    Mutation(check_noise, reused_noise),
    Mutation(check_no_noise_is_drawn_twice, reused_noise),
    Mutation(check_no_noise_is_drawn_twice, noise_of_the_sequence),
    Mutation(check_no_noise_is_drawn_twice, noise_of_the_process),
    Mutation(check_a_user_is_not_told_apart_better_than_promised, half_the_noise),
    Mutation(check_a_user_is_not_told_apart_better_than_promised, no_clip),
    Mutation(check_one_user_moves_a_release_by_at_most_k, no_clip),
    Mutation(check_dropouts_do_not_change_the_denominator, realised_denominator),
    Mutation(check_the_clip_bit_is_centred, uncentred_bit),
    Mutation(check_every_release_is_charged, no_reserve_on_disk),
    Mutation(check_every_release_is_charged, no_charge_on_the_device),
    Mutation(check_coins_are_tossed_once_by_each_device, second_toss),
    Mutation(check_coins_are_tossed_once_by_each_device, coin_of_the_server),
    Mutation(check_coins_are_tossed_once_by_each_device, tails_of_another_size),
    Mutation(check_a_failure_stays_with_its_user, failure_zeroes_the_chunk),
    Mutation(check_impossible_sums_are_left_out, anything_goes),
    Mutation(check_replies_count_once, replies_count_as_they_come),
    Mutation(check_replies_count_once, replies_to_any_release_count),
)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_promise_holds(tmp_path, check):
    """Every check passes on the code as it is."""
    check(tmp_path / "run")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.breakage.__name__}-{m.check.__name__}")
def test_broken_code_is_caught(tmp_path, monkeypatch, mutation):
    """Every check fails on code that is broken where it looks."""
    mutation.breakage(monkeypatch)
    with pytest.raises((AssertionError, UmbelError)):
        mutation.check(tmp_path / "run")


def test_every_check_has_a_mutation():
    """A check that nothing was ever seen to fail is no check."""
    assert {mutation.check for mutation in MUTATIONS} == set(CHECKS)
