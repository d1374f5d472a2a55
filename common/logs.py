"""The log of a long-running process: text for people or one JSON object a line, and what may stand in it.

Set by the environment: `UMBEL_LOG` is `text` or `json`, `UMBEL_LOG_LEVEL` a level (`INFO`). Records go to standard
error, where systemd and containers collect them.

What may be logged, at any level: public facts (rounds, counts of nodes, refusal codes, names and digests of what is
released, paths, addresses), and the texts of our own errors. What may not: values, counts or norms of users' data,
anything about one user, and texts of exceptions that we did not foresee, which can hold a row of data. So a record
keeps of an exception its type and where it came from (files, lines and functions: public code), and its text only
where it is an `UmbelError` that is not about data. Of a record's extra attributes only `PUBLIC_EXTRAS` are written.
"""

import json
import logging
import os
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from common.errors import DataError, UmbelError

FORMAT_VARIABLE = "UMBEL_LOG"
"""`text` or `json`."""
LEVEL_VARIABLE = "UMBEL_LOG_LEVEL"
"""`DEBUG`, `INFO`, `WARNING`, `ERROR` or `CRITICAL`."""
PUBLIC_EXTRAS = frozenset(
    {
        *("round", "fold_in", "run", "purpose", "sequence", "node", "node_id", "code", "refusals", "address", "path"),
        *("release", "seconds", "bundle", "model"),
    }
)
"""Attributes of a record (`extra={...}`) that are written; every other one is dropped, whatever it is."""

_OURS = ("umbel", "server", "client", "privacy", "common")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_FORMATS = ("text", "json")
_LAST_FRAMES = 8


class PublicFormatter(logging.Formatter):
    """A record as a line of text: time, level, logger, message, public extras."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        shown = facts_of(record)
        head = f"{shown.pop('time')} {shown.pop('level')} {shown.pop('logger')}: {shown.pop('message')}"
        rest = " ".join(f"{name}={_compact(value)}" for name, value in shown.items())
        return _one_line(f"{head} {rest}".rstrip())


class JsonFormatter(logging.Formatter):
    """A record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        return _compact(facts_of(record))


def configure(default: str | None = None) -> None:
    """Set up the log of this process as the environment says; once, before work begins.

    Loggers of ours speak from `UMBEL_LOG_LEVEL` on (`INFO`), those of libraries from `WARNING` on.

    Args:
        default: The format where `UMBEL_LOG` is not set; None leaves the process' log alone then, as in a simulation,
            which shows its progress itself.

    Raises:
        UmbelError: If a variable has a value that it cannot have.
    """
    chosen = os.environ.get(FORMAT_VARIABLE) or default
    if chosen is None:
        return
    if chosen not in _FORMATS:
        raise UmbelError(f"Expected {FORMAT_VARIABLE} to be text or json, got {chosen!r}.")
    level = (os.environ.get(LEVEL_VARIABLE) or "INFO").upper()
    if level not in _LEVELS:
        raise UmbelError(f"Expected {LEVEL_VARIABLE} to be one of {', '.join(_LEVELS)}, got {level!r}.")
    formatter = JsonFormatter if chosen == "json" else PublicFormatter
    root, handler = logging.getLogger(), _Stderr()
    handler.setFormatter(formatter())
    for earlier in [each for each in root.handlers if isinstance(each, _Stderr)]:
        root.removeHandler(earlier)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    flower = logging.getLogger("flwr")  # it prints by a handler of its own, and whole tracebacks with it
    flower.handlers.clear()
    flower.setLevel(logging.WARNING)
    flower.propagate = True


class _Stderr(logging.StreamHandler[TextIO]):
    """The one handler of a process that writes a log of ours; `logging.config` would close those of others."""


def facts_of(record: logging.LogRecord) -> dict[str, Any]:
    """What of a record may be written: time, level, logger, message, public extras, and what is public of an error."""
    facts: dict[str, Any] = {
        "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "level": record.levelname,
        "logger": record.name,
        "message": record.getMessage(),
    }
    facts |= {name: value for name, value in vars(record).items() if name in PUBLIC_EXTRAS}
    if record.exc_info and record.exc_info[1] is not None:
        facts |= _error_facts(record.exc_info[1], record.exc_info[2])
    return facts


def _error_facts(error: BaseException, trace: TracebackType | None) -> dict[str, Any]:
    facts: dict[str, Any] = {"error": type(error).__name__}
    if isinstance(error, UmbelError) and not isinstance(error, DataError):
        return facts | {"error_message": str(error)}
    # neither the text of the exception nor the source lines, which a traceback has; names of functions are public
    frames = traceback.extract_tb(trace)[-_LAST_FRAMES:]
    return facts | {"where": [f"{os.path.basename(frame.filename)}:{frame.lineno} {frame.name}" for frame in frames]}


def _compact(value: object) -> str:
    try:
        return json.dumps(value, separators=(",", ":"), default=_type_name)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(_type_name(value))


def _type_name(value: object) -> Any:
    """An object that is no JSON is not printed, since its text could be anything."""
    return dict(value) if isinstance(value, Mapping) else f"<{type(value).__name__}>"


def _one_line(text: str) -> str:
    """No record can make up another one."""
    return "".join(character if character.isprintable() else f"\\x{ord(character):02x}" for character in text)
