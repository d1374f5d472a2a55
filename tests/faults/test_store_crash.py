"""A node killed at any moment has either charged and recorded an answer in full, or not at all."""

import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from client.store import DeviceStore
from common.errors import Refused

USERS = [f"user {i}" for i in range(300)]
HEAD = bytes(32)
COST = 7

NODE = """
    import os, signal, sys
    import numpy as np
    from client.store import DeviceStore

    users = [f"user {i}" for i in range(300)]
    store = DeviceStore.open(sys.argv[1], users)

    def answer(sequence):
        mask = np.arange(300) % (2 + sequence % 3) == 0
        store.charge("L", sequence, bytes(32), users, mask, 7)
        print(sequence, flush=True)  # the reply leaves
"""
FOREVER = """
    print("ready", flush=True)
    sequence, _ = store.acknowledged("L")
    while True:
        sequence += 1
        answer(sequence)
"""
KILLED_AT_STATEMENT = """
    statements = []

    def count(statement):
        if statement not in statements:  # the trigger repeats its statement for each row
            statements.append(statement)
        if len(statements) == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)

    sequence, _ = store.acknowledged("L")
    store._connection.set_trace_callback(count)
    answer(sequence + 1)
"""
OUT_OF_SPACE = """
    import resource
    from common.errors import StorageError
    size = os.path.getsize(sys.argv[1] + "-wal") + int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        for sequence in range(10_000):
            answer(sequence)
    except StorageError:
        print("spent", int(store.spent(users).sum()))
"""


def node(script, *arguments):
    """A process that opens the store and goes on with `script`."""
    program = textwrap.dedent(NODE) + textwrap.dedent(script)
    return subprocess.Popen([sys.executable, "-c", program, *map(str, arguments)], stdout=subprocess.PIPE)


def mask_of(sequence):
    """Who contributes to this sequence."""
    return np.arange(300) % (2 + sequence % 3) == 0


def check_all_or_nothing(path, replied):
    """Every reply that left is charged in full, at most one answer more is, and none can be given again."""
    with DeviceStore.open(path, USERS) as store:
        answered, _ = store.acknowledged("L")
        assert answered in (max(replied, default=-1), max(replied, default=-1) + 1)
        expected = np.zeros(300, np.int64)
        for sequence in range(answered + 1):
            charged = store.charged("L", sequence, USERS)
            assert charged.tolist() == mask_of(sequence).tolist()
            expected += COST * charged
            with pytest.raises(Refused, match="answered"):
                store.charge("L", sequence, HEAD, USERS, mask_of(sequence), COST)
        assert store.spent(USERS).tolist() == expected.tolist()
        assert store.charged("L", answered + 1, USERS) is None
    return answered


def test_a_node_killed_before_any_statement_of_a_charge_has_charged_all_or_nothing(tmp_path):
    """Killed before BEGIN, each statement up to COMMIT, or not at all: nothing until COMMIT is done."""
    path = tmp_path / "device.db"
    replied, statements = [], 0
    while not replied:
        statements += 1
        with node(KILLED_AT_STATEMENT, path, statements) as process:
            replied = [int(line) for line in process.stdout]
        assert (process.returncode == -signal.SIGKILL) is not replied
        assert check_all_or_nothing(path, replied) == (0 if replied else -1)
    assert statements >= 5


@pytest.mark.faults
def test_a_node_killed_at_random_moments_has_charged_all_or_nothing(tmp_path):
    """Over sixty kills of one store: what was replied is on disk, and no answer is half recorded.

    The moments are random, the property holds at each of them.
    """
    path = tmp_path / "device.db"
    moments, replied = np.random.default_rng(20), []
    for _ in range(60):
        with node(FOREVER, path) as process:
            process.stdout.readline()
            for _ in range(moments.integers(4)):
                replied.append(int(process.stdout.readline()))
            time.sleep(moments.random() * 0.004)
            process.kill()
            replied += [int(line) for line in process.stdout.read().split()]
        answered = check_all_or_nothing(path, replied)
        replied = list(range(answered + 1))
    assert answered > 30


@pytest.mark.parametrize("room", [0, 100_000])
def test_a_disk_without_room_charges_all_or_nothing(tmp_path, room):
    """When a write fails, the charge is a StorageError, and neither memory nor disk holds a part of it."""
    path = tmp_path / "device.db"
    with node(OUT_OF_SPACE, path, room) as process:
        *replies, last = process.stdout.read().decode().splitlines()
    assert process.returncode == 0
    replied = [int(line) for line in replies]
    check_all_or_nothing(path, replied)
    assert last == f"spent {sum(COST * int(mask_of(sequence).sum()) for sequence in replied)}"
