"""What a device answers for its own users, from what it keeps: no server, no Flower, nothing that leaves."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from client.kept_model import KeptModel
from client.settings import NodeSettings, load_settings
from client.store import DeviceStore
from client.store_file import MEMORY
from common.errors import UmbelError
from common.loading import load_inputs, public_schema
from common.model import Array, SharedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Personal:
    """The parameters that a user's predictions are made with.

    Attributes:
        theta: `d`, beta + U w + b; beta alone where nothing is kept of the user.
        kept: The model behind it.
        source: "posterior", or "prior" where nothing is kept of the user.
    """

    theta: Array
    kept: KeptModel
    source: str


def scores(X: Array, theta: Array, *, family: str, target_offset: float) -> Array:
    """`N`, what is expected of y: x'theta in the target's own units, or for `logistic` the probability of a 1.

    Args:
        X: `N x d`.
        theta: `d`.
        family: Loss family.
        target_offset: What was taken off the target.
    """
    eta: Array = (X * theta).sum(axis=1)
    if family == "logistic":
        return np.where(eta >= 0, 1.0, np.exp(-np.abs(eta))) / (1.0 + np.exp(-np.abs(eta)))
    return eta + target_offset


def prior_theta(model: SharedModel) -> Array:
    """`d`, the parameters of a user of whom nothing is known."""
    return model.beta


def personal(store: DeviceStore, user: str) -> Personal:
    """What the store has for a user.

    Raises:
        UmbelError: If the store has no model yet.
    """
    if store.known([user])[0]:
        states = store.load_states([user])
        if states.found[0]:
            record = store.load_model(states.model_digest[0].tobytes())
            if record is not None:
                kept = KeptModel.decode(record)
                return Personal(theta=states.with_model(kept.model).theta[0], kept=kept, source="posterior")
    newest = store.load_model()
    if newest is None:
        raise UmbelError(
            "Expected a model on this device, got none yet. It comes with the end of a run: keep umbel node running."
        )
    kept = KeptModel.decode(newest)
    return Personal(theta=prior_theta(kept.model), kept=kept, source="prior")


def open_store(settings: NodeSettings) -> DeviceStore:
    """The store of a node that has run before.

    Raises:
        UmbelError: If there is none.
        StorageError: If it cannot be read.
    """
    path = settings.store.format(partition=settings.partition)
    if path == MEMORY or not Path(path).is_file():
        raise UmbelError(f"Expected the node's store, got store={path}, which is not there. Run umbel node first.")
    return DeviceStore.open(path, ())


def predict(settings_path: Path, user: str, inputs: Path) -> dict[str, Any]:
    """Answer for every row of a file.

    Args:
        settings_path: The node's TOML file.
        user: Whose answers; who is unknown gets what is expected of anybody.
        inputs: A file with the columns that are declared as features, or with items.

    Returns:
        `user`, `source` ("posterior" or "prior"), `run`, `family`, `scores` (one a row; null where a row lacks a
        feature), `rows` (their numbers in the file) and `problems`.
    """
    settings = load_settings(settings_path)
    with open_store(settings) as store:
        found = personal(store, user)
    schema = public_schema(settings.data, settings.family)
    if found.kept.schema != schema.digest:
        raise UmbelError(
            "Expected the columns and the target's range of the kept model, got others in [data]. "
            "Undo the change, or wait for the end of the next run."
        )
    given = load_inputs(inputs, settings.data)
    values = scores(given.X, found.theta, family=found.kept.family, target_offset=schema.target_offset)
    return {
        "user": user,
        "source": found.source,
        "run": found.kept.run,
        "family": found.kept.family,
        "rows": given.row.tolist(),
        "scores": [float(v) if good else None for v, good in zip(values, given.usable, strict=True)],
        "problems": list(given.problems),
    }
