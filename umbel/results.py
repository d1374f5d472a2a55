"""What a simulation says at its end: one object for machines, whose keys are an interface."""

import resource
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from client import sources
from common.config import Config
from common.data import DataSchema
from common.families import FAMILIES
from common.model import SharedModel
from privacy.entropy import NoiseSource, NoNoise, SystemNoise
from server.algorithms import algorithm_of
from server.initialization import tie_breaker
from server.networks import NetworkStart
from server.settings import RunSettings
from umbel.baselines import (
    Mechanism,
    Users,
    choose_penalty,
    learn,
    private_global,
    ridge,
    theta_under,
    users_of,
    validation_split,
)
from umbel.evaluate import HeldOut, held_out_error
from umbel.plan import least_noise

_STEPS = {"low_rank": "low rank only", "non_private": "without privacy", "gradient": "the default algorithm"}


def evaluate(
    settings: RunSettings, model: SharedModel, *, with_baselines: bool, on_step: Any
) -> tuple[HeldOut, dict[str, HeldOut], dict[str, Any], dict[str, Any]]:
    """Held-out errors of a released model and of everything it is compared with.

    Args:
        settings: Of the run.
        model: The released model.
        with_baselines: Whether to train the baselines too.
        on_step: Called with the name of what is being computed.

    Returns:
        Ours, the baselines by name, what was chosen on validation examples, and further sections of the results.
    """
    if settings.network is not None:
        return _evaluate_network(settings, settings.network, model, with_baselines=with_baselines, on_step=on_step)
    return *_evaluate_linear(settings.config, settings.schema, model, with_baselines, on_step), {}


def _evaluate_network(
    settings: RunSettings, start: NetworkStart, model: SharedModel, *, with_baselines: bool, on_step: Any
) -> tuple[HeldOut, dict[str, HeldOut], dict[str, Any], dict[str, Any]]:
    from umbel.network_results import evaluate_network  # noqa: PLC0415 (torch's world only where there is a network)

    ours, found, chosen = evaluate_network(
        settings.config,
        settings.schema,
        model,
        start,
        with_baselines=with_baselines,
        mechanisms=_mechanisms(settings.config),
        on_step=on_step,
    )
    architecture = start.architecture
    others: dict[str, Any] = {
        "network": {
            "parameters": architecture.num_parameters,
            "shared_numbers": architecture.trained_size,
            "personal_numbers": architecture.personal_numbers,
            "ratio": architecture.ratio,
            "storage": architecture.storage,
        }
    }
    if ours.error_rate is not None:
        others["error_rate"] = {
            "ours": ours.error_rate.summary(),
            **{name: errors.error_rate.summary() for name, errors in found.items() if errors.error_rate is not None},
        }
    return ours.loss, {name: errors.loss for name, errors in found.items()}, chosen, others


def _evaluate_linear(
    config: Config, schema: DataSchema, model: SharedModel, with_baselines: bool, on_step: Any
) -> tuple[HeldOut, dict[str, HeldOut], dict[str, Any]]:
    family = FAMILIES[config.model.family]
    source = sources.read(config.data, config.model.family)
    train, test = source.train, source.test
    users = users_of(train, schema, family)

    def score(theta: np.ndarray[Any, Any]) -> HeldOut:
        return held_out_error(theta, test, train, family)

    algorithm = algorithm_of(config)
    on_step("personal models")
    ours = score(theta_under(users, algorithm.personal_task, model))
    if not with_baselines:
        return ours, {}, {}
    fit, validation = validation_split(train, config.data.split_seed)
    fit_users = users_of(fit, schema, family)

    def validation_error(theta: np.ndarray[Any, Any]) -> float:
        error = held_out_error(theta, validation, fit, family).error()
        return float("inf") if error is None else error

    private, plain = _mechanisms(config)
    zeros = np.zeros(schema.dimension)
    found: dict[str, HeldOut] = {}
    penalties: dict[str, float] = {}
    on_step("one global model")
    center = private_global(users, private)
    found["global"] = score(center)
    on_step("each user alone")
    penalties["alone"] = choose_penalty(fit_users, validation_error, zeros)
    found["alone"] = score(ridge(users, zeros, penalties["alone"]))
    on_step("ridge around the global model")
    fit_center = private_global(fit_users, private)
    penalties["ridge_around_global"] = choose_penalty(fit_users, validation_error, fit_center)
    found["ridge_around_global"] = score(ridge(users, center, penalties["ridge_around_global"]))
    compared = {"low_rank": (_without_b(config), private), "non_private": (config, plain)}
    if config.training.algorithm != "gradient":
        compared["gradient"] = (_changed(config, "training", algorithm="gradient"), private)
    for name, (changed, mechanism) in compared.items():
        on_step(_STEPS[name])
        found[name] = score(_theta_of(users, changed, mechanism))
    return ours, found, penalties


def _theta_of(users: Users, config: Config, mechanism: Mechanism) -> np.ndarray[Any, Any]:
    """`n x d`, every user's parameters after a training as configured."""
    algorithm = algorithm_of(config)
    rng = tie_breaker(str(config.run.name), config.privacy.seed)
    return theta_under(users, algorithm.personal_task, learn(users, algorithm, mechanism=mechanism, rng=rng))


def _without_b(config: Config) -> Config:
    return _changed(config, "model", sparsity=0)


def _changed(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _mechanisms(config: Config) -> tuple[Mechanism, Mechanism]:
    """The run's own, or what its budget allows without sampling; and none."""
    rounds, z, privacy = config.training.rounds, str(config.run.noise_multiplier), config.privacy
    if privacy.sampling_probability is not None:
        # they run without sampling, at the same budget
        z = least_noise(float(privacy.epsilon), float(privacy.delta or 0), rounds, privacy.max_nodes_per_user)
    plain = Mechanism(noise_multiplier="0", rounds=rounds, noise=NoNoise)
    source: type[NoiseSource] = SystemNoise
    return (plain if z == "0" else Mechanism(noise_multiplier=z, rounds=rounds, noise=source)), plain


def peak_memory_bytes() -> int:
    """Peak resident size of this process and of its largest child."""
    unit = 1 if sys.platform == "darwin" else 1024
    usages = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return max(usages) * unit


def error_section(ours: HeldOut) -> dict[str, Any]:
    """`error` of the results."""
    return {**ours.summary(), "standard_error": ours.standard_error()}


def baseline_section(found: Mapping[str, HeldOut]) -> dict[str, Any]:
    """`baselines` of the results."""
    return {name: held_out.summary() for name, held_out in found.items()}
