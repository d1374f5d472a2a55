"""`umbel provision`: a complete folder, whatever happens on the way, and never another key where there was one."""

import json
import os
import shutil
import socket
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from client.settings import load_settings
from common.config import Config, load_config
from common.errors import StorageError, UmbelError
from privacy.keys import load_key, public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.participation import mu_max_string
from server import certificates
from server.registry import load_registry
from umbel import cli
from umbel.checks import Check
from umbel.doctor import check_federation
from umbel.federation import FederationFolder, load_deployment
from umbel.provision import Request, provision
from umbel.rotation import rotate_ledger_key

PORTS = {"superlink": 0, "fleet": 0, "metrics": 0}
NOW = datetime.now(UTC)
SECRET_SUFFIXES = (".key", ".secret")


def small(**overrides: Any) -> Config:
    given = {"data.synthetic.users": 20, "data.synthetic.examples": 4, "data.synthetic.dimension": 4}
    return load_config(None, given | overrides)


def ask(root: Path, *, now: datetime | None = None, **asked: Any) -> dict[str, Any]:
    return provision(root, Request(**{"ports": dict.fromkeys(PORTS), **asked}), now=now)


def begin(root: Path, **asked: Any) -> dict[str, Any]:
    return ask(root, **{"nodes": 2, "config": small(), "ports": PORTS, **asked})


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "fed"
    begin(root, partitions=3)
    return root


@pytest.fixture
def fed(original: Path, tmp_path: Path) -> FederationFolder:
    """A federation of two nodes, with data for a third."""
    shutil.copytree(original, tmp_path / "fed")
    return FederationFolder(root=tmp_path / "fed")


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def keys(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if name.endswith(SECRET_SUFFIXES)}


def failures(root: Path) -> list[Check]:
    return [
        check for check in check_federation(FederationFolder(root=root), datetime.now(UTC)) if check.status == "fail"
    ]


def test_the_folder(fed: FederationFolder) -> None:
    """Every file of the layout is there and nothing else, with what it should hold."""
    node = {"auth.key", "auth.key.pub", "signing.key", "ca.crt", "superexec.secret", "node.toml"}
    server = {"tls.crt", "tls.key", "superexec.secret", "ledger.key", "ledger.jsonl", "registry.json"}
    assert contents(fed.root).keys() == {
        *("deployment.toml", "compose.env", "ca/ca.crt", "ca/ca.key", "recovery/recovery.key"),
        *(f"server/{name}" for name in server),
        *(f"nodes/edge-{i}/{name}" for i in (1, 2) for name in node),
    }
    assert fed.runs.is_dir()
    assert failures(fed.root) == []
    secrets = [path.read_bytes() for path in fed.root.rglob("superexec.secret")]
    assert len(set(secrets)) == 3
    assert {len(secret) for secret in secrets} == {64}
    assert len(set(keys(fed.root).values())) == len(keys(fed.root))


def test_permissions(fed: FederationFolder, original: Path) -> None:
    """Private keys and secrets are 0600, folders that hold them 0700, whatever the umask."""
    loose = original.parent / "loose"
    before = os.umask(0)
    try:
        begin(loose)
    finally:
        os.umask(before)
    for root in (original, loose):
        for path in root.rglob("*"):
            mode = stat.S_IMODE(path.stat().st_mode)
            if path.name.endswith(SECRET_SUFFIXES):
                assert mode == 0o600, path
                assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700, path
        for name in ("var", "nodes/edge-1/store"):
            assert stat.S_IMODE((root / name).stat().st_mode) == 0o700


def test_no_secret_where_none_belongs(fed: FederationFolder) -> None:
    """deployment.toml, compose.env, node.toml and the registry hold nothing of any private file."""
    secrets = [line for data in keys(fed.root).values() for line in data.splitlines() if not line.startswith(b"-----")]
    public = [data for name, data in contents(fed.root).items() if not name.endswith(SECRET_SUFFIXES)]
    assert len(secrets) > 10
    assert not [secret for secret in secrets for data in public if secret in data]


