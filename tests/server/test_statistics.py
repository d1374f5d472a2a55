"""AMHT-LRS on the server: which release is asked for when, and what is made of it."""

import math
from dataclasses import replace

import numpy as np
import pytest

from client.guard import Policy
from common.config import load_config
from common.data import DataSchema
from common.linalg import svec
from privacy.layout import cross_norm, groups_of_event, layout_of_event
from server.algorithms import algorithm_of, largest_layout
from server.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from server.layout import contribution_layout
from server.least_squares import subspace_distance, vec
from server.statistics import CLIPPING_BOUNDS
from server.training import decimal_string

D, R, USERS = 6, 2, 50


def schema(moment=None):
    return DataSchema(
        feature_names=tuple(f"x{j}" for j in range(D)),
        feature_second_moment=np.eye(D) if moment is None else moment,
        target_range=(-8.0, 8.0),
        feature_bound=4.0,
    )


def algorithm(**settings):
    given = {"training.algorithm": "amht-lrs", "model.rank": R, "model.sparsity": 1, "training.rounds": 4}
    return algorithm_of(load_config(None, given | {key.replace("__", "."): value for key, value in settings.items()}))


def event_of(task, state, noise_multiplier="0"):
    layout = contribution_layout(D, R, private=noise_multiplier != "0", work=task.work)
    return {
        "groups": groups_of_event(layout),
        "grid_scale": layout.grid_scale,
        "clipping_norm": str(state.clipping_norm),
        "noise_multiplier": noise_multiplier,
        "denominator": USERS,
        "initialization": task.work == "moment",
    }


def release_of(event, *unit_means):
    """A release whose groups have these means, in units of their balls."""
    layout = layout_of_event(event)
    parts = [
        mean * group.share * layout.grid_scale * USERS for group, mean in zip(layout.groups, unit_means, strict=True)
    ]
    return np.rint(np.concatenate(parts)).astype(np.int64)


def first(learner, moment=None):
    return learner.first_state(schema(moment), np.random.default_rng(0))


