"""What goes wrong between server and nodes, with the real apps: a reply that is missing, late, twice, changed or a lie.

The guarantee never moves: noise, denominator and charge are those of the nodes invited, whoever answered.
"""

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import Context, Message

import server.app
from client.app import app as real_client_app
from client.app import close_services
from common import wire
from common.errors import UmbelError
from common.records import Broadcast, Contribution, encode
from common.sealing import UNSIGNED
from privacy.layout import sum_is_possible
from tests.federation import Run, configuration, enclosed, opened, prepare, run_app, run_real
from umbel.inprocess import Fault, Faults

USERS, NODES, ROUNDS = 12, 3, 3
MIDDLE = 1
"""The partition of the node that something happens to; nodes are numbered from 2."""


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The server's waiting takes no time, and its deadline comes when there is nothing left to wait for."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(server.app, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))


def seeded(folder, **overrides):
    """A run with noise that can be compared."""
    options = {"training__nodes": NODES, "data__synthetic__users": USERS, "training__rounds": ROUNDS}
    return prepare(configuration(folder, **options | {"privacy__epsilon": 1.0} | overrides))


def in_rounds(numbers: Iterable[int], fault: Fault, partitions: Iterable[int] = (MIDDLE,)) -> Faults:
    """This fault for these nodes in some rounds, by counting each node's messages."""
    asked: dict[int, int] = {}

    def faults(node_id: int, message: Message) -> Fault | None:
        if message.metadata.message_type != "train.contribute":
            return None
        asked[node_id] = asked.get(node_id, 0) + 1
        return fault if node_id - 2 in partitions and asked[node_id] in numbers else None

    return faults


