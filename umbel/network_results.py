"""Held-out errors of a network and of what it is compared with: evaluation, from raw data, never published.

The private baselines spend the same (epsilon, delta) with the same mechanism, rounds and step sizes. What a user keeps
is fitted on that user's training examples alone; how far fine-tuning goes is chosen on a validation part of them, by
one rule for all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.func import vmap

from client import sources
from client.batches import Batch, Chunk, cleaned, design_of
from client.guard import Policy
from client.network_fit import Likelihood, gradient_in_theta
from client.network_work import (
    contribution_to_network,
    examples_of,
    network_fit,
    network_for,
    network_shard,
    num_inputs,
    num_outputs,
)
from client.shard import Shard, total_contribution
from common.config import Config
from common.data import DataSchema, Population, select
from common.errors import UmbelError
from common.families import FAMILIES
from common.model import SharedModel
from common.networks import AdaptedNetwork, adapt, load_module, load_weights
from common.task import Task
from privacy.layout import groups_of_event
from server.algorithms import layout_of_task
from server.initialization import tie_breaker
from server.networks import NetworkGradient, NetworkStart, first_shared
from umbel.baselines import Mechanism, released, validation_split
from umbel.evaluate import HeldOut

Tensor = torch.Tensor
STEP_SIZES = (0.03, 0.1, 0.3)
NUM_STEPS = (0, 1, 2, 5, 10, 20, 40)
"""Plain gradient steps on an average example's loss, tried on the validation part, of the two fine-tuned baselines."""
_MOST_VALIDATION_USERS = 500


def start_of(
    config: Config, schema: DataSchema, *, base: np.ndarray[Any, Any] | None = None
) -> tuple[AdaptedNetwork, np.ndarray[Any, Any]]:
    """The configured network, and where it starts, which is public.

    Args:
        config: Of the run.
        schema: Public facts about the data.
        base: `P` to start from; by default `network.weights`, or what the module comes with.

    Raises:
        UmbelError: If it cannot be trained; says why.
    """
    settings = config.network
    for name in ("rank", "sparsity"):
        if (value := getattr(config.model, name)) > Policy.max_rank:
            raise UmbelError(
                f"Expected model.{name} <= {Policy.max_rank} of each layer of a network, got model.{name}={value}. "
                "Lower it."
            )
    network = adapt(
        load_module(str(settings.module)),
        inputs=num_inputs(schema),
        outputs=num_outputs(schema, config.model.family),
        rank=config.model.rank,
        sparsity=config.model.sparsity,
        layers=settings.layers,
        form=settings.form,
        train_base=settings.train_base,
    )
    if base is None:
        base = (network.base if settings.weights is None else load_weights(network, Path(settings.weights))).numpy()
    rng = tie_breaker(str(config.run.name), config.privacy.seed)
    return network, first_shared(network.architecture, base, U_scale=settings.U_scale, rng=rng)


def network_trajectory(
    shard: Shard, algorithm: NetworkGradient, network: AdaptedNetwork, *, mechanism: Mechanism
) -> Iterator[SharedModel]:
    """The training of `server.training` without messages, ledger and devices: the model before and each round's."""
    schema, users = shard.schema, shard.population.num_users
    state = algorithm.first_state(schema, np.random.default_rng(0))  # which is in `algorithm.start`
    yield state.model
    for _ in range(mechanism.rounds):
        task = algorithm.task(state)
        layout = layout_of_task(task, schema.dimension, 0, private=mechanism.z > 0)
        # nobody is promised anything here, so users may be worked on together
        contribution = contribution_to_network(
            network, task, state.model, clipping_norm=state.clipping_norm, layout=layout, one_by_one=False
        )
        total = total_contribution(shard, contribution, size=layout.size, admitted=np.ones(users, np.bool_))
        noised = released([total], layout, mechanism)
        event = {
            "groups": groups_of_event(layout),
            "grid_scale": layout.grid_scale,
            "clipping_norm": state.clipping_norm,
            "noise_multiplier": mechanism.noise_multiplier,
            "denominator": users,
        }
        state = algorithm.step(state, noised, event)
        yield state.model


@dataclass(frozen=True, kw_only=True, eq=False)
class NetworkErrors:
    """What was found on held-out examples.

    Attributes:
        loss: The family's own error.
        error_rate: Share of examples whose class is not the most probable one; None but for classes.
    """

    loss: HeldOut
    error_rate: HeldOut | None


