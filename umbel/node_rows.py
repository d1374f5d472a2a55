"""Events that are laid out as a node's data are: the columns and ranges are those that its settings declare."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from common.config import DataConfig
from common.data import DataSchema
from common.errors import DataError
from common.loading import InputEncoder, target_column, user_column, users_of
from common.streaming import EventSource
from common.tables import Cells, text_check
from umbel.event_rows import Roles, Rows, fields_of, rows_of, whole_rows


class NodeReader:
    """Reads events that are laid out as a node's data are."""

    absent = unread = 0

    def __init__(
        self,
        data: DataConfig,
        schema: DataSchema,
        family: str,
        encoder: InputEncoder,
        source: EventSource,
        *,
        targets: bool,
        user: str | None = None,
    ) -> None:
        """Find the columns.

        Args:
            data: Of the node's settings.
            schema: Of the same.
            family: Loss family.
            encoder: Of the same.
            source: Where the events come from.
            targets: Whether they have targets; otherwise nothing but users and features is read.
            user: Whose all rows are, in place of a column.

        Raises:
            DataError: If a column is missing.
        """
        path, known = Path(source.name), source.columns
        self._fields, self._encoder, self._schema, self._family = fields_of(source), encoder, schema, family
        self._name, self._user = user, None if user is not None else user_column(known, data, path)
        self._roles = Roles()
        if targets:
            self._roles = Roles(
                target=target_column(known, data, path),
                weight=data.weight,
                time=data.timestamp,
                event=data.event_id,
            )
        named = [] if self._user is None else [self._user]
        self.columns = [*named, *self._roles.columns, *encoder.columns(known, path)]
        if missing := [name for name in self.columns if name not in known and not source.is_json]:
            raise DataError(f"{source.name}: Expected a column {missing[0]!r}, got none.")

    def read(self, cells: Cells) -> Rows:
        """The rows of a piece."""
        X, checks, num_clipped = self._encoder.encode(cells)
        users = users_of(cells, self._user) if self._name is None else [self._name] * cells.rows.size
        checks = (whole_rows(cells, self._fields), text_check(self._user or "", users), *checks)
        rows = rows_of(cells, X, (users,), checks, self._roles, self._family)
        low, high = self._schema.target_range
        y = rows.y - self._schema.target_offset
        num_clipped += int((rows.usable & ((y < low) | (y > high))).sum())
        return replace(rows, y=np.clip(y, low, high), num_clipped=num_clipped)
