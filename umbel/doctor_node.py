"""What `umbel doctor` looks at on a device: its keys, its clock, its data and its store. Counts only, never a value."""

import hashlib
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, SECP384R1, SECP521R1

from client import sources
from client.settings import NodeSettings, load_settings
from client.store_file import MEMORY, SCHEMA_VERSION, set_aside_files
from common.data import partition
from common.errors import UmbelError
from privacy.keys import load_key, public_key_hex
from server import certificates
from umbel.checks import (
    Check,
    call,
    check_certificate,
    check_clock,
    check_disk,
    check_private,
    check_versions,
    check_writable,
    fail,
    ok,
    run,
    warn,
)
from umbel.credentials import read_certificate

_BYTES_A_USER = 4096  # filter, personal state with its precision, and the log of the last transaction
_STORE_OVERHEAD = 10_000_000  # models, logs
_CURVES = (SECP256R1, SECP384R1, SECP521R1)  # all that Flower takes


def check_node(root: Path, now: datetime) -> list[Check]:
    """All checks of a node's folder."""
    path = root / "node.toml"
    try:
        settings = load_settings(path)
    except UmbelError as error:
        remedy = "Fill in [data] and whatever else the message names; docs/device.md has an example."
        return [fail("settings", str(error), remedy), *run("versions", check_versions)]
    secret = [Path(name) for name in (settings.auth_key, settings.signing_key) if name]
    parts: Mapping[str, Callable[[], Iterable[Check]]] = {
        "settings": partial(check_settings, settings),
        "keys": partial(check_keys, settings),
        "permissions": partial(check_private, [root, *secret, Path(settings.store)]),
        "server": partial(check_server, settings, now),
        "data": partial(check_data, settings),
        "store": partial(check_store, settings),
        "versions": check_versions,
        "disk": partial(check_room, settings),
        "code": partial(check_code, settings),
    }
    return [check for name, function in parts.items() for check in run(name, function)]


def check_settings(settings: NodeSettings) -> Iterator[Check]:
    """What the device's owner allows."""
    limit = f"mu_max {settings.mu_max}"
    if settings.epsilon is not None:
        limit = f"epsilon {settings.epsilon:g} at delta={settings.delta:g}"
    yield ok("settings", f"{settings.name}, up to {limit} for each user.")
    if settings.allow_not_private:
        remedy = "Set allow_not_private = false unless this is a trial with made-up data."
        yield warn("settings", "answers releases that are NOT PRIVATE.", remedy)
    if not settings.require_sealing:
        remedy = "Set require_sealing = true."
        yield warn("settings", "contributions need not be sealed to the server.", remedy)


def check_keys(settings: NodeSettings) -> Iterator[Check]:
    """Whether the node's keys are of the kind that Flower and the server take."""
    again = "Have the operator run umbel provision --rotate for this node."
    if settings.auth_key is None:
        yield warn("keys", "no auth_key: a server that authenticates nodes refuses this one.", again)
    else:
        path = Path(settings.auth_key)
        try:
            key = certificates.from_openssh(path.read_bytes())
        except ValueError:
            yield fail("keys", f"{path.name} is not a key in OpenSSH's format on an elliptic curve.", again)
            return
        if not isinstance(key.curve, _CURVES):
            yield fail("keys", f"{path.name} is on {key.curve.name}; Flower takes NIST curves only.", again)
        public = path.with_name(f"{path.name}.pub")
        line = certificates.to_openssh_public(key.public_key(), "")
        if public.exists() and public.read_bytes().split()[:2] != line.split()[:2]:
            yield fail("keys", f"{public.name} is not the public half of {path.name}.", again)
    if settings.signing_key is None:
        yield warn("keys", "no signing_key: a server that knows this node's key refuses what it sends.", again)
    else:
        yield ok("keys", f"signs as {public_key_hex(load_key(Path(settings.signing_key)))[:16]}….")


