"""A round as a pure function of a release: the step, its damping, and what dropouts leave alone."""

import copy
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.layout import SCALARS, split_groups
from server.initialization import initial_model, regularized_moment
from server.layout import contribution_layout
from server.rounds import CLIPPING_BOUNDS, ServerState, apply_round, initial_state, public_metric
from server.training import decimal_string

D, R = 5, 2
NOISELESS = contribution_layout(D, R, private=False)
PRIVATE = contribution_layout(D, R, private=True)


def first_state(noise_variance=1.0, clipping_norm=2.0):
    S = np.diag([3.0, 2.0, 1.5, 1.0, 0.5])
    model = initial_model(S, R, noise_variance, np.random.default_rng(0))
    return initial_state(model, regularized_moment(S), clipping_norm)


def release_of(layout, gradient=None, users=1, **scalars):
    """The noiseless sum of `users` equal users: `gradient` in units of C, `D x (R+1)`; scalars in their own units."""
    model, names = layout.groups
    x = np.zeros(model.size) if gradient is None else gradient.T.ravel()
    numbers = np.array([scalars.get(name, 0.0) for name in SCALARS]) * 2 / math.sqrt(len(SCALARS))
    vector = np.concatenate([model.share * x, names.share * numbers]) * layout.grid_scale
    return users * np.rint(vector).astype(np.int64)


def step(state, noised, *, layout=NOISELESS, denominator=1, z=0.0, **options):
    defaults = {"adapt_clipping": True, "family": "squared", "sparsity": 0, "clipping_norm": state.clipping_norm}
    return apply_round(
        state, noised, layout=layout, denominator=denominator, noise_multiplier=z, **(defaults | options)
    )


def numbers(state: ServerState):
    """Every number of a state, in one flat list."""
    values = [getattr(state, field.name) for field in fields(state) if field.name != "model"]
    values += [getattr(state.model, field.name) for field in fields(state.model)]
    return [np.array(value, np.float64).copy() for value in values]


def equal(a: ServerState, b: ServerState) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(numbers(a), numbers(b), strict=True))


def test_the_first_step_is_ascent_in_the_metric():
    """[U, beta] moves by R R' D / 1.1 for a mean gradient D: users send R'D, the first step is 1 / (1 + .2 / 2)."""
    state = first_state()
    D_mean = np.random.default_rng(1).standard_normal((D, R + 1))  # gradient in (U, beta)
    metric = public_metric(state, "squared")
    x = metric.T @ D_mean
    x *= 0.9 / np.linalg.norm(x)
    after = step(state, release_of(NOISELESS, x, presence=0.5))
    expected = metric @ (state.clipping_norm * x) / 1.1
    np.testing.assert_allclose(after.model.U, state.model.U + expected[:, :R], atol=1e-7)
    np.testing.assert_allclose(after.model.beta, state.model.beta + expected[:, R], atol=1e-7)
    assert after.elapsed == pytest.approx(0.2)
    assert after.server_round == 1


def test_momentum_adds_half_of_the_last_step():
    """Without noise the velocity is R x plus half of what it was."""
    state = replace(first_state(), velocity=np.ones((D, R + 1)))
    x = np.full((D, R + 1), 0.1)
    after = step(state, release_of(NOISELESS, x, presence=0.5))
    np.testing.assert_allclose(after.velocity, 0.5 + public_metric(state, "squared") @ (2.0 * x), atol=1e-7)


def test_momentum_starts_anew_where_the_gradient_points_against_it():
    """The velocity stays where the likelihood still rises along it in (U, beta), whatever the metric makes of it."""
    state = first_state()
    metric = public_metric(state, "squared")
    x = 0.1 * np.random.default_rng(2).standard_normal((D, R + 1))
    gradient = np.linalg.solve(metric.T, x)  # x is R' gradient
    # halfway between orthogonal to x and orthogonal to the gradient: along one of them and against the other
    share = ((gradient * x).sum() / (x**2).sum() + (gradient**2).sum() / (gradient * x).sum()) / 2
    velocity = gradient - share * x
    assert (velocity * gradient).sum() > 1e-3 > -1e-3 > (velocity * x).sum()
    for sign, kept in ((1, 0.5), (-1, 0.0)):
        after = step(replace(state, velocity=sign * velocity), release_of(NOISELESS, x, presence=0.5))
        np.testing.assert_allclose(after.velocity, kept * sign * velocity + metric @ (2.0 * x), atol=1e-7)


