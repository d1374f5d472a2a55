"""The grid in this process carries messages as Flower would, in one order, whatever goes wrong."""

import threading
from collections.abc import Iterator

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common import wire
from umbel.inprocess import Fault, InProcessGrid, partitions, run_server_app

SIGNATURE = bytes(64)


def echo_app() -> ClientApp:
    """Answers with its partition and how often it was called in this run."""
    app = ClientApp()

    @app.train("contribute")
    def contribute(message: Message, context: Context) -> Message:
        calls = int(str(context.state.config_records.get("calls", ConfigRecord({"n": 0}))["n"])) + 1
        context.state["calls"] = ConfigRecord({"n": calls})
        payload, _ = wire.read_request(message)
        return wire.answer(payload + f":{context.node_config['partition-id']}:{calls}".encode(), message)

    return app


def ask(grid: Grid, payload: bytes = b"x") -> list[Message]:
    return [
        wire.request(payload, SIGNATURE, node_id=node, action="train.contribute", ttl=60.0)
        for node in grid.get_node_ids()
    ]


def payloads(replies: list[Message]) -> list[bytes | wire.Refusal]:
    return [wire.read_answer(reply) for reply in replies]


def grid_of(app: ClientApp, num_nodes: int = 3, **options: object) -> InProcessGrid:
    return InProcessGrid(app, partitions(num_nodes), run_config={}, **options)  # type: ignore[arg-type]


@pytest.fixture
def grid() -> Iterator[InProcessGrid]:
    with grid_of(echo_app()) as made:
        yield made


def test_every_node_answers_in_order(grid: InProcessGrid) -> None:
    """Replies come in the order of sending and name the message they answer."""
    messages = ask(grid)
    replies = grid.send_and_receive(messages)
    assert payloads(replies) == [b"x:0:1", b"x:1:1", b"x:2:1"]
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert [r.metadata.src_node_id for r in replies] == [2, 3, 4]


def test_the_order_does_not_depend_on_threads() -> None:
    """The slowest node, here the first, which waits for the last, still comes first."""
    last = threading.Event()
    app = ClientApp()

    @app.train("contribute")
    def contribute(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] == 2:
            last.set()
        else:
            assert last.wait(timeout=60)
        return wire.answer(str(context.node_config["partition-id"]).encode(), message)

    with grid_of(app, workers=3) as grid:
        assert payloads(grid.send_and_receive(ask(grid))) == [b"0", b"1", b"2"]


def test_a_node_works_on_one_message_at_a_time() -> None:
    """Messages to one node are answered one after the other, in the order of sending, also with threads."""
    seen: list[bytes] = []
    meeting = threading.Barrier(2)
    app = ClientApp()

    @app.train("contribute")
    def contribute(message: Message, _: Context) -> Message:
        seen.append(wire.read_request(message)[0])
        with pytest.raises(threading.BrokenBarrierError):
            meeting.wait(timeout=0.2)  # a second call at the same time would meet the first here
        return wire.answer(b"", message)

    with grid_of(app, num_nodes=1, workers=4) as grid:
        messages = [message for number in range(20) for message in ask(grid, bytes([number]))]
        assert payloads(grid.send_and_receive(messages)) == [b""] * 20
    assert seen == [bytes([number]) for number in range(20)]


def test_a_pull_gives_each_reply_once(grid: InProcessGrid) -> None:
    """Pulling until all have come yields every reply once; asking again or for strangers yields nothing."""
    ids = grid.push_messages(ask(grid))
    replies: list[Message] = []
    while len(replies) < 3:
        replies += grid.pull_messages(set(ids))
    assert payloads(replies) == [b"x:0:1", b"x:1:1", b"x:2:1"]
    assert grid.pull_messages([*ids, "unknown"]) == []


def test_only_what_is_asked_for_is_pulled(grid: InProcessGrid) -> None:
    """A pull for one message leaves the others for later."""
    ids = grid.push_messages(ask(grid))
    assert payloads(grid.pull_messages(ids[1:2])) == [b"x:1:1"]
    assert payloads(grid.pull_messages(ids[2:])) == [b"x:2:1"]


def test_a_context_lives_as_long_as_the_run(grid: InProcessGrid) -> None:
    """A node's second message finds the state that the first has left, and no other node's."""
    grid.send_and_receive(ask(grid))
    assert payloads(grid.send_and_receive(ask(grid)[:2])) == [b"x:0:2", b"x:1:2"]


def test_a_node_has_its_own_configuration_and_that_of_the_run() -> None:
    """Node and run configuration reach the app as given, and a node cannot change the run's for others."""
    found: list[tuple[object, object]] = []
    app = ClientApp()

    @app.train("contribute")
    def contribute(message: Message, context: Context) -> Message:
        found.append((dict(context.node_config), dict(context.run_config)))
        context.run_config["config"] = "changed"
        return wire.answer(b"", message)

    nodes = partitions(2, {"node-config": "node.toml"})
    with InProcessGrid(app, nodes, run_config={"config": "run.toml"}) as grid:
        grid.send_and_receive(ask(grid))
    expected = {"num-partitions": 2, "node-config": "node.toml"}
    assert found == [({"partition-id": part, **expected}, {"config": "run.toml"}) for part in range(2)]


