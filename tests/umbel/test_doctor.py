"""`umbel doctor`: each thing that can be wrong is made wrong once, and is found with a remedy."""

import http.server
import json
import os
import shutil
import socket
import sqlite3
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from client.store import DeviceStore
from common.config import load_config
from privacy.keys import create_key, load_key
from privacy.ledger import PrivacyLedger
from server import certificates
from umbel import checks, cli, doctor, doctor_node
from umbel.federation import FederationFolder, load_deployment
from umbel.provision import Request, provision

PORTS = {"superlink": 0, "fleet": 0, "metrics": 0}
SMALL = {"data.synthetic.users": 12, "data.synthetic.examples": 4, "data.synthetic.dimension": 4}
EVENT = {
    "mechanism": "gaussian",
    "noise_multiplier": "1.25",
    "clipping_norm": "1",
    "grid_scale": 4096,
    "groups": [{"size": 4, "name": "beta", "share": "1.0"}],
    "denominator": 12,
    "noise": "aes-256-ctr",
    "sampling": "none",
    "initialization": False,
}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "fed"
    provision(root, Request(nodes=2, config=load_config(None, SMALL), ports=PORTS))
    return root


@pytest.fixture
def fed(original: Path, tmp_path: Path) -> FederationFolder:
    """A federation in a place of its own, for which everything is fine but that the recovery key is still there."""
    shutil.copytree(original, tmp_path / "fed")
    provision(tmp_path / "fed", Request(ports={}))
    return FederationFolder(root=tmp_path / "fed")


def found(path: Path, *, now: datetime | None = None) -> dict[str, set[str]]:
    """Names of the checks by status; whatever is not fine has a remedy."""
    by_status: dict[str, set[str]] = {"ok": set(), "warn": set(), "fail": set()}
    document = doctor.doctor(path, now=now)
    for check in document["checks"]:
        assert check["message"]
        assert (check["status"] == "ok") == (check["remedy"] == "")
        by_status[check["status"]].add(check["name"])
    assert document["failed"] == sum(check["status"] == "fail" for check in document["checks"])
    return by_status


def test_a_new_federation_is_fine(fed: FederationFolder) -> None:
    """Nothing fails; the recovery key that is still there is all there is to see to, until it is moved."""
    first = found(fed.root)
    assert (first["fail"], first["warn"]) == (set(), {"recovery key"})
    fed.recovery_key.unlink()
    moved = found(fed.root)
    assert (moved["fail"], moved["warn"]) == (set(), set())
    assert {"ledger", "ports"} - moved["ok"] == {"ports"}


def test_the_doctor_changes_nothing(fed: FederationFolder) -> None:
    """Not a file is made, changed or removed, here or in a node's folder."""

    def state() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in fed.root.rglob("*") if p.is_file()}

    before = state()
    found(fed.root)
    found(fed.node("edge-1").root)
    assert state() == before


def appending(path: Callable[[FederationFolder], Path], data: bytes) -> Callable[[FederationFolder], None]:
    def act(fed: FederationFolder) -> None:
        with path(fed).open("ab") as file:
            file.write(data)

    return act


def replacing(path: Callable[[FederationFolder], Path], old: str, new: str) -> Callable[[FederationFolder], None]:
    def act(fed: FederationFolder) -> None:
        text = path(fed).read_text()
        assert old in text
        path(fed).write_text(text.replace(old, new))

    return act


def toml(fed: FederationFolder) -> Path:
    return fed.node("edge-1").settings


def another_certificate(fed: FederationFolder) -> None:
    """Of another authority, for the right key."""
    key = certificates.from_pem(fed.certificate_key.read_bytes())
    other = certificates.new_key()
    now = datetime.now(UTC)
    authority = certificates.make_authority(other, name="other", now=now)
    made = certificates.make_server_certificate(
        key.public_key(),
        hosts=load_deployment(fed).hosts.names,
        authority=authority,
        authority_key=other,
        now=now,
    )
    fed.certificate.write_bytes(certificates.certificate_pem(made))


def charge(fed: FederationFolder, rounds: int, *, finish: bool, noise_multiplier: str = "1.25") -> None:
    with PrivacyLedger.open(fed.place.ledger, key=load_key(fed.place.key)) as ledger:
        ledger.start("a", {}, "0" * 64)
        for server_round in range(1, rounds + 1):
            event = {**EVENT, "noise_multiplier": noise_multiplier}
            sequence = ledger.reserve("a", server_round, event, 12).sequence
            if finish:
                ledger.abort(sequence, "no_answer")


