"""A simulation from a configuration to a run folder: lay out, run the real apps on an engine, evaluate, report."""

import json
import math
import os
import statistics
from bisect import bisect_left
from collections.abc import Callable, Mapping
from datetime import datetime
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from client import sources
from client.app import SETTINGS_VARIABLE, close_services, service_for
from client.settings import NodeSettings
from common.config import Config, DataConfig, load_config, to_toml
from common.data import DataSchema, partition
from common.errors import BudgetExhausted, UmbelError
from common.files import make_folder, write_durably
from privacy.amplification import Schedule, amplified
from privacy.audit.losses import losses_at
from privacy.discrete import require_opendp
from privacy.keys import create_key, load_key
from privacy.layout import grid_scale_for
from privacy.ledger import PrivacyLedger
from privacy.lines import NOISES
from privacy.mechanism import check_delta_fp, coordinate_distance, delta_fp, distance_of
from privacy.participation import UNITS, cost_units, is_noiseless, is_unlimited, mu_max_string
from privacy.promise import promise_of_ledger, reasons_against
from privacy.report_page import write_reports
from server.algorithms import largest_layout
from server.checkpoint import load_model, save_schema
from server.networks import NetworkStart, save_network_start
from server.registry import registry_of
from server.sampling import charge_of
from server.settings import LedgerPlace, RunFolder, RunSettings, load_run
from server.training import ROUNDS_LOG
from umbel.curve import error_curve
from umbel.evaluate import paired_difference
from umbel.plan import affordable_rounds, least_noise, resolve_delta
from umbel.results import baseline_section, error_section, evaluate, peak_memory_bytes
from umbel.start import check_start, find_start, with_start

CHECKOUT = Path(__file__).resolve().parent.parent
_RUN_ID_DIGITS = 12
_NEARLY_ALL = 0.999
_FIRST_LINE_BYTES = 2**16
_PARTS = 256  # of a ledger's mu_max, to one of which a sampled run finds what it leaves
_CUT_OFF = 1e-6
_LARGEST_MU = 63.999  # filters hold less than 64
_BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


class Progress(Protocol):
    """Who watches a simulation."""

    def step(self, name: str) -> None:
        """A new step has begun."""

    def warn(self, message: str) -> None:
        """Something the user should know."""


def noise_and_limit(config: Config, delta: float) -> tuple[str, str]:
    """z of each release and mu_max of a new ledger: the least noise with which the run's rounds cost its epsilon.

    Raises:
        UmbelError: If the budget cannot be split among so many rounds.
    """
    epsilon, s = config.privacy.epsilon, config.privacy.max_nodes_per_user
    if epsilon == "none":
        return "0", "inf"
    try:
        z = least_noise(float(epsilon), delta, config.training.rounds, s, config.privacy.sampling_probability)
        return z, mu_max_string(ledger_budget(config), delta, s)
    except ValueError as error:
        raise UmbelError(f"privacy.epsilon, privacy.delta, training.rounds: {error}") from error


def simulate(config: Config, *, progress: Progress, with_baselines: bool = True) -> dict[str, Any]:
    """Run a simulation, or go on with one, and evaluate it.

    Args:
        config: As given; what is left open is resolved here and written into the run folder.
        progress: Who watches.
        with_baselines: Whether to compare with baselines.

    Returns:
        The results, as documented for `--format json`.

    Raises:
        UmbelError: Bad input, before anything is charged.
        BudgetExhausted: If the run does not fit the ledger's budget, before anything is charged.
    """
    progress.step("reading data")
    config = resume_config(config) if config.run.resume else lay_out(config, progress)
    settings = load_run(Path(str(config.run.out)))
    progress.step("training")
    try:
        run_engine(config, settings.folder)
    except BudgetExhausted as error:
        if not settings.folder.model.exists():
            raise
        # another run has charged the ledger meanwhile: what was paid for is published, and so it is reported
        evaluated(settings, progress=progress, with_baselines=with_baselines)
        raise BudgetExhausted(f"{error} The rounds before are in {settings.folder.root / 'report.html'}.") from error
    return evaluated(settings, progress=progress, with_baselines=with_baselines)


