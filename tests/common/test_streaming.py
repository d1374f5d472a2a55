"""Events come a piece at a time, and a source that was read before is recognised by its bytes."""

import os
import threading
import tracemalloc
from contextlib import closing
from pathlib import Path

import pytest

from common.errors import DataError
from common.streaming import Position, open_source, paths_of
from common.tables import NoRows

TEXT = 'a,b\n1,x\n2,"y\nz"\n\n4,w\n5,v\n'


def pieces(path: Path, *, rows: int = 2, known: tuple[Position, ...] = ()) -> list[tuple[list[str], list[int]]]:
    with closing(open_source(path)) as source:
        source.begin(known)
        return [(list(p.cells.columns["b"]), p.cells.rows.tolist()) for p in source.pieces(["b"], rows=rows)]


def ends(path: Path, rows: int) -> list[Position]:
    with closing(open_source(path)) as source:
        return [piece.end for piece in source.pieces(["b"], rows=rows)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "e.csv"
    path.write_text(TEXT)
    return path


def test_records_are_never_cut_and_keep_their_numbers(table: Path) -> None:
    """A field may hold a line break; a blank line has a number and is no row."""
    assert pieces(table) == [(["x", "y\nz"], [2, 3]), (["w"], [5]), (["v"], [6])]
    assert pieces(table, rows=1)[1] == (["y\nz"], [3])


def test_a_source_goes_on_after_any_piece_as_if_it_had_never_stopped(table: Path) -> None:
    """Rows, their numbers and later positions are the same."""
    whole, positions = pieces(table, rows=1), ends(table, 1)
    for i, position in enumerate(positions):
        assert [rows for rows in pieces(table, rows=1, known=(position,)) if rows[1]] == [
            rows for rows in whole[i + 1 :] if rows[1]
        ]


def test_a_file_that_has_grown_is_read_from_where_it_ended(table: Path) -> None:
    """The longest beginning counts; whatever else was read of other files does not matter."""
    positions = ends(table, 1)
    with table.open("a") as file:
        file.write("6,new\n")
    assert pieces(table, known=(positions[0], Position(offset=9, digest=b"?" * 32), positions[-1])) == [(["new"], [7])]


def test_bytes_that_changed_make_another_file(table: Path) -> None:
    """It is read from its beginning."""
    positions = ends(table, 1)
    table.write_text(TEXT.replace("1,x", "1,q"))
    with closing(open_source(table)) as source:
        assert source.begin(positions) is None
        assert next(source.pieces(["b"], rows=1)).cells.columns["b"] == ("q",)


def test_json_lines_lack_what_they_lack(tmp_path: Path) -> None:
    """Missing keys are None; what is no object is a row that is not whole."""
    path = tmp_path / "e.jsonl"
    path.write_text('{"a": 1, "b": "x"}\n[3]\n\n{"a": 2}\nnonsense\n')
    with closing(open_source(path)) as source:
        (piece,) = source.pieces(["b"], rows=10)
    assert (source.columns, source.is_json) == (("a", "b"), True)
    assert piece.cells.columns["b"] == ["x", None, None, None]
    assert piece.cells.complete.tolist() == [True, False, True, False]
    assert piece.cells.rows.tolist() == [1, 2, 4, 5]


def test_parquet_goes_on_at_its_row(tmp_path: Path) -> None:
    """A Parquet file is known as a whole."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "e.parquet"
    parquet.write_table(pyarrow.table({"a": [1, 2, 3, 4, 5], "b": ["v", "w", "x", "y", None]}), path, row_group_size=2)
    assert [row for piece in pieces(path, rows=2) for row in piece[1]] == [1, 2, 3, 4, 5]
    assert [row for piece in pieces(path, rows=3, known=(ends(path, 1)[0],)) for row in piece[0]] == [
        "w",
        "x",
        "y",
        None,
    ]


def test_what_arrived_through_a_pipe_does_not_wait_for_more(tmp_path: Path) -> None:
    """A silence ends a piece."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    go_on = threading.Event()

    def write() -> None:
        with path.open("w") as file:
            file.write("a,b\n1,x\n2,half")
            file.flush()
            go_on.wait(20)
            file.write("-done\n")

    writer = threading.Thread(target=write)
    writer.start()
    with closing(open_source(path, patience=0.05)) as source:
        found = source.pieces(["b"], rows=100)
        assert next(found).cells.columns["b"] == ("x",)
        go_on.set()
        assert next(found).cells.columns["b"] == ("half-done",)
        assert list(found) == []
    writer.join()


@pytest.mark.parametrize("junk", [b'a,b\n1,"x', b"a,\xff\n1,x\n", b'a,b\n"1"2,x\n'])
def test_what_is_no_text_table_says_so_without_a_value(tmp_path: Path, junk: bytes) -> None:
    """The file is named."""
    path = tmp_path / "e.csv"
    path.write_bytes(junk)
    with pytest.raises(DataError, match=r"^e\.csv"):
        pieces(path)


def test_a_byte_that_is_no_text_is_its_rows_alone(tmp_path: Path) -> None:
    """It is written out, and the rest of the file is read."""
    path = tmp_path / "e.csv"
    path.write_bytes(b"a,b\n1,\xff\n2,x\n")
    assert pieces(path) == [(["\\xff", "x"], [2, 3])]


def test_a_quote_that_was_never_meant_as_one_swallows_nothing(tmp_path: Path) -> None:
    """An inch mark inside a field makes a piece longer, and no row less."""
    path = tmp_path / "e.csv"
    path.write_text('a,b\n1,5" nail\n' + "2,x\n" * 10)
    assert [value for piece in pieces(path, rows=2) for value in piece[0]] == ['5" nail', *["x"] * 10]


def test_a_folder_is_its_finished_files_by_name(tmp_path: Path) -> None:
    """What is hidden or of another kind is somebody's work in progress."""
    for name in ("b.csv", "a.jsonl", ".c.csv", "d.csv.tmp"):
        (tmp_path / name).touch()
    assert [path.name for path in paths_of(tmp_path)] == ["a.jsonl", "b.csv"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(NoRows):
        paths_of(tmp_path / "empty")
    with pytest.raises(DataError, match="ending in"):
        open_source(tmp_path / "d.csv.tmp")
    with pytest.raises(DataError, match="can be read"):
        open_source(tmp_path / "nothing.csv")


def test_memory_is_bounded_by_a_piece(tmp_path: Path) -> None:
    """A long file is never in memory as a whole."""
    path = tmp_path / "e.csv"
    with path.open("w") as file:
        file.write("a,b\n")
        for _ in range(200):
            file.write("1,abcdefgh\n" * 1000)
    tracemalloc.start()
    with closing(open_source(path)) as source:
        assert sum(piece.cells.rows.size for piece in source.pieces(["b"], rows=500)) == 200_000
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5e6
