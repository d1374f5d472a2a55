"""A node's source: one user's rows are that user's business, down to the bits of everybody else's integers."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

import client.sources
from client.sources import forget, node_data, read
from common.config import DataConfig, FeatureConfig
from common.errors import DataError
from common.model import IntArray
from common.records import decode
from common.sealing import SIGNATURE_BYTES
from tests.asking import Asker, node, total_of
from tests.populations import draw_model

MODEL = draw_model(np.random.default_rng(0), 3, 1)
EVE_TABLE = ("eve,0.1,0.2,3", "eve,-0.4,0.9,1", "eve,0.3,-0.6,5")
BAD_TABLE = {
    "blank": "eve,,,",
    "NaN": "eve,nan,0.2,nan",
    "text": "eve,much,0.2,good",
    "infinite": "eve,inf,-inf,1e999",
    "1e300": "eve,1e300,-1e300,1e300",
    "too few fields": "eve,0.1",
    "no fields": "eve",
    "too many fields": "eve,0.1,0.2,3,4,5",
}
EVE_RATINGS = ("eve,i1,3", "eve,i2,1", "eve,i3,5")
BAD_RATINGS = {
    "unknown item": "eve,i99,3",
    "no item": "eve,,3",
    "text": "eve,i1,good",
    "1e300": "eve,i1,1e300",
    "too few fields": "eve,i1",
    "too many fields": "eve,i1,3,4",
}


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    forget()
    yield
    forget()


class Source:
    """A table or ratings of five users with rows of eve among them."""

    def __init__(self, folder: Path, kind: str) -> None:
        rng = np.random.default_rng(1)
        self._path = folder / f"{kind}.csv"
        if kind == "table":
            self._header, eve = "user,a,b,y", EVE_TABLE
            cells = [f"{x:.3f},{z:.3f},{y:.2f}" for x, z, y in rng.uniform(-1, 1, (20, 3)) * [1, 1, 2] + [0, 0, 3]]
            self._declared = {"features": (FeatureConfig(name="a"), FeatureConfig(name="b"))}
        else:
            (folder / "items.csv").write_text("item,a,b\ni1,0.5,1\ni2,-0.2,0.1\ni3,0.9,-0.7\ni4,0,0.3\n")
            self._header, eve = "user,item,rating", EVE_RATINGS
            cells = [f"i{i % 4 + 1},{y:.2f}" for i, y in enumerate(rng.uniform(1, 5, 20))]
            self._declared = {"item_features": str(folder / "items.csv")}
        self.others = [f"user-{i % 5},{cell}" for i, cell in enumerate(cells)]
        self.eve = list(eve)

    def config(self, rows: Sequence[str], **changes: str) -> DataConfig:
        """The configuration for these rows, all of them for training, with bad ones an error."""
        forget()
        self._path.write_text("\n".join([self._header, *rows]) + "\n")
        fixed = {"source": str(self._path), "target_range": (1.0, 5.0), "test_fraction": 0.0}
        self._last = DataConfig(**(fixed | self._declared | changes))
        return self._last

    def total(self, rows: Sequence[str]) -> IntArray:
        """What a node with these rows answers on the finest grid, and that it names as many users as rows do."""
        service = node(self.config(rows))
        assert decode(service.identity(b"")[:-SIGNATURE_BYTES])[0]["users"] == len({row.split(",")[0] for row in rows})
        return total_of(service, Asker(MODEL, self._last).train())

    def with_eve(self, rows: Sequence[str]) -> list[str]:
        """Everybody's rows, hers among the others'."""
        return [*self.others[:3], *rows[:1], *self.others[3:12], *rows[1:], *self.others[12:]]


CASES = [("table", name) for name in BAD_TABLE] + [("ratings", name) for name in BAD_RATINGS]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_bad_rows_of_one_user_move_nobody_else(tmp_path: Path, kind: str, name: str) -> None:
    """With one or all rows of a user bad, the node answers, names as many users, and the others' integers stay."""
    source = Source(tmp_path, kind)
    bad = (BAD_TABLE if kind == "table" else BAD_RATINGS)[name]
    others = source.total(source.others)
    assert others.any()
    for rows in (source.eve, [bad, *source.eve[1:]], [*source.eve, bad], [bad], [bad] * 3):
        alone = source.total(rows)
        assert np.array_equal(source.total(source.with_eve(rows)), others + alone)
        if set(rows) == {bad} and name != "1e300":
            assert not alone.any()


def test_the_blocks_of_nodes_do_not_depend_on_bad_rows(tmp_path: Path) -> None:
    """Who is on which node is the same when all rows of one user are bad."""
    source = Source(tmp_path, "table")

    def blocks(rows: list[str]) -> list[tuple[str, ...]]:
        data = source.config(source.with_eve(rows))
        return [node_data(data, "squared", index, 3)[0].users for index in range(3)]

    assert blocks(source.eve) == blocks(["eve,much,0.2,good"])


def test_a_simulation_may_stop_at_a_bad_row_and_a_node_does_not(tmp_path: Path) -> None:
    """`on_bad_rows` is for whoever reads all of a source; both say how many there were."""
    source = Source(tmp_path, "table")
    strict = source.config(source.with_eve(["eve,much,0.2,good"]))
    skipping = strict.model_copy(update={"on_bad_rows": "skip"})
    with pytest.raises(DataError, match=r"table.csv, row 5, column 'y': Expected a finite number"):
        read(strict, "squared")
    assert read(skipping, "squared").num_bad_rows == 1
    for data in (strict, skipping):
        assert node_data(data, "squared", 0, 1)[0].num_users == 6


def test_a_source_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads it, with or without stopping at bad rows."""
    real, calls = client.sources.load, []
    monkeypatch.setattr(client.sources, "load", lambda *arguments: (calls.append(1), real(*arguments))[1])
    source = Source(tmp_path, "ratings")
    strict = source.config(source.with_eve(source.eve))
    for data in (strict, strict.model_copy(update={"on_bad_rows": "skip"})):
        assert read(data, "squared").train.num_users == 6
        node_data(data, "squared", 0, 2)
    assert len(calls) == 1


@pytest.mark.parametrize("text", ["", "user,a,b,y\n", "user,a,y\nann,1,2\n", "user,a,b,y\n,1,1,2\n"])
def test_a_file_that_is_not_what_was_declared_is_the_operators(tmp_path: Path, text: str) -> None:
    """An empty file, a missing column or rows of nobody are errors at start."""
    data = Source(tmp_path, "table").config([])
    Path(data.source).write_text(text)
    with pytest.raises(DataError, match=r"table\.csv"):
        node(data)
