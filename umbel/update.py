"""Bringing a store up to date with new events: a piece is read, and it and the record of it are one transaction.

So an update that is killed has applied whole pieces and goes on after them when it is run again, and a batch, or an
event with an id, that was applied is not applied again. Nothing is sent anywhere, and no message holds a value.
"""

import time as clock
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from client.applied import AppliedBatch, advance, begin, next_number
from client.entity_store import EntityStore
from client.mixed_effects import Events, update_events
from client.node_update import update_users
from common.errors import DataError, UmbelError
from common.loading import InputEncoder
from common.model import IntArray
from common.streaming import STANDARD_INPUT, EventSource, Position, open_source, paths_of
from common.tables import BoolArray
from umbel.event_rows import EntityReader, Rows, numbered
from umbel.local_state import open_state
from umbel.node_rows import NodeReader
from umbel.node_state import NodeState

_ENTITY_CELLS, _NODE_CELLS = 2_000_000, 500_000
_FEWEST_ROWS, _MOST_ROWS = 256, 50_000
_SHOWN = 20
_BEFORE = "applied before"


class Watcher(Protocol):
    """Who watches an update."""

    def progress(self, name: str, share: float | None, events: int) -> None:
        """How much of a source was read, and how many events were applied in all."""


@dataclass(kw_only=True)
class Tally:
    """What happened to the rows that were read."""

    events: int = 0
    already_applied: int = 0
    bad_rows: int = 0
    before_since: int = 0
    no_place: int = 0
    late: int = 0
    clipped: int = 0
    updates: int = 0
    not_converged: int = 0
    problems: list[str] = field(default_factory=list)


class Reader(Protocol):
    """Finds the columns of one source and reads its pieces."""

    columns: list[str]
    absent: int
    unread: int

    def read(self, cells: Any) -> Rows:
        """The rows of a piece."""


class Target(Protocol):
    """A store that events are applied to."""

    unit: str
    has_event_ids: bool
    has_times: bool
    rows: int

    def batches(self) -> list[AppliedBatch]:
        """What was applied."""

    def reader(self, source: EventSource) -> Reader:
        """For a source."""

    def prepare(self, rows: Rows, tally: Tally) -> BoolArray:
        """Which usable rows can be applied at all."""

    def changing(self) -> Any:
        """A transaction; what it yields has a `connection`."""

    def apply(  # noqa: PLR0917
        self, changes: Any, rows: Rows, chosen: IntArray, number: int, forgetting: float, tally: Tally
    ) -> None:
        """Apply some rows."""


def update(
    path: Path,
    events: Path,
    *,
    forgetting: float = 1.0,
    since: float | None = None,
    batch_id: str | None = None,
    batch_events: int | None = None,
    features: tuple[str, ...] = (),
    strict: bool = False,
    patience: float = 1.0,
    keep_gram: bool = False,
    watcher: Watcher | None = None,
) -> dict[str, Any]:
    """Apply events to a store.

    Args:
        path: The store: of entities, a node's, or a node's settings.
        events: A file, a folder of files, a named pipe, or "-" for standard input.
        forgetting: In [0, 1]; how much of the past of an entity counts in each batch that it has events in.
        since: Seconds; earlier events are not applied.
        batch_id: Name of the batch; by default a file is known by its bytes.
        batch_events: A new batch begins after so many rows; by default a file is one batch.
        features: New columns of a store of entities.
        strict: Stop at the first piece with a bad row, before it is applied.
        patience: Seconds that a pipe may be silent before what has arrived is applied.
        keep_gram: Apply nothing unless the node's settings have `keep_gram`, which alone decides.
        watcher: Told of the progress.

    Returns:
        The document that `umbel update --format json` prints.

    Raises:
        UmbelError: If the store, the events or an option cannot be used.
        StorageError: If the disk fails or another process has the store; whole pieces were applied, or nothing.
    """
    if not 0 <= forgetting <= 1:
        raise UmbelError(f"Expected 0 <= forgetting <= 1, got {forgetting=}. Correct --forgetting.")
    started, tally, done = clock.monotonic(), Tally(), []
    with open_state(path, update=True) as state:
        if keep_gram and not (isinstance(state, NodeState) and state.settings.keep_gram):
            raise UmbelError(
                "Expected --keep-gram for a node whose settings have it, got a store without. Set keep_gram = true in "
                "node.toml before the node folds a model in, or leave out --keep-gram."
            )
        if features:
            if isinstance(state, NodeState):
                raise UmbelError(
                    "Expected --feature for a store of entities, got a node's. Its features are the model's."
                )
            state.add_features(features)
        target: Target = _NodeTarget(state) if isinstance(state, NodeState) else _EntityTarget(state)
        if since is not None and not target.has_times:
            raise UmbelError("Expected a column of times for --since, got a store without one.")
        run = _Run(target, tally, forgetting, since, batch_events, strict, watcher)
        for file in paths_of(events):
            name = None if batch_id is None else batch_id if file == events else f"{batch_id}/{file.name}"
            with closing(open_source(file, patience=patience)) as source:
                done.append(run.source(source, name, is_pipe=file == STANDARD_INPUT or not file.is_file()))
        unit = target.unit
    document = {"store": str(path), "unit": unit, "sources": done, **vars(tally)}
    document["problems"] = tally.problems[:_SHOWN]
    return document | {"seconds": round(clock.monotonic() - started, 3)}