def test_nodes_are_told_what_the_ledger_promises(fed: FederationFolder) -> None:
    """Each node's settings are read by the node, name its own files, and limit it to the population's budget."""
    registry = load_registry(fed.registry)
    with PrivacyLedger.open(fed.place.ledger, key=load_key(fed.place.key)) as ledger:
        assert ledger.genesis["recovery_key"] == public_key_hex(load_key(fed.recovery_key))
        for partition, entry in enumerate(registry.nodes):
            node, settings = fed.node(entry.name), load_settings(fed.node(entry.name).settings)
            assert (settings.name, settings.users, settings.partition) == (entry.name, entry.users, partition)
            assert (settings.public_key, settings.ledger_id) == (ledger.public_key, ledger.ledger_id)
            assert settings.recovery_key == ledger.genesis["recovery_key"]
            assert settings.mu_max == ledger.genesis["mu_max"] == mu_max_string(8, 1e-6)
            assert settings.require_sealing
            assert not settings.allow_not_private
            assert settings.signing_key == str(node.signing_key)
            assert entry.public_key == public_key_hex(load_key(node.signing_key))
            assert (settings.root_certificates, settings.auth_key) == (str(node.authority), str(node.auth_key))
            assert settings.superlink == f"localhost:{load_deployment(fed).ports.fleet}"
            assert node.store in Path(settings.store).parents
            assert settings.data.synthetic.users == 20
            assert settings.policy().mu_max == settings.mu_max
    assert [node.users for node in registry.nodes] == [6, 7]


def test_running_again_changes_nothing(fed: FederationFolder) -> None:
    """The second run leaves every byte as it is, but for the place in compose.env when the folder was moved."""
    ask(fed.root)
    before = contents(fed.root)
    made = ask(fed.root, nodes=2)
    assert contents(fed.root) == before
    assert [node["is_new"] for node in made["nodes"]] == [False, False]


def test_more_nodes(fed: FederationFolder) -> None:
    """A larger number adds nodes with the next parts of the data, and leaves the others and every key as they were."""
    before = contents(fed.root)
    made = ask(fed.root, nodes=3)
    after = contents(fed.root)
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"deployment.toml", "compose.env", "server/registry.json"}
    assert [(node["name"], node["is_new"]) for node in made["nodes"]] == [
        ("edge-1", False),
        ("edge-2", False),
        ("edge-3", True),
    ]
    assert made["users"] == 20
    assert load_settings(fed.node("edge-3").settings).partition == 2
    assert failures(fed.root) == []
    with pytest.raises(UmbelError, match=r"node 4.*3 parts.*--users-per-node"):
        ask(fed.root, nodes=4)
    ask(fed.root, nodes=4, users_per_node=9, name_prefix="lab")
    assert load_registry(fed.registry).users_of() == {"edge-1": 6, "edge-2": 7, "edge-3": 7, "lab-4": 9}
    assert "#[data]" in fed.node("lab-4").settings.read_text()


def test_a_node_whose_folder_has_left_keeps_its_keys(fed: FederationFolder) -> None:
    """What moved to a device is not made again, though nodes are added."""
    shutil.rmtree(fed.node("edge-1").root)
    known = load_registry(fed.registry).nodes[0]
    ask(fed.root, nodes=3)
    assert not fed.node("edge-1").root.exists()
    assert load_registry(fed.registry).nodes[0] == known


def test_keys_that_were_moved_away_are_not_made_again(fed: FederationFolder) -> None:
    """Recovery key and authority's key may be elsewhere; only a new certificate needs the latter, and says so."""
    fed.recovery_key.unlink()
    fed.authority_key.unlink()
    made = ask(fed.root, nodes=3)
    assert not fed.recovery_key.exists()
    assert not fed.authority_key.exists()
    assert made["recovery_key"]["path"] is None
    assert not any("recovery key" in text for text in made["warnings"])
    for asked in ({"hosts": ("other.example.org",)}, {"rotate": ("server",)}):
        with pytest.raises(UmbelError, match=r"authority's key.*Put it back"):
            ask(fed.root, **asked)


