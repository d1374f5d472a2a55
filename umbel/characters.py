"""What terminals and logs that know ASCII only get instead of Greek letters, signs and superscripts."""

import codecs
import io
import re
import unicodedata
from typing import Any

_HANDLER = "umbel.spelled"
_SUPERSCRIPTS = re.compile("[⁻⁰¹²³⁴-⁹]+")
_SPELLED = str.maketrans(
    {"ε": "epsilon", "δ": "delta", "∞": "inf", "·": "*", "±": "+-", "–": "-", "…": "...", "“": '"', "”": '"', "−": "-"}
)


def spell_out(stream: Any) -> None:
    """Make `stream` write in letters what its encoding lacks, instead of failing."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors=_HANDLER)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    """An error handler, as `codecs.register_error` describes them."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = _SUPERSCRIPTS.sub(
        lambda found: f"^{unicodedata.normalize('NFKC', found[0])}", error.object[error.start : error.end]
    )
    return text.translate(_SPELLED).encode("ascii", "replace").decode("ascii"), error.end


codecs.register_error(_HANDLER, _spelled)
