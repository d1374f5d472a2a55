"""A node's memory for simulations that keep nothing: filters and acknowledgements as arrays, gone with the process.

It enforces what `client.store` enforces, without a disk. A node that serves real users uses the store.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from client.store import NOTHING_ACKNOWLEDGED
from client.store_file import FULL
from common.errors import Refused
from common.model import IntArray, PersonalState


class TransientStore:
    """The filters of a fixed list of users, for as long as the process lives."""

    keeps_states = False

    def __init__(self, users: Sequence[str]) -> None:
        """Start with nothing spent.

        Args:
            users: In the order in which every later call names them.
        """
        self._spent = np.zeros(len(users), np.int64)
        self._acknowledged: dict[str, tuple[int, bytes]] = {}

    def close(self) -> None:
        """Nothing is open."""

    def spent(self, users: Sequence[str]) -> IntArray:
        """`n` int64, what each user has been charged so far, in units of 2^-50."""
        del users
        return self._spent.copy()

    def acknowledged(self, ledger_id: str) -> tuple[int, bytes]:
        """Sequence and head of the last line of this ledger that the node verified."""
        return self._acknowledged.get(ledger_id, NOTHING_ACKNOWLEDGED)

    def pinned_ledger(self) -> str | None:
        """The first ledger that was acknowledged."""
        return next(iter(self._acknowledged), None)

    def acknowledge(self, ledger_id: str, sequence: int, head: bytes) -> None:
        """Remember that the ledger was verified up to `sequence`."""
        self._acknowledged[ledger_id] = (sequence, head)

    def charge(  # noqa: PLR0917 -- the same call as `DeviceStore.charge`
        self,
        ledger_id: str,
        sequence: int,
        head: bytes,
        users: Sequence[str],
        mask: npt.NDArray[np.bool_],
        cost: int,
        *,
        limit: int = FULL,
    ) -> None:
        """Record an answer; as `DeviceStore.charge`.

        Raises:
            Refused: With code `replayed` if this sequence, or a later one, was answered before.
            ValueError: If a charged user has too little left.
        """
        del users
        if sequence <= self.acknowledged(ledger_id)[0]:
            raise Refused("replayed", "Expected a sequence that was not answered before, got an answered one.")
        cost = min(cost, FULL)
        if limit < FULL and (self._spent[mask] > limit - cost).any():
            raise ValueError("Expected only users that stay within `limit` in `mask`, got another. Admit them first.")
        raised = np.where(self._spent > FULL - cost, FULL, self._spent + cost)
        self._spent = np.where(mask, raised, self._spent)
        self._acknowledged[ledger_id] = (sequence, head)

    def save_states(self, users: Sequence[str], state: PersonalState, model_digest: bytes) -> None:
        """Nothing is kept."""
