"""What a node keeps survives whatever happens to the node, and nothing else does."""

import fcntl
import hmac
import os
import shutil
import sqlite3
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client import store_file
from client.store import FULL, NOTHING_ACKNOWLEDGED, DeviceStore
from client.transient import TransientStore
from common.errors import Refused, StorageError, UmbelError
from common.model import PersonalState, SharedModel
from privacy.participation import admit

USERS = ["ada", "ben", "cid"]
HEAD = bytes(range(32))
DIGEST = b"d" * 32


def charge(store, sequence, mask, cost=5, *, users=USERS, **changes):
    """Answer `sequence` of ledger L for `users`."""
    store.charge("L", sequence, HEAD, users, np.array(mask, bool), cost, **changes)


def random_state(n, *, rank=2, sparsity=3, d=7, seed=0):
    """Posteriors of n users, each with one unused coordinate of b."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, rank + sparsity, rank + sparsity))
    support = np.sort(rng.permuted(np.tile(np.arange(d), (n, 1)), axis=1)[:, :sparsity], axis=1)
    support[:, -1:] = -1
    b = np.where(support >= 0, rng.normal(size=(n, sparsity)), 0.0)
    w, scale = rng.normal(size=(n, rank)), rng.uniform(0.5, 2, n)
    theta = np.zeros((n, d))
    return PersonalState(w=w, support=support, b=b, scale=scale, precision=root @ root.transpose(0, 2, 1), theta=theta)


def files_of(path):
    """All bytes of the store's files, and of whatever else is beside it."""
    return b"".join(entry.read_bytes() for entry in path.parent.iterdir() if entry.is_file())


