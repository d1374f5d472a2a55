"""From the cells of a piece of events to usable rows: what is wrong with a row is counted and named, never raised."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from client.entity_store import EntitySettings
from common.errors import DataError
from common.model import Array, IntArray
from common.streaming import EventSource
from common.tables import (
    BoolArray,
    Cells,
    Check,
    as_numbers,
    as_texts,
    as_times,
    bad_rows,
    describe_bad_rows,
    number_check,
    text_check,
)

_LARGEST_WEIGHT = 1e6
_SHOWN = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Rows:
    """The rows of a piece.

    Attributes:
        X: `N x d`; of no meaning where a row is not usable.
        y: `N`.
        weight: `N`, at most 1e6.
        names: For each type of entity, or for the users, `N` names.
        event: `N` ids, None without a column of them.
        time: `N` seconds, None without a column of them.
        usable: `N` bool.
        problems: One line for each of the first rows that are not.
        num_clipped: Numbers of usable and other rows that lay outside their declared range and were cut to it.
    """

    X: Array
    y: Array
    weight: Array
    names: tuple[Sequence[str], ...]
    event: Sequence[str] | None
    time: Array | None
    usable: BoolArray
    problems: tuple[str, ...]
    num_clipped: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Roles:
    """Which columns play the roles that all kinds of events have; None where there is none."""

    target: str | None = None
    weight: str | None = None
    time: str | None = None
    event: str | None = None

    @property
    def columns(self) -> list[str]:
        """Those there are."""
        given = (self.target, self.weight, self.time, self.event)
        return [name for name in given if name is not None]


def numbered(names: Sequence[str]) -> tuple[list[str], IntArray]:
    """Each name once, by first appearance, and the number of each row's."""
    numbers: dict[str, int] = {}
    code = np.fromiter((numbers.setdefault(name, len(numbers)) for name in names), np.int64, count=len(names))
    return list(numbers), code


class EntityReader:
    """Reads events for a store of entities: a feature that a row, or the whole source, lacks is 0."""

    def __init__(
        self, settings: EntitySettings, source: EventSource, *, targets: bool, entity: str | None = None
    ) -> None:
        """Find the columns.

        Args:
            settings: Of the store.
            source: Where the events come from.
            targets: Whether they have targets; otherwise nothing but entities and features is read.
            entity: The only entity of all rows, in place of a column.

        Raises:
            DataError: If a column is missing.
        """
        self._settings, self._entity, self._fields = settings, entity, fields_of(source)
        every = Roles(target=settings.target, weight=settings.weight, time=settings.timestamp, event=settings.event_id)
        self._roles = every if targets else Roles()
        self._entities = () if entity is not None else settings.entities
        needed = (*self._entities, *self._roles.columns)
        missing = [name for name in needed if source.columns.count(name) != 1]
        if missing:
            raise DataError(
                f"{source.name}: Expected one column {missing[0]!r}, got none or several. "
                "Events must have the columns that the store was made with."
            )
        there = set(source.columns)
        self._features = {1 + i: name for i, name in enumerate(settings.features) if source.is_json or name in there}
        self.absent = len(settings.features) - len(self._features)
        self.unread = len(there - {*needed, *settings.features, settings.target})
        self.columns = [*needed, *self._features.values()]

    def read(self, cells: Cells) -> Rows:
        """The rows of a piece."""
        num = cells.rows.size
        X = np.zeros((num, self._settings.dimension))
        X[:, 0] = 1.0
        checks = [whole_rows(cells, self._fields)]
        names = tuple(as_texts(cells.columns[column]) for column in self._entities)
        checks += [text_check(column, texts) for column, texts in zip(self._entities, names, strict=True)]
        for column, name in self._features.items():
            X[:, column], check = _number_or_nothing(name, cells)
            checks.append(check)
        whose = names if self._entity is None else ([self._entity] * num,)
        return rows_of(cells, X, whose, checks, self._roles, self._settings.family)


def fields_of(source: EventSource) -> str:
    """What a row should be."""
    return "a JSON object" if source.is_json else f"{len(source.columns)} fields"


def whole_rows(cells: Cells, expected: str) -> Check:
    """The check that rows have all their fields."""
    return Check(column="", expected=expected, bad=~cells.complete)


def rows_of(  # noqa: PLR0917 -- what a reader has found
    cells: Cells, X: Array, names: tuple[Sequence[str], ...], checks: Sequence[Check], roles: Roles, family: str
) -> Rows:
    """What all kinds of events have in common, with what is wrong with it added to `checks`."""
    num = cells.rows.size
    y, weight, found = np.zeros(num), np.ones(num), list(checks)
    time = event = None
    if roles.target:
        y = as_numbers(cells.columns[roles.target])
        found.append(number_check(roles.target, y))
        if family == "logistic":
            found.append(Check(column=roles.target, expected="0 or 1", bad=(y != 0) & (y != 1)))
    if roles.weight:
        weight = as_numbers(cells.columns[roles.weight])
        found.append(Check(column=roles.weight, expected="a finite number above 0", bad=~(weight > 0)))
    if roles.time:
        time = as_times(cells.columns[roles.time])
        found.append(Check(column=roles.time, expected="seconds or an ISO 8601 time", bad=np.isnan(time)))
    if roles.event:
        event = as_texts(cells.columns[roles.event])
        found.append(text_check(roles.event, event))
    bad = bad_rows(cells, found)
    return Rows(
        X=X,
        y=np.where(bad, 0.0, y),
        weight=np.where(bad, 0.0, np.minimum(weight, _LARGEST_WEIGHT)),
        names=names,
        event=event,
        time=time,
        usable=~bad,
        problems=(*cells.unread, *describe_bad_rows(cells, found, limit=_SHOWN)),
    )


def _number_or_nothing(name: str, cells: Cells) -> tuple[Array, Check]:
    """A feature's values, 0 where there is none, and where something else stands."""
    values = cells.columns[name]
    numbers = as_numbers(values)
    at = np.flatnonzero(np.isnan(numbers))
    bad = np.zeros(numbers.size, np.bool_)
    bad[at] = [not (values[i] is None or (isinstance(values[i], str) and not values[i].strip())) for i in at.tolist()]
    numbers[at] = 0.0
    return numbers, Check(column=name, expected="a finite number or nothing", bad=bad)
