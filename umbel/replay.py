"""Whether a released model is the one that follows from the committed releases: all steps again, from the first state.

Every step of the server is a function of public things: the configuration, the schema and the model that a run may
start from, whose digests are in the run's START line, and the noised sums, whose digests are in COMMIT lines. So the
model can be recomputed by whoever has the run folder, and a model file that was changed is seen though nothing signs
it.
"""

import json
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from common.config import Config, load_config
from common.data import DataSchema
from common.errors import UmbelError, VerificationError
from common.files import unpack
from common.model import SharedModel
from privacy.audit.findings import Target
from privacy.audit.releases import Releases
from privacy.audit.verify import Verification
from privacy.lines import heads
from privacy.promise import reasons_against
from server.algorithms import algorithm_of
from server.checkpoint import load_model, load_schema
from server.initialization import tie_breaker
from server.networks import NetworkStart, read_network_start
from server.settings import RunFolder
from server.start import read_start

_OF_THE_MOMENT = ("ledger_head", "not_private")
_TOLERANCE = 1e-6
"""Of a parameter's largest entry: other processors and libraries round differently."""


@dataclass(frozen=True, kw_only=True)
class ModelCheck:
    """What became of the attempt.

    Attributes:
        status: "differs" only where the model, or the configuration it should follow from, is another one.
        reason: Why it differs, or was not recomputed.
    """

    status: Literal["recomputed", "not recomputed", "differs"]
    reason: str = ""


def check_model(target: Target, found: Verification) -> ModelCheck:
    """Recompute the released model of a run folder and compare.

    Args:
        target: What was audited; a run folder with configuration, schema and model.
        found: Its ledger; the releases must have been compared with it.
    """
    if target.root is None or target.releases is None or target.run is None:
        return _not_recomputed("only a run folder has the configuration and the schema that it takes.")
    folder, run = RunFolder(root=target.root), target.run
    if run not in found.runs:
        return ModelCheck(status="differs", reason=f"Expected a model of a run of the ledger, got {run=}.")
    if found.runs[run]["schedule"].get("schema") is None:
        return _not_recomputed(f"the START line of run={run!r} does not say what {folder.schema.name} was.")
    released, facts = load_model(folder.model)
    try:
        config, schema = load_config(folder.config), load_schema(folder.schema)
        start = _start_of(config, folder, found.runs[run]["schedule"])
        network = _network_of(config, folder, found.runs[run]["schedule"])
        models = models_of(config, run, target.releases, found, schema, start=start, network=network)
        (model,) = deque(models, maxlen=1)
    except UmbelError as error:
        differs = isinstance(error, VerificationError)
        return ModelCheck(status="differs" if differs else "not recomputed", reason=str(error))
    except (ValueError, KeyError, IndexError, TypeError):  # what a step says of a layout that is not its own
        return _not_recomputed("this version of umbel does not take the steps of the one that trained it.")
    expected = {
        "run": run,
        "ledger_id": found.genesis["ledger_id"],
        "algorithm": config.training.algorithm,
        "family": config.model.family,
        "sparsity": config.model.sparsity,
        "feature_names": list(schema.feature_names),
        "target_offset": schema.target_offset,
    }
    if network is not None:
        expected["network"] = network.architecture.encode()
    reason = (
        _difference(model, released)
        or _other_fact(expected, facts)
        or _other_head(target.ledger, found, facts)
        or _unexplained(folder.model, {*expected, *_OF_THE_MOMENT})
    )
    return ModelCheck(status="differs", reason=reason) if reason else ModelCheck(status="recomputed")


def _start_of(config: Config, folder: RunFolder, schedule: Mapping[str, Any]) -> SharedModel | None:
    """The released model that a run started from; its bytes are those that the audit has compared with START.

    Raises:
        VerificationError: If START, the configuration and the model do not say the same about it.
    """
    said = schedule.get("start")
    start = None if config.training.start is None else read_start(folder.start)
    ours = None if start is None else start.in_start_line(is_public=config.training.start_is_public)
    if json.dumps(said, sort_keys=True) != json.dumps(ours, sort_keys=True):
        raise VerificationError(f"Expected the start as the START line has it, {said}, got {ours}.")
    return None if start is None else start.model


def _network_of(config: Config, folder: RunFolder, schedule: Mapping[str, Any]) -> NetworkStart | None:
    """The network that a run trained, as it started.

    Raises:
        VerificationError: If START does not say the same about it.
    """
    network = None if config.network.module is None else read_network_start(folder.network)
    ours = None if network is None else network.digest
    if schedule.get("network") != ours:
        raise VerificationError(
            f"Expected the network as the START line has it, {schedule.get('network')}, got {ours}."
        )
    return network