def overwrite(path, offset, data):
    """Damage a file in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.fixture
def path(tmp_path):
    """Where a store may be made."""
    return tmp_path / "device.db"


@pytest.fixture(params=["file", "memory"])
def store(request, path):
    """A new store of three users, on disk or in memory."""
    with DeviceStore.open(path if request.param == "file" else ":memory:", USERS) as opened:
        yield opened


def test_a_new_store_has_spent_and_acknowledged_nothing(store):
    """A new store has zero filters and knows no ledger."""
    assert store.spent(USERS).tolist() == [0, 0, 0]
    assert store.spent(USERS).dtype == np.int64
    assert store.acknowledged("L") == NOTHING_ACKNOWLEDGED == (-1, bytes(32))
    assert store.pinned_ledger() is None
    assert store.charged("L", 3, USERS) is None


def test_a_charge_raises_the_filters_in_the_mask_and_records_the_answer(store):
    """Who is in the mask is charged, whatever the order of the users."""
    charge(store, 3, [True, False, True])
    charge(store, 7, [True, False], 2, users=["cid", "ada"])
    assert store.spent(["cid", "ben", "ada"]).tolist() == [7, 0, 5]
    assert store.charged("L", 3, ["cid", "ben", "ada"]).tolist() == [True, False, True]
    assert store.charged("L", 7, USERS).tolist() == [False, False, True]
    assert store.acknowledged("L") == (7, HEAD)
    assert store.pinned_ledger() == "L"


def test_no_sequence_is_answered_twice(store):
    """A second charge of a sequence is refused and changes nothing, even with an empty mask."""
    charge(store, 3, [False, False, False])
    with pytest.raises(Refused) as refusal:
        charge(store, 3, [True, True, True])
    assert refusal.value.code == "replayed"
    assert store.spent(USERS).tolist() == [0, 0, 0]


def test_the_acknowledged_head_only_moves_forward(store):
    """Going back is a rollback, another head at the same line a fork; another ledger is its own."""
    store.acknowledge("L", 5, HEAD)
    store.acknowledge("L", 5, HEAD)
    for move in (store.acknowledge, lambda *line: store.charge(*line, USERS, np.ones(3, bool), 1)):
        with pytest.raises(Refused) as rollback:
            move("L", 4, HEAD)
        with pytest.raises(Refused) as fork:
            move("L", 5, bytes(32))
        assert [rollback.value.code, fork.value.code] == ["ledger_rollback", "ledger_fork"]
    store.acknowledge("M", 0, bytes(32))
    assert [store.acknowledged("L"), store.acknowledged("M")] == [(5, HEAD), (0, bytes(32))]
    assert store.spent(USERS).tolist() == [0, 0, 0]
    assert store.pinned_ledger() == "L"


def test_a_charge_beyond_the_limit_is_an_error_and_charges_nobody(store):
    """One user with too little left stops the whole charge, and its sequence stays unanswered."""
    charge(store, 1, [True, False, False], 6, limit=10)
    with pytest.raises(ValueError, match="limit"):
        charge(store, 2, [True, True, False], 5, limit=10)
    assert store.spent(USERS).tolist() == [6, 0, 0]
    assert store.charged("L", 2, USERS) is None
    assert store.acknowledged("L") == (1, HEAD)
    charge(store, 2, [True, True, False], 4, limit=10)
    assert store.spent(USERS).tolist() == [10, 4, 0]


@pytest.mark.parametrize("cost", [FULL, FULL + 1, 2**80, FULL - 1])
def test_filters_saturate_at_full(store, cost):
    """A cost of any size, twice, leaves a filter at most FULL, an integer."""
    charge(store, 1, [True, False, False], cost)
    charge(store, 2, [True, True, False], cost)
    assert store.spent(USERS).tolist() == [FULL, min(cost, FULL), 0]


@pytest.mark.parametrize(
    "changes",
    [
        {"mask": np.array([True, False])},
        {"mask": np.array([1.0, 0.0, 1.0])},
        {"cost": 0},
        {"cost": -1},
        {"users": ["ada", "ben", "zoe"]},
        {"users": ["ada", "ben", "ada"]},
        {"sequence": -1},
    ],
)
def test_arguments_out_of_range_charge_nobody(store, changes):
    """A wrong mask, cost, user or sequence is a ValueError that changes nothing."""
    arguments = {"ledger_id": "L", "sequence": 1, "head": HEAD, "users": USERS, "mask": np.ones(3, bool)}
    with pytest.raises(ValueError, match="Expected"):
        store.charge(**(arguments | {"cost": 5} | changes))
    assert store.spent(USERS).tolist() == [0, 0, 0]
    assert store.acknowledged("L") == NOTHING_ACKNOWLEDGED


def test_a_user_named_twice_is_an_error(path):
    """Two users of one name would share a filter but contribute twice."""
    with pytest.raises(ValueError, match="once"):
        DeviceStore.open(path, ["ada", "ada"])


@pytest.mark.parametrize("statement", ["UPDATE users SET spent = spent - 1", "DELETE FROM users"])
def test_the_file_itself_refuses_to_lower_or_drop_a_filter(path, statement):
    """Monotonicity is in the schema: it holds for any program that writes the file."""
    with DeviceStore.open(path, USERS) as store:
        charge(store, 1, [True, True, True])
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError, match="a filter"):
        connection.execute(statement)
    connection.close()


def test_a_reopened_store_knows_what_it_knew(path):
    """Filters, answers and head survive; users not named again stay, new ones start at zero."""
    with DeviceStore.open(path, USERS) as store:
        charge(store, 3, [True, False, True])
    with DeviceStore.open(path, ["dot", "ada"]) as store:
        assert store.spent(["ada", "dot"]).tolist() == [5, 0]
        assert store.acknowledged("L") == (3, HEAD)
        with pytest.raises(Refused):
            charge(store, 3, [True], users=["dot"])
    with DeviceStore.open(path, USERS) as store:
        assert store.spent(USERS).tolist() == [5, 0, 5]
        assert store.charged("L", 3, USERS).tolist() == [True, False, True]


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["charge", "crash before commit", "crash after commit", "reopen"]),
            st.lists(st.booleans(), min_size=3, max_size=3),
            st.integers(1, 40),
        ),
        max_size=12,
    )
)
def test_no_filter_exceeds_its_limit_under_any_charges_and_crashes(tmp_path_factory, steps):
    """Filters hold exactly the committed charges, never fall and never exceed the limit.

    A crash is what a killed process leaves: the files as they lie there, opened by the next one.
    """
    folder, limit, expected = tmp_path_factory.mktemp("crashes"), 100, np.zeros(3, np.int64)
    store = DeviceStore.open(folder / "0.db", USERS)
    for sequence, (step, wanted, cost) in enumerate(steps):
        mask = np.array(wanted) & admit(store.spent(USERS), cost, limit)
        if step == "crash before commit":
            with store._transaction(write=True) as connection:
                connection.execute("UPDATE users SET spent = spent + 1")
                survivor = crash(store, folder, sequence)
            store = survivor
        elif step == "reopen":
            path = store._path
            store.close()
            store = DeviceStore.open(path, USERS)
        else:
            charge(store, sequence, mask, cost, limit=limit)
            expected += cost * mask
        if step == "crash after commit":
            store = crash(store, folder, sequence)
        assert store.spent(USERS).tolist() == expected.tolist()
        assert (store.spent(USERS) <= limit).all()
    store.close()


def crash(store, folder, sequence):
    """Open a copy of the files as they are on disk at this moment."""
    for suffix in ("", "-wal"):
        source = Path(store._path + suffix)
        if source.exists():
            shutil.copy(source, folder / f"{sequence + 1}.db{suffix}")
    return DeviceStore.open(folder / f"{sequence + 1}.db", USERS)


def test_only_the_owner_can_read_any_of_the_files(path):
    """Main file, log and index have mode 0600 under any umask, and a wider mode is taken back."""
    previous = os.umask(0)
    try:
        with DeviceStore.open(path, USERS) as store:
            charge(store, 1, [True, True, True])
            files = list(path.parent.iterdir())
            assert {file.name for file in files} == {f"device.db{suffix}" for suffix in ("", "-wal", "-shm", ".lock")}
            assert [stat.S_IMODE(file.stat().st_mode) for file in files] == [0o600] * 4
    finally:
        os.umask(previous)
    path.chmod(0o644)
    with DeviceStore.open(path, USERS) as store:
        charge(store, 2, [True, True, True])
        assert [stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()] == [0o600] * 4


def test_every_commit_is_synchronised_and_deleted_bytes_are_overwritten(path):
    """The file is in WAL mode with synchronous=FULL (2) and secure_delete on."""
    with DeviceStore.open(path, USERS) as store:
        values = [
            store._connection.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "secure_delete", "foreign_keys")
        ]
    assert values == ["wal", 2, 1, 1]


def test_states_come_back_as_they_were_saved(store):
    """Every number of a state survives bit by bit; theta follows from the model."""
    state = random_state(3)
    store.save_states(USERS, state, DIGEST)
    loaded = store.load_states(["cid", "ada"])
    assert loaded.found.tolist() == [True, True]
    assert bytes(loaded.model_digest[0]) == DIGEST
    np.testing.assert_array_equal(loaded.support, state.support[[2, 0]])
    for name in ("w", "b", "scale"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(state, name)[[2, 0]])
    upper = np.triu_indices(5)
    np.testing.assert_array_equal(loaded.precision[(..., *upper)], state.precision[[2, 0]][(..., *upper)])
    np.testing.assert_array_equal(loaded.precision, loaded.precision.transpose(0, 2, 1))


def test_theta_is_recomputed_from_the_model(store):
    """theta = beta + U w + b, also where feature 0 is in the support and others are unused."""
    model = SharedModel(beta=np.array([1.0, 2, 3]), U=np.array([[1.0], [0], [2]]), b_variance=0.5, noise_variance=1.0)
    state = PersonalState(
        w=np.array([[10.0], [20.0]]),
        support=np.array([[0, 2], [1, -1]]),
        b=np.array([[0.25, 0.5], [0.75, 0.0]]),
        scale=np.array([3.0, 4.0]),
        precision=np.array([7 * np.eye(3), 8 * np.eye(3)]),
        theta=np.zeros((2, 3)),
    )
    store.save_states(["ada", "cid"], state, DIGEST)
    restored = store.load_states(USERS).with_model(model)
    assert restored.theta.tolist() == [[11.25, 2, 23.5], [1, 2, 3], [21, 2.75, 43]]
    assert restored.scale.tolist() == [3, 1, 4]
    assert restored.precision[1].tolist() == np.diag([1.0, 2, 2]).tolist()  # the prior of who has no state


def test_saving_again_replaces_and_another_layout_is_not_found(store):
    """The last state counts; states of another rank are left out unless asked for."""
    store.save_states(USERS, random_state(3), DIGEST)
    store.save_states(["ben"], random_state(1, rank=1, sparsity=0), b"e" * 32)
    assert store.load_states(USERS).found.tolist() == [True, False, True]
    other = store.load_states(USERS, layout=(1, 0))
    assert other.found.tolist() == [False, True, False]
    assert [other.w.shape, other.b.shape, other.precision.shape] == [(3, 1), (3, 0), (3, 1, 1)]
    assert bytes(other.model_digest[1]) == b"e" * 32


def test_no_state_at_all_is_no_error(store):
    """Users without a state are not found."""
    loaded = store.load_states(USERS)
    assert loaded.found.tolist() == [False, False, False]
    assert loaded.w.shape == (3, 0)


def test_a_state_of_other_users_is_an_error(store):
    """Rows, users and digest have to fit."""
    with pytest.raises(ValueError, match="Expected a state of 3 users"):
        store.save_states(USERS, random_state(2), DIGEST)
    with pytest.raises(ValueError, match="digest"):
        store.save_states(USERS, random_state(3), b"short")


def test_a_stored_state_is_small(path):
    """At rank 5 and sparsity 5 a user takes less than 1 KB, precision included."""
    users = [str(i) for i in range(1000)]
    with DeviceStore.open(path, users) as store:
        store.save_states(users, random_state(1000, rank=5, sparsity=5, d=9), DIGEST)
    assert path.stat().st_size < 1000 * 1024


def traces_of(state, i):
    """Eight bytes of every number of user i's state that could only be that user's."""
    return [value.tobytes() for value in (*state.w[i], *state.b[i][:-1], state.scale[i])]


def test_forget_leaves_no_byte_of_the_users_state_or_name_in_any_file(path):
    """Nothing of the forgotten is left, nor of any state that was replaced while pages filled and split."""
    users = [f"person-{i:04d}" for i in range(600)]
    moments = np.random.default_rng(3)
    states = [random_state(600, rank=rank, d=40, sparsity=4, seed=rank) for rank in (4, 9, 2, 12)]
    with DeviceStore.open(path, users) as store:
        for state in states:
            for chosen in np.split(moments.permutation(600), 60):
                store.save_states([users[i] for i in chosen], rows(state, chosen), DIGEST)
        assert all(trace in files_of(path) for trace in traces_of(states[-1], 7))
        store.forget(users[7])
        data = files_of(path)
        assert not any(trace in data for trace in traces_of(states[-1], 7))
        assert not any(trace in data for state in states[:-1] for i in range(600) for trace in traces_of(state, i)[:2])
        assert users[7].encode() not in data
        np.testing.assert_array_equal(store.load_states([users[8]]).w, states[-1].w[[8]])


def rows(state, chosen):
    """The states of some users alone."""
    fields = ("w", "support", "b", "scale", "precision", "theta")
    return PersonalState(**{name: getattr(state, name)[chosen] for name in fields})


def test_a_forgotten_user_contributes_nothing_until_enrolled_again_with_the_same_filter(path):
    """The filter outlives the user; states and the record of who was charged do not."""
    with DeviceStore.open(path, USERS) as store:
        charge(store, 1, [True, True, False])
        store.save_states(USERS, random_state(3), DIGEST)
        store.forget("ada")
        assert store.spent(USERS).tolist() == [FULL, 5, 0]
        store.save_states(USERS, random_state(3), DIGEST)
        assert store.load_states(USERS).found.tolist() == [False, True, True]
        with pytest.raises(ValueError, match="limit"):
            charge(store, 2, [True, True, False])
        charge(store, 2, [False, True, False])
    with DeviceStore.open(path, USERS) as store:  # whose data are still there
        assert store.forgotten(USERS).tolist() == [True, False, False]
        assert store.spent(USERS).tolist() == [FULL, 10, 0]
        store.remember("ada")
        assert store.forgotten(USERS).tolist() == [False] * 3
        assert store.spent(USERS).tolist() == [5, 10, 0]
        assert store.contributions(USERS).tolist() == [1, 2, 0]
        assert store.load_states(USERS).found.tolist() == [False, True, True]
        assert store.charged("L", 1, USERS).tolist() == [False, True, False]
        with pytest.raises(Refused):
            charge(store, 1, [True, True, True])


def test_forgetting_a_user_twice_is_the_same_as_once_and_a_stranger_an_error(store):
    """A misspelt name must not look as if something had been erased."""
    store.forget("ada")
    store.forget("ada")
    with pytest.raises(UmbelError, match="does not know"):
        store.forget("Ada")


def test_an_erasure_that_was_cut_short_is_finished_by_the_next_open(path):
    """The row is deleted first; if the process dies before the file is rewritten, opening it goes on."""
    state = random_state(3)
    store = DeviceStore.open(path, USERS)
    store.save_states(USERS, state, DIGEST)
    store._erase = lambda: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        store.forget("ada")
    assert any(trace in files_of(path) for trace in traces_of(state, 0))
    with DeviceStore.open(path, ["ben"]):
        assert not any(trace in files_of(path) for trace in traces_of(state, 0))
    store.close()


def test_forget_says_so_when_another_reader_keeps_the_log_alive(path, monkeypatch):
    """A copy that cannot be erased is an error, not a success."""
    monkeypatch.setattr(store_file, "_LOCK_TIMEOUT", 0.05)
    with DeviceStore.open(path, USERS) as store, DeviceStore.open(path, USERS) as reader:
        store.save_states(USERS, random_state(3), DIGEST)
        with reader._transaction(write=False) as connection:
            connection.execute("SELECT * FROM states").fetchall()
            with pytest.raises(StorageError):
                store.forget("ada")
        store.forget("ada")


def test_two_open_stores_of_one_file_see_each_other(path):
    """What one forgets the other does not know, and no sequence is answered by both."""
    with DeviceStore.open(path, USERS) as one, DeviceStore.open(path, USERS) as two:
        charge(one, 1, [True, True, True])
        with pytest.raises(Refused):
            charge(two, 1, [True, True, True])
        assert two.spent(USERS).tolist() == [5, 5, 5]
        one.forget("ada")
        with pytest.raises(ValueError, match="limit"):
            charge(two, 2, [True, True, True])
        assert two.spent(USERS).tolist() == [FULL, 5, 5]


def test_a_damaged_file_that_another_process_uses_is_not_set_aside(path):
    """Charges written into a file after it was replaced would be lost, so the second process has to wait."""
    users, state = build_damaged(path, 300)
    with DeviceStore.open(path, users) as store:
        where = path.read_bytes().find(state.w[150, 0].tobytes())
        overwrite(path, where // 4096 * 4096, b"\xff" * 4096)
        with pytest.raises(StorageError, match="in use"):
            DeviceStore.open(path, users)
        charge(store, 2, np.ones(300), users=users)
    with DeviceStore.open(path, users) as store:
        assert store.spent(users).tolist() == [14] * 300


def test_a_locked_store_is_a_clear_error(path, monkeypatch):
    """Who waits too long for another process is told so."""
    monkeypatch.setattr(store_file, "_LOCK_TIMEOUT", 0.05)
    with DeviceStore.open(path, USERS) as one, DeviceStore.open(path, USERS) as two:
        with one._transaction(write=True), pytest.raises(StorageError, match="lock held elsewhere"):
            charge(two, 1, [True, True, True])
        charge(two, 1, [True, True, True])


def test_threads_may_share_a_store(store):
    """Charges of several threads are serialised."""
    threads = [threading.Thread(target=lambda: store.acknowledge("L", 1, HEAD) or store.spent(USERS)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    charge(store, 2, [True, True, True])
    assert store.spent(USERS).tolist() == [5, 5, 5]


def test_a_full_disk_charges_nobody(path):
    """A charge that does not fit on the disk is a StorageError; the store goes on from what it had."""
    users = [str(i) for i in range(2000)]
    with DeviceStore.open(path, users) as store:
        ((pages,),) = store._connection.execute("PRAGMA page_count")
        store._connection.execute(f"PRAGMA max_page_count = {pages}").fetchall()
        with pytest.raises(StorageError, match="full"):
            store.save_states(users, random_state(2000), DIGEST)
        assert not store.load_states(users).found.any()
        with pytest.raises(StorageError, match="full"):
            charge_until_it_fails(store, users)
        answered, _ = store.acknowledged("L")
        assert (store.spent(users) == answered).all()
        assert store.charged("L", answered + 1, users) is None


def charge_until_it_fails(store, users):
    """Each record of an answer takes some bytes, so the disk is full at last."""
    for sequence in range(1, 1000):
        charge(store, sequence, np.ones(len(users)), 1, users=users)


def build_damaged(path, count=3):
    """A closed store in which everybody was charged once and has a state."""
    users = [f"user {i}" for i in range(count)]
    state = random_state(count, rank=5, sparsity=5, d=9)
    with DeviceStore.open(path, users) as store:
        charge(store, 1, np.ones(count), 9, users=users)
        store.save_states(users, state, DIGEST)
    return users, state


@pytest.mark.parametrize("damage", ["header", "text", "empty", "cut", "zeros", "log alone"])
def test_an_unreadable_file_is_set_aside_and_its_users_contribute_nothing(path, damage, caplog):
    """Bytes are kept under another name, which the warning tells; filters are full, for later users too."""
    users, _ = build_damaged(path)
    data = path.read_bytes()
    broken = {
        "header": b"x" * 100 + data[100:],
        "text": b"user,y\nada,1\n",
        "empty": b"",
        "cut": data[:4096],
        "zeros": bytes(len(data)),
        "log alone": None,
    }[damage]
    if broken is None:
        path.rename(path.with_name("device.db-wal"))
        broken = b""
    else:
        path.write_bytes(broken)
    with DeviceStore.open(path, users) as store:
        assert store.spent(users).tolist() == [FULL] * 3
        assert not store.load_states(users).found.any()
        assert not admit(store.spent(users), 1, FULL - 1).any()
    aside = path.with_name("device.db.corrupt-1")
    assert aside.read_bytes() == broken
    assert stat.S_IMODE(aside.stat().st_mode) == 0o600
    assert [str(aside) in record.getMessage() for record in caplog.records] == [True]
    with DeviceStore.open(path, [*users, "late"]) as store:
        assert store.spent([*users, "late"]).tolist() == [FULL] * 4


def test_filters_and_answers_are_recovered_where_only_states_are_damaged(path, caplog):
    """With a state's page destroyed, states are gone and every filter, answer and head is kept."""
    users, state = build_damaged(path, 300)
    where = path.read_bytes().find(state.w[150, 0].tobytes())
    overwrite(path, where // 4096 * 4096, b"\xff" * 4096)
    with DeviceStore.open(path, [*users, "new"]) as store:
        assert store.spent([*users, "new"]).tolist() == [9] * 300 + [0]
        assert store.charged("L", 1, users).all()
        assert store.acknowledged("L") == (1, HEAD)
        assert not store.load_states(users).found.any()
        with pytest.raises(Refused):
            charge(store, 1, np.ones(300), users=users)
    assert len(caplog.records) == 1


def test_a_file_that_fails_its_integrity_check_is_set_aside(path):
    """An index that disagrees with its table is damage too, though every statement still runs."""
    users, _ = build_damaged(path, 300)
    connection = sqlite3.connect(path)
    ((tag,),) = connection.execute("SELECT tag FROM users WHERE id = 150")
    connection.close()
    data = path.read_bytes()
    places = [at for at in range(len(data)) if data.startswith(tag, at)]
    index_entry = next(at for at in places if data[at // 4096 * 4096] == 0x0A)  # a leaf of an index
    overwrite(path, index_entry + 31, bytes([tag[31] ^ 1]))
    with DeviceStore.open(path, users) as store:
        assert store.spent(users).tolist() == [9] * 300
    assert len(store_file.set_aside_files(path)) == 1


def test_filters_that_cannot_be_read_are_full_and_the_others_are_kept(path):
    """A destroyed page of filters fills the filters that were on it, and nobody's filter is lowered."""
    users, _ = build_damaged(path, 2000)
    connection = sqlite3.connect(path)
    ((tag,),) = connection.execute("SELECT tag FROM users WHERE id = 1000")
    index = connection.execute("SELECT rootpage FROM sqlite_master WHERE name LIKE '%autoindex_users%'")
    assert index.fetchone()[0] > 0
    connection.close()
    data = path.read_bytes()
    places = [at for at in range(0, len(data), 4096) if tag in data[at : at + 4096]]
    table_page = next(at for at in places if data[at] == 0x0D)  # a leaf of a table, not of its index
    overwrite(path, table_page, b"\xff" * 4096)
    with DeviceStore.open(path, [*users, "new"]) as store:
        spent = store.spent([*users, "new"])
    assert set(spent.tolist()) == {9, FULL}
    assert spent[999] == FULL
    assert (spent == 9).sum() > 1500
    assert spent[-1] == FULL  # it might have been one of the lost


def test_a_lowered_filter_in_a_damaged_file_is_corrected_by_the_charges(path):
    """Where the row of a filter and the recorded charges disagree, the higher counts."""
    users, state = build_damaged(path, 300)
    connection = sqlite3.connect(path)
    connection.execute("DROP TRIGGER a_filter_never_goes_down")
    connection.execute("UPDATE users SET spent = 1 WHERE id = 5")
    connection.commit()
    connection.close()
    where = path.read_bytes().find(state.w[150, 0].tobytes())
    overwrite(path, where // 4096 * 4096, b"\xff" * 4096)
    with DeviceStore.open(path, users) as store:
        assert store.spent(users).tolist() == [9] * 300


def test_a_file_set_aside_before_a_crash_is_still_salvaged(path):
    """If the process dies between setting aside and making the new file, no filter starts at zero."""
    users, _ = build_damaged(path)
    path.rename(path.with_name("device.db.corrupt-4"))
    with DeviceStore.open(path, users) as store:
        assert store.spent(users).tolist() == [9, 9, 9]
    path.write_bytes(b"again")
    with DeviceStore.open(path, users) as store:
        assert store.spent(users).tolist() == [FULL] * 3
    assert path.with_name("device.db.corrupt-5").read_bytes() == b"again"


def test_a_log_beside_a_damaged_file_goes_with_it(path):
    """The log of a damaged file is not replayed into the new one."""
    store = DeviceStore.open(path, USERS)
    charge(store, 1, [True, True, True])
    for suffix in ("", "-wal"):
        shutil.copy(f"{path}{suffix}", f"{path}.copy{suffix}")
    store.close()
    copied = path.with_name("device.db.copy")
    overwrite(copied, 0, b"x" * 100)
    log = bytearray(copied.with_name("device.db.copy-wal").read_bytes())
    log[32 + 24 : 32 + 24 + 100] = b"y" * 100  # breaks the first frame, and so the whole log
    copied.with_name("device.db.copy-wal").write_bytes(log)
    with DeviceStore.open(copied, USERS) as opened:
        assert opened.spent(USERS).tolist() == [FULL] * 3
    assert copied.with_name("device.db.copy.corrupt-1").exists()


def test_forget_also_erases_from_files_set_aside(path):
    """A damaged file still holds states, so nothing of it may stay."""
    users, state = build_damaged(path, 300)
    overwrite(path, 0, b"x" * 100)
    with DeviceStore.open(path, users) as store:
        assert all(trace in files_of(path) for trace in traces_of(state, 7))
        store.forget(users[7])
        assert not any(trace in files_of(path) for trace in traces_of(state, 7))
    assert store_file.set_aside_files(path) == []


def test_a_database_of_something_else_is_left_alone(path):
    """A path that names another program's database is an error, and the file stays as it was."""
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE accounts (owner TEXT)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(UmbelError, match="something else"):
        DeviceStore.open(path, USERS)
    assert path.read_bytes() == before
    with pytest.raises(UmbelError, match="path of a file"):
        DeviceStore.open(path.parent, USERS)


def test_a_newer_schema_is_refused_and_left_alone(path):
    """An older program must not touch what it does not understand."""
    DeviceStore.open(path, USERS).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 5")
    connection.close()
    with pytest.raises(UmbelError, match="got version=5"):
        DeviceStore.open(path, USERS)
    assert store_file.set_aside_files(path) == []


def test_a_folder_that_is_missing_is_a_storage_error(tmp_path):
    """What the file system says becomes our error with a remedy."""
    with pytest.raises(StorageError, match="Check the disk"):
        DeviceStore.open(tmp_path / "missing" / "device.db", USERS)


VERSION_1 = """
PRAGMA application_id = 1970102833;
PRAGMA user_version = 1;
CREATE TABLE device (
    key BLOB NOT NULL CHECK (length(key) = 32),
    new_user_spent INTEGER NOT NULL,
    erasing INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE users (
    id INTEGER PRIMARY KEY,
    tag BLOB NOT NULL UNIQUE CHECK (length(tag) = 32),
    spent INTEGER NOT NULL CHECK (typeof(spent) = 'integer' AND spent BETWEEN 0 AND 4611686018427387904),
    forgotten INTEGER NOT NULL DEFAULT 0
);
CREATE TRIGGER a_filter_never_goes_down BEFORE UPDATE OF spent ON users WHEN NEW.spent < OLD.spent
BEGIN SELECT RAISE(ABORT, 'a filter never goes down'); END;
CREATE TRIGGER a_filter_outlives_its_user BEFORE DELETE ON users
BEGIN SELECT RAISE(ABORT, 'a filter outlives its user'); END;
CREATE TABLE ledgers (
    id INTEGER PRIMARY KEY,
    ledger_id TEXT NOT NULL UNIQUE,
    sequence INTEGER NOT NULL CHECK (sequence >= 0),
    head BLOB NOT NULL CHECK (length(head) = 32)
);
CREATE TABLE charges (
    ledger_id TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    cost INTEGER NOT NULL CHECK (cost > 0),
    charged BLOB NOT NULL,
    PRIMARY KEY (ledger_id, sequence)
);
CREATE TABLE states (
    user INTEGER PRIMARY KEY REFERENCES users (id),
    rank INTEGER NOT NULL,
    sparsity INTEGER NOT NULL,
    model_digest BLOB NOT NULL,
    record BLOB NOT NULL
);
"""


def make_version_1(path):
    """A store as version 1 left it: ada contributed to two releases, ben to one, cid was forgotten; none has a key."""
    key = bytes(32)
    tags = [hmac.digest(key, user.encode(), "sha256") for user in USERS]
    connection = sqlite3.connect(path)
    connection.executescript(VERSION_1)
    connection.execute("INSERT INTO device VALUES (?, 0, 0)", (key,))
    rows = zip(tags, (10, 5, 5), (0, 0, 1), strict=True)
    connection.executemany("INSERT INTO users (tag, spent, forgotten) VALUES (?, ?, ?)", rows)
    connection.execute("INSERT INTO ledgers VALUES (1, 'L', 7, ?)", (HEAD,))
    charged = [("L", 3, 5, bytes([0b010])), ("L", 7, 5, bytes([0b110]))]
    connection.executemany("INSERT INTO charges VALUES (?, ?, ?, ?)", charged)
    record = np.arange(2 + 2 + 1 + 6, dtype="<f8").tobytes()
    connection.execute("INSERT INTO states VALUES (1, 2, 1, ?, ?)", (DIGEST, record))
    connection.commit()
    connection.close()
    path.chmod(0o600)


def is_as_version_1_left_it(store):
    """That nothing was lost and counts follow from the records."""
    assert store.spent(USERS).tolist() == [10, 5, FULL]
    assert store.contributions(USERS).tolist() == [2, 1, 2]  # cid, in no record any more, may have been in all
    assert store.acknowledged("L") == (7, HEAD)
    assert store.trusted_key("L") is None
    assert store.charged("L", 7, USERS).tolist() == [True, True, False]


def test_a_store_of_version_1_is_migrated_in_place(path):
    """Filters, answers and states stay; the number of contributions is counted from the answers."""
    make_version_1(path)
    for _ in range(2):
        with DeviceStore.open(path, USERS) as store:
            is_as_version_1_left_it(store)
            found = store.load_states(USERS)
            assert found.found.tolist() == [True, False, False]
            assert (found.w[0].tolist(), found.scale[0]) == ([0.0, 1.0], 4.0)
            assert (found.share.any(), found.batch.any(), store.batches()) == (False, False, [])
            with store.changing() as changes:
                assert changes.grams(USERS) == [None] * 3
    assert store_file.set_aside_files(path) == []
    with DeviceStore.open(path, USERS) as store:
        charge(store, 8, [True, False, False], public_key=b"k" * 32)
        store.save_model(DIGEST, b"model")
        assert store.contributions(USERS).tolist() == [3, 1, 2]
        assert store.trusted_key("L") == b"k" * 32


def test_a_migration_that_is_cut_short_is_done_again(path, monkeypatch):
    """It is one transaction: the file is of version 1 or of version 2."""
    make_version_1(path)
    statements = list(store_file._statements(store_file._FROM_VERSION_1))
    for stop in range(len(statements)):
        monkeypatch.setattr(store_file, "_statements", lambda _, stop=stop: [*statements[:stop], "no SQL"])
        with pytest.raises(StorageError):
            DeviceStore.open(path, USERS)
    monkeypatch.undo()
    with DeviceStore.open(path, USERS) as store:
        is_as_version_1_left_it(store)


def test_moments_are_erased_with_their_user_and_replaced_with_the_state(path):
    """No byte of them stays in any file; a state that is saved without moments has none."""
    grams = [bytes([65 + i]) * 200 for i in range(3)]
    with DeviceStore.open(path, USERS) as store:
        store.save_states(USERS, random_state(3), DIGEST, grams=grams)
        assert grams[0] in files_of(path)
        store.forget("ada")
        assert grams[0] not in files_of(path)
        store.save_states(["ben"], random_state(1), DIGEST)
        with store.changing() as changes:
            assert changes.grams(USERS) == [None, None, grams[2]]


def test_shares_and_batches_are_kept_beside_states_that_were_updated(store):
    """A state that is saved without them has none, whatever was there before."""
    state, share = random_state(1), np.array([[0.25, 0.5, 0.0]])
    with store.changing() as changes:
        changes.save(["ben"], state, DIGEST, share=share, batch=4)
        assert changes.model_digests(USERS) == [None, DIGEST, None]
    found = store.load_states(USERS)
    assert (found.share[1].tolist(), found.batch.tolist()) == ([0.25, 0.5, 0.0], [0, 4, 0])
    store.save_states(["ben"], state, DIGEST)
    assert (store.load_states(USERS).share.any(), store.load_states(USERS).batch.any()) == (False, False)


def test_a_store_of_version_1_is_not_migrated_under_a_program_that_uses_it(path):
    """The older program would not count contributions."""
    make_version_1(path)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(StorageError, match="older program"):
            DeviceStore.open(path, USERS)
    with DeviceStore.open(path, USERS) as store:
        is_as_version_1_left_it(store)


def test_a_damaged_store_of_version_1_is_salvaged(path):
    """What the migration would have counted is counted from the damaged file."""
    make_version_1(path)
    path.rename(path.with_name("device.db.corrupt-1"))
    with DeviceStore.open(path, USERS) as store:
        assert store.spent(USERS).tolist() == [10, 5, FULL]
        assert store.contributions(USERS[:2]).tolist() == [2, 1]
        assert store.acknowledged("L") == (7, HEAD)


def test_contributions_are_counted_with_the_mask_and_limited(store):
    """Whoever contributed often enough cannot be charged again, and then nobody is."""
    charge(store, 1, [True, False, True])
    charge(store, 2, [True, False, False], max_contributions=2)
    assert store.contributions(USERS).tolist() == [2, 0, 1]
    with pytest.raises(ValueError, match="limits"):
        charge(store, 3, [True, True, False], max_contributions=2)
    assert store.contributions(USERS).tolist() == [2, 0, 1]
    assert store.spent(USERS).tolist() == [10, 0, 5]


def test_the_count_of_contributions_survives_damage(path):
    """It is a witness of its own, and the records are another."""
    with DeviceStore.open(path, USERS) as store:
        charge(store, 1, [True, False, True], public_key=b"k" * 32)
    path.rename(path.with_name("device.db.corrupt-1"))
    with DeviceStore.open(path, USERS) as store:
        assert store.contributions(USERS).tolist() == [1, 0, 1]
        assert store.trusted_key("L") == b"k" * 32


@pytest.mark.parametrize("statement", ["UPDATE users SET contributions = contributions - 1", "DELETE FROM users"])
def test_the_file_itself_refuses_to_lower_a_count(path, statement):
    """Whoever writes to the file with other tools cannot give a user more contributions either."""
    with DeviceStore.open(path, USERS) as store:
        charge(store, 1, [True, True, True])
    connection = sqlite3.connect(path)
    with pytest.raises(sqlite3.IntegrityError):
        connection.execute(statement)
    connection.close()


def test_the_key_in_force_is_kept_with_the_line_that_named_it(store):
    """A message that names no key leaves the one that is known, and a refused one changes nothing."""
    assert store.trusted_key("L") is None
    store.acknowledge("L", 3, HEAD, public_key=b"a" * 32)
    store.acknowledge("L", 4, HEAD)
    assert store.trusted_key("L") == b"a" * 32
    with pytest.raises(Refused):
        store.acknowledge("L", 3, HEAD, public_key=b"b" * 32)
    assert store.trusted_key("L") == b"a" * 32
    charge(store, 5, [True] * 3, public_key=b"c" * 32)
    assert store.trusted_key("L") == b"c" * 32
    assert store.trusted_key("M") is None


def test_models_are_kept_as_long_as_a_state_refers_to_them(store):
    """The newest stays in any case: it answers for whoever has no state."""
    digests = [bytes([i]) * 32 for i in range(4)]
    assert store.load_model() is None
    for i, digest in enumerate(digests):
        store.save_model(digest, b"model %d" % i)
        if i == 1:
            store.save_states(["ada"], random_state(1), digest)
    assert [store.load_model(digest) for digest in digests] == [None, b"model 1", None, b"model 3"]
    assert store.load_model() == b"model 3"
    store.save_model(digests[1], b"model 1")
    assert store.load_model() == b"model 1"


def test_there_are_as_many_places_as_the_registry_has(path):
    """Users who are known keep theirs, new ones take what is free in their order, and the rest have none."""
    with DeviceStore.open(path, ()) as store:
        assert store.enrol(["ada", "ben"], slots=3).tolist() == [True, True]
        assert store.enrol(["dan", "eve", "ada"], slots=3).tolist() == [True, False, True]
        store.forget("ada")  # whose place stays
        assert store.enrol(["eve", "ben", "ada"], slots=3).tolist() == [False, True, True]
        assert store.forgotten(["ben", "ada"]).tolist() == [False, True]
        assert store.num_places() == 3
        assert store.known(["eve", "ada"]).tolist() == [False, True]
    with DeviceStore.open(path, ()) as store:
        assert store.enrol(["eve", "dan", "ben"], slots=2).tolist() == [False, False, True]
        assert store.enrol(["eve", "dan", "ben"], slots=4).tolist() == [True, True, True]


def test_what_another_process_writes_is_noticed(path):
    """Its own writing is no news to a store."""
    with DeviceStore.open(path, USERS) as store, DeviceStore.open(path, USERS) as other:
        store.changed_elsewhere()
        charge(store, 1, [True, True, True])
        assert not store.changed_elsewhere()
        other.forget("ada")
        assert store.changed_elsewhere()
        assert not store.changed_elsewhere()
        store.save_states(USERS, random_state(3), DIGEST)
        assert store.load_states(USERS).found.tolist() == [False, True, True]


def test_a_simulations_memory_has_the_same_places_counts_and_keys():
    """Whatever stands in for the store says the same of places, contributions and keys."""
    store = TransientStore(())
    assert store.enrol(["ada", "ben"], slots=3).tolist() == [True, True]
    assert store.enrol(["dan", "eve", "ada"], slots=3).tolist() == [True, False, True]
    store.charge("L", 0, HEAD, ["dan", "ada"], np.array([True, False]), 5, public_key=b"k" * 32)
    assert store.contributions(["ada", "dan"]).tolist() == [0, 1]
    assert store.spent(["dan", "ben", "ada"]).tolist() == [5, 0, 0]
    with pytest.raises(ValueError, match="limits"):
        store.charge("L", 1, HEAD, ["dan"], np.array([True]), 5, max_contributions=1)
    assert (store.trusted_key("L"), store.num_places()) == (b"k" * 32, 3)
