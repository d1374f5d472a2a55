"""A reply opens for one release, from one node, and only to the key that is gone with the round."""

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import Refused
from common.sealing import SealingKey, check_introduction, disclose, enclose, introduce, seal
from privacy.keys import public_key_hex

NODE = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
STRANGER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
KEY = SealingKey.fresh()
BROADCAST, NAME, LETTER = b"a signed broadcast", "edge-1", b"a canonical contribution"


def reply(**changes):
    fields = {"broadcast": BROADCAST, "name": NAME, "sealing_key": KEY.public, "sign": NODE.sign}
    return enclose(LETTER, **(fields | changes))


def read(sealed, **changes):
    fields = {"broadcast": BROADCAST, "name": NAME, "key": KEY, "public_key": public_key_hex(NODE)}
    return disclose(sealed, **(fields | changes))


def code_of(sealed, **changes):
    with pytest.raises(Refused) as refusal:
        read(sealed, **changes)
    return refusal.value.code


def test_a_reply_reads_back_and_shows_nothing():
    """What crosses SuperLink has none of the contribution's bytes, is of one length, and never the same twice."""
    first, second = reply(), reply()
    assert read(first) == read(second) == LETTER
    assert first != second
    assert len(first) == len(LETTER) + 64 + 48
    assert LETTER not in first
    assert NODE.sign(b"")[:8] not in first


@pytest.mark.parametrize(
    ("sent", "read_as", "code"),
    [
        ({}, {"broadcast": b"another round's"}, "sealing"),
        ({}, {"name": "edge-2"}, "sealing"),
        ({}, {"key": SealingKey.fresh()}, "sealing"),
        ({"broadcast": b"an earlier one"}, {}, "sealing"),
        ({"sign": STRANGER.sign}, {}, "node_signature"),
        ({"sign": None}, {}, "node_signature"),
        ({"sealing_key": b""}, {}, "sealing"),
        ({}, {"key": None}, "node_signature"),
        ({"sealing_key": b"", "sign": STRANGER.sign}, {"key": None}, "node_signature"),
        ({"sealing_key": b"", "broadcast": b"another"}, {"key": None}, "node_signature"),
        ({"sealing_key": b"", "name": "edge-2"}, {"key": None}, "node_signature"),
    ],
)
def test_another_release_node_or_key_does_not_open(sent, read_as, code):
    """Replays, other rounds' and other nodes' replies are refused, sealed or not."""
    assert code_of(reply(**sent), **read_as) == code


def test_a_node_without_a_key_in_the_registry_needs_none():
    """Simulated nodes sign nothing; their replies are sealed all the same."""
    assert read(reply(sign=None), public_key="") == LETTER


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 8 * (len(LETTER) + 112) - 1))
def test_every_flipped_bit_is_refused(position):
    """No bit of a sealed reply can be changed on the way."""
    changed = bytearray(reply())
    changed[position // 8] ^= 1 << position % 8
    assert code_of(bytes(changed)) == "sealing"


@pytest.mark.parametrize("length", [0, 1, 31, 32, 47, 48])
def test_short_replies_are_refused(length):
    """Bytes that cannot be a sealed reply have the same code."""
    assert code_of(reply()[:length]) == "sealing"


@pytest.mark.parametrize("public_key", [bytes(32), b"\x01" + bytes(31), b"short"])
def test_a_node_seals_to_no_key_whose_secrets_are_known(public_key):
    """A point of small order, or too few bytes, is refused before anything leaves."""
    with pytest.raises(Refused) as refusal:
        seal(b"x", public_key, b"")
    assert refusal.value.code == "malformed"


def test_an_introduction_answers_one_challenge():
    """Neither an old introduction nor another node's convinces."""
    said = introduce(b"edge-1 with 3 users", challenge=b"c", sign=NODE.sign)
    check_introduction(said, challenge=b"c", public_key=public_key_hex(NODE))
    check_introduction(introduce(b"x", challenge=b"c", sign=None), challenge=b"c", public_key="")
    for changed, challenge, key in (
        (said, b"d", NODE),
        (said, b"c", STRANGER),
        (b"X" + said[1:], b"c", NODE),
        (introduce(b"x", challenge=b"c", sign=None), b"c", NODE),
        (b"", b"c", NODE),
    ):
        with pytest.raises(Refused) as refusal:
            check_introduction(changed, challenge=challenge, public_key=public_key_hex(key))
        assert refusal.value.code == "node_signature"


def test_a_contribution_is_no_introduction():
    """What a node signs in one place is of no use in the other."""
    letter = enclose(LETTER, broadcast=b"c", name="", sealing_key=b"", sign=NODE.sign)
    with pytest.raises(Refused):
        check_introduction(letter, challenge=b"c", public_key=public_key_hex(NODE))