def test_another_host(fed: FederationFolder) -> None:
    """A name that is added later gets into the certificate, under the same key; devices still call the first one."""
    key = fed.certificate_key.read_bytes()
    ask(fed.root, hosts=("fed.example.org", "192.0.2.7"))
    found = certificates.parse_certificate(fed.certificate.read_bytes())
    assert certificates.uncovered(found, ["fed.example.org", "192.0.2.7", "localhost", "superlink"]) == ()
    assert fed.certificate_key.read_bytes() == key
    assert load_deployment(fed).hosts.names[0] == "localhost"
    assert failures(fed.root) == []


def test_devices_call_the_first_host(tmp_path: Path) -> None:
    """The host that the operator names first is where nodes connect to."""
    begin(tmp_path / "fed", hosts=("2001:db8::1", "fed.example.org"), ports={**PORTS, "fleet": 7001})
    settings = load_settings(tmp_path / "fed" / "nodes" / "edge-2" / "node.toml")
    assert settings.superlink == "[2001:db8::1]:7001"


def test_devices_with_data_of_their_own(tmp_path: Path) -> None:
    """Without a shared source each node gets a block for its owner to fill in, or the declarations of --config."""
    made = begin(tmp_path / "bare", config=None, users_per_node=5)
    assert (made["users"], made["data"]) == (10, None)
    settings = tmp_path / "bare" / "nodes" / "edge-1" / "node.toml"
    with pytest.raises(UmbelError, match="data"):
        load_settings(settings)
    settings.write_text(settings.read_text().replace("\n#[data]", "\n[data]").replace("\n#source", "\nsource"))
    assert load_settings(settings).data.source == str(settings.parent / "data.csv")
    assert failures(tmp_path / "bare") == []
    declared = load_config(None, {"data.source": "mine.csv", "data.features": ["a"], "data.target_range": [0, 1]})
    begin(tmp_path / "declared", config=declared, users_per_node=5)
    found = load_settings(tmp_path / "declared" / "nodes" / "edge-2" / "node.toml")
    assert found.data.source == str(tmp_path / "declared" / "nodes" / "edge-2" / "mine.csv")
    assert (found.data.features[0].name, found.partitions, found.users) == ("a", 1, 5)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"privacy.epsilon": "none"}, {"mu_max": "inf", "allow_not_private": True}),
        ({"privacy.seed": 1}, {"mu_max": mu_max_string(8, 1e-6), "allow_not_private": True}),
        ({"training.algorithm": "amht-lrs"}, {"allow_statistics": True, "allow_not_private": False}),
        ({"privacy.max_nodes_per_user": 2}, {"mu_max": mu_max_string(8, 1e-6, 2)}),
        ({"privacy.ledger_epsilon": 3.0, "privacy.delta": 1e-7}, {"mu_max": mu_max_string(3, 1e-7)}),
        ({"privacy.epsilon": 20.0}, {"mu_max": mu_max_string(20, 1e-6)}),
    ],
)
def test_nodes_fit_the_configuration(tmp_path: Path, overrides: dict[str, Any], expected: dict[str, Any]) -> None:
    """What a configuration asks of the nodes, they allow, and no more; what is not private is said."""
    made = begin(tmp_path / "fed", config=small(**overrides))
    settings = load_settings(tmp_path / "fed" / "nodes" / "edge-1" / "node.toml")
    assert {name: getattr(settings, name) for name in expected} == expected
    assert any("NOT PRIVATE" in text for text in made["warnings"]) == settings.allow_not_private


@pytest.mark.parametrize(("noise_multiplier", "is_more"), [("0.5", True), ("50", False)])
def test_sampled_runs_have_room_on_devices(tmp_path: Path, noise_multiplier: str, is_more: bool) -> None:
    """For a sampled run the filters have room for its heads where that is more than the ledger's limit."""
    config = small(**{"privacy.sampling_probability": "0.1", "training.rounds": 20})
    with mock.patch("umbel.simulate.noise_and_limit", return_value=(noise_multiplier, "1")):
        begin(tmp_path / "fed", config=config)
    settings = load_settings(tmp_path / "fed" / "nodes" / "edge-1" / "node.toml")
    assert (float(settings.mu_max) > float(mu_max_string(8, 1e-6))) == is_more
    assert float(settings.mu_max) >= float(mu_max_string(8, 1e-6))


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"nodes": None}, "--nodes"),
        ({"nodes": 0}, "--nodes"),
        ({"nodes": 21}, "users"),
        ({"hosts": ("https://a",)}, "--host"),
        ({"name_prefix": "a/b"}, "--name-prefix"),
        ({"name_prefix": "../a"}, "--name-prefix"),
        ({"rotate": ("server",)}, "--rotate"),
        ({"ports": {"superlink": 70000}}, "ports"),
        ({"ports": {"superlink": 9443}}, "different ports"),
        ({"users_per_node": 3, "partitions": 2}, "--partitions"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"delta": 2.0}, "delta"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, asked: dict[str, Any], named: str
) -> None:
    """The message names the option, and there is no folder."""
    with pytest.raises(UmbelError, match=named):
        begin(tmp_path / "fed", **asked)
    assert not (tmp_path / "fed").exists()