def resume_config(config: Config) -> Config:
    """The configuration that a run was started with; only its own folder counts."""
    if config.run.out is None:
        raise UmbelError("Expected run.out to name the folder to resume, got none. Add --out FOLDER.")
    folder = RunFolder(root=Path(config.run.out).resolve())
    if not folder.config.exists():
        raise UmbelError(
            f"Expected a run at {folder.root}, got no {folder.config.name} there. Start it without --resume."
        )
    return load_config(folder.config, {"run.out": str(folder.root)})


def lay_out(config: Config, progress: Progress) -> Config:
    """Resolve a configuration and write a new run folder: everything the apps read, nothing they compute."""
    root = Path(config.run.out or default_folder()).resolve()
    folder = RunFolder(root=root)
    if folder.config.exists():
        raise UmbelError(f"Expected a new folder, got run.out={root} with a run in it. Add --resume, or name another.")
    # absolute, as the nodes have it, so that it is read once
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update=_absolute_paths(config.data)),
            "network": config.network.model_copy(
                update={name: _absolute(getattr(config.network, name)) for name in ("module", "weights")}
            ),
        }
    )
    source = sources.read(config.data, config.model.family)
    train, schema = source.train, source.schema
    start = find_start(config, progress)
    config = with_shape(with_start(config, start), schema, progress)
    _check_parts(config)
    run_name = uuid4().hex[:_RUN_ID_DIGITS]
    network = network_start(config, schema, run_name)
    _check_data(config, source, progress)
    delta, _ = resolve_delta(config.privacy.delta, train.num_users)
    for warning in resolve_delta(delta, train.num_users)[1]:
        progress.warn(warning)
    noise_multiplier, mu_max = noise_and_limit(config, delta)
    budget = ledger_budget(config)
    if not is_noiseless(noise_multiplier):
        size = largest_layout(config, schema.dimension, private=True, network=network).size
        check_noise(config, noise_multiplier, delta, size=size, users=train.num_users, progress=progress)
    ledger_path = Path(config.run.ledger).resolve() if config.run.ledger else root / "ledger.jsonl"
    place = LedgerPlace(ledger=ledger_path)
    is_private = not is_noiseless(noise_multiplier) and config.privacy.seed is None
    begun = PrivacyLedger.open(place.ledger) if _is_begun(place.ledger) else None
    check_start(start, config, schema, begun, is_private=is_private, progress=progress)
    sizes = [partition(train, config.training.nodes, i).num_users for i in range(config.training.nodes)]
    registry = registry_of((f"node-{i}", size) for i, size in enumerate(sizes))
    made = {"epsilon": budget, "delta": delta, "mu_max": mu_max}
    resolved = load_config(
        None,
        _flat(config)
        | {
            "privacy.delta": delta,
            "run.out": str(root),
            "run.ledger": str(ledger_path),
            "run.resume": False,
            "run.name": run_name,
            "run.noise_multiplier": noise_multiplier,
            "run.capped_mu_max": capped_mu_max(config, noise_multiplier, _genesis_of(place.ledger) or made),
        },
    )
    if config.run.ledger and not _is_begun(place.ledger):
        progress.warn(f"{ledger_path} is new: it starts with the whole budget, epsilon {budget:g}.")
    genesis, public_key, mu_limit = prepare_ledger(resolved, place, mu_max, budget)
    if config.run.ledger is None and config.data.source != "synthetic":
        progress.warn("the ledger is new and counts this run only; name the population's own with --ledger PATH.")
    make_folder(root)
    registry.save(folder.registry)
    save_schema(folder.schema, schema)
    if start is not None:
        write_durably(folder.start, start.data)
    if network is not None:
        save_network_start(folder.network, network.architecture, network.shared)
        progress.step(network.architecture.storage)
    make_folder(folder.nodes, mode=0o700)
    nodes = NodeSettings(
        store=":memory:" if config.run.stores == "memory" else str(folder.nodes / "node-{partition}.sqlite"),
        public_key=public_key,
        ledger_id=genesis["ledger_id"],
        mu_max=device_limit(resolved, mu_limit),
        max_users_per_node=config.privacy.max_users_per_node,
        allow_not_private=is_noiseless(noise_multiplier) or config.privacy.seed is not None,
        coin_seed=config.privacy.seed,
        allow_statistics=config.training.algorithm == "amht-lrs",
        family=config.model.family,
        network=config.network.module,
        device=config.training.device,
        data=resolved.data,
    )
    write_durably(folder.nodes / "node.toml", to_toml(nodes.model_dump(exclude_none=True, by_alias=True)).encode())
    write_durably(folder.config, resolved.to_toml().encode())
    return resolved


