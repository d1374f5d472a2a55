"""Cells out of files: the same table in every kind of file, and what is wrong with a file."""

import sqlite3
import sys
from contextlib import closing
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from common.errors import DataError
from common.tables import (
    Check,
    Layout,
    NoRows,
    _connect,
    as_numbers,
    as_texts,
    as_times,
    bad_rows,
    column_names,
    describe_bad_rows,
    read_cells,
)

ROWS = [("u1", 7, 0.5), ("u2", None, 1.5), ("u1", 9, -2.0)]


def write_sqlite(path: Path, rows: list[tuple[object, ...]], table: str = "events") -> Path:
    """A database with one table of three columns."""
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(f'CREATE TABLE "{table}" ("user id", item, value)')
        connection.executemany(f'INSERT INTO "{table}" VALUES (?, ?, ?)', rows)  # noqa: S608
    return path


def write_file(folder: Path, kind: str) -> Path:
    """`ROWS` in a file of that kind."""
    if kind == "sqlite":
        return write_sqlite(folder / "events.sqlite", ROWS)
    if kind == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        columns = dict(zip(("user id", "item", "value"), zip(*ROWS, strict=True), strict=True))
        parquet.write_table(pyarrow.table(columns), folder / "events.parquet")
        return folder / "events.parquet"
    separator = {"csv": ",", "tsv": "\t"}[kind]
    lines = [separator.join(("user id", "item", "value"))]
    lines += [separator.join("" if cell is None else str(cell) for cell in row) for row in ROWS]
    path = folder / f"events.{kind}"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "sqlite", "parquet"])
def test_every_kind_of_file_reads_the_same(tmp_path: Path, kind: str) -> None:
    """Texts, numbers and missing cells do not depend on how the table was stored."""
    path = write_file(tmp_path, kind)
    assert column_names(path) == ("user id", "item", "value")
    cells = read_cells(path, ["value", "user id", "item"])
    assert as_texts(cells.columns["user id"]) == ["u1", "u2", "u1"]
    assert as_texts(cells.columns["item"]) == ["7", "", "9"]
    assert as_numbers(cells.columns["value"]).tolist() == [0.5, 1.5, -2.0]
    assert np.array_equal(as_numbers(cells.columns["item"]), [7, np.nan, 9], equal_nan=True)
    assert cells.complete.all()
    assert cells.rows.tolist() == ([2, 3, 4] if kind in ("csv", "tsv") else [1, 2, 3])


@pytest.mark.parametrize("kind", ["csv", "sqlite", "parquet"])
def test_an_unknown_column_lists_those_there_are(tmp_path: Path, kind: str) -> None:
    """A wrong column name is answered with the right ones."""
    with pytest.raises(DataError, match=r"one column 'users', got no such column.*are: user id, item, value"):
        read_cells(write_file(tmp_path, kind), ["item", "users"])