def _not_recomputed(reason: str) -> ModelCheck:
    return ModelCheck(status="not recomputed", reason=reason)


def models_of(
    config: Config,
    run: str,
    releases: Releases,
    found: Verification,
    schema: DataSchema,
    *,
    start: SharedModel | None = None,
    network: NetworkStart | None = None,
) -> Iterator[SharedModel]:
    """The first model, and the one after every committed release of a run, as `server.training` steps.

    Args:
        config: Of the run.
        run: Its name in the ledger.
        releases: Its noised sums.
        found: The ledger.
        schema: Of the run's data.
        start: The released model that the run started from, if it did.
        network: The network that it trained, if it did.
    """
    algorithm = algorithm_of(config, start, network)
    state = algorithm.first_state(schema, tie_breaker(run, config.privacy.seed))
    yield state.model
    for entry in found.rounds.of_run(run):
        if entry.release_digest is not None:
            arrays, _ = unpack(releases.path(entry))
            state = algorithm.step(state, arrays["noised_sum"], entry.event)
            yield state.model


def _difference(expected: SharedModel, released: SharedModel) -> str:
    """The first parameter that differs, in words; an empty string if none does."""
    for name in ("beta", "U", "b_variance", "noise_variance"):
        ours, theirs = np.asarray(getattr(expected, name)), np.asarray(getattr(released, name))
        largest = float(np.max(np.abs(ours), initial=0.0))
        if ours.shape != theirs.shape:
            return f"Expected {name} of shape {ours.shape} from the committed sums, got {theirs.shape} in the model."
        if not np.allclose(theirs, ours, rtol=0.0, atol=_TOLERANCE * largest, equal_nan=True):
            return (
                f"Expected {name} as the committed sums make it, got a model that differs by up to "
                f"{float(np.max(np.abs(theirs - ours))):.2g}, where entries are up to {largest:.2g}."
            )
    return ""


def _other_fact(expected: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """The first fact of the model file that is not what configuration, schema and ledger say."""
    for name, value in expected.items():
        if json.dumps(facts.get(name), sort_keys=True) != json.dumps(value, sort_keys=True):  # to Python, 1 is True
            return f"Expected {name}={value!r} in the released model, got {facts.get(name)!r}."
    return ""


def _other_head(ledger: Path, found: Verification, facts: Mapping[str, Any]) -> str:
    """What is wrong with the head and the stamp of the model file, which are of when it was written."""
    sequence = _sequence_of(ledger, str(facts.get("ledger_head")), found.sequence)
    if sequence is None:
        return f"Expected a head of this ledger in the released model, got {facts.get('ledger_head')!r}."
    events = (entry.event for entry in found.rounds if entry.sequence <= sequence)
    stamp = list(reasons_against(events, str(found.genesis["mu_max"])))
    return _other_fact({"not_private": stamp}, facts)


def _unexplained(path: Path, explained: Collection[str]) -> str:
    """What a model file has beyond what was recomputed: whoever reads it might take that for umbel's word.

    Args:
        path: The file, which has been read as a model.
        explained: Facts that were compared.
    """
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")], object_pairs_hook=_once)
    metadata = header.pop("__metadata__")
    facts = json.loads(metadata.pop("facts"), object_pairs_hook=_once)
    numbers = {"b_variance", "noise_variance"}
    for kind, found, known in (
        ("tensor", header, {"beta", "U"}),
        ("metadata", metadata, set()),
        ("fact", facts, {*explained, *numbers}),
    ):
        if unknown := sorted(found.keys() - known):
            return f"Expected a model with nothing else in its file, got the {kind} {unknown[0][:80]!r} too."
    if kinds := sorted({str(entry["dtype"]) for entry in header.values()} - {"F64"}):
        return f"Expected parameters as 64-bit floats in the released model, got {kinds[0]}."
    if wrong := sorted(name for name in numbers if type(facts[name]) is not float):
        return f"Expected {wrong[0]} as a number in the released model, got {facts[wrong[0]]!r}."
    return ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different; of two alike, other programs may read the other."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        return found | {f"{twice} (twice)": None}
    return found


def _sequence_of(ledger: Path, head: str, last: int) -> int | None:
    """The line that leaves the ledger with this head."""
    with ledger.open("rb") as lines:
        for sequence, current in heads(lines):
            if current.hex() == head:
                return sequence
            if sequence == last:
                break
    return None
