"""Events out of files and pipes, a piece at a time: a piece is all that is in memory, however long the source.

How far a source was read is a `Position`. In a text it is an offset and the digest of all bytes before it, so a file
that has grown since, as a log does, is recognised by its beginning and read on from there; bytes that changed make it
another file. Nothing here knows what a column means, and no message holds a value.
"""

import csv
import hashlib
import json
import os
import select
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.errors import DataError
from common.tables import Cells, NoRows, cells_of_records, column_names, read_cells

STANDARD_INPUT = Path("-")
_DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_JSON_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")
_WHOLE = (".db", ".sqlite", ".sqlite3")
_SUFFIXES = (*_DELIMITERS, *_JSON_LINES, *_PARQUET, *_WHOLE)
_BLOCK = 2**18
_LONGEST_RECORD = 2**24
_PIECE_BYTES = 2**26
_OPEN_QUOTE = 2**20
_NOTHING = hashlib.sha256().digest()


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a source was read.

    Attributes:
        offset: Bytes of a text, rows of a table.
        row: Records of a text, the line of names included; rows of a table.
        digest: SHA-256: of a text's bytes before `offset`, or of a table's whole file.
    """

    offset: int = 0
    row: int = 0
    digest: bytes = _NOTHING


@dataclass(frozen=True, kw_only=True, eq=False)
class Piece:
    """Some rows that follow each other.

    Attributes:
        cells: Of the columns that were asked for.
        end: Where the next piece begins.
    """

    cells: Cells
    end: Position


class EventSource(Protocol):
    """A file or a pipe."""

    name: str
    columns: tuple[str, ...]
    is_json: bool

    def begin(self, known: Sequence[Position]) -> Position | None:
        """Skip the longest beginning that is among `known`; None where none is, and nothing is skipped."""

    def pieces(self, names: Sequence[str], *, rows: int) -> Iterator[Piece]:
        """The rest, in pieces of at most `rows` rows; a pipe's may be shorter, so that what arrived is not kept."""

    def share(self) -> float | None:
        """How much was read, from 0 to 1; None where nobody knows."""

    def close(self) -> None:
        """Let go of it."""


def paths_of(path: Path) -> tuple[Path, ...]:
    """The files of a source by name: itself, or those in a folder that hold events.

    Hidden files, and those whose suffix is another, are somebody's work in progress.

    Raises:
        NoRows: If there is none.
    """
    if not path.is_dir():
        return (path,)
    files = tuple(f for f in sorted(path.iterdir()) if f.suffix in _SUFFIXES and not f.name.startswith((".", "_")))
    if not files:
        raise NoRows(f"{path}: Expected files ending in {', '.join(_SUFFIXES)}, got none.")
    return files


def open_source(path: Path, *, patience: float = 1.0, table: str | None = None) -> EventSource:
    """A file by its suffix, or standard input and pipes, whose first character tells JSON lines from CSV.

    Args:
        path: A file, a named pipe, or "-".
        patience: Seconds that a pipe may be silent before what has arrived is a piece.
        table: Which table of a SQLite file.

    Raises:
        DataError: If it cannot be read, or is of another kind.
    """
    if path == STANDARD_INPUT:
        return TextSource(sys.stdin.fileno(), name="standard input", patience=patience)
    try:
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            return TextSource(os.open(path, os.O_RDONLY), name=path.name, patience=patience)
        if path.suffix in _PARQUET:
            return ParquetSource(path)
        if path.suffix in _WHOLE:
            return WholeSource(path, table)
        if path.suffix not in _SUFFIXES:
            raise DataError(f"{path.name}: Expected a name ending in {', '.join(_SUFFIXES)}, got another. Rename it.")
        return TextSource(os.open(path, os.O_RDONLY), name=path.name, size=path.stat().st_size, suffix=path.suffix)
    except OSError as error:
        raise DataError(f"{path}: Expected a file that can be read, got {error.strerror}.") from error


