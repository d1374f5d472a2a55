"""w and b for a fixed U: each solver against the plain version, identities of least squares, isolation to the bit."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.alternation import SOLVERS, LocalSettings, fit, least_squares_w
from client.batches import gram_of
from client.statistics import contribute_statistics, statistics
from client.thresholding import Thresholds
from server.least_squares import leading_directions, orthonormal, random_directions, solve_for_U, subspace_distance
from tests import reference_amht
from tests.client.test_isolation import replacements
from tests.client.test_statistics import layout_for
from tests.populations import arrays, design, draw_model, draw_user, torch_batch
from tests.reference import User
from tests.reference_amht import planted, rows

SCHEDULE = Thresholds(alpha=0.01, beta=0.5, gamma=1.5, c1=0.35)
SHAPES = {
    "ordinary": {"num_users": 12, "num_examples": 20, "d": 10, "r": 2, "k": 3},
    "few examples": {"num_users": 12, "num_examples": 9, "d": 20, "r": 2, "k": 2},
    "rank 1": {"num_users": 5, "num_examples": 15, "d": 6, "r": 1, "k": 2},
    "one nonzero": {"num_users": 5, "num_examples": 15, "d": 6, "r": 3, "k": 1},
}


def local(solver: str, sparsity: int, **options) -> LocalSettings:
    return LocalSettings(solver=solver, sparsity=sparsity, **options)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", [*SOLVERS, "schedule"])
def test_solvers_do_what_is_written_out(solver, shape):
    """One alternation, or one elimination, gives each user the plain version's w, b and support, in both forms."""
    k = SHAPES[shape]["k"]
    population = planted(0, **SHAPES[shape], noise=0.3, weighted=True)
    U, batch = population.U, design(population.users)
    thresholds = SCHEDULE if solver == "schedule" else None
    name = "alternation" if solver == "schedule" else solver
    options = local(name, k, num_alternations=1, num_steps=6, thresholds=thresholds)
    steps = {"sparsity": k, "num_steps": 6}
    plain = {
        "alternation": lambda user: reference_amht.alternations(user, U, np.zeros(U.shape[1]), **steps),
        "schedule": lambda user: reference_amht.alternations(
            user, U, np.zeros(U.shape[1]), **steps, constants=SCHEDULE
        ),
        "joint": lambda user: reference_amht.joint(user, U, **steps),
        "elimination": lambda user: reference_amht.elimination(user, U, **steps),
        "pursuit": lambda user: reference_amht.pursuit(user, U, sparsity=k)[:2],
    }[solver]
    for form in (batch, gram_of(batch)):
        actual = fit(form, U, options)
        for i, user in enumerate(population.users):
            w, b = plain(user)
            np.testing.assert_allclose(actual.w[i], w, atol=1e-7)
            np.testing.assert_allclose(actual.b[i], b, atol=1e-7)
            np.testing.assert_allclose(actual.theta[i], U @ w + b, atol=1e-7)
            used = actual.support[i][actual.support[i] >= 0]
            assert sorted(used) == sorted(np.flatnonzero(b))
            if solver == "pursuit":
                assert used.tolist() == reference_amht.pursuit(user, U, sparsity=k)[2]


@pytest.mark.parametrize("solver", ["joint", "elimination", "pursuit"])
def test_ridge_is_a_penalty_on_both(solver):
    """w and b minimise the penalised error on the chosen support."""
    population = planted(1, **SHAPES["few examples"], noise=0.3)
    options = local(solver, 2, ridge=2.5, num_alternations=1)
    actual = fit(design(population.users), population.U, options)
    for i, user in enumerate(population.users):
        support = actual.support[i][actual.support[i] >= 0]
        w, b = reference_amht.ridge_both(*rows(user), population.U, support, 2.5)
        np.testing.assert_allclose(actual.w[i], w, atol=1e-8)
        np.testing.assert_allclose(actual.b[i], b, atol=1e-8)