def network_start(config: Config, schema: DataSchema, run: str) -> NetworkStart | None:
    """The network that a run trains, as it starts; None for a linear model.

    Raises:
        UmbelError: If it cannot be trained; says why.
    """
    if config.network.module is None:
        return None
    from umbel.network_results import start_of  # noqa: PLC0415 (torch's world only where there is a network)

    named = config.model_copy(update={"run": config.run.model_copy(update={"name": run})})
    network, shared = start_of(named, schema)
    return NetworkStart(architecture=network.architecture, shared=shared, digest="")


def _check_data(config: Config, source: sources.Source, progress: Progress) -> None:
    """Refuse data that cannot train, and warn of what was not as it should be."""
    if source.num_bad_rows:
        progress.warn(f"{source.num_bad_rows} bad rows were dropped, the first: {source.bad_rows[0]}")
    if source.num_clipped:
        progress.warn(f"{source.num_clipped} values outside their declared range were clipped to it.")
    if source.train.num_users < config.training.nodes:
        raise UmbelError(
            f"Expected training.nodes <= {source.train.num_users} users, "
            f"got training.nodes={config.training.nodes}. Use fewer."
        )
    if source.train.num_examples == 0:
        raise UmbelError("Expected training examples, got none. Lower data.test_fraction.")
    if source.test.num_examples == 0:
        progress.warn("nothing is held out, so no error will be computed; raise data.test_fraction for one.")


def _check_parts(config: Config) -> None:
    """Refuse an engine or a source of noise that is not there, or does not go with the rest."""
    if config.training.engine == "flower" and find_spec("ray") is None:
        raise UmbelError(
            "Expected the package ray with training.engine='flower', found none. "
            "Run pip install -e '.[ray]' in the checkout, or use the in-process engine."
        )
    if config.privacy.noise == "discrete":
        require_opendp()
    if (config.training.engine, config.run.stores) == ("flower", "memory"):
        raise UmbelError(
            "Expected run.stores='files' with training.engine='flower', whose processes share a node's filters through "
            "its file, got run.stores='memory'. Use files, or the in-process engine."
        )


def with_shape(config: Config, schema: DataSchema, progress: Progress) -> Config:
    """The configuration with a rank and a sparsity that the data has room for.

    Defaults are lowered to the number of features, which is said; numbers that were given are not.

    Raises:
        UmbelError: If a number that was given is too large.
    """
    d, changes = schema.dimension, {}
    if config.network.module is not None:
        return config
    for name in ("rank", "sparsity"):
        value = getattr(config.model, name)
        if value <= d:
            continue
        if name in config.model.model_fields_set:
            raise UmbelError(
                f"Expected model.rank and model.sparsity of at most {d}, the features with their one-hot columns and "
                f"the intercept, got model.{name}={value}. Lower it."
            )
        progress.warn(f"model.{name}={value} by default is more than the {d} features there are: using {d}.")
        changes[name] = d
    if config.training.algorithm == "amht-lrs" and config.model.family != "squared":
        raise UmbelError(
            "Expected model.family='squared' with training.algorithm='amht-lrs', "
            f"got model.family='{config.model.family}'. Use --algorithm gradient."
        )
    return config.model_copy(update={"model": config.model.model_copy(update=changes)}) if changes else config


def check_noise(
    config: Config, noise_multiplier: str, delta: float, *, size: int, users: int, progress: Progress
) -> None:
    """Refuse noise whose rounding to integers would cost too much, and warn where it must drown the signal.

    Raises:
        UmbelError: If that would not be small beside delta.
    """
    # the grid that so many coordinates have
    grid_scale = grid_scale_for(size, private=True)
    of_one = coordinate_distance(NOISES[config.privacy.noise], noise_multiplier, grid_scale)
    check_delta_fp(float(config.privacy.epsilon), delta, of_one * size * config.training.rounds)
    warn_of_noise(size, noise_multiplier, users, progress)


def warn_of_noise(size: int, noise_multiplier: str, users: int, progress: Progress) -> None:
    """Say so where noise must drown what is to be learned: from public numbers alone."""
    # each user's gradient has norm at most C, the noise on their mean about z sqrt(D) C / n
    ratio = float(noise_multiplier) * math.sqrt(size) / users
    if ratio > 1:
        progress.warn(
            f"the noise of a round is {ratio:.2g} times the largest signal there can be: {users} users are few for "
            f"{size} shared numbers at this epsilon. Lower model.rank, or raise --epsilon or the number of users."
        )


