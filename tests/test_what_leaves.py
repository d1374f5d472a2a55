"""Every field of every Flower message that leaves a node, listed: names, types and shapes, whatever the data are.

A field that is new has to be put here by somebody who thinks about it.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message
from flwr.common.serde import message_to_proto, recorddict_to_proto

import client.service
from client.app import app as real_client_app
from client.app import close_services
from client.service import NodeService
from common import wire
from common.data import DataSchema, Population
from common.errors import REFUSALS, Refused, StorageError, UmbelError
from common.records import decode
from common.sealing import SIGNATURE_BYTES
from privacy.layout import layout_of_event
from privacy.lines import parse_line
from server.settings import RunFolder
from tests.federation import Run, configuration, opened, prepare, run_real
from tests.populations import draw_model, draw_users, population_of, schema_of
from tests.reference import User
from umbel.inprocess import InProcessGrid, partitions

# What a node puts into the header and the arrays of its payload, by what it was asked for; a dtype for each array.
HEADERS = {
    "query.identity": {"protocol": int, "name": str, "users": int},
    "train.contribute": {"protocol": int, "ledger_id": str, "sequence": int, "acknowledged": int},
    "train.fold_in": {"protocol": int, "acknowledged": int},
}
ARRAYS = {"query.identity": {}, "train.contribute": {"total": "<i8"}, "train.fold_in": {}}
# What Flower puts around it. The first row repeats the request; the rest is a number of the message, the time, and
# how long the message is kept.
METADATA = {
    *("run_id", "src_node_id", "dst_node_id", "reply_to_message_id", "group_id", "message_type"),
    *("src_task_id", "dst_task_id"),
    *("message_id", "created_at", "ttl"),
}
AMHT = {"training__algorithm": "amht-lrs", "training__rounds": 3}
SAMPLED = {"privacy__epsilon": 4.0, "privacy__seed": None, "privacy__sampling_probability": "0.5"}
RUNS = {
    "squared": {},
    "logistic": {"model__family": "logistic"},
    "noised": {"privacy__epsilon": 4.0, "privacy__seed": None},
    "sampled": SAMPLED,
    "amht-lrs": AMHT,
}
TEXT = "user-7 has 7919.125"


@dataclass(frozen=True)
class Exchange:
    """A request and what a node answered."""

    request: Message
    reply: Message
    context: Context

    @property
    def action(self) -> str:
        return str(self.request.metadata.message_type)

    @property
    def payload(self) -> bytes:
        found = wire.read_answer(self.reply)
        assert isinstance(found, bytes)
        return found


Data = tuple[Population, DataSchema]


class Recorder:
    """Runs the real apps, each run in a folder of its own, and keeps what passes between them."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.runs = folder, 0
        self.exchanges: list[Exchange] = []
        patch.setattr("tests.federation.real_client_app", self.app)

    def app(self, message: Message, context: Context) -> Message:
        reply = real_client_app(message=message, context=context)
        self.exchanges.append(Exchange(message, reply, context))
        return reply

    def run(self, data: Data | None = None, **settings: Any) -> Run:
        self.runs, self.exchanges = self.runs + 1, []
        return run_real(prepare(configuration(self.folder / str(self.runs), **settings)), data=data)

    def sizes(self) -> dict[str, list[int]]:
        """Bytes of every message on its way to the server, by what was asked."""
        found: dict[str, list[int]] = {action: [] for action in HEADERS}
        for exchange in self.exchanges:
            found[exchange.action].append(len(message_to_proto(exchange.reply).SerializeToString()))
        return found


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(tmp_path, monkeypatch)


def check_envelope(exchange: Exchange) -> None:
    """Flower's own fields: nothing in them comes from a node."""
    request, reply = exchange.request.metadata, exchange.reply.metadata
    proto = message_to_proto(exchange.reply)
    assert {field.name for field in proto.metadata.DESCRIPTOR.fields} == METADATA
    assert {field.name for field in proto.DESCRIPTOR.fields} == {"metadata", "content", "error"}
    assert (reply.run_id, reply.group_id, reply.message_type) == (
        request.run_id,
        request.group_id,
        request.message_type,
    )
    assert (reply.src_node_id, reply.dst_node_id) == (request.dst_node_id, request.src_node_id)
    assert reply.reply_to_message_id == request.message_id
    assert 0 < reply.ttl <= request.ttl
    assert (reply.src_task_id, reply.dst_task_id) == (request.dst_task_id, request.src_task_id) or not reply.src_task_id
    assert not exchange.context.state