def spend_all(fed: FederationFolder) -> None:
    mu = PrivacyLedger.open(fed.place.ledger).genesis["mu_max"]
    charge(fed, 1, finish=True, noise_multiplier=f"{1 / float(mu) + 1e-8:.9f}")


def new_key(path: Path) -> None:
    path.unlink()
    create_key(path)


def spoil_registry(fed: FederationFolder) -> None:
    entries = json.loads(fed.registry.read_text())
    entries["nodes"].pop()
    fed.registry.write_text(json.dumps(entries))


def forge_time(fed: FederationFolder) -> None:
    later = time.time() + 7200
    with mock.patch("privacy.ledger._now", return_value=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(later))):
        charge(fed, 1, finish=True)


@pytest.mark.parametrize(
    ("act", "status", "name"),
    [
        (lambda fed: fed.superexec_secret.unlink(), "fail", "files"),
        (lambda fed: fed.registry.unlink(), "fail", "files"),
        (lambda fed: (fed.server / "ledger.key.new").write_bytes(b""), "fail", "files"),
        (lambda fed: (fed.node("edge-2").root / "keys.new").mkdir(), "fail", "files"),
        (lambda fed: fed.authority.write_text("nothing"), "fail", "certificates"),
        (another_certificate, "fail", "certificate"),
        (
            lambda fed: fed.certificate_key.write_bytes(certificates.to_pem(certificates.new_key())),
            "fail",
            "certificate",
        ),
        (replacing(lambda fed: fed.deployment, '"superlink"', '"other.example.org"'), "fail", "hosts"),
        (lambda fed: fed.certificate_key.chmod(0o640), "fail", "permissions"),
        (lambda fed: fed.server.chmod(0o755), "fail", "permissions"),
        (lambda fed: fed.node("edge-1").signing_key.chmod(0o604), "fail", "permissions"),
        (appending(lambda fed: fed.place.ledger, b"{}\n"), "fail", "ledger"),
        (appending(lambda fed: fed.place.ledger, b'{"body'), "warn", "ledger"),
        (lambda fed: new_key(fed.place.key), "fail", "ledger key"),
        (spend_all, "fail", "budget"),
        (lambda fed: charge(fed, 1, finish=True), "ok", "budget"),
        (lambda fed: charge(fed, 1, finish=False, noise_multiplier="0.67"), "warn", "budget"),
        (lambda fed: charge(fed, 1, finish=False), "warn", "rounds"),
        (forge_time, "fail", "clock"),
        (spoil_registry, "fail", "registry"),
        (lambda fed: new_key(fed.node("edge-1").signing_key), "fail", "node edge-1"),
        (replacing(lambda fed: fed.node("edge-1").settings, "users = 6", "users = 7"), "fail", "node edge-1"),
        (replacing(lambda fed: fed.node("edge-2").settings, 'name = "', 'surname = "'), "warn", "node edge-2"),
        (replacing(toml, '"localhost:', '"elsewhere:'), "warn", "node edge-1"),
        (lambda fed: shutil.rmtree(fed.node("edge-1").root), "ok", "registry"),
        (replacing(lambda fed: fed.compose_environment, "UMBEL_UID=", "UMBEL_UID=7"), "warn", "compose"),
    ],
)
def test_what_is_wrong_with_a_federation_is_found(
    fed: FederationFolder, act: Callable[[FederationFolder], object], status: str, name: str
) -> None:
    """One thing is spoilt, and the check of that thing says so."""
    act(fed)
    assert name in found(fed.root)[status]


@pytest.mark.parametrize(
    ("days", "status", "name"),
    [
        (370, "warn", "certificate"),
        (398, "fail", "certificate"),
        (3640, "warn", "authority"),
        (-2, "fail", "authority"),
    ],
)
def test_certificates_end(fed: FederationFolder, days: int, status: str, name: str) -> None:
    """A certificate that ends within 30 days is to be seen to; one that has ended, or is of the future, fails."""
    assert name in found(fed.root, now=datetime.now(UTC) + timedelta(days=days))[status]


def test_a_port_that_is_taken(fed: FederationFolder) -> None:
    """Another program on one of the ports is a failure; this federation's own server is not."""
    ports = load_deployment(fed).ports
    with socket.create_server(("127.0.0.1", ports.metrics)):
        assert f"port {ports.metrics}" in found(fed.root)["fail"]
    with (
        serving(fed, port=ports.fleet),
        serving(fed, port=ports.superlink),
        socket.create_server(("127.0.0.1", ports.metrics)),
    ):
        assert {f"port {port}" for port in ports.model_dump().values()} <= found(fed.root)["ok"]


