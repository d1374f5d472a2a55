"""The coin that a user's own device tosses for a sampled release: once, in secret, and after the work is done.

Amplified epsilon counts on nobody but the device knowing who contributed. So a coin is an object that lives while one
release is answered, is drawn from the operating system, and is neither logged nor sent: what is kept of it on the
node's disk is whom the release was charged to.
"""

import secrets
from collections.abc import Callable
from fractions import Fraction
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from common.model import IntArray

BoolArray = npt.NDArray[np.bool_]
Draw = Callable[[int], int]
"""A user's position to 64 bits."""
BITS = 64


class Coins:
    """One coin for each user of a node, for one release; each is tossed when it is first looked at, and never again."""

    def __init__(self, num_users: int, probability: Fraction, draw: Draw | None = None) -> None:
        """Nothing is tossed yet.

        Args:
            num_users: On this node.
            probability: q, exact.
            draw: By default from the operating system.
        """
        self._below = probability.numerator * 2**BITS // probability.denominator  # floor(q 2^64): at most q
        self._draw = draw or _from_the_system
        self._tossed = np.zeros(num_users, np.bool_)
        self._heads = np.zeros(num_users, np.bool_)

    def heads(self, users: IntArray) -> BoolArray:
        """Whether each of these users contributes, in their order."""
        for user in users[~self._tossed[users]].tolist():
            self._heads[user] = self._draw(user) < self._below
            self._tossed[user] = True
        shown: BoolArray = self._heads[users]
        return shown


def seeded(seed: int, node: str, sequence: int) -> Draw:
    """Coins that repeat, for simulations whose noise is seeded as well: NOT PRIVATE."""
    return lambda user: int.from_bytes(sha256(f"coin {seed} {node} {sequence} {user}".encode()).digest()[:8])


def _from_the_system(_: int) -> int:
    return secrets.randbits(BITS)
