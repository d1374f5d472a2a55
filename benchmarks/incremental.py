"""Incremental updates: how fast, how near to training on everything, and what forgetting and refolding cost.

    OPENBLAS_NUM_THREADS=1 python -m benchmarks.incremental [speed] [correlation] [drift] [refolding]

Prints markdown tables. Excess log-loss is the expected log-loss on fresh examples above that of the true coefficients.
The speed of lambda-learner is measured in the same process on a part of the same entities, once as it comes and once
with its search carried to the same solution.
"""

import argparse
import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from client.batches import Design
from client.incremental import Curvature, Examples, Posterior, fresh, update
from client.personal_update import released_prior, update_personal
from client.personalize import personalize
from client.refolding import gram_after, refold, refold_gram
from common.families import FAMILIES, expit
from common.linalg import apply
from common.model import Array, SharedModel

LOGISTIC = FAMILIES["logistic"]
ENTITIES, EXAMPLES, FEATURES = 10_000, 20, 20
REPLICATES, BATCHES, BATCH = 100, 20, 100
TEST = 4000


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a markdown table."""
    print("\n| " + " | ".join(header) + " |")
    print("|" + "--|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def draw_examples(
    rng: np.random.Generator, theta: Array, num_examples: int, *, correlation: float = 0.0, scale: float = 1.0
) -> Examples:
    """Examples of n entities with coefficients `theta`, an intercept first; features equally correlated."""
    n, p = theta.shape
    own, common = rng.standard_normal((n, num_examples, p)), rng.standard_normal((n, num_examples, 1))
    X = scale * (np.sqrt(1 - correlation) * own + np.sqrt(correlation) * common)
    X[:, :, 0] = 1
    eta = apply(X, theta)
    y = (rng.random(eta.shape) < expit(eta)).astype(np.float64)
    return Examples(X=X, y=y, weight=np.ones_like(y), offset=np.zeros_like(y))


def excess(theta: Array, truth: Array, X: Array) -> Array:
    """`n`, mean expected log-loss of `theta` above the truth's, on the features `X`."""
    eta, true_eta = apply(X, theta), apply(X, truth)
    p = expit(true_eta)

    def loss(at: Array) -> Array:
        return p * LOGISTIC.loss(at, np.ones_like(p)) + (1 - p) * LOGISTIC.loss(at, np.zeros_like(p))

    gain: Array = (loss(eta) - loss(true_eta)).mean(axis=1)
    return gain


def lambda_learner(posterior: Posterior, examples: Examples, rows: range, *, to_the_end: bool) -> tuple[Array, float]:
    """Coefficients of some entities by the package, and its seconds an entity."""
    from linkedin.learner.ds.indexed_dataset import IndexedDataset  # noqa: PLC0415 -- a rival, for one suite
    from linkedin.learner.ds.indexed_model import IndexedModel  # noqa: PLC0415
    from linkedin.learner.prediction import trainer_lbgfs  # noqa: PLC0415
    from linkedin.learner.prediction import trainer_sequential_bayesian_logistic_loss_with_l2 as sequential  # noqa: PLC0415
    from linkedin.learner.prediction.hessian_type import HessianType  # noqa: PLC0415
    from scipy import optimize, sparse  # noqa: PLC0415

    def search(*arguments: Any, disp: int, **options: Any) -> Any:
        # the package does not pass its gradient tolerance on, and scipy no longer wants `disp`
        return optimize.fmin_l_bfgs_b(*arguments, pgtol=1e-8 if to_the_end else 1e-5, **options)

    trainer_lbgfs.fmin_l_bfgs_b = search
    thetas = []
    start = time.perf_counter()
    for i in rows:
        trainer = sequential.TrainerSequentialBayesianLogisticLossWithL2(
            training_data=IndexedDataset(
                sparse.csr_matrix(examples.X[i]), 2 * examples.y[i] - 1, examples.weight[i], examples.offset[i]
            ),
            initial_model=IndexedModel(posterior.mean[i], sparse.csr_matrix(posterior.precision[i])),
            hessian_type=HessianType.FULL,
            penalty=1.0,
            delta=0.8,
        )
        thetas.append(trainer.train(precision=10.0 if to_the_end else 1e7)[0].theta)
    return np.array(thetas), (time.perf_counter() - start) / len(rows)