@dataclass(frozen=True)
class _Run:
    """One call of `update`."""

    target: Target
    tally: Tally
    forgetting: float
    since: float | None
    batch_events: int | None
    strict: bool
    watcher: Watcher | None

    def source(self, source: EventSource, name: str | None, *, is_pipe: bool) -> dict[str, Any]:
        """Apply what was not applied of one source."""
        if is_pipe and name is None and not self.target.has_event_ids:
            raise UmbelError(
                "Expected events from a pipe to have ids, or the batch to have one, got neither: after a crash nobody "
                "could tell what was applied. Add --batch-id, or make the store with --event-id."
            )
        batch, position = self._found(source, name, is_pipe=is_pipe)
        if position is None:
            return {"source": source.name, "batch_id": name, "resumed_at_row": None, "rows": 0, "status": _BEFORE}
        said = {"source": source.name, "batch_id": name, "resumed_at_row": position.row if batch else None}
        reader = self.target.reader(source)
        count = 0
        # another file that begins like one that was applied is a batch of its own
        resumed = None if batch is None or (batch.done and name is None) else batch
        size = min(self.target.rows, self.batch_events or self.target.rows)
        for piece in source.pieces(reader.columns, rows=size):
            rows = reader.read(piece.cells)
            resumed = self._piece(rows, piece.end, position, resumed, name)
            count += rows.y.size
            position = piece.end
            if self.watcher is not None:
                self.watcher.progress(source.name, source.share(), self.tally.events)
        if resumed is not None and not resumed.done:
            with self.target.changing() as changes:
                advance(changes.connection, resumed, replace(resumed, done=True))
        self._note_columns(source, reader)
        return said | {"rows": count, "status": "applied" if count or batch is None else _BEFORE}

    def _found(
        self, source: EventSource, name: str | None, *, is_pipe: bool
    ) -> tuple[AppliedBatch | None, Position | None]:
        """The batch that this source is, or begins with, if it is known; and where to go on, None for not at all."""
        known = [batch for batch in self.target.batches() if name is None or batch.name == name]
        if name is None and is_pipe:
            return None, Position()
        position = source.begin([batch.position for batch in known])
        if position is None:
            if name is not None and known:
                if known[0].done:
                    return known[0], None
                raise UmbelError(
                    f"{source.name}: Expected the events that batch {name!r} was begun with, got others. "
                    "Give the whole batch again, or choose another --batch-id."
                )
            return None, Position()
        return next(batch for batch in reversed(known) if batch.position == position), position

    def _piece(
        self, rows: Rows, end: Position, start: Position, batch: AppliedBatch | None, name: str | None
    ) -> AppliedBatch:
        """Apply a piece and record it, in one transaction; counts are those of the transaction."""
        counts = Tally()
        if self.strict and rows.problems:
            raise DataError(f"{rows.problems[0]} Nothing from this piece on was applied.")
        counts.problems += rows.problems
        counts.bad_rows += int((~rows.usable).sum())
        counts.clipped += rows.num_clipped
        chosen = rows.usable
        if self.since is not None and rows.time is not None:
            early = chosen & (rows.time < self.since)
            counts.before_since += int(early.sum())
            chosen = chosen & ~early
        chosen = chosen & self.target.prepare(replace(rows, usable=chosen), counts)
        with self.target.changing() as changes:
            connection = changes.connection
            before = begin(connection, name, start) if batch is None else batch
            number, seen = before.number, before.events
            if before.done or (self.batch_events is not None and seen >= self.batch_events):
                number, seen = next_number(connection), 0
            self.target.apply(changes, rows, np.flatnonzero(chosen), number, self.forgetting, counts)
            after = replace(before, position=end, number=number, events=seen + rows.y.size, done=False)
            advance(connection, before, after)
        for key, value in vars(counts).items():
            setattr(self.tally, key, getattr(self.tally, key) + value)
        del self.tally.problems[_SHOWN:]
        return after

    def _note_columns(self, source: EventSource, reader: Reader) -> None:
        if reader.absent:
            self.tally.problems.append(f"{source.name}: {reader.absent} features have no column; they count as 0.")
        if reader.unread:
            self.tally.problems.append(
                f"{source.name}: {reader.unread} columns are none of the store's and were not read; --feature adds one."
            )


