"""How a contribution travels: signed by its node, sealed to a key that lives for one release.

What crosses SuperLink, its database and proxies is ciphertext of one size. The key pair is made when a release is
charged and its private half is dropped when the round is over, so that nothing at rest can be opened later. HPKE
(RFC 9180, base mode, X25519, HKDF-SHA256, ChaCha20-Poly1305) binds a reply to the broadcast it answers and to its
node by `info`: one of another round or of another node does not open. Sealing hides nothing from the ServerApp.
"""

from collections.abc import Callable
from hashlib import sha256
from typing import Self

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from common.errors import Refused

SIGNATURE_BYTES = 64  # Ed25519, RFC 8032
UNSIGNED = bytes(SIGNATURE_BYTES)
"""What stands for the signature of a node without a key: one of a simulation."""

Sign = Callable[[bytes], bytes]

_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)
_CONTRIBUTION = b"umbel contribution 1\n"
_IDENTITY = b"umbel identity 1\n"


class SealingKey:
    """The server's key pair of one release; it is never written anywhere."""

    def __init__(self, private_key: X25519PrivateKey) -> None:
        """Not for callers: see `fresh`."""
        self._private_key = private_key

    @classmethod
    def fresh(cls) -> Self:
        """A key pair that nobody has seen."""
        return cls(X25519PrivateKey.generate())

    @property
    def public(self) -> bytes:
        """The public half, 32 bytes."""
        return self._private_key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)

    def open(self, sealed: bytes, info: bytes) -> bytes:
        """What `seal` was given.

        Raises:
            Refused: With code `sealing`, if it was sealed to another key, for another `info`, or changed.
        """
        try:
            return _SUITE.decrypt(sealed, self._private_key, info)
        except InvalidTag:
            raise Refused("sealing", "Expected a reply sealed for this release by this node, got another.") from None


def seal(plaintext: bytes, public_key: bytes, info: bytes) -> bytes:
    """Ciphertext that only the holder of the private key reads, and only with the same `info`: 48 bytes longer.

    Raises:
        Refused: With code `malformed`, if `public_key` is no key.
    """
    try:
        return _SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(public_key), info)
    except ValueError:  # of a key that is none: all shared secrets with it are known
        raise Refused("malformed", "Expected an X25519 key to seal to, got bytes that are none.") from None


def enclose(contribution: bytes, *, broadcast: bytes, name: str, sealing_key: bytes, sign: Sign | None) -> bytes:
    """A node's reply: its contribution and its signature, sealed where the broadcast brought a key.

    Args:
        contribution: Canonical bytes.
        broadcast: The signed bytes that are answered.
        name: The node's, as the server's registry has it.
        sealing_key: Of the broadcast: 32 bytes, or none.
        sign: With the node's key; None for a node that has none.
    """
    info = _info(broadcast, name)
    letter = contribution + (UNSIGNED if sign is None else sign(_CONTRIBUTION + info + sha256(contribution).digest()))
    return seal(letter, sealing_key, info) if sealing_key else letter


def disclose(reply: bytes, *, broadcast: bytes, name: str, key: SealingKey | None, public_key: str) -> bytes:
    """Inverse of `enclose`: the contribution.

    Args:
        reply: What came back.
        broadcast: The signed bytes it should answer.
        name: Whose reply it should be.
        key: That of the release, or None where nothing was to be sealed.
        public_key: The node's in the registry, hex; "" for a node without one.

    Raises:
        Refused: `sealing`, if it does not open; `node_signature`, if the node did not sign it.
    """
    info = _info(broadcast, name)
    letter = reply if key is None else key.open(reply, info)
    contribution, signature = letter[:-SIGNATURE_BYTES], letter[-SIGNATURE_BYTES:]
    _check(signature, _CONTRIBUTION + info + sha256(contribution).digest(), public_key)
    return contribution


def introduce(record: bytes, *, challenge: bytes, sign: Sign | None) -> bytes:
    """A node's answer to who it is, signed for this one challenge."""
    return record + (UNSIGNED if sign is None else sign(_IDENTITY + sha256(challenge).digest() + record))


def check_introduction(reply: bytes, *, challenge: bytes, public_key: str) -> None:
    """Check that the holder of the node's key has answered this challenge.

    Raises:
        Refused: With code `node_signature`, if not.
    """
    record, signature = reply[:-SIGNATURE_BYTES], reply[-SIGNATURE_BYTES:]
    _check(signature, _IDENTITY + sha256(challenge).digest() + record, public_key)


def _info(broadcast: bytes, name: str) -> bytes:
    return sha256(broadcast).digest() + name.encode()


def _check(signature: bytes, signed: bytes, public_key: str) -> None:
    """A key that the registry has must have signed; where it has none, there is nothing to check."""
    if not public_key:
        return
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(signature, signed)
    except (InvalidSignature, ValueError):
        raise Refused("node_signature", "Expected a reply signed by the node's registered key, got another.") from None
