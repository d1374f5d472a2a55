"""Posteriors of users given the released prior, against dense Gaussian conditioning and scikit-learn."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression, Ridge

from client.batches import Design, Gram, gram_of
from client.personalize import (
    WHILE_TRAINING,
    Choice,
    Solution,
    evidence_gain,
    log_prior_odds,
    personalize,
    solve,
)
from common.families import FAMILIES
from common.model import SharedModel
from tests import reference
from tests.populations import arrays, design, draw_model, draw_user, draw_users, torch_batch, torch_model

SQUARED, LOGISTIC = FAMILIES["squared"], FAMILIES["logistic"]
# dimension, rank, sparsity, examples of each user
SHAPES = {
    "ordinary": (7, 2, 3, (5, 12, 30)),
    "one user": (7, 2, 3, (12,)),
    "one example each": (5, 2, 2, (1, 1)),
    "one feature": (1, 1, 1, (4, 9)),
    "rank 0": (6, 0, 2, (4, 15)),
    "full rank": (4, 4, 2, (3, 15)),
    "no sparse part": (6, 2, 0, (3, 20)),
    "every feature may be nonzero": (5, 2, 5, (3, 20)),
    "more examples than features": (4, 2, 2, (40, 41)),
    "users without examples": (5, 2, 2, (0, 6, 0)),
}


def check_against_reference(
    solution: Solution, users: list[reference.User], model: SharedModel, sparsity: int, least_probability: float = 0.0
) -> None:
    """Every field of every user is what dense conditioning gives, to 1e-10 of its size."""
    for i, user in enumerate(users):
        expected = reference.posterior(user, model, sparsity, least_probability)
        used = solution.support[i] >= 0
        assert solution.support[i][used].tolist() == list(expected.support)
        r, s = model.rank, len(expected.support)
        precision = solution.precision[i]
        pairs = {
            "w": (solution.w[i], expected.w),
            "b": (written_out(solution, model, i)[0], expected.b),
            "share": (solution.share[i][used], np.array(expected.share)),
            "scale": (solution.scale[i], expected.scale),
            "theta": (solution.theta[i], expected.theta),
            "q": (solution.marginal.q[i], expected.q),
            "UH": (solution.marginal.UH[i], expected.scale * model.U.T @ expected.H),
            "precision": (precision[: r + s, : r + s], expected.precision),
            "squared_error": (solution.squared_error[i], expected.squared_error),
        }
        if sparsity:
            pairs["curvature"] = (solution.marginal.curvature[i], np.diag(expected.H))
        squares = float(user.weight @ user.y**2)  # of which the squared error is what is left
        for name, (actual, wanted) in pairs.items():
            size = max(1.0, squares if name == "squared_error" else float(np.abs(wanted).max(initial=0.0)))
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-10 * size, err_msg=f"{name} of user {i}")
        unused = precision[r + s :, r + s :]
        assert np.array_equal(unused, np.eye(len(unused)) / model.b_variance)
        assert not precision[: r + s, r + s :].any()


def written_out(solution: Solution, model: SharedModel, i: int):
    """b and its prior variances of one user, `d` numbers each."""
    b, b_prior = np.zeros(model.dimension), np.zeros(model.dimension)
    used = solution.support[i] >= 0
    b[solution.support[i][used]] = solution.b[i][used]
    b_prior[solution.support[i][used]] = model.b_variance * solution.share[i][used]
    return b, b_prior


def test_an_uncertain_nonzero_is_averaged_over_being_one():
    """Its posterior mean is its probability times the mean that it has if it is nonzero."""
    rng = np.random.default_rng(5)
    model = draw_model(rng, 5, 1)
    users = draw_users(rng, model, (3, 8, 20), sparsity=0)
    batch = design(users)
    averaged = solve(batch, model, sparsity=1)
    certain = solve(batch, model, sparsity=1, choice=Choice(support=averaged.support, share=np.ones((3, 1))))
    none = Choice(support=np.full((3, 1), -1), share=np.zeros((3, 1)))
    before = solve(batch, model, sparsity=1, choice=none).marginal
    j = averaged.support[:, 0]
    gain = evidence_gain(before.q, before.curvature, model.b_variance)[np.arange(3), j]
    probability = 1 / (1 + np.exp(log_prior_odds(5, 1) - gain))
    assert (probability < 0.9).any()
    np.testing.assert_allclose(averaged.b[:, 0], probability * certain.b[:, 0], rtol=1e-9)


@pytest.mark.parametrize("least_probability", [0.0, WHILE_TRAINING])
@pytest.mark.parametrize("form", ["design", "gram"])
@pytest.mark.parametrize("name", SHAPES)
def test_equals_dense_gaussian_conditioning(name, form, least_probability):
    """Whatever the shape and the form of the batch, the posterior is that of the joint Gaussian."""
    d, r, k, counts = SHAPES[name]
    rng = np.random.default_rng(len(name))
    model = draw_model(rng, d, r)
    users = draw_users(rng, model, counts, sparsity=min(k, 2), weighted=True)
    batch = design(users, length=max(counts) + 3)
    batch = batch if form == "design" else gram_of(batch)
    solution = solve(batch, model, sparsity=k, least_probability=least_probability, with_precision=True)
    check_against_reference(solution, users, model, k, least_probability)


@pytest.mark.parametrize("noise_variance", [1e-3, 1e3])
@pytest.mark.parametrize("form", ["design", "gram"])
def test_equals_the_reference_at_other_noise(noise_variance, form):
    """Little and much noise are conditioned on as exactly."""
    rng = np.random.default_rng(5)
    model = draw_model(rng, 6, 2, noise_variance=noise_variance)
    users = draw_users(rng, model, (1, 9, 25), sparsity=2)
    batch = design(users) if form == "design" else gram_of(design(users))
    check_against_reference(solve(batch, model, sparsity=3, with_precision=True), users, model, 3)


@pytest.mark.parametrize("columns", [(0,), (1,), (0, 1)])
def test_directions_that_are_zero_have_no_coordinate(columns):
    """A zero column of U gets w = 0 with the prior's variance and moves nobody."""
    rng = np.random.default_rng(6)
    drawn = draw_model(rng, 6, 2)
    U = drawn.U.copy()
    U[:, list(columns)] = 0.0
    model = replace(drawn, U=U)
    users = draw_users(rng, model, (3, 12), sparsity=1)
    solution = solve(design(users), model, sparsity=2, with_precision=True)
    check_against_reference(solution, users, model, 2)
    assert not solution.w[:, list(columns)].any()


