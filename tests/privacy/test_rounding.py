"""Numbers for people: what was spent is never printed smaller, what is left never larger."""

import math
import re
from decimal import Decimal

from hypothesis import given
from hypothesis import strategies as st

from privacy.rounding import counted, rounded_down, rounded_up


@given(st.floats(1e-300, 1e300), st.integers(2, 6))
def test_losses_are_never_printed_smaller(value, digits):
    """What is printed is at least the number, and no further off than its digits allow."""
    text = rounded_up(value, digits).translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789"))
    found = (
        re.fullmatch(r"(?:([0-9.]+)·)?10(-?[0-9]+)", text) if "·" in text or re.match(r"10-|10[0-9]*$", text) else None
    )
    printed = Decimal(found[1] or 1).scaleb(int(found[2])) if found and abs(math.log10(value)) > 3 else Decimal(text)
    exact = Decimal(repr(value))
    assert exact <= printed <= exact * (1 + Decimal(10) ** (1 - digits))


def test_numbers_are_printed_as_people_write_them():
    """Trailing digits are kept, powers of ten are written as such, infinity has its sign."""
    values = (0, 0.99999, 2.0, 12.5951, 1e-6, 3e-6, 4.93e-31, 1234567.0, math.inf, None)
    expected = ["0", "1.000", "2.000", "12.60", "10⁻⁶", "3·10⁻⁶", "4.93·10⁻³¹", "1.235·10⁶", "∞", "∞"]
    assert [rounded_up(value) for value in values] == expected


def test_what_is_left_is_rounded_down():
    """Four decimals, never more than is left and never below zero."""
    assert [rounded_down(value) for value in (0.49999, 0.1, -1e-9)] == ["0.4999", "0.1000", "0.0000"]


def test_counts_have_their_plural():
    """One round, two rounds, and thousands with a comma."""
    assert [counted(count, "round") for count in (0, 1, 2, 1234)] == ["0 rounds", "1 round", "2 rounds", "1,234 rounds"]
