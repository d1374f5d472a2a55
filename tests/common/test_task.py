"""What a broadcast may ask for, and that nothing else is read as a task."""

import json

import pytest

from common.errors import Refused
from common.task import Fitting, Task

TASKS = [
    Task(family="squared", sparsity=2),
    Task(family="logistic", sparsity=0),
    Task(family="squared", sparsity=2, work="moment", moment="moments"),
    Task(family="squared", sparsity=2, work="moment", fold=(0, 10**6)),
    Task(family="squared", sparsity=2, work="statistics", fitting=Fitting(alternations=1000, steps=10), fold=(2, 3)),
    Task(
        family="squared",
        sparsity=2,
        fitting=Fitting(solver="pursuit", alternations=3, steps=4, thresholds=(0.1, 0.2, 1.0, 0.25), ridge=0.5),
    ),
]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_comes_back_from_the_wire(task):
    """Through JSON, in which there are no tuples, to an equal record."""
    assert Task.decode(json.loads(json.dumps(task.encode()))) == task


def test_the_default_algorithm_says_as_little_as_before():
    """What is as usual is not sent."""
    assert Task(family="squared", sparsity=2).encode() == {"family": "squared", "sparsity": 2}


@pytest.mark.parametrize(
    "changes",
    [
        {"work": "raw data"},
        {"moment": "third"},
        {"sparsity": -1},
        {"sparsity": True},
        {"sparsity": 2.0},
        {"family": 3},
        {"surprise": 1},
        {"work": "moment", "fold": [2, 2]},
        {"work": "moment", "fold": [-1, 2]},
        {"work": "moment", "fold": [0, 0]},
        {"work": "moment", "fold": [0, 10**7]},
        {"work": "moment", "fold": [0, 1, 2]},
        {"work": "moment", "fold": [0.0, 1]},
        {"fold": [1, 3]},
        {"work": "statistics"},
        {"fitting": {"solver": "exact"}},
        {"fitting": {"steps": 0}},
        {"fitting": {"alternations": 10**9}},
        {"fitting": {"alternations": 1000, "steps": 11}},
        {"fitting": {"ridge": float("nan")}},
        {"fitting": {"ridge": -1}},
        {"fitting": {"thresholds": [1, 2, 3]}},
        {"fitting": {"thresholds": [1, 2, 3, float("inf")]}},
        {"fitting": 3},
    ],
)
def test_anything_else_is_refused_with_a_code(changes):
    """Unknown names, other types and unbounded work."""
    with pytest.raises(Refused) as refusal:
        Task.decode({"family": "squared", "sparsity": 2} | changes)
    assert refusal.value.code == "policy_shape"
