"""A small file beside a node's store that says how the node is doing; for its owner's `umbel status` and `doctor`.

It is no record of anything: it may be lost or old, so it is written without a sync, and seldom where nothing happens.
"""

import contextlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

STATUS_NAME = "status.json"
_SELDOM = 30.0


class StatusFile:
    """What a resident node has last said of itself."""

    def __init__(self, path: Path | None) -> None:
        """Nothing is written yet.

        Args:
            path: The file, or None for none.
        """
        self._path, self._written = path, -_SELDOM
        self._known: dict[str, Any] = {"format": 1, "pid": os.getpid(), "started": time.time()}

    def note(
        self,
        state: str,
        facts: Callable[[], dict[str, Any]],
        *,
        force: bool = False,
        answered: bool = False,
        **more: Any,
    ) -> None:
        """Say how it is; a disk that fails is no reason for anything here.

        Args:
            state: In a word: "running", "away", ...
            facts: What else to write; asked only where something is written.
            force: Write now, rather than every half minute where the state is as before.
            answered: Whether a message was just answered.
            more: What to remember from now on.
        """
        now = time.time()
        changed = state != self._known.get("state")
        if state == "running":
            self._known |= {"last_contact": now, "problem": ""}
        if answered:
            self._known["last_answer"] = now
        self._known |= {"state": state, **more}
        if self._path is None or not (force or changed or time.monotonic() - self._written > _SELDOM):
            return
        self._written = time.monotonic()
        with contextlib.suppress(Exception):
            self._known |= facts()
        staging = self._path.with_name(f".{self._path.name}.tmp")
        with contextlib.suppress(OSError):
            descriptor = os.open(staging, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self._known | {"written": now}, file, indent=1)
            staging.replace(self._path)


def status_path(store: str) -> Path | None:
    """Where the status of a node with this store is; None where the store is not a file."""
    return None if store.startswith(":") else Path(store).parent / STATUS_NAME


def read_status(store: str) -> dict[str, Any] | None:
    """What the node with this store has last said; None where it never did."""
    path = status_path(store)
    try:
        found = None if path is None else json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