@pytest.mark.parametrize("thresholds", [None, SCHEDULE])
def test_several_alternations_are_the_plain_loop(thresholds):
    """b and w in turn, three times, as written out; w may start anywhere."""
    population = planted(17, num_users=6, num_examples=25, d=10, r=2, k=2, noise=0.2)
    start_w = np.random.default_rng(0).standard_normal((6, 2))
    options = local("alternation", 2, num_alternations=3, num_steps=6, thresholds=thresholds)
    actual = fit(design(population.users), population.U, options, start_w=start_w)
    for i, user in enumerate(population.users):
        w, b = reference_amht.alternations(
            user, population.U, start_w[i], sparsity=2, num_steps=6, number=3, constants=thresholds
        )
        np.testing.assert_allclose(actual.w[i], w, atol=1e-7)
        np.testing.assert_allclose(actual.b[i], b, atol=1e-7)


def test_more_alternations_fit_better():
    """The published solver's squared error falls with more alternations, and faster with a w from near the truth."""
    population = planted(2, num_users=20, num_examples=30, d=15, r=2, k=2, noise=0.1)
    batch = design(population.users)
    errors = []
    for number in (1, 2, 4, 8):
        theta = fit(batch, population.U, local("alternation", 2, num_alternations=number)).theta
        errors.append([np.sum((u.y - u.X @ theta[i]) ** 2) for i, u in enumerate(population.users)])
    assert (np.diff(np.sum(errors, axis=1)) < 0).all()
    assert np.sum(errors[-1]) < 0.5 * np.sum(errors[0])
    oracle = np.linalg.lstsq(population.U, population.theta.T, rcond=None)[0].T
    near = fit(batch, population.U, local("alternation", 2, num_alternations=1), start_w=oracle)
    far = fit(batch, population.U, local("alternation", 2, num_alternations=1))
    assert np.linalg.norm(near.theta - population.theta) < np.linalg.norm(far.theta - population.theta)


@pytest.mark.parametrize("solver", SOLVERS)
def test_with_exact_w_the_residual_gradient_has_nothing_along_U(solver):
    """U'G = 0 for G = X'(y - X (U w + b)) w', for every user; a w that is off by 1 % shows."""
    population = planted(3, num_users=15, num_examples=25, d=12, r=3, k=2, noise=0.5)
    U, batch = population.U, design(population.users)
    found = fit(batch, U, local(solver, 2))
    w = least_squares_w(batch, U, found.b)
    for i, user in enumerate(population.users):

        def along_U(w_i, user=user, i=i):
            G = np.outer(user.X.T @ (user.y - user.X @ (U @ w_i + found.b[i])), w_i)
            return np.abs(U.T @ G).max() / (np.linalg.norm(user.X.T @ user.y) * np.linalg.norm(w_i))

        assert along_U(w[i]) < 1e-12
        assert along_U(1.01 * w[i]) > 1e-6
    np.testing.assert_allclose(least_squares_w(batch, U, found.b), found.w, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=st.integers(0, 2**32), m=st.integers(1, 12), sparsity=st.integers(0, 9))
@settings(max_examples=15, deadline=None)
def test_every_fit_is_feasible(solver, seed, m, sparsity):
    """At most so many nonzeros, all of them named once in the support, theta = U w + b, nothing but numbers."""
    population = planted(seed, num_users=3, num_examples=m, d=7, r=2, k=2, noise=0.1)
    found = fit(design(population.users), population.U, local(solver, sparsity, num_alternations=3, num_steps=5))
    assert found.support.shape == (3, sparsity)
    assert found.support.dtype == np.int64
    for b, support in zip(found.b, found.support, strict=True):
        used = support[support >= 0].tolist()
        assert len(set(used)) == len(used)
        assert set(np.flatnonzero(b)) <= set(used)
    np.testing.assert_allclose(found.theta, found.w @ population.U.T + found.b, rtol=1e-12, atol=1e-12)
    assert np.isfinite(found.theta).all()


