"""Certificates that a TLS library accepts where it should, and nowhere else; keys in the formats that others read."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_ssh_public_key

from server import certificates

NOW = datetime.now(UTC)
HOSTS = ("localhost", "127.0.0.1", "fleet-proxy", "::1")


@dataclass(frozen=True)
class Made:
    """A federation's certificates."""

    authority_key: certificates.PrivateKey
    authority: x509.Certificate
    key: certificates.PrivateKey
    certificate: x509.Certificate


def make(now: datetime = NOW, hosts: tuple[str, ...] = HOSTS) -> Made:
    authority_key, key = certificates.new_key(), certificates.new_key()
    authority = certificates.make_authority(authority_key, name="trial", now=now)
    certificate = certificates.make_server_certificate(
        key.public_key(), hosts=hosts, authority=authority, authority_key=authority_key, now=now
    )
    return Made(authority_key, authority, key, certificate)


def shake_hands(folder: Path, made: Made, *, trusted: x509.Certificate, name: str) -> str:
    """The subject that a client sees; it refuses as Python's strictest setting does."""
    pair = certificates.to_pem(made.key) + certificates.certificate_pem(made.certificate)
    (folder / "pair.pem").write_bytes(pair)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "pair.pem")
    client = ssl.create_default_context(cadata=certificates.certificate_pem(trusted).decode())
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                serving.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname(), timeout=10) as plain,
                client.wrap_socket(plain, server_hostname=name) as secure,
            ):
                return str(secure.getpeercert()["subject"])
        finally:
            thread.join(10)


@pytest.mark.parametrize("name", HOSTS)
def test_devices_accept_the_server_under_each_of_its_names(tmp_path: Path, name: str) -> None:
    """A real TLS handshake succeeds for every name and address that was asked for."""
    made = make()
    assert "server" in shake_hands(tmp_path, made, trusted=made.authority, name=name)


@pytest.mark.parametrize("name", ["example.org", "127.0.0.2", "localhost.example.org"])
def test_devices_refuse_another_name(tmp_path: Path, name: str) -> None:
    """A handshake under a name that the certificate is not for fails."""
    made = make()
    with pytest.raises(ssl.SSLCertVerificationError, match="mismatch"):
        shake_hands(tmp_path, made, trusted=made.authority, name=name)


def test_devices_refuse_another_authority(tmp_path: Path) -> None:
    """A server whose certificate another authority of the same name signed is refused."""
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, make(), trusted=make().authority, name="localhost")


def test_devices_refuse_the_server_after_its_certificate_has_ended(tmp_path: Path) -> None:
    """397 days after it was made a server's certificate is refused, while the authority is still valid."""
    made = make(NOW - certificates.SERVER_VALIDITY - timedelta(hours=1))
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        shake_hands(tmp_path, made, trusted=made.authority, name="localhost")
    assert certificates.expiry(made.authority) > NOW


def test_a_server_cannot_sign_for_others(tmp_path: Path) -> None:
    """With the server's key nobody can make certificates that devices accept."""
    made = make()
    forged = certificates.new_key()
    certificate = certificates.make_server_certificate(
        forged.public_key(), hosts=HOSTS, authority=made.certificate, authority_key=made.key, now=NOW
    )
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(tmp_path, Made(made.key, made.certificate, forged, certificate), trusted=made.authority, name="::1")


def test_validity() -> None:
    """An authority lasts ten years, a server 397 days but no longer than its authority; clocks may be a day behind."""
    made = make()
    assert certificates.expiry(made.authority) == NOW.replace(microsecond=0) + timedelta(days=3650)
    assert certificates.expiry(made.certificate) == NOW.replace(microsecond=0) + timedelta(days=397)
    assert made.certificate.not_valid_before_utc == NOW.replace(microsecond=0) - timedelta(days=1)
    old = make(NOW - timedelta(days=3600))
    late = certificates.make_server_certificate(
        old.key.public_key(), hosts=HOSTS, authority=old.authority, authority_key=old.authority_key, now=NOW
    )
    assert certificates.expiry(late) == certificates.expiry(old.authority)


def test_what_each_certificate_may_do() -> None:
    """The authority signs certificates and nothing else, without authorities below it; the server serves."""
    made = make()
    basic = made.authority.extensions.get_extension_for_class(x509.BasicConstraints)
    usage = made.authority.extensions.get_extension_for_class(x509.KeyUsage)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    assert (usage.critical, usage.value.key_cert_sign, usage.value.digital_signature) == (True, True, False)
    assert not made.certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    extended = made.certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(extended) == [x509.oid.ExtendedKeyUsageOID.SERVER_AUTH]
    assert isinstance(made.key.curve, ec.SECP256R1)


