"""Cells out of files: CSV and its relatives, SQLite and Parquet, with the row each cell came from.

A folder of files of one kind is read as one table, its files in the order of their names: what a log shipper leaves.

Nothing here knows what a column means. A cell that cannot be used is never an exception but a row of a
`Check`, so that every bad row of a file can be named and counted. A message names file, row and column and
never the value, because the value is a user's.
"""

import csv
import sqlite3
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import chain, compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from common.errors import DataError
from common.model import Array, IntArray

BoolArray = npt.NDArray[np.bool_]

_SQLITE_SUFFIXES = (".db", ".sqlite", ".sqlite3")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_TEXT_SUFFIXES = (".csv", ".tsv", ".tab")
_SUFFIXES = (*_TEXT_SUFFIXES, *_SQLITE_SUFFIXES, *_PARQUET_SUFFIXES)

csv.field_size_limit(2**31 - 1)  # by default one long cell makes the whole file unreadable


class NoRows(DataError):
    """There is no source, or nobody's row in it: its users have no data, which is no mistake of anybody."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a text file is laid out.

    Attributes:
        delimiter: Between fields.
        quoted: Whether fields may be in double quotes; never with a delimiter of several characters.
        header: The columns of a file that does not start with a line of names.
        encoding: Of the file.
    """

    delimiter: str = ","
    quoted: bool = True
    header: tuple[str, ...] | None = None
    encoding: str = "utf-8-sig"


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """Some columns of a file, as read.

    Attributes:
        file: Name of the file for messages.
        columns: Column name to its cells, texts from a text file and plain values otherwise.
        rows: `N` int64, the number of each row in the file, from 1, a line of names included.
        complete: `N` bool, whether the row had as many fields as there are columns; if not, the fields that it
            has are taken in order and the others are empty, so that it may still say whose row it is.
        unread: One line for each file of a folder that could not be read, while another could.
    """

    file: str
    columns: dict[str, Sequence[Any]]
    rows: IntArray
    complete: BoolArray
    unread: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Check:
    """One thing that can be wrong with a row.

    Attributes:
        column: Where, or "" for the row as a whole.
        expected: What the cell should have been.
        bad: `N` bool, the rows in which it is not.
    """

    column: str
    expected: str
    bad: BoolArray


def column_names(path: Path, *, table: str | None = None, layout: Layout | None = None) -> tuple[str, ...]:
    """The columns of a file, in order.

    Raises:
        DataError: If the file is missing, empty, or not of the kind its suffix says.
    """
    if path.is_dir():
        return _folder_names(path, table, layout)
    if path.suffix in _SQLITE_SUFFIXES:
        return _sqlite_names(path, _sqlite_table(path, table))
    if path.suffix in _PARQUET_SUFFIXES:
        return _parquet_names(path)
    return _text_header(path, layout or _layout_of(path))


def describe_columns(path: Path, known: Sequence[str], expected: Iterable[str]) -> str:
    """The columns a file has, for an error; not if they may be somebody's data.

    A text file without a header starts with the first person's row: its fields are named only where at least one of
    them is a name that was expected.
    """
    named = path.suffix in (*_SQLITE_SUFFIXES, *_PARQUET_SUFFIXES) or not set(known).isdisjoint(expected)
    if named:
        return f"The columns are: {', '.join(known)}."
    return f"Its first line has {len(known)} fields, none with a name that was expected: it must be a header."


def read_cells(path: Path, names: Sequence[str], *, table: str | None = None, layout: Layout | None = None) -> Cells:
    """The columns `names` of a file.

    Raises:
        DataError: If the file cannot be read or lacks one of the columns.
        NoRows: If it has no row.
    """
    if path.is_dir():
        return _folder_cells(path, names, table, layout)
    known = column_names(path, table=table, layout=layout)
    for name in names:
        if known.count(name) != 1:
            problem = "twice" if name in known else "no such column"
            raise DataError(
                f"{path.name}: Expected one column {name!r}, got {problem}. {describe_columns(path, known, names)}"
            )
    wanted = tuple(dict.fromkeys(names))
    if path.suffix in _SQLITE_SUFFIXES:
        cells = _sqlite_cells(path, wanted, _sqlite_table(path, table))
    elif path.suffix in _PARQUET_SUFFIXES:
        cells = _parquet_cells(path, wanted)
    else:
        cells = _text_cells(path, wanted, known, layout or _layout_of(path))
    if not cells.rows.size:
        raise NoRows(f"{path.name}: Expected at least one row of data, got none.")
    return cells


def files_of(path: Path) -> tuple[Path, ...]:
    """The files that a source consists of: itself, or those in a folder that are tables, by name.

    Hidden files, and those whose suffix is not one of a table, are somebody's work in progress.

    Raises:
        NoRows: If there is none.
        DataError: If a folder holds tables of different kinds.
    """
    if not path.is_dir():
        return (path,)
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise DataError(f"{path}: Expected a folder that can be read, got {error.strerror}.") from error
    files = tuple(entry for entry in entries if entry.suffix in _SUFFIXES and not entry.name.startswith((".", "_")))
    if not files:
        raise NoRows(f"{path}: Expected files ending in {', '.join(_SUFFIXES)}, got none.")
    if len({entry.suffix for entry in files}) > 1:
        raise DataError(f"{path}: Expected files of one kind, got several. Move the others away.")
    return files


