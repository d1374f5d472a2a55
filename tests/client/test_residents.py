"""Who lives on a node: as many as the registry has, with the data they have at the moment, and never a refusal."""

import logging
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from client.service import NodeService
from client.sources import forget
from client.store import DeviceStore
from common.config import DataConfig, FeatureConfig
from common.errors import DataError, Refused
from common.model import IntArray
from tests.asking import Asker, node, total_of
from tests.populations import draw_model

MODEL = draw_model(np.random.default_rng(0), 3, 1)
HEADER = "user,a,b,y"
ADA, BEN, CID = "ada,0.5,-0.2,4", "ben,-0.9,0.3,2", "cid,0.1,0.8,5"


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    forget()
    yield
    forget()


def config(source: Path, **changes: object) -> DataConfig:
    """A table of two features; all rows train."""
    columns = (FeatureConfig(name="a"), FeatureConfig(name="b"))
    declared = {"source": str(source), "features": columns, "target_range": (1.0, 5.0), "test_fraction": 0.0}
    return DataConfig.model_validate(declared | changes)


def write(path: Path, rows: Sequence[str]) -> None:
    """A CSV in place of what was there, whole at any time."""
    staging = path.with_name(".writing")
    staging.write_text("\n".join([HEADER, *rows]) + "\n")
    staging.replace(path)


def asker(data: DataConfig, path: Path) -> Asker:
    """Who asks nodes with this table, which exists for the moment at least."""
    existed = path.exists()
    if not existed:
        write(path, [ADA])
    made = Asker(MODEL, data)
    if not existed:
        path.unlink()
    forget()
    return made


class Device:
    """A node of three places over a table that a test rewrites."""

    def __init__(self, folder: Path, rows: Sequence[str] | None, **settings: object) -> None:
        self.path, self.store = folder / "table.csv", folder / "node.sqlite"
        self.data = config(self.path)
        self.asker = asker(self.data, self.path)
        if rows is not None:
            write(self.path, rows)
        self.service: NodeService = node(self.data, store=str(self.store), **({"users": 3} | settings))

    def total(self) -> IntArray:
        """What it answers to a new release."""
        return total_of(self.service, self.asker.train())


@pytest.fixture
def alone(tmp_path: Path) -> Callable[[str], IntArray]:
    """What a user contributes who is alone on a node."""
    (tmp_path / "alone").mkdir()
    made: dict[str, IntArray] = {}

    def total(row: str) -> IntArray:
        if row not in made:
            folder = tmp_path / "alone" / str(len(made))
            folder.mkdir()
            device = Device(folder, [row])
            made[row] = device.total()
            device.service.close()
            forget()
        return made[row]

    return total


def test_what_is_written_to_the_source_counts_in_the_next_round(
    tmp_path: Path, alone: Callable[[str], IntArray]
) -> None:
    """New rows, new users in free places, and rows that are gone; without a restart."""
    device = Device(tmp_path, [ADA])
    assert np.array_equal(device.total(), alone(ADA))
    write(device.path, [ADA, BEN])
    assert np.array_equal(device.total(), alone(ADA) + alone(BEN))
    write(device.path, [BEN])
    assert np.array_equal(device.total(), alone(BEN))


def test_a_source_that_did_not_change_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Number, size and time of the file say so."""
    device = Device(tmp_path, [ADA])
    monkeypatch.setattr("client.sources.load", lambda *_: pytest.fail("read again"))
    assert device.total().any()


def test_a_round_that_is_refused_reads_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data are not touched before the broadcast has passed."""
    device = Device(tmp_path, [ADA])
    write(device.path, [BEN])
    monkeypatch.setattr("client.sources.load", lambda *_: pytest.fail("read"))
    payload, signature = device.asker.train()
    with pytest.raises(Refused):
        device.service.contribute(payload, bytes(len(signature)))


def test_bytes_that_are_no_text_are_the_fault_of_their_row(tmp_path: Path, alone: Callable[[str], IntArray]) -> None:
    """What one user's row holds does not decide whether the others' new rows count."""
    device = Device(tmp_path, [ADA])
    device.path.write_bytes("\n".join(["user,a,b,y", ADA, BEN, ""]).encode() + b"c\xff,\xfe,0.1,2\n")
    assert np.array_equal(device.total(), alone(ADA) + alone(BEN))
    assert not device.service.status()["data_problem"]


