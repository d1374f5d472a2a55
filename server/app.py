"""The ServerApp: Flower's messages in and out of the round loop, and nothing else."""

import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

from flwr.app import Context, Message
from flwr.serverapp import Grid, ServerApp

from common import logs, wire
from common.errors import Refused, StorageError, UmbelError
from common.files import write_durably
from privacy.keys import load_key
from privacy.ledger import PrivacyLedger
from server.registry import load_registry
from server.replies import Answer
from server.settings import RunFolder, load_run
from server.training import train

_POLL_SECONDS = 0.1
_HTTP_GRID = "flwr.superlink.grid.http_grid"
_PULL_SECONDS = 5.0
"""How long is waited for the pieces of a reply that a node has announced; by Flower's own limit two hours."""
_ON_THE_WAY_SECONDS = 10.0
"""How much longer than it is waited for a message lives: one whose time is over before a busy SuperLink has read it is
an error there, and would end the run."""
_FINE, _DEFECT, _INTERRUPTED = 0, 1, 130

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the run whose folder the run configuration names."""
    logs.configure()
    root = str(context.run_config.get("run-folder", ""))
    if not root:
        raise UmbelError("Expected run-folder in the run configuration to name the run's folder, got none.")
    folder = RunFolder(root=Path(root))
    try:
        _run(folder, grid)
    except BaseException as error:
        # The run's own error is what counts, also where its disk takes no more of them.
        with contextlib.suppress(StorageError):
            _write_outcome(folder, context.run_id, error)
        raise
    _write_outcome(folder, context.run_id, None)


def _run(folder: RunFolder, grid: Grid) -> None:
    settings = load_run(folder.root)
    key = load_key(settings.place.key)
    with PrivacyLedger.open(settings.place.ledger, key=key) as ledger:
        train(settings, ledger, load_registry(settings.folder.registry), FlowerNodes(grid), key.sign)


def _write_outcome(folder: RunFolder, run_id: int, error: BaseException | None) -> None:
    """How it ended, for whoever follows the run: Flower tells only part of it.

    The text of an error that is not one of ours could hold anything, and stays in the server's log.
    """
    match error:
        case None:
            code = _FINE
        case UmbelError():
            code = error.exit_code
        case KeyboardInterrupt() | SystemExit():
            code = _INTERRUPTED
        case _:
            code = _DEFECT
    outcome = {
        "error": None if error is None else type(error).__name__,
        "message": str(error) if isinstance(error, UmbelError) else None,
        "code": error.code if isinstance(error, Refused) else None,
        "exit_code": code,
        "flower_run_id": str(run_id),
    }
    write_durably(folder.outcome, json.dumps(outcome).encode() + b"\n")


class FlowerNodes:
    """The nodes behind a Flower grid."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid
        _bound_pulls()

    def node_ids(self) -> list[int]:
        """Nodes that are connected."""
        return list(self._grid.get_node_ids())

    def ask(
        self, node_ids: Iterable[int], action: str, payload: bytes, signature: bytes, timeout: float
    ) -> Iterator[Answer]:
        """One message to each node; yields what comes back in time, mapped by the message it answers."""
        until = time.monotonic() + timeout
        messages = [
            wire.request(payload, signature, node_id=node_id, action=action, ttl=timeout + _ON_THE_WAY_SECONDS)
            for node_id in node_ids
        ]
        receivers = [message.metadata.dst_node_id for message in messages]
        # an error's source can be SuperLink, so a reply is known by the message that it answers
        waiting = dict(zip(self._grid.push_messages(messages), receivers, strict=True))
        receiver_of = dict(waiting)
        while waiting and time.monotonic() < until:
            replies = list(self._grid.pull_messages(list(waiting)))
            for reply in replies:
                message_id = reply.metadata.reply_to_message_id
                node_id = receiver_of.get(message_id)
                # an answer counts from the node that was asked; Flower's own errors come from SuperLink
                if node_id is None or not (reply.has_error() or reply.metadata.src_node_id == node_id):
                    continue
                waiting.pop(message_id, None)
                yield _read(reply, node_id)
            if not replies:
                time.sleep(_POLL_SECONDS)


def _bound_pulls() -> None:
    """Let a reply that is announced and never sent cost seconds, and the node its place in the round.

    Flower's grid pulls one reply after the other, and waits for each: without a limit one node that dies on the way,
    or means to, would stop every round.
    """
    module = sys.modules.get(_HTTP_GRID)  # where there is none, nothing is pulled
    if module is not None and not isinstance(module.pull_objects, partial):
        module.pull_objects = partial(module.pull_objects, max_time=_PULL_SECONDS)  # type: ignore[attr-defined]


def _read(reply: Message, node_id: int) -> Answer:
    try:
        content = wire.read_answer(reply)
    except Refused as refused:
        return Answer(node_id=node_id, code=refused.code)
    if isinstance(content, wire.Refusal):
        return Answer(node_id=node_id, code=content.code)
    return Answer(node_id=node_id, payload=content)