@pytest.mark.parametrize("noise_variance", [1e-12, 1e-9, 1e9, 1e12])
@pytest.mark.parametrize("form", ["design", "gram"])
def test_extreme_noise_leaves_finite_posteriors(noise_variance, form):
    """Almost no noise interpolates, almost only noise leaves the prior; neither overflows."""
    rng = np.random.default_rng(7)
    drawn = draw_model(rng, 6, 2)
    users = draw_users(rng, drawn, (0, 1, 3, 20), sparsity=1)
    model = replace(drawn, noise_variance=noise_variance)
    batch = design(users) if form == "design" else gram_of(design(users))
    with np.errstate(all="ignore"):  # as on a node
        solution = solve(batch, model, sparsity=2, with_precision=True)
    for value in (solution.w, solution.b, solution.theta, solution.scale, solution.squared_error):
        assert np.isfinite(value).all()
    assert (solution.scale > 0).all()
    assert (solution.squared_error >= 0).all()
    if noise_variance > 1:
        np.testing.assert_allclose(solution.theta, np.broadcast_to(model.beta, (4, 6)), atol=1e-5)


def test_a_user_without_examples_is_the_prior():
    """Nothing observed: theta is beta, w and b are 0, and while training no feature is chosen."""
    model = draw_model(np.random.default_rng(8), 5, 2)
    empty = reference.User(X=np.zeros((0, 5)), y=np.zeros(0), weight=np.zeros(0))
    solution = solve(design([empty]), model, sparsity=2, with_precision=True)
    assert np.array_equal(solution.theta[0], model.beta)
    training = solve(design([empty]), model, sparsity=2, least_probability=WHILE_TRAINING)
    assert training.support.tolist() == [[-1, -1]]
    assert not solution.w.any()
    assert not solution.b.any()
    assert solution.squared_error.tolist() == [0.0]
    np.testing.assert_allclose(solution.scale, [1.0], rtol=1e-15)


def test_weight_zero_is_absence_and_weight_two_is_two_examples():
    """An example of weight 0 might as well not be there, one of weight 2 might as well be there twice."""
    rng = np.random.default_rng(9)
    model = draw_model(rng, 5, 2)
    user = draw_user(rng, model, 6, sparsity=1)
    weight = np.array([1.0, 2.0, 1.0, 0.0, 1.0, 0.0])
    repeated = np.array([0, 1, 1, 2, 4])
    plain = reference.User(X=user.X[repeated], y=user.y[repeated], weight=np.ones(5))
    weighted = solve(design([replace(user, weight=weight)]), model, sparsity=2, with_precision=True)
    check_against_reference(weighted, [plain], model, 2)