def test_pursuit_stops_when_nothing_is_left():
    """Without noise and with room to spare only the planted nonzeros are picked, and theta is exact."""
    population = planted(4, num_users=20, num_examples=40, d=15, r=2, k=2)
    found = fit(design(population.users), population.U, local("pursuit", 6))
    np.testing.assert_allclose(found.theta, population.theta, atol=1e-10)
    assert ((found.support >= 0).sum(axis=1) == 2).all()
    assert found.converged.all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_state_is_the_fit_with_its_precision(solver):
    """Precision is the joint Gram matrix of (w, b on the support) over the noise variance, 1 where unused."""
    population = planted(5, num_users=4, num_examples=30, d=8, r=2, k=2)
    batch, U = design(population.users), population.U
    found = fit(batch, U, local(solver, 3, num_alternations=40, num_steps=40))
    state = found.state(batch, U, noise_variance=0.5)
    assert state.scale.tolist() == [1.0] * 4
    assert np.array_equal(state.w, found.w)
    assert np.array_equal(state.theta, found.theta)
    for i, user in enumerate(population.users):
        used = np.concatenate([[True, True], state.support[i] >= 0])
        Z = np.hstack([user.X @ U, user.X[:, state.support[i][state.support[i] >= 0]]])
        actual = state.precision[i]
        np.testing.assert_allclose(actual[np.ix_(used, used)], Z.T @ Z / 0.5, rtol=1e-8, atol=1e-8)
        assert np.array_equal(actual[np.ix_(~used, ~used)], np.eye(int((~used).sum())))
        assert not actual[np.ix_(used, ~used)].any()
        written_out = np.zeros(8)
        written_out[state.support[i][used[2:]]] = state.b[i][used[2:]]
        assert np.array_equal(written_out, found.b[i])
        assert not state.b[i][~used[2:]].any()
    if solver == "pursuit":
        assert (state.support == -1).any()


def test_precision_can_be_factored_whoever_it_is():
    """Users without examples, with one, or with the same one again and again have a positive definite precision."""
    row = np.random.default_rng(0).standard_normal((1, 6))
    users = [User(X=np.repeat(row, m, axis=0), y=np.ones(m), weight=np.ones(m)) for m in (0, 1, 9)]
    batch, U = design(users), np.eye(6)[:, :3]
    for solver in SOLVERS:
        state = fit(batch, U, local(solver, 2)).state(batch, U, noise_variance=1e-4)
        assert (np.linalg.eigvalsh(state.precision) > 0).all()


NEIGHBOURS = sorted(replacements(User(X=np.zeros((0, 12)), y=np.zeros(0), weight=np.zeros(0))))


@pytest.mark.parametrize("thresholds", [None, SCHEDULE])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("in_gram_form", [False, True])
def test_a_user_is_the_same_bits_whoever_shares_the_batch(solver, in_gram_form, thresholds):
    """Every field of the fit and every integer, alone or beside NaN, zeros, 1e300, nothing, or the same row again."""
    population = planted(6, num_users=6, num_examples=16, d=12, r=3, k=3, noise=0.2)
    U, options = population.U, local(solver, 3, num_alternations=4, num_steps=8, thresholds=thresholds)
    layout = layout_for(12, 3)

    def results(users):
        batch = design(users, length=16)
        batch = gram_of(batch) if in_gram_form else batch
        found = fit(batch, U, options)
        state = found.state(batch, U, noise_variance=0.3)
        integers = contribute_statistics(batch, found, clipping_norm=50.0, layout=layout)
        return [*(v for v in arrays(found).values() if isinstance(v, np.ndarray)), state.precision, integers]

    with np.errstate(all="ignore"):
        alone = [results([user]) for user in population.users]
        for name in NEIGHBOURS:
            bad = replacements(population.users[2])[name]
            if len(bad.y) > 16:
                continue
            together = results([*population.users[:2], bad, *population.users[3:]])
            for i in (0, 1, 3, 4, 5):
                for mine, ours in zip(alone[i], together, strict=True):
                    assert np.array_equal(mine[0], ours[i]), name


def test_a_user_that_stands_still_stays_while_others_move():
    """Alternations that go on for a slow user change no bit of one who is done."""
    rng = np.random.default_rng(11)
    model = draw_model(rng, 6, 2)
    fast, slow = draw_user(rng, model, 60, sparsity=0), draw_user(rng, model, 7, sparsity=2)
    settings = LocalSettings(solver="alternation", sparsity=2, num_alternations=400)
    alone = fit(design([fast]), model.U, settings)
    together = fit(design([fast, slow]), model.U, settings)
    assert alone.num_steps < together.num_steps
    assert alone.converged.all()
    for name in ("w", "b", "theta", "support"):
        assert np.array_equal(getattr(alone, name)[0], getattr(together, name)[0])