def test_room_on_the_disk(fed: FederationFolder) -> None:
    """What a run takes is said, from the largest there was; too little room fails, and little is to be seen to."""
    usage = shutil.disk_usage(fed.root)
    for free, status in ((1_000_000, "fail"), (100_000_000, "warn"), (10**12, "ok")):
        with mock.patch("shutil.disk_usage", return_value=usage._replace(free=free)):
            assert "disk" in found(fed.root)[status]
    (fed.runs / "a").mkdir()
    (fed.runs / "a" / "release").write_bytes(bytes(3_000_000))
    (check,) = doctor.check_room(fed, load_deployment(fed))
    assert "3 MB" in check.message


def test_folders_that_cannot_be_written(fed: FederationFolder) -> None:
    """A folder that is missing or of another user fails."""
    fed.runs.rmdir()
    (check, fine) = checks.check_writable([fed.runs, fed.var])
    assert (check.status, fine.status) == ("fail", "ok")
    assert str(fed.runs) in check.message


def test_a_package_of_another_version() -> None:
    """A Flower that this program was not made for is named."""
    with mock.patch("umbel.checks.version", side_effect=lambda name: {"flwr": "1.42.0"}.get(name, "50.0.2")):
        failed = [
            check for check in checks.check_versions() if check.status == "fail" and "flwr 1.42.0" in check.message
        ]
    assert len(failed) == 1
    assert [check.status for check in checks.check_versions()] == ["ok"]


def test_variables_that_compose_wants(fed: FederationFolder, tmp_path: Path) -> None:
    """A variable without default that compose.env lacks fails; one with a default, or in a comment, does not."""
    compose = tmp_path / "docker-compose.yml"
    deployment = load_deployment(fed)
    for text, status in (
        ('port: "${UMBEL_FLEET_PORT:?no}:${UMBEL_FLEET_PORT}"\n# ${MISSING}\nuser: ${OTHER:-1}$$X', "ok"),
        ("port: ${MISSING}", "fail"),
        ("port: $MISSING", "fail"),
        ("port: ${MISSING:?say}", "fail"),
    ):
        compose.write_text(text)
        (check,) = doctor.check_compose(fed, deployment, compose_file=compose)
        assert check.status == status, text
        assert ("MISSING" in check.message) == (status == "fail")
    (check,) = doctor.check_compose(fed, deployment, compose_file=tmp_path / "none.yml")
    assert check.status == "ok"
    with mock.patch("shutil.which", return_value=None):
        (check,) = doctor.check_compose(fed, deployment)
    assert "no container engine" in check.message


def test_the_compose_file_of_this_project_has_its_variables(fed: FederationFolder) -> None:
    """What docker-compose.yml wants, provisioning writes."""
    used, _ = checks.variables_of(doctor.COMPOSE_FILE.read_text())
    written = checks.assignments(fed.compose_environment.read_text())
    assert used
    assert used <= written.keys()


# --- a node's folder -------------------------------------------------------------------------------------------------


@contextmanager
def serving(fed: FederationFolder, *, port: int = 0, ahead: float = 0.0, pair: tuple[Path, Path] | None = None) -> Any:
    """A server with the federation's certificate, on loopback, whose clock is `ahead` seconds ahead."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def date_time_string(self, timestamp: float | None = None) -> str:
            return formatdate((timestamp or time.time()) + ahead, usegmt=True)

        def log_message(self, *_: object) -> None:
            pass

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*(pair or (fed.certificate, fed.certificate_key)))

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

        def get_request(self) -> tuple[Any, Any]:
            plain, address = super().get_request()
            plain.settimeout(5)
            return context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False), address

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def node_of(fed: FederationFolder, **asked: Any) -> Iterator[Path]:
    """A node whose server is running."""
    with serving(fed, **asked) as port:
        settings = fed.node("edge-1").settings
        old = f"localhost:{load_deployment(fed).ports.fleet}"
        settings.write_text(settings.read_text().replace(old, f"localhost:{port}"))
        yield settings.parent


def test_a_new_node_is_fine(fed: FederationFolder) -> None:
    """With its server running, a node that has just been made has nothing to be seen to."""
    with node_of(fed) as node:
        first = found(node)
    assert (first["fail"], first["warn"]) == (set(), set())
    assert {"server", "clock", "data", "store", "keys", "permissions", "code"} <= first["ok"]


@pytest.mark.parametrize(
    ("ahead", "status"), [(-3600, "fail"), (3600, "fail"), (-8, "fail"), (-3.5, "warn"), (120, "warn"), (400, "fail")]
)
def test_clocks(fed: FederationFolder, ahead: float, status: str) -> None:
    """A clock beyond what Flower takes, 5 s ahead of the server's or 305 s behind, fails and says what would happen."""
    with node_of(fed, ahead=ahead) as node:
        document = doctor.doctor(node)
    (clock,) = [check for check in document["checks"] if check["name"] == "clock"]
    assert clock["status"] == status
    assert ("refuse" in clock["message"]) == (status == "fail")
    assert ("behind" in clock["message"].partition(":")[0].partition(";")[0]) == (ahead > 0)