def test_equals_ridge_of_scikit_learn_where_every_direction_is_free():
    """With U = I, no b and beta the centre, theta is scikit-learn's ridge at penalty s2 / tau around beta."""
    rng = np.random.default_rng(10)
    model = replace(draw_model(rng, 5, 5), U=np.eye(5))
    user = draw_user(rng, model, 20)
    solution = solve(design([user]), model, sparsity=0)
    ridge = Ridge(alpha=model.noise_variance / solution.scale[0], fit_intercept=False)
    ridge.fit(user.X, user.y - user.X @ model.beta)
    np.testing.assert_allclose(solution.theta[0], model.beta + ridge.coef_, atol=1e-10)


def test_the_posterior_mean_is_the_prior_covariance_times_the_gradient():
    """U'q = w / tau and q_S = b / b_variance; so with exact least squares, s2 -> 0, U'G vanishes."""
    rng = np.random.default_rng(11)
    drawn = draw_model(rng, 8, 3)
    users = draw_users(rng, drawn, (12, 40), sparsity=2)
    solution = solve(design(users), drawn, sparsity=3)
    Uq = solution.marginal.q @ drawn.U
    np.testing.assert_allclose(Uq, solution.w / solution.scale[:, None], atol=1e-10)
    least_squares = replace(drawn, noise_variance=1e-9)
    solution = solve(design(users), least_squares, sparsity=0)
    residual_gradient = least_squares.noise_variance * solution.marginal.q  # X'(y - X theta)
    assert np.abs(residual_gradient).max() > 0.1
    assert np.abs(residual_gradient @ drawn.U).max() < 1e-6


def test_planted_features_are_found():
    """A large planted b on enough examples is what the greedy choice finds, largest first."""
    rng = np.random.default_rng(12)
    model = draw_model(rng, 10, 2, noise_variance=0.01)
    X = rng.standard_normal((60, 10))
    theta = model.beta + model.U @ np.array([1.0, -1.0])
    theta[7] += 3.0
    theta[2] -= 2.0
    user = reference.User(X=X, y=X @ theta + 0.1 * rng.standard_normal(60), weight=np.ones(60))
    solution = solve(design([user]), model, sparsity=4)
    assert solution.support[0, :2].tolist() == [7, 2]
    np.testing.assert_allclose(solution.b[0, :2], [3.0, -2.0], atol=0.2)
    np.testing.assert_allclose(solution.theta[0], theta, atol=0.1)


def test_given_choice_is_used_as_it_is():
    """With features named by the caller nothing is chosen; -1 leaves a slot out."""
    rng = np.random.default_rng(13)
    model = draw_model(rng, 6, 2)
    users = draw_users(rng, model, (10, 10), sparsity=2)
    choice = Choice(support=np.array([[4, -1], [3, 0]]), share=np.array([[0.7, 0.0], [1.0, 0.2]]))
    solution = solve(design(users), model, sparsity=2, choice=choice, with_precision=True)
    assert np.array_equal(solution.support, choice.support)
    assert np.array_equal(solution.share, choice.share)
    for i, prior in enumerate(({4: 0.7}, {3: 1.0, 0: 0.2})):
        b_prior = np.array([model.b_variance * prior.get(j, 0.0) for j in range(6)])
        C = reference.covariance(users[i], model, float(solution.scale[i]), b_prior)
        q = users[i].X.T @ np.linalg.solve(C, users[i].y - users[i].X @ model.beta)
        np.testing.assert_allclose(solution.marginal.q[i], q, atol=1e-10)
        np.testing.assert_allclose(written_out(solution, model, i)[0], b_prior * q, atol=1e-10)


def test_evidence_gain_is_the_difference_of_log_evidence():
    """The gain of one feature is the log density of y with it less the log density without."""
    rng = np.random.default_rng(14)
    model = draw_model(rng, 5, 2)
    user = draw_user(rng, model, 9, sparsity=1)
    solution = solve(design([user]), model, sparsity=1, least_probability=2.0)  # nothing is that probable
    scale = float(solution.scale[0])
    without = reference.log_evidence(user, model, scale, np.zeros(5))
    with_one = model.b_variance * np.eye(5)
    expected = [reference.log_evidence(user, model, scale, b_prior) - without for b_prior in with_one]
    actual = evidence_gain(solution.marginal.q, solution.marginal.curvature, model.b_variance)[0]
    np.testing.assert_allclose(actual, expected, atol=1e-10)


