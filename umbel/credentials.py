"""Keys and certificates of a federation's folder: each is made where it is missing, and never overwritten."""

import secrets
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509 import Certificate

from common.errors import UmbelError
from common.files import storing, sync_directory, write_durably
from privacy.keys import create_key, load_key
from server import certificates
from umbel.federation import Deployment, FederationFolder, NodeFolder

_SECRET_BYTES = 32

_T = TypeVar("_T")


def ensure_authority(folder: FederationFolder, deployment: Deployment, now: datetime) -> Certificate:
    """The federation's own authority; its key may have been moved to a safe place."""
    if not folder.authority.exists():
        key = ensure_tls_key(folder.authority_key)
        made = certificates.make_authority(key, name=deployment.name, now=now)
        write_durably(folder.authority, certificates.certificate_pem(made))
    return read_certificate(folder.authority)


def ensure_certificate(folder: FederationFolder, deployment: Deployment, now: datetime) -> None:
    """A certificate of the server for all of its hosts; the key stays when hosts were added."""
    hosts = deployment.hosts.names
    if folder.certificate.exists() and not certificates.uncovered(read_certificate(folder.certificate), hosts):
        return
    key = ensure_tls_key(folder.certificate_key)
    write_durably(folder.certificate, server_certificate(folder, deployment, key, now))


def server_certificate(
    folder: FederationFolder, deployment: Deployment, key: certificates.PrivateKey, now: datetime
) -> bytes:
    """A new certificate for `key`, as PEM.

    Raises:
        UmbelError: If the authority's key is not here.
    """
    if not folder.authority_key.exists():
        raise UmbelError(
            f"Expected the authority's key at {folder.authority_key} to make a certificate, got none. Put it back for "
            "this command."
        )
    try:
        made = certificates.make_server_certificate(
            key.public_key(),
            hosts=deployment.hosts.names,
            authority=read_certificate(folder.authority),
            authority_key=certificates.from_pem(folder.authority_key.read_bytes()),
            now=now,
        )
    except ValueError as error:
        raise UmbelError(f"{folder.authority_key}: {error} Restore both from a copy.") from error
    return certificates.certificate_pem(made)


def ensure_tls_key(path: Path) -> certificates.PrivateKey:
    """A key for TLS."""
    if not path.exists():
        write_durably(path, certificates.to_pem(certificates.new_key()), mode=0o600)
    return _read(path, certificates.from_pem, "a key in PEM")


def ensure_auth_key(node: NodeFolder, name: str) -> None:
    """A node's key for Flower, and its public half."""
    if not node.auth_key.exists():
        write_durably(node.auth_key, certificates.to_openssh(certificates.new_auth_key()), mode=0o600)
    key = _read(node.auth_key, certificates.from_openssh, "a key in OpenSSH's format")
    line = certificates.to_openssh_public(key.public_key(), name)
    if not node.auth_public.exists():
        write_durably(node.auth_public, line)


def ensure_secret(path: Path) -> None:
    """A random word that two processes share."""
    if not path.exists():
        write_durably(path, secrets.token_hex(_SECRET_BYTES).encode(), mode=0o600)


def ensure_signing_key(path: Path) -> Ed25519PrivateKey:
    """An Ed25519 key; unlike that of `create_key` alone, its file is never there without its bytes."""
    if not path.exists():
        staging = path.with_name(f".{path.name}.tmp")
        with storing(path):
            staging.unlink(missing_ok=True)
            create_key(staging)
            staging.replace(path)
            sync_directory(path.parent)
    return load_key(path)


def read_certificate(path: Path) -> Certificate:
    """A certificate.

    Raises:
        UmbelError: If it is not there, or none.
    """
    return _read(path, certificates.parse_certificate, "a certificate in PEM")


def _read(path: Path, parse: Callable[[bytes], _T], expected: str) -> _T:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise UmbelError(f"Expected {expected} at {path}, got {error.strerror}. Restore it from a copy.") from error
    except ValueError as error:
        raise UmbelError(f"Expected {expected} at {path}, got something else. Restore it from a copy.") from error