def test_nodes_cannot_change_each_others_messages() -> None:
    """Two messages that share their content arrive untouched even when the first node writes into its own."""
    app = ClientApp()

    @app.train("contribute")
    def contribute(message: Message, _: Context) -> Message:
        payload, _ = wire.read_request(message)
        message.content["payload"]["payload"].data = b"spoilt"  # type: ignore[union-attr]
        message.content.clear()
        return wire.answer(payload, message)

    with grid_of(app, num_nodes=2) as grid:
        first, second = ask(grid)
        shared = Message(first.content, second.metadata.dst_node_id, "train.contribute")
        assert payloads(grid.send_and_receive([first, shared])) == [b"x", b"x"]
        assert wire.read_request(first) == (b"x", SIGNATURE)


def test_the_text_of_an_exception_stays_on_the_node() -> None:
    """A raising app is a failed reply with the exception's type and none of its text."""
    app = ClientApp()

    @app.train("contribute")
    def contribute(message: Message, context: Context) -> Message:
        raise RuntimeError("user 17 earns 1234")

    with grid_of(app, num_nodes=1) as grid:
        [reply] = grid.send_and_receive(ask(grid))
    assert reply.error.reason == "RuntimeError"
    assert "1234" not in repr(reply)
    assert wire.read_answer(reply) == wire.Refusal(code="client_error")


def faulty(fault: Fault) -> InProcessGrid:
    """Three nodes of which the second, number 3, has a fault."""
    return grid_of(echo_app(), faults=lambda node_id, _: fault if node_id == 3 else None)


def test_an_unreachable_node_is_reported() -> None:
    """Flower's own error comes at once and the node has not been called."""
    with faulty(Fault.UNREACHABLE) as grid:
        replies = payloads(grid.send_and_receive(ask(grid)))
        assert replies == [b"x:0:1", wire.Refusal(code="unavailable"), b"x:2:1"]
        assert not grid._contexts.get(3)


def test_an_unknown_node_is_unreachable(grid: InProcessGrid) -> None:
    """A message to a number that no node has is answered as one to a node that is away."""
    message = wire.request(b"", SIGNATURE, node_id=99, action="train.contribute", ttl=1.0)
    assert payloads(grid.send_and_receive([message])) == [wire.Refusal(code="unavailable")]


def test_a_dropped_reply_never_comes() -> None:
    """The others do, and the node has worked all the same."""
    with faulty(Fault.DROP) as grid:
        ids = grid.push_messages(ask(grid))
        assert payloads(grid.pull_messages(ids[1:2])) == []
        assert payloads(grid.pull_messages(ids[1:2])) == []
        assert payloads(grid.send_and_receive(ask(grid)[:1])) == [b"x:0:2"]
        assert grid._contexts[3].state.config_records["calls"] == {"n": 1}


def test_a_late_reply_comes_with_the_next_pull() -> None:
    """One pull goes without it, the next has it."""
    with faulty(Fault.LATE) as grid:
        [_, late, _] = grid.push_messages(ask(grid))
        assert grid.pull_messages([late]) == []
        assert payloads(grid.pull_messages([late])) == [b"x:1:1"]


def test_a_duplicate_is_delivered_and_answered_twice() -> None:
    """The node sees the same message again and the server sees two replies to it."""
    with faulty(Fault.DUPLICATE) as grid:
        messages = ask(grid)
        replies = grid.send_and_receive(messages)
        assert payloads(replies) == [b"x:0:1", b"x:1:1", b"x:1:2", b"x:2:1"]
        assert {r.metadata.reply_to_message_id for r in replies[1:3]} == {messages[1].metadata.message_id}
        assert len({r.metadata.message_id for r in replies}) == 4


def test_a_corrupt_reply_differs_in_one_bit() -> None:
    """The faulty node's payload arrives with its first bit flipped, the others as they were."""
    with faulty(Fault.CORRUPT) as grid:
        assert payloads(grid.send_and_receive(ask(grid))) == [b"x:0:1", b"y:1:1", b"x:2:1"]


def test_a_server_app_runs_on_the_grid(grid: InProcessGrid) -> None:
    """The app gets this grid and a context of its run, and leaves that context behind."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        replies = grid.send_and_receive(ask(grid))
        context.state["replies"] = ConfigRecord({"payloads": payloads(list(replies))})

    with grid_of(echo_app(), run_id=9):
        context = run_server_app(app, grid)
    assert context.run_id == 1
    assert context.state["replies"]["payloads"] == [b"x:0:1", b"x:1:1", b"x:2:1"]


def test_messages_carry_the_run_of_the_grid_they_go_to() -> None:
    """With two grids in a process, a server's messages belong to the run of its own."""
    seen: list[int] = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        seen.extend(message.metadata.run_id for message in ask(grid))

    with grid_of(echo_app(), num_nodes=1, run_id=5) as first, grid_of(echo_app(), num_nodes=1, run_id=6):
        run_server_app(app, first, Context(5, 1, {}, RecordDict(), {}))
    assert seen == [5]


def test_what_a_server_app_raises_is_raised(grid: InProcessGrid) -> None:
    """No exception of the server is swallowed."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_server_app(app, grid)
