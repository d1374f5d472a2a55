"""Training by a federation: a run folder laid out, submitted as a bundle, and followed to how it really ended.

The server's half of `umbel.simulate`: no user's row is read here, and nothing is evaluated. Flower says only whether a
process ended well; what a run came to is in its `outcome.json`, and a run without one was interrupted and can go on.
"""

import contextlib
import json
import re
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Protocol
from uuid import uuid4

from common import errors
from common.config import Config, load_config
from common.data import DataSchema
from common.errors import BudgetExhausted, Refused, UmbelError
from common.files import make_folder, write_durably
from common.loading import public_schema
from privacy.discrete import require_opendp
from privacy.ledger import PrivacyLedger
from privacy.participation import is_noiseless
from privacy.report_page import write_reports
from server.algorithms import largest_layout
from server.checkpoint import save_schema
from server.networks import save_network_start
from server.registry import load_registry
from server.settings import RunFolder, RunSettings, load_run
from umbel.deploy import Control, Federation, UnreachableError, is_over
from umbel.flower_engine import CHECKOUT, build_bundle
from umbel.rollback import check_not_rolled_back
from umbel.simulate import (
    capped_mu_max,
    check_fits,
    check_noise,
    network_start,
    noise_and_limit,
    privacy_section,
    with_shape,
)
from umbel.start import check_start, find_start, with_start

_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_RUN_ID_DIGITS = 12
_SUBMISSION = "submission.json"
_LOOK_SECONDS = 0.2
_ASK_SECONDS = 1.0
_GRACE_SECONDS = 3.0


class Watcher(Protocol):
    """Who watches a run."""

    def step(self, name: str) -> None:
        """A new step has begun."""

    def warn(self, message: str) -> None:
        """Something the user should know."""

    def round(self, numbers: Mapping[str, Any]) -> None:
        """A round has ended; its public numbers."""


