"""Recovery of a planted model: what AMHT-LRS and umbel find of theta_i = U w_i + b_i that is known to be there.

    python -m benchmarks.recovery [--quick] [--seeds 10] [--workers 2] [--out recovery.jsonl]

U has orthonormal columns, w_i ~ N(0, I), b_i has k nonzeros ~ N(0, 1) at random places, x ~ N(0, I), y = x'theta_i +
noise; nothing is private. AMHT-LRS is our own, in floating point: the pair moments' leading directions, then in each
iteration w and b of every user (`client.alternation`) and U by exact statistics (`client.statistics`,
`server.least_squares`). "umbel" is the default algorithm with its default settings and no noise
(`umbel.baselines.train_model`). Prints a JSON line a measurement (into a file with --out) and the tables of
docs/results.md.

Targets are the figures of the specification, from prototypes of another make; they are shown beside ours, and
"inside" says that one more draw of ours could be the target: within three standard deviations of our mean (of the
logarithm for distances), and what the target was rounded by. The distance of subspaces is the Frobenius norm of
(I - U U') V; a user is recovered if |theta_hat - theta| <= .1 |theta|.
"""

import argparse
import json
import math
import os
import statistics as stats
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt

from client.alternation import SOLVERS, LocalSettings, fit, least_squares_w
from client.batches import Batch, Design, form_of
from client.statistics import second_moment, statistics
from client.thresholding import keep_largest, sparse_part
from common.data import DataSchema, DenseFeatures, Population, example_keys, row_hashes, text_hashes
from common.families import FAMILIES
from common.linalg import apply
from common.model import SharedModel
from privacy.entropy import NoNoise
from server.least_squares import leading_directions, orthonormal, random_directions, solve_for_U, subspace_distance
from umbel.baselines import Mechanism, Users, personal_theta, train_model, users_of

Array = npt.NDArray[np.float64]
Record = dict[str, Any]
ITERATIONS = 12
ROUNDS = (10, 30)
RECOVERED = 0.1
DIVERGED = 1e3
USERS_AT_ONCE = 100
RANGE_IN_SDS = 4.0
EXAMPLES = (10, 15, 20, 25, 30)
DISTANCE_TARGETS = {
    0.0: {0: 2.1e-1, 1: 5.1e-2, 2: 1.1e-2, 4: 4.9e-4, 8: 1.4e-6, 12: 4.4e-9},
    0.05: {12: 3.7e-3},
}
USER_ERROR_TARGET = 1.7e-9
PHASE_TARGETS = {
    "alternation": (0.00, 0.18, 0.78, 0.95, 0.98),
    "joint": (0.00, 0.29, 0.79, 0.95, 0.98),
    "elimination": (0.00, 0.41, 0.83, 0.97, 0.99),
    "pursuit": (0.02, 0.83, 0.94, 0.98, 1.00),
}
PREDICTION_TARGETS = {"AMHT-LRS, pursuit": 0.11, "each alone, ridge": 1.03, "true U without b": 1.76, "zero": 2.25}
SLOW_SOLVERS = ("alternation", "joint", "elimination")
NETWORKS = ((27, 64, 1), (256, 128, 64, 1), (784, 256, 128, 10), (1024, 1024, 1024, 1000))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is planted: `users` with `examples` each in `dimension` features, rank, nonzeros of b, noise's deviation."""

    users: int
    examples: int
    noise: float
    dimension: int = 50
    rank: int = 2
    sparsity: int = 3

    @property
    def spread(self) -> float:
        """Standard deviation of y."""
        return math.sqrt(self.rank + self.sparsity + self.noise**2)

    def pursuit(self) -> LocalSettings:
        """The best local solver."""
        return LocalSettings(solver="pursuit", sparsity=self.sparsity)


