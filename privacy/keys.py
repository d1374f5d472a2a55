"""The Ed25519 key that owns a ledger: made once, kept in one file that only its owner can read."""

import os
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from common.errors import UmbelError
from common.files import storing


def create_key(path: Path) -> Ed25519PrivateKey:
    """Make a key and write it to a new file (PEM, mode 0600).

    Raises:
        UmbelError: If there is a file already; a key is never overwritten.
        StorageError: If the disk fails; there is no key then, nor a part of one.
    """
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise UmbelError(f"Expected no key yet, got {path=!s}. Load it, or name another file.") from error
    with storing(path), open(descriptor, "wb") as file:
        try:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            path.unlink(missing_ok=True)
            raise
    return key


def load_key(path: Path) -> Ed25519PrivateKey:
    """Read a key made by `create_key`.

    Raises:
        UmbelError: If there is none, it is not an Ed25519 key, or others than its owner can read it.
    """
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            pem = file.read()
    except OSError as error:
        remedy = "Correct the path, or put the key back from a backup."
        raise UmbelError(f"Expected a readable key, got {path=!s} ({error.strerror}). {remedy}") from error
    if mode & 0o077:
        raise UmbelError(f"Expected a key only its owner can read, got mode={mode:04o}. Run chmod 600 {path}.")
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise UmbelError(f"Expected a key in PEM without password, got {path=!s}.") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UmbelError(f"Expected an Ed25519 key, got {type(key).__name__} in {path=!s}.")
    return key


def public_key_hex(key: Ed25519PrivateKey | Ed25519PublicKey) -> str:
    """The public key as the ledger spells it: 64 lower-case hex digits."""
    public = key.public_key() if isinstance(key, Ed25519PrivateKey) else key
    return public.public_bytes(Encoding.Raw, PublicFormat.Raw).hex()
