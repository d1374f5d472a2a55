"""`umbel provision`: everything that a federation's server and devices need before the first run, in one folder.

Whatever is there is kept, and what is missing is made: a folder that a crash left half-made is completed by the same
command. A node is in the registry once its folder is complete; the folder may then leave for the device, and nothing
of it is made again. Files appear whole, under their names, or not at all.
"""

import fcntl
import math
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from common.errors import UmbelError
from common.files import clear_leftovers, make_folder, write_durably
from privacy.keys import public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.participation import is_unlimited, mu_max_string
from server import certificates
from server.registry import RegisteredNode, Registry, load_registry, registry_with
from umbel.credentials import (
    ensure_auth_key,
    ensure_authority,
    ensure_certificate,
    ensure_secret,
    ensure_signing_key,
    read_certificate,
)
from umbel.federation import Budget, Deployment, FederationFolder, NodeFolder, load_deployment
from umbel.node_settings import node_toml
from umbel.plan import resolve_delta
from umbel.provision_plan import Request, is_begun, planned, users_on
from umbel.rotation import finish_rotations, rotate

__all__ = ["Request", "compose_environment", "provision"]


def provision(root: Path, request: Request, *, now: datetime | None = None) -> dict[str, Any]:
    """Make, complete or extend a federation's folder.

    Args:
        root: The folder: a new or empty one, or one that this function made.
        request: What is asked for.
        now: The time, with zone; by default the clock's.

    Returns:
        What there is now, as documented for `--format json`.

    Raises:
        UmbelError: If it cannot be done; nothing was written then.
        StorageError: If the disk fails; the same command goes on from there.
    """
    folder, now = FederationFolder(root=root.resolve()), now or datetime.now(UTC)
    planned(folder, request)  # what cannot be done is said before anything is written
    make_folder(folder.root)
    with _alone(folder.root):
        deployment = planned(folder, request)
        before = set(load_registry(folder.registry).users_of()) if folder.registry.exists() else set()
        _make(folder, deployment, now)
        notes = [note for what in request.rotate for note in rotate(folder, deployment, what, now)]
        return describe(folder, deployment, before=before, notes=notes, now=now) | {"rotated": list(request.rotate)}


def _make(folder: FederationFolder, deployment: Deployment, now: datetime) -> None:
    """Everything that is missing, in an order in which any beginning of it can be gone on with."""
    clear_leftovers(folder.root)
    stored = load_deployment(folder) if folder.deployment.exists() else None
    if stored is not None:
        _follow(folder, deployment, address(stored))
    if stored != deployment:
        deployment.save(folder.deployment)
    for place in (folder.authority.parent, folder.server, folder.var):
        make_folder(place, mode=0o700)
        clear_leftovers(place)
    make_folder(folder.runs)
    finish_rotations(folder, deployment)
    ensure_authority(folder, deployment, now)
    ensure_certificate(folder, deployment, now)
    ensure_secret(folder.superexec_secret)
    known = load_registry(folder.registry).nodes if folder.registry.exists() else ()
    named = {node.name for node in known}
    users = {name: users_on(folder, deployment, name) for name in deployment.nodes.names if name not in named}
    if not is_begun(folder.place.ledger):
        _make_ledger(folder, deployment.budget)
    with PrivacyLedger.open(folder.place.ledger) as ledger:
        new = [_make_node(folder, deployment, ledger, name, users[name]) for name in users]
    if new or not folder.registry.exists():
        registry_with((*known, *new)).save(folder.registry)
    environment = compose_environment(folder, deployment).encode()
    if not folder.compose_environment.exists() or folder.compose_environment.read_bytes() != environment:
        write_durably(folder.compose_environment, environment)