def ledger_budget(config: Config) -> float:
    """Epsilon of a ledger that the run has to make; inf where nothing is promised.

    Raises:
        UmbelError: If it is less than the run itself spends.
    """
    epsilon, budget = config.privacy.epsilon, config.privacy.ledger_epsilon
    if epsilon == "none":
        return math.inf
    if budget is not None and budget < float(epsilon):
        raise UmbelError(
            f"Expected privacy.ledger_epsilon >= privacy.epsilon={epsilon}, "
            f"got privacy.ledger_epsilon={budget}. Raise it."
        )
    return float(epsilon) if budget is None else budget


def capped_mu_max(config: Config, noise_multiplier: str, genesis: Mapping[str, Any]) -> str | None:
    """What a sampled run leaves to capped ones on its ledger, as mu; None for a run without sampling.

    Nothing, unless the ledger's budget is larger than the run's: then as much as fits, to one part in 256.

    Args:
        config: Of the run.
        noise_multiplier: z of each release.
        genesis: `epsilon`, `delta` and `mu_max` of the ledger, which need not exist yet.
    """
    q, s = config.privacy.sampling_probability, config.privacy.max_nodes_per_user
    if q is None:
        return None
    budget, mu_max = float(genesis["epsilon"]), str(genesis["mu_max"])
    if is_unlimited(mu_max) or budget <= float(config.privacy.epsilon):
        return "0"
    schedule = Schedule(noise_multiplier=noise_multiplier, sampling_probability=q, rounds=config.training.rounds)

    def share(part: int) -> str:
        return format(Decimal(mu_max) * part / _PARTS, ".9f")

    def is_too_much(part: int) -> bool:
        return amplified([schedule], float(genesis["delta"]), capped_mu_max=share(part), s=s).epsilon > budget

    # that not even nothing fits is said by whoever checks the run
    return share(max(1, bisect_left(range(_PARTS), True, key=is_too_much)) - 1)


def device_limit(config: Config, mu_limit: str) -> str:
    """mu_max of the filters of a run's nodes: the ledger's; for a sampled run enough for its heads.

    A head is counted like any contribution, so what a device admits is what its releases tell even of coins that are
    known. Fewer than one user in a million is left out of a release for that.
    """
    q, z = config.privacy.sampling_probability, str(config.run.noise_multiplier)
    if q is None or is_unlimited(mu_limit):
        return mu_limit
    heads = most_heads(config.training.rounds, float(q), _CUT_OFF)
    mu = math.sqrt(heads * cost_units(z) / UNITS)
    return f"{min(_LARGEST_MU, mu + 1e-8):.9f}"


def most_heads(rounds: int, q: float, rate: float) -> int:
    """A number that the heads of so many coins exceed with probability `rate` at most (Chernoff and Hoeffding)."""

    def bound(share: float) -> float:
        rest = (1 - share) * math.log((1 - share) / (1 - q)) if share < 1 else 0.0
        return math.exp(-rounds * (share * math.log(share / q) + rest))

    least = math.floor(rounds * q) + 1
    return next((heads for heads in range(least, rounds) if bound((heads + 1) / rounds) <= rate), rounds)


def prepare_ledger(config: Config, place: LedgerPlace, mu_max: str, budget: float) -> tuple[dict[str, Any], str, str]:
    """Make the ledger or check that the run fits the one there is; returns its GENESIS, public key and mu limit."""
    privacy, population = config.privacy, Path(config.data.source).name
    if not _is_begun(place.ledger):
        if config.run.out != str(place.ledger.parent) and not place.ledger.parent.is_dir():
            raise UmbelError(
                f"Expected a folder for run.ledger={place.ledger}, got none. Make it, or correct the path."
            )
        make_folder(place.ledger.parent)
        key = load_key(place.key) if place.key.exists() else create_key(place.key)
        with PrivacyLedger.create(
            place.ledger,
            population=population,
            epsilon="inf" if math.isinf(budget) else budget,
            delta=float(privacy.delta or 0),
            mu_max=mu_max,
            max_nodes_per_user=privacy.max_nodes_per_user,
            key=key,
        ):
            pass
    with PrivacyLedger.open(place.ledger, key=load_key(place.key)) as ledger:
        check_fits(ledger, config, place, population)
        return dict(ledger.genesis), ledger.public_key, ledger.mu_limit


