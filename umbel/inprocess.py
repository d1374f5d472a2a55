"""Flower's `Grid` in this process: the ClientApp is called directly, without Ray, SuperLink or sockets.

A run is as deterministic as its apps: message numbers count up, a node answers one message at a time in the
order of sending, and replies are handed over in that order however many threads work.
"""

import copy
import enum
import itertools
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Self

from flwr.app import Array, ArrayRecord, Context, Error, Message, RecordDict
from flwr.app.user_config import UserConfig
from flwr.clientapp import ClientApp
from flwr.common.constant import NUM_PARTITIONS_KEY, PARTITION_ID_KEY, SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity


class Fault(enum.Enum):
    """What may go wrong between the server and one node."""

    UNREACHABLE = enum.auto()  # the node hears nothing, Flower tells the server so
    DROP = enum.auto()  # the node answers, the reply is lost
    LATE = enum.auto()  # the first pull that asks for the reply does not get it
    DUPLICATE = enum.auto()  # the message reaches the node twice and so do its replies the server
    CORRUPT = enum.auto()  # one bit of each array in the reply is flipped


Faults = Callable[[int, Message], Fault | None]


@dataclass
class _Sent:
    """A message on its way: what its node will have replied, and for how many pulls that is held back."""

    replies: Future[list[Message]]
    held: int


def partitions(num_nodes: int, common: Mapping[str, bool | float | int | str] | None = None) -> dict[int, UserConfig]:
    """Node configurations as Flower's simulation has them, by node number, each with `common` added."""
    first = SUPERLINK_NODE_ID + 1
    return {
        first + part: {PARTITION_ID_KEY: part, NUM_PARTITIONS_KEY: num_nodes, **(common or {})}
        for part in range(num_nodes)
    }


class InProcessGrid(Grid):
    """Moves messages between a ServerApp and the nodes of a ClientApp by calling the latter.

    Use it as a context manager, or `close` it, so that its threads end.

    Args:
        client_app: The app of every node.
        nodes: Each node's configuration, by node number.
        run_config: What Flower would have read from pyproject.toml and `--run-config`.
        run_id: Number of the run, in every message.
        workers: How many nodes work at once, in threads: NumPy computes outside the interpreter's lock.
        faults: Called once for each message with its node's number; says what goes wrong with it. For tests.
    """

    def __init__(
        self,
        client_app: ClientApp,
        nodes: Mapping[int, UserConfig],
        *,
        run_config: UserConfig,
        run_id: int = 1,
        workers: int = 1,
        faults: Faults | None = None,
    ) -> None:
        self.run_config = dict(run_config)
        self._client_app = client_app
        self._nodes = {node_id: dict(config) for node_id, config in nodes.items()}
        self._faults = faults
        self._contexts: dict[int, Context] = {}
        self._sent: dict[str, _Sent] = {}
        self._answered: dict[int, Event] = {}
        self._numbers = itertools.count(1)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="node")
        self.set_run(Run.create_empty(run_id))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget what is under way and end the threads, after the calls they are in."""
        self._threads.shutdown(cancel_futures=True)

    def set_run(self, run: Run) -> None:
        """Make `run` the one that this grid, and every message made in this process, belongs to."""
        self._run = run
        # To Flower a process is one task; a Message takes its sender from here.
        TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID

    @property
    def run(self) -> Run:
        """The run of this grid."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """The same as `Message(...)`; Flower still asks for it."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """All nodes, in the caller's order."""
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand each message to its node's thread and return at once."""
        return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Replies in the order in which their messages were pushed: as many as there are, at least one.

        Waits for the first reply that is still to come, so a caller neither polls nor sees an order that
        depends on timing. Returns nothing where no reply will come in this pull.
        """
        asked = set(message_ids)
        pulled: list[Message] = []
        for message_id in [known for known in self._sent if known in asked]:
            sent = self._sent[message_id]
            if sent.held > 0:
                sent.held -= 1
            elif pulled and not sent.replies.done():
                break
            else:
                pulled += sent.replies.result()
                del self._sent[message_id]
        return pulled

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Push, then pull until every reply that will ever come is there; there is no need of `timeout`."""
        ids = self.push_messages(messages)
        replies: list[Message] = []
        while not self._sent.keys().isdisjoint(ids):
            replies += self.pull_messages(ids)
        return replies

    def _push(self, message: Message) -> str:
        node_id = message.metadata.dst_node_id
        message_id = message.metadata.__dict__["_message_id"] = f"{self._run.run_id}-{next(self._numbers)}"
        fault = self._faults(node_id, message) if self._faults else None
        if node_id not in self._nodes:
            fault = Fault.UNREACHABLE
        # Copies for the node, as if they had travelled: neither side sees what the other does to them later.
        arrivals = [copy.deepcopy(message) for _ in range(2 if fault is Fault.DUPLICATE else 1)]
        before, answered = self._answered.get(node_id), Event()
        self._answered[node_id] = answered
        replies = self._threads.submit(self._deliver, arrivals, fault, before, answered)
        self._sent[message_id] = _Sent(replies=replies, held=int(fault is Fault.LATE))
        return message_id

    def _deliver(
        self, arrivals: list[Message], fault: Fault | None, before: Event | None, answered: Event
    ) -> list[Message]:
        if before is not None:
            before.wait()  # threads take messages in order, so what is waited for is in work or done
        try:
            if fault is Fault.UNREACHABLE:
                return [Message(Error(ErrorCode.NODE_UNAVAILABLE, "Node Unavailable"), reply_to=arrivals[0])]
            replies = [self._call(message, number) for number, message in enumerate(arrivals)]
        finally:
            answered.set()
        if fault is Fault.DROP:
            return []
        return [_corrupted(reply) for reply in replies] if fault is Fault.CORRUPT else replies

    def _call(self, message: Message, number: int) -> Message:
        try:
            reply = self._client_app(message=message, context=self._context(message.metadata.dst_node_id))
        except Exception as error:  # whatever an app raises is one failed reply, as under Flower
            # The type only: an exception's text can hold data, and Flower would send it to the server.
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)
        reply.metadata.__dict__["_message_id"] = f"{message.metadata.message_id}-reply-{number}"
        return reply

    def _context(self, node_id: int) -> Context:
        if node_id not in self._contexts:
            self._contexts[node_id] = Context(
                run_id=self._run.run_id,
                node_id=node_id,
                node_config=self._nodes[node_id],
                state=RecordDict(),
                run_config=dict(self.run_config),
            )
        return self._contexts[node_id]


def run_server_app(server_app: ServerApp, grid: InProcessGrid, context: Context | None = None) -> Context:
    """Run a ServerApp to its end as Flower does; what it raises, this raises.

    Args:
        server_app: For instance `server.app:app`.
        grid: Where its messages go.
        context: The server's; made from the grid's run and run configuration where it is not given.

    Returns:
        The context as the app has left it.
    """
    grid.set_run(grid.run)  # another grid may have been made since
    if context is None:
        context = Context(
            run_id=grid.run.run_id,
            node_id=SUPERLINK_NODE_ID,
            node_config={},
            state=RecordDict(),
            run_config=dict(grid.run_config),
        )
    server_app(grid=grid, context=context)
    return context


def _corrupted(reply: Message) -> Message:
    for record in reply.content.values() if reply.has_content() else ():
        for array in record.values() if isinstance(record, ArrayRecord) else ():
            if isinstance(array, Array) and array.data:
                array.data = bytes([array.data[0] ^ 1]) + array.data[1:]
    return reply
