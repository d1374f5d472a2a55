"""The server's state on disk: only functions of releases, so a checkpoint may be seen by anybody."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from common.data import DataSchema
from common.errors import UmbelError
from common.files import make_folder, pack, storing, unpack, write_durably
from common.model import SharedModel
from server.algorithms import State
from server.networks import NetworkState
from server.rounds import ServerState
from server.statistics import StatisticsState

_KEPT = 2
_STATES: dict[str, type[State]] = {
    "gradient": ServerState,
    "statistics": StatisticsState,
    "network": NetworkState,
}


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """A state, and the ledger it belongs to.

    Attributes:
        state: The server's.
        sequence: RESERVE line of the last release in it; -1 before the first.
        ledger_sequence: Last line of the ledger when it was written.
        ledger_head: The ledger's head there, hex.
    """

    state: State
    sequence: int = -1
    ledger_sequence: int = -1
    ledger_head: str = ""


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, and drop all but the newest two.

    Raises:
        StorageError: If the disk fails; the newest checkpoint that was there still is.
    """
    make_folder(folder)
    state, sequence = checkpoint.state, checkpoint.sequence
    values = {field.name: getattr(state, field.name) for field in fields(state) if field.name != "model"}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    facts = {name: value for name, value in values.items() if name not in arrays}
    arrays |= {"beta": state.model.beta, "U": state.model.U}
    facts |= {
        "kind": next(kind for kind, known in _STATES.items() if isinstance(state, known)),
        "sequence": sequence,
        "ledger_sequence": checkpoint.ledger_sequence,
        "ledger_head": checkpoint.ledger_head,
        "b_variance": state.model.b_variance,
        "noise_variance": state.model.noise_variance,
    }
    write_durably(folder / f"{sequence:09d}.safetensors", pack(arrays, facts))
    with storing(folder):
        for old in sorted(folder.glob("*.safetensors"))[:-_KEPT]:
            old.unlink()


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest checkpoint; None where there is none.

    Raises:
        UmbelError: If the newest is not readable.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    arrays, facts = unpack(files[-1])
    try:
        return _checkpoint(arrays, facts)
    except (KeyError, TypeError, ValueError) as error:
        raise UmbelError(
            f"Expected {files[-1]} as this version of umbel writes it, got other fields. Resume with the version that "
            "started the run."
        ) from error


def _checkpoint(arrays: dict[str, Any], facts: dict[str, Any]) -> Checkpoint:
    model = SharedModel(
        beta=arrays.pop("beta"),
        U=arrays.pop("U"),
        b_variance=facts.pop("b_variance"),
        noise_variance=facts.pop("noise_variance"),
    )
    sequence, ledger_sequence = int(facts.pop("sequence")), int(facts.pop("ledger_sequence"))
    ledger_head = str(facts.pop("ledger_head"))
    values: dict[str, Any] = {"model": model, **arrays, **facts}
    state = _STATES[values.pop("kind")](**values)
    return Checkpoint(state=state, sequence=sequence, ledger_sequence=ledger_sequence, ledger_head=ledger_head)


def save_schema(path: Path, schema: DataSchema) -> None:
    """Write the public facts about the data that server and nodes agree on."""
    facts = {
        "feature_names": list(schema.feature_names),
        "target_range": list(schema.target_range),
        "target_offset": schema.target_offset,
        "feature_bound": schema.feature_bound,
    }
    write_durably(path, pack({"feature_second_moment": schema.feature_second_moment}, facts))


def load_schema(path: Path) -> DataSchema:
    """Inverse of `save_schema`."""
    arrays, facts = unpack(path)
    low, high = facts["target_range"]
    return DataSchema(
        feature_names=tuple(facts["feature_names"]),
        feature_second_moment=arrays["feature_second_moment"],
        target_range=(low, high),
        target_offset=facts["target_offset"],
        feature_bound=facts["feature_bound"],
    )


def save_model(path: Path, model: SharedModel, facts: dict[str, object]) -> None:
    """Write a released model; `facts` are public and say what it is."""
    variances = {"b_variance": model.b_variance, "noise_variance": model.noise_variance}
    write_durably(path, pack({"beta": model.beta, "U": model.U}, {**facts, **variances}))


def load_model(path: Path) -> tuple[SharedModel, dict[str, object]]:
    """Inverse of `save_model`.

    Raises:
        UmbelError: If it is not a released model.
    """
    arrays, facts = unpack(path)
    try:
        model = SharedModel(
            beta=arrays["beta"],
            U=arrays["U"],
            b_variance=float(facts.pop("b_variance")),
            noise_variance=float(facts.pop("noise_variance")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UmbelError(f"Expected a released model at {path}, got another file of umbel's. Restore it.") from error
    return model, facts