@pytest.mark.parametrize(
    ("d", "k", "expected"), [(10, 5, 0.0), (10, 1, np.log(9)), (4, 4, -np.log(4)), (3, 0, np.log(3))]
)
def test_log_prior_odds(d, k, expected):
    """Odds against a feature are d - k to k, with at least one on either side."""
    assert log_prior_odds(d, k) == pytest.approx(expected)


def flat(solution: Solution):
    plain = {name: value for name, value in arrays(solution).items() if name != "marginal"}
    return plain | {name: getattr(solution.marginal, name) for name in ("q", "curvature", "UH")}


@pytest.mark.parametrize(("family", "form"), [("squared", "design"), ("squared", "gram"), ("logistic", "design")])
@pytest.mark.parametrize("sparsity", [0, 3])
def test_numpy_and_torch_agree(family, form, sparsity):
    """The same code on NumPy arrays and on torch tensors gives the same posteriors to 1e-10."""
    rng = np.random.default_rng(15)
    model = draw_model(rng, 7, 2, noise_variance=0.3 if family == "squared" else 1.0)
    batch = design(draw_users(rng, model, (4, 15, 30), sparsity=2, family=family))
    batch = gram_of(batch) if form == "gram" else batch
    options = {"family": FAMILIES[family], "sparsity": sparsity, "with_precision": True}
    ours = flat(personalize(batch, model, **options))
    theirs = flat(personalize(torch_batch(batch), torch_model(model), **options))
    for name, value in ours.items():
        assert theirs[name].shape == value.shape, name
        np.testing.assert_allclose(theirs[name].numpy(), value, rtol=1e-10, atol=1e-10, err_msg=name)


