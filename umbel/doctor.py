"""`umbel doctor`: looks at a federation's folder, or at a node's, before it is relied upon. It changes nothing."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from client.settings import load_settings
from common.config import Config, DataConfig
from common.errors import DataError, UmbelError, VerificationError
from common.loading import public_schema
from privacy.keys import load_key, public_key_hex
from privacy.ledger import PrivacyLedger
from server import certificates
from server.algorithms import largest_layout
from server.registry import load_registry
from umbel.checks import (
    Check,
    assignments,
    call,
    check_certificate,
    check_disk,
    check_order,
    check_private,
    check_versions,
    check_writable,
    fail,
    is_free,
    ok,
    run,
    variables_of,
    warn,
)
from umbel.credentials import read_certificate
from umbel.doctor_node import check_node
from umbel.federation import Deployment, FederationFolder, load_deployment
from umbel.provision import address, compose_environment
from umbel.rollback import check_not_rolled_back

COMPOSE_FILE = Path(__file__).resolve().parents[1] / "docker-compose.yml"
_RUN_OVERHEAD = 20_000_000  # logs, SuperLink's database, reports
_LITTLE_LEFT = 0.1
_AGAIN = "Run umbel provision {} again: it makes what is missing."
_LOOPBACK = "127.0.0.1"


def doctor(path: Path, *, now: datetime | None = None) -> dict[str, Any]:
    """Examine a folder.

    Args:
        path: A federation's folder, or a node's.
        now: The time, with zone; by default the clock's.

    Returns:
        The checks, as documented for `--format json`.

    Raises:
        UmbelError: If it is neither.
    """
    root, now = path.resolve(), now or datetime.now(UTC)
    folder = FederationFolder(root=root)
    if folder.deployment.exists():
        kind, checks = "federation", check_federation(folder, now)
    elif (root / "node.toml").exists():
        kind, checks = "node", check_node(root, now)
    else:
        raise UmbelError(
            f"Expected a folder with deployment.toml or node.toml, got {root}. Make one with umbel provision."
        )
    return {
        "folder": str(root),
        "kind": kind,
        "failed": sum(check.status == "fail" for check in checks),
        "warned": sum(check.status == "warn" for check in checks),
        "checks": [asdict(check) for check in checks],
    }


def check_federation(folder: FederationFolder, now: datetime) -> list[Check]:
    """All checks of a federation's folder."""
    deployment = load_deployment(folder)
    parts: Mapping[str, Callable[[], Iterable[Check]]] = {
        "files": partial(check_files, folder, deployment),
        "certificates": partial(check_certificates, folder, deployment, now),
        "permissions": partial(check_private, _private_places(folder, deployment)),
        "ledger": partial(check_ledger, folder, now),
        "registry": partial(check_registry, folder, deployment),
        "recovery key": partial(check_recovery_key, folder),
        "ports": partial(check_ports, folder, deployment),
        "versions": check_versions,
        "writable": partial(check_writable, (folder.server, folder.runs, folder.var)),
        "disk": partial(check_room, folder, deployment),
        "compose": partial(check_compose, folder, deployment),
        "stock nodes": check_stock_nodes,
    }
    return [check for name, function in parts.items() for check in run(name, function)]


def check_files(folder: FederationFolder, deployment: Deployment) -> Iterator[Check]:
    """Whether a provisioning came to its end."""
    server = (
        folder.authority,
        folder.certificate,
        folder.certificate_key,
        folder.superexec_secret,
        folder.place.ledger,
        folder.place.key,
        folder.registry,
        folder.compose_environment,
    )
    missing = [path for path in server if not path.exists()]
    begun = [path for path in _waiting(folder, deployment) if path.exists()]
    if missing or begun:
        found = ", ".join(str(path.relative_to(folder.root)) for path in (*missing, *begun))
        what = "not there" if missing else "left of a rotation that was not finished"
        yield fail("files", f"{found}: {what}.", _AGAIN.format(folder.root))
    else:
        yield ok("files", f"complete, for {len(deployment.nodes.names)} nodes.")


def check_certificates(folder: FederationFolder, deployment: Deployment, now: datetime) -> Iterator[Check]:
    """Whether the server's certificate is one that devices accept."""
    authority, certificate = read_certificate(folder.authority), read_certificate(folder.certificate)
    renew = f"Run umbel provision {folder.root} --rotate server."
    yield check_certificate("authority", authority, now, "Provision another folder, and copy ca.crt to all devices.")
    yield check_certificate("certificate", certificate, now, renew)
    if not certificates.is_signed_by(certificate, authority):
        yield fail("certificate", "not signed by ca/ca.crt: no device would trust it.", renew)
    if certificates.from_pem(folder.certificate_key.read_bytes()).public_key() != certificate.public_key():
        yield fail("certificate", "server/tls.key is not its key.", renew)
    missing = certificates.uncovered(certificate, deployment.hosts.names)
    if missing:
        yield fail("hosts", f"the certificate is not for {', '.join(missing)}.", renew)
    else:
        yield ok("hosts", f"{', '.join(deployment.hosts.names)}.")