@pytest.mark.parametrize("suffix", ["csv", "sqlite", "parquet"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    """A file that is not there is a DataError with its name."""
    with pytest.raises(DataError, match=f"nowhere.{suffix}"):
        read_cells(tmp_path / f"nowhere.{suffix}", ["a"])


@pytest.mark.parametrize("suffix", ["sqlite", "parquet"])
def test_a_file_of_another_kind_is_named(tmp_path: Path, suffix: str) -> None:
    """A file that is not what its suffix says is a DataError."""
    path = tmp_path / f"fake.{suffix}"
    path.write_text("user,value\nu1,1\n" * 100)
    with pytest.raises(DataError, match=f"fake.{suffix}: Expected a readable"):
        column_names(path)


def test_reading_a_database_does_not_write_to_it(tmp_path: Path) -> None:
    """The connection is read-only: SQLite itself refuses a write, and nothing appears beside the file."""
    path = write_sqlite(tmp_path / "events.db", ROWS)
    read_cells(path, ["value"])
    with closing(_connect(path)) as connection, pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM events")
    assert [p.name for p in tmp_path.iterdir()] == ["events.db"]


def test_one_of_several_tables_must_be_named(tmp_path: Path) -> None:
    """With two tables the error lists both; a hostile name is quoted, not executed."""
    path = write_sqlite(tmp_path / "events.db", ROWS)
    write_sqlite(path, [("x", 1, 2)], table='odd""; DROP TABLE events; --')
    with pytest.raises(DataError, match=r"data\.table to be one of its tables, got data\.table=None.*events"):
        column_names(path)
    assert len(read_cells(path, ["value"], table='odd"; DROP TABLE events; --').rows) == 1
    assert len(read_cells(path, ["value"], table="events").rows) == 3


def test_text_in_a_database_that_is_not_utf8_is_one_cell(tmp_path: Path) -> None:
    """It is read as its bytes written out, and the other rows as ever."""
    path = tmp_path / "events.db"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE t (user)")
        connection.execute("INSERT INTO t VALUES (CAST(X'616EFF' AS TEXT)), ('b\u00e9a')")
    assert read_cells(path, ["user"]).columns["user"] == ("an\\xff", "b\u00e9a")


def test_text_in_a_file_that_is_not_utf8_is_one_cell(tmp_path: Path) -> None:
    """One user's bytes do not make the rows of all others unreadable."""
    path = tmp_path / "t.csv"
    path.write_bytes("user,y\nb\u00e9a,1\n".encode() + b"an\xff,2\n")
    cells = read_cells(path, ["user", "y"])
    assert (cells.columns["user"], cells.columns["y"]) == (("b\u00e9a", "an\\xff"), ("1", "2"))


def test_a_long_cell_is_one_cell(tmp_path: Path) -> None:
    """CSV has no limit that one user's text could exceed for the whole file."""
    path = tmp_path / "t.csv"
    path.write_text(f"a,b\n1,{'x' * 200_000}\n2,y\n")
    assert read_cells(path, ["a"]).columns["a"] == ("1", "2")


def test_without_pyarrow_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet is an extra, and the message says how to install it."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r'pip install "umbel\[parquet\]"'):
        column_names(tmp_path / "events.parquet")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "got an empty file"),
        (b"a,b\n", "at least one row of data"),
        (b"a,b\n\n\n", "at least one row of data"),
        (b"a,a\n1,2\n", "one column 'a', got twice"),
        (b"\xff,b\n1,2\n", "Expected text in UTF-8"),
        (b'a,b\n"1,2\n3,4\n', "Expected CSV, got this problem: unexpected end of data"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    """Empty files, files without rows and broken CSV are DataErrors."""
    path = tmp_path / "t.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        read_cells(path, ["a"])
    assert "t.csv" in str(caught.value)


def test_rows_keep_their_numbers_across_blank_and_broken_rows(tmp_path: Path) -> None:
    """Blank lines are passed over, rows of another length are marked and cut or filled, numbers are the file's."""
    path = tmp_path / "t.csv"
    path.write_text('a,b\n1,2\n\n3\n4,5,6\n"x\ny",8\n')
    cells = read_cells(path, ["a", "b"])
    assert cells.rows.tolist() == [2, 4, 5, 6]
    assert cells.complete.tolist() == [True, False, False, True]
    assert cells.columns == {"a": ("1", "3", "4", "x\ny"), "b": ("2", "", "5", "8")}


def test_a_byte_order_mark_is_not_part_of_a_name(tmp_path: Path) -> None:
    """CSV as spreadsheets save it reads the same."""
    path = tmp_path / "t.csv"
    path.write_bytes(b"\xef\xbb\xbfa, b\r\n1,2\r\n")
    assert column_names(path) == ("a", "b")
    assert read_cells(path, ["b"]).columns["b"] == ("2",)


def test_a_layout_without_header_or_quotes(tmp_path: Path) -> None:
    """Fields between '::' are taken as they are, and the first row is row 1."""
    path = tmp_path / "t.dat"
    path.write_text('1::"Half a quote::x\n2::b::y\n')
    layout = Layout(delimiter="::", quoted=False, header=("id", "title", "z"))
    cells = read_cells(path, ["title", "id"], layout=layout)
    assert cells.columns == {"title": ('"Half a quote', "b"), "id": ("1", "2")}
    assert cells.rows.tolist() == [1, 2]


def test_ids_agree_between_kinds_of_cells() -> None:
    """7, 7.0, "7" and " 7 " are one id; missing cells are empty."""
    assert as_texts([7, 7.0, "7", " 7 ", None, float("nan"), b"7", 7.5]) == ["7"] * 4 + ["", "", "7", "7.5"]


@pytest.mark.parametrize("cell", ["", "abc", "nan", "inf", "-inf", None, "1,5", 10**400, "1e999", [1]])
def test_what_is_not_a_finite_number_is_nan(cell: object) -> None:
    """One bad cell is NaN and leaves its neighbours alone."""
    assert np.array_equal(as_numbers([1, cell, "2.5"]), [1.0, np.nan, 2.5], equal_nan=True)


def test_times_are_seconds_or_iso() -> None:
    """Numbers, ISO 8601 texts and datetimes are one time; a time without zone is UTC."""
    times = as_times(["60", 60.0, "1970-01-01T00:01:00", "1970-01-01T01:01+01:00", datetime(1970, 1, 1, 0, 1)])
    assert times.tolist() == [60.0] * 5
    assert np.isnan(as_times(["yesterday", None])).all()


def test_bad_rows_are_named_once_with_their_first_problem(tmp_path: Path) -> None:
    """File, row, column and expectation; never the value."""
    path = tmp_path / "t.csv"
    path.write_text("a,b\nsecret,2\n3,4\nsecret,secret\n")
    cells = read_cells(path, ["a", "b"])
    checks = [
        Check(column=name, expected="a finite number", bad=np.isnan(as_numbers(cells.columns[name])))
        for name in ("b", "a")
    ]
    assert bad_rows(cells, checks).tolist() == [True, False, True]
    assert describe_bad_rows(cells, checks, limit=5) == [
        "t.csv, row 2, column 'a': Expected a finite number.",
        "t.csv, row 4, column 'b': Expected a finite number.",
    ]
    assert len(describe_bad_rows(cells, checks, limit=1)) == 1


def test_files_of_a_folder_are_one_table(tmp_path: Path) -> None:
    """In the order of their names, whatever the order of their columns; what is not a table is left alone."""
    (tmp_path / "2.csv").write_text("y,user\n2,b\n")
    (tmp_path / "1.csv").write_text("user,y\na,1\na,3\n")
    (tmp_path / "3.csv").write_text("user,y\n")
    (tmp_path / "4.csv").write_bytes(b"user,y,\xff\nd,1,2\n")
    (tmp_path / ".5.csv").write_text("user,y\nhidden,1\n")
    (tmp_path / "6.csv.part").write_text("user,y\nhalf")
    cells = read_cells(tmp_path, ["user", "y"])
    assert list(cells.columns["user"]) == ["a", "a", "b"]
    assert list(cells.columns["y"]) == ["1", "3", "2"]
    assert cells.rows.tolist() == [2, 3, 2]
    assert cells.unread == ("4.csv: Expected text in UTF-8, got other bytes. Convert the file.",)
    assert column_names(tmp_path) == ("user", "y")


def test_a_folder_without_a_row_holds_no_data_and_one_of_several_kinds_is_a_mistake(tmp_path: Path) -> None:
    """The former is nobody's, the latter its operator's."""
    for prepare in (lambda: None, lambda: (tmp_path / "1.csv").write_text("user,y\n")):
        prepare()
        with pytest.raises(NoRows):
            read_cells(tmp_path, ["user", "y"])
    (tmp_path / "2.csv").write_text("user\na\n")
    with pytest.raises(DataError, match=r"2\.csv: Expected one column 'y'"):
        read_cells(tmp_path, ["user", "y"])
    (tmp_path / "3.parquet").write_bytes(b"")
    with pytest.raises(DataError, match="files of one kind"):
        read_cells(tmp_path, ["user", "y"])
