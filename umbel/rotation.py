"""`umbel provision --rotate`: keys and certificates anew, such that after a crash at any point everything fits together
again once `umbel provision` is run.

What is new is written beside the old, ending in `.new`. One write then makes it count (the KEY line of the ledger, the
registry, or the new certificate itself), and after that it takes the old one's place. Nothing old is kept: an old
private key is good for nothing but mischief.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from common.errors import UmbelError
from common.files import storing, sync_directory, write_durably
from privacy.keys import load_key, public_key_hex
from privacy.ledger import PrivacyLedger
from server import certificates
from server.registry import load_registry, registry_with
from server.settings import LedgerPlace
from umbel.credentials import ensure_auth_key, ensure_signing_key, server_certificate
from umbel.federation import Deployment, FederationFolder, NodeFolder

SERVER, LEDGER = "server", "ledger"


def rotate(folder: FederationFolder, deployment: Deployment, what: str, now: datetime) -> list[str]:
    """Renew what is called `what`: "server", "ledger" or a node.

    Returns:
        What the operator has to do now.

    Raises:
        UmbelError: If it cannot be done; the old is in force then.
        StorageError: If the disk fails; `umbel provision` puts in order what was begun.
    """
    if what == SERVER:
        _rotate_certificate(folder, deployment, now)
        return ["the server has a new certificate and key: restart it (umbel down, umbel up)."]
    if what == LEDGER:
        rotate_ledger_key(folder.place)
        return [
            "the ledger has a new key: nodes follow by themselves at the next round; back up server/ledger.key and "
            "server/ledger.jsonl now."
        ]
    _rotate_node(folder, what)
    return [
        f"{what} has new keys: copy those in {folder.node(what).root} to the device and restart it; restart the server "
        "too (umbel down, umbel up), for it to register the key. Runs that were started before leave the node out."
    ]


def finish_rotations(folder: FederationFolder, deployment: Deployment) -> None:
    """Bring to its end, or undo, what a crash left of a rotation."""
    _finish_certificate(folder)
    _finish_ledger_key(folder.place)
    for name in deployment.nodes.names:
        _finish_node(folder, name)


def rotate_ledger_key(place: LedgerPlace) -> None:
    """Hand a ledger over to a new key, which takes the place of the old one beside it.

    Raises:
        UmbelError: If another process is writing the ledger, or its key is not here.
    """
    _finish_ledger_key(place)
    with PrivacyLedger.open(place.ledger, key=load_key(place.key)) as ledger:
        ledger.rotate_key(ensure_signing_key(_new(place.key)))
    _replace(_new(place.key), place.key)


def _finish_ledger_key(place: LedgerPlace) -> None:
    new = _new(place.key)
    if not new.exists():
        return
    with PrivacyLedger.open(place.ledger) as ledger:
        in_force = ledger.public_key == public_key_hex(load_key(new))
    _settle(in_force, [(new, place.key)])


def _rotate_certificate(folder: FederationFolder, deployment: Deployment, now: datetime) -> None:
    key = certificates.new_key()
    pem = server_certificate(folder, deployment, key, now)
    write_durably(_new(folder.certificate_key), certificates.to_pem(key), mode=0o600)
    write_durably(_new(folder.certificate), pem)
    _finish_certificate(folder)


def _finish_certificate(folder: FederationFolder) -> None:
    # The certificate is written after its key and moved after it: while it waits, the pair is complete.
    pairs = [(_new(path), path) for path in (folder.certificate_key, folder.certificate)]
    _settle(_new(folder.certificate).exists(), pairs)


def _rotate_node(folder: FederationFolder, name: str) -> None:
    registry = load_registry(folder.registry)
    if name not in registry.users_of():
        raise UmbelError(f"Expected a node of the registry, got --rotate {name}. Run umbel provision first.")
    node, staged = folder.node(name), _staged(folder.node(name))
    staged.auth_key.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    ensure_auth_key(staged, name)
    public_key = public_key_hex(ensure_signing_key(staged.signing_key))
    nodes = (replace(entry, public_key=public_key) if entry.name == name else entry for entry in registry.nodes)
    registry_with(nodes).save(folder.registry)
    _finish_node(folder, node.root.name)


def _finish_node(folder: FederationFolder, name: str) -> None:
    node, staged = folder.node(name), _staged(folder.node(name))
    if not staged.root.exists():
        return
    keys = {entry.name: entry.public_key for entry in load_registry(folder.registry).nodes}
    in_force = staged.signing_key.exists() and keys.get(name) == public_key_hex(load_key(staged.signing_key))
    # The signing key goes last: as long as it waits, it is known whether the new keys count.
    names: list[Callable[[NodeFolder], Path]] = [
        lambda one: one.auth_key,
        lambda one: one.auth_public,
        lambda one: one.signing_key,
    ]
    _settle(in_force, [(of(staged), of(node)) for of in names])
    with storing(staged.root):
        for leftover in staged.root.iterdir():
            leftover.unlink()
        staged.root.rmdir()
        sync_directory(node.root)


def _staged(node: NodeFolder) -> NodeFolder:
    return NodeFolder(root=node.root / "keys.new")


def _new(path: Path) -> Path:
    return path.with_name(f"{path.name}.new")


def _settle(in_force: bool, moves: list[tuple[Path, Path]]) -> None:
    """Put new files in their places if they count, or else remove them."""
    for new, path in moves:
        if new.exists() and in_force:
            _replace(new, path)
        elif new.exists():
            with storing(new):
                new.unlink()
                sync_directory(new.parent)


def _replace(new: Path, path: Path) -> None:
    with storing(path):
        new.replace(path)
        sync_directory(path.parent)