@dataclass(frozen=True, kw_only=True, eq=False)
class Planted:
    """Users' examples `n x m x d` and `n x m`, and the truth they were drawn from."""

    setting: Setting
    X: Array
    y: Array
    U: Array
    b: Array
    theta: Array

    def batches(self) -> list[Batch]:
        """In whichever form is smaller."""
        return [form_of(design, second_moments_suffice=True) for design in self.designs()]

    def designs(self) -> Iterator[Design]:
        """The examples themselves."""
        n, m, _ = self.X.shape
        for first in range(0, n, USERS_AT_ONCE):
            block = slice(first, first + USERS_AT_ONCE)
            X, y = self.X[block], self.y[block]
            yield Design(X=X, y=y, weight=np.ones_like(y), count=np.full(len(y), float(m)))


def draw(setting: Setting, seed: int, *, U: Array | None = None) -> Planted:
    """A population; its U is drawn too unless given."""
    rng = np.random.default_rng([20221003, seed])
    n, m, d = setting.users, setting.examples, setting.dimension
    U = random_directions(d, setting.rank, rng) if U is None else U
    b = np.zeros((n, d))
    places = np.argsort(rng.random((n, d)), axis=1)[:, : setting.sparsity]
    np.put_along_axis(b, places, rng.standard_normal((n, setting.sparsity)), axis=1)
    theta = rng.standard_normal((n, setting.rank)) @ U.T + b
    X = rng.standard_normal((n, m, d))
    return Planted(setting=setting, X=X, y=targets(rng, X, theta, setting.noise), U=U, b=b, theta=theta)


def targets(rng: np.random.Generator, X: Array, theta: Array, noise: float) -> Array:
    """`n x m`, x'theta and noise."""
    margin = apply(X, theta)
    return np.asarray(margin + noise * rng.standard_normal(margin.shape))


def first_U(planted: Planted, kind: str, seed: int = 0) -> Array:
    """Where AMHT-LRS starts: "pair-moments", "moments" or "random"."""
    d, r = planted.U.shape
    if kind == "random":
        return random_directions(d, r, np.random.default_rng([7, seed]))
    moment = sum(second_moment(design, kind).sum(axis=0) for design in planted.designs())
    return leading_directions(np.asarray(moment), r, np.eye(d))


def summed_statistics(batches: Iterable[Batch], U: Array, settings: LocalSettings) -> tuple[Array, Array]:
    """A and V of all users, exactly."""
    A, V = np.zeros((U.size, U.size)), np.zeros(U.size)
    for batch in batches:
        one_A, one_V = statistics(batch, fit(batch, U, settings))
        A, V = A + one_A.sum(axis=0), V + one_V.sum(axis=0)
    return A, V


def learn(
    planted: Planted,
    U: Array,
    settings: LocalSettings,
    *,
    iterations: int = ITERATIONS,
    solve: Callable[[Array, Array, int, int], Array] = solve_for_U,
) -> list[Array]:
    """U before each of the iterations and after the last."""
    batches, path = planted.batches(), [U]
    for _ in range(iterations):
        A, V = summed_statistics(batches, path[-1], settings)
        path.append(solve(A, V, *U.shape))
    return path


def fitted(planted: Planted, U: Array, settings: LocalSettings) -> Array:
    """`n x d`, every user's theta for this U."""
    return np.concatenate([fit(batch, U, settings).theta for batch in planted.batches()])


def distance(planted: Planted, U: Array) -> float:
    """Of the column spaces, Frobenius norm."""
    return subspace_distance(planted.U, U, norm="frobenius")


def relative_error(planted: Planted, theta: Array) -> Array:
    """`n`, |theta_hat - theta| / |theta|."""
    return np.asarray(np.linalg.norm(theta - planted.theta, axis=1) / np.linalg.norm(planted.theta, axis=1))


def errors_of(planted: Planted, theta: Array) -> Record:
    """Median of the users' relative errors, and the share of users who are recovered."""
    error = relative_error(planted, theta)
    return {"median_error": float(np.median(error)), "recovered": float(np.mean(error <= RECOVERED))}


