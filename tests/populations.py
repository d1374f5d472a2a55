"""Small populations for tests, from lists of users."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

from client.batches import Chunk, Design, cleaned, design_of
from client.shard import Shard, total_contribution
from client.work import contribution_to
from common.data import DataSchema, DenseFeatures, Population, example_keys, row_hashes, text_hashes
from common.model import IntArray, SharedModel
from common.task import Task
from privacy.layout import Layout
from tests.reference import User

Array = Any


def population_of(users: Sequence[User], names: Sequence[str] | None = None) -> Population:
    """The users as flat arrays with offsets."""
    names = [f"user-{i}" for i in range(len(users))] if names is None else names
    counts = np.array([len(user.y) for user in users], np.int64)
    return Population(
        users=tuple(names),
        offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        y=np.concatenate([user.y for user in users]).astype(np.float64),
        weight=np.concatenate([user.weight for user in users]).astype(np.float64),
        features=DenseFeatures(np.concatenate([user.X for user in users]).astype(np.float64)),
        key=example_keys(np.repeat(text_hashes(names, kind="user"), counts), row_hashes(counts)),
    )


def schema_of(dimension: int, *, bound: float = 1e6, target_range: tuple[float, float] = (-1e6, 1e6)) -> DataSchema:
    """A schema whose declared ranges cut nothing unless asked to."""
    return DataSchema(
        feature_names=tuple(f"x{j}" for j in range(dimension)),
        feature_second_moment=np.eye(dimension),
        target_range=target_range,
        feature_bound=bound,
    )


def design(users: Sequence[User], length: int | None = None) -> Design:
    """All users in one batch, padded to `length` or to the longest of them."""
    population = population_of(users)
    longest = max(1, int(population.counts.max()))
    chunk = Chunk(users=np.arange(len(users)), length=length or longest)
    return design_of(cleaned(population, schema_of(population.dimension)), chunk)


def draw_model(
    rng: np.random.Generator,
    dimension: int,
    rank: int,
    *,
    b_variance: float = 0.5,
    noise_variance: float = 0.3,
    spread: float = 0.6,
) -> SharedModel:
    """A prior with entries of about one."""
    return SharedModel(
        beta=0.5 * rng.standard_normal(dimension),
        U=spread * rng.standard_normal((dimension, rank)),
        b_variance=b_variance,
        noise_variance=noise_variance,
    )


def draw_user(
    rng: np.random.Generator,
    model: SharedModel,
    num_examples: int,
    *,
    sparsity: int = 0,
    family: str = "squared",
    weighted: bool = False,
) -> User:
    """A user of the model itself, with `sparsity` large entries in b."""
    d, r = model.U.shape
    b = np.zeros(d)
    b[rng.permutation(d)[:sparsity]] = 2 * rng.standard_normal(sparsity)
    X = rng.standard_normal((num_examples, d))
    eta = X @ (model.beta + model.U @ rng.standard_normal(r) + b)
    noise = np.sqrt(model.noise_variance) * rng.standard_normal(num_examples)
    y = eta + noise if family == "squared" else (rng.random(num_examples) < 0.5 + 0.5 * np.tanh(eta / 2)) * 1.0
    weight = rng.uniform(0.5, 3.0, num_examples) if weighted else np.ones(num_examples)
    return User(X=X, y=y, weight=weight)


def draw_users(rng: np.random.Generator, model: SharedModel, counts: Sequence[int], **options: Any) -> list[User]:
    """One user for each number of examples."""
    return [draw_user(rng, model, count, **options) for count in counts]


def arrays(record: Any) -> dict[str, Any]:
    """The declared fields of a record, without what it caches."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def torch_batch(batch: Any) -> Any:
    """The same batch on torch tensors."""
    return type(batch)(**{name: torch.from_numpy(value.copy()) for name, value in arrays(batch).items()})


def torch_model(model: SharedModel) -> SharedModel:
    """The same prior on torch tensors."""
    tensors: dict[str, Any] = {"beta": torch.from_numpy(model.beta.copy()), "U": torch.from_numpy(model.U.copy())}
    return replace(model, **tensors)


def gradient_total(
    shard: Shard,
    model: SharedModel,
    metric: Array,
    *,
    sparsity: int,
    clipping_norm: float,
    layout: Layout,
    admitted: Array = None,
) -> IntArray:
    """What a node with these users sends in a round of the default algorithm."""
    everybody = np.ones(shard.population.num_users, np.bool_)
    task = Task(family=shard.family.name, sparsity=sparsity)
    contribution = contribution_to(task, model, metric, clipping_norm=clipping_norm, layout=layout)
    return total_contribution(
        shard, contribution, size=layout.size, admitted=everybody if admitted is None else admitted
    )