def test_another_port(fed: FederationFolder) -> None:
    """A port can be changed: nodes whose settings are here follow, what their owners wrote stays. 0 keeps a port that
    is free, and finds another for one that is taken."""
    before = load_deployment(fed).ports
    settings = fed.node("edge-1").settings
    settings.write_text(settings.read_text().replace("poll_seconds = 1.0", "poll_seconds = 9.0"))
    ask(fed.root, ports={"superlink": 0, "fleet": 0, "metrics": None})
    assert load_deployment(fed).ports == before
    with socket.create_server(("127.0.0.1", before.fleet)), mock.patch("umbel.checks._TIMEOUT", 0.1):
        ask(fed.root, ports={"superlink": 0, "fleet": 0, "metrics": None})
    after = load_deployment(fed).ports
    assert (after.superlink, after.metrics) == (before.superlink, before.metrics)
    assert after.fleet != before.fleet
    assert load_settings(settings).superlink == f"localhost:{after.fleet}"
    assert load_settings(settings).poll_seconds == 9
    assert f"UMBEL_FLEET_PORT={after.fleet}\n" in fed.compose_environment.read_text()
    assert failures(fed.root) == []


def test_the_budget_is_not_forgotten_in_a_crash(tmp_path: Path) -> None:
    """What was asked for before the ledger was begun counts, whatever completes the folder."""
    root = tmp_path / "fed"
    with mock.patch("umbel.provision._make_ledger", side_effect=Killed()), pytest.raises(Killed):
        begin(root, epsilon=2.0, delta=1e-8, population="us", max_nodes_per_user=2)
    with pytest.raises(UmbelError, match="epsilon=2"):
        ask(root, epsilon=8.0)
    assert ask(root)["budget"] == {
        "population": "us",
        "epsilon": 2.0,
        "delta": 1e-8,
        "mu_max": mu_max_string(2, 1e-8, 2),
        "max_nodes_per_user": 2,
    }


@pytest.mark.parametrize(
    ("asked", "named"),
    [
        ({"nodes": 1}, r"--nodes of at least 2.*only\s+adds"),
        ({"epsilon": 9.0}, "epsilon=8"),
        ({"delta": 1e-7}, "delta="),
        ({"max_nodes_per_user": 2}, "max_nodes_per_user=1"),
        ({"population": "others"}, "population=synthetic"),
        ({"partitions": 5}, "3 partitions"),
        ({"config": small(**{"data.synthetic.users": 30})}, "--config"),
        ({"ports": {"fleet": 123456}}, "ports"),
        ({"rotate": ("edge-9",)}, "edge-1, edge-2"),
    ],
)
def test_what_cannot_be_changed_is_refused(fed: FederationFolder, asked: dict[str, Any], named: str) -> None:
    """The message has the remedy, and not a byte has changed."""
    before = contents(fed.root)
    with pytest.raises(UmbelError, match=named):
        ask(fed.root, **asked)
    assert contents(fed.root) == before


def test_other_folders_are_refused(tmp_path: Path) -> None:
    """A folder with other files, one of a newer version and a file are left alone."""
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UmbelError, match="other files"):
        begin(tmp_path)
    with pytest.raises(UmbelError, match=r"folder"):
        begin(tmp_path / "notes.txt")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "deployment.toml").write_text("format = 2\n")
    with pytest.raises(UmbelError, match="newer umbel"):
        begin(tmp_path / "new")
    (tmp_path / "new" / "deployment.toml").write_text('format = 1\nname = "a"\n')
    with pytest.raises(UmbelError, match="hosts"):
        begin(tmp_path / "new")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["deployment.toml", "new", "notes.txt"]