def test_a_server_that_is_not_there(fed: FederationFolder) -> None:
    """A node waits for its server, so this is no failure; its clock was not compared."""
    result = found(fed.node("edge-1").root)
    assert "server" in result["warn"]
    assert "clock" not in result["ok"]
    assert result["fail"] == set()


def test_a_server_in_between(fed: FederationFolder, tmp_path: Path) -> None:
    """A server with a certificate of another authority, or without TLS, fails."""
    provision(tmp_path / "evil", Request(nodes=1, config=load_config(None, SMALL), ports=PORTS))
    evil = FederationFolder(root=tmp_path / "evil")
    with node_of(fed, pair=(evil.certificate, evil.certificate_key)) as node:
        assert "server" in found(node)["fail"]


def test_a_server_whose_certificate_has_ended(fed: FederationFolder) -> None:
    """It fails; and the clock is compared all the same, for that may be what is wrong."""
    provision(fed.root, Request(ports={}, rotate=("server",)), now=datetime.now(UTC) - timedelta(days=398))
    with node_of(fed) as node:
        result = found(node)
    assert "server" in result["fail"]
    assert "clock" in result["ok"]


def store_of(fed: FederationFolder) -> Path:
    path = fed.node("edge-1").store / "node.sqlite"
    with closing(DeviceStore.open(path, ["a", "b", "c"])):
        pass
    return path


def damage(fed: FederationFolder) -> None:
    store_of(fed).write_bytes(b"SQLite format 3\0" + bytes(5000))


def of_the_future(fed: FederationFolder) -> None:
    with closing(sqlite3.connect(store_of(fed))) as connection:
        connection.execute("PRAGMA user_version = 99")


def set_aside(fed: FederationFolder) -> None:
    store_of(fed).with_name("node.sqlite.corrupt-1").write_bytes(b"")


def on_another_curve(fed: FederationFolder) -> None:
    from cryptography.hazmat.primitives.asymmetric import ed25519
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = ed25519.Ed25519PrivateKey.generate()
    fed.node("edge-1").auth_key.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))


def another_public_half(fed: FederationFolder) -> None:
    line = certificates.to_openssh_public(certificates.new_auth_key().public_key(), "edge-1")
    fed.node("edge-1").auth_public.write_bytes(line)


def own_data(fed: FederationFolder, rows: str) -> None:
    node = fed.node("edge-1")
    text = (
        node.settings.read_text().partition("[data]")[0].replace("partition = 0\n", "").replace("partitions = 2\n", "")
    )
    declared = '[data]\nsource = "data.csv"\nfeatures = [{ name = "age", low = 0, high = 9 }]\ntarget_range = [0, 1]\n'
    node.settings.write_text(text + declared)
    (node.root / "data.csv").write_text("user,age,target\n" + rows)