class RunDiedError(UmbelError):
    """The ServerApp ended without saying how; the run can be resumed."""

    exit_code: ClassVar[int] = 130


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What was handed to SuperLink.

    Attributes:
        flower_run_id: Flower's number.
        bundle: SHA-256 of the bundle, hex, which nodes may have on a list of those they answer.
    """

    flower_run_id: str
    bundle: str


def default_name(now: datetime | None = None) -> str:
    """The time, for a run without a name."""
    return (now or datetime.now()).strftime("%Y%m%d-%H%M%S")


def run_folder(federation: Federation, name: str) -> RunFolder:
    """Where the run of this name is.

    Raises:
        UmbelError: If it is no name for a folder.
    """
    if _RUN_NAME.fullmatch(name) is None:
        raise UmbelError(f"Expected a name of letters, digits, '.', '_' and '-', got {name!r}. Choose another.")
    return RunFolder(root=federation.folder.runs / name)


def lay_out(federation: Federation, config: Config, name: str, progress: Watcher) -> RunSettings:
    """Resolve a configuration and write a new run folder: everything the ServerApp reads, nothing it computes.

    Raises:
        UmbelError: Bad input, before anything is charged.
        BudgetExhausted: If the run does not fit the ledger's budget, before anything is charged.
    """
    folder, place = run_folder(federation, name), federation.folder.place
    if folder.config.exists():
        raise UmbelError(f"Expected a new run, got {name!r}, which there is. Add --resume, or choose another name.")
    registry = load_registry(federation.folder.registry)
    config = _of_deployment(config, federation)
    schema = public_schema(config.data, config.model.family)
    _check_schema(schema, config, federation)
    start = find_start(config, progress)
    config = with_shape(with_start(config, start), schema, progress)
    if config.privacy.noise == "discrete":
        require_opendp()
    run_name = uuid4().hex[:_RUN_ID_DIGITS]
    network = network_start(config, schema, run_name)
    with PrivacyLedger.open(place.ledger) as ledger:
        genesis = ledger.genesis
        config = _of_population(config, genesis)
        delta = float(config.privacy.delta or 0)
        noise_multiplier, _ = noise_and_limit(config, delta)
        run = {
            "out": str(folder.root),
            "ledger": str(place.ledger),
            "resume": False,
            "name": run_name,
            "noise_multiplier": noise_multiplier,
            "capped_mu_max": capped_mu_max(config, noise_multiplier, genesis),
        }
        config = config.model_copy(update={"run": config.run.model_copy(update=run)})
        is_private = not is_noiseless(noise_multiplier) and config.privacy.seed is None
        check_start(start, config, schema, ledger, is_private=is_private, progress=progress)
        check_fits(ledger, config, place, genesis["population"])
        if not is_noiseless(noise_multiplier):
            size = largest_layout(config, schema.dimension, private=True, network=network).size
            check_noise(config, noise_multiplier, delta, size=size, users=registry.population_size, progress=progress)
    make_folder(folder.root)
    registry.save(folder.registry)
    save_schema(folder.schema, schema)
    if start is not None:
        write_durably(folder.start, start.data)
    if network is not None:
        save_network_start(folder.network, network.architecture, network.shared)
    write_durably(folder.config, config.to_toml().encode())
    load_config(folder.config)  # what was written is what the ServerApp will read
    return load_run(folder.root)


def submit(federation: Federation, settings: RunSettings) -> Submission:
    """Hand a run to SuperLink; it begins or goes on from wherever an earlier ServerApp left it."""
    with TemporaryDirectory(prefix="umbel-") as temporary, federation.control() as control:
        bundle = bundle_of(Path(temporary))
        run_id = control.start_run(bundle, {"run-folder": str(settings.folder.root)})
        submission = Submission(flower_run_id=run_id, bundle=_sha256(bundle))
    document = {"flower_run_id": submission.flower_run_id, "bundle": submission.bundle}
    write_durably(settings.folder.root / _SUBMISSION, json.dumps(document).encode() + b"\n")
    return submission


def bundle_of(folder: Path) -> Path:
    """The bundle of this installation, in `folder`.

    Flower looks at every file below the app's folder, and takes seconds for an environment that lies there too: what
    belongs in the bundle is copied first, and makes the same bytes.
    """
    patterns = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]["fab-include"]
    app = folder / "umbel"
    for path in (found for pattern in ("pyproject.toml", *patterns) for found in CHECKOUT.glob(pattern)):
        copy = app / path.relative_to(CHECKOUT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return build_bundle(folder, app)


def submission_of(folder: RunFolder) -> Submission | None:
    """What was last handed to SuperLink of this run."""
    found = _read(folder.root / _SUBMISSION)
    return None if found is None else Submission(flower_run_id=found["flower_run_id"], bundle=found["bundle"])


def outcome_of(folder: RunFolder, submission: Submission) -> dict[str, Any] | None:
    """How this submission ended, if its ServerApp said so."""
    found = _read(folder.outcome)
    return found if found is not None and found.get("flower_run_id") == submission.flower_run_id else None


def is_at_work(federation: Federation, submission: Submission) -> bool:
    """Whether SuperLink takes the run for unfinished, and nothing on this machine says that its ServerApp is gone."""
    with federation.control() as control:
        if is_over(control.run_status(submission.flower_run_id)):
            return False
        if federation.server_app_runs() is not False:
            return True
        # it may only be starting
        until = time.monotonic() + _GRACE_SECONDS
        while time.monotonic() < until:
            if federation.server_app_runs():
                return True
            time.sleep(_LOOK_SECONDS)
        control.stop_run(submission.flower_run_id)
    return False


def follow(federation: Federation, settings: RunSettings, submission: Submission, watcher: Watcher) -> None:
    """Show rounds as they end, until the run has ended.

    Raises:
        UmbelError: What the ServerApp raised, where it is one of our own errors.
        RunDiedError: If the ServerApp ended without a word.
    """
    watcher.step("waiting for the ServerApp")
    with federation.control() as control:
        outcome = _wait(federation, control, settings, submission, watcher)
        if outcome is None:
            control.stop_run(submission.flower_run_id)
        log = _keep_log(federation, control, settings.folder.root.name, submission)
    if outcome is None:
        raise RunDiedError(
            "Expected the run to end with an outcome, got a ServerApp that was ended; nothing is lost, and what was "
            f"charged stays charged. Go on with: umbel train {federation.folder.root} "
            f"--resume {settings.folder.root.name}"
        )
    raise_outcome(outcome, log)


def _keep_log(federation: Federation, control: Control, name: str, submission: Submission) -> Path:
    """The ServerApp's own log, brought from SuperLink to the others."""
    path = federation.logs / f"run-{name}.log"
    with contextlib.suppress(UmbelError), path.open("a", encoding="utf-8") as file:
        file.write(control.log_of(submission.flower_run_id))
    return path


def raise_outcome(outcome: Mapping[str, Any], log: Path) -> None:
    """Raise what an outcome says, unless all is well."""
    name, message = outcome["error"], outcome.get("message")
    if name is None:
        return
    if outcome["exit_code"] == RunDiedError.exit_code:
        raise RunDiedError("The ServerApp was told to end; nothing is lost. Go on with --resume.")
    if message is None:
        raise RunFailedError(f"Expected a run without errors, got {name}. See {log}.")
    kind = getattr(errors, name, UmbelError)
    raise kind(outcome["code"], message) if issubclass(kind, Refused) else kind(message)


class RunFailedError(UmbelError):
    """The ServerApp ended with an error that was not foreseen."""

    exit_code: ClassVar[int] = 1


def results_of(federation: Federation, settings: RunSettings, submission: Submission | None) -> dict[str, Any]:
    """Write the report of a run that has ended and say what came of it, as documented for `--format json`."""
    write_reports(settings.folder.root)
    return {
        "run": str(settings.folder.root),
        "name": settings.folder.root.name,
        "report": str(settings.folder.root / "report.html"),
        "model": str(settings.folder.model),
        "flower_run_id": None if submission is None else submission.flower_run_id,
        "bundle": None if submission is None else submission.bundle,
        "users": load_registry(settings.folder.registry).population_size,
        "privacy": privacy_section(settings.config),
    }


