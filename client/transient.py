"""A node's memory for simulations that keep nothing: filters and acknowledgements as arrays, gone with the process.

It enforces what `client.store` enforces, without a disk. A node that serves real users uses the store.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from client.store import NOTHING_ACKNOWLEDGED
from client.store_file import FULL
from common.errors import Refused
from common.model import IntArray

BoolArray = npt.NDArray[np.bool_]


class TransientStore:
    """The filters of a node's users, for as long as the process lives."""

    def __init__(self, users: Sequence[str]) -> None:
        """Start with nothing spent.

        Args:
            users: Those who have a place from the start.
        """
        self._places = {user: place for place, user in enumerate(users)}
        self._asked: tuple[Sequence[str], IntArray] = (users, np.arange(len(users)))
        self._spent = np.zeros(len(users), np.int64)
        self._contributions = np.zeros(len(users), np.int64)
        self._acknowledged: dict[str, tuple[int, bytes]] = {}
        self._keys: dict[str, bytes] = {}

    def close(self) -> None:
        """Nothing is open."""

    def enrol(self, users: Sequence[str], *, slots: int | None = None) -> BoolArray:
        """`n` bool, who has one of the first `slots` places; as `DeviceStore.enrol`."""
        limit = FULL if slots is None else slots
        for user in users:
            if user not in self._places and len(self._places) < limit:
                self._places[user] = len(self._places)
        new = len(self._places) - self._spent.size
        self._spent, self._contributions = (np.pad(a, (0, new)) for a in (self._spent, self._contributions))
        return np.array([self._places.get(user, limit) < limit for user in users], np.bool_)

    def forgotten(self, users: Sequence[str]) -> BoolArray:
        """Nobody."""
        return np.zeros(len(users), np.bool_)

    def num_places(self) -> int:
        """How many users were ever enrolled."""
        return len(self._places)

    def changed_elsewhere(self) -> bool:
        """Never: there is nobody else."""
        return False

    def spent(self, users: Sequence[str]) -> IntArray:
        """`n` int64, what each user has been charged so far, in units of 2^-50."""
        return self._spent[self._index(users)]

    def contributions(self, users: Sequence[str]) -> IntArray:
        """`n` int64, to how many releases each user has contributed."""
        return self._contributions[self._index(users)]

    def acknowledged(self, ledger_id: str) -> tuple[int, bytes]:
        """Sequence and head of the last line of this ledger that the node verified."""
        return self._acknowledged.get(ledger_id, NOTHING_ACKNOWLEDGED)

    def pinned_ledger(self) -> str | None:
        """The first ledger that was acknowledged."""
        return next(iter(self._acknowledged), None)

    def trusted_key(self, ledger_id: str) -> bytes | None:
        """The key in force at the last acknowledged line, if one was ever given."""
        return self._keys.get(ledger_id)

    def acknowledge(self, ledger_id: str, sequence: int, head: bytes, *, public_key: bytes | None = None) -> None:
        """Remember that the ledger was verified up to `sequence`, if that is news."""
        if sequence > self.acknowledged(ledger_id)[0]:
            self._acknowledged[ledger_id] = (sequence, head)
        if public_key is not None:
            self._keys[ledger_id] = public_key

    def charge(  # noqa: PLR0917 -- the same call as `DeviceStore.charge`
        self,
        ledger_id: str,
        sequence: int,
        head: bytes,
        users: Sequence[str],
        mask: BoolArray,
        cost: int,
        *,
        limit: int = FULL,
        max_contributions: int | None = None,
        public_key: bytes | None = None,
    ) -> None:
        """Record an answer; as `DeviceStore.charge`.

        Raises:
            Refused: With code `replayed` if this sequence, or a later one, was answered before.
            ValueError: If a charged user has too little left.
        """
        if sequence <= self.acknowledged(ledger_id)[0]:
            raise Refused("replayed", "Expected a sequence that was not answered before, got an answered one.")
        cost = min(cost, FULL)
        charged = self._index(users)[mask]
        barred = self._contributions[charged] >= (FULL if max_contributions is None else max_contributions)
        if barred.any() or (limit < FULL and (self._spent[charged] > limit - cost).any()):
            raise ValueError("Expected only users that stay within their limits in `mask`, got another.")
        spent = self._spent[charged]
        self._spent[charged] = np.where(spent > FULL - cost, FULL, spent + cost)
        self._contributions[charged] += 1
        self.acknowledge(ledger_id, sequence, head, public_key=public_key)

    def _index(self, users: Sequence[str]) -> IntArray:
        """Their places; remembered, as the same users are asked for again and again."""
        if self._asked[0] is not users:
            self._asked = (users, np.array([self._places[user] for user in users], np.int64))
        return self._asked[1]
