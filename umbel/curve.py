"""Exact held-out error over the rounds of a simulation: from raw data, for the person who runs it, never published."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from client import sources
from common.families import FAMILIES
from common.model import SharedModel
from privacy.accounting import mu_curve
from privacy.audit.releases import Releases
from privacy.audit.verify import verify
from privacy.gaussian import epsilon_of_mu
from server.algorithms import algorithm_of
from server.settings import RunSettings
from umbel.baselines import theta_under, users_of
from umbel.evaluate import held_out_error
from umbel.replay import models_of

_MOST_POINTS = 5  # each costs what fitting every user's personal model does


def error_curve(settings: RunSettings) -> list[dict[str, Any]]:
    """The error of all users' personal models under the model before the run, after its last round, and in between.

    Args:
        settings: A run that has finished training.

    Returns:
        At most five points, `round` (0 before the first), `epsilon` that the whole ledger had spent by then (None where
        that is infinite), and `error` (None where nothing is held out).
    """
    config, run, schema = settings.config, settings.run, settings.schema
    found = verify(Path(str(config.run.ledger)))
    delta, s = float(found.genesis["delta"]), int(found.genesis["max_nodes_per_user"])
    by_charge, rounds = mu_curve(found.noise_multipliers, s), found.rounds
    mu = (0.0, *(by_charge[rounds.charged_by(position) - 1] for position in range(len(rounds))))
    # a sampled run is charged as a whole before its first round, with all that others may spend
    whole = None if found.sampled is None else float(found.sampled.amplified_epsilon)
    spent = [epsilon_of_mu(each, delta) if whole is None or each == 0 else whole for each in mu]
    charged = [
        (entry.server_round, number)
        for number, entry in enumerate(found.rounds, 1)
        if entry.run == run and entry.release_digest
    ]
    if not charged:
        return []
    steps = [(0, charged[0][1] - 1), *charged]
    shown = set(np.linspace(0, len(steps) - 1, min(_MOST_POINTS, len(steps))).round().astype(int).tolist())
    error_of = _error_of(settings)
    releases = Releases(folder=settings.folder.rounds, run=run)
    points = []
    start = None if settings.start is None else settings.start.model
    models = models_of(config, run, releases, found, schema, start=start, network=settings.network)
    for index, model in enumerate(models):
        if index in shown:
            server_round, number = steps[index]
            epsilon = spent[number]
            known = epsilon if np.isfinite(epsilon) else None
            points.append({"round": server_round, "epsilon": known, "error": error_of(model)})
    return points


def _error_of(settings: RunSettings) -> Callable[[SharedModel], float | None]:
    """The error of all users' personal models under a released one."""
    config, schema = settings.config, settings.schema
    if settings.network is not None:
        from umbel.network_results import network_error_of  # noqa: PLC0415 (torch's world only where it is needed)

        return network_error_of(config, schema, settings.network)
    source, family = sources.read(config.data, config.model.family), FAMILIES[config.model.family]
    users, task = users_of(source.train, schema, family), algorithm_of(config).personal_task

    def error_of(model: SharedModel) -> float | None:
        return held_out_error(theta_under(users, task, model), source.test, source.train, family).error()

    return error_of