class Scorer:
    """Held-out losses of users' own networks, batch by batch."""

    def __init__(self, train: Population, test: Population, schema: DataSchema, family: str) -> None:
        """Both parts have the same users in the same order."""
        self.train, self.schema, self.family = train, schema, family
        self._test = cleaned(test, schema)

    def score(self, network: AdaptedNetwork, theta_of: Callable[[Batch], Tensor]) -> NetworkErrors:
        """Every user's held-out loss, with parameters (`n x P`) made of a batch of training examples."""
        (errors,) = self.score_path(network, lambda batch: [theta_of(batch)], 1)
        return errors

    def score_path(
        self, network: AdaptedNetwork, path_of: Callable[[Batch], Iterable[Tensor]], length: int
    ) -> list[NetworkErrors]:
        """The same for several parameters of each user, `length` of them."""
        counts, family = self._test.counts, FAMILIES[self.family]
        loss, wrong = np.zeros((length, len(counts))), np.zeros((length, len(counts)))
        for chunk, batch in network_shard(self.train, self.schema, network, self.family).batches():
            longest = max(int(counts[chunk.users].max()), 1)
            test = design_of(self._test, Chunk(users=chunk.users, length=longest))
            X = examples_of(test, network).X
            for place, theta in enumerate(path_of(batch)):
                eta = vmap(network.outputs)(theta, X).numpy().astype(np.float64)
                each = family.loss(eta if self.family == "softmax" else eta[..., 0], test.y)
                loss[place, chunk.users] = (test.weight * each).sum(axis=1)
                wrong[place, chunk.users] = (test.weight * (eta.argmax(axis=-1) != test.y)).sum(axis=1)
        held_out = partial(HeldOut, count=counts.astype(np.float64), train_count=self.train.counts.astype(np.float64))
        return [
            NetworkErrors(
                loss=held_out(metric=family.metric, loss=loss[place]),
                error_rate=held_out(metric="error_rate", loss=wrong[place]) if self.family == "softmax" else None,
            )
            for place in range(length)
        ]


def evaluate_network(
    config: Config,
    schema: DataSchema,
    model: SharedModel,
    start: NetworkStart,
    *,
    with_baselines: bool,
    mechanisms: tuple[Mechanism, Mechanism],
    on_step: Callable[[str], None],
) -> tuple[NetworkErrors, dict[str, NetworkErrors], dict[str, Any]]:
    """Held-out errors of a released network and of what it is compared with.

    Args:
        config: Of the run.
        schema: Public facts about the data.
        model: The released model.
        start: Where the run started.
        with_baselines: Whether to train the baselines too.
        mechanisms: The run's own, and none.
        on_step: Called with the name of what is being computed.

    Returns:
        Ours, the baselines by name, and what was chosen on validation examples.
    """
    source = sources.read(config.data, config.model.family)
    scorer = Scorer(source.train, source.test, schema, config.model.family)
    evaluation = NetworkEvaluation(config, schema, start, scorer)
    on_step("personal networks")
    ours = evaluation.personalized(evaluation.algorithm(), model)
    if not with_baselines:
        return ours, {}, {}
    private, plain = mechanisms
    found: dict[str, NetworkErrors] = {}
    chosen: dict[str, Any] = {}
    on_step("one global network")
    whole = evaluation.algorithm(rank=0, sparsity=0, train_base=True)
    center = evaluation.trained(whole, private)
    found["global"] = evaluation.personalized(whole, center)
    tuned = evaluation.fine_tuned(np.asarray(start.shared), part="all", on_step=on_step, name="each user alone")
    found["alone"], chosen["alone"] = tuned
    for name, part, what in (
        ("fine_tuned", "all", "fine-tuning the global network"),
        ("last_layer", "last", "fine-tuning its last layer"),
    ):
        found[name], chosen[name] = evaluation.fine_tuned(center.beta, part=part, on_step=on_step, name=what)
    on_step("low rank only")
    low_rank = evaluation.algorithm(sparsity=0)
    found["low_rank"] = evaluation.personalized(low_rank, evaluation.trained(low_rank, private))
    if private.z > 0:
        on_step("without privacy")
        algorithm = evaluation.algorithm()
        found["non_private"] = evaluation.personalized(algorithm, evaluation.trained(algorithm, plain))
    return ours, found, chosen


def network_error_of(config: Config, schema: DataSchema, start: NetworkStart) -> Callable[[SharedModel], float | None]:
    """The error of all users' networks under a released model, as a function of it."""
    source = sources.read(config.data, config.model.family)
    evaluation = NetworkEvaluation(
        config, schema, start, Scorer(source.train, source.test, schema, config.model.family)
    )
    algorithm = evaluation.algorithm()
    return lambda model: evaluation.personalized(algorithm, model).loss.error()