def check_ledger(folder: FederationFolder, now: datetime) -> Iterator[Check]:
    """Whether the ledger verifies, can be written with the key beside it, and has something left."""
    with PrivacyLedger.open(folder.place.ledger) as ledger:
        yield ok("ledger", f"verified, {ledger.num_lines} lines.")
        try:
            remembered = check_not_rolled_back(folder, ledger)
        except VerificationError as error:
            yield fail("ledger's end", str(error), "Do not start a run before: it would be charged for nothing.")
        else:
            if remembered >= 0:
                yield ok("ledger's end", f"at or behind line {remembered}, the last that is remembered in this folder.")
        if ledger.torn_bytes:
            yield warn("ledger", "its last line is torn, by a crash.", "Nothing: the next run cuts it off.")
        if public_key_hex(load_key(folder.place.key)) != ledger.public_key:
            yield fail(
                "ledger key",
                "server/ledger.key is not the key in force: nothing can be charged.",
                _AGAIN.format(folder.root) + " If that does not help, put the right key back.",
            )
        else:
            yield ok("ledger key", f"{ledger.public_key[:16]}… is in force.")
        yield _check_budget(ledger)
        still_open = ledger.open_reservations()
        if still_open:
            runs = ", ".join(sorted({entry.run for entry in still_open}))
            yield warn(
                "rounds",
                f"{len(still_open)} charged and not finished, of run {runs}.",
                "Resume the run (umbel train --resume), or leave it: what is charged stays charged.",
            )
        if ledger.last is not None:
            yield check_order(datetime.fromisoformat(ledger.last.time), now)
        registry = load_registry(folder.registry)
        if ledger.registry is None or ledger.registry["digest"] != registry.digest:
            yield ok("registry", "newer than the ledger's last REGISTRY line; the next run writes one.")


def _check_budget(ledger: PrivacyLedger) -> Check:
    genesis = ledger.genesis
    delta, budget = float(genesis["delta"]), float(genesis["epsilon"])
    if ledger.limit_units == float("inf"):
        return warn("budget", "none: this ledger promises nothing.", "Provision another folder for what is private.")
    left = 1 - ledger.capped_units / ledger.limit_units if ledger.limit_units else 0.0
    spent = ledger.epsilon_spent(delta)
    message = (
        f"epsilon {spent:.4g} of {budget:g} spent at delta={delta:g}; {math.floor(1000 * left) / 10} % of mu² left."
    )
    if left < 1e-6:
        return fail("budget", message, "Nothing more can be released about these users.")
    if left < _LITTLE_LEFT:
        return warn("budget", message, "Plan what is left: umbel plan --ledger.")
    return ok("budget", message)


def check_registry(folder: FederationFolder, deployment: Deployment) -> Iterator[Check]:
    """Whether the nodes' folders, as far as they are still here, fit the registry."""
    registry = load_registry(folder.registry)
    entries = {node.name: node for node in registry.nodes}
    unnamed = sorted(set(entries) ^ set(deployment.nodes.names))
    if unnamed:
        yield fail(
            "registry",
            f"{', '.join(unnamed)}: in only one of deployment.toml and server/registry.json.",
            _AGAIN.format(folder.root) + " To retire a node, take it out of both.",
        )
    problems = 0
    for name, entry in entries.items():
        node = folder.node(name)
        if node.signing_key.exists() and public_key_hex(load_key(node.signing_key)) != entry.public_key:
            problems += 1
            yield fail(
                f"node {name}",
                "its signing key is not the registry's: what it sends would be refused.",
                f"Run umbel provision {folder.root} --rotate {name}.",
            )
        if not node.settings.exists():
            continue
        try:
            settings = load_settings(node.settings)
        except UmbelError as error:
            problems += 1
            yield warn(f"node {name}", f"{error}", f"Have its owner fill in {node.settings.name}.")
            continue
        if settings.superlink != address(deployment):
            problems += 1
            yield warn(
                f"node {name}",
                f"calls {settings.superlink}, and the server is at {address(deployment)}.",
                "Correct superlink in its node.toml, unless something in between leads there.",
            )
        if settings.users not in (None, entry.users):
            problems += 1
            yield fail(
                f"node {name}",
                f"users={settings.users} in node.toml, {entry.users} in the registry: it would be left out.",
                "Make them equal.",
            )
    if not unnamed and not problems:
        yield ok("registry", f"{len(entries)} nodes with {registry.population_size} users.")


