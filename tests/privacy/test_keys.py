"""The file of the ledger's key."""

import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from common.errors import UmbelError
from privacy.keys import create_key, load_key, public_key_hex


def test_a_key_is_loaded_as_it_was_made(tmp_path):
    """A new key is a PEM file that only its owner can read, and loads as the same key."""
    key = create_key(tmp_path / "key.pem")
    assert stat.S_IMODE((tmp_path / "key.pem").stat().st_mode) == 0o600
    assert (tmp_path / "key.pem").read_text().startswith("-----BEGIN PRIVATE KEY-----")
    assert public_key_hex(load_key(tmp_path / "key.pem")) == public_key_hex(key.public_key())


def test_a_key_is_never_overwritten(tmp_path):
    """Making a key where there is one is refused and changes nothing."""
    create_key(tmp_path / "key.pem")
    before = (tmp_path / "key.pem").read_bytes()
    with pytest.raises(UmbelError, match="no key yet"):
        create_key(tmp_path / "key.pem")
    assert (tmp_path / "key.pem").read_bytes() == before


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_others_can_read_is_refused(tmp_path, mode):
    """A key that group or others can read is not used, and the message says how to mend it."""
    create_key(tmp_path / "key.pem")
    (tmp_path / "key.pem").chmod(mode)
    with pytest.raises(UmbelError, match="chmod 600"):
        load_key(tmp_path / "key.pem")


def test_what_is_not_an_ed25519_key_is_refused(tmp_path):
    """No file, an empty one, and another kind of key are each refused by name."""
    path = tmp_path / "key.pem"
    with pytest.raises(UmbelError, match="readable key"):
        load_key(path)
    path.touch(mode=0o600)
    with pytest.raises(UmbelError, match="PEM"):
        load_key(path)
    path.write_bytes(X25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(UmbelError, match="Ed25519"):
        load_key(path)