def _make_ledger(folder: FederationFolder, budget: Budget) -> None:
    """The population's ledger with its budget; its keys first, as GENESIS names them."""
    make_folder(folder.recovery_key.parent, mode=0o700)
    clear_leftovers(folder.recovery_key.parent)
    unlimited = math.isinf(budget.epsilon)
    s = budget.max_nodes_per_user
    with PrivacyLedger.create(
        folder.place.ledger,
        population=budget.population,
        epsilon="inf" if unlimited else budget.epsilon,
        delta=budget.delta,
        mu_max="inf" if unlimited else mu_max_string(budget.epsilon, budget.delta, s),
        max_nodes_per_user=s,
        key=ensure_signing_key(folder.place.key),
        recovery_key=public_key_hex(ensure_signing_key(folder.recovery_key)),
    ):
        pass


def _make_node(
    folder: FederationFolder, deployment: Deployment, ledger: PrivacyLedger, name: str, users: int
) -> RegisteredNode:
    """What one device gets; the settings come last and are never written again."""
    node = folder.node(name)
    make_folder(node.root, mode=0o700)
    clear_leftovers(node.root)
    make_folder(node.store, mode=0o700)
    ensure_auth_key(node, name)
    ensure_secret(node.superexec_secret)
    public_key = public_key_hex(ensure_signing_key(node.signing_key))
    if not node.authority.exists():
        write_durably(node.authority, folder.authority.read_bytes())
    if not node.settings.exists():
        write_durably(node.settings, _settings(deployment, ledger, node, users).encode())
    return RegisteredNode(name=name, users=users, public_key=public_key)


def _settings(deployment: Deployment, ledger: PrivacyLedger, node: NodeFolder, users: int) -> str:
    """The policy that a node starts with: what the ledger promises, and nothing beyond."""
    nodes, genesis, name = deployment.nodes, ledger.genesis, node.root.name
    number = nodes.numbers[name]
    mu_max = max(nodes.mu_max or "0", ledger.mu_limit, key=float)
    # As epsilon only where that is the limit: filters of a sampled run have room for more, and one of several nodes
    # of a user has a part of it.
    in_words = mu_max == genesis["mu_max"] and not is_unlimited(mu_max) and genesis["max_nodes_per_user"] == 1
    is_part = number <= nodes.partitions
    return node_toml(
        identity={
            "name": name,
            "users": users,
            "store": f"{node.store.name}/node.sqlite",
            "signing_key": node.signing_key.name,
            "family": nodes.family,
            "partition": number - 1 if is_part else None,
            "partitions": nodes.partitions if is_part else None,
        },
        trust={
            "public_key": ledger.public_key,
            "ledger_id": ledger.ledger_id,
            "recovery_key": genesis["recovery_key"] or None,
            "require_sealing": True,
            "bundle_hashes": [],
        },
        limits={
            "epsilon": float(genesis["epsilon"]) if in_words else None,
            "delta": float(genesis["delta"]) if in_words else None,
            "mu_max": None if in_words else mu_max,
            "allow_statistics": nodes.allow_statistics,
            "allow_not_private": nodes.allow_not_private,
        },
        connection={
            "superlink": address(deployment),
            "root_certificates": node.authority.name,
            "auth_key": node.auth_key.name,
            "poll_seconds": 1.0,
        },
        data=deployment.data if is_part or not nodes.partitions else None,
    )


def address(deployment: Deployment) -> str:
    """Where devices find the server."""
    host = deployment.hosts.names[0]
    return f"{f'[{host}]' if ':' in host else host}:{deployment.ports.fleet}"


def _follow(folder: FederationFolder, deployment: Deployment, old: str) -> None:
    """Put the server's present address into settings that are still here, where the old one is in them."""
    new = address(deployment)
    for name in deployment.nodes.names if new != old else ():
        path = folder.node(name).settings
        if path.exists() and (text := path.read_text("utf-8")) != (
            followed := text.replace(f'\nsuperlink = "{old}"\n', f'\nsuperlink = "{new}"\n')
        ):
            write_durably(path, followed.encode())


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep other provisioners of this folder out."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UmbelError(
            f"Expected to be alone in {root}, got another umbel provision at work. Wait for it."
        ) from error
    else:
        yield
    finally:
        os.close(descriptor)


