"""What a round asks of a node that trains a network, as functions of a batch of its users."""

from collections.abc import Callable

import numpy as np
import torch

from client.batches import Batch, Design
from client.network_contribution import contribute
from client.network_fit import Examples, Likelihood, NetworkFit, fit
from client.shard import Shard
from common.data import DataSchema, Population
from common.encoding import INTERCEPT
from common.errors import Refused
from common.families import FAMILIES
from common.model import IntArray, PersonalState, SharedModel
from common.networks import AdaptedNetwork, adapt, load_module
from common.task import Task
from privacy.layout import Layout

CHUNK_BYTES = 2**25
"""More than a linear model's: a network's users are worked on one after the other inside of every operation."""
_FLOATS_OF_SHARED = 6
_FLOATS_OF_THETA = 6


def num_inputs(schema: DataSchema) -> int:
    """Numbers that a network is given of an example: all features but the intercept."""
    return schema.dimension - (schema.feature_names[-1] == INTERCEPT)


def num_outputs(schema: DataSchema, family: str) -> int:
    """Numbers that a network has to give: one, or one for every class that the target's range declares."""
    return int(schema.target_range[1]) + 1 if family == "softmax" else 1


def network_for(place: str, task: Task, schema: DataSchema, *, device: str = "cpu") -> AdaptedNetwork:
    """The node's own module, adapted as a task says.

    Raises:
        Refused: With code `policy_shape`, if that is not the network that the task is for.
        UmbelError: If the node's module cannot be adapted.
    """
    adapters = task.adapters
    if adapters is None:
        raise Refused("policy_shape", "Expected a task for a network, got another.")
    network = adapt(
        load_module(place),
        inputs=num_inputs(schema),
        outputs=num_outputs(schema, task.family),
        rank=adapters.rank,
        sparsity=task.sparsity,
        layers=adapters.layers,
        form=adapters.form,
        train_base=adapters.train_base,
    )
    if (network.architecture.digest, network.architecture.trained_size) != (adapters.architecture, adapters.trained):
        raise Refused("policy_shape", "Expected a task for this node's network, got one for another architecture.")
    return network.to(device)


def network_shard(population: Population, schema: DataSchema, network: AdaptedNetwork, family: str) -> Shard:
    """The users in chunks that leave room for their networks."""
    architecture = network.architecture
    floats = _FLOATS_OF_SHARED * architecture.shared_size + _FLOATS_OF_THETA * architecture.num_parameters
    return Shard(
        population,
        schema,
        FAMILIES[family],
        chunk_bytes=CHUNK_BYTES,
        result_bytes=4 * floats,
        keep_examples=True,
    )


def contribution_to_network(
    network: AdaptedNetwork,
    task: Task,
    model: SharedModel,
    *,
    clipping_norm: float,
    layout: Layout,
    one_by_one: bool = True,
) -> Callable[[Batch], IntArray]:
    """`n x D` int64 of a batch: each user's clipped vector on the grid, zeros where there is nothing to say.

    With `one_by_one` as in `client.network_contribution.contribute`.
    """
    shared, likelihood, adapters = _tensor(model.beta, network), _likelihood(task, model), task.adapters
    if adapters is None:
        raise TypeError("Expected a task for a network, got another.")

    def contribution(batch: Batch) -> IntArray:
        grid: IntArray = contribute(
            network,
            shared,
            examples_of(batch, network),
            adapters,
            likelihood=likelihood,
            b_variance=model.b_variance,
            clipping_norm=clipping_norm,
            layout=layout,
            one_by_one=one_by_one,
        )
        return grid

    return contribution


def network_fit(network: AdaptedNetwork, task: Task, model: SharedModel) -> Callable[[Batch], NetworkFit]:
    """Each user's personal part under a released model."""
    shared, likelihood, adapters = _tensor(model.beta, network), _likelihood(task, model), task.adapters
    steps = 1 if adapters is None else adapters.steps

    def fitted(batch: Batch) -> NetworkFit:
        examples = examples_of(batch, network)
        return fit(network, shared, examples, likelihood=likelihood, b_variance=model.b_variance, steps=steps)

    return fitted


def network_state(network: AdaptedNetwork, task: Task, model: SharedModel) -> Callable[[Batch], PersonalState]:
    """What the device keeps of each user of a batch."""
    fitted = network_fit(network, task, model)

    def state(batch: Batch) -> PersonalState:
        found = fitted(batch)
        w, b = (values.cpu().numpy().astype(np.float64) for values in (found.w, found.b))
        return PersonalState(
            w=w,
            support=found.support.cpu().numpy(),
            b=b,
            scale=np.ones(len(w)),
            precision=found.precision.cpu().numpy().astype(np.float64),
            theta=found.theta.cpu().numpy(),
        )

    return state


def examples_of(batch: Batch, network: AdaptedNetwork) -> Examples:
    """A batch as a network is given it."""
    if not isinstance(batch, Design):
        raise TypeError(f"Expected a Design for a network, got {type(batch).__name__}.")
    X, y, weight = (_tensor(values, network) for values in (batch.X[..., : network.inputs], batch.y, batch.weight))
    return Examples(X=X, y=y, weight=weight)


def _likelihood(task: Task, model: SharedModel) -> Likelihood:
    return Likelihood(family=task.family, noise_variance=model.noise_variance if task.family == "squared" else 1.0)


def _tensor(values: object, network: AdaptedNetwork) -> torch.Tensor:
    return torch.from_numpy(np.array(values, np.float32)).to(network.base.device)
