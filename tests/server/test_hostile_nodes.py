"""A node that misbehaves costs its own users their place in the sum, and nobody else anything."""

import struct

import numpy as np
import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common import wire
from common.records import Broadcast, Contribution, encode
from tests.federation import configuration, enclosed, introduced, prepare, run_app
from umbel.inprocess import Fault

ROUNDS = 3
USERS = 6
SIZE = 4 * 2 + 5


def honest_total(value: int = 1000) -> np.ndarray:
    return np.full(SIZE, value, np.int64)


def sequence_of(broadcast: Broadcast) -> int:
    return int(broadcast.lines[-1].split('"sequence":')[1].split(",")[0])


def federation_of(reply_of_second):
    """Two nodes: the first is honest, the second answers with the bytes of `reply_of_second(broadcast, sequence)`."""
    app = ClientApp()

    @app.query("identity")
    def identity(message: Message, context: Context) -> Message:
        return wire.answer(introduced(f"node-{context.node_config['partition-id']}", USERS), message)

    @app.train("contribute")
    def contribute(message: Message, context: Context) -> Message:
        broadcast = Broadcast.decode(wire.read_request(message)[0])
        sequence = sequence_of(broadcast)
        if context.node_config["partition-id"] == 0:
            reply = Contribution(
                ledger_id=broadcast.ledger_id, sequence=sequence, acknowledged=sequence, total=honest_total()
            )
            return wire.answer(enclosed(reply.encode(), broadcast, "node-0"), message)
        return wire.answer(enclosed(reply_of_second(broadcast, sequence), broadcast, "node-1"), message)

    @app.train("fold_in")
    def fold_in(message: Message, _: Context) -> Message:
        return wire.answer(b"whatever", message)

    return app


def contribution(broadcast, sequence, **changes):
    fields = {"ledger_id": broadcast.ledger_id, "sequence": sequence, "acknowledged": sequence, "total": honest_total()}
    return Contribution(**(fields | changes)).encode()


def raw(text: bytes, rest: bytes = b"") -> bytes:
    """A record's frame around any header."""
    return encode({}, {})[:8] + struct.pack("<I", len(text)) + text + rest


REFUSED = {
    "no bytes": lambda b, s: b"",
    "noise": lambda b, s: bytes(range(256)),
    "a shape beyond 64 bits": lambda b, s: raw(b'{"arrays":{"total":["<i8",[4294967296,4294967296]]},"header":{}}'),
    "a deep header": lambda b, s: raw(b"[" * 100_000),
    "no fields": lambda b, s: encode({}, {}),
    "a text for a number": lambda b, s: encode(
        {"protocol": 1, "ledger_id": b.ledger_id, "sequence": "x", "acknowledged": 0}, {"total": honest_total()}
    ),
    "another ledger": lambda b, s: contribution(b, s, ledger_id="another"),
    "another release": lambda b, s: contribution(b, s - 1),
    "a release to come": lambda b, s: contribution(b, s + 1),
    "too long a sum": lambda b, s: contribution(b, s, total=honest_total(2**62)),
    "one step too long": lambda b, s: contribution(b, s, total=np.eye(SIZE, dtype=np.int64)[0] * (USERS * 2**30 + 1)),
    "another shape": lambda b, s: contribution(b, s, total=np.zeros(SIZE + 1, np.int64)),
    "floats": lambda b, s: contribution(b, s, total=np.zeros(SIZE)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_replies_that_cannot_be_honest_are_left_out(tmp_path, name):
    """The round goes on with the other nodes, the refusal is counted under a code, and the charge stands."""
    config = prepare(configuration(tmp_path / "run", training__rounds=ROUNDS))
    run = run_app(config, federation_of(REFUSED[name]))
    assert [release.tolist() for release in run.releases.values()] == [honest_total().tolist()] * ROUNDS
    assert [metric["answered"] for metric in run.metrics] == [1] * ROUNDS
    assert all(sum(metric["refusals"].values()) == 1 for metric in run.metrics)
    with run.ledger() as ledger:
        assert len(ledger.events()) == ROUNDS


@pytest.mark.parametrize("acknowledged", [-1, -2, -(10**30), 10**30])
def test_a_false_acknowledgement_does_not_stop_the_run(tmp_path, acknowledged):
    """What a node claims to have verified decides which digests it is sent, and nothing else; no claim is fatal."""
    config = prepare(configuration(tmp_path / "run", training__rounds=ROUNDS))
    run = run_app(config, federation_of(lambda b, s: contribution(b, s, acknowledged=acknowledged)))
    assert len(run.releases) == ROUNDS
    assert all(release[0] in (1000, 2000) for release in run.releases.values())


def test_a_node_that_has_lost_its_store_is_told_the_whole_ledger_again(tmp_path):
    """It says that lines are missing, and counts again in the next round of the same run."""
    app, gaps = federation_of(contribution), []

    def forgetful(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.contribute" and context.node_config["partition-id"] == 1:
            broadcast = Broadcast.decode(wire.read_request(message)[0])
            if broadcast.server_round > 1 and broadcast.digests_from > 0:
                gaps.append(broadcast.server_round)
                return wire.refusal("ledger_gap", message)
        return app(message=message, context=context)

    config = prepare(configuration(tmp_path / "run", training__rounds=3))
    run = run_app(config, forgetful)
    assert gaps == [2]
    assert [metric["answered"] for metric in run.metrics] == [2, 1, 2]


def test_a_name_is_taken_once(tmp_path):
    """Two connections that give one registered name are not both invited: users would be counted twice."""
    app = federation_of(contribution)

    def impostor(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query.identity":
            return wire.answer(introduced("node-0", USERS), message)
        return app(message=message, context=context)

    config = prepare(configuration(tmp_path / "run", training__rounds=1, training__startup_timeout=0.5))
    run = run_app(config, impostor)
    with run.ledger() as ledger:
        (event,) = ledger.events()
    assert event["denominator"] == USERS
    assert run.metrics[0]["invited"] == 1


@pytest.mark.parametrize("fault", [Fault.UNREACHABLE, Fault.DROP, Fault.CORRUPT])
def test_faults_on_the_way_are_dropouts(tmp_path, fault):
    """A node that is not reached, or whose reply is lost or changed, is missing from the sum alone."""

    def faults(node_id: int, message: Message) -> Fault | None:
        hit = message.metadata.message_type == "train.contribute" and node_id == 3
        return fault if hit else None

    config = prepare(configuration(tmp_path / "run", training__rounds=1, training__round_timeout=1.0))
    run = run_app(config, federation_of(contribution), faults)
    assert [release.tolist() for release in run.releases.values()] == [honest_total().tolist()]
    with run.ledger() as ledger:
        assert ledger.events()[0]["denominator"] == 2 * USERS