def check_content(exchange: Exchange) -> tuple[dict[str, Any], dict[str, Any]]:
    """One array of bytes in one record, and in the bytes what is listed and nothing else."""
    content = exchange.reply.content
    assert not exchange.reply.has_error()
    assert list(content) == ["payload"]
    record = content["payload"]
    assert isinstance(record, ArrayRecord)
    assert list(record) == ["payload"]
    array = record["payload"]
    assert isinstance(array, Array)
    assert (array.dtype, array.shape, array.stype) == ("uint8", (len(array.data),), "bytes")
    assert (list(content.metric_records), list(content.config_records)) == ([], [])
    said = array.data
    if exchange.action == "query.identity":
        said = said[:-SIGNATURE_BYTES]
    if exchange.action == "train.contribute":
        name = f"node-{exchange.context.node_config['partition-id']}"
        said = opened(said, wire.read_request(exchange.request)[0], name)
    header, arrays = decode(said)
    assert {name: type(value) for name, value in header.items()} == HEADERS[exchange.action]
    assert {name: value.dtype.str for name, value in arrays.items()} == ARRAYS[exchange.action]
    return header, arrays


@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS.keys())
def test_what_leaves_a_node_is_listed(recorder, settings):
    """In whole runs of every kind, each reply has the listed fields, of public values but for one sum of integers."""
    run = recorder.run(**settings)
    assert {exchange.action for exchange in recorder.exchanges} == set(HEADERS)
    for exchange in recorder.exchanges:
        check_envelope(exchange)
        header, arrays = check_content(exchange)
        if exchange.action == "query.identity":
            assert header["name"] in ("node-0", "node-1")
            assert header["users"] == 6
        if exchange.action == "train.contribute":
            asked = run.broadcasts[header["sequence"]]
            event = parse_line(asked.lines[-1].encode()).body["event"]
            assert arrays["total"].shape == (layout_of_event(event).size,)
            assert (header["ledger_id"], header["acknowledged"]) == (asked.ledger_id, header["sequence"])
        if exchange.action == "train.fold_in":
            with run.ledger() as ledger:
                assert header["acknowledged"] == ledger.sequence