def check_recovery_key(folder: FederationFolder) -> Iterator[Check]:
    """Whether the key that mends the loss of this disk is on this disk."""
    if folder.recovery_key.exists():
        yield warn(
            "recovery key",
            "still on this machine: whoever takes the server has it, and whoever loses the disk loses it.",
            f"Move {folder.recovery_key} to a safe place.",
        )
    else:
        yield ok("recovery key", "not on this machine.")


def check_ports(folder: FederationFolder, deployment: Deployment) -> Iterator[Check]:
    """Whether the ports are free, or this federation's own server answers there."""
    for name, port in deployment.ports.model_dump().items():
        check = f"port {port}"
        if is_free(port):
            yield ok(check, f"free, for {name}.")
        elif name == "metrics" and not is_free(deployment.ports.superlink):
            yield ok(check, "in use while the server runs.")
        elif name != "metrics" and (answer := call(f"{_LOOPBACK}:{port}", folder.authority)) and not answer.problem:
            yield ok(check, f"this federation's {name} is running there.")
        else:
            yield fail(
                check,
                f"another program listens on the port of {name}.",
                f"End it, or run umbel provision {folder.root} --{name}-port 0.",
            )


def check_room(folder: FederationFolder, deployment: Deployment) -> Iterator[Check]:
    """Whether a run fits on the disk: by the largest there was, or else by what is sent and kept in one."""
    sizes = [
        sum(path.stat().st_size for path in run_folder.rglob("*") if path.is_file())
        for run_folder in folder.runs.iterdir()
        if run_folder.is_dir()
    ]
    if sizes:
        yield check_disk(folder.root, max(sizes), "a run like the largest so far")
        return
    config = Config()
    try:
        dimension = public_schema(deployment.data or DataConfig(), deployment.nodes.family).dimension
    except DataError:
        dimension = config.data.synthetic.dimension
    rank = min(config.model.rank, dimension)
    shaped = config.model_copy(update={"model": config.model.model_copy(update={"rank": rank})})
    numbers = largest_layout(shaped, dimension, private=True).size
    messages = 1 + 2 * max(1, len(deployment.nodes.names))
    needed = 8 * numbers * messages * config.training.rounds + _RUN_OVERHEAD
    yield check_disk(folder.root, needed, f"a run of {config.training.rounds} rounds")


def check_compose(
    folder: FederationFolder, deployment: Deployment, *, compose_file: Path = COMPOSE_FILE
) -> Iterator[Check]:
    """Whether docker-compose.yml has all of its variables."""
    engines = [name for name in ("docker", "podman") if shutil.which(name)]
    engine = f"{' and '.join(engines)} found" if engines else "no container engine here; umbel up needs none"
    environment = folder.compose_environment.read_text("utf-8")
    again = _AGAIN.format(folder.root)
    if environment != compose_environment(folder, deployment):
        yield warn("compose", "compose.env is not what deployment.toml says.", again)
    if not compose_file.exists():
        yield ok("compose", f"{engine}; no {compose_file.name} beside the program.")
        return
    _, required = variables_of(compose_file.read_text("utf-8"))
    missing = sorted(required - assignments(environment).keys())
    if missing:
        yield fail("compose", f"{compose_file.name} wants {', '.join(missing)}, which compose.env lacks.", again)
    else:
        yield ok("compose", f"{engine}; compose.env has all that {compose_file.name} wants.")


def check_stock_nodes() -> Iterator[Check]:
    """What can be said of nodes that are not ours."""
    yield ok(
        "stock nodes",
        "a stock flower-supernode runs the code that the server ships: its limits hold against mistakes, not against "
        "the server. Use umbel node where they must.",
    )


def _private_places(folder: FederationFolder, deployment: Deployment) -> list[Path]:
    nodes = [folder.node(name) for name in deployment.nodes.names]
    return [
        folder.authority_key.parent,
        folder.authority_key,
        folder.server,
        folder.certificate_key,
        folder.superexec_secret,
        folder.place.key,
        folder.recovery_key.parent,
        folder.recovery_key,
        folder.var,
        *(
            path
            for node in nodes
            for path in (node.root, node.auth_key, node.signing_key, node.superexec_secret, node.store)
        ),
    ]


def _waiting(folder: FederationFolder, deployment: Deployment) -> list[Path]:
    server = (folder.certificate_key, folder.certificate, folder.place.key)
    nodes = (folder.node(name).root / "keys.new" for name in deployment.nodes.names)
    return [*(path.with_name(f"{path.name}.new") for path in server), *nodes]
