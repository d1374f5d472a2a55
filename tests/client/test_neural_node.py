"""The network of a node: what it refuses before anybody is charged."""

from pathlib import Path

import numpy as np
import pytest

from client.network_work import network_for
from client.node_networks import NodeNetworks
from common.data import DataSchema
from common.errors import Refused
from common.model import SharedModel
from common.networks import adapt, load_module
from common.task import Adapters, Task
from server.layout import contribution_layout

MODULE = "from torch import nn\n\n\ndef make_model():\n    return nn.Linear(3, 1)\n"
SCHEMA = DataSchema(
    feature_names=("a", "b", "c"), feature_second_moment=np.eye(3), target_range=(-1.0, 1.0), target_offset=0.0
)


def placed(folder: Path) -> tuple[str, Task, int]:
    """A module, the task for it, and the length of its shared part."""
    (folder / "model.py").write_text(MODULE)
    place = f"{folder / 'model.py'}:make_model"
    architecture = adapt(load_module(place), inputs=3, outputs=1, rank=1, sparsity=1).architecture
    adapters = Adapters(architecture=architecture.digest, rank=1, trained=architecture.trained_size)
    return place, Task(family="squared", sparsity=1, work="network", adapters=adapters), architecture.shared_size


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_neural_model_of_another_length_is_refused(tmp_path: Path, extra: int) -> None:
    """Before a charge: every user would be charged for zeros otherwise."""
    place, task, size = placed(tmp_path)
    networks, layout = NodeNetworks(place, SCHEMA, "squared"), contribution_layout(size, 0, private=True)

    def model(size: int) -> SharedModel:
        return SharedModel(beta=np.zeros(size), U=np.zeros((size, 0)), b_variance=1.0, noise_variance=1.0)

    networks.contribution_to(task, model(size), clipping_norm=1.0, layout=layout)
    networks.personal_state(task, model(size))
    for refused in (
        lambda: networks.contribution_to(task, model(size + extra), clipping_norm=1.0, layout=layout),
        lambda: networks.personal_state(task, model(size + extra)),
    ):
        with pytest.raises(Refused) as found:
            refused()
        assert found.value.code == "policy_shape"


@pytest.mark.parametrize("change", [{"architecture": "0" * 64}, {"rank": 2, "form": "matrix"}, {"trained": 3}])
def test_a_neural_task_for_another_architecture_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    """Also where the digest is this node's and the settings are not."""
    place, task, _ = placed(tmp_path)
    assert task.adapters is not None
    with pytest.raises(Refused) as found:
        network_for(place, task.model_copy(update={"adapters": task.adapters.model_copy(update=change)}), SCHEMA)
    assert found.value.code == "policy_shape"