def charges(run: Run) -> tuple[Any, ...]:
    """All that the guarantee depends on."""
    with run.ledger() as ledger:
        return ledger.mu_spent, [
            (event["noise_multiplier"], event["denominator"], event["noise"], event["groups"], event["grid_scale"])
            for event in ledger.events()
        ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same run without faults."""
    return run_real(seeded(tmp_path_factory.mktemp("undisturbed") / "run"))


def first_release(run: Run):
    """The noised sum of the first round, whose broadcast nothing that happens to a node can change."""
    return run.releases[min(run.releases)]


@pytest.mark.parametrize(
    ("fault", "answered", "refusals"),
    [
        (Fault.UNREACHABLE, NODES - 1, {"unavailable": 1}),
        (Fault.DROP, NODES - 1, {}),
        (Fault.CORRUPT, NODES - 1, {"sealing": 1}),
        (Fault.LATE, NODES, {}),
        (Fault.DUPLICATE, NODES, {"replayed": 1}),
    ],
)
def test_a_fault_costs_a_node_its_place_in_one_sum_at_most(tmp_path, undisturbed, fault, answered, refusals):
    """The run goes on, the refusal is counted under a public code, and noise, denominator and charge stay."""
    run = run_real(seeded(tmp_path / "run"), faults=in_rounds([1], fault))
    seen = [(entry["answered"], entry["refusals"]) for entry in run.metrics]
    assert seen == [(answered, refusals)] + [(NODES, {})] * (ROUNDS - 1)
    assert charges(run) == charges(undisturbed)
    assert charges(run)[1][0][1] == USERS
    # noise is drawn for the release and not for who is in it: what is missing is that node's sum and nothing else
    missing = first_release(undisturbed) - first_release(run)
    assert missing.any() == (answered < NODES)
    assert sum_is_possible(missing, USERS // NODES, run.layout)


@pytest.mark.parametrize("fault", [Fault.DROP, Fault.UNREACHABLE, Fault.CORRUPT])
def test_a_round_without_an_answer_is_charged_and_the_next_one_goes_on(tmp_path, undisturbed, fault):
    """No release comes of it, the ledger says why, and nodes that had answered into the void are not confused."""
    run = run_real(seeded(tmp_path / "run"), faults=in_rounds([2], fault, range(NODES)))
    with run.ledger() as ledger:
        rounds = ledger.rounds_of(str(run.config.run.name))
    assert [entry.abort_code for entry in rounds] == [None, "no_answer", None]
    assert [entry["answered"] for entry in run.metrics] == [NODES, 0, NODES]
    assert run.metrics[2]["refusals"] == {}
    assert charges(run) == charges(undisturbed)
    assert set(run.releases) == {rounds[0].sequence, rounds[2].sequence}


def test_a_node_that_was_away_for_rounds_follows_the_ledger_again(tmp_path):
    """Unreached in the first two of three rounds, a node verifies all lines since and contributes to the third."""
    run = run_real(seeded(tmp_path / "run"), faults=in_rounds([1, 2], Fault.UNREACHABLE))
    assert [entry["answered"] for entry in run.metrics] == [NODES - 1, NODES - 1, NODES]


Lie = Callable[[Message, Contribution, list[bytes]], bytes]


def changed(contribution: Contribution, **fields: Any) -> bytes:
    """The node's own contribution with other fields."""
    own = {"ledger_id", "sequence", "acknowledged", "total"}
    return Contribution(**{name: getattr(contribution, name) for name in own} | fields).encode()


def entry(value: int) -> Lie:
    """A sum with one entry of this value."""

    def lie(_: Message, contribution: Contribution, __: list[bytes]) -> bytes:
        total = np.zeros_like(contribution.total)
        total[0] = value
        return changed(contribution, total=total)

    return lie


def total(make: Callable[[Any], Any]) -> Lie:
    """Another array in place of the sum."""
    return lambda _, contribution, __: changed(contribution, total=make(contribution.total))


def typed(dtype: str) -> Lie:
    """The sum's bytes under a type that contributions do not have."""

    def lie(_: Message, contribution: Contribution, __: list[bytes]) -> bytes:
        return contribution.encode().replace(b'"<i8"', f'"{dtype}"'.encode())

    return lie


NAME = f"node-{MIDDLE}"
K = 2**30
MOST = USERS // NODES * K
LIES: dict[str, Lie] = {
    "NaN": total(lambda own: np.full(own.size, np.nan)),
    "floats": total(lambda own: own.astype(np.float64)),
    "bytes": total(lambda own: own.view(np.uint8)),
    "integers of 32 bits": typed("<i4"),
    "complex numbers": typed("<c8"),
    "objects": typed("|O"),
    "the other byte order": typed(">i8"),
    "a matrix": total(lambda own: own[None, :]),
    "one number": total(lambda own: own[0]),
    "one number too few": total(lambda own: own[:-1]),
    "nothing": total(lambda own: own[:0]),
    "2^32": entry(2**32 + 1),
    "2^62": entry(2**62),
    "-2^63": entry(-(2**63)),
    "2^63 - 1": entry(2**63 - 1),
    "a clip too long": entry(MOST + 1),
    "a norm too long": total(lambda own: np.full(own.size, MOST // 2)),
    "all of one clip each": total(lambda own: np.full(own.size, -MOST)),
    "a release before": lambda _, own, __: changed(own, sequence=own.sequence - 2),
    "a release to come": lambda _, own, __: changed(own, sequence=own.sequence + 2),
    "another ledger": lambda _, own, __: changed(own, ledger_id="0" * 32),
    "100 MB": total(lambda _: np.zeros(100 * 2**20 // 8, np.int64)),
    "100 MB of nothing": lambda *_: bytes(100 * 2**20),
    "its request": lambda message, _, __: wire.read_request(message)[0],
}


def federation(lie: Callable[[Message, Message, list[bytes]], Message]):
    """The real nodes, of which one changes what it says. It remembers what it has said before."""
    said: list[bytes] = []

    def app(message: Message, context: Context) -> Message:
        reply = real_client_app(message=message, context=context)
        if message.metadata.message_type != "train.contribute" or context.node_config["partition-id"] != MIDDLE:
            return reply
        said.append(opened(wire.read_answer(reply), wire.read_request(message)[0], NAME))
        return lie(message, reply, said)

    return app


def lying(lie: Lie):
    """A federation whose one node sends other bytes."""

    def lied(message: Message, _: Message, said: list[bytes]) -> Message:
        broadcast = Broadcast.decode(wire.read_request(message)[0])
        return wire.answer(enclosed(lie(message, Contribution.decode(said[-1]), said), broadcast, NAME), message)

    return federation(lied)


def noiseless(folder, rounds: int = 1, startup_timeout: float = 120.0):
    """A run whose releases are sums."""
    return seeded(folder, privacy__epsilon="none", training__rounds=rounds, training__startup_timeout=startup_timeout)


def run_lying(config, app) -> Run:
    close_services()
    try:
        return run_app(config, app)
    finally:
        close_services()


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The sum without the node that lies."""
    config = noiseless(tmp_path_factory.mktemp("without") / "run")
    return first_release(run_real(config, faults=in_rounds([1], Fault.UNREACHABLE)))


@pytest.mark.parametrize("name", LIES)
def test_a_sum_that_cannot_be_is_left_out(tmp_path, without, name):
    """Whatever a node sends that no honest node could, the release is that of the others, and the run goes on."""
    run = run_lying(noiseless(tmp_path / "run"), lying(LIES[name]))
    assert np.array_equal(first_release(run), without)
    (round_,) = run.metrics
    assert round_["answered"] == NODES - 1
    assert list(round_["refusals"].values()) == [1]
    assert round_["refusals"].keys() <= {"malformed", "replayed"}


@pytest.mark.parametrize("value", [2**31, -(2**31)])
def test_a_sum_that_could_be_moves_the_release_by_a_clip_for_each_of_its_users_at_most(tmp_path, without, value):
    """What no check can tell from the truth is bounded: one clip for each user of the node that lies."""
    run = run_lying(noiseless(tmp_path / "run"), lying(entry(value)))
    moved = first_release(run) - without
    assert moved[0] == value
    assert sum_is_possible(moved, USERS // NODES, run.layout)


def test_a_replay_of_its_own_earlier_reply_is_left_out(tmp_path):
    """A contribution belongs to the release that it was made for; in the first round there is nothing to replay."""
    run = run_lying(noiseless(tmp_path / "run", rounds=2), lying(lambda _, __, said: said[0]))
    assert [entry["refusals"] for entry in run.metrics] == [{}, {"replayed": 1}]
    assert len(run.releases) == 2


@pytest.mark.parametrize("neighbour", [-1, 1])
def test_a_reply_in_the_name_of_another_node_counts_no_user_twice(tmp_path, neighbour):
    """Flower's SuperLink lets no node answer another's message; if one could, what it sealed does not open as the
    other's, and each invited node counts once at most.
    """

    def forge(message: Message, reply: Message, _: list[bytes]) -> Message:
        run_number, number = message.metadata.message_id.split("-")
        forged = wire.answer(wire.read_answer(reply), message)
        forged.metadata.__dict__["_reply_to_message_id"] = f"{run_number}-{int(number) + neighbour}"
        forged.metadata.__dict__["_src_node_id"] = message.metadata.dst_node_id + neighbour
        return forged

    run = run_lying(noiseless(tmp_path / "run"), federation(forge))
    (round_,) = run.metrics
    # whoever comes first: after the neighbour's own reply it is another one, before it the only one
    answered, refusals = (NODES - 1, {"replayed": 1}) if neighbour < 0 else (NODES - 2, {"sealing": 1})
    assert (round_["answered"], round_["refusals"]) == (answered, refusals)
    assert sum_is_possible(first_release(run), answered * USERS // NODES, run.layout)


def test_a_node_that_sends_no_message_of_ours_is_left_out(tmp_path, without):
    """Records of another shape, and an app that raises, are refusals as well; nothing of their text is kept."""
    for lie in (
        lambda message, *_: Message(message.content, reply_to=message),
        lambda message, *_: wire.refusal("no such code", message),
        lambda message, *_: 1 / 0,
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        run = run_lying(noiseless(folder), federation(lie))
        assert np.array_equal(first_release(run), without)
        assert list(run.metrics[0]["refusals"].values()) == [1]


def test_an_identity_that_is_no_record_is_not_invited(tmp_path):
    """A node that says who it is in bytes that are none is a stranger, and the others train."""

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.identity" and context.node_config["partition-id"] == MIDDLE:
            return wire.answer(encode({"name": ["node-1"]}, {}) + b"x" + UNSIGNED, message)
        return real_client_app(message=message, context=context)

    run = run_lying(noiseless(tmp_path / "run", startup_timeout=0.5), app)
    assert run.metrics[0]["invited"] == NODES - 1
    assert charges(run)[1][0][1] == USERS - USERS // NODES


@pytest.mark.parametrize("fault", [Fault.UNREACHABLE, Fault.DROP, Fault.CORRUPT])
def test_a_node_that_did_not_say_its_name_is_asked_again(tmp_path, fault):
    """What goes wrong once at the start costs no node its place in the run."""
    asked: list[int] = []

    def once(node_id: int, message: Message) -> Fault | None:
        first = message.metadata.message_type == "query.identity" and node_id not in asked
        asked.append(node_id)
        return fault if first and node_id - 2 == MIDDLE else None

    run = run_real(noiseless(tmp_path / "run"), faults=once)
    assert [(entry["invited"], entry["answered"]) for entry in run.metrics] == [(NODES, NODES)]


def test_a_run_that_finds_no_node_says_what_they_answer(tmp_path):
    """Nothing is charged, and the error names the public codes."""
    config = noiseless(tmp_path / "run", startup_timeout=0.3)
    with pytest.raises(UmbelError, match=r"got none that answers: busy, storage\."):
        run_lying(config, lambda message, context: wire.refusal(["busy", "storage"][context.node_id % 2], message))
    assert b"RESERVE" not in (tmp_path / "run" / "ledger.jsonl").read_bytes()


def test_what_a_node_hears_is_the_same_for_all(tmp_path):
    """One broadcast for all nodes of a round: nothing in it depends on who it goes to."""
    heard: dict[int, set[bytes]] = {}

    def app(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.contribute":
            payload, _ = wire.read_request(message)
            heard.setdefault(Broadcast.decode(payload).server_round, set()).add(payload)
        return real_client_app(message=message, context=context)

    run_lying(noiseless(tmp_path / "run", rounds=2), app)
    assert [len(payloads) for payloads in heard.values()] == [1, 1]