def _folder_names(path: Path, table: str | None, layout: Layout | None) -> tuple[str, ...]:
    """The columns of the first file that can be read."""
    problem: DataError | None = None
    for file in files_of(path):
        try:
            return column_names(file, table=table, layout=layout)
        except DataError as error:
            problem = problem or error
    raise problem or NoRows(f"{path}: Expected a file, got none.")


def _folder_cells(path: Path, names: Sequence[str], table: str | None, layout: Layout | None) -> Cells:
    """The rows of all files that can be read: one that cannot is left out, as it may hold but one user's data."""
    parts, problems = [], []
    for file in files_of(path):
        try:
            parts.append(read_cells(file, names, table=table, layout=layout))
        except NoRows:
            continue
        except DataError as error:
            problems.append(error)
    if not parts:
        raise problems[0] if problems else NoRows(f"{path.name}: Expected at least one row of data, got none.")
    return Cells(
        file=path.name,
        columns={name: list(chain.from_iterable(part.columns[name] for part in parts)) for name in parts[0].columns},
        rows=np.concatenate([part.rows for part in parts]),
        complete=np.concatenate([part.complete for part in parts]),
        unread=tuple(str(problem) for problem in problems),
    )


def completeness(cells: Cells, known: Sequence[str]) -> Check:
    """The check that rows have all their fields."""
    return Check(column="", expected=f"{len(known)} fields", bad=~cells.complete)


def as_texts(values: Sequence[Any]) -> list[str]:
    """Cells as stripped texts, "" where missing; 7.0 reads as "7", so that ids agree between file kinds."""
    if all(type(value) is str for value in values):
        return [value.strip() for value in values]
    return [_as_text(value) for value in values]


def as_numbers(values: Sequence[Any]) -> Array:
    """Cells as float64, NaN where a cell is not a finite number."""
    try:
        numbers = np.fromiter(map(float, values), dtype=np.float64, count=len(values))
    except (ValueError, TypeError, OverflowError):
        numbers = np.array([_as_number(value) for value in values], dtype=np.float64)
    numbers[~np.isfinite(numbers)] = np.nan
    return numbers


def as_times(values: Sequence[Any]) -> Array:
    """Cells as seconds: numbers as they are, ISO 8601 texts and datetimes as Unix time, NaN otherwise."""
    numbers = as_numbers(values)
    for i in np.flatnonzero(np.isnan(numbers)):
        numbers[i] = _as_time(values[int(i)])
    return numbers


def number_check(column: str, numbers: Array) -> Check:
    """The check that a column is finite numbers."""
    return Check(column=column, expected="a finite number", bad=np.isnan(numbers))


def text_check(column: str, texts: Sequence[str]) -> Check:
    """The check that a column is filled in."""
    empty = np.fromiter((not text for text in texts), dtype=np.bool_, count=len(texts))
    return Check(column=column, expected="a value", bad=empty)


def bad_rows(cells: Cells, checks: Sequence[Check]) -> BoolArray:
    """`N` bool, rows that fail any check."""
    bad = np.zeros(cells.rows.size, dtype=np.bool_)
    for check in checks:
        bad |= check.bad
    return bad


def describe_bad_rows(cells: Cells, checks: Sequence[Check], *, limit: int) -> list[str]:
    """One line for each of the first `limit` bad rows, with the first thing that is wrong in it."""
    lines = []
    for i in np.flatnonzero(bad_rows(cells, checks))[:limit]:
        check = next(check for check in checks if check.bad[i])
        column = f", column {check.column!r}" if check.column else ""
        lines.append(f"{cells.file}, row {cells.rows[i]}{column}: Expected {check.expected}.")
    return lines


def _as_text(value: Any) -> str:
    if value is None or value != value:  # noqa: PLR0124  NaN is how Parquet may say missing
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value).strip()


def _as_number(value: Any) -> float:
    try:
        return float(value)
    except (ValueError, TypeError, OverflowError):
        return float("nan")


def _as_time(value: Any) -> float:
    try:
        moment = value if isinstance(value, datetime) else datetime.fromisoformat(value.strip())
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, AttributeError, OverflowError):
        return float("nan")


def _layout_of(path: Path) -> Layout:
    return Layout(delimiter="\t" if path.suffix in (".tsv", ".tab") else ",")


def _records(path: Path, layout: Layout) -> Generator[list[str], None, None]:
    """Every record of a text file, blank lines as empty lists; bytes that are no text are written out.

    Only the first line must be text: one bad byte in a user's row is that row's, not the whole table's.
    """
    try:
        with path.open("rb") as first:
            first.readline().decode(layout.encoding)
        newline = "" if layout.quoted else None
        with path.open(encoding=layout.encoding, errors="backslashreplace", newline=newline) as file:
            if layout.quoted:
                yield from csv.reader(file, delimiter=layout.delimiter, strict=True)
            for line in file:
                yield line.rstrip("\n").split(layout.delimiter) if line.strip() else []
    except OSError as error:
        raise DataError(f"{path}: Expected a file that can be read, got {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name}: Expected text in UTF-8, got other bytes. Convert the file.") from error
    except csv.Error as error:
        raise DataError(f"{path.name}: Expected CSV, got this problem: {error}.") from error


