"""From `training.start` to a model that a new run may start from, before the run folder is made."""

from collections.abc import Collection
from pathlib import Path
from typing import Protocol

from common.config import Config
from common.data import DataSchema
from common.errors import UmbelError, VerificationError
from privacy.ledger import PrivacyLedger
from server.settings import RunFolder
from server.start import StartModel, check_fits_model, check_may_start, read_start
from umbel.auditing import audit


class Warned(Protocol):
    """Who is told what the user should know."""

    def warn(self, message: str) -> None:
        """Something the user should know."""


def find_start(config: Config, progress: Warned) -> StartModel | None:
    """The model that `training.start` names; None without it.

    That of a run folder is recomputed from the noised sums that its ledger committed, as `umbel audit` does.

    Raises:
        UmbelError: If there is no model.
        VerificationError: If it is not what the run's releases make.
    """
    if config.training.start is None:
        if config.training.start_is_public:
            raise UmbelError("Expected training.start with training.start_is_public=true, got none. Name a model.")
        return None
    path = Path(config.training.start)
    if not path.is_dir():
        progress.warn(f"{path} is taken as it is: only with its run folder can it be recomputed from the ledger.")
        return read_start(path)
    start = read_start(RunFolder(root=path).model)
    found = audit([path])
    status, reason = found["status"], found["reason"]
    if status == "failed":
        raise VerificationError(
            f"Expected training.start={path} to be as its ledger says, got a failed audit: {reason}"
        )
    checked = found["model"] or {"status": "not recomputed", "reason": "it is no run folder."}
    if checked["status"] != "recomputed":
        progress.warn(f"the model of {path} is taken as it is: {checked['reason']}")
    return start


def with_start(config: Config, start: StartModel | None) -> Config:
    """The configuration with the start's absolute path, and with its rank where it says nothing of the rank."""
    if start is None:
        return config
    path = str(Path(str(config.training.start)).resolve())
    changes: dict[str, object] = {"training": config.training.model_copy(update={"start": path})}
    if "rank" not in config.model.model_fields_set:
        changes["model"] = config.model.model_copy(update={"rank": start.model.rank})
    return config.model_copy(update=changes)


def check_start(
    start: StartModel | None,
    config: Config,
    schema: DataSchema,
    ledger: PrivacyLedger | None,
    *,
    is_private: bool,
    progress: Warned,
) -> None:
    """Refuse a start that the run must not or cannot have, before anything is written.

    Args:
        start: From `find_start`.
        config: With the shape of the run's model.
        schema: Of its data.
        ledger: That it charges; None for one that is new.
        is_private: Whether the run promises anything.
        progress: Who is told.

    Raises:
        UmbelError: Naming the reason and the remedy.
    """
    if start is None:
        return
    check_fits_model(start, config, schema)
    ledger_id = None if ledger is None else ledger.ledger_id
    runs: Collection[str] = () if ledger is None else ledger.runs
    is_public = config.training.start_is_public
    check_may_start(start, ledger_id=ledger_id, runs=runs, is_private=is_private, is_public=is_public)
    if start.ledger_id != ledger_id and start.reasons_against and is_private:
        progress.warn(
            f"{start.path} is NOT PRIVATE ({'; '.join(start.reasons_against)}): the promise of this run does not cover "
            "whom it was trained on. It is used because training.start_is_public says that everybody may have it."
        )
    if start.model.rank < config.model.rank:
        progress.warn(
            f"the start has rank {start.model.rank}: {config.model.rank - start.model.rank} more columns of U start in "
            "directions of the public features that it does not span."
        )