def compose_environment(folder: FederationFolder, deployment: Deployment) -> str:
    """Variables for docker-compose.yml: numbers and places, never what is in a secret file."""
    ports, owner = deployment.ports, folder.root.stat()
    variables = {
        "UMBEL_FEDERATION": shlex.quote(str(folder.root)),
        "UMBEL_UID": owner.st_uid,
        "UMBEL_GID": owner.st_gid,
        "UMBEL_SUPERLINK_PORT": ports.superlink,
        "UMBEL_FLEET_PORT": ports.fleet,
        "UMBEL_METRICS_PORT": ports.metrics,
    }
    lines = "".join(f"{name}={value}\n" for name, value in variables.items())
    return f"# Written by `umbel provision`, for docker-compose.yml. No secret is in here.\n{lines}"


def describe(
    folder: FederationFolder, deployment: Deployment, *, before: set[str], notes: list[str], now: datetime
) -> dict[str, Any]:
    """What there is, for people and for `--format json`.

    Args:
        folder: The federation.
        deployment: What it consists of.
        before: Nodes that were there before.
        notes: What the operator has to know of what was done.
        now: The time.
    """
    registry = load_registry(folder.registry)
    with PrivacyLedger.open(folder.place.ledger) as ledger:
        genesis, ledger_id, public_key = ledger.genesis, ledger.ledger_id, ledger.public_key
    epsilon = float(genesis["epsilon"])
    authority, certificate = read_certificate(folder.authority), read_certificate(folder.certificate)
    return {
        "folder": str(folder.root),
        "name": deployment.name,
        "hosts": list(deployment.hosts.names),
        "ports": deployment.ports.model_dump(),
        "nodes": [
            {
                "name": node.name,
                "users": node.users,
                "folder": str(folder.node(node.name).root),
                "public_key": node.public_key,
                "auth_key": _auth_fingerprint(folder.node(node.name)),
                "is_new": node.name not in before,
            }
            for node in registry.nodes
        ],
        "users": registry.population_size,
        "data": None if deployment.data is None else deployment.data.source,
        "budget": {
            "population": genesis["population"],
            "epsilon": None if math.isinf(epsilon) else epsilon,
            "delta": float(genesis["delta"]),
            "mu_max": genesis["mu_max"],
            "max_nodes_per_user": genesis["max_nodes_per_user"],
        },
        "ledger": {"path": str(folder.place.ledger), "ledger_id": ledger_id, "public_key": public_key},
        "recovery_key": {
            "public_key": genesis["recovery_key"],
            "path": str(folder.recovery_key) if folder.recovery_key.exists() else None,
        },
        "certificates": {
            name: {
                "path": str(path),
                "expires": certificates.expiry(found).isoformat(),
                "fingerprint": certificates.fingerprint(found),
            }
            for name, path, found in (
                ("authority", folder.authority, authority),
                ("server", folder.certificate, certificate),
            )
        },
        "warnings": [*notes, *_warnings(folder, deployment, registry, genesis, now)],
    }


def _auth_fingerprint(node: NodeFolder) -> str | None:
    """Of a node's key for Flower, as ssh-keygen shows it; None where its folder has left."""
    return certificates.openssh_fingerprint(node.auth_public.read_bytes()) if node.auth_public.exists() else None


def _warnings(
    folder: FederationFolder, deployment: Deployment, registry: Registry, genesis: Mapping[str, Any], now: datetime
) -> Iterator[str]:
    if folder.recovery_key.exists():
        yield f"the recovery key is still here: move {folder.recovery_key} to a safe place off this machine."
    if certificates.expiry(read_certificate(folder.certificate)) < now + certificates.EXPIRES_SOON:
        yield "the server's certificate ends soon: run umbel provision --rotate server."
    yield from resolve_delta(float(genesis["delta"]), registry.population_size)[1]
    if deployment.nodes.allow_not_private or is_unlimited(genesis["mu_max"]):
        yield "nodes of this federation answer releases that are NOT PRIVATE, as the configuration asks."
    if {node.name for node in registry.nodes} != set(deployment.nodes.names):
        yield "deployment.toml and server/registry.json name different nodes: doctor says which."
