"""The files of a release folder against its ledger: every committed one is there, and nothing else.

The ledger commits to the bytes of each noised release. Which run a folder belongs to it cannot say: that is in the
facts of the released model. Where they are missing, or name a run that the ledger does not have, no committed release
may be missing at all, or deleting the model would hide that a release was deleted.
"""

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from common.errors import UmbelError
from common.files import unpack
from privacy.audit.verify import Verification, verify
from privacy.ledger_state import Round

_SUFFIX = ".safetensors"
_is_number = re.compile(r"[0-9]{9,18}").fullmatch


@dataclass(frozen=True, kw_only=True)
class Releases:
    """Noised releases of a run, one file a RESERVE line.

    Attributes:
        folder: Where they are.
        run: Whose they are; None if not known.
    """

    folder: Path
    run: str | None = None

    def path(self, entry: Round) -> Path:
        """Where the release of a round is."""
        return self.folder / f"{entry.sequence:09d}{_SUFFIX}"

    def holds(self, entry: Round) -> bool:
        """Whether the release of a round is there, as it was committed.

        Raises:
            UmbelError: If it cannot be read.
        """
        path = self.path(entry)
        try:
            return path.exists() and sha256(path.read_bytes()).hexdigest() == entry.release_digest
        except OSError as error:
            raise UmbelError(f"Expected to read {path}, got {error.strerror}. Get the release again.") from error

    def problem(self, found: Verification) -> str:
        """What is wrong with the files as a whole; an empty string if nothing is."""
        present, committed = self.count_present(found), found.counts.get("COMMIT", 0)
        if self.run not in found.runs and present < committed:
            return (
                f"Expected all {committed} committed releases in {self.folder}, which does not say whose "
                f"run it is, got {present}. Put the run's model.safetensors beside it, or audit the ledger alone."
            )
        return next(self._strays(found), "")

    def count_present(self, found: Verification) -> int:
        """How many committed releases have a file, whatever is in it."""
        entries = (self._entry(path, found) for path in self._files())
        return sum(entry is not None and entry.release_digest is not None for entry in entries)

    def may_lack(self, entry: Round) -> bool:
        """Whether it is not this run's, or nobody knows whose; the latter is for `problem`."""
        return entry.run != self.run and not self.path(entry).exists()

    def _strays(self, found: Verification) -> Iterator[str]:
        """Why a file is not a committed release of this run, for each that is not."""
        for path in self._files():
            entry = self._entry(path, found)
            if entry is None:
                yield f"Expected a RESERVE line for every release, got none for {path}."
            elif entry.is_open:
                yield f"Expected a COMMIT line for every release, got {path}, which is staged, not committed."
            elif entry.abort_code is not None:
                yield f"Expected a COMMIT line for every release, got {path} of a round aborted: {entry.abort_code}."
            elif self.run in found.runs and entry.run != self.run:
                yield f"Expected releases of run={self.run!r}, got {path} of run={entry.run!r}."

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"*{_SUFFIX}"))

    def _entry(self, path: Path, found: Verification) -> Round | None:
        """The round that a file is named after, if there is one: there may be many more rounds than files."""
        entry = found.rounds.at_sequence(int(path.stem)) if _is_number(path.stem) else None
        return entry if entry is not None and self.path(entry) == path else None


def run_of(release: Path) -> str | None:
    """The run whose `release` folder this is, as the released model says; None where it does not.

    Raises:
        UmbelError: If there is a model that cannot be read.
    """
    model = release / "model.safetensors"
    run = unpack(model)[1].get("run") if model.exists() else None
    return None if run is None else str(run)


def verify_release(ledger: Path, releases: Releases, **known: Any) -> Verification:
    """`verify` a ledger and the releases beside it.

    Args:
        ledger: The file of lines.
        releases: What must be in the folder.
        known: `public_key`, `anchor` and `all_signatures` of `verify`.

    Raises:
        UmbelError: If a file cannot be read.
    """
    wrong: list[Path] = []

    def is_found(entry: Round) -> bool:
        if releases.may_lack(entry) or releases.holds(entry):
            return True
        wrong.append(releases.path(entry))
        return False

    found = verify(ledger, release_found=is_found, **known)
    if wrong:
        what = "has other bytes" if wrong[0].exists() else "is missing"
        return dataclasses.replace(found, reason=f"{found.reason} {wrong[0]} {what}: get the release again.")
    if found.status != "failed" and (reason := releases.problem(found)):
        return dataclasses.replace(found, status="failed", reason=reason)
    return found