def as_users(planted: Planted) -> Users:
    """The same as `umbel simulate` has it: the public range of y is that of `common.synthetic`, and cuts y."""
    n, m, d = planted.X.shape
    names, counts = tuple(f"user-{i}" for i in range(n)), np.full(n, m, np.int64)
    population = Population(
        users=names,
        offsets=np.arange(n + 1, dtype=np.int64) * m,
        y=planted.y.ravel(),
        weight=None,
        features=DenseFeatures(planted.X.reshape(n * m, d)),
        key=example_keys(np.repeat(text_hashes(names, kind="user"), counts), row_hashes(counts)),
    )
    bound = RANGE_IN_SDS * planted.setting.spread
    schema = DataSchema(
        feature_names=tuple(f"x{j}" for j in range(d)),
        feature_second_moment=np.eye(d),
        target_range=(-bound, bound),
        feature_bound=10.0,
    )
    return users_of(population, schema, FAMILIES["squared"], shards=1)


def train_default(planted: Planted, rounds: int) -> SharedModel:
    """umbel's default algorithm without noise."""
    return train_model(
        as_users(planted),
        rank=planted.setting.rank,
        sparsity=planted.setting.sparsity,
        mechanism=Mechanism(noise_multiplier="0", rounds=rounds, noise=NoNoise),
        rng=np.random.default_rng(0),
    )


def personalized(planted: Planted, model: SharedModel) -> Array:
    """`n x d`, every user's theta under umbel's prior."""
    return personal_theta(as_users(planted), model, planted.setting.sparsity)


def measure_convergence(setting: Setting, seed: int) -> list[Record]:
    """Distance of U before and after each iteration, and the users' errors at the end."""
    planted = draw(setting, seed)
    path = learn(planted, first_U(planted, "pair-moments"), setting.pursuit())
    return [
        {
            "distance": [distance(planted, U) for U in path],
            "spectral": [subspace_distance(planted.U, U) for U in path],
            **errors_of(planted, fitted(planted, path[-1], setting.pursuit())),
        }
    ]


def measure_solver(setting: Setting, seed: int, solver: str) -> list[Record]:
    """Who is recovered with one local solver in training and at the end."""
    planted = draw(setting, seed)
    settings = LocalSettings(solver=solver, sparsity=setting.sparsity)
    U = learn(planted, first_U(planted, "pair-moments"), settings)[-1]
    return [{"method": solver, "distance": distance(planted, U), **errors_of(planted, fitted(planted, U, settings))}]


def measure_default(setting: Setting, seed: int) -> list[Record]:
    """Who is recovered by umbel's default after so many rounds."""
    planted = draw(setting, seed)
    records = []
    for rounds in ROUNDS:
        model = train_default(planted, rounds)
        found = {
            "distance": distance(planted, orthonormal(model.U)),
            **errors_of(planted, personalized(planted, model)),
        }
        records.append({"method": f"umbel, {rounds} rounds", **found})
    return records


def measure_start(setting: Setting, seed: int) -> list[Record]:
    """Distance of U at the start and after the last iteration, by initialisation."""
    planted = draw(setting, seed)
    records = []
    for kind in ("pair-moments", "moments", "random"):
        path = learn(planted, first_U(planted, kind, seed), setting.pursuit())
        found = errors_of(planted, fitted(planted, path[-1], setting.pursuit()))
        ends = {"start_distance": distance(planted, path[0]), "distance": distance(planted, path[-1])}
        records.append({"method": kind, **ends, **found})
    return records


def measure_new_users(setting: Setting, seed: int, examples: Sequence[int]) -> list[Record]:
    """U frozen after training; users who had no part in it, with fewer or more examples."""
    planted = draw(setting, seed)
    U = learn(planted, first_U(planted, "pair-moments"), setting.pursuit())[-1]
    model = train_default(planted, ROUNDS[-1])
    records = []
    for m in (None, *examples):
        users = planted
        if m is not None:
            users = draw(replace(setting, examples=m), seed + 1_000_000, U=planted.U)
        for method, theta in {
            "learned U": fitted(users, U, setting.pursuit()),
            "true U": fitted(users, planted.U, setting.pursuit()),
            f"umbel, {ROUNDS[-1]} rounds": personalized(users, model),
        }.items():
            records.append({"method": method, "trained": m is None, "m": users.setting.examples})
            records[-1] |= errors_of(users, theta)
    return records


