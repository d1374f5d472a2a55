"""Numbers as people read them: a few digits, what was spent never less than it is, what is left never more."""

import math
from decimal import ROUND_CEILING, Context, Decimal

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PLAIN = (-4, 6)


def rounded_up(value: float | None, digits: int = 4) -> str:
    """A number of at least 0 with so many significant digits, rounded up: 0.99999 is "1.000", 1e-6 is "10⁻⁶".

    None is infinity, as in JSON.
    """
    if value is None or value == math.inf:
        return "∞"
    if value == 0:
        return "0"
    rounded = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(value))
    power = rounded.adjusted()
    low, high = _PLAIN
    if low < power < high:
        return format(rounded.quantize(Decimal(1).scaleb(min(0, power - digits + 1))), "f")
    factor = format(rounded.scaleb(-power).normalize(), "f")
    ten = f"10{str(power).translate(_SUPERSCRIPTS)}"
    return ten if factor == "1" else f"{factor}·{ten}"


def rounded_down(value: float) -> str:
    """What is left of a budget to four decimals, never more than it is, and never below zero."""
    return f"{max(0, math.floor(value * 1e4)) / 1e4:.4f}"


def counted(count: int, thing: str) -> str:
    """`1 round`, `2 rounds`."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"