class _Lines:
    """Lines of a descriptor, with how many bytes they were and their digest."""

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name
        self._buffer = bytearray()
        self._ended = False
        self._hash = hashlib.sha256()
        self.offset = 0

    def peek(self) -> bytes:
        """The next line, which stays to be read; empty at the end."""
        self._fill(None)
        return bytes(self._buffer[: self._buffer.find(b"\n") + 1 or len(self._buffer)])

    def next(self, patience: float | None) -> bytes | None:
        """The next line with its end, b"" at the end of all; None if none came within `patience` seconds."""
        if not self._fill(patience):
            return None
        line = bytes(self._buffer[: self._buffer.find(b"\n") + 1 or len(self._buffer)])
        del self._buffer[: len(line)]
        self._count(line)
        return line

    def digest(self) -> bytes:
        return self._hash.digest()

    def skip(self, wanted: dict[int, set[bytes]], *, seek: bool) -> bool:
        """Go to the last offset of `wanted` whose digest is one of its; back to where it was if none is."""
        best = (self.offset, self._hash.copy()) if seek else None
        found = False
        for offset in sorted(wanted):
            if not self._pass(offset - self.offset):
                break
            if self._hash.digest() in wanted[offset]:
                found, best = True, (offset, self._hash.copy())
        if seek and best is not None:
            self.offset, self._hash = best
            self._buffer.clear()
            self._ended = False
            os.lseek(self._descriptor, self.offset, os.SEEK_SET)
        return found

    def _pass(self, length: int) -> bool:
        while length:
            if not self._buffer:
                self._buffer += os.read(self._descriptor, _BLOCK)
                if not self._buffer:
                    return False
            taken = bytes(self._buffer[:length])
            del self._buffer[: len(taken)]
            self._count(taken)
            length -= len(taken)
        return True

    def _fill(self, patience: float | None) -> bool:
        start = 0
        while not self._ended and self._buffer.find(b"\n", start) < 0:
            start = len(self._buffer)
            if start > _LONGEST_RECORD:
                raise DataError(f"{self._name}: Expected lines of less than {_LONGEST_RECORD} bytes, got a longer one.")
            if patience is not None and not select.select([self._descriptor], [], [], patience)[0]:
                return False
            block = os.read(self._descriptor, _BLOCK)
            self._ended = not block
            self._buffer += block
        return True

    def _count(self, data: bytes) -> None:
        self.offset += len(data)
        self._hash.update(data)


class TextSource:
    """CSV, its relatives and JSON lines."""

    def __init__(
        self, descriptor: int, *, name: str, size: int | None = None, suffix: str | None = None, patience: float = 1.0
    ) -> None:
        """Read the line of names.

        Args:
            descriptor: Open for reading; closed by `close`, unless it is standard input.
            name: For messages.
            size: Of a file, in bytes; None for a pipe.
            suffix: What it holds; None to be found out.
            patience: As `open_source`.
        """
        self.name, self._descriptor, self._size, self._patience = name, descriptor, size, patience
        self._lines, self._row = _Lines(descriptor, name), 0
        try:
            first = self._lines.peek().removeprefix(b"\xef\xbb\xbf").lstrip()
            if not first and size is not None:
                raise NoRows(f"{name}: Expected a line of column names, got an empty file.")
            self.is_json = suffix in _JSON_LINES or (suffix is None and first.startswith(b"{"))
            self._delimiter = _DELIMITERS.get(suffix or "", ",")
            self.columns = self._keys(first) if self.is_json else self._header()
        except BaseException:
            self.close()
            raise

    def begin(self, known: Sequence[Position]) -> Position | None:
        """As `EventSource`; of a pipe only one can be known, and what does not begin with it is an error."""
        wanted: dict[int, set[bytes]] = {}
        rows = {}
        for position in known:
            if position.offset >= self._lines.offset and (self._size is None or position.offset <= self._size):
                wanted.setdefault(position.offset, set()).add(position.digest)
                rows[position.offset, position.digest] = position
        if not wanted:
            return None
        found = self._lines.skip(wanted, seek=self._size is not None)
        if not found:
            return None
        position = rows[self._lines.offset, self._lines.digest()]
        self._row = position.row
        return position

    def pieces(self, names: Sequence[str], *, rows: int) -> Iterator[Piece]:
        """As `EventSource`."""
        while lines := self._piece(rows):
            first = self._row + 1
            cells = self._parse_json(lines, names, first) if self.is_json else self._parse(lines, names, first)
            yield Piece(
                cells=cells,
                end=Position(offset=self._lines.offset, row=self._row, digest=self._lines.digest()),
            )

    def share(self) -> float | None:
        """As `EventSource`."""
        return None if not self._size else min(1.0, self._lines.offset / self._size)

    def close(self) -> None:
        """As `EventSource`."""
        if self._descriptor > 2:
            os.close(self._descriptor)
            self._descriptor = 0

    def _piece(self, rows: int) -> list[bytes]:
        """Lines of whole records; a quote that was never meant to open a field only makes a piece longer."""
        lines: list[bytes] = []
        size = quotes = 0
        open_since = None
        while size < _PIECE_BYTES:
            if open_since is None and len(lines) >= rows:
                break
            if open_since is not None and size - open_since > _OPEN_QUOTE and len(lines) >= rows:
                break
            waits = lines and self._size is None and open_since is None
            line = self._lines.next(self._patience if waits else None)
            if not line:
                break
            lines.append(line)
            size += len(line)
            quotes += 0 if self.is_json else line.count(b'"')
            open_since = (open_since or size) if quotes % 2 else None
        return lines

    def _header(self) -> tuple[str, ...]:
        lines = [self._lines.next(None) or b""]
        while sum(line.count(b'"') for line in lines) % 2 and (line := self._lines.next(None)):
            lines.append(line)
        records = self._records([lines[0].removeprefix(b"\xef\xbb\xbf"), *lines[1:]], errors="strict")
        self._row = 1
        return tuple(name.strip() for name in records[0]) if records else ()

    def _records(self, lines: Sequence[bytes], *, errors: str = "backslashreplace") -> list[list[str]]:
        """Fields of each record; one bad byte in a user's row is that row's, not the whole table's."""
        try:
            texts = [line.decode(errors=errors) for line in lines]
            return list(csv.reader(texts, delimiter=self._delimiter, strict=True))
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name}: Expected text in UTF-8, got other bytes. Convert the file.") from error
        except csv.Error as error:
            raise DataError(f"{self.name}: Expected CSV after row {self._row}, got this problem: {error}.") from error

    def _parse(self, lines: Sequence[bytes], names: Sequence[str], first: int) -> Cells:
        records = self._records(lines)
        self._row += len(records)
        return cells_of_records(self.name, records, names=names, known=self.columns, first_row=first)

    def _parse_json(self, lines: Sequence[bytes], names: Sequence[str], first: int) -> Cells:
        objects = [_json_object(line) for line in lines if line.strip()]
        numbers = [first + i for i, line in enumerate(lines) if line.strip()]
        self._row += len(lines)
        return Cells(
            file=self.name,
            columns={name: [None if row is None else row.get(name) for row in objects] for name in names},
            rows=np.array(numbers, np.int64),
            complete=np.array([row is not None for row in objects], np.bool_),
        )

    def _keys(self, first: bytes) -> tuple[str, ...]:
        found = _json_object(first)
        if found is None:
            raise DataError(f"{self.name}: Expected a JSON object in each line, got another first line.")
        return tuple(found)


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


