"""What is answered on a device from what it keeps: no server, no Flower, nothing that leaves."""

import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from client.entity_store import EntityStore
from client.mixed_effects import Events, score_events
from common.errors import UmbelError
from common.model import Array, IntArray
from common.streaming import EventSource, open_source, paths_of
from common.tables import BoolArray
from umbel.event_rows import EntityReader, numbered
from umbel.local_state import open_state

if TYPE_CHECKING:
    from umbel.node_state import NodeState

_CELLS, _MOST_ROWS = 2_000_000, 50_000
_SHOWN = 20


@dataclass(frozen=True, kw_only=True, eq=False)
class Question:
    """What is asked.

    Attributes:
        user: Whose answers; None where the rows say whose each is. Who is unknown gets what is expected of anybody.
        uncertainty: Whether to say how sure the answers are.
        seed: Of Thompson sampling's draws; None for none.
    """

    user: str | None = None
    uncertainty: bool = False
    seed: bytes | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Answers:
    """Answers for some rows; of no meaning where one is not usable.

    Attributes:
        row: `N` int64, their numbers in the file.
        usable: `N` bool, whether a row has all it should have.
        known: `N` bool, whether something is kept of whom it is about.
        score: `N`, what is expected of y: in the target's own units, or for `logistic` the probability of a 1.
        stddev: `N`, of the linear predictor: of y's expectation, or for `logistic` of its log odds. 0 if not asked for.
        drawn: `N`, the score with coefficients drawn from the posterior, once for each user; `score` if not asked for.
        problems: One line for each of the first rows that are not usable.
    """

    row: IntArray
    usable: BoolArray
    known: BoolArray
    score: Array
    stddev: Array
    drawn: Array
    problems: tuple[str, ...]


class Answering(Protocol):
    """Something that can be asked."""

    @property
    def family(self) -> str:
        """Loss family."""

    @property
    def run(self) -> str | None:
        """Which run released the model, if one did."""

    def answers(self, source: EventSource, question: Question) -> Iterator[Answers]:
        """For every row of a source, a piece at a time."""


def scores(X: Array, theta: Array, *, family: str, target_offset: float) -> Array:
    """`N`, what is expected of y: x'theta in the target's own units, or for `logistic` the probability of a 1.

    Args:
        X: `N x d`.
        theta: `d`.
        family: Loss family.
        target_offset: What was taken off the target.
    """
    return expected((X * theta).sum(axis=1), family, target_offset)


def new_seed(seed: int | None) -> bytes:
    """Of the draws of Thompson sampling: to repeat them, or from the operating system."""
    return os.urandom(16) if seed is None else f"seed {seed}".encode()


def answer(path: Path, inputs: Path, question: Question) -> Iterator[tuple[Answering, Answers]]:
    """Answers for every row of a file, a folder or a pipe, a piece at a time.

    Args:
        path: A store of entities, a node's settings, or its store.
        inputs: Rows with the columns of the features, and of whose they are unless `question.user` says.
        question: What is asked.

    Raises:
        UmbelError: If the store or the inputs cannot be used.
    """
    with open_state(path) as state:
        table, answering = _answering(state)
        for file in paths_of(inputs):
            with closing(open_source(file, table=table)) as source:
                for some in answering.answers(source, question):
                    yield answering, some


def predict(
    path: Path, user: str | None, inputs: Path, *, uncertainty: bool = False, seed: bytes | None = None
) -> dict[str, Any]:
    """Answers for every row, as one document.

    Args:
        path: As `answer`.
        user: As `Question`.
        inputs: As `answer`.
        uncertainty: As `Question`.
        seed: As `Question`.

    Returns:
        `user`, `source` ("posterior", "prior" where nothing is kept of anybody in the rows, or "mixed"), `run`,
        `family`, `rows` (their numbers in the file), `scores` (one a row; null where a row lacks a feature), `stddev`
        and `thompson` likewise where they were asked for, and `problems`.
    """
    found = list(answer(path, inputs, Question(user=user, uncertainty=uncertainty, seed=seed)))
    pieces = [some for _, some in found]
    known = np.concatenate([some.known[some.usable] for some in pieces] or [np.zeros(0, np.bool_)])
    document: dict[str, Any] = {
        "user": user,
        "source": "posterior" if known.size and known.all() else "mixed" if known.any() else "prior",
        "run": found[0][0].run if found else None,
        "family": found[0][0].family if found else None,
        "rows": [row for some in pieces for row in some.row.tolist()],
        "scores": [value for some in pieces for value in _plain(some.score, some)],
    }
    if uncertainty:
        document["stddev"] = [value for some in pieces for value in _plain(some.stddev, some)]
    if seed is not None:
        document["thompson"] = [value for some in pieces for value in _plain(some.drawn, some)]
    return document | {"problems": [problem for some in pieces for problem in some.problems][:_SHOWN]}


def _answering(state: "NodeState | EntityStore") -> tuple[str | None, Answering]:
    """The table that inputs of a SQLite file are in, and what answers."""
    if isinstance(state, EntityStore):
        return None, _Entities(state)
    from umbel.predict_node import NodeAnswers  # noqa: PLC0415  only nodes need what it imports

    return state.settings.data.table, NodeAnswers(state)


def _plain(values: Array, some: Answers) -> list[float | None]:
    good = some.usable & np.isfinite(values)
    return [value if fine else None for value, fine in zip(values.tolist(), good.tolist(), strict=True)]


def rows_at_once(dimension: int) -> int:
    """How many rows of so many features are a piece."""
    return max(1, min(_CELLS // (dimension + 4), _MOST_ROWS))


def expected(eta: Array, family: str, target_offset: float) -> Array:
    """`N`, what is expected of y for the linear predictors `eta`."""
    if family == "logistic":
        small = np.exp(-np.abs(eta))
        return np.where(eta >= 0, 1.0, small) / (1.0 + small)
    return eta + target_offset


class _Entities:
    """A store of entities."""

    run = None

    def __init__(self, store: EntityStore) -> None:
        self._store, self.family = store, store.settings.family

    def answers(self, source: EventSource, question: Question) -> Iterator[Answers]:
        store, settings = self._store, self._store.settings
        if question.user is not None and len(settings.entities) > 1:
            raise UmbelError(
                f"Expected rows with the columns {', '.join(settings.entities)}, got --user. Leave it out: one name is "
                "not enough for a score."
            )
        reader = EntityReader(settings, source, targets=False, entity=question.user)
        size = rows_at_once(settings.dimension)
        for piece in source.pieces(reader.columns, rows=size):
            rows = reader.read(piece.cells)
            grouped = [numbered(names) for names in rows.names]
            events = Events(
                X=rows.X,
                y=rows.y,
                weight=rows.weight,
                entity=tuple(code for _, code in grouped),
                tags=tuple(store.tags(kind, names) for kind, (names, _) in enumerate(grouped)),
            )
            found = score_events(
                store.load,
                events,
                settings=settings,
                fixed=store.fixed,
                spread=question.uncertainty,
                seed=question.seed,
            )
            yield Answers(
                row=piece.cells.rows,
                usable=rows.usable,
                known=found.known,
                score=expected(found.mean, self.family, 0.0),
                stddev=found.stddev,
                drawn=expected(found.drawn, self.family, 0.0),
                problems=rows.problems,
            )
