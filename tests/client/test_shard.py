"""A node's users: the sum is of the admitted users' own vectors, whatever memory it is allowed."""

from dataclasses import replace

import numpy as np
import pytest

import client.shard
import client.work
from client.batches import Design, Gram
from client.contribution import contribute
from client.personalize import WHILE_TRAINING, personalize
from client.shard import Shard
from common.families import FAMILIES
from server.layout import contribution_layout
from tests.populations import draw_model, draw_users, gradient_total, population_of, schema_of

D, R, K = 4, 2, 2
LAYOUT = contribution_layout(D, R, private=True)
COUNTS = (3, 0, 12, 1, 3, 40, 12, 2)


@pytest.fixture
def model():
    return draw_model(np.random.default_rng(0), D, R)


@pytest.fixture
def metric(model):
    return np.linalg.cholesky(model.U @ model.U.T + np.eye(D))


@pytest.fixture
def population(model):
    return population_of(draw_users(np.random.default_rng(1), model, COUNTS, sparsity=1))


def shard_of(population, **options):
    return Shard(population, schema_of(D), FAMILIES["squared"], **options)


def total(shard, model, metric, admitted=None):
    return gradient_total(
        shard, model, metric, sparsity=K, clipping_norm=2.0, layout=LAYOUT, admitted=admitted
    )  # fmt: skip


def each(shard, model, metric):
    """`n x D`, the users' own integers."""
    rows = np.zeros((shard.population.num_users, LAYOUT.size), np.int64)
    for chunk, batch in shard.batches():
        solution = personalize(batch, model, family=shard.family, sparsity=K, least_probability=WHILE_TRAINING)
        rows[chunk.users] = contribute(
            batch, solution, model, metric, family=shard.family, sparsity=K, clipping_norm=2.0, layout=LAYOUT
        )
    return rows


def test_the_sum_is_of_the_users(population, model, metric):
    """Nothing but the users' clipped integers is added up, in int64."""
    shard = shard_of(population)
    actual = total(shard, model, metric)
    assert actual.dtype == np.int64
    assert np.array_equal(actual, each(shard, model, metric).sum(axis=0))
    assert actual.any()


def test_only_admitted_users_count(population, model, metric):
    """A user whose filter is full adds zeros."""
    shard = shard_of(population)
    admitted = np.array([True, True, False, False, True, False, True, True])
    assert np.array_equal(total(shard, model, metric, admitted), each(shard, model, metric)[admitted].sum(axis=0))
    assert not total(shard, model, metric, np.zeros(8, np.bool_)).any()


def test_every_user_is_in_one_chunk(population):
    """All users, the one without examples too, exactly once, in the same order each time."""
    shard = shard_of(population, chunk_bytes=200)
    users = [chunk.users.tolist() for chunk, _ in shard.batches()]
    assert sorted(user for chunk in users for user in chunk) == list(range(8))
    assert users == [chunk.users.tolist() for chunk, _ in shard.batches()]


def test_batches_are_kept_while_they_fit(population):
    """With room every batch is built once; without it, each time anew."""
    roomy, tight = shard_of(population), shard_of(population, cache_bytes=0)
    first, second = ([batch for _, batch in roomy.batches()] for _ in range(2))
    assert all(a is b for a, b in zip(first, second, strict=True))
    gathered = [
        [batch for _, batch in tight.batches() if isinstance(batch, Gram) or batch.X.base is not batch.X]
        for _ in range(2)
    ]
    grams = [[batch for batch in batches if isinstance(batch, Gram)] for batches in gathered]
    assert grams[0]
    assert not any(a is b for a, b in zip(*grams, strict=True))


def test_the_cache_has_the_size_it_is_given(population):
    """What all cached batches hold of their own never exceeds the limit, gathered examples included."""
    limit = 2000
    shard = shard_of(population, cache_bytes=limit, chunk_bytes=500)
    first, second = ([batch for _, batch in shard.batches()] for _ in range(2))
    kept = [a for a, b in zip(first, second, strict=True) if a is b]
    own = 0
    for batch in kept:
        arrays = (batch.X, batch.weight) if isinstance(batch, Design) else (batch.G, batch.v)
        source = shard.population
        own += sum(
            array.nbytes
            for array in arrays
            if not np.shares_memory(array, source.features.X) and not np.shares_memory(array, source.weight)
        )
    assert own <= limit


def test_one_users_exception_is_that_users_zeros(population, model, metric, monkeypatch):
    """A library that raises for one user's numbers costs that user's vector and nobody else's."""
    shard = shard_of(population)
    rows = each(shard, model, metric)
    broken = 4
    marked = replace(population, y=population.y.copy())
    marked.y[marked.offsets[broken]] = 123456.0

    def raises_for_marked(batch, *arguments, **options):
        if isinstance(batch, Design) and (batch.y == 123456.0).any():
            raise np.linalg.LinAlgError("singular")
        return contribute(batch, *arguments, **options)

    monkeypatch.setattr(client.work, "contribute", raises_for_marked)
    actual = total(shard_of(marked), model, metric)
    assert np.array_equal(actual, np.delete(rows, broken, axis=0).sum(axis=0))


@pytest.mark.parametrize("function", ["design_of", "form_of"])
def test_a_batch_that_cannot_be_made_costs_its_user_only(population, model, metric, monkeypatch, function):
    """Whatever making a chunk's batch raises because of one user, the others of the chunk are counted."""
    rows = each(shard_of(population), model, metric)
    broken = 4
    real = getattr(client.shard, function)

    def raises_for_broken(source, *arguments, **options):
        made = real(source, *arguments, **options)
        design = made if function == "design_of" else source
        if (design.y == 123456.0).any():
            raise MemoryError
        return made

    population.y[population.offsets[broken]] = 123456.0
    monkeypatch.setattr(client.shard, function, raises_for_broken)
    actual = total(shard_of(population), model, metric)
    assert np.array_equal(actual, np.delete(rows, broken, axis=0).sum(axis=0))


def test_logistic_keeps_the_examples(population):
    """Families other than squared get designs."""
    shard = Shard(population, schema_of(D), FAMILIES["logistic"])
    assert all(isinstance(batch, Design) for _, batch in shard.batches())
