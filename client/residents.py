"""Who lives on a node, and what data they have at the moment.

The registry of the server says how many users a node hosts, so a node has that many places and no more. Places are
the store's: whoever is known there keeps theirs, for ever, new users take what is free in the order of the data, and
users beyond that are left out. A place whose user has no rows, or was forgotten, counts as zeros.

What is in the source can never be a reason to refuse. Where it has no rows any more, or is gone, its users have no
data. Where it cannot be read as what was declared, because somebody is writing it or it is damaged, the node goes on
with what it has read before, and tries again the next time.
"""

import logging
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from client.settings import NodeSettings
from client.sources import fingerprint, forget
from client.store import DeviceStore
from client.transient import TransientStore
from common.data import DataSchema, DenseFeatures, Population, select
from common.errors import DataError
from common.loading import public_schema
from common.tables import NoRows

Read: TypeAlias = Callable[[], tuple[Population, DataSchema]]
_logger = logging.getLogger("umbel.node")


class Residents:
    """The users that a node computes for, with their data as of the last `refresh`.

    Attributes:
        population: Those of them who have a place and rows.
        schema: Public facts about the data; the same for the life of the process.
        num_places: How many users the server's registry has for this node.
        problem: Why the data of the last refresh are not the newest; empty where they are. Not for a server.
    """

    population: Population
    schema: DataSchema
    num_places: int
    problem: str

    def __init__(
        self, settings: NodeSettings, store: DeviceStore | TransientStore, read: Read, *, shared: bool
    ) -> None:
        """Read the data.

        Args:
            settings: The node's.
            store: Where places are kept.
            read: Reads the node's users and the schema.
            shared: Whether several nodes share the source, a trial's: then it is read once, as its users must not move
                from node to node.

        Raises:
            DataError: If the declarations are wrong or, on a node that takes its number of users from the data, the
                source cannot be read.
        """
        self._settings, self._store, self._read, self._shared = settings, store, read, shared
        self._fingerprint, self.problem = fingerprint(settings.data), ""
        try:
            self._found, self.schema = read()
        except Exception as error:
            if settings.users is None:
                raise
            self.schema = public_schema(settings.data, settings.family)
            self._found = nobody(self.schema)
            self._note(error)
        self.num_places = self._found.num_users if settings.users is None else settings.users
        self._left_out = 0
        self._place(settings.users)
        store.changed_elsewhere()

    def refresh(self) -> bool:
        """Take up what has changed since the last time; returns whether anything has."""
        read = not self._shared and self._reread()
        if not read and not self._store.changed_elsewhere():
            return False
        slots = self._settings.users
        self._place(self._store.num_places() if slots is None else slots)
        return True

    def _reread(self) -> bool:
        current = fingerprint(self._settings.data)
        if current == self._fingerprint and not self.problem:
            return False
        forget()  # or the old data would be kept beside the new ones
        self._fingerprint = current
        try:
            found, schema = self._read()
            if schema.digest != self.schema.digest:
                raise DataError("Expected the features that the node started with, got others. Start it again.")
        except NoRows as error:
            self._found = nobody(self.schema)
            self._note(error)
            return True
        except Exception as error:  # whatever a parser makes of what is in a file
            self._note(error)
            return False
        self._found, self.problem = found, ""
        return True

    def _place(self, slots: int | None) -> None:
        """Keep those who have a place, were not forgotten, and fit the number that the registry has."""
        has_place = self._store.enrol(self._found.users, slots=slots)
        has_place &= np.cumsum(has_place) <= self.num_places
        index = np.flatnonzero(has_place)
        index = index[~self._store.forgotten([self._found.users[i] for i in index])]
        whole = index.size == self._found.num_users
        self.population = self._found if whole else select(self._found, index)
        left_out = int((~has_place).sum())
        if left_out != self._left_out:
            self._left_out = left_out
            _logger.warning("%d users of the data have no place on this node and are left out", left_out)

    def _note(self, error: Exception) -> None:
        problem = str(error) if isinstance(error, DataError) else type(error).__name__
        if problem != self.problem:  # its text is for whoever may see the data
            gone = isinstance(error, NoRows)
            what = "have no rows or are gone" if gone else "cannot be read; going on with what there was"
            _logger.warning("the data %s", what)
        self.problem = problem


def nobody(schema: DataSchema) -> Population:
    """No users, of this schema."""
    return Population(
        users=(),
        offsets=np.zeros(1, np.int64),
        y=np.zeros(0),
        weight=None,
        features=DenseFeatures(np.zeros((0, schema.dimension))),
        key=np.zeros(0, np.uint64),
    )