class NetworkEvaluation:
    """The parts that all methods of one run have in common."""

    def __init__(self, config: Config, schema: DataSchema, start: NetworkStart, scorer: Scorer) -> None:
        self._config, self._schema, self._start, self._scorer = config, schema, start, scorer
        self._base = start.shared[: start.architecture.num_parameters]

    def algorithm(
        self, *, rank: int | None = None, sparsity: int | None = None, train_base: bool | None = None
    ) -> NetworkGradient:
        """The run's, with another rank, sparsity or base."""
        config, settings = self._config, self._config.network
        settings = settings.model_copy(update={"train_base": settings.train_base if train_base is None else train_base})
        rank = config.model.rank if rank is None else rank
        sparsity = config.model.sparsity if sparsity is None else sparsity
        changed = config.model_copy(
            update={
                "network": settings,
                "model": config.model.model_copy(update={"rank": rank, "sparsity": sparsity}),
            }
        )
        network, shared = start_of(changed, self._schema, base=self._base)
        start = NetworkStart(architecture=network.architecture, shared=shared, digest="")
        clipping = config.privacy.clipping
        return NetworkGradient(
            family=config.model.family,
            rank=rank,
            sparsity=sparsity,
            clipping_norm=None if clipping == "adaptive" else float(clipping),
            settings=settings,
            start=start,
        )

    def network(self, task: Task) -> AdaptedNetwork:
        """The module as a task wants it."""
        return network_for(str(self._config.network.module), task, self._schema)

    def trained(self, algorithm: NetworkGradient, mechanism: Mechanism) -> SharedModel:
        """The last model of a training like the run's."""
        network = self.network(algorithm.personal_task)
        shard = network_shard(self._scorer.train, self._schema, network, self._config.model.family)
        *_, model = network_trajectory(shard, algorithm, network, mechanism=mechanism)
        return model

    def personalized(self, algorithm: NetworkGradient, model: SharedModel) -> NetworkErrors:
        """The error of all users' networks under a released model."""
        task = algorithm.personal_task
        network = self.network(task)
        fitted = network_fit(network, task, model)
        return self._scorer.score(network, lambda batch: fitted(batch).theta)

    def fine_tuned(
        self, shared: np.ndarray[Any, Any], *, part: str, on_step: Callable[[str], None], name: str
    ) -> tuple[NetworkErrors, dict[str, float]]:
        """Users who move all weights, or the last layer's, by gradient steps from a base.

        How many steps of which size is chosen once for all users on a validation part of the training examples.
        """
        on_step(name)
        family = self._config.model.family
        fit, validation = validation_split(self._scorer.train, self._config.data.split_seed)
        network = self.network(self.algorithm(rank=0, sparsity=0, train_base=True).personal_task)
        base = torch.from_numpy(np.array(shared[: network.architecture.num_parameters], np.float32))
        last = network.architecture.layers[-1]
        moved = torch.ones_like(base)
        if part == "last":
            moved[: last.start] = 0
        descent = partial(_descent, network, base, moved, Likelihood(family=family))
        inner = Scorer(_first_users(fit), _first_users(validation), self._schema, family)
        best = (float("inf"), STEP_SIZES[0], 0)
        for size in STEP_SIZES:
            found = inner.score_path(network, partial(descent, step_size=size, shown=NUM_STEPS), len(NUM_STEPS))
            for steps, errors in zip(NUM_STEPS, found, strict=True):
                error = errors.loss.error()
                if error is not None and error < best[0]:
                    best = (error, size, steps)
        _, size, steps = best
        (errors,) = self._scorer.score_path(network, partial(descent, step_size=size, shown=(steps,)), 1)
        return errors, {"step_size": size, "steps": float(steps)}


def _first_users(population: Population) -> Population:
    return select(population, np.arange(min(population.num_users, _MOST_VALIDATION_USERS)))


def _descent(
    network: AdaptedNetwork,
    base: Tensor,
    moved: Tensor,
    likelihood: Likelihood,
    batch: Batch,
    *,
    step_size: float,
    shown: Sequence[int],
) -> Iterator[Tensor]:
    """`n x P` of a batch after so many gradient steps from the base on each user's average loss."""
    examples = examples_of(batch, network)
    scale = moved / examples.weight.sum(1).clamp(min=1.0)[:, None]
    theta = base.expand(len(examples.X), -1)
    for step in range(max(shown) + 1):
        if step in shown:
            yield theta
        theta = theta - step_size * scale * gradient_in_theta(network, theta, examples, likelihood)
