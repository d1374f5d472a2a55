"""An older copy of a ledger is noticed where something on the machine remembers more, before a round is charged."""

import json
import shutil
from pathlib import Path

import pytest

from common.errors import VerificationError
from privacy.ledger import PrivacyLedger
from tests.privacy.test_restore import OWNER, RECOVERY, lose, make, release
from umbel.cli import run
from umbel.federation import FederationFolder
from umbel.rollback import check_not_rolled_back


@pytest.fixture
def folder(tmp_path: Path) -> FederationFolder:
    """A ledger of three releases, a run folder with a copy of the first two, and a node that has seen line 6."""
    folder = FederationFolder(root=tmp_path)
    folder.server.mkdir()
    copy = tmp_path / "runs" / "first" / "release" / "ledger.jsonl"
    copy.parent.mkdir(parents=True)
    with make(folder.place.ledger) as ledger:
        for server_round in range(1, 4):
            release(ledger, server_round)
            if server_round == 2:
                ledger.copy_to(copy)
    node = tmp_path / "nodes" / "edge-1"
    (node / "store").mkdir(parents=True)
    toml = f'store = "store/node.sqlite"\npublic_key = "{"0" * 64}"\nmu_max = "1"\n[data]\nsource = "synthetic"\n'
    (node / "node.toml").write_text(toml)
    (node / "store" / "status.json").write_text(json.dumps({"ledger_id": "L", "acknowledged": 6}))
    return folder


def remembered(folder: FederationFolder) -> int:
    with PrivacyLedger.open(folder.place.ledger) as ledger:
        return check_not_rolled_back(folder, ledger)


def test_the_newest_ledger_is_what_is_remembered(folder: FederationFolder) -> None:
    """Run folders and nodes remember no more than it has."""
    assert remembered(folder) == 6


@pytest.mark.parametrize(("lines", "who"), [(2, "edge-1"), (3, "first")])
def test_an_older_ledger_is_named_with_who_remembers_more(folder: FederationFolder, lines: int, who: str) -> None:
    """A node where it has seen more than run folders, or a run folder."""
    lose(folder.place.ledger, lines)
    if who == "first":
        (folder.root / "nodes" / "edge-1" / "store" / "status.json").unlink()
        lose(folder.place.ledger, 1)
    with pytest.raises(VerificationError, match="older copy") as error:
        remembered(folder)
    assert who in str(error.value)


def test_a_ledger_that_was_continued_twice_is_seen(folder: FederationFolder) -> None:
    """As long as before, but with other lines."""
    lose(folder.place.ledger, 4)
    with PrivacyLedger.open(folder.place.ledger, key=OWNER) as ledger:
        for server_round in (7, 8, 9):
            release(ledger, server_round)
    with pytest.raises(VerificationError, match="continued"):
        remembered(folder)


def test_a_restored_ledger_may_go_on(folder: FederationFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is remembered is charged; the command asks first, and at no terminal it wants to be told."""
    lose(folder.place.ledger, 4)
    key = folder.root / "recovery.key"
    for path, private in ((key, RECOVERY), (folder.place.key, OWNER)):
        shutil.copyfile(pem_of(private, folder.root), path)
        path.chmod(0o600)
    command = ["ledger", "restore", str(folder.place.ledger), "--up-to", "7", "--recovery-key", str(key)]
    assert run(command) == 2
    with pytest.raises(VerificationError):
        remembered(folder)
    assert run([*command, "--yes"]) == 0
    assert remembered(folder) == 6


def pem_of(private, folder: Path) -> Path:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    path = folder / "some.pem"
    path.write_bytes(private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path
