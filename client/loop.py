"""The life of a resident node: ask for work, do it, answer, and outlive whatever happens to the server meanwhile.

Nothing here knows Flower. The node ends when it is told to, or when the server does not admit it; a server, proxy or
name that is away for a while is no reason, nor is a run that has ended.
"""

import logging
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from client.status_file import StatusFile
from common.errors import UmbelError

Work = TypeVar("Work", bound="HasDeadline")
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0
_ADMISSION_PATIENCE = 90.0
"""A server takes a node that was killed to be there still for up to a minute, and does not admit it twice."""
_logger = logging.getLogger("umbel.node")


class Unreachable(Exception):
    """The server did not answer, or only that it cannot at the moment; says why in public words."""


class RunOver(Exception):
    """The run that a message belongs to has ended meanwhile."""


class Rejected(Exception):
    """The server does not take an answer, and will not take it later."""


class Forgotten(Exception):
    """The server does not know this node any more; it has to be admitted again."""


class Occupied(Exception):
    """The server does not admit this node now, as it would where its predecessor is still thought to be there."""


class NotAdmitted(UmbelError):
    """The server refuses this node's key."""

    exit_code: ClassVar[int] = 6


class HasDeadline(Protocol):
    """A message that a reply is awaited to."""

    @property
    def expires(self) -> float:
        """Unix time after which nobody waits for the reply."""

    @property
    def action(self) -> str:
        """What the message asks for."""


class Link(Protocol, Generic[Work]):
    """What the loop needs of a connection. Each call may raise `Unreachable`, those about a run `RunOver`."""

    def connect(self) -> int:
        """Admit the node; its number. May raise `Occupied` or `NotAdmitted`."""

    def heartbeat(self) -> None:
        """Say that the node is there. May raise `Forgotten`."""

    def pull(self) -> Work | None:
        """The next message, without its content. May raise `Forgotten`."""

    def fetch(self, work: Work) -> Any:
        """The whole message; may be called again after it failed."""

    def compute(self, request: Any) -> Any:
        """The reply to a message. Never raises."""

    def push(self, work: Work, reply: Any) -> None:
        """Send the reply; may be called again after it failed. May raise `Rejected`."""

    def code_of(self, reply: Any) -> str | None:
        """The refusal that a reply is, if it is one."""

    def disconnect(self) -> None:
        """Say good-bye. Never raises."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How the loop waits, in seconds.

    Attributes:
        poll: Between two questions for work.
        heartbeat: Between two signs of life.
        drain: For the message at work once the node is told to end.
    """

    poll: float = 1.0
    heartbeat: float = 30.0
    drain: float = 30.0


