"""Privacy losses as people read them: a few digits, never less than what was spent."""

import math
from decimal import ROUND_CEILING, Context, Decimal

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PLAIN = (-4, 6)


def rounded_up(value: float, digits: int = 4) -> str:
    """A number of at least 0 with so many significant digits, rounded up: 0.99999 is "1.000", 1e-6 is "10⁻⁶"."""
    if value == 0 or math.isinf(value):
        return "∞" if value else "0"
    rounded = Context(prec=digits, rounding=ROUND_CEILING).create_decimal(repr(value))
    power = rounded.adjusted()
    low, high = _PLAIN
    if low < power < high:
        return format(rounded.quantize(Decimal(1).scaleb(min(0, power - digits + 1))), "f")
    factor = format(rounded.scaleb(-power).normalize(), "f")
    ten = f"10{str(power).translate(_SUPERSCRIPTS)}"
    return ten if factor == "1" else f"{factor}·{ten}"