def test_one_at_a_time(fed: FederationFolder) -> None:
    """While one provisioner is at work another is refused."""
    again = mock.patch("umbel.provision.describe", side_effect=lambda *_, **__: ask(fed.root))
    with again, pytest.raises(UmbelError, match="alone"):
        ask(fed.root)
    ask(fed.root)


@pytest.fixture
def lazy_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Killing a process loses nothing that was written, synced or not: these tests need not wait for a disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Killed(BaseException):
    """What no handler catches, as no process survives SIGKILL."""


class Death:
    """Stands for SIGKILL at the n-th step towards a disk: an fsync, a rename, a new folder or a removal."""

    STEPS = ("fsync", "replace", "mkdir", "unlink", "ftruncate", "open")

    def __init__(self, at: int, error: BaseException) -> None:
        self.left, self.error = at, error
        self.patches = [mock.patch.object(os, name, self.counted(getattr(os, name))) for name in self.STEPS]

    def counted(self, real: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise self.error
            return real(*args, **kwargs)

        return step

    def __enter__(self) -> "Death":
        for patch in self.patches:
            patch.start()
        return self

    def __exit__(self, *_: object) -> None:
        for patch in self.patches:
            patch.stop()


@pytest.mark.parametrize("stride", range(4))
@pytest.mark.usefixtures("lazy_disk")
def test_killed_at_any_step_it_is_completed_by_running_it_again(tmp_path: Path, stride: int) -> None:
    """After death at every single step of the first provisioning, the same command gives a sound federation and
    keeps each key that was there."""
    died = 0
    for at in range(1 + stride, 10_000, 4):
        root = tmp_path / str(at)
        try:
            with Death(at, Killed()):
                begin(root, nodes=1)
        except Killed:
            died += 1
        else:
            break
        there = {name: data for name, data in keys(root).items() if "/." not in name} if root.exists() else {}
        begin(root, nodes=1) if not (root / "deployment.toml").exists() else ask(root, config=small())
        assert failures(root) == []
        assert keys(root).items() >= there.items()
        assert not list(root.rglob(".*"))
        shutil.rmtree(root)
    assert died > 25


@pytest.mark.parametrize("what", ["server", "ledger", "edge-2", "more"])
@pytest.mark.usefixtures("lazy_disk")
def test_killed_in_a_rotation_or_an_addition(original: Path, tmp_path: Path, what: str) -> None:
    """After death at every single step, provisioning again gives a federation in which all keys fit together, with the
    old or the new ones, and all others as they were."""
    old, outcomes = keys(original), set()
    asked: dict[str, Any] = {"nodes": 3} if what == "more" else {"rotate": (what,)}
    touched = {"server": ("server/tls.key",), "ledger": ("server/ledger.key",)}.get(what, (f"nodes/{what}/",))
    for at in range(1, 10_000):
        root = tmp_path / str(at)
        shutil.copytree(original, root)
        try:
            with Death(at, Killed()):
                ask(root, **asked)
        except Killed:
            pass
        else:
            break
        ask(root)
        assert failures(root) == []
        assert not [path for path in root.rglob("*") if path.name.startswith(".") or path.name.endswith(".new")]
        now = keys(root)
        for name, data in old.items():
            assert name.startswith(touched) or now[name] == data
        outcomes.add(tuple(now.get(name) == old[name] for name in old if name.startswith(touched)))
        shutil.rmtree(root)
    assert at > 10
    assert len(outcomes) == (1 if what == "more" else 2)


def test_a_disk_that_fails(tmp_path: Path) -> None:
    """A full disk is said with a remedy, and the same command goes on once there is room."""
    for at in (12, 40, 70):
        with Death(at, OSError(28, "No space left on device")), pytest.raises((StorageError, UmbelError)):
            begin(tmp_path / str(at))
        if (tmp_path / str(at) / "deployment.toml").exists():
            ask(tmp_path / str(at), config=small(), nodes=2)
            assert failures(tmp_path / str(at)) == []


def test_rotating_the_servers_certificate(fed: FederationFolder) -> None:
    """Another key and certificate, under the same authority, for the same hosts, valid for its full time again."""
    key, old = fed.certificate_key.read_bytes(), certificates.parse_certificate(fed.certificate.read_bytes())
    later = NOW + timedelta(days=380)
    assert any("ends soon" in text for text in ask(fed.root, now=later)["warnings"])
    made = ask(fed.root, rotate=("server",), now=later)
    new = certificates.parse_certificate(fed.certificate.read_bytes())
    assert fed.certificate_key.read_bytes() != key
    assert new.public_key() != old.public_key()
    assert certificates.hosts_of(new) == certificates.hosts_of(old)
    assert certificates.is_signed_by(new, certificates.parse_certificate(fed.authority.read_bytes()))
    assert certificates.expiry(new) > later + timedelta(days=396)
    assert not any("ends soon" in text for text in made["warnings"])
    assert any("restart" in text for text in made["warnings"])


def test_rotating_the_ledgers_key(fed: FederationFolder) -> None:
    """The ledger records its new key, which alone can write it, and nodes made from then on know it."""
    old = load_key(fed.place.key)
    ask(fed.root, rotate=("ledger",))
    key = load_key(fed.place.key)
    with PrivacyLedger.open(fed.place.ledger, key=key) as ledger:
        assert ledger.public_key == public_key_hex(key) != public_key_hex(old)
        assert ledger.sequence == 1
    with pytest.raises(UmbelError):
        PrivacyLedger.open(fed.place.ledger, key=old)
    ask(fed.root, nodes=3)
    assert load_settings(fed.node("edge-3").settings).public_key == public_key_hex(key)
    assert load_settings(fed.node("edge-1").settings).public_key == public_key_hex(old)


def test_a_ledger_in_use_is_not_rotated(fed: FederationFolder) -> None:
    """While a run holds the ledger, its key stays, and the message says who is in the way."""
    with PrivacyLedger.open(fed.place.ledger, key=load_key(fed.place.key)):
        before = keys(fed.root)
        with pytest.raises(UmbelError, match="only writer"):
            rotate_ledger_key(fed.place)
        assert keys(fed.root) == before


def test_rotating_a_nodes_keys(fed: FederationFolder) -> None:
    """A node gets new keys for both purposes and the registry the new one; nobody else changes."""
    before, entry = keys(fed.root), load_registry(fed.registry).nodes[1]
    settings = fed.node("edge-2").settings.read_bytes()
    made = ask(fed.root, rotate=("edge-2",))
    changed = {name for name, data in keys(fed.root).items() if data != before[name]}
    assert changed == {"nodes/edge-2/auth.key", "nodes/edge-2/signing.key"}
    assert load_registry(fed.registry).nodes[1].public_key != entry.public_key
    assert load_registry(fed.registry).nodes[1].users == entry.users
    assert fed.node("edge-2").settings.read_bytes() == settings
    assert made["rotated"] == ["edge-2"]
    assert failures(fed.root) == []
    key = certificates.from_openssh(fed.node("edge-2").auth_key.read_bytes()).public_key()
    assert certificates.to_openssh_public(key, "edge-2") == fed.node("edge-2").auth_public.read_bytes()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """For people a short text that says what to do next; for machines one JSON object; 2 for what cannot be."""
    words = ["provision", str(tmp_path / "fed"), "--users-per-node", "4"]
    with mock.patch.dict(os.environ):
        assert cli.run([*words, "--nodes", "2", "--fleet-port", "0", "--host", "fed.example.org"]) == 0
        text = capsys.readouterr().out
        assert "move" in text
        assert f"umbel up {tmp_path / 'fed'}" in text
        assert "[data]" in text
        assert len(text.splitlines()) < 16
        assert cli.run([*words, "--nodes", "3", "--format", "json"]) == 0
        document = json.loads(capsys.readouterr().out)
        assert [node["name"] for node in document["nodes"] if node["is_new"]] == ["edge-3"]
        assert document["budget"]["epsilon"] == 8
        assert set(document["certificates"]) == {"authority", "server"}
        assert cli.run([*words, "--nodes", "1"]) == 2
        assert "--nodes" in capsys.readouterr().err
