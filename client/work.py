"""What a round asks of a node, as functions of a batch of its users.

A user's result depends on that user's examples, the released model, and public settings only.
"""

from collections.abc import Callable

from client.alternation import LocalSettings, fit
from client.batches import Batch, Design
from client.contribution import contribute
from client.personalize import WHILE_TRAINING, personalize
from client.shard import Shard
from client.statistics import contribute_moment, contribute_statistics
from client.thresholding import Thresholds
from common.data import DataSchema, Population, fold
from common.families import FAMILIES
from common.model import Array, IntArray, PersonalState, SharedModel
from common.task import Fitting, Task
from privacy.layout import Layout

_FLOAT_BYTES = 8
_MATRICES_AT_ONCE = 3  # a user's matrix, its half as a vector, and that on the grid


def contribution_to(
    task: Task, model: SharedModel, metric: Array, *, clipping_norm: float, layout: Layout
) -> Callable[[Batch], IntArray]:
    """`n x D` int64 of a batch: each user's clipped vector on the grid, zeros where there is nothing to say.

    Args:
        task: What the vector is made of.
        model: The released model of this round.
        metric: `d x d`, the public matrix that goes with the task.
        clipping_norm: C.
        layout: Groups and grid of the release.
    """

    def gradient(batch: Batch) -> IntArray:
        family, sparsity = FAMILIES[task.family], task.sparsity
        solution = personalize(batch, model, family=family, sparsity=sparsity, least_probability=WHILE_TRAINING)
        grid: IntArray = contribute(
            batch,
            solution,
            model,
            metric,
            family=family,
            sparsity=sparsity,
            clipping_norm=clipping_norm,
            layout=layout,
        )
        return grid

    def statistics(batch: Batch) -> IntArray:
        found = fit(batch, model.U, local_settings(task))
        grid: IntArray = contribute_statistics(batch, found, clipping_norm=clipping_norm, layout=layout)
        return grid

    def moment(batch: Batch) -> IntArray:
        if not isinstance(batch, Design):
            raise TypeError(f"Expected a Design for a moment, got {type(batch).__name__}.")
        grid: IntArray = contribute_moment(batch, task.moment, metric, clipping_norm=clipping_norm, layout=layout)
        return grid

    return {"gradient": gradient, "statistics": statistics, "moment": moment}[task.work]


def personal_theta(task: Task, model: SharedModel) -> Callable[[Batch], Array]:
    """`n x d` of a batch: each user's parameters under a released model."""

    def theta(batch: Batch) -> Array:
        if task.fitting is not None:
            found: Array = fit(batch, model.U, local_settings(task)).theta
        else:
            found = personalize(batch, model, family=FAMILIES[task.family], sparsity=task.sparsity).theta
        return found

    return theta


def personal_state(task: Task, model: SharedModel) -> Callable[[Batch], PersonalState]:
    """What the device keeps of each user of a batch under a released model."""

    def state(batch: Batch) -> PersonalState:
        if task.fitting is not None:
            found = fit(batch, model.U, local_settings(task))
            return found.state(batch, model.U, noise_variance=model.noise_variance)
        family = FAMILIES[task.family]
        return personalize(batch, model, family=family, sparsity=task.sparsity, with_precision=True).state()

    return state


def shard_for(task: Task, population: Population, schema: DataSchema, rank: int) -> Shard:
    """The users as a task needs them: the part of their examples it uses, in chunks that leave room for its results.

    Args:
        task: The round's.
        population: All examples.
        schema: Public facts about the data.
        rank: Columns r of U.
    """
    side = {"gradient": 0, "moment": schema.dimension, "statistics": schema.dimension * rank}[task.work]
    return Shard(
        fold(population, *task.fold),
        schema,
        FAMILIES[task.family],
        result_bytes=_MATRICES_AT_ONCE * side**2 * _FLOAT_BYTES,
        keep_examples=task.work == "moment",
    )


def local_settings(task: Task) -> LocalSettings:
    """How AMHT-LRS fits a user."""
    fitting, thresholds = task.fitting or Fitting(), None
    if fitting.thresholds is not None:
        alpha, beta, gamma, c1 = fitting.thresholds
        thresholds = Thresholds(alpha=alpha, beta=beta, gamma=gamma, c1=c1)
    return LocalSettings(
        solver=fitting.solver,
        sparsity=task.sparsity,
        num_alternations=fitting.alternations,
        num_steps=fitting.steps,
        thresholds=thresholds,
        ridge=fitting.ridge,
    )