def test_chain_and_hosts() -> None:
    """Who signed and what it is for can be told, however an address or a name is spelled."""
    made, other = make(), make()
    assert certificates.is_signed_by(made.certificate, made.authority)
    assert not certificates.is_signed_by(made.certificate, other.authority)
    assert set(certificates.hosts_of(made.certificate)) == set(HOSTS)
    assert certificates.uncovered(made.certificate, ["LocalHost", "0:0::1", "127.0.0.1"]) == ()
    assert certificates.uncovered(made.certificate, ["a.example.org", "::2", "::2"]) == ("a.example.org", "::2")
    assert certificates.hosts_of(made.authority) == ()


@pytest.mark.parametrize("host", ["", "https://a", "a:8443", "a b", "-", "ü.example", "300.1.2.3", "a..b", "x" * 300])
def test_what_is_no_host_is_refused(host: str) -> None:
    """A port, a path or a mistyped address in a certificate would match nothing."""
    assert not certificates.is_host(host)
    with pytest.raises(ValueError, match="Expected"):
        make(hosts=(host,))


def test_needs_a_host_and_the_authoritys_key() -> None:
    """A certificate for nobody, or signed by a key that is not the authority's, is not made."""
    with pytest.raises(ValueError, match="at least one host"):
        make(hosts=())
    made = make()
    with pytest.raises(ValueError, match="own key"):
        certificates.make_server_certificate(
            made.key.public_key(), hosts=HOSTS, authority=made.authority, authority_key=made.key, now=NOW
        )


def test_keys_and_certificates_come_back() -> None:
    """What is written can be read, and other kinds of keys are not taken for them."""
    made, auth = make(), certificates.new_auth_key()
    assert certificates.from_pem(certificates.to_pem(made.key)).public_key() == made.key.public_key()
    assert certificates.from_openssh(certificates.to_openssh(auth)).public_key() == auth.public_key()
    assert certificates.parse_certificate(certificates.certificate_pem(made.authority)) == made.authority
    other = ed25519.Ed25519PrivateKey.generate()
    readers: list[tuple[Callable[[bytes], object], PrivateFormat]] = [
        (certificates.from_pem, PrivateFormat.PKCS8),
        (certificates.from_openssh, PrivateFormat.OpenSSH),
    ]
    for read, style in readers:
        with pytest.raises(ValueError, match="elliptic curve"):
            read(other.private_bytes(Encoding.PEM, style, NoEncryption()))
        with pytest.raises(ValueError, match=r".+"):
            read(b"nothing")


def test_nodes_have_keys_on_a_nist_curve() -> None:
    """Flower takes a node's public key only on one of these curves."""
    key = certificates.new_auth_key()
    assert isinstance(key.curve, ec.SECP384R1)
    assert load_ssh_public_key(certificates.to_openssh_public(key.public_key(), "edge-1")) == key.public_key()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_ssh_keygen_agrees(tmp_path: Path) -> None:
    """OpenSSH's own tool reads the private key, derives the same public one, and shows the same fingerprint."""
    key, path = certificates.new_auth_key(), tmp_path / "auth.key"
    line = certificates.to_openssh_public(key.public_key(), "edge-1")
    path.write_bytes(certificates.to_openssh(key))
    path.chmod(0o600)
    derived = subprocess.run(["ssh-keygen", "-y", "-f", path], capture_output=True, check=True).stdout
    assert derived.split()[:2] == line.split()[:2]
    (tmp_path / "auth.key.pub").write_bytes(line)
    shown = subprocess.run(["ssh-keygen", "-l", "-f", tmp_path / "auth.key.pub"], capture_output=True, check=True)
    assert shown.stdout.decode().split()[1] == certificates.openssh_fingerprint(line)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_openssl_agrees(tmp_path: Path) -> None:
    """OpenSSL verifies the chain for a server, and shows the same fingerprint."""
    made = make()
    (tmp_path / "ca.crt").write_bytes(certificates.certificate_pem(made.authority))
    (tmp_path / "tls.crt").write_bytes(certificates.certificate_pem(made.certificate))
    verify = ["openssl", "verify", "-x509_strict", "-purpose", "sslserver", "-CAfile", "ca.crt", "tls.crt"]
    assert subprocess.run(verify, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    show = ["openssl", "x509", "-in", "tls.crt", "-noout", "-fingerprint", "-sha256"]
    shown = subprocess.run(show, cwd=tmp_path, capture_output=True, check=True).stdout.decode()
    assert shown.strip().endswith(certificates.fingerprint(made.certificate))
