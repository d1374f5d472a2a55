"""The released model that a run starts from: whose it is, and whether it fits.

A start is public or charged. A model that was released under the ledger that the run charges is post-processing of what
that ledger has counted, so starting from it costs nothing more, and what both runs release composes in that ledger. A
model of other users costs them nothing here only if everybody may have it: that nobody can check, so the operator has
to say it (`training.start_is_public`), and START does so too.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from common.config import Config
from common.data import DataSchema
from common.errors import UmbelError
from common.model import SharedModel
from server.checkpoint import load_model

_SHOWN = 3


@dataclass(frozen=True, kw_only=True, eq=False)
class StartModel:
    """A released model to start from.

    Attributes:
        path: Where it was read.
        model: The prior.
        facts: What its file says it is.
        data: All bytes of the file.
    """

    path: Path
    model: SharedModel
    facts: Mapping[str, Any]
    data: bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the file, hex."""
        return sha256(self.data).hexdigest()

    @property
    def run(self) -> str:
        """The run that released it."""
        return str(self.facts.get("run"))

    @property
    def ledger_id(self) -> str:
        """The ledger that paid for it."""
        return str(self.facts.get("ledger_id"))

    @property
    def reasons_against(self) -> tuple[str, ...]:
        """Why nothing is promised of it, if so."""
        found = self.facts.get("not_private", ["its file does not say whether it is private"])
        return tuple(map(str, found if isinstance(found, list) else [found]))

    def in_start_line(self, *, is_public: bool) -> dict[str, Any]:
        """What the START line of a run says of where it starts."""
        return {"digest": self.digest, "is_public": is_public, "ledger_id": self.ledger_id, "run": self.run}


def read_start(path: Path) -> StartModel:
    """Read a released model.

    Raises:
        UmbelError: If it is none.
    """
    model, facts = load_model(path)
    return StartModel(path=path, model=model, facts=facts, data=path.read_bytes())


def check_fits_model(start: StartModel, config: Config, schema: DataSchema) -> None:
    """Refuse a model of another kind than the run is to train.

    A smaller rank fits: see `server.initialization.widened`.

    Raises:
        UmbelError: Naming what differs, and the remedy.
    """
    facts, model = start.facts, start.model
    kinds = {"training.algorithm": config.training.algorithm, "model.family": config.model.family}
    for key, wanted in kinds.items():
        found = facts.get(key.partition(".")[2])
        if found != wanted:
            raise UmbelError(
                f"Expected training.start with {key}={wanted!r} as the run has it, got {start.path} with {found!r}. "
                f"Set {key} to that, or start from another model."
            )
    names = facts.get("feature_names")
    if (model.dimension, names) != (schema.dimension, list(schema.feature_names)):
        raise UmbelError(
            f"Expected training.start with the {schema.dimension} features of the data in their order, got "
            f"{start.path} with {model.dimension} features{_other_names(names, schema.feature_names)}. "
            "Declare the same [data], or start from another model."
        )
    if facts.get("target_offset") != schema.target_offset:
        raise UmbelError(
            f"Expected training.start with target_offset={schema.target_offset}, got {start.path} with "
            f"{facts.get('target_offset')}. Set data.target_offset to that, or start from another model."
        )
    if model.rank > config.model.rank:
        raise UmbelError(
            f"Expected model.rank >= {model.rank} as {start.path} has it, got model.rank={config.model.rank}. "
            "Raise it, or leave it out."
        )


def check_may_start(
    start: StartModel, *, ledger_id: str | None, runs: Collection[str], is_private: bool, is_public: bool
) -> None:
    """Refuse a model that is neither charged to the run's ledger nor declared public.

    Args:
        start: The model.
        ledger_id: Of the ledger that the run charges; None for one that is new.
        runs: Runs that it has.
        is_private: Whether the run promises anything.
        is_public: Whether the operator says that everybody may have the model, whatever it was trained on.

    Raises:
        UmbelError: Saying why, and the remedy.
    """
    if start.ledger_id != ledger_id:
        if is_public:
            return
        raise UmbelError(
            f"Expected training.start of the ledger that the run charges ({ledger_id or 'a new one'}), got "
            f"{start.path} of ledger {start.ledger_id}: what it tells about the users it was trained on would be "
            "counted nowhere. Name that ledger with --ledger; or, if everybody may have this model, set "
            "training.start_is_public=true."
        )
    if start.run not in runs:
        raise UmbelError(
            f"Expected training.start of a run in the ledger, got {start.path} of run={start.run!r}, which it does not "
            "have: it is an older copy. Put the newest one back."
        )
    if is_private and start.reasons_against:
        raise UmbelError(
            f"Expected training.start with a promise for a private run, got {start.path}, which is NOT PRIVATE: "
            f"{'; '.join(start.reasons_against)}. Start from another model, or from none."
        )


def _other_names(found: Any, expected: tuple[str, ...]) -> str:
    if not isinstance(found, list):
        return ""
    others = [str(name) for name in found if name not in expected]
    return f", among them {', '.join(others[:_SHOWN])}" if others else ""