def test_the_metric_is_a_typical_users_covariance():
    """R R' = U U' + s2 / m S^-1, lower triangular; 4 stands for s2 under logistic loss."""
    state = replace(first_state(noise_variance=0.7), effective_examples=12.0)
    for family, s2 in (("squared", 0.7), ("logistic", 4.0)):
        R_ = public_metric(state, family)
        assert np.array_equal(R_, np.tril(R_))
        expected = state.model.U @ state.model.U.T + s2 / 12.0 * state.inverse_moment
        np.testing.assert_allclose(R_ @ R_.T, expected, atol=1e-12)


def test_the_state_before_is_left_alone():
    """Neither the state nor the release is changed, and the same release gives the same state."""
    state = first_state()
    noised = release_of(NOISELESS, np.full((D, R + 1), 0.1), clip_bit=0.5, presence=0.5, reliability=0.1, b_score=0.2)
    before, release_before = copy.deepcopy(state), noised.copy()
    first, second = (step(state, noised, sparsity=2) for _ in range(2))
    assert equal(state, before)
    assert np.array_equal(noised, release_before)
    assert equal(first, second)
    assert not equal(first, state)


@pytest.mark.parametrize("family", ["squared", "logistic"])
@pytest.mark.parametrize("z", [0.0, 20.0])
def test_a_release_of_zeros_moves_nothing_but_the_round(family, z):
    """Nobody took part: finite, the model where it was, the clipping norm too."""
    state = first_state()
    for _ in range(30):
        after = step(
            state, np.zeros(PRIVATE.size, np.int64), layout=PRIVATE, z=z, denominator=1000, family=family, sparsity=2
        )
        assert all(np.isfinite(value).all() for value in numbers(after))
        assert np.array_equal(after.model.U, state.model.U)
        assert np.array_equal(after.model.beta, state.model.beta)
        assert after.model.noise_variance == state.model.noise_variance
        assert after.model.b_variance == state.model.b_variance
        assert after.clipping_norm == state.clipping_norm
        state = after
    assert state.server_round == 30


