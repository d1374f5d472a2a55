"""The network of a node, kept from round to round: adapted once for a task, with the users cut into chunks for it."""

from collections.abc import Callable

import torch

from client.batches import Batch
from client.network_work import contribution_to_network, network_for, network_shard, network_state
from client.shard import Shard
from common.data import DataSchema, Population
from common.errors import Refused
from common.model import IntArray, PersonalState, SharedModel
from common.networks import AdaptedNetwork
from common.task import Adapters, Task
from privacy.layout import Layout


class NodeNetworks:
    """What a node that trains a network does instead of what `client.work` does for linear models."""

    def __init__(self, place: str, schema: DataSchema, family: str, *, device: str = "cpu") -> None:
        """Check that the module is there and is one.

        Args:
            place: "FILE.py:FUNCTION" of the node's own configuration.
            schema: Public facts about the data.
            family: Loss family.
            device: Where it is computed.
        """
        # a node is one worker: cores are used by nodes, and what one computes depends on no other
        torch.set_num_threads(1)
        self._place, self._schema, self._family, self._device = place, schema, family, device
        self._adapted: tuple[Adapters | None, AdaptedNetwork | None] = (None, None)
        self._population: Population | None = None
        self._shard: Shard | None = None

    def shard_for(self, task: Task, population: Population) -> Shard:
        """The users, cut once for as long as neither they nor the network change."""
        network = self._network_for(task)
        if self._shard is None or self._population is not population:
            self._shard = network_shard(population, self._schema, network, self._family)
            self._population = population
        return self._shard

    def contribution_to(
        self, task: Task, model: SharedModel, *, clipping_norm: float, layout: Layout
    ) -> Callable[[Batch], IntArray]:
        """See `client.work.contribution_to`."""
        network = self._network_of(task, model)
        return contribution_to_network(network, task, model, clipping_norm=clipping_norm, layout=layout)

    def personal_state(self, task: Task, model: SharedModel) -> Callable[[Batch], PersonalState]:
        """See `client.work.personal_state`."""
        return network_state(self._network_of(task, model), task, model)

    def _network_of(self, task: Task, model: SharedModel) -> AdaptedNetwork:
        """The network, checked against the model.

        Raises:
            Refused: With code `policy_shape`, if the model is not as long as the network's shared part.
        """
        network = self._network_for(task)
        if model.dimension != network.architecture.shared_size:
            raise Refused("policy_shape", "Expected a model of this node's network, got one of another size.")
        return network

    def _network_for(self, task: Task) -> AdaptedNetwork:
        adapters, network = self._adapted
        if network is None or adapters != task.adapters:
            network = network_for(self._place, task, self._schema, device=self._device)
            self._adapted, self._shard = (task.adapters, network), None
        return network