class _EntityTarget:
    """A store of entities."""

    def __init__(self, store: EntityStore) -> None:
        self._store, settings = store, store.settings
        self.unit = " and ".join(settings.entities)
        self.has_event_ids, self.has_times = settings.event_id is not None, settings.timestamp is not None
        self.rows = int(np.clip(_ENTITY_CELLS // (settings.dimension + 4), _FEWEST_ROWS, _MOST_ROWS))
        self.batches, self.changing = store.batches, store.changing

    def reader(self, source: EventSource) -> EntityReader:
        return EntityReader(self._store.settings, source, targets=True)

    def prepare(self, rows: Rows, tally: Tally) -> BoolArray:
        return np.ones(rows.y.size, np.bool_)

    def apply(  # noqa: PLR0917
        self, changes: Any, rows: Rows, chosen: IntArray, number: int, forgetting: float, tally: Tally
    ) -> None:
        store = self._store
        if rows.event is not None:
            names, code = numbered([rows.names[0][i] for i in chosen.tolist()])
            new = changes.add_events(0, store.tags(0, names), code, [rows.event[i] for i in chosen.tolist()])
            tally.already_applied += int((~new).sum())
            chosen = chosen[new]
        if not chosen.size:
            return
        if rows.time is not None:
            tally.late += _late(changes, rows.time[chosen])
        grouped = [numbered([names[i] for i in chosen.tolist()]) for names in rows.names]
        events = Events(
            X=rows.X[chosen],
            y=rows.y[chosen],
            weight=rows.weight[chosen],
            entity=tuple(code for _, code in grouped),
            tags=tuple(store.tags(kind, names) for kind, (names, _) in enumerate(grouped)),
        )
        with np.errstate(all="ignore"):
            done = update_events(
                changes, events, settings=store.settings, fixed=store.fixed, forgetting=forgetting, number=number
            )
        tally.events += chosen.size
        tally.updates += sum(done.entities)
        tally.not_converged += done.not_converged


def _late(changes: Any, time: Any) -> int:
    """How many events are earlier than one that was applied before them; the latest is remembered."""
    latest = changes.latest()
    start = -np.inf if latest is None else latest
    running = np.maximum.accumulate(np.concatenate([[start], time]))
    changes.set_latest(float(running[-1]))
    return int((time < running[:-1]).sum())


class _NodeTarget:
    """A node's store."""

    unit = "user"

    def __init__(self, state: NodeState) -> None:
        self._state, self._store = state, state.store
        data = state.settings.data
        self._encoder = InputEncoder(data)
        self.has_event_ids, self.has_times = data.event_id is not None, data.timestamp is not None
        self.rows = int(np.clip(_NODE_CELLS // (state.schema.dimension + 4), _FEWEST_ROWS, _MOST_ROWS // 5))
        self.batches, self.changing = state.store.batches, state.store.changing

    def reader(self, source: EventSource) -> NodeReader:
        settings = self._state.settings
        return NodeReader(settings.data, self._state.schema, settings.family, self._encoder, source, targets=True)

    def prepare(self, rows: Rows, tally: Tally) -> BoolArray:
        """New users take free places, as they do when the node reads its data; the forgotten stay forgotten."""
        names, code = numbered([rows.names[0][i] for i in np.flatnonzero(rows.usable).tolist()])
        slots = self._state.settings.users
        served = self._store.enrol(names, slots=slots)
        place = np.flatnonzero(served)
        served[place] = ~self._store.forgotten([names[i] for i in place.tolist()])
        able = np.zeros(rows.y.size, np.bool_)
        able[rows.usable] = served[code]
        tally.no_place += int((rows.usable & ~able).sum())
        return able

    def apply(  # noqa: PLR0917
        self, changes: Any, rows: Rows, chosen: IntArray, number: int, forgetting: float, tally: Tally
    ) -> None:
        users, user = numbered([rows.names[0][i] for i in chosen.tolist()])
        if rows.event is not None:
            new = changes.add_events(users, user, [rows.event[i] for i in chosen.tolist()])
            tally.already_applied += int((~new).sum())
            chosen = chosen[new]
            users, user = numbered([rows.names[0][i] for i in chosen.tolist()])
        if not chosen.size:
            return
        with np.errstate(all="ignore"):
            tally.not_converged += update_users(
                changes,
                users,
                user=user,
                X=rows.X[chosen],
                y=rows.y[chosen],
                weight=rows.weight[chosen],
                check=self._state.check,
                forgetting=forgetting,
                number=number,
                keep_gram=self._state.settings.keep_gram,
            )
        tally.events += chosen.size
        tally.updates += len(users)