def measure_prediction(setting: Setting, seed: int) -> list[Record]:
    """RMSE on fresh examples of the same users, noise included."""
    planted = draw(setting, seed)
    rng = np.random.default_rng([11, seed])
    X = rng.standard_normal(planted.X.shape)
    y = targets(rng, X, planted.theta, setting.noise)
    U = learn(planted, first_U(planted, "pair-moments"), setting.pursuit())[-1]
    # the best penalty if the scales are known: noise variance over the variance of an entry of theta
    penalty = setting.noise**2 * setting.dimension / (setting.rank + setting.sparsity)
    w = [least_squares_w(batch, planted.U, np.zeros_like(batch.cross)) for batch in planted.batches()]
    models = {f"umbel, {rounds} rounds": train_default(planted, rounds) for rounds in ROUNDS}
    found = {
        "AMHT-LRS, pursuit": fitted(planted, U, setting.pursuit()),
        "true U, pursuit": fitted(planted, planted.U, setting.pursuit()),
        **{name: personalized(planted, model) for name, model in models.items()},
        "each alone, ridge": ridge_alone(planted, penalty),
        "true U without b": np.concatenate(w) @ planted.U.T,
        "zero": np.zeros_like(planted.theta),
    }
    distances = {name: distance(planted, orthonormal(model.U)) for name, model in models.items()}
    distances["AMHT-LRS, pursuit"] = distance(planted, U)
    return [
        {
            "method": name,
            "rmse": float(np.sqrt(np.mean((y - apply(X, theta)) ** 2))),
            "distance": distances.get(name),
            **errors_of(planted, theta),
        }
        for name, theta in found.items()
    ]


def ridge_alone(planted: Planted, penalty: float) -> Array:
    """`n x d`, each user's own ridge regression."""
    G = planted.X.transpose(0, 2, 1) @ planted.X + penalty * np.eye(planted.setting.dimension)
    cross = (planted.y[:, None, :] @ planted.X)[:, 0, :]
    return np.asarray(np.linalg.solve(G, cross[:, :, None])[:, :, 0])


def measure_steps(setting: Setting, seed: int, steps: int = 100) -> list[Record]:
    """Thresholding with the constant step 1 / m and with the normalised one, U w known: |b_hat - b| / |b|."""
    planted = draw(setting, seed)
    errors: dict[str, list[Array]] = {"step 1/m": [], "normalised step": []}
    for first, batch in zip(range(0, setting.users, USERS_AT_ONCE), planted.batches(), strict=True):
        truth = planted.b[first : first + USERS_AT_ONCE]
        fixed = planted.theta[first : first + USERS_AT_ONCE] - truth
        b = np.zeros_like(truth)
        for _ in range(steps):
            gradient = batch.cross - batch.products((fixed + b)[:, None, :])[:, 0, :]
            b = keep_largest(b + gradient / setting.examples, setting.sparsity)
        found = sparse_part(batch, fixed, sparsity=setting.sparsity, num_steps=steps).value
        for name, value in zip(errors, (b, found), strict=True):
            errors[name].append(np.linalg.norm(value - truth, axis=1) / np.linalg.norm(truth, axis=1))
    return [
        {
            "method": name,
            "median_error": float(np.median(np.concatenate(error))),
            "diverged": float(np.mean(~(np.concatenate(error) < DIVERGED))),  # true for NaN
        }
        for name, error in errors.items()
    ]


def row_major(A: Array, V: Array, d: int, r: int) -> Array:
    """The trap: the solution of A vec(U) = V read row by row."""
    return orthonormal(np.linalg.solve(A, V).reshape(d, r))


def measure_vec(setting: Setting, seed: int) -> list[Record]:
    """Distance of U after 1, 2 and 12 iterations, with vec read by columns and by rows."""
    planted = draw(setting, seed)
    start = first_U(planted, "pair-moments")
    records = []
    for name, solve in {"column-major": solve_for_U, "row-major": row_major}.items():
        path = learn(planted, start, setting.pursuit(), solve=solve)
        records.append({"method": name, "distance": [distance(planted, path[i]) for i in (0, 1, 2, ITERATIONS)]})
    return records