def check_fits(ledger: PrivacyLedger, config: Config, place: LedgerPlace, population: str) -> None:
    """Refuse a run whose population or schedule is not the ledger's, before anything is charged.

    Raises:
        UmbelError: If the ledger belongs to another population.
        BudgetExhausted: If not all rounds of the run fit.
    """
    if ledger.genesis["population"] != population:
        raise UmbelError(
            f"Expected the ledger of {population}, got {place.ledger} of {ledger.genesis['population']}. "
            "Name the ledger of these users."
        )
    if ledger.genesis["max_nodes_per_user"] != config.privacy.max_nodes_per_user:
        raise UmbelError(
            f"Expected privacy.max_nodes_per_user={ledger.genesis['max_nodes_per_user']} as in the ledger, "
            f"got privacy.max_nodes_per_user={config.privacy.max_nodes_per_user}."
        )
    if config.privacy.sampling_probability is not None:
        planned = Schedule(
            noise_multiplier=str(config.run.noise_multiplier),
            sampling_probability=config.privacy.sampling_probability,
            rounds=config.training.rounds,
        )
        charge_of(ledger, planned, config.run.capped_mu_max or "0")
        return
    affordable = affordable_rounds(ledger, str(config.run.noise_multiplier))
    if affordable < config.training.rounds:
        delta = float(ledger.genesis["delta"])
        spent = affordable == 0 and ledger.capped_units >= ledger.limit_units * _NEARLY_ALL
        remedy = "Nothing more can be released about these users." if spent else "Lower --epsilon or --rounds."
        raise BudgetExhausted(
            f"Expected a budget for training.rounds={config.training.rounds} at privacy.epsilon="
            f"{config.privacy.epsilon}, got one with room for {affordable:g}: {place.ledger} has spent epsilon "
            f"{ledger.epsilon_spent(delta):.4g} of {ledger.genesis['epsilon']}. {remedy}"
        )


def run_engine(config: Config, folder: RunFolder, *, app_dir: Path = CHECKOUT) -> list[dict[str, Any]]:
    """Run the ServerApp and the ClientApps to the end of the run, from wherever an earlier process left it.

    Args:
        config: As resolved.
        folder: The run.
        app_dir: Where Flower's engine takes the apps from: a checkout or an installed bundle.

    Returns:
        The public numbers of the run's rounds, without those of rounds in which a process was killed.
    """
    settings_path = str(folder.nodes / "node.toml")
    if config.training.engine == "flower":
        from umbel import flower_engine  # noqa: PLC0415 (Ray's world only where it is asked for)

        flower_engine.run(
            app_dir,
            num_nodes=config.training.nodes,
            run_config={"run-folder": str(folder.root)},
            log_file=folder.root / "flower.log",
            # as `umbel.cli` does here; their number can change the last bits of a product of a thousand features
            env={SETTINGS_VARIABLE: settings_path} | {name: os.environ.get(name, "1") for name in _BLAS_THREADS},
            on_line=_log_again,
        )
    else:
        from client.app import app as client_app  # noqa: PLC0415
        from server.app import app as server_app  # noqa: PLC0415
        from umbel.inprocess import InProcessGrid, partitions, run_server_app  # noqa: PLC0415

        nodes = partitions(config.training.nodes, {"node-config": settings_path})
        workers = min(config.training.nodes, os.cpu_count() or 1)
        run_config: dict[str, bool | float | int | str] = {"run-folder": str(folder.root)}
        try:
            # Nodes only refuse; here, what is wrong with the data or a disk is said. It is also read once, not by all.
            service_for(settings_path, 0, config.training.nodes)
            with InProcessGrid(client_app, nodes, run_config=run_config, workers=workers) as grid:
                run_server_app(server_app, grid)
        finally:
            close_services()
    # a run whose rounds all crashed before they were reported has no such file
    lines = folder.metrics.read_bytes().splitlines() if folder.metrics.exists() else []
    return [json.loads(line) for line in lines]


