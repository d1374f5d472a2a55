"""A resident node outlives its server, answers what it has begun, and ends when it should."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from client import loop as module
from client.loop import Forgotten, Loop, NotAdmitted, Occupied, Pace, Rejected, RunOver, Unreachable, delay_of
from client.status_file import StatusFile, read_status, status_path
from common.errors import UmbelError

PACE = Pace(poll=0.001, heartbeat=0.01, drain=0.3)


@dataclass(frozen=True)
class Message:
    """A message that is worth answering for `seconds`."""

    number: int
    expires: float = float("inf")
    action: str = "train.contribute"


@dataclass
class Server:
    """A link that fails as scripted: of each call the next entry of its script is raised, if it is an exception."""

    messages: list[Message] = field(default_factory=list)
    script: dict[str, list[Exception | None]] = field(default_factory=dict)
    answered: list[int] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    computing: Callable[[], None] = lambda: None

    def _next(self, name: str) -> None:
        self.calls.append(name)
        entries = self.script.get(name, [])
        if entries and (error := entries.pop(0)) is not None:
            raise error

    def connect(self) -> int:
        self._next("connect")
        return 7

    def heartbeat(self) -> None:
        self._next("heartbeat")

    def pull(self) -> Message | None:
        self._next("pull")
        return self.messages.pop(0) if self.messages else None

    def fetch(self, work: Message) -> int:
        self._next("fetch")
        return work.number

    def compute(self, request: int) -> int:
        self.calls.append("compute")
        self.computing()
        return request

    def push(self, work: Message, reply: int) -> None:
        self._next("push")
        self.answered.append(reply)

    def code_of(self, reply: int) -> str | None:
        return None if reply else "busy"

    def disconnect(self) -> None:
        self.calls.append("disconnect")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for half a minute."""
    monkeypatch.setattr(module, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(module, "_LONGEST_DELAY", 0.002)


def serve(server: Server, *, status: Path | None = None, until: Callable[[], bool] | None = None, **run: Any) -> None:
    """Run a loop to its end, by `until` where it would not end by itself."""
    made: Loop[Message] = Loop(server, PACE, StatusFile(status), lambda: {"acknowledged": 3})
    if until is not None:
        threading.Thread(target=lambda: (wait_for(until), made.stop()), daemon=True).start()
    made.run(**run)


def wait_for(true: Callable[[], bool]) -> None:
    """Until `true` is."""
    end = time.monotonic() + 10
    while not true() and time.monotonic() < end:
        time.sleep(0.001)


def test_all_that_waits_is_answered_in_order() -> None:
    """With `once` the node ends when nothing waits any more."""
    server = Server([Message(1), Message(2), Message(3)])
    serve(server, once=True)
    assert server.answered == [1, 2, 3]
    assert server.calls[0] == "connect"
    assert server.calls[-1] == "disconnect"


@pytest.mark.parametrize("call", ["connect", "pull", "fetch", "push"])
def test_a_server_that_is_away_for_a_while_is_waited_for(call: str) -> None:
    """Whatever the node was doing: nothing is computed twice, and every message is answered."""
    away: list[Exception | None] = [None] if call != "connect" else []
    server = Server([Message(1), Message(2)], {call: [*away, *[Unreachable("down")] * 20]})
    serve(server, until=lambda: len(server.answered) == 2)
    assert server.answered == [1, 2]
    assert server.calls.count("compute") == 2


def test_a_run_that_has_ended_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """Neither when its message is fetched nor when the reply is sent."""
    server = Server([Message(1), Message(2), Message(3)], {"fetch": [RunOver()], "push": [RunOver()]})
    with caplog.at_level("WARNING", "umbel.node"):
        serve(server, once=True)
    assert server.answered == [3]
    assert not caplog.records


def test_a_reply_that_is_refused_for_good_is_given_up() -> None:
    """The next message is served."""
    server = Server([Message(1), Message(2)], {"push": [Rejected("HTTP status 413")]})
    serve(server, once=True)
    assert server.answered == [2]


def test_nobody_is_answered_after_the_deadline() -> None:
    """A server that comes back when the message has expired gets no reply to it."""
    server = Server([Message(1, time.time() + 0.05), Message(2)], {"push": [Unreachable("down")] * 10**6})
    serve(server, until=lambda: server.calls.count("compute") == 2)
    assert server.calls.count("compute") == 2  # the next message is not kept waiting
    assert server.answered == []


def test_a_server_that_has_forgotten_the_node_is_told_again() -> None:
    """By the answer to a question for work, or to a sign of life."""
    server = Server(script={"pull": [None, Forgotten()], "heartbeat": [None, Forgotten()]})
    serve(server, until=lambda: server.calls.count("connect") >= 3)
    assert server.calls.count("connect") >= 3


def test_signs_of_life_go_on_while_a_message_is_computed() -> None:
    """Or the server would take the node for dead and drop what it is waiting for."""
    server = Server([Message(1)], {"heartbeat": [Unreachable("down"), RuntimeError("x")]})
    server.computing = lambda: wait_for(lambda: server.calls.count("heartbeat") >= 4)
    serve(server, until=lambda: server.answered == [1])
    between = server.calls[server.calls.index("compute") : server.calls.index("push")]
    assert between.count("heartbeat") >= 4


def test_a_node_that_is_told_to_end_finishes_its_message() -> None:
    """It sends the reply, takes no other message, and says good-bye."""
    server = Server([Message(1), Message(2)])
    made: Loop[Message] = Loop(server, PACE, StatusFile(None), dict)
    server.computing = made.stop
    made.run()
    assert server.answered == [1]
    assert server.messages == [Message(2)]
    assert server.calls[-1] == "disconnect"


def test_a_node_that_is_told_to_end_does_not_wait_for_ever() -> None:
    """A reply that cannot be sent within the limit is given up."""
    server = Server([Message(1)], {"push": [Unreachable("down")] * 10**6})
    made: Loop[Message] = Loop(server, PACE, StatusFile(None), dict)
    server.computing = made.stop
    begun = time.monotonic()
    made.run()
    assert 0.25 < time.monotonic() - begun < 5
    assert server.answered == []


def test_a_predecessor_is_waited_for_and_a_stranger_is_not_admitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server refuses an unregistered key as it does one that it thinks is connected: time tells."""
    monkeypatch.setattr(module.random, "uniform", lambda *_: 0.001)
    server = Server(script={"connect": [Occupied(), Occupied()]})
    serve(server, until=lambda: server.calls.count("pull") > 0)
    assert server.calls[:4] == ["connect"] * 3 + ["pull"]
    monkeypatch.setattr(module, "_ADMISSION_PATIENCE", 0.05)
    with pytest.raises(NotAdmitted) as refused:
        serve(Server(script={"connect": [Occupied()] * 10**6}))
    assert refused.value.exit_code == 6


def test_a_refused_signature_ends_the_node_at_once() -> None:
    """Waiting does not help."""
    with pytest.raises(NotAdmitted):
        serve(Server(script={"connect": [NotAdmitted("no")]}))


def test_once_says_that_the_server_is_away() -> None:
    """Whoever runs it from a timer wants to know."""
    with pytest.raises(UmbelError, match="Expected to reach the server, got: down"):
        serve(Server(script={"pull": [Unreachable("down")]}), once=True)


def test_a_failure_that_nobody_foresaw_does_not_end_the_node(caplog: pytest.LogCaptureFixture) -> None:
    """The messages after it are answered."""
    server = Server([Message(1), Message(2)], {"fetch": [KeyError("x")]})
    serve(server, until=lambda: server.answered == [2])
    assert server.answered == [2]
    assert "not foreseen" in caplog.text


def test_delays_double_up_to_a_limit_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thousand nodes do not come back in the same second."""
    monkeypatch.undo()
    longest = [max(delay_of(attempt) for _ in range(200)) for attempt in range(12)]
    assert longest == sorted(longest) or longest[-1] > 25
    assert 0.25 < longest[0] <= 0.5
    assert max(longest) <= 30
    assert len({delay_of(5) for _ in range(20)}) == 20


def test_the_status_file_says_how_the_node_is(tmp_path: Path) -> None:
    """For its owner alone, and without a word about users."""
    store = str(tmp_path / "node.sqlite")
    server = Server([Message(1)], {"pull": [Unreachable("down")]})
    seen: list[str] = []
    server.computing = lambda: seen.append(str((read_status(store) or {})["state"]))
    serve(server, status=status_path(store), until=lambda: server.answered == [1])
    status = read_status(store)
    assert status is not None
    assert (status["state"], status["node_id"], status["acknowledged"]) == ("stopped", 7, 3)
    assert status["last_answer"] <= time.time()
    assert seen == ["running"]
    assert (tmp_path / "status.json").stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["status.json"]
    assert json.loads((tmp_path / "status.json").read_text()) == status


def test_a_disk_that_fails_is_no_reason_to_end(tmp_path: Path) -> None:
    """The status file is for information."""
    server = Server([Message(1)])
    serve(server, status=tmp_path / "missing" / "status.json", once=True)
    assert server.answered == [1]
    assert status_path(":memory:") is None
    assert read_status(str(tmp_path / "node.sqlite")) is None


def test_a_status_is_written_seldom_while_nothing_happens(tmp_path: Path) -> None:
    """A device's flash wears out; a node asks for work every second."""
    path = tmp_path / "status.json"
    status = StatusFile(path)
    written = []
    for _ in range(50):
        status.note("running", dict)
        written.append(path.stat().st_mtime_ns)
    assert len(set(written)) == 1
    status.note("away", dict)
    assert path.stat().st_mtime_ns != written[0]