def measure_storage() -> list[Record]:
    """Numbers a user keeps against the P of a fine-tuned copy; for a network with personal factors in every layer."""
    records = []
    for d, r, k in ((50, 2, 3), (50, 5, 5), (1000, 8, 5), (10_000, 8, 5)):
        records.append(_stored(f"linear, d = {d}", d, r + 2 * k, r, k))
    for widths in NETWORKS:
        layers = list(pairwise(widths))
        P, r, k = sum((d + 1) * c for d, c in layers), 1, 5
        name = "-".join(map(str, widths))
        # a layer's personal part is U W + B with W `r x c` and k nonzeros of B
        records.append(_stored(f"network {name}, all layers", P, sum(r * c + 2 * k for _, c in layers), r, k))
        records.append(_stored(f"network {name}, last layer", P, r * widths[-1] + 2 * k, r, k))
    return records


def _stored(what: str, P: int, numbers: int, rank: int, sparsity: int) -> Record:
    return {"model": what, "rank": rank, "sparsity": sparsity, "P": P, "numbers": numbers, "ratio": P / numbers}


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the measurements are.

    Attributes:
        seeds: Populations of each measurement.
        slow_seeds: Populations of a measurement with a solver that thresholds.
        users: Of the phase table, of new users and of the traps.
        examples: Columns of the phase table.
    """

    seeds: int
    slow_seeds: int
    users: int
    examples: tuple[int, ...]

    def jobs(self) -> Iterator[tuple[str, Setting, int, Callable[[Setting, int], list[Record]]]]:
        """Table, what is planted, seed, and the measurement; the long ones first."""
        for m in reversed(self.examples):
            phase = Setting(users=self.users, examples=m, noise=0.05)
            for seed in range(self.slow_seeds):
                for solver in SLOW_SOLVERS:
                    yield "phase", phase, seed, partial(measure_solver, solver=solver)
        starts = [
            Setting(users=600, examples=20, noise=0.05),
            Setting(users=500, examples=50, noise=0.0),
            Setting(users=300, examples=20, noise=0.1, rank=5, sparsity=5),
            Setting(users=1000, examples=40, noise=0.1),
        ]
        for seed in range(self.seeds):
            for m in self.examples:
                phase = Setting(users=self.users, examples=m, noise=0.05)
                yield "phase", phase, seed, partial(measure_solver, solver="pursuit")
                yield "phase", phase, seed, measure_default
            for noise in DISTANCE_TARGETS:
                yield "convergence", Setting(users=500, examples=50, noise=noise), seed, measure_convergence
            for setting in starts if self.seeds > 3 else starts[:2]:
                yield "start", setting, seed, measure_start
            new = partial(measure_new_users, examples=self.examples)
            yield "new users", Setting(users=self.users, examples=30, noise=0.05), seed, new
            yield "prediction", Setting(users=1000, examples=40, noise=0.1), seed, measure_prediction
        for m in (10, 20, 30, 50, 200):
            yield "step", Setting(users=self.users, examples=m, noise=0.0), 0, measure_steps
        yield "vec", Setting(users=self.users, examples=50, noise=0.0), 0, measure_vec


FULL = Plan(seeds=10, slow_seeds=2, users=600, examples=EXAMPLES)
QUICK = Plan(seeds=3, slow_seeds=1, users=200, examples=(15, 30))


def run_jobs(plan: Plan, executor: Executor | None, write: Callable[[Record], None]) -> list[Record]:
    """All measurements, in the order of the plan, whoever makes them."""
    jobs = list(plan.jobs())
    tables, settings, seeds, measures = zip(*jobs, strict=True)
    measured = map(_measure, measures, settings, seeds)
    if executor is not None:
        measured = executor.map(_measure, measures, settings, seeds)
    records = []
    for table, setting, seed, found in zip(tables, settings, seeds, measured, strict=True):
        for record in found:
            records.append({"benchmark": "recovery", "table": table, **asdict(setting), "seed": seed, **record})
            write(records[-1])
    for record in measure_storage():
        records.append({"benchmark": "recovery", "table": "storage", **record})
        write(records[-1])
    return records


def _measure(measure: Callable[[Setting, int], list[Record]], setting: Setting, seed: int) -> list[Record]:
    with np.errstate(all="ignore"):  # the traps overflow
        return measure(setting, seed)


def show(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """One table, as it stands in docs/results.md."""
    print(f"\n{title}\n\n| " + " | ".join(header) + " |\n|" + "--|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")


def group(records: Iterable[Record], table: str, *keys: str) -> dict[tuple[Any, ...], list[Record]]:
    """The records of a table by the values of these keys, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record["table"] == table:
            groups.setdefault(tuple(record[key] for key in keys), []).append(record)
    return groups


