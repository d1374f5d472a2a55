"""Ragged users as equal-shaped batches: who is where, what counts, and that both forms say the same."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.batches import Chunk, Design, Gram, cleaned, design_of, form_of, gram_of, padded_length, plan_chunks
from common.data import DenseFeatures, ItemFeatures
from tests import reference
from tests.populations import design, draw_model, draw_users, population_of, schema_of


def test_padded_length_is_the_public_rule():
    """The first lengths, written out."""
    counts = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 20, 21, 31, 32, 33, 40, 41, 63, 64, 65, 1000]
    expected = [1, 1, 2, 3, 7, 8, 10, 16, 16, 20, 20, 24, 32, 32, 40, 40, 48, 64, 64, 80, 1024]
    assert padded_length(np.array(counts)).tolist() == expected


@given(st.integers(1, 2**40))
def test_at_most_a_fifth_is_padding(count):
    """A padded length holds the user, wastes at most a fifth, and is its own padded length."""
    length = int(padded_length(np.array([count]))[0])
    assert count <= length
    assert 5 * (length - count) <= length
    assert int(padded_length(np.array([length]))[0]) == length


def test_padding_never_shrinks():
    """More examples are never padded to less."""
    assert (np.diff(padded_length(np.arange(5000))) >= 0).all()


@given(
    counts=st.lists(st.integers(0, 300), min_size=1, max_size=40),
    dimension=st.integers(1, 50),
    chunk_bytes=st.integers(1, 2**18),
)
def test_chunks_hold_every_user_once_within_their_bytes(counts, dimension, chunk_bytes):
    """A chunk is one user, or users of one padded length that fit; together they are all users."""
    chunks = plan_chunks(np.array(counts), dimension, chunk_bytes)
    assert sorted(int(user) for chunk in chunks for user in chunk.users) == list(range(len(counts)))
    for chunk in chunks:
        assert (padded_length(np.array(counts)[chunk.users]) == chunk.length).all()
        assert len(chunk.users) == 1 or len(chunk.users) * chunk.length * dimension * 8 <= chunk_bytes


def random_users(seed, counts, dimension=3, **options):
    rng = np.random.default_rng(seed)
    return draw_users(rng, draw_model(rng, dimension, 1), counts, **options)


def test_a_batch_holds_its_users_examples():
    """Each row has one user's examples at the front; the rest has weight 0."""
    users = random_users(0, (2, 0, 5, 3), weighted=True)
    batch = design_of(population_of(users), Chunk(users=np.array([3, 0, 1]), length=4))
    assert batch.X.shape == (3, 4, 3)
    for row, user in zip(range(3), (users[3], users[0], users[1]), strict=True):
        m = len(user.y)
        assert np.array_equal(batch.X[row, :m], user.X)
        assert np.array_equal(batch.y[row, :m], user.y)
        assert np.array_equal(batch.weight[row, :m], user.weight)
        assert not batch.weight[row, m:].any()
        assert batch.count[row] == pytest.approx(user.weight.sum())


def test_users_side_by_side_need_no_copy():
    """Full rows of neighbours are a view of the population's own arrays, whatever the precision asks for."""
    population = population_of(random_users(1, (4, 4, 4)))
    batch = design_of(population, Chunk(users=np.arange(3), length=4))
    assert np.shares_memory(batch.X, population.features.X)
    assert np.shares_memory(batch.y, population.y)


def test_a_population_without_examples_is_a_batch_of_zeros():
    """Nobody has an example: shapes are kept, weights are 0."""
    population = population_of(random_users(2, (0, 0)))
    batch = design_of(cleaned(population, schema_of(3)), Chunk(users=np.arange(2), length=1))
    assert batch.X.shape == (2, 1, 3)
    assert not batch.weight.any()
    assert batch.count.tolist() == [0.0, 0.0]


def test_bad_examples_weigh_nothing():
    """A row with NaN or infinity anywhere, or a weight that is not positive and finite, counts as none."""
    (user,) = random_users(3, (9,), weighted=True)
    X, y, weight = user.X.copy(), user.y.copy(), user.weight.copy()
    X[0, 1], X[1, 0], y[2], y[3] = np.nan, -np.inf, np.nan, np.inf
    weight[4], weight[5], weight[6], weight[7] = np.nan, np.inf, 0.0, -1.0
    clean = cleaned(population_of([reference.User(X=X, y=y, weight=weight)]), schema_of(3))
    assert clean.weight is not None
    assert np.flatnonzero(clean.weight).tolist() == [8]
    assert np.isfinite(clean.features.rows(slice(None))).all()
    assert np.isfinite(clean.y).all()