@pytest.mark.parametrize("solver", SOLVERS)
@given(seed=st.integers(0, 2**32), num_users=st.integers(1, 6), m=st.integers(1, 14))
@settings(max_examples=15, deadline=None)
def test_drawn_batches_do_not_matter(solver, seed, num_users, m):
    """For drawn populations, each user's fit alone is the same bits as its row in the batch."""
    population = planted(seed, num_users=num_users, num_examples=m, d=9, r=2, k=2, noise=0.3)
    options = local(solver, 2, num_alternations=3, num_steps=6)
    together = fit(design(population.users), population.U, options)
    for i, user in enumerate(population.users):
        alone = fit(design([user]), population.U, options)
        for name, value in arrays(alone).items():
            if name != "num_steps":
                assert np.array_equal(value[0], getattr(together, name)[i]), name


@pytest.mark.parametrize("solver", SOLVERS)
def test_numpy_and_torch_agree(solver):
    """The same on tensors, to rounding, the device's state included."""
    population = planted(7, num_users=6, num_examples=25, d=10, r=2, k=2, noise=0.2)
    batch, options = design(population.users), local(solver, 2, num_alternations=3, num_steps=8)
    tensors, U = torch_batch(batch), torch.from_numpy(population.U)
    ours, theirs = fit(batch, population.U, options), fit(tensors, U, options)
    for name in ("w", "b", "theta"):
        np.testing.assert_allclose(getattr(theirs, name).numpy(), getattr(ours, name), atol=1e-9)
    assert theirs.support.tolist() == ours.support.tolist()
    assert theirs.converged.tolist() == ours.converged.tolist()
    precisions = [found.state(b, u, noise_variance=0.5).precision for found, b, u in
                  ((ours, batch, population.U), (theirs, tensors, U))]  # fmt: skip
    np.testing.assert_allclose(precisions[1].numpy(), precisions[0], rtol=1e-10, atol=1e-10)


def test_an_unknown_solver_is_refused():
    """By name, with what there is."""
    with pytest.raises(ValueError, match=r"Expected solver in .*pursuit.*got solver='magic'"):
        LocalSettings(solver="magic", sparsity=1)


def learned(population, U, options, rounds):
    """U after so many rounds of fits, statistics and least squares."""
    batch = gram_of(design(population.users))
    d, r = U.shape
    for _ in range(rounds):
        A, V = statistics(batch, fit(batch, U, options))
        U = solve_for_U(A.sum(axis=0), V.sum(axis=0), d, r)
        assert np.abs(U.T @ U - np.eye(r)).max() <= 1e-12
    return U


def test_pursuit_recovers_U_exactly():
    """Without noise, from pair moments, repeated fits and least squares find the planted U, and every theta."""
    population = planted(8, num_users=150, num_examples=40, d=25, r=2, k=2)
    moments = sum(reference_amht.moment(user, "pair-moments") for user in population.users)
    start = leading_directions(moments, 2, np.eye(25))
    options = local("pursuit", 2)
    U = learned(population, start, options, 14)
    assert subspace_distance(population.U, start) > 1e-2
    assert subspace_distance(population.U, U) < 1e-6
    found = fit(design(population.users), U, options)
    assert np.abs(found.theta - population.theta).max() < 1e-5


def test_the_published_solver_converges_on_an_easy_population():
    """Examples well above features and U to start near: a thousand times nearer after eight rounds."""
    population = planted(9, num_users=100, num_examples=100, d=30, r=2, k=2)
    rng = np.random.default_rng(0)
    start = orthonormal(population.U + 0.1 * random_directions(30, 2, rng))
    U = learned(population, start, local("alternation", 2), 8)
    assert subspace_distance(population.U, U) < 1e-3 * subspace_distance(population.U, start)


def test_one_round_is_the_plain_round():
    """U after one whole round against the algorithm written out user by user."""
    population = planted(10, num_users=25, num_examples=20, d=8, r=2, k=2, noise=0.1)
    start = random_directions(8, 2, np.random.default_rng(1))
    for solver in ("alternation", "pursuit"):
        options = local(solver, 2, num_alternations=1, num_steps=6)
        plain = {
            "alternation": lambda user: reference_amht.alternations(user, start, np.zeros(2), sparsity=2, num_steps=6),
            "pursuit": lambda user: reference_amht.pursuit(user, start, sparsity=2)[:2],
        }[solver]
        expected = reference_amht.new_U(population.users, [plain(user) for user in population.users], 2)
        np.testing.assert_allclose(learned(population, start, options, 1), expected, atol=1e-7)