def speed() -> None:
    """Entities updated per second and core, against lambda-learner on the same batch from the same past."""
    rng = np.random.default_rng(0)
    truth = 0.5 * rng.standard_normal((ENTITIES, FEATURES))
    options = {"family": LOGISTIC, "forgetting": 0.8, "prior_precision": 1.0}
    start = fresh(ENTITIES, FEATURES, 1.0, like=truth)
    past = update(start, draw_examples(rng, truth, EXAMPLES), **options).posterior
    examples = draw_examples(rng, truth, EXAMPLES)
    rows = []
    ratios: dict[bool, list[float]] = {False: [], True: []}
    ours, away = [], 0.0
    for block in range(5):
        part = range(60 * block, 60 * block + 60)
        begin = time.perf_counter()
        found = update(past, examples, **options)
        ours.append((time.perf_counter() - begin) / ENTITIES)
        for to_the_end, collected in ratios.items():
            theta, seconds = lambda_learner(past, examples, part, to_the_end=to_the_end)
            collected.append(seconds / ours[-1])
            mine = found.posterior.mean[part.start : part.stop]
            if to_the_end:
                away = max(away, float((np.abs(theta - mine).max(axis=1) / np.abs(mine).max(axis=1)).max()))
    rows.append(["umbel", f"{1 / np.median(ours):,.0f}", "1"])
    for to_the_end, name in ((True, "lambda-learner, same solution"), (False, "lambda-learner as it comes")):
        ratio = float(np.median(ratios[to_the_end]))
        rows.append([name, f"{1 / (np.median(ours) * ratio):,.0f}", f"1/{ratio:.0f}"])
    table(["one core", "entities/s", "speed"], rows)
    print(f"\nLargest relative difference of theta at the same solution: {away:.1e}.")
    print(f"Newton steps: mean {found.iterations.mean():.1f}, most {found.iterations.max()}; all converged: ", end="")
    print(f"{found.converged.all()}. Peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB.")


def replay(parts: Sequence[Examples], *, forgetting: float, curvature: Curvature = "full") -> list[Posterior]:
    """The posterior after each part."""
    p = parts[0].X.shape[2]
    posterior = fresh(len(parts[0].X), p, 1.0, like=parts[0].X, curvature=curvature)
    after = []
    for part in parts:
        posterior = update(
            posterior, part, family=LOGISTIC, forgetting=forgetting, prior_precision=1.0, curvature=curvature
        ).posterior
        after.append(posterior)
    return after


def together(parts: Sequence[Examples]) -> Examples:
    """All parts at once."""
    names = ("X", "y", "weight", "offset")
    return Examples(**{name: np.concatenate([getattr(part, name) for part in parts], axis=1) for name in names})


METHODS: dict[str, Callable[[list[Examples]], Array]] = {
    "batch": lambda parts: replay([together(parts)], forgetting=1.0)[-1].mean,
    "full": lambda parts: replay(parts, forgetting=1.0)[-1].mean,
    "diagonal, 1/diag(H⁻¹)": lambda parts: replay(parts, forgetting=1.0, curvature="diagonal")[-1].mean,
    "diagonal-simple, diag(H)": lambda parts: replay(parts, forgetting=1.0, curvature="diagonal-simple")[-1].mean,
    "warm start only": lambda parts: replay(parts[-1:], forgetting=0.0)[-1].mean,
}


def correlated(level: float, *, replicates: int) -> dict[str, Array]:
    """Excess log-loss (`replicates`) of each method after all batches, features correlated at `level`."""
    rng = np.random.default_rng(1)
    truth = 0.5 * rng.standard_normal((replicates, FEATURES))
    parts = [draw_examples(rng, truth, BATCH, correlation=level) for _ in range(BATCHES)]
    test = draw_examples(rng, truth, TEST, correlation=level).X
    return {name: excess(method(parts), truth, test) for name, method in METHODS.items()}


def correlation() -> None:
    """What is kept of the curvature matters where features are correlated: 20 batches of 100, 20 features."""
    levels = (0.0, 0.6, 0.9)
    found = [correlated(level, replicates=REPLICATES) for level in levels]
    rows = [[name, *(f"{1e3 * column[name].mean():.1f}" for column in found)] for name in METHODS]
    paired = [1e3 * (column["full"] - column["batch"]) for column in found]
    each = (f"{value.mean():+.2f} ± {value.std() / np.sqrt(REPLICATES):.2f}" for value in paired)
    rows.append(["full − batch, paired", *each])
    table(["excess log-loss x 1e3, correlation", *(str(level) for level in levels)], rows)


FACTORS = (1.0, 0.9, 0.8, 0.5, 0.2)
WALKS = {"none": 0.0, "mild": 0.08, "strong": 0.25}