def _text_header(path: Path, layout: Layout) -> tuple[str, ...]:
    with closing(_records(path, layout)) as records:
        first = next(records, None)
    if first is None:
        raise NoRows(f"{path.name}: Expected a line of column names, got an empty file.")
    return layout.header or tuple(name.strip() for name in first)


def _text_cells(path: Path, names: tuple[str, ...], known: tuple[str, ...], layout: Layout) -> Cells:
    first_row = 1 if layout.header else 2
    records = list(_records(path, layout))[first_row - 1 :]
    return cells_of_records(path.name, records, names=names, known=known, first_row=first_row)


def cells_of_records(
    file: str, records: Sequence[list[str]], *, names: Sequence[str], known: Sequence[str], first_row: int
) -> Cells:
    """The columns `names` of some records of a text file whose columns are `known`; an empty record is a blank line.

    Args:
        file: Name of the file for messages.
        records: Fields of each.
        names: Which columns.
        known: All columns of the file, in order.
        first_row: Number of the first record.
    """
    width = np.fromiter(map(len, records), dtype=np.int64, count=len(records))
    filled = width > 0
    complete = width == len(known)
    if not complete.all():
        blank = [""] * len(known)
        records = [r if fits else (r + blank)[: len(known)] for r, fits in zip(records, complete, strict=True)]
        records = list(compress(records, filled))
    columns = list(zip(*records, strict=True)) or [()] * len(known)
    return Cells(
        file=file,
        columns={name: columns[known.index(name)] for name in names},
        rows=np.flatnonzero(filled) + first_row,
        complete=complete[filled],
    )


def _connect(path: Path) -> sqlite3.Connection:
    if not path.is_file():
        raise DataError(f"{path}: Expected a file that can be read, got none.")
    return sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)


def _query(path: Path, sql: str) -> list[tuple[Any, ...]]:
    try:
        with closing(_connect(path)) as connection:
            # one cell that is not UTF-8 is one cell, not the whole table
            connection.text_factory = partial(str, encoding="utf-8", errors="backslashreplace")
            return connection.execute(sql).fetchall()
    except sqlite3.Error as error:
        # Its own text is left out: it may quote a cell.
        problem = getattr(error, "sqlite_errorname", "another problem")
        raise DataError(f"{path.name}: Expected a readable SQLite database, got {problem}.") from error


def _sqlite_table(path: Path, table: str | None) -> str:
    kinds = "type IN ('table', 'view') AND name NOT LIKE 'sqlite!_%' ESCAPE '!'"
    tables = [str(name) for (name,) in _query(path, f"SELECT name FROM sqlite_master WHERE {kinds}")]  # noqa: S608
    if table is None and len(tables) == 1:
        return tables[0]
    if table not in tables:
        raise DataError(
            f"{path.name}: Expected data.table to be one of its tables, got data.table={table!r}. "
            f"The tables are: {', '.join(tables) or '(none)'}."
        )
    return table


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _sqlite_names(path: Path, table: str) -> tuple[str, ...]:
    return tuple(str(row[1]) for row in _query(path, f"PRAGMA table_info({_quoted(table)})"))


def _sqlite_cells(path: Path, names: tuple[str, ...], table: str) -> Cells:
    # Names are quoted and known to be the file's own columns.
    selected = ", ".join(map(_quoted, names))
    values = _query(path, f"SELECT {selected} FROM {_quoted(table)}")  # noqa: S608
    return _whole_cells(path, dict(zip(names, zip(*values, strict=True), strict=bool(values))), len(values))


def _parquet() -> Any:
    try:
        from pyarrow import parquet  # noqa: PLC0415  an optional extra
    except ImportError as error:
        raise DataError(
            'Expected pyarrow to read Parquet, got no such package. Run: pip install "umbel[parquet]"'
        ) from error
    return parquet


def _parquet_names(path: Path) -> tuple[str, ...]:
    parquet = _parquet()
    try:
        return tuple(parquet.read_schema(path).names)
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise DataError(f"{path.name}: Expected a readable Parquet file, got: {error}.") from error


def _parquet_cells(path: Path, names: tuple[str, ...]) -> Cells:
    parquet = _parquet()
    try:
        table = parquet.read_table(path, columns=list(names))
    except (OSError, ValueError) as error:
        raise DataError(f"{path.name}: Expected a readable Parquet file, got: {error}.") from error
    return _whole_cells(path, {name: table.column(name).to_pylist() for name in names}, table.num_rows)


def _whole_cells(path: Path, columns: dict[str, Sequence[Any]], num_rows: int) -> Cells:
    return Cells(
        file=path.name,
        columns=columns,
        rows=np.arange(1, num_rows + 1),
        complete=np.ones(num_rows, dtype=np.bool_),
    )