def evaluated(settings: RunSettings, *, progress: Progress, with_baselines: bool) -> dict[str, Any]:
    """Evaluate, write `evaluation/results.json` and the report, and return the results.

    Args:
        settings: A run that has finished training.
        progress: Who watches.
        with_baselines: Whether to compare with baselines.
    """
    config, folder = settings.config, settings.folder
    model, _ = load_model(folder.model)
    ours, found, penalties, others = evaluate(settings, model, with_baselines=with_baselines, on_step=progress.step)
    if with_baselines:
        progress.step("error over rounds")
    curve = error_curve(settings) if with_baselines else []
    source = sources.read(config.data, config.model.family)
    population = source.train.num_users
    timed = folder.timings.read_text().splitlines() if folder.timings.exists() else []
    seconds = [json.loads(line)["seconds"] for line in timed]
    results = {
        "run": str(folder.root),
        "report": str(folder.root / "report.html"),
        "metric": ours.metric,
        "error": error_section(ours),
        "baselines": baseline_section(found),
        "paired": {name: paired_difference(ours, held_out) for name, held_out in found.items()},
        "penalties": penalties,
        **others,
        "curve": curve,
        "privacy": privacy_section(config),
        "users": population,
        "data": {"bad_rows_dropped": source.num_bad_rows, "values_clipped": source.num_clipped},
        "users_per_second": population / statistics.median(seconds) if seconds else None,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    make_folder(folder.evaluation, mode=0o700)
    write_durably(folder.evaluation / "results.json", json.dumps(results, indent=1).encode())
    write_reports(folder.root)
    return results


def privacy_section(config: Config) -> dict[str, Any]:
    """`privacy` of the results, recomputed from the run's own ledger: what the whole ledger has spent."""
    with PrivacyLedger.open(Path(str(config.run.ledger))) as ledger:
        mu, genesis, sampled = ledger.mu_spent, ledger.genesis, ledger.sampled
        rounds = len(ledger.rounds_of(str(config.run.name)))
        events, runs, lost = ledger.events(), len(ledger.runs), ledger.rounds.num_lost
    delta, s = float(genesis["delta"]), int(genesis["max_nodes_per_user"])
    losses = losses_at([delta], mu=mu, noise_multipliers=None, s=s, sampled=sampled)
    epsilon = losses["epsilon"]
    reasons = reasons_against(events, genesis["mu_max"])
    return {
        "epsilon": epsilon,
        "delta": delta,
        "mu": None if epsilon is None else mu,
        "replace_one_epsilon": losses["replace_one_epsilon"],
        "delta_fp": None if epsilon is None else delta_fp(epsilon, sum(map(distance_of, events))),
        "noise_multiplier": float(str(config.run.noise_multiplier)),
        "rounds": rounds,
        "not_private": bool(reasons),
        "promise": promise_of_ledger(
            epsilon,
            delta,
            population=genesis["population"],
            rounds=len(events),
            runs=runs,
            lost=lost,
            max_nodes_per_user=s,
            is_sampled=sampled is not None,
            reasons_against=reasons,
        ),
    }


def default_folder(now: Callable[[], datetime] = datetime.now) -> Path:
    """`runs/` and the time; another name where that is taken."""
    stem = Path("runs") / now().strftime("%Y%m%d-%H%M%S")
    return stem if not stem.exists() else stem.with_name(f"{stem.name}-{uuid4().hex[:4]}")


def _is_begun(ledger: Path) -> bool:
    """Whether there is a whole first line; a torn one is written anew, since nothing can follow it."""
    if not ledger.exists():
        return False
    with ledger.open("rb") as file:
        return b"\n" in file.read(_FIRST_LINE_BYTES)


def _genesis_of(ledger: Path) -> Mapping[str, Any] | None:
    if not _is_begun(ledger):
        return None
    with PrivacyLedger.open(ledger) as opened:
        return opened.genesis


def _log_again(line: dict[str, Any]) -> None:
    """What the server logged in a child process, as if it had been logged in this one."""
    for name, numbers in line.items():
        ROUNDS_LOG.info(name, extra={name: numbers})


def _flat(config: Config) -> dict[str, Any]:
    dumped = config.model_dump(exclude_none=True)
    return {f"{section}.{key}": value for section, values in dumped.items() for key, value in values.items()}


def _absolute_paths(data: DataConfig) -> dict[str, str | None]:
    return {name: _absolute(getattr(data, name)) for name in ("source", "item_features", "catalogue")}


def _absolute(path: str | None) -> str | None:
    return path if path in (None, "synthetic") else str(Path(path).resolve())