class Loop(Generic[Work]):
    """One resident node."""

    def __init__(self, link: Link[Work], pace: Pace, status: StatusFile, facts: Callable[[], dict[str, Any]]) -> None:
        """Nothing is sent yet.

        Args:
            link: To the server.
            pace: How to wait.
            status: Where the state is written down.
            facts: What the node says of itself for that.
        """
        self._link, self._pace, self._status, self._facts = link, pace, status, facts
        self._stop, self._lost, self._beating = threading.Event(), threading.Event(), threading.Event()
        self._stopped_at = float("inf")
        self._failures = 0

    def stop(self) -> None:
        """End after the message at work, if there is one. From a signal handler or another thread."""
        if not self._stop.is_set():
            self._stopped_at = time.monotonic()
            self._stop.set()

    def run(self, *, once: bool = False) -> None:
        """Serve until told to stop, or with `once` until nothing is waiting.

        Raises:
            NotAdmitted: If the server refuses the node's key.
            UmbelError: With `once`, if the server is away.
        """
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()
        connected = False
        try:
            while not self._stop.is_set():
                try:
                    if not connected or self._lost.is_set():
                        self._connect(once=once)
                        connected = True
                    served = self._serve()
                    self._failures = 0
                    if once and not served:
                        return
                    if not served:
                        self._pause(self._pace.poll * random.uniform(0.8, 1.2))  # noqa: S311 (so that nodes spread)
                except Forgotten:
                    connected = False
                except Unreachable as error:
                    if once:
                        raise UmbelError(f"Expected to reach the server, got: {error}. Try again later.") from error
                    self._back_off(str(error))
                except UmbelError:
                    raise
                except Exception as error:
                    if once:
                        raise
                    # a message that breaks something here must not end the node for all that come after it
                    _logger.exception("a failure that was not foreseen")
                    self._back_off(type(error).__name__)
        finally:
            self._beating.clear()
            self._stop.set()
            if connected:
                self._link.disconnect()
            self._note("stopped", force=True)

    def _connect(self, *, once: bool) -> None:
        """Be admitted; waits for a predecessor to be given up by the server, unless there is no time."""
        patience = time.monotonic() + (0.0 if once else _ADMISSION_PATIENCE)
        while True:
            try:
                number = self._link.connect()
                break
            except Occupied as error:
                if time.monotonic() >= patience:
                    raise NotAdmitted(
                        "Expected the server to admit this node's key, got a refusal. Register the key "
                        "(umbel provision, umbel up), and look for another process that uses it."
                    ) from error
                self._note("waiting to be admitted")
                self._pause(random.uniform(2, 4))  # noqa: S311
                if self._stop.is_set():
                    raise Unreachable("not admitted yet") from error
        self._lost.clear()
        self._beating.set()
        _logger.info("connected", extra={"node_id": number})
        self._note("running", force=True, node_id=number)

    def _serve(self) -> bool:
        """One message, if there is one."""
        work = self._link.pull()
        self._note("running")
        if work is None:
            return False
        begun = time.monotonic()
        try:
            request = self._persistently(work, lambda: self._link.fetch(work))
            reply = self._link.compute(request)
            code = self._link.code_of(reply)
            self._persistently(work, lambda: self._link.push(work, reply))
        except RunOver:
            _logger.info("the run of a message has ended meanwhile", extra={"purpose": work.action})
            return True
        except Rejected as error:
            _logger.warning("the server did not take an answer: %s", error, extra={"purpose": work.action})
            return True
        seconds = round(time.monotonic() - begun, 3)
        extra = {"purpose": work.action, "seconds": seconds} | ({} if code is None else {"code": code})
        _logger.info("answered" if code is None else "refused", extra=extra)
        self._note("running", force=True, answered=True)
        return True

    def _persistently(self, work: Work, call: Callable[[], Any]) -> Any:
        """`call` until it succeeds or nobody waits for it: what was charged once should count."""
        for attempt in range(10**9):
            try:
                return call()
            except Unreachable as error:
                left = min(work.expires - time.time(), self._stopped_at + self._pace.drain - time.monotonic())
                if left <= 0:
                    raise Rejected(f"{error}, and nobody waits any more") from error
                self._stop.wait(min(left, delay_of(attempt)))
                if self._stop.is_set():  # there is little time left
                    time.sleep(min(left, _FIRST_DELAY))
        raise AssertionError("more attempts than a deadline has room for")

    def _back_off(self, reason: str) -> None:
        if self._failures == 0:
            _logger.warning("the server is away: %s", reason)
        self._failures += 1
        self._note("away", problem=reason)
        self._pause(delay_of(self._failures))

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _beat(self) -> None:
        while not self._stop.wait(self._pace.heartbeat * random.uniform(0.6, 0.8)):  # noqa: S311
            if not self._beating.is_set():
                continue
            try:
                self._link.heartbeat()
            except Forgotten:
                self._lost.set()
            except Exception:  # noqa: S112 (the loop notices by itself that the server is away)
                continue

    def _note(self, state: str, *, force: bool = False, **more: Any) -> None:
        self._status.note(state, self._facts, force=force, **more)


def delay_of(attempt: int) -> float:
    """Seconds to wait after so many failures: doubled each time, up to half a minute, and different for every node."""
    longest: float = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(attempt, 10))
    return longest * random.uniform(0.5, 1.0)  # noqa: S311