def test_the_denominator_is_of_the_invited():
    """Half the users answering moves the model half as far: what answered is summed, what was invited divides."""
    state = first_state()
    x = np.full((D, R + 1), 0.1)
    users = 10
    everybody = step(state, release_of(NOISELESS, x, users, presence=0.5), denominator=users)
    half = step(state, release_of(NOISELESS, x, users // 2, presence=0.5), denominator=users)
    for name in ("U", "beta"):
        moved, half_moved = (getattr(s.model, name) - getattr(state.model, name) for s in (everybody, half))
        np.testing.assert_allclose(half_moved, moved / 2, atol=1e-7)
    means = split_groups(release_of(NOISELESS, x, 5), NOISELESS, 10)
    np.testing.assert_allclose(means[0], np.full(15, 0.05), atol=1e-8)


@pytest.mark.parametrize("answered", [1, 3, 10])
def test_ratios_do_not_shrink_with_dropouts(answered):
    """Noise variance, b variance and the typical number of examples follow the users who answered, however few."""
    state = first_state()
    scalars = {"presence": 0.5, "reliability": 0.15, "residual_score": 0.05, "b_score": 0.04}
    full = step(state, release_of(NOISELESS, None, 10, **scalars), denominator=10, sparsity=2)
    some = step(state, release_of(NOISELESS, None, answered, **scalars), denominator=10, sparsity=2)
    assert some.effective_examples == pytest.approx(full.effective_examples, rel=1e-6)
    assert some.model.noise_variance == pytest.approx(full.model.noise_variance, rel=1e-6)
    assert some.model.b_variance == pytest.approx(full.model.b_variance, rel=1e-6)
    assert full.model.noise_variance > state.model.noise_variance
    assert full.model.b_variance > state.model.b_variance
    # reliability .15 + 1/2 = m / (m + 10)
    assert full.effective_examples == pytest.approx(10 * 0.65 / 0.35, rel=1e-6)


def check_clipping_norm_follows_the_median(next_state=step) -> None:
    """Up while most are clipped, down while most are not, still where half are; the absent pull nowhere."""
    state = first_state(clipping_norm=2.0)
    invited = 100

    def after(below: int, above: int) -> float:
        bits = 0.5 * (below - above)
        noised = release_of(NOISELESS, users=1, clip_bit=bits, presence=0.5 * (below + above))
        return next_state(state, noised, denominator=invited).clipping_norm

    assert after(0, 100) == pytest.approx(2.0 * math.exp(0.25), rel=1e-6)
    assert after(100, 0) == pytest.approx(2.0 * math.exp(-0.25), rel=1e-6)
    assert after(50, 50) == 2.0
    assert after(5, 5) == 2.0
    assert after(0, 0) == 2.0
    assert after(10, 0) == pytest.approx(2.0 * math.exp(-0.025), rel=1e-6)


def test_clipping_norm_follows_the_median():
    """A centred bit: users who are absent leave the clipping norm where it is."""
    check_clipping_norm_follows_the_median()


def test_clipping_norm_is_still_where_it_may_not_adapt():
    """A public constant, or a cohort too small for the noise, keeps C."""
    noised = release_of(PRIVATE, clip_bit=-0.5, presence=0.5)
    state = first_state()
    assert step(state, noised, layout=PRIVATE, adapt_clipping=False).clipping_norm == 2.0
    assert step(state, noised, layout=PRIVATE, z=1.0, denominator=32).clipping_norm == 2.0
    assert step(state, 33 * noised, layout=PRIVATE, z=1.0, denominator=33).clipping_norm > 2.0


def test_clipping_norm_stays_within_public_bounds():
    """However long everybody is clipped or not."""
    for bit, bound in ((-0.5, CLIPPING_BOUNDS[1]), (0.5, CLIPPING_BOUNDS[0])):
        state = first_state()
        for _ in range(60):
            state = step(state, release_of(NOISELESS, clip_bit=bit, presence=0.5))
        assert state.clipping_norm == bound


@pytest.mark.parametrize("score", [-0.25, 0.0, 0.5])
def test_logistic_has_no_noise_variance_to_learn(score):
    """Its noise variance stays 1 exactly, whatever the release says."""
    state = first_state()
    for _ in range(5):
        noised = release_of(NOISELESS, np.full((D, R + 1), 0.1), presence=0.5, residual_score=score, b_score=0.1)
        state = step(state, noised, family="logistic", sparsity=2)
        assert state.model.noise_variance == 1.0


def test_without_a_sparse_part_b_variance_stays():
    """Sparsity 0 leaves the prior variance of b alone."""
    state = first_state()
    after = step(state, release_of(NOISELESS, presence=0.5, b_score=0.5))
    assert after.model.b_variance == state.model.b_variance


def test_noise_variance_stays_within_public_bounds():
    """Shrinking or growing without end, it stops at fixed multiples of where it started."""
    for score in (-0.25, 0.5):
        state = first_state(noise_variance=0.5)
        for _ in range(200):
            state = step(state, release_of(NOISELESS, presence=0.5, reliability=0.4, residual_score=score))
        ratio = state.model.noise_variance / 0.5
        assert ratio == pytest.approx(1e-4 if score < 0 else 4.0)


def test_steps_shrink_where_the_gradient_has_fallen_to_the_noise():
    """A gradient of the noise's own size counts as no signal: a full unit of time, and no momentum."""
    state = replace(first_state(), velocity=np.ones((D, R + 1)))
    direction = np.random.default_rng(2).standard_normal((D, R + 1))
    direction /= np.linalg.norm(direction)
    z, n = 10.0, 5000
    # in units of C the noise on the mean has this norm
    noise = z * math.sqrt(direction.size) / (PRIVATE.groups[0].share * n)
    for length, elapsed in ((0.99 * noise, 1.0), (100 * noise, 0.2)):
        noised = release_of(PRIVATE, n * length * direction, presence=n / 2)
        after = step(state, noised, layout=PRIVATE, z=z, denominator=n)
        assert after.elapsed == pytest.approx(elapsed)


def late_step_without_gradient(*, U_noise, elapsed):
    """A noised round whose release is zero: whatever U does, it gives back."""
    state = replace(first_state(), elapsed=elapsed, U_noise=U_noise)
    after = step(state, np.zeros(PRIVATE.size, np.int64), layout=PRIVATE, z=10.0, denominator=1000)
    return state, after


def test_late_in_a_run_U_gives_back_the_energy_of_its_noise():
    """Every singular value of R^-1 U loses d variances, the weakest all it has; the directions stay."""
    state, _ = late_step_without_gradient(U_noise=0.0, elapsed=5.0)
    metric = public_metric(state, "squared")
    _, before, right = np.linalg.svd(np.linalg.solve(metric, state.model.U), full_matrices=False)
    for share, survivors in ((0.5, 2), ((before[0] ** 2 + before[1] ** 2) / (2 * before[1] ** 2), 1)):
        variance = share * before[1] ** 2 / D
        _, after = late_step_without_gradient(U_noise=variance, elapsed=5.0)
        W = np.linalg.solve(metric, after.model.U)
        expected = np.sqrt(np.maximum(before**2 - D * variance, 0.0))
        np.testing.assert_allclose(np.linalg.norm(W @ right.T, axis=0), expected, atol=1e-9)
        assert (expected > 0).sum() == survivors
        assert after.U_noise == 0.0


def test_early_in_a_run_U_keeps_its_noise():
    """Directions are still being found: nothing is taken, what is owed stays."""
    state, after = late_step_without_gradient(U_noise=0.01, elapsed=0.5)
    assert np.array_equal(after.model.U, state.model.U)
    assert after.U_noise == 0.01


def test_what_U_owes_is_the_noise_of_its_steps():
    """Each step adds its length squared times the variance that its release cannot explain; without noise nothing."""
    x = np.full((D, R + 1), 0.1)
    z, n = 10.0, 5000
    after = step(first_state(), release_of(PRIVATE, n * x, presence=n / 2), layout=PRIVATE, z=z, denominator=n)
    stddev = z * 2.0 / (PRIVATE.groups[0].share * n)
    assert after.U_noise == pytest.approx((stddev / (1 + 0.5 * after.elapsed)) ** 2, rel=1e-6)
    state = replace(first_state(), elapsed=50.0)
    without = step(state, release_of(NOISELESS, x, presence=0.5))
    assert without.U_noise == 0.0
    length = 1 / (1 + 0.5 * without.elapsed)
    expected = state.model.U + length * (public_metric(state, "squared") @ (2.0 * x))[:, :R]
    np.testing.assert_allclose(without.model.U, expected, atol=1e-7)


def test_noise_alone_leaves_a_narrow_prior():
    """Nobody sends anything but noise: in the end U is no wider than it began, up to one late round's noise."""
    rng = np.random.default_rng(3)
    state = first_state()
    began = np.linalg.norm(state.model.U)
    for _ in range(20):
        noised = np.rint(20.0 * PRIVATE.grid_scale * rng.standard_normal(PRIVATE.size)).astype(np.int64)
        state = step(state, noised, layout=PRIVATE, z=20.0, denominator=100)
    assert np.linalg.norm(state.model.U) < 1.5 * began


@given(
    seed=st.integers(0, 2**32),
    users=st.sampled_from([1, 2, 20, 100, 1000]),
    z=st.sampled_from([0.05, 1.0, 13.36, 50.0, 300.0]),
)
@settings(max_examples=20, deadline=None)
def test_noise_alone_never_breaks_a_run(seed, users, z):
    """Thirty rounds of nothing but noise on any number of users: every state is finite and the next metric exists."""
    rng = np.random.default_rng(seed)
    state = first_state()
    for _ in range(30):
        noised = np.rint(z * PRIVATE.grid_scale * rng.standard_normal(PRIVATE.size)).astype(np.int64)
        state = step(state, noised, layout=PRIVATE, z=z, denominator=users, sparsity=3)
        assert all(np.isfinite(value).all() for value in numbers(state))
        assert np.isfinite(public_metric(state, "squared")).all()
    assert 0 < state.model.b_variance < math.inf
    assert state.model.noise_variance > 0
    # scale of the prior: x'U w of typical users; noise must not inflate it without end
    assert np.abs(state.model.U).max() < 1e6


def test_a_release_without_scalars_of_sense_is_survived():
    """Noise can put the scalars beyond what users can send: presence negative, reliability above 1."""
    for sign in (1, -1):
        noised = np.full(PRIVATE.size, sign * 2**50, np.int64)
        after = step(first_state(), noised, layout=PRIVATE, z=1.0, denominator=10, sparsity=2)
        assert all(np.isfinite(value).all() for value in numbers(after))
        assert after.effective_examples <= 90.0 + 1e-9
        assert after.effective_examples >= 2.5 - 1e-9


@given(st.floats(*CLIPPING_BOUNDS))
def test_the_clipping_norm_is_the_same_on_both_sides(value):
    """The ledger's decimal string reads back to within 1e-11, and writing that again changes nothing.

    Server and nodes both compute with the float that the string says.
    """
    text = decimal_string(value)
    read = float(text)
    assert abs(read - value) <= 1e-11 * value
    assert decimal_string(read) == text
    assert float(decimal_string(read)) == read
    assert set(text) <= set("0123456789.")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.0, "1"),
        (0.01, "0.01"),
        (1000.0, "1000"),
        (1 / 3, "0.333333333333"),
        (1e-6, "0.000001"),
        (123456.789, "123456.789"),
    ],
)
def test_decimal_string_is_plain(value, text):
    """No exponent, no trailing zeros."""
    assert decimal_string(value) == text