class _Table:
    """A file that is known as a whole: it has grown or changed if its digest has."""

    is_json = False

    def __init__(self, path: Path) -> None:
        self._path, self.name = path, path.name
        with path.open("rb") as file:
            self._digest = hashlib.file_digest(file, "sha256").digest()
        self._offset = 0

    def begin(self, known: Sequence[Position]) -> Position | None:
        """As `EventSource`."""
        found = max((p for p in known if p.digest == self._digest), key=lambda p: p.offset, default=None)
        self._offset = 0 if found is None else found.offset
        return found

    def close(self) -> None:
        """Nothing is open between pieces."""

    def _end(self) -> Position:
        return Position(offset=self._offset, row=self._offset, digest=self._digest)


class ParquetSource(_Table):
    """A Parquet file, a few row groups in memory."""

    def __init__(self, path: Path) -> None:
        """Read the names of its columns."""
        super().__init__(path)
        self.columns = column_names(path)
        self._num_rows = 0

    def pieces(self, names: Sequence[str], *, rows: int) -> Iterator[Piece]:
        """As `EventSource`."""
        from pyarrow import parquet  # noqa: PLC0415  an optional extra, which `column_names` asked for

        with closing(parquet.ParquetFile(self._path)) as file:
            self._num_rows, seen, start = file.metadata.num_rows, 0, self._offset
            for batch in file.iter_batches(batch_size=rows, columns=list(dict.fromkeys(names))):
                first = max(seen, start)
                seen += batch.num_rows
                if seen <= start:
                    continue
                rest = batch.slice(batch.num_rows - (seen - first))
                self._offset = seen
                yield Piece(cells=_cells(self.name, rest, names, first + 1), end=self._end())

    def share(self) -> float | None:
        """As `EventSource`."""
        return self._offset / self._num_rows if self._num_rows else None


def _cells(name: str, batch: Any, names: Sequence[str], first: int) -> Cells:
    def values(column: Any) -> Sequence[Any]:
        plain = column.null_count == 0 and str(column.type) in {"double", "float", "int64", "int32", "int8"}
        found: Sequence[Any] = column.to_numpy(zero_copy_only=False) if plain else column.to_pylist()
        return found

    return Cells(
        file=name,
        columns={column: values(batch.column(column)) for column in names},
        rows=np.arange(first, first + batch.num_rows),
        complete=np.ones(batch.num_rows, np.bool_),
    )


class WholeSource(_Table):
    """A SQLite file, which is read at once."""

    def __init__(self, path: Path, table: str | None) -> None:
        """Read the names of its columns."""
        super().__init__(path)
        self._table = table
        self.columns = column_names(path, table=table)

    def pieces(self, names: Sequence[str], *, rows: int) -> Iterator[Piece]:
        """As `EventSource`."""
        cells = read_cells(self._path, names, table=self._table)
        for start in range(self._offset, cells.rows.size, rows):
            part = slice(start, start + rows)
            self._offset = min(start + rows, cells.rows.size)
            columns = {name: values[part] for name, values in cells.columns.items()}
            found = Cells(file=self.name, columns=columns, rows=cells.rows[part], complete=cells.complete[part])
            yield Piece(cells=found, end=self._end())

    def share(self) -> float | None:
        """As `EventSource`."""
        return None