def resumed(federation: Federation, name: str) -> RunSettings:
    """A run that there is, as it was started.

    Raises:
        UmbelError: If there is none of this name.
    """
    folder = run_folder(federation, name)
    if not folder.config.exists():
        there = sorted(path.parent.name for path in federation.folder.runs.glob("*/config.toml"))
        known = f" There is: {', '.join(there)}." if there else ""
        raise UmbelError(f"Expected a run to resume, got {name!r}, which is none.{known} Start it without --resume.")
    return load_run(folder.root)


def train(federation: Federation, settings: RunSettings, watcher: Watcher) -> dict[str, Any]:
    """Submit a run, or join it where it is at work, follow it, and report.

    Returns:
        What came of it.

    Raises:
        UmbelError: What the ServerApp raised; where it has released a model, after the report was written.
    """
    submission = submission_of(settings.folder)
    if submission is not None and (outcome := outcome_of(settings.folder, submission)) is not None:
        if outcome["error"] is None:
            return results_of(federation, settings, submission)
    elif submission is not None and is_at_work(federation, submission):
        try:
            follow(federation, settings, submission, watcher)
            return results_of(federation, settings, submission)
        except RunDiedError:
            watcher.warn("the ServerApp had ended; going on with another one.")
    with PrivacyLedger.open(settings.place.ledger) as ledger:
        check_not_rolled_back(federation.folder, ledger)  # later a round would be charged, and nobody answer
    watcher.step("submitting")
    submission = submit(federation, settings)
    try:
        follow(federation, settings, submission, watcher)
    except BudgetExhausted as error:
        if not settings.folder.model.exists():
            raise
        results = results_of(federation, settings, submission)
        raise BudgetExhausted(f"{error} The rounds before are in {results['report']}.") from error
    watcher.step("writing the report")
    return results_of(federation, settings, submission)


def _of_deployment(config: Config, federation: Federation) -> Config:
    """The configuration with the data that a trial federation was provisioned with, where it names none."""
    deployment = federation.deployment
    if deployment.data is None or "data" in config.model_fields_set:
        return config
    changes: dict[str, Any] = {"data": deployment.data}
    if "family" not in config.model.model_fields_set:
        changes["model"] = config.model.model_copy(update={"family": deployment.nodes.family})
    return config.model_copy(update=changes)


def _check_schema(schema: DataSchema, config: Config, federation: Federation) -> None:
    """Refuse what the nodes of a trial federation would refuse after it was charged.

    Raises:
        UmbelError: If their data have another schema.
    """
    deployment = federation.deployment
    if deployment.data is None:
        return
    if deployment.nodes.family != config.model.family:
        raise UmbelError(
            f"Expected model.family={deployment.nodes.family!r} as {federation.folder.deployment} has it, got "
            f"model.family={config.model.family!r}. Leave it out."
        )
    if public_schema(deployment.data, deployment.nodes.family).digest != schema.digest:
        raise UmbelError(
            f"Expected [data] with the features and ranges of {federation.folder.deployment}, got others: the nodes "
            "would refuse every round. Leave [data] out to take theirs."
        )


def _of_population(config: Config, genesis: Mapping[str, Any]) -> Config:
    """The configuration with what the ledger's population has, where it says nothing."""
    given, changes = config.privacy.model_fields_set, {}
    if config.privacy.delta is None:
        changes["delta"] = float(genesis["delta"])
    if "max_nodes_per_user" not in given:
        changes["max_nodes_per_user"] = int(genesis["max_nodes_per_user"])
    return config.model_copy(update={"privacy": config.privacy.model_copy(update=changes)})


def _wait(
    federation: Federation, control: Control, settings: RunSettings, submission: Submission, watcher: Watcher
) -> dict[str, Any] | None:
    """The outcome; None where the ServerApp is gone without one."""
    rounds, folder = _Rounds(settings.folder.metrics), settings.folder
    asked, gone_since, has_run, is_over_there, is_away = 0.0, None, False, False, False
    while True:
        outcome = outcome_of(folder, submission)
        for numbers in rounds.new():
            watcher.round(numbers)
        if outcome is not None:
            return outcome
        now = time.monotonic()
        if now - asked > _ASK_SECONDS:
            asked = now
            try:
                is_over_there, is_away = is_over(control.run_status(submission.flower_run_id)), False
            except UnreachableError as error:
                if not is_away:
                    watcher.warn(f"{error} Still waiting.")
                is_away = True
        runs = federation.server_app_runs()
        has_run = has_run or bool(runs)
        # Flower takes a minute to miss a ServerApp; on this machine it is seen at once
        is_gone = is_over_there or (has_run and runs is False)
        gone_since = (gone_since or now) if is_gone else None
        if gone_since is not None and now - gone_since > _GRACE_SECONDS:
            return None
        time.sleep(_LOOK_SECONDS)


class _Rounds:
    """The lines of a run's metrics that come after this was made."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = path.stat().st_size if path.exists() else 0

    def new(self) -> Iterator[dict[str, Any]]:
        """Whole lines that were not there before."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            # a torn line of an earlier ServerApp may have been cut off meanwhile
            self._offset = min(self._offset, file.seek(0, 2))
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _sha256(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()