@given(seed=st.integers(0, 2**32), family=st.sampled_from(["squared", "logistic"]), sparsity=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_inputs_are_left_alone(seed, family, sparsity):
    """Personalizing changes neither examples nor prior, and twice the same gives the same bits."""
    rng = np.random.default_rng(seed)
    model = draw_model(rng, 4, 2, noise_variance=0.5 if family == "squared" else 1.0)
    batch = design(draw_users(rng, model, (0, 2, 9), family=family))
    inputs = arrays(batch) | {"beta": model.beta, "U": model.U}
    before = {name: value.copy() for name, value in inputs.items()}
    first = flat(personalize(batch, model, family=FAMILIES[family], sparsity=sparsity, with_precision=True))
    second = flat(personalize(batch, model, family=FAMILIES[family], sparsity=sparsity, with_precision=True))
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert all(np.array_equal(before[name], inputs[name]) for name in before)


def test_another_loss_needs_the_examples_themselves():
    """Second moments do not determine a logistic posterior, so a Gram is refused."""
    model = draw_model(np.random.default_rng(0), 3, 1)
    batch = gram_of(design(draw_users(np.random.default_rng(0), model, (5,))))
    assert isinstance(batch, Gram)
    with pytest.raises(TypeError, match="Expected a Design"):
        personalize(batch, model, family=LOGISTIC, sparsity=0)


@pytest.mark.parametrize("sparsity", [0, 3])
def test_logistic_point_is_stationary(sparsity):
    """On well-behaved data the gradient of the negative log posterior vanishes, below 1e-6, on w and on the support."""
    rng = np.random.default_rng(16)
    model = draw_model(rng, 6, 2, noise_variance=1.0, spread=0.4)
    users = draw_users(rng, model, (0, 1, 5, 20, 80, 300), sparsity=1, family="logistic", weighted=True)
    solution = personalize(design(users), model, family=LOGISTIC, sparsity=sparsity)
    for i, user in enumerate(users):
        w, (b, b_prior) = solution.w[i], written_out(solution, model, i)
        slope_w, slope_b = reference.logistic_gradient(
            user, model, scale=float(solution.scale[i]), w=w, b=b, b_prior=b_prior
        )
        assert np.abs(slope_w).max() < 1e-6
        assert np.abs(slope_b).max(initial=0.0) < 1e-6
        assert np.allclose(solution.theta[i], model.beta + model.U @ w + b, atol=1e-12)


def test_logistic_gradient_is_the_residual_gradient_at_the_mode():
    """q is X'(y - p) at the returned point, so the gradient in beta is that of the penalised likelihood."""
    rng = np.random.default_rng(17)
    model = draw_model(rng, 6, 2, noise_variance=1.0, spread=0.4)
    users = draw_users(rng, model, (5, 40), family="logistic")
    solution = personalize(design(users), model, family=LOGISTIC, sparsity=2)
    for i, user in enumerate(users):
        p = 1 / (1 + np.exp(-user.X @ solution.theta[i]))
        np.testing.assert_allclose(solution.marginal.q[i], user.X.T @ (user.y - p), atol=1e-6)


def test_logistic_equals_scikit_learn_with_full_rank():
    """With U = I and no b the point is scikit-learn's ridge logistic regression with C = tau."""
    rng = np.random.default_rng(18)
    model = SharedModel(beta=np.zeros(4), U=np.eye(4), b_variance=1.0, noise_variance=1.0)
    user = draw_user(rng, model, 60, family="logistic")
    solution = personalize(design([user]), model, family=LOGISTIC, sparsity=0)
    oracle = LogisticRegression(C=float(solution.scale[0]), fit_intercept=False, tol=1e-12, max_iter=1000)
    oracle.fit(user.X, user.y)
    np.testing.assert_allclose(solution.theta, oracle.coef_, atol=1e-6)


def test_logistic_equals_scikit_learn_with_rank_0():
    """Without U and with every feature in b the point is scikit-learn's with each feature scaled by its prior."""
    rng = np.random.default_rng(19)
    drawn = SharedModel(beta=np.zeros(4), U=np.eye(4), b_variance=0.05, noise_variance=1.0)
    user = draw_user(rng, drawn, 60, family="logistic")
    model = replace(drawn, U=np.zeros((4, 0)))
    solution = personalize(design([user]), model, family=LOGISTIC, sparsity=4)
    assert sorted(solution.support[0].tolist()) == [0, 1, 2, 3]
    stddev = np.sqrt(written_out(solution, model, 0)[1])
    oracle = LogisticRegression(C=1.0, fit_intercept=False, tol=1e-12, max_iter=1000)
    oracle.fit(user.X * stddev, user.y)
    np.testing.assert_allclose(solution.theta, oracle.coef_ * stddev, atol=1e-6)


def hard_users(rng: np.random.Generator, d: int) -> dict[str, reference.User]:
    """Users on which an undamped Newton step overshoots, or the likelihood has no maximum."""
    line = np.linspace(-1, 1, 30)
    X = np.column_stack([line, *rng.standard_normal((d - 1, 30))])
    labels = (line > 0) * 1.0
    ones = np.ones(30)
    return {
        "separable": reference.User(X=X, y=labels, weight=ones),
        "separable and heavy": reference.User(X=X, y=labels, weight=1e6 * ones),
        "all alike": reference.User(X=np.tile(X[:1], (30, 1)), y=ones, weight=ones),
        "far from the prior": reference.User(X=1000 * X, y=1 - labels, weight=ones),
        "far and mixed": reference.User(X=1000 * X, y=rng.integers(0, 2, 30) * 1.0, weight=100 * ones),
        "one example": reference.User(X=X[:1], y=np.zeros(1), weight=np.ones(1)),
    }


@pytest.mark.parametrize("sparsity", [0, 2])
@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
def test_logistic_never_ends_above_its_start(spread, sparsity):
    """However hard the data, the negative log posterior at the returned point is at most that of the prior's mean."""
    rng = np.random.default_rng(20)
    model = draw_model(rng, 5, 2, noise_variance=1.0, spread=spread)
    for name, user in hard_users(rng, 5).items():
        solution = personalize(design([user]), model, family=LOGISTIC, sparsity=sparsity)
        w, (b, b_prior) = solution.w[0], written_out(solution, model, 0)
        assert np.isfinite(solution.theta).all(), name
        scale = float(solution.scale[0])
        end = reference.logistic_objective(user, model, scale=scale, w=w, b=b, b_prior=b_prior)
        start = reference.logistic_objective(user, model, scale=scale, w=0 * w, b=0 * b, b_prior=b_prior)
        assert end <= start * (1 + 1e-12), name


def test_a_batch_is_its_users():
    """Every user of a batch has the numbers it would have alone."""
    rng = np.random.default_rng(21)
    model = draw_model(rng, 5, 2)
    users = draw_users(rng, model, (3, 0, 8, 1), sparsity=1)
    together = flat(solve(design(users, length=8), model, sparsity=2, with_precision=True))
    for i, user in enumerate(users):
        alone = flat(solve(design([user], length=8), model, sparsity=2, with_precision=True))
        for name, value in alone.items():
            assert np.array_equal(value[0], together[name][i]), name


def test_state_keeps_what_the_device_needs():
    """The record for the store holds the posterior's own arrays."""
    rng = np.random.default_rng(22)
    model = draw_model(rng, 5, 2)
    solution = solve(design(draw_users(rng, model, (9,))), model, sparsity=2, with_precision=True)
    state = solution.state()
    assert all(getattr(state, name) is getattr(solution, name) for name in vars(state))
    assert isinstance(design(draw_users(rng, model, (1,))), Design)