def check_server(settings: NodeSettings, now: datetime) -> Iterator[Check]:
    """Whether the server can be reached, is the right one, and has the same time."""
    if settings.superlink is None or settings.root_certificates is None:
        yield warn("server", "superlink or root_certificates is not set.", "Set both in node.toml.")
        return
    authority = Path(settings.root_certificates)
    remedy = "Get a new ca.crt from the operator."
    yield check_certificate("authority", read_certificate(authority), now, remedy)
    answer = call(settings.superlink, authority)
    if answer is None:
        yield warn(
            "server",
            f"nothing answers at {settings.superlink}; the node goes on trying.",
            "Start the server, or correct superlink in node.toml; look at firewalls on the way.",
        )
        return
    if answer.problem:
        yield fail(
            "server",
            f"{settings.superlink}: {answer.problem}: it is not the server of {authority.name}.",
            "Correct this device's clock if the dates do not fit; else correct superlink, or get ca.crt from the "
            "operator. Somebody may be in between.",
        )
    else:
        yield ok("server", f"{settings.superlink} answers, with a certificate of {authority.name}.")
    if answer.skew is not None or not answer.problem:
        yield check_clock(answer.skew)


def check_data(settings: NodeSettings) -> Iterator[Check]:
    """Whether the data can be read as declared; how many there are, never what they are."""
    data = settings.data.model_copy(update={"on_bad_rows": "skip"})
    source = sources.read(data, settings.family)
    try:
        mine = partition(source.train, settings.partitions, settings.partition)
    except ValueError as error:
        yield fail("data", str(error), "Correct partition and partitions in node.toml.")
        return
    yield ok("data", f"{mine.num_users} users, {mine.num_examples} training examples.")
    if source.num_bad_rows:
        remedy = "Correct them; umbel simulate --data on this device names them."
        yield warn("data", f"{source.num_bad_rows} rows are not as declared, and are left out.", remedy)
    if source.num_clipped:
        remedy = "Compare the declared ranges with those of the federation."
        yield warn("data", f"{source.num_clipped} values outside their declared range are cut to it.", remedy)
    if settings.users is not None and mine.num_users > settings.users:
        remedy = "Have the operator register as many users as there are."
        yield warn("data", f"{settings.users} users are enrolled: the others do not take part.", remedy)


def check_store(settings: NodeSettings) -> Iterator[Check]:
    """Whether the filters and personal models are sound."""
    if settings.store == MEMORY:
        yield fail("store", "in memory: a restart would forget what was given.", "Name a file in node.toml.")
        return
    path = Path(settings.store)
    folder = next(place for place in path.parents if place.is_dir())
    yield from check_writable([folder])
    aside = set_aside_files(path) if path.parent.is_dir() else []
    if aside:
        remedy = "Nothing: filters that could be read were kept; users start again. Erase it with umbel forget."
        yield warn("store", f"{len(aside)} damaged files were set aside.", remedy)
    if not path.exists():
        yield ok("store", "will be made.")
        return
    try:
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            (schema,) = connection.execute("PRAGMA user_version").fetchone()
            (users,) = connection.execute("SELECT count(*) FROM users").fetchone()
    except sqlite3.DatabaseError:
        found, schema, users = "", 0, 0
    if schema > SCHEMA_VERSION:
        yield fail("store", f"of format {schema}, of a newer umbel.", "Use that umbel again.")
    elif found != "ok":
        remedy = "Put a good copy back, or start the node: it sets the file aside and keeps the filters it can read."
        yield fail("store", "damaged.", remedy)
    else:
        yield ok("store", f"sound, {users} users.")


def check_room(settings: NodeSettings) -> Iterator[Check]:
    """Whether the store has room to grow to its size."""
    if settings.store != MEMORY:
        folder = next(place for place in Path(settings.store).parents if place.is_dir())
        needed = _BYTES_A_USER * (settings.users or 1) + _STORE_OVERHEAD
        yield check_disk(folder, needed, f"the store of {settings.users or 1} users")


def check_code(settings: NodeSettings) -> Iterator[Check]:
    """Whether this device's code is that of a bundle its owner allows."""
    stock = "With a stock flower-supernode the server's code runs instead, and limits hold against mistakes only."
    if not settings.bundle_hashes:
        yield ok("code", f"umbel node runs its own code, whatever bundle a run names. {stock}")
        return
    from umbel.flower_engine import build_bundle  # noqa: PLC0415 (Flower, only where it is asked for)

    with tempfile.TemporaryDirectory() as folder:
        own = hashlib.sha256(build_bundle(Path(folder)).read_bytes()).hexdigest()
    if own in settings.bundle_hashes:
        yield ok("code", f"runs of bundle {own[:16]}… are answered, which is this version's. {stock}")
    else:
        remedy = "Add it if the server runs this version."
        yield warn("code", f"this version's bundle {own} is not in bundle_hashes.", remedy)