@pytest.mark.parametrize(
    "error",
    [
        ValueError(TEXT),
        MemoryError(TEXT),
        Refused(TEXT, TEXT),
        Refused("policy_shape", TEXT),
        StorageError(TEXT),
        ExceptionGroup(TEXT, [KeyError(TEXT)]),
        type(TEXT, (Exception,), {})(TEXT),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("place", ["contribute", "identity", "fold_in", "__init__"])
def test_a_failure_leaves_as_one_public_code(recorder, tmp_path, monkeypatch, error, place):
    """Neither text nor type of an exception is anywhere in what is sent, wherever in a node it was raised."""

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    monkeypatch.setattr(NodeService, place, fail)
    folder = RunFolder(root=Path(str(prepare(configuration(tmp_path)).run.out)))
    close_services()
    with InProcessGrid(
        recorder.app, partitions(1, {"node-config": str(folder.nodes / "node.toml")}), run_config={}
    ) as grid:
        actions = HEADERS if place == "__init__" else [action for action in HEADERS if action.endswith(place)]
        grid.send_and_receive([wire.request(b"", bytes(64), node_id=2, action=action, ttl=9.0) for action in actions])
    close_services()
    assert len(recorder.exchanges) == len(actions)
    for exchange in recorder.exchanges:
        check_envelope(exchange)
        sent = message_to_proto(exchange.reply).SerializeToString()
        assert b"7919.125" not in sent
        assert b"user-7" not in sent
        assert type(error).__name__.encode() not in sent
        assert not exchange.reply.has_error()
        assert list(exchange.reply.content) == ["refusal"]
        record = exchange.reply.content["refusal"]
        assert isinstance(record, ConfigRecord)
        assert list(record) == ["code"]
        assert record["code"] in REFUSALS


def ordinary(count: int) -> list[User]:
    rng = np.random.default_rng(0)
    return draw_users(rng, draw_model(rng, 4, 1), [3] * count)


def changed(users: Sequence[User], which: Sequence[int], **arrays: Any) -> list[User]:
    return [replace(user, **arrays) if i in which else user for i, user in enumerate(users)]


def long(count: int) -> dict[str, Any]:
    return {"X": np.full((count, 4), 0.7), "y": np.full(count, -1.0), "weight": np.ones(count)}


TWO, EVERYBODY = (1, 4), range(6)
POPULATIONS = {
    "ordinary": ordinary(6),
    "one user without data": changed(ordinary(1), (0,), **long(0)),
    "nobody has data": changed(ordinary(6), EVERYBODY, **long(0)),
    "NaN": changed(ordinary(6), TWO, X=np.full((3, 4), np.nan)),
    "nothing but NaN": changed(ordinary(6), EVERYBODY, y=np.full(3, np.nan)),
    "infinite": changed(ordinary(6), TWO, y=np.full(3, np.inf)),
    "extreme": changed(ordinary(6), EVERYBODY, X=np.full((3, 4), 1e300), y=np.full(3, -1e300)),
    "all zero": changed(ordinary(6), EVERYBODY, X=np.zeros((3, 4)), y=np.zeros(3)),
    "many rows": changed(ordinary(6), TWO, **long(5000)),
    "many users with extreme data": changed(ordinary(90), range(90), X=np.full((3, 4), 1e12), y=np.full(3, 1e12)),
}
KINDS = {
    "noiseless": {},
    "noised": {"privacy__epsilon": 4.0, "privacy__seed": None},
    "spent filters": {"privacy__epsilon": 4.0, "privacy__seed": None},
    "amht-lrs": AMHT,
    "logistic": {"model__family": "logistic"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_messages_are_of_one_size_whatever_the_data(recorder, monkeypatch, kind):
    """No data, NaN, extreme values, many rows and spent filters: the same bytes in number, from all nodes."""
    found = {}
    if kind == "spent filters":
        monkeypatch.setattr(client.service, "limit_units", lambda _: 0)
    for name, users in POPULATIONS.items():
        if kind == "logistic":
            users = [replace(user, y=np.where(np.isnan(user.y), np.nan, user.y > 0)) for user in users]  # noqa: PLW2901
        one_node = {"training__nodes": 1, "data__synthetic__users": len(users)}
        recorder.run(
            (population_of(users), schema_of(4, bound=10.0, target_range=(-9.0, 9.0))), **KINDS[kind], **one_node
        )
        sizes = recorder.sizes()
        found[name] = (tuple(sizes["train.contribute"]), tuple(sizes["train.fold_in"]), len(sizes["query.identity"]))
        # a round after the other, of one size where they are of one kind
        assert len(set(sizes["train.contribute"])) == (2 if kind == "amht-lrs" else 1)
    assert set(found.values()) == {found["ordinary"]}


def test_a_refusal_is_the_same_bytes_whatever_the_data(recorder, monkeypatch):
    """A request that is not signed is refused before a user is looked at: one code, from every node alike."""
    found = set()

    def forged(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train.contribute":
            payload, signature = wire.read_request(message)
            message.content["payload"] = wire.answer(payload + signature[::-1], message).content["payload"]
        reply = recorder.app(message, context)
        if "refusal" in reply.content:
            found.add(recorddict_to_proto(reply.content).SerializeToString(deterministic=True))
        return reply

    monkeypatch.setattr("tests.federation.real_client_app", forged)
    for users in POPULATIONS.values():
        one_node = {"training__nodes": 1, "data__synthetic__users": len(users)}
        with suppress(UmbelError):
            recorder.run((population_of(users), schema_of(4)), training__rounds=1, **one_node)
    assert len(found) == 1
    assert b"signature" in found.pop()