def test_bad_examples_weigh_nothing_without_weights():
    """The same where every example weighs 1: good ones keep weight 1."""
    population = replace(population_of(random_users(4, (3, 2))), weight=None)
    X = population.features.rows(slice(None)).copy()
    X[1, 0] = np.nan
    clean = cleaned(replace(population, features=DenseFeatures(X)), schema_of(3))
    assert clean.weight.tolist() == [1.0, 0.0, 1.0, 1.0, 1.0]


def test_values_are_cut_to_what_is_declared():
    """Features, targets and weights outside their public ranges are moved to the nearest end."""
    user = reference.User(
        X=np.array([[0.5, -3.0], [1e300, 0.0]]), y=np.array([-1e300, 0.5]), weight=np.array([1e300, 1e-300])
    )
    clean = cleaned(population_of([user]), schema_of(2, bound=1.0, target_range=(-2.0, 2.0)))
    assert clean.features.rows(slice(None)).tolist() == [[0.5, -1.0], [1.0, 0.0]]
    assert clean.y.tolist() == [-2.0, 0.5]
    assert clean.weight.tolist() == [1e6, 1e-300]


def test_what_is_clean_is_shared_and_the_source_is_left_alone():
    """Nothing to change costs no copy, and a source's arrays are never written to."""
    population = population_of(random_users(5, (3, 4)))
    assert cleaned(population, schema_of(3)).features.X is population.features.X
    X = population.features.X.copy()
    dirty = replace(population, features=DenseFeatures(X))
    X[0, 0] = np.nan
    before = X.copy()
    cleaned(dirty, schema_of(3))
    assert np.array_equal(X, before, equal_nan=True)


def test_items_are_cleaned_in_their_table():
    """A bad or oversized row of the item table reaches only the examples of that item."""
    population = population_of(random_users(6, (2, 2), dimension=2))
    table = np.array([[1.0, 2.0], [np.nan, 0.0], [50.0, 0.0]])
    features = ItemFeatures(np.array([0, 1, 2, 0], np.int32), table)
    clean = cleaned(replace(population, features=features), schema_of(2, bound=10.0))
    assert clean.weight.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert clean.features.rows(slice(None)).tolist() == [[1, 2], [0, 0], [10, 0], [1, 2]]


def test_single_precision_is_computed_in_double():
    """Features kept as float32 enter the batch as float64."""
    population = population_of(random_users(7, (3,)))
    single = replace(population, features=DenseFeatures(population.features.X.astype(np.float32)))
    batch = design_of(cleaned(single, schema_of(3)), Chunk(users=np.arange(1), length=3))
    assert batch.X.dtype == np.float64
    assert np.array_equal(batch.X[0], single.features.X.astype(np.float64))


@given(seed=st.integers(0, 2**32), counts=st.lists(st.integers(0, 12), min_size=1, max_size=5))
@settings(max_examples=50, deadline=None)
def test_both_forms_say_the_same(seed, counts):
    """Moments, columns, diagonals and squares of a design and of its Gram matrices agree with plain sums."""
    rng = np.random.default_rng(seed)
    users = random_users(seed, counts, weighted=True)
    batch = design(users)
    gram = gram_of(batch)
    d = 3
    M, theta, feature = (
        rng.standard_normal((2, d)),
        rng.standard_normal((len(users), d)),
        rng.integers(0, d, len(users)),
    )
    for form in (batch, gram):
        for i, user in enumerate(users):
            G = user.X.T @ (user.weight[:, None] * user.X)
            close = {"rtol": 1e-9, "atol": 1e-9}
            np.testing.assert_allclose(form.cross[i], user.X.T @ (user.weight * user.y), **close)
            np.testing.assert_allclose(form.products(M)[i], M @ G, **close)
            np.testing.assert_allclose(form.products(theta[:, None, :])[i, 0], theta[i] @ G, **close)
            np.testing.assert_allclose(form.column(feature)[i], G[feature[i]], **close)
            np.testing.assert_allclose(form.diagonal[i], np.diag(G), **close)
            np.testing.assert_allclose(form.square[i], user.weight @ user.y**2, **close)
            np.testing.assert_allclose(form.count[i], user.weight.sum(), **close)


def test_the_smaller_form_is_chosen():
    """Second moments are kept where they suffice and there are more examples than features."""
    users = random_users(8, (5, 5))
    assert isinstance(form_of(design(users), second_moments_suffice=True), Gram)
    assert isinstance(form_of(design(users), second_moments_suffice=False), Design)
    assert isinstance(form_of(design(random_users(8, (3, 3))), second_moments_suffice=True), Design)


def test_a_gathered_batch_says_how_large_it_is():
    """What is not a view of the population counts in full, or a cache would have no limit."""
    users = random_users(9, (3, 8, 3))
    batch = design_of(population_of(users), Chunk(users=np.array([0, 2]), length=3))
    assert batch.nbytes >= batch.X.nbytes
    gram = gram_of(design(users))
    assert gram.nbytes >= gram.G.nbytes
