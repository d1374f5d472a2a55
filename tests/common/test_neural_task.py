"""What a broadcast may ask for of a network."""

import json

import pytest
from pydantic import ValidationError

from common.errors import Refused
from common.task import Adapters, Task

PLAIN = {"architecture": "0" * 64, "rank": 2, "trained": 10}


@pytest.mark.parametrize("changes", [{}, {"layers": ("a", "b*"), "form": "matrix", "local_steps": 3, "steps": 1}])
def test_neural_task_comes_back_from_the_wire(changes):
    """Through JSON, in which there are no tuples, to an equal record."""
    task = Task(family="softmax", sparsity=2, work="network", adapters=Adapters(**PLAIN, **changes))
    assert Task.decode(json.loads(json.dumps(task.encode()))) == task


@pytest.mark.parametrize(
    "changes",
    [
        {"architecture": "0" * 63},
        {"architecture": "G" * 64},
        {"rank": -1},
        {"rank": 257},
        {"rank": 2.0},
        {"trained": 0},
        {"form": "tensor"},
        {"steps": 0},
        {"steps": 101},
        {"local_steps": 0},
        {"local_steps": 101},
        {"local_step_size": float("nan")},
        {"local_step_size": -0.1},
        {"layers": [1]},
        {"surprise": 1},
    ],
)
def test_neural_adapters_outside_their_bounds(changes):
    """A node computes nothing by settings that are not bounded, or that it does not know."""
    with pytest.raises(ValidationError):
        Adapters(**{**PLAIN, **changes})
    with pytest.raises(Refused):
        Task.decode({"family": "squared", "sparsity": 2, "work": "network", "adapters": {**PLAIN, **changes}})


def test_neural_task_has_adapters_and_no_other_has():
    """Neither without the other, and a network's users always use all of their examples."""
    adapters = Adapters(**PLAIN)
    with pytest.raises(ValidationError):
        Task(family="squared", sparsity=2, work="network")
    with pytest.raises(ValidationError):
        Task(family="squared", sparsity=2, adapters=adapters)
    with pytest.raises(ValidationError):
        Task(family="squared", sparsity=2, work="network", adapters=adapters, fold=(0, 2))
