"""Resident nodes and a real SuperLink with TLS and node authentication, on loopback."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.records import PROTOCOL_VERSION, encode
from common.sealing import SIGNATURE_BYTES
from tests.faults.loopback import BIN, QUIET, Loopback, eventually, loopback, with_group

pytestmark = pytest.mark.faults


def once(fed: Loopback, folder: str, **replaced: str) -> "subprocess.CompletedProcess[str]":
    """`umbel node --once` of a copy of edge-1 with some settings replaced."""
    copy = fed.root / folder
    shutil.copytree(fed.settings("edge-1").parent, copy, ignore=shutil.ignore_patterns("store"))
    (copy / "store").mkdir(mode=0o700)
    text = (copy / "node.toml").read_text()
    for old, new in replaced.items():
        text = text.replace(f'{old} = "{old_values[old]}"', f'{old} = "{new}"')
    (copy / "node.toml").write_text(text)
    command = [str(BIN / "umbel"), "node", str(copy / "node.toml"), "--once"]
    environment = {**os.environ, **QUIET}
    return subprocess.run(command, check=False, capture_output=True, text=True, env=environment, timeout=60, cwd=copy)


INTRODUCTION = len(encode({"protocol": PROTOCOL_VERSION, "name": "edge-1", "users": 3}, {})) + SIGNATURE_BYTES
"""Bytes of a node's answer to who it is."""

old_values = {"auth_key": "auth.key", "root_certificates": "ca.crt"}


def another_key(path: Path) -> None:
    """A key that nobody has registered."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    path.chmod(0o600)


def test_resident_nodes_outlive_what_happens_to_them_and_to_the_server(tmp_path: Path) -> None:
    """Two nodes answer; one is killed and is back at once; the SuperLink is killed, and both find it again; no
    stranger is let in, and no server without the CA's certificate is believed.
    """
    with loopback(tmp_path) as fed:
        superlink = fed.superlink()
        for name in ("edge-1", "edge-2"):
            fed.register(name)
        first, second = fed.node("edge-1"), fed.node("edge-2")
        fed.run()
        fed.wait_for([INTRODUCTION, INTRODUCTION])

        before = fed.status("edge-1")["node_id"]
        with_group(first.pid, signal.SIGKILL)
        first.wait()
        first = fed.node("edge-1")
        fed.wait_for([INTRODUCTION, INTRODUCTION])
        assert fed.status("edge-1")["node_id"] == before

        stranger = tmp_path / "stranger.key"
        another_key(stranger)
        refused = once(fed, "stranger", auth_key=str(stranger))
        assert refused.returncode == 6, refused.stderr
        assert "admit this node's key" in refused.stderr
        (tmp_path / "other").mkdir()
        elsewhere = Loopback(tmp_path / "other")
        deceived = once(fed, "deceived", root_certificates=str(elsewhere.fed / "ca" / "ca.crt"))
        assert deceived.returncode == 2, deceived.stderr
        assert "certificate was not accepted" in deceived.stderr

        with_group(superlink.pid, signal.SIGKILL)
        superlink.wait()
        eventually(lambda: {fed.status(name)["state"] for name in ("edge-1", "edge-2")} == {"away"})
        superlink = fed.superlink()
        eventually(lambda: {fed.status(name)["state"] for name in ("edge-1", "edge-2")} == {"running"}, 60)
        assert first.poll() is None
        for node in (first, second):
            node.send_signal(signal.SIGTERM)
        assert [node.wait(30) for node in (first, second)] == [0, 0]
        assert {fed.status(name)["state"] for name in ("edge-1", "edge-2")} == {"stopped"}
        messages = [entry["message"] for entry in fed.log("edge-2")]
        assert messages[:2] == ["starting", "connected"]
        assert sum("is away" in message for message in messages) == 1  # said once, not each second