def test_a_moment_is_asked_for_once_and_statistics_then():
    """The first of the run's releases makes U; a release that never came is asked for again."""
    learner = algorithm()
    state = first(learner)
    assert learner.task(state).work == "moment"
    event = event_of(learner.task(state), state)
    after = learner.step(state, release_of(event, np.zeros(D * (D + 1) // 2), np.zeros(2)), event)
    assert learner.task(after).work == "statistics"
    assert learner.task(state).work == "moment"


def test_a_random_start_costs_no_release():
    """It is orthonormal and from no data at all."""
    learner = algorithm(amht__initialization="random")
    state = first(learner)
    assert learner.task(state).work == "statistics"
    np.testing.assert_allclose(state.model.U.T @ state.model.U, np.eye(R), atol=1e-12)
    other = learner.first_state(schema(), np.random.default_rng(1))
    assert subspace_distance(state.model.U, other.model.U) > 0.1


def test_sample_splitting_deals_examples_among_the_rounds():
    """Every round asks for another part."""
    learner = algorithm(amht__sample_splitting=True)
    state = first(learner)
    assert [learner.task(replace(state, server_round=t)).fold for t in range(4)] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert learner.personal_task.fold == (0, 1)


@pytest.mark.parametrize("spread", [1.0, 9.0])
def test_u_starts_where_the_moment_points(spread):
    """Also where features have different public scales: directions come back from the metric of S."""
    rng = np.random.default_rng(3)
    S = np.diag(np.linspace(1.0, spread, D))
    planted = np.linalg.qr(rng.standard_normal((D, R)))[0]
    learner = algorithm()
    state = first(learner, S)
    event = event_of(learner.task(state), state)
    root = np.linalg.inv(state.inverse_root)
    whitened = root @ planted @ np.diag([2.0, 1.0]) @ planted.T @ root
    moment = svec(whitened[None, :, :] / np.linalg.norm(whitened) * 0.5)[0]
    after = learner.step(state, release_of(event, moment, np.zeros(2)), event)
    assert subspace_distance(after.model.U, planted) < 1e-6
    assert not after.model.beta.any()


def statistics_of(rng, planted):
    """svec(A) and V of a few users without noise, in the units of their groups' balls."""
    A, V = np.zeros((D * R, D * R)), np.zeros(D * R)
    for _ in range(USERS):
        X, w = rng.standard_normal((12, D)), rng.standard_normal(R)
        A += np.kron(np.outer(w, w), X.T @ X) / USERS
        V += vec(np.outer(X.T @ X @ planted @ w, w)) / USERS
    C = 4 * np.linalg.norm(A)
    return svec(A[None, :, :])[0] / C, V / cross_norm(C, D), C


def test_u_solves_the_released_statistics_and_stays_orthonormal():
    """Without noise U is what the users' data were drawn with."""
    rng = np.random.default_rng(4)
    planted = np.linalg.qr(rng.standard_normal((D, R)))[0]
    A, V, C = statistics_of(rng, planted)
    learner = algorithm(amht__initialization="random")
    state = replace(first(learner), clipping_norm=C)
    event = event_of(learner.task(state), state)
    after = learner.step(state, release_of(event, A, V, np.zeros(2)), event)
    assert subspace_distance(after.model.U, planted) < 1e-6
    np.testing.assert_allclose(after.model.U.T @ after.model.U, np.eye(R), atol=1e-12)


def test_directions_below_the_noise_are_not_divided_by():
    """A release of noise alone gives an orthonormal U, however small A's eigenvalues are."""
    learner = algorithm(amht__initialization="random", privacy__clipping=1.0)
    state = first(learner)
    event = event_of(learner.task(state), state, "3")
    rng = np.random.default_rng(5)
    layout = layout_of_event(event)
    noise = np.rint(3 * layout.grid_scale * rng.standard_normal(layout.size)).astype(np.int64)
    after = learner.step(state, noise, event)
    np.testing.assert_allclose(after.model.U.T @ after.model.U, np.eye(R), atol=1e-12)


@pytest.mark.parametrize(("bit", "factor"), [(0.5, math.exp(-0.25)), (-0.5, math.exp(0.25)), (0.0, 1.0)])
def test_the_clipping_norm_follows_the_released_bits(bit, factor):
    """Towards the median; a constant stays."""
    rng = np.random.default_rng(6)
    A, V, _ = statistics_of(rng, np.eye(D)[:, :R])
    scalars = np.array([bit, 0.5]) * 2 / math.sqrt(2)
    for learner, expected in ((algorithm(), factor), (algorithm(privacy__clipping=7.0), 1.0)):
        state = replace(first(learner), server_round=1, clipping_norm=7.0)
        event = event_of(learner.task(state), state)
        after = learner.step(state, release_of(event, A, V, scalars), event)
        assert after.clipping_norm == pytest.approx(7 * expected, rel=1e-4)


def test_a_state_comes_back_from_disk(tmp_path):
    """Bit for bit, as its own kind."""
    learner = algorithm()
    state = first(learner)
    save_checkpoint(tmp_path, Checkpoint(state=state, sequence=3))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert type(found.state) is type(state)
    assert np.array_equal(found.state.inverse_root, state.inverse_root)
    assert np.array_equal(found.state.model.U, state.model.U)
    assert (found.state.server_round, found.state.clipping_norm) == (0, state.clipping_norm)


def test_the_largest_layout_is_that_of_the_statistics():
    """Capacity and finite precision are checked for it before a run starts."""
    config = load_config(None, {"training.algorithm": "amht-lrs", "model.rank": R})
    assert largest_layout(config, D, private=True).size == D * R * (D * R + 1) // 2 + D * R + 2
    assert largest_layout(load_config(None, {"model.rank": R}), D, private=True).size == D * (R + 1) + 5


def test_a_feature_that_nobody_has_is_not_made_up_from_truncation():
    """Integers that are all a step too low, as truncation may leave them, say nothing about it."""
    rng = np.random.default_rng(7)
    planted = np.linalg.qr(rng.standard_normal((D, R)))[0]
    A, V = np.zeros((D * R, D * R)), np.zeros(D * R)
    for _ in range(USERS):
        X, w = rng.standard_normal((12, D)), rng.standard_normal(R)
        X[:, -1] = 0
        A += np.kron(np.outer(w, w), X.T @ X) / USERS
        V += vec(np.outer(X.T @ X @ planted @ w, w)) / USERS
    C = 4 * np.linalg.norm(A)
    learner = algorithm(amht__initialization="random")
    state = replace(first(learner), clipping_norm=C)
    event = event_of(learner.task(state), state)
    release = release_of(event, svec(A[None, :, :])[0] / C, V / cross_norm(C, D), np.zeros(2))
    after = learner.step(state, release - USERS, event)
    assert np.abs(after.model.U[-1]).max() < 0.2


@pytest.mark.parametrize(("width", "bound"), [(1e-6, CLIPPING_BOUNDS[0]), (1e7, CLIPPING_BOUNDS[1])])
@pytest.mark.parametrize("initialization", ["random", "pair-moments", "moments"])
def test_first_clipping_norms_are_what_nodes_accept(width, bound, initialization):
    """However wide the declared range, and as a ledger spells it."""
    learner = algorithm(amht__initialization=initialization)
    declared = replace(schema(), target_range=(-width, width))
    state = learner.first_state(declared, np.random.default_rng(0))
    assert state.clipping_norm == bound
    policy = Policy(public_key=bytes(32), mu_max="1")
    assert policy.min_clipping_norm <= float(decimal_string(bound)) <= policy.max_clipping_norm