def inside(values: Sequence[float], target: float, *, rounding: float, least_sd: float = 0.0) -> str:
    """Whether one more draw like `values` could be `target`, itself known to within `rounding`."""
    if len(values) < 2:
        return "?"
    spread = max(stats.stdev(values), least_sd) * math.sqrt(1 + 1 / len(values))
    return "inside" if abs(stats.fmean(values) - target) <= 3 * spread + rounding else "OUTSIDE"


def in_scale(value: float) -> str:
    """Two digits of a positive number."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.1e}"


def log_row(label: Sequence[str], values: Sequence[float], target: float | None) -> list[str]:
    """Geometric mean, range and verdict on a logarithmic scale."""
    logs = [math.log10(value) for value in values]
    row = [*label, in_scale(10 ** stats.fmean(logs)), f"{in_scale(min(values))} – {in_scale(max(values))}"]
    if target is None:
        return [*row, "", ""]
    # targets have two digits
    return [*row, in_scale(target), inside(logs, math.log10(target), rounding=math.log10(1.05))]


def show_convergence(records: list[Record]) -> None:
    """Distance by iteration."""
    rows = []
    for (noise,), found in group(records, "convergence", "noise").items():
        for i in range(ITERATIONS + 1):
            values = [record["distance"][i] for record in found]
            rows.append(log_row([f"{noise:g}", str(i)], values, DISTANCE_TARGETS[noise].get(i)))
        errors = [record["median_error"] for record in found]
        rows.append(log_row([f"{noise:g}", "median error of users"], errors, None if noise else USER_ERROR_TARGET))
    show("Convergence", ["noise", "iteration", "distance of U", "range", "target", "verdict"], rows)


def show_phase(records: list[Record]) -> None:
    """Share of users recovered, methods by number of examples."""
    groups = group(records, "phase", "method", "examples")
    examples = sorted({m for _, m in groups})
    rows, verdicts = [], []
    for method in (*SOLVERS, *(f"umbel, {rounds} rounds" for rounds in ROUNDS)):
        shares = {m: [record["recovered"] for record in groups[method, m]] for m in examples}
        spreads = {m: f"{stats.fmean(v):.3f} ± {stats.stdev(v) if len(v) > 1 else 0:.3f}" for m, v in shares.items()}
        rows.append([method, str(len(shares[examples[0]])), *spreads.values()])
        if method in PHASE_TARGETS:
            cells = []
            for m in examples:
                target, mean = PHASE_TARGETS[method][EXAMPLES.index(m)], stats.fmean(shares[m])
                users = groups[method, m][0]["users"]
                least_sd = math.sqrt(max(mean * (1 - mean), 1 / users) / users)
                verdict = inside(shares[m], target, rounding=0.005, least_sd=least_sd)
                cells.append(f"{target:.2f} {verdict}")
            verdicts.append([method, *cells])
    columns = [f"m = {m}" for m in examples]
    show("Share of users recovered to 10 %, mean ± sd of populations", ["method", "populations", *columns], rows)
    show("Its targets", ["method", *columns], verdicts)


def show_start(records: list[Record]) -> None:
    """Initialisations: distance at the start and at the end."""
    rows = []
    keys = ("users", "examples", "rank", "sparsity", "noise")
    for key, found in group(records, "start", *keys).items():
        row = ["t={} m={} r={} k={} noise={}".format(*key)]
        for kind in ("pair-moments", "moments", "random"):
            mine = [record for record in found if record["method"] == kind]
            first = [record["start_distance"] for record in mine]
            last, recovered = ([record[name] for record in mine] for name in ("distance", "recovered"))
            row.append(f"{stats.fmean(first):.2f} ± {stats.stdev(first):.2f}")
            row.append(f"{in_scale(stats.median(last))}; {stats.fmean(recovered):.2f}")
        rows.append(row)
    after = "after 12; recovered"
    show("Start of U: distance", ["setting", "pair moments", after, "moments", after, "random", after], rows)


def show_new_users(records: list[Record]) -> None:
    """Errors of users who had no part in training."""
    groups = group(records, "new users", "trained", "m", "method")
    rows = []
    methods = list(dict.fromkeys(method for *_, method in groups))
    for trained, m in dict.fromkeys((trained, m) for trained, m, _ in groups):
        row = [f"{'trained' if trained else 'new'}, m = {m}"]
        for method in methods:
            found = groups[trained, m, method]
            error, recovered = (stats.fmean(record[name] for record in found) for name in ("median_error", "recovered"))
            row.append(f"{error:.4f}; {recovered:.3f}")
        rows.append(row)
    show("Frozen U: median error of users; share recovered", ["users", *methods], rows)


def show_prediction(records: list[Record]) -> None:
    """RMSE on fresh examples."""
    rows = []
    for (method,), found in group(records, "prediction", "method").items():
        values, target = [record["rmse"] for record in found], PREDICTION_TARGETS.get(method)
        row = [method, f"{stats.fmean(values):.3f}", f"{min(values):.3f} – {max(values):.3f}"]
        distances = [record["distance"] for record in found]
        row.append("" if distances[0] is None else f"{in_scale(min(distances))} – {in_scale(max(distances))}")
        row.append(f"{stats.fmean(record['recovered'] for record in found):.2f}")
        row += ["", ""] if target is None else [f"{target:.2f}", inside(values, target, rounding=0.005)]
        rows.append(row)
    header = ["method", "RMSE", "range", "distance of U", "recovered", "target", "verdict"]
    show("RMSE on fresh examples", header, rows)


def show_traps(records: list[Record]) -> None:
    """What goes wrong where the published step and an obvious reading of vec are taken."""
    steps = group(records, "step", "examples")
    show(
        f"100 steps of thresholding, U w known: median of |b_hat - b| / |b|; share of users above {DIVERGED:g}",
        ["m", *(record["method"] for record in next(iter(steps.values())))],
        (
            [str(m), *(f"{record['median_error']:.1e}; {record['diverged']:.2f}" for record in found)]
            for (m,), found in steps.items()
        ),
    )
    vec = group(records, "vec", "method")
    show(
        "Distance of U with vec read",
        ["", "start", "1", "2", str(ITERATIONS)],
        ([method, *(in_scale(v) for v in found[0]["distance"])] for (method,), found in vec.items()),
    )


def show_storage(records: list[Record]) -> None:
    """P beside its ratio."""
    rows = [
        [r["model"], str(r["rank"]), str(r["sparsity"]), f"{r['P']:,}", f"{r['numbers']:,}", f"{r['ratio']:,.1f}"]
        for r in records
        if r["table"] == "storage"
    ]
    show("Numbers a user keeps", ["model", "r", "k", "P of a fine-tuned copy", "r + 2k", "P / (r + 2k)"], rows)


def main() -> None:
    """Run all measurements and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and smaller populations")
    parser.add_argument("--seeds", type=int, help="populations of each measurement; a fifth for solvers that threshold")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, help="where the JSON lines go, instead of standard output")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.seeds:
        plan = replace(plan, seeds=arguments.seeds, slow_seeds=max(1, arguments.seeds // 5))
    begun = time.perf_counter()
    with (
        ProcessPoolExecutor(arguments.workers) as executor,
        arguments.out.open("w") if arguments.out else nullcontext(sys.stdout) as lines,
    ):
        records = run_jobs(plan, executor, lambda record: print(json.dumps(record), file=lines, flush=True))
    for table in (show_convergence, show_phase, show_start, show_new_users, show_prediction, show_traps, show_storage):
        table(records)
    print(f"\n{time.perf_counter() - begun:.0f} s with {arguments.workers} processes.")


if __name__ == "__main__":
    main()