@pytest.mark.parametrize(
    ("act", "status", "name"),
    [
        (replacing(toml, 'name = "', 'surname = "'), "fail", "settings"),
        (replacing(toml, "allow_not_private = false", "allow_not_private = true"), "warn", "settings"),
        (replacing(toml, "require_sealing = true", "require_sealing = false"), "warn", "settings"),
        (replacing(toml, 'auth_key = "auth.key"\n', ""), "warn", "keys"),
        (replacing(toml, 'signing_key = "signing.key"\n', ""), "warn", "keys"),
        (lambda fed: fed.node("edge-1").signing_key.unlink(), "fail", "keys"),
        (on_another_curve, "fail", "keys"),
        (another_public_half, "fail", "keys"),
        (lambda fed: fed.node("edge-1").auth_key.chmod(0o644), "fail", "permissions"),
        (lambda fed: fed.node("edge-1").root.chmod(0o755), "fail", "permissions"),
        (lambda fed: fed.node("edge-1").authority.write_text(""), "fail", "server"),
        (replacing(toml, 'root_certificates = "ca.crt"\n', ""), "warn", "server"),
        (replacing(toml, "partition = 0", "partition = 1"), "ok", "data"),
        (replacing(toml, "users = 6", "users = 5"), "warn", "data"),
        (lambda fed: own_data(fed, "a,3,1\nb,4,0\n"), "ok", "data"),
        (lambda fed: own_data(fed, "a,3,1\nb,x,0\n"), "warn", "data"),
        (lambda fed: own_data(fed, "a,3,1\nb,4,7\n"), "warn", "data"),
        (lambda fed: own_data(fed, "a,3,1\n") or (fed.node("edge-1").root / "data.csv").unlink(), "fail", "data"),
        (store_of, "ok", "store"),
        (damage, "fail", "store"),
        (of_the_future, "fail", "store"),
        (set_aside, "warn", "store"),
        (replacing(toml, '"store/node.sqlite"', '":memory:"'), "fail", "store"),
    ],
)
def test_what_is_wrong_with_a_node_is_found(
    fed: FederationFolder, act: Callable[[FederationFolder], object], status: str, name: str
) -> None:
    """One thing is spoilt, and the check of that thing says so."""
    act(fed)
    assert name in found(fed.node("edge-1").root)[status]


def test_allowed_bundles(fed: FederationFolder) -> None:
    """A list that has this version's bundle is fine; one without is to be seen to, and the hash is said."""
    from hashlib import sha256

    from umbel import flower_engine

    (fed.root / "out").mkdir()
    bundle = flower_engine.build_bundle(fed.root / "out")
    own = sha256(bundle.read_bytes()).hexdigest()
    replacing(toml, "bundle_hashes = []", f'bundle_hashes = ["{own}"]')(fed)
    assert "code" in found(fed.node("edge-1").root)["ok"]
    with mock.patch.object(flower_engine, "build_bundle", return_value=bundle):
        replacing(toml, own, "0" * 64)(fed)
        document = doctor.doctor(fed.node("edge-1").root)
    assert [check["status"] for check in document["checks"] if own in check["message"]] == ["warn"]


def test_no_value_of_a_user_is_shown(fed: FederationFolder) -> None:
    """Of data with good, bad and clipped rows, only counts are in what the doctor says."""
    own_data(fed, "alice,3,1\nalice,4,0\nbob,secret-value,1\ncarol,77777,1\n")
    text = json.dumps(doctor.doctor(fed.node("edge-1").root))
    assert not [word for word in ("alice", "bob", "carol", "secret-value", "77777") if word in text]


def test_the_command(fed: FederationFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """0 where nothing fails, 2 where something does or it is no such folder; text or one JSON object."""
    with mock.patch.dict(os.environ):
        assert cli.run(["doctor", str(fed.root)]) == 0
        assert "0 failed, 1 to be seen to" in capsys.readouterr().out
        fed.certificate_key.chmod(0o644)
        assert cli.run(["doctor", str(fed.root), "--format", "json"]) == 2
        document = json.loads(capsys.readouterr().out)
        assert (document["kind"], document["failed"], document["warned"]) == ("federation", 1, 1)
        assert cli.run(["doctor", str(fed.node("edge-1").root)]) == 0
        assert "WARN server" in capsys.readouterr().out
        assert cli.run(["doctor", str(fed.root.parent)]) == 2
        assert "deployment.toml or node.toml" in capsys.readouterr().err


def test_size_in_words() -> None:
    """Bytes are spelled for people."""
    assert list(map(checks.size_in_words, (12, 3_400, 20e6, 73e9, 2e15))) == [
        "12 B",
        "3.4 kB",
        "20 MB",
        "73 GB",
        "2e+03 TB",
    ]


def test_a_node_needs_room_for_its_users(fed: FederationFolder) -> None:
    """What the store takes grows with the number of users."""
    from client.settings import load_settings

    settings = load_settings(toml(fed))
    messages = [
        next(iter(doctor_node.check_room(settings.model_copy(update={"users": n})))).message for n in (1, 10**6)
    ]
    assert "10 MB" in messages[0]
    assert "GB free; the store of 1000000 users takes about 4.11 GB" in messages[1]