def drifting(walk: float, *, replicates: int) -> list[float]:
    """Mean excess log-loss on the next batch, over the later half, for each of `FACTORS`.

    The coefficients walk by N(0, walk^2) between batches.
    """
    rng = np.random.default_rng(2)
    truths = [0.5 * rng.standard_normal((replicates, FEATURES))]
    truths += [walk * rng.standard_normal(truths[0].shape) for _ in range(BATCHES - 1)]
    truths = list(np.cumsum(truths, axis=0))
    parts = [draw_examples(rng, truth, BATCH) for truth in truths]
    late = range(BATCHES // 2, BATCHES)
    column = []
    for factor in FACTORS:
        after = replay(parts, forgetting=factor)
        column.append(float(np.mean([excess(after[t - 1].mean, truths[t], parts[t].X) for t in late])))
    return column


def drift() -> None:
    """Predict, then update: how much to forget depends on how fast the coefficients walk."""
    columns = [drifting(walk, replicates=REPLICATES) for walk in WALKS.values()]
    rows = [
        [str(factor), *(f"**{1e3 * c[i]:.1f}**" if c[i] == min(c) else f"{1e3 * c[i]:.1f}" for c in columns)]
        for i, factor in enumerate(FACTORS)
    ]
    table(["excess log-loss x 1e3, forgetting", *(f"{name} drift" for name in WALKS)], rows)


def draw_population(rng: np.random.Generator, model: SharedModel, n: int, m: int, family: str) -> tuple[Design, Array]:
    """n users of the model with one nonzero of b each, and their coefficients."""
    d, r = model.U.shape
    b = np.zeros((n, d))
    b[np.arange(n), rng.integers(0, d, n)] = np.sqrt(model.b_variance) * rng.standard_normal(n)
    theta = model.beta + rng.standard_normal((n, r)) @ model.U.T + b
    X = rng.standard_normal((n, m, d)) * np.linspace(0.3, 1.5, d)
    eta = apply(X, theta)
    noisy = eta + np.sqrt(model.noise_variance) * rng.standard_normal(eta.shape)
    y = noisy if family == "squared" else (rng.random(eta.shape) < expit(eta)).astype(np.float64)
    return Design(X=X, y=y, weight=np.ones_like(y), count=np.full(n, float(m))), theta


def refolding() -> None:
    """A release learned with error, then a better one: root mean square of x'(theta − truth) over users."""
    rows = []
    for family in ("squared", "logistic"):
        for error in (0.0, 0.05, 0.2):
            rows.append([family, str(error), *(f"{value:.3f}" for value in refolded_errors(family, error))])
    header = ["family", "error of the old release", "old posterior", "prior alone", "refold", "in the metric of S"]
    table([*header, "kept X'DX", "all examples"], rows)


def refolded_errors(family: str, error: float) -> list[float]:
    """What the columns of `refolding` are, for one row: 400 users with 30 examples in three batches, d = 30, r = 4."""
    d, r = 30, 4
    rng = np.random.default_rng(3)
    new = SharedModel(
        beta=0.3 * rng.standard_normal(d),
        U=0.4 * rng.standard_normal((d, r)),
        b_variance=1.0,
        noise_variance=0.5 if family == "squared" else 1.0,
    )
    old = replace(new, beta=new.beta + error * rng.standard_normal(d), U=new.U + error * rng.standard_normal((d, r)))
    return _refolded(rng, old, new, family, (400, 30, 3))


def _refolded(
    rng: np.random.Generator, old: SharedModel, new: SharedModel, family: str, sizes: tuple[int, int, int]
) -> list[float]:
    n, m, k = sizes
    loss = FAMILIES[family]
    design, truth = draw_population(rng, new, n, m, family)
    personal, gram = released_prior(old, n, sparsity=k), None
    third = m // 3
    for t in range(3):
        cut = slice(t * third, (t + 1) * third)
        part = Design(
            X=design.X[:, cut], y=design.y[:, cut], weight=design.weight[:, cut], count=np.full(n, float(third))
        )
        personal = update_personal(personal, part, old, family=loss).personal
        gram = gram_after(gram, part, personal.theta(old), family=loss)
    metric = np.diag(np.linspace(0.3, 1.5, old.dimension) ** 2)
    thetas = [
        personal.theta(old),
        np.tile(new.beta, (n, 1)),
        refold(personal, old, new, family=loss).theta(new),
        refold(personal, old, new, family=loss, metric=metric).theta(new),
        refold_gram(gram, new, sparsity=k).theta(new),
        personalize(design, new, family=loss, sparsity=k).theta,
    ]
    return [float(np.sqrt(((theta - truth) ** 2 @ np.diag(metric)).mean())) for theta in thetas]


SUITES = {"speed": speed, "correlation": correlation, "drift": drift, "refolding": refolding}


def main() -> None:
    """Run the named suites, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("suites", nargs="*", metavar="suite", help=f"of {', '.join(SUITES)}; all without any")
    for name in parser.parse_args().suites or SUITES:
        SUITES[name]()


if __name__ == "__main__":
    main()
