"""`umbel update` and `umbel predict`: what is learned and answered from what is kept, without the server."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import UmbelError
from umbel.commands import Format, FormatOption, PlainCommand, print_json

commands = typer.Typer()


class FamilyName(StrEnum):
    """Loss families."""

    LOGISTIC = "logistic"
    SQUARED = "squared"


class CurvatureName(StrEnum):
    """What is kept of an entity's precision."""

    FULL = "full"
    DIAGONAL = "diagonal"


@commands.command(
    epilog="""\b
Examples:
  umbel update --store nodes/edge-1/store/node.sqlite --events new.csv
  umbel update --store clicks.umbel --init --entity user --entity item --target click --feature age --feature hour
  umbel update --store clicks.umbel --events clicks/ --forgetting 0.8
  tail -n +1 -F clicks.jsonl | umbel update --store clicks.umbel --events - --batch-id clicks
Run it again after a crash: it goes on where it was. What was applied is not applied again.""",
    cls=PlainCommand,
)
def update(
    *,
    store: Annotated[Path, typer.Option(help="A store of entities, a node's store, or its node.toml.")],
    events: Annotated[
        Path | None,
        typer.Option(help="File, folder, named pipe, or - for standard input: CSV, JSON lines, Parquet, SQLite."),
    ] = None,
    forgetting: Annotated[
        float, typer.Option(min=0, max=1, help="How much of an entity's past counts in each batch.")
    ] = 1.0,
    since: Annotated[str | None, typer.Option(help="Leave out events before: seconds or an ISO 8601 time.")] = None,
    batch_id: Annotated[
        str | None, typer.Option(help="Name of the batch; by default a file is known by its bytes.")
    ] = None,
    batch_events: Annotated[
        int | None, typer.Option(min=1, help="A new batch after so many rows; by default a file is one.")
    ] = None,
    patience: Annotated[
        float, typer.Option(min=0.01, max=3600, help="Seconds of silence after which a pipe's events are applied.")
    ] = 1.0,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a bad row; otherwise it is left out.")] = False,
    keep_gram: Annotated[
        bool, typer.Option("--keep-gram", help="Stop unless the node's settings have keep_gram = true.")
    ] = False,
    init: Annotated[bool, typer.Option("--init", help="Make a store of entities first, with what follows.")] = False,
    entity: Annotated[list[str] | None, typer.Option(help="Column that names an entity; one for each type.")] = None,
    target: Annotated[str | None, typer.Option(help="Column of the target.")] = None,
    feature: Annotated[
        list[str] | None, typer.Option(help="Column of a feature; without --init it is added to the store.")
    ] = None,
    family: Annotated[FamilyName | None, typer.Option(help="Loss; by default logistic.")] = None,
    prior_precision: Annotated[float | None, typer.Option(help="Of a coefficient at first; by default 1.")] = None,
    noise_variance: Annotated[float | None, typer.Option(help="Of an example, if squared; by default 1.")] = None,
    curvature: Annotated[CurvatureName | None, typer.Option(help="Kept of the precision; by default full.")] = None,
    weight: Annotated[str | None, typer.Option(help="Column of weights.")] = None,
    timestamp: Annotated[str | None, typer.Option(help="Column of times.")] = None,
    event_id: Annotated[str | None, typer.Option(help="Column of the events' ids.")] = None,
    fixed: Annotated[
        Path | None, typer.Option(help="CSV of the fixed effect, feature,coefficient; by default zero.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress; warnings and results stay.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Bring personal models up to date with new events, on this machine."""
    made: dict[str, Any] = {
        "entity": entity,
        "target": target,
        "family": family,
        "prior_precision": prior_precision,
        "noise_variance": noise_variance,
        "curvature": curvature,
        "weight": weight,
        "timestamp": timestamp,
        "event_id": event_id,
        "fixed": fixed,
    }
    given = {name: value for name, value in made.items() if value is not None and value != []}
    if not init and given:
        option = "--" + next(iter(given)).replace("_", "-")
        raise UmbelError(f"Expected {option} with --init only, got it without. A store keeps what it was made with.")
    if init:
        _make(store, given, feature or [])
    elif events is None:
        raise UmbelError("Expected --events, got none. Name a file or a folder, or - for standard input.")
    if events is None:
        _show_made(store, output)
        return
    from umbel.update import update as apply

    try:
        with _progress(quiet=quiet) as watcher:
            document = apply(
                store,
                events,
                forgetting=forgetting,
                since=_seconds(since),
                batch_id=batch_id,
                batch_events=batch_events,
                features=() if init else tuple(feature or ()),
                strict=strict,
                patience=patience,
                keep_gram=keep_gram,
                watcher=watcher,
            )
    except KeyboardInterrupt:
        from umbel.cli import RunInterruptedError

        raise RunInterruptedError("interrupted; what was applied stays. Run it again to go on.") from None
    if output is Format.JSON:
        print_json(document)
        return
    _show_update(document)


@commands.command(
    epilog="""\b
Examples:
  umbel predict node.toml --user ann --input new.csv
  umbel predict --store nodes/edge-1/store/node.sqlite --events new.csv --uncertainty
  umbel predict --store clicks.umbel --events candidates.csv --thompson --seed 7 --format json""",
    cls=PlainCommand,
)
def predict(
    settings: Annotated[Path | None, typer.Argument(metavar="[NODE.toml]", help="The node's settings.")] = None,
    *,
    store: Annotated[
        Path | None, typer.Option(help="Or: a store of entities, a node's store, or its node.toml.")
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="Whose answers; by default the rows have a column that says.")
    ] = None,
    inputs: Annotated[
        Path, typer.Option("--input", "--events", help="Rows to answer for, with the features' columns.")
    ],
    uncertainty: Annotated[bool, typer.Option("--uncertainty", help="Also the standard deviation.")] = False,
    thompson: Annotated[
        bool, typer.Option("--thompson", help="Also the score under one draw of each user's model.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of the draws, to repeat them.")] = None,
    output: FormatOption = Format.TEXT,
) -> None:
    """Answer for users or entities of this machine, without the server."""
    path = settings if store is None else store
    if path is None or (settings is not None and store is not None):
        raise UmbelError("Expected NODE.toml or --store, got neither or both. Name one.")
    if seed is not None and not thompson:
        raise UmbelError("Expected --seed with --thompson, got it alone. Nothing else is drawn.")
    from umbel import predict as answering

    drawn = answering.new_seed(seed) if thompson else None
    if output is Format.JSON:
        print_json(answering.predict(path, user, inputs, uncertainty=uncertainty, seed=drawn))
        return
    question = answering.Question(user=user, uncertainty=uncertainty, seed=drawn)
    columns = (
        {"score": "score"} | ({"stddev": "stddev"} if uncertainty else {}) | ({"thompson": "drawn"} if thompson else {})
    )
    unknown, header = 0, ",".join(["row", *columns])
    for _, some in answering.answer(path, inputs, question):
        unknown += int((some.usable & ~some.known).sum())
        for problem in some.problems:
            _say(f"left out: {problem}")
        values = [getattr(some, attribute).tolist() for attribute in columns.values()]
        lines = [header] if header else []
        for row, usable, *numbers in zip(some.row.tolist(), some.usable.tolist(), *values, strict=True):
            lines.append(",".join([str(row), *(format(v, ".9g") if usable else "" for v in numbers)]))
        print("\n".join(lines))  # noqa: T201 (the command line's voice)
        header = ""
    if header:
        print(header)  # noqa: T201
    if unknown:
        whom = "this user" if user is not None else "those whom they are about"
        _say(f"Nothing is kept of {whom} in {unknown} of the rows: these are the answers for anybody.")


def _make(path: Path, given: dict[str, Any], features: list[str]) -> None:
    from umbel.entity_settings import make_store

    plain: dict[str, Any] = {name: str(v) if isinstance(v, StrEnum) else v for name, v in given.items()}
    make_store(path, features=tuple(features), **plain)


def _show_made(path: Path, output: Format) -> None:
    if output is Format.JSON:
        print_json({"store": str(path), "sources": []})
    else:
        _say(f"Made {path}. Apply events with: umbel update --store {path} --events FILE")


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    from common.tables import as_times

    seconds = float(as_times([text])[0])
    if seconds != seconds:  # noqa: PLR0124  NaN
        raise UmbelError("Expected seconds or an ISO 8601 time, as 2026-11-20T09:00:00, got another --since.")
    return seconds


def _show_update(document: dict[str, Any]) -> None:
    for problem in document["problems"]:
        _say(problem)
    counts = {
        "bad_rows": "bad rows left out",
        "already_applied": "events applied before",
        "before_since": "events before --since",
        "no_place": "events of users without a place on this node, or forgotten",
        "late": "events earlier than one applied before them",
        "clipped": "numbers outside their declared range, cut to it",
        "not_converged": "updates that did not converge",
    }
    for name, words in counts.items():
        if document[name]:
            _say(f"{document[name]} {words}")
    for source in document["sources"]:
        if source["status"] == "applied before":
            _say(f"{source['source']}: applied before; nothing changed")
    print(f"{document['events']} events applied in {document['updates']} updates of a {document['unit']}")  # noqa: T201


class _Bar:
    """Progress as a bar on a terminal."""

    def __init__(self, bar: Any) -> None:
        self._bar, self._tasks = bar, {}  # type: ignore[var-annotated]

    def progress(self, name: str, share: float | None, events: int) -> None:
        """The bar of this source moves on."""
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=None if share is None else 1.0, events=0)
        self._bar.update(self._tasks[name], completed=share or 0.0, events=events)


@contextmanager
def _progress(*, quiet: bool) -> Iterator[_Bar | None]:
    """A bar on a terminal; a log gets the result only, and no library for it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[events]} events", markup=False),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _Bar(bar)


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