def test_a_folder_that_may_not_be_looked_into_is_no_refusal(
    tmp_path: Path, alone: Callable[[str], IntArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its permissions are as good as data that cannot be read."""
    device = Device(tmp_path, [ADA])
    is_dir = Path.is_dir

    def refused(path: Path) -> bool:
        if path == device.path:
            raise PermissionError(13, "Permission denied")
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refused)
    assert np.array_equal(device.total(), alone(ADA))
    assert device.service.status()["data_problem"]


@pytest.mark.parametrize(
    "damage", ["user,a,b\nada,1,2\n", 'user,a,b,y\n"ada,1,2,3', b"\xff\xfeuser,a,b,y\nada,1,2,3\n"]
)
def test_a_source_that_cannot_be_read_leaves_the_last_data(
    tmp_path: Path, alone: Callable[[str], IntArray], damage: str | bytes
) -> None:
    """Somebody is writing it, or it is damaged: that is no refusal, and the next good version counts."""
    device = Device(tmp_path, [ADA])
    device.path.write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    assert np.array_equal(device.total(), alone(ADA))
    assert device.service.status()["data_problem"]
    write(device.path, [BEN])
    assert np.array_equal(device.total(), alone(BEN))
    assert not device.service.status()["data_problem"]


@pytest.mark.parametrize("text", [None, "", HEADER + "\n", HEADER + "\n,1,1,3\n"])
def test_who_has_no_rows_any_more_contributes_zeros(tmp_path: Path, text: str | None) -> None:
    """A source that was emptied or deleted holds nobody's data, and the node answers as ever."""
    device = Device(tmp_path, [ADA, BEN])
    assert device.total().any()
    if text is None:
        device.path.unlink()
    else:
        device.path.write_text(text)
    assert not device.total().any()
    write(device.path, [ADA])
    assert device.total().any()


@pytest.mark.parametrize("text", [None, "", "user,a,b\nada,1,2\n"])
def test_a_device_starts_without_data(tmp_path: Path, alone: Callable[[str], IntArray], text: str | None) -> None:
    """Where the registry says how many users there are, the first log may come later; elsewhere it is an error."""
    device = Device(tmp_path, None)
    device.service.close()
    if text is not None:
        device.path.write_text(text)
    forget()
    service = node(device.data, store=str(tmp_path / "late.sqlite"), users=3)
    assert service.status()["users"] == 3
    assert not total_of(service, device.asker.train()).any()
    write(device.path, [ADA])
    assert np.array_equal(total_of(service, device.asker.train()), alone(ADA))
    if text is None:
        device.path.unlink()
    else:
        device.path.write_text(text)
    forget()
    with pytest.raises(DataError):
        node(device.data, store=str(tmp_path / "none.sqlite"))


def test_users_beyond_the_registry_are_left_out_and_counted(
    tmp_path: Path, alone: Callable[[str], IntArray], caplog: pytest.LogCaptureFixture
) -> None:
    """Places go to users who are known, then to new ones in the order of the data; the log has no name."""
    with caplog.at_level(logging.WARNING, "umbel.node"):
        device = Device(tmp_path, [ADA, BEN], users=2)
        write(device.path, [CID, ADA, BEN])
        assert np.array_equal(device.total(), alone(ADA) + alone(BEN))
    assert device.service.status()["users"] == 2
    assert "1 users" in caplog.text
    assert not any(name in caplog.text for name in ("ada", "ben", "cid"))
    device.service.close()
    forget()
    again = node(device.data, store=str(device.store), users=2)  # a restart with another order
    assert np.array_equal(total_of(again, device.asker.train()), alone(ADA) + alone(BEN))


def test_a_place_whose_user_has_left_the_data_is_not_given_away(
    tmp_path: Path, alone: Callable[[str], IntArray]
) -> None:
    """Or whoever adds the users of a node up would count one person's place for two."""
    device = Device(tmp_path, [ADA, BEN], users=2)
    write(device.path, [ADA, CID])
    assert np.array_equal(device.total(), alone(ADA))


def test_a_forgotten_user_stays_forgotten_until_enrolled(tmp_path: Path, alone: Callable[[str], IntArray]) -> None:
    """Not by another version of the data, not by a restart; only by whoever enrols the user."""
    device = Device(tmp_path, [ADA, BEN])
    both = alone(ADA) + alone(BEN)
    assert np.array_equal(device.total(), both)
    device.service.fold_in(*device.asker.fold_in())
    with DeviceStore.open(device.store, ["ada", "ben"]) as other:  # as umbel forget, while the node runs
        other.forget("ada")
        assert np.array_equal(device.total(), alone(BEN))
        write(device.path, [ADA, BEN, CID])
        assert np.array_equal(device.total(), alone(BEN) + alone(CID))
        device.service.fold_in(*device.asker.fold_in())
        assert other.load_states(["ada", "ben"]).found.tolist() == [False, True]
        device.service.close()
        forget()
        service = node(device.data, store=str(device.store), users=3)
        assert np.array_equal(total_of(service, device.asker.train()), alone(BEN) + alone(CID))
        other.remember("ada")
    assert np.array_equal(total_of(service, device.asker.train()), both + alone(CID))


def test_the_model_of_a_fold_in_is_kept_for_predictions(tmp_path: Path) -> None:
    """With the states that were computed with it."""
    device = Device(tmp_path, [ADA, BEN])
    device.total()
    device.service.fold_in(*device.asker.fold_in())
    with DeviceStore.open(device.store, ["ada"]) as store:
        states = store.load_states(["ada"])
        assert store.load_model(states.model_digest[0].tobytes()) is not None


def test_a_node_without_a_number_keeps_the_users_it_started_with(
    tmp_path: Path, alone: Callable[[str], IntArray]
) -> None:
    """Their rows are read again, and nobody joins: the registry has counted them."""
    device = Device(tmp_path, [ADA, BEN], users=None)
    write(device.path, [CID, BEN])
    assert np.array_equal(device.total(), alone(BEN))
    assert device.service.status()["users"] == 2


def test_no_more_users_are_summed_than_the_node_says_it_hosts(tmp_path: Path, alone: Callable[[str], IntArray]) -> None:
    """Also where the store knows more of them from before."""
    device = Device(tmp_path, [ADA, BEN, CID], users=None)
    device.service.close()
    forget()
    write(device.path, [BEN])
    service = node(device.data, store=str(device.store))
    assert service.status()["users"] == 1
    write(device.path, [BEN, ADA, CID])
    assert np.array_equal(total_of(service, device.asker.train()), alone(BEN))


def test_new_files_in_a_folder_and_lines_in_its_files_count(tmp_path: Path, alone: Callable[[str], IntArray]) -> None:
    """What a log shipper does; one file that cannot be read leaves the others' rows in."""
    folder = tmp_path / "logs"
    folder.mkdir()
    write(folder / "1.csv", [ADA])
    data = config(folder)
    asks = Asker(MODEL, data)
    service = node(data, users=3)
    assert np.array_equal(total_of(service, asks.train()), alone(ADA))
    write(folder / "2.csv", [BEN])
    assert np.array_equal(total_of(service, asks.train()), alone(ADA) + alone(BEN))
    (folder / ".3.csv.tmp").write_text("half a li")
    (folder / "3.csv").write_bytes(b"user,a,b,\xff")
    assert np.array_equal(total_of(service, asks.train()), alone(ADA) + alone(BEN))
    (folder / "1.csv").unlink()
    assert np.array_equal(total_of(service, asks.train()), alone(BEN))


def test_rows_in_the_log_of_a_database_count(tmp_path: Path, alone: Callable[[str], IntArray]) -> None:
    """SQLite keeps them beside the file until it has time."""
    path = tmp_path / "app.sqlite"
    writer = sqlite3.connect(path, isolation_level=None)
    writer.execute("PRAGMA journal_mode = WAL")
    writer.execute("CREATE TABLE rides (user TEXT, a REAL, b REAL, y REAL)")
    writer.execute("INSERT INTO rides VALUES ('ada', 0.5, -0.2, 4)")
    data = config(path)
    asks = Asker(MODEL, data)
    service = node(data, users=3)
    assert np.array_equal(total_of(service, asks.train()), alone(ADA))
    before = os.stat(path).st_mtime_ns
    writer.execute("INSERT INTO rides VALUES ('ben', -0.9, 0.3, 2)")
    assert os.stat(path).st_mtime_ns == before
    assert np.array_equal(total_of(service, asks.train()), alone(ADA) + alone(BEN))
    writer.close()


def test_a_table_without_a_column_of_users_is_its_owners(tmp_path: Path) -> None:
    """All rows are one person's, who has one vector and one filter."""
    path = tmp_path / "mine.csv"
    path.write_text("a,b,y\n0.5,-0.2,4\n-0.9,0.3,2\n")
    data = config(path, user="")
    service = node(data, store=str(tmp_path / "node.sqlite"), users=1)
    total = total_of(service, Asker(MODEL, data).train())
    service.close()
    assert total.any()
    forget()
    path.write_text("user,a,b,y\nme,0.5,-0.2,4\nme,-0.9,0.3,2\n")
    named = config(path)
    assert np.array_equal(total_of(node(named, users=1), Asker(MODEL, named).train()), total)
