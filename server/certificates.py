"""Certificates and keys with which devices know the server and the server knows devices. Pure: nothing here is a file.

One authority signs the certificate of the server; devices trust that authority and nothing else. Each device has a
key of its own for Flower's transport, on a NIST curve and in OpenSSH's format because Flower takes no other.
"""

import base64
import hashlib
import ipaddress
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA_VALIDITY = timedelta(days=3650)
SERVER_VALIDITY = timedelta(days=397)
"""The longest that browsers and operating systems still accept."""
EXPIRES_SOON = timedelta(days=30)
_BACKDATED = timedelta(days=1)
"""A device whose clock is a little behind must not take a new certificate for one of the future."""

PrivateKey = ec.EllipticCurvePrivateKey
PublicKey = ec.EllipticCurvePublicKey


def new_key() -> PrivateKey:
    """A key for TLS, on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def new_auth_key() -> PrivateKey:
    """A device's key for Flower's transport, on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def to_pem(key: PrivateKey) -> bytes:
    """A TLS key as PEM, without password."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def from_pem(pem: bytes) -> PrivateKey:
    """Inverse of `to_pem`.

    Raises:
        ValueError: If it is none.
    """
    return _elliptic(load_pem_private_key(pem, password=None))


def to_openssh(key: PrivateKey) -> bytes:
    """A device's private key in OpenSSH's format."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())


def from_openssh(text: bytes) -> PrivateKey:
    """Inverse of `to_openssh`.

    Raises:
        ValueError: If it is none.
    """
    return _elliptic(load_ssh_private_key(text, password=None))


def to_openssh_public(key: PublicKey, comment: str) -> bytes:
    """The line of a public key, as in `auth.key.pub`."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH) + f" {comment}\n".encode()


def make_authority(key: PrivateKey, *, name: str, now: datetime) -> x509.Certificate:
    """A self-signed certificate that may sign others, and those no more others.

    Args:
        key: Of the authority.
        name: Of the federation.
        now: With time zone.
    """
    subject = _subject(f"{name} authority")
    public = key.public_key()
    usage = _usage(key_cert_sign=True, crl_sign=True)
    return (
        _builder(subject, subject, public, now, now + CA_VALIDITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, SHA256())
    )


def make_server_certificate(
    public_key: PublicKey,
    *,
    hosts: Iterable[str],
    authority: x509.Certificate,
    authority_key: PrivateKey,
    now: datetime,
) -> x509.Certificate:
    """A certificate for a server that is reached under each of `hosts`, names or addresses.

    Raises:
        ValueError: If there is no host, one is neither a name nor an address, or the key is not the authority's.
    """
    names = [_general_name(host) for host in dict.fromkeys(hosts)]
    if not names:
        raise ValueError("Expected at least one host, got none.")
    if authority_key.public_key() != authority.public_key():
        raise ValueError("Expected the authority's own key, got another.")
    until = min(now + SERVER_VALIDITY, authority.not_valid_after_utc)
    key_of_authority = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    issuer = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(key_of_authority)
    return (
        _builder(_subject("server"), authority.subject, public_key, now, until)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, SHA256())
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def parse_certificate(pem: bytes) -> x509.Certificate:
    """Inverse of `certificate_pem`.

    Raises:
        ValueError: If it is none.
    """
    return x509.load_pem_x509_certificate(pem)


def is_signed_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether `authority` signed `certificate`; dates are not looked at."""
    try:
        certificate.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """Names and addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    addresses = (str(address) for address in names.get_values_for_type(x509.IPAddress))
    return (*names.get_values_for_type(x509.DNSName), *addresses)


def uncovered(certificate: x509.Certificate, hosts: Iterable[str]) -> tuple[str, ...]:
    """Those of `hosts` that a certificate is not for."""
    covered = set(hosts_of(certificate))
    return tuple(host for host in dict.fromkeys(hosts) if _spelled(host) not in covered)


def expiry(certificate: x509.Certificate) -> datetime:
    """When it ends, UTC."""
    return certificate.not_valid_after_utc


def fingerprint(certificate: x509.Certificate) -> str:
    """SHA-256 of a certificate as people compare it."""
    return certificate.fingerprint(SHA256()).hex(":").upper()


def openssh_fingerprint(public_line: bytes) -> str:
    """Of the line of a public key, as `ssh-keygen -l` shows it.

    Raises:
        ValueError: If it is no such line.
    """
    words = public_line.split()
    if len(words) < 2:
        raise ValueError("Expected the line of a public key, got something else.")
    digest = hashlib.sha256(base64.b64decode(words[1], validate=True)).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def is_host(host: str) -> bool:
    """Whether a certificate can be for it."""
    try:
        _general_name(host)
    except ValueError:
        return False
    return True


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    fine = all(0 < len(label) < 64 and label.replace("-", "").replace("_", "").isalnum() for label in labels)
    if not (host.isascii() and fine and len(host) < 254 and not labels[-1].isdigit()):
        raise ValueError(f"Expected the name or the address of a host, got {host!r}.")
    return x509.DNSName(_spelled(host))


def _spelled(host: str) -> str:
    """A host as a certificate spells it."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower()


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: PublicKey, now: datetime, until: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before((now - _BACKDATED).astimezone(UTC))
        .not_valid_after(until.astimezone(UTC))
    )


def _subject(common_name: str) -> x509.Name:
    attributes = [(NameOID.ORGANIZATION_NAME, "umbel"), (NameOID.COMMON_NAME, common_name[:64])]
    return x509.Name([x509.NameAttribute(name, value) for name, value in attributes])


def _usage(*, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def _elliptic(key: object) -> PrivateKey:
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ValueError(f"Expected a key on an elliptic curve, got {type(key).__name__}.")
    return key
