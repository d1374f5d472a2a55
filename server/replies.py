"""What nodes answer, and what of it counts: the first valid reply of each invited node, and public codes."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from common.errors import Refused, StorageError, VerificationError
from common.model import IntArray
from common.records import Contribution, check_protocol, decode
from common.sealing import SIGNATURE_BYTES, SealingKey, disclose
from privacy.layout import Layout, sum_is_possible
from server.registry import RegisteredNode

_PASSING = frozenset({"unavailable", "client_error", "busy", "deadline", "malformed", "error", "sealing"})
"""Refusals that the next round may not meet."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A node's answer, or the public code of why there is none.

    Attributes:
        node_id: Who.
        payload: The reply's bytes; None for a refusal.
        code: The refusal's code; None for an answer.
    """

    node_id: int
    payload: bytes | None = None
    code: str | None = None


class Replies:
    """Which replies of a round count: the first valid one of each invited node."""

    def __init__(
        self,
        *,
        ledger_id: str,
        sequence: int,
        invited: Mapping[int, RegisteredNode],
        layout: Layout,
        broadcast: bytes,
        key: SealingKey,
    ) -> None:
        """Nothing counted yet.

        Args:
            ledger_id: The ledger that was charged.
            sequence: The RESERVE line of the round.
            invited: The invited nodes by number.
            layout: Groups and grid of the round.
            broadcast: The signed bytes that they answer.
            key: To which they seal.
        """
        self.ledger_id = ledger_id
        self.sequence = sequence
        self.invited = invited
        self.layout = layout
        self._broadcast = broadcast
        self._key = key
        self.answered = 0
        self.acknowledged: dict[int, int] = {}
        self.refusals: dict[str, int] = {}
        self._counted: set[int] = set()

    def totals(self, answers: Iterable[Answer]) -> Iterator[IntArray]:
        """The sums to add up; a reply that could not be honest is left out and counted under its code."""
        for answer in answers:
            try:
                total = self._checked(answer)
            except Refused as refused:
                self.refusals[refused.code] = self.refusals.get(refused.code, 0) + 1
                if refused.code == "ledger_gap" and answer.node_id in self.invited:
                    self.acknowledged[answer.node_id] = -1  # its store was lost: it is told everything again
                continue
            self.answered += 1
            yield total

    def _checked(self, answer: Answer) -> IntArray:
        if answer.payload is None:
            raise Refused(answer.code or "error", "Expected an answer, got a refusal.")
        node = self.invited.get(answer.node_id)
        if node is None or answer.node_id in self._counted:
            raise Refused("replayed", "Expected one contribution of each invited node, got another.")
        opened = disclose(
            answer.payload, broadcast=self._broadcast, name=node.name, key=self._key, public_key=node.public_key
        )
        contribution = Contribution.decode(opened)
        if (contribution.ledger_id, contribution.sequence) != (self.ledger_id, self.sequence):
            raise Refused("replayed", "Expected a contribution to this release, got one to another.")
        if not sum_is_possible(contribution.total, node.users, self.layout):
            raise Refused("malformed", "Expected a sum of clipped vectors, got one that cannot be.")
        self._counted.add(answer.node_id)
        self.acknowledged[answer.node_id] = min(max(contribution.acknowledged, -1), self.sequence)
        return contribution.total


def identity_in(answer: Answer) -> tuple[str, int]:
    """The name a node gives itself and how many users it hosts; its signature is not checked here.

    Raises:
        Refused: With the code of a refusal, or `malformed`, if there is no such answer.
    """
    if answer.payload is None:
        raise Refused(answer.code or "error", "Expected an answer, got a refusal.")
    header, _ = decode(answer.payload[:-SIGNATURE_BYTES])
    check_protocol(header)
    try:
        return str(header["name"]), int(header["users"])
    except (KeyError, TypeError, ValueError) as error:
        raise Refused("malformed", "Expected a node's name and users, got something else.") from error


def check_refusals(codes: Iterable[str]) -> None:
    """Stop where every node refused for good: one round after the other would be charged for nothing.

    Raises:
        StorageError: If their disks failed.
        VerificationError: If the ledger is not what they remember.
        Refused: If it is for another reason that the next round would not change.
    """
    found = set(codes)
    if not found or found & _PASSING:
        return
    said = f"Expected nodes that answer, got only refusals: {', '.join(sorted(found))}."
    if found == {"storage"}:
        raise StorageError(f"{said} Their disks failed. Make room, then resume.")
    if any(code.startswith("ledger") for code in found):
        raise VerificationError(f"{said} Put back the newest ledger, or `umbel ledger restore` an older; then resume.")
    raise Refused(min(found), f"{said} Change what they refuse, or their policy.")
