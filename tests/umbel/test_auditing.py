"""The audit of runs and ledgers: several deltas, several runs, the model recomputed, the attack, and bad input."""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.config import load_config
from common.errors import UmbelError, VerificationError
from common.files import pack, unpack
from privacy.audit import audit, audit_together
from privacy.audit.findings import find_target
from privacy.audit.losses import losses_at
from privacy.audit.verify import verify
from privacy.gaussian import epsilon_of_mu
from privacy.keys import public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.lines import ZERO_HEAD, signed_line
from privacy.participation import mu_max_string
from server.checkpoint import load_schema, save_schema
from umbel import cli
from umbel.empirical import write_result
from umbel.replay import check_model, models_of

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OTHER = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
DIGEST = "0f" * 32
EVENT = {
    "mechanism": "gaussian",
    "noise_multiplier": "20",
    "clipping_norm": "1",
    "grid_scale": 65536,
    "groups": [{"name": "model", "size": 10, "share": "1"}],
    "denominator": 3,
    "noise": "aes-256-ctr",
    "sampling": "none",
    "initialization": False,
}
SMALL = (
    *("--set", "data.synthetic.users=40", "--set", "data.synthetic.examples=[4, 12]", "--quiet"),
    *("--set", "data.synthetic.dimension=5", "--rank", "2", "--sparsity", "1", "--rounds", "2", "--no-baselines"),
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


Command = Callable[..., Ended]


@pytest.fixture
def umbel(capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    """Runs a command in this process."""

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Ended(code, *capsys.readouterr())

    with mock.patch.dict(os.environ):
        yield run


def write_ledger(
    path: Path,
    runs: dict[str, tuple[int, str]],
    *,
    key: Ed25519PrivateKey = KEY,
    population: str = "p",
    ledger_id: str | None = None,
    s: int = 1,
    noise: str = "aes-256-ctr",
) -> Path:
    """A ledger with so many committed rounds at this noise multiplier for each run."""
    with PrivacyLedger.create(
        path,
        population=population,
        epsilon=4.0,
        delta=1e-6,
        mu_max=mu_max_string(4.0, 1e-6, s),
        max_nodes_per_user=s,
        key=key,
        ledger_id=ledger_id or path.stem,
    ) as ledger:
        charge(ledger, runs, noise)
    return path


def charge(ledger: PrivacyLedger, runs: dict[str, tuple[int, str]], noise: str = "aes-256-ctr") -> None:
    for run, (rounds, z) in runs.items():
        ledger.start(run, {}, DIGEST)
        for server_round in range(1, rounds + 1):
            event = {**EVENT, "noise_multiplier": z, "noise": noise}
            ledger.commit(ledger.reserve(run, server_round, event, 3).sequence, DIGEST)


def fails_in_one_line(ended: Ended, code: int, *parts: str) -> None:
    assert ended.code == code
    assert ended.out == ""
    assert ended.err.count("\n") == 1
    assert ended.err.startswith("umbel: error: ")
    assert [part for part in parts if part not in ended.err] == []


# --- one target ------------------------------------------------------------------------------------------------------


def test_several_deltas_by_several_accountants(umbel: Command, tmp_path: Path) -> None:
    """Each delta has a row with every accountant, in text too; the first is the one that the promise is for."""
    ledger = write_ledger(tmp_path / "l.jsonl", {"r": (4, "20")})
    wanted = ("--delta", "1e-5", "--delta", "1e-9", "--delta", "1e-5")
    found = json.loads(umbel("audit", ledger, *wanted, "--format", "json").out)["privacy"]
    assert [row["delta"] for row in found["at_deltas"]] == [1e-5, 1e-9]
    assert found["mu"] == pytest.approx(math.sqrt(4) / 20)
    for row in found["at_deltas"]:
        exact = epsilon_of_mu(0.1, row["delta"])
        assert row["epsilon"] == pytest.approx(exact, rel=1e-9)
        assert row["pld_epsilon"] == pytest.approx(exact, abs=1e-3)
        assert row["rdp_epsilon"] >= row["epsilon"]
        assert row["prv_epsilon"] is None or row["prv_epsilon"] == pytest.approx(exact, abs=0.03)
        assert row["replace_one_epsilon"] == pytest.approx(epsilon_of_mu(0.2, row["delta"]), rel=1e-9)
    assert {name: found[name] for name in found["at_deltas"][0]} == found["at_deltas"][0]
    text = umbel("audit", ledger, *wanted).out
    assert [line.split()[0] for line in text.splitlines() if line.startswith(" 10")] == ["10⁻⁵", "10⁻⁹"]
    assert "δ = 10⁻⁵" in text


@pytest.mark.parametrize("delta", ["0", "1e-13", "1", "nan", "-1"])
def test_a_delta_out_of_range_is_named(umbel: Command, tmp_path: Path, delta: str) -> None:
    """It is refused with its value and a remedy before the ledger is even looked for."""
    fails_in_one_line(
        umbel("audit", tmp_path / "none.jsonl", "--delta", "1e-6", "--delta", delta),
        2,
        f"delta={float(delta)}",
        "1e-12 <= delta < 1",
        "Correct --delta",
    )


def test_what_cannot_be_read_is_named(umbel: Command, tmp_path: Path) -> None:
    """No file, an empty one and one of a newer format are bad input, each in one line with a remedy."""
    empty, newer = tmp_path / "empty.jsonl", tmp_path / "newer.jsonl"
    empty.touch()
    body = {"format": 7, "public_key": public_key_hex(KEY), "anything": "else"}
    time = "2031-01-31T12:00:00Z"
    newer.write_bytes(
        signed_line(sequence=0, kind="GENESIS", body=body, previous=ZERO_HEAD, time=time, key=KEY) + b"\n"
    )
    fails_in_one_line(umbel("audit", tmp_path / "no.jsonl"), 2, "no.jsonl")
    fails_in_one_line(umbel("audit", empty), 2, "empty.jsonl", "which is empty", "from its owner")
    fails_in_one_line(umbel("audit", newer), 2, "format 2", "format=7", "newer umbel")
    fails_in_one_line(umbel("ledger", "show", newer), 2, "format=7")


def test_one_of_several_keys_is_enough(umbel: Command, tmp_path: Path) -> None:
    """A ledger verifies where one of the keys is its own, and fails, naming both, where none is."""
    ledger = write_ledger(tmp_path / "l.jsonl", {"r": (1, "20")})
    ours, other = public_key_hex(KEY), public_key_hex(OTHER)
    assert umbel("audit", ledger, "--public-key", other, "--public-key", ours).code == 0
    ended = umbel("audit", ledger, "--public-key", other)
    assert ended.code == 4
    assert other[:16] in ended.out
    assert ours[:16] in ended.out


def test_prv_is_left_out_of_a_very_long_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond so many rounds PRV is not asked, and the other accountants say what they said."""
    few = losses_at([1e-6], mu=math.sqrt(5) / 20, noise_multipliers=["20"] * 5, s=1)
    monkeypatch.setattr("privacy.audit.losses.MOST_PRV_ROUNDS", 4)
    many = losses_at([1e-6], mu=math.sqrt(5) / 20, noise_multipliers=["20"] * 5, s=1)
    assert many["prv_epsilon"] is None
    assert {**few, "prv_epsilon": None, "at_deltas": many["at_deltas"]} == many


# --- several targets -------------------------------------------------------------------------------------------------


def test_runs_of_one_ledger_are_counted_once(tmp_path: Path) -> None:
    """A copy that ends earlier adds nothing to the ledger it is the beginning of, in whatever order they are named."""
    early = write_ledger(tmp_path / "l.jsonl", {"a": (3, "20")})
    late = Path(shutil.copy(early, tmp_path / "late.jsonl"))
    with PrivacyLedger.open(late, key=KEY) as ledger:
        charge(ledger, {"b": (4, "40")})
    alone = audit(late)["privacy"]
    for paths in ((early, late), (late, early), (late, late, early)):
        together = audit_together(paths)
        assert len(together["ledgers"]) == 1
        assert together["ledgers"][0]["ledger"] == str(late)
        assert {name: together["privacy"][name] for name in ("mu", "at_deltas")} == {
            name: alone[name] for name in ("mu", "at_deltas")
        }
        rows = {row["run"]: row for row in together["runs"]}
        assert [(name, row["rounds"], row["noise_multipliers"]) for name, row in rows.items()] == [
            ("a", 3, ["20"]),
            ("b", 4, ["40"]),
        ]
        assert rows["a"]["mu_share"] == pytest.approx(0.75)
        assert rows["b"]["mu_share"] == pytest.approx(0.25)


def test_ledgers_of_the_same_users_add_in_squares(umbel: Command, tmp_path: Path) -> None:
    """mu² of two ledgers is the sum, also where one counts users on two nodes; the rest is to be added by hand."""
    first = write_ledger(tmp_path / "first.jsonl", {"a": (3, "20")})
    second = write_ledger(tmp_path / "second.jsonl", {"b": (2, "40")}, key=OTHER)
    twice = write_ledger(tmp_path / "twice.jsonl", {"c": (1, "50")}, s=2)
    together = audit_together([first, second])
    squares = 3 / 400 + 2 / 1600
    assert together["privacy"]["mu"] == pytest.approx(math.sqrt(squares), rel=1e-9)
    assert together["privacy"]["epsilon"] == pytest.approx(epsilon_of_mu(math.sqrt(squares), 1e-6), rel=1e-6)
    assert together["privacy"]["pld_epsilon"] == pytest.approx(together["privacy"]["epsilon"], abs=1e-3)
    assert sum(row["mu_share"] for row in together["runs"]) == pytest.approx(1)
    three = audit_together([first, second, twice], deltas=[1e-6, 1e-8])["privacy"]
    assert three["mu"] == pytest.approx(math.sqrt(squares + (2 / 50) ** 2), rel=1e-9)
    assert (three["pld_epsilon"], len(three["at_deltas"])) == (None, 2)
    keys = [word for key in (KEY, OTHER) for word in ("--public-key", public_key_hex(key))]
    ended = umbel("audit", first, second, *keys)
    assert ended.code == 0
    assert "must be added by hand" in ended.out
    assert "85.7 %" in ended.out
    assert "2 ledgers" in ended.out
    assert umbel("audit", first, second).code == 5
    assert umbel("audit", first, second, *keys[:2]).code == 4


def test_a_fork_is_refused_with_its_line(umbel: Command, tmp_path: Path) -> None:
    """Two copies of one ledger that go apart are not added up: the first line that differs is named."""
    first = write_ledger(tmp_path / "l.jsonl", {"a": (2, "20")})
    fork = Path(shutil.copy(first, tmp_path / "fork.jsonl"))
    for path, run in ((first, "b"), (fork, "c")):
        with PrivacyLedger.open(path, key=KEY) as ledger:
            charge(ledger, {run: (1, "20")})
    fails_in_one_line(umbel("audit", first, fork), 4, "fork", "line 7", "l.jsonl", "fork.jsonl")
    with pytest.raises(VerificationError, match="line 7"):
        audit_together([fork, first])


def test_other_users_are_not_added(umbel: Command, tmp_path: Path) -> None:
    """Ledgers of two populations, or of two units, are refused, naming what differs."""
    first = write_ledger(tmp_path / "first.jsonl", {"a": (2, "20")})
    second = write_ledger(tmp_path / "second.jsonl", {"a": (2, "20")}, population="q")
    fails_in_one_line(umbel("audit", first, second), 2, "population='p'", "population='q'", "one by one")
    with mock.patch("privacy.audit.composition._MUST_AGREE", ("max_nodes_per_user",)):
        other = write_ledger(tmp_path / "other.jsonl", {"a": (2, "20")}, s=2)
        with pytest.raises(UmbelError, match="max_nodes_per_user=2"):
            audit_together([first, other])


def test_one_bad_ledger_spoils_the_sum(umbel: Command, tmp_path: Path) -> None:
    """Where one fails, the verdict is its, and nothing is added up; one that is no ledger at all is named."""
    first = write_ledger(tmp_path / "first.jsonl", {"a": (2, "20")})
    second = write_ledger(tmp_path / "second.jsonl", {"a": (2, "20")})
    good = second.read_bytes()
    second.write_bytes(good[:-200] + bytes([good[-200] ^ 1]) + good[-199:])
    ended = umbel("audit", first, second, "--format", "json")
    found = json.loads(ended.out)
    assert (ended.code, found["exit_code"], found["status"], found["privacy"]) == (4, 4, "failed", None)
    assert [target["exit_code"] for target in found["targets"]] == [5, 4]
    assert {row["mu"] for row in found["runs"]} == {None}
    assert "line 6" in umbel("audit", first, second).out
    second.write_bytes(b"nothing\n")
    fails_in_one_line(umbel("audit", first, second), 4, "second.jsonl, line 1")


def test_a_ledger_without_promise_voids_the_sum(umbel: Command, tmp_path: Path) -> None:
    """Seeded noise in one of them: no epsilon of all of them together."""
    first = write_ledger(tmp_path / "first.jsonl", {"a": (2, "20")})
    second = write_ledger(tmp_path / "second.jsonl", {"b": (2, "20")}, noise="seeded (NOT PRIVATE)")
    found = audit_together([first, second])
    assert found["status"].endswith("NOT PRIVATE")
    assert found["privacy"]["not_private"]
    assert found["privacy"]["epsilon"] is None
    assert found["privacy"]["mu"] is None
    text = umbel("audit", first, second).out
    assert "NOT PRIVATE" in text
    assert "void" in text


def test_what_is_of_one_run_is_refused_for_two(umbel: Command, tmp_path: Path) -> None:
    """A head, or an attack, belongs to one run; canaries belong to an attack."""
    first = write_ledger(tmp_path / "first.jsonl", {"a": (2, "20")})
    fails_in_one_line(umbel("audit", first, first, "--anchor", f"1:{DIGEST}"), 2, "--anchor", "got 2")
    fails_in_one_line(umbel("audit", first, first, "--empirical"), 2, "--empirical", "got 2")
    fails_in_one_line(umbel("audit", first, "--canaries", 5), 2, "--canaries", "--empirical")
    fails_in_one_line(umbel("audit", first, "--threat", "last"), 2, "--threat", "--empirical")
    fails_in_one_line(umbel("audit", first, "--empirical"), 2, "run folder", "first.jsonl")


# --- a run folder ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gradient", "amht-lrs"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of each algorithm, not to be changed."""
    run = tmp_path_factory.mktemp("finished") / "run"
    with mock.patch.dict(os.environ):
        assert cli.run(["simulate", *SMALL, "--algorithm", request.param, "--out", str(run)]) == 0
    return run


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be tampered with."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def change_model(run: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> None:
    model = run / "release/model.safetensors"
    arrays, facts = unpack(model)
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(arrays, facts)
    model.write_bytes(pack(arrays, facts))


def test_the_model_is_recomputed(umbel: Command, finished: Path) -> None:
    """The released model follows from the committed sums, and the audit says so."""
    ended = umbel("audit", finished, "--format", "json")
    assert (ended.code, json.loads(ended.out)["model"]) == (5, {"status": "recomputed", "reason": ""})
    assert "recomputed from the committed sums" in umbel("audit", finished).out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays, facts: arrays["U"].__setitem__((0, 0), arrays["U"][0, 0] + 1e-3), "Expected U"),
        (lambda arrays, facts: arrays["beta"].__setitem__(0, math.nan), "Expected beta"),
        (lambda arrays, facts: arrays.update(U=arrays["U"][:, :1]), "shape"),
        (lambda arrays, facts: facts.update(noise_variance=2 * facts["noise_variance"]), "noise_variance"),
        (lambda arrays, facts: facts.update(target_offset=facts["target_offset"] + 1), "target_offset"),
        (lambda arrays, facts: facts["feature_names"].reverse(), "feature_names"),
        (lambda arrays, facts: facts.update(ledger_head="0" * 64), "head"),
        (lambda arrays, facts: facts.update(not_private=["no reason"]), "not_private"),
        (lambda arrays, facts: facts.update(sparsity=True), "Expected sparsity=1"),
        (lambda arrays, facts: facts.update(accuracy=0.99), "the fact 'accuracy'"),
        (lambda arrays, facts: arrays.update(w=np.zeros(3)), "the tensor 'w'"),
        (lambda arrays, facts: arrays.update(U=arrays["U"].astype(np.float32)), "64-bit floats"),
        (lambda arrays, facts: facts.update(b_variance=str(facts["b_variance"])), "b_variance as a number"),
    ],
)
def test_a_changed_model_is_seen(umbel: Command, copied: Path, change: Any, words: str) -> None:
    """A parameter or a fact of the model file that does not follow from the ledger fails the audit, and is named."""
    change_model(copied, change)
    ended = umbel("audit", copied, "--public-key", copied / "ledger.key", "--format", "json")
    found = json.loads(ended.out)
    assert (ended.code, found["status"], found["model"]["status"]) == (4, "failed", "differs")
    assert words in found["reason"]
    assert words in umbel("audit", copied).out
    assert umbel("audit", copied / "release").code == 5  # nothing there to recompute it from


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: header.replace(b'"__metadata__":{', b'"__metadata__":{"url":"example.org",'), "metadata 'url'"),
        (lambda header: header.replace(b'{\\"algorithm\\"', b'{\\"run\\": \\"x\\", \\"algorithm\\"'), "run (twice)"),
    ],
)
def test_what_else_is_in_the_header_of_the_model_is_named(
    umbel: Command, copied: Path, change: Any, words: str
) -> None:
    """Metadata beside the facts, and a fact that is there twice and that other programs read otherwise."""
    model = copied / "release/model.safetensors"
    data = model.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = change(data[8:start])
    assert header != data[8:start]
    header += b" " * (-len(header) % 8)
    model.write_bytes(len(header).to_bytes(8, "little") + header + data[start:])
    ended = umbel("audit", copied, "--format", "json")
    assert (ended.code, json.loads(ended.out)["model"]["status"]) == (4, "differs")
    assert words in json.loads(ended.out)["reason"]


def test_another_configuration_is_seen(umbel: Command, copied: Path) -> None:
    """config.toml must be the one whose digest the START line has."""
    config = copied / "config.toml"
    config.write_bytes(config.read_bytes() + b"\n")
    ended = umbel("audit", copied)
    assert ended.code == 4
    assert "config.toml" in ended.out


@pytest.mark.parametrize(
    ("arrays", "facts"),
    [({}, {"run": "r", "b_variance": 1.0, "noise_variance": 1.0}), ({"beta": [0.0], "U": [[0.0]]}, {})],
)
def test_another_file_instead_of_the_model_cannot_be_read(
    umbel: Command, copied: Path, arrays: dict[str, Any], facts: dict[str, Any]
) -> None:
    """An exit code and one line, and no traceback."""
    model = copied / "release/model.safetensors"
    run = unpack(model)[1]["run"]
    given = {name: np.array(value) for name, value in arrays.items()}
    model.write_bytes(pack(given, facts | {"run": run}))
    ended = umbel("audit", copied)
    assert ended.code == 2
    assert "Expected a released model" in ended.err


def test_another_schema_is_seen(umbel: Command, copied: Path) -> None:
    """A schema that was changed together with the model that follows from it fails, by the digest in the START line."""
    path = copied / "schema.safetensors"
    schema = load_schema(path)
    low, high = schema.target_range
    changed = dataclasses.replace(
        schema, target_range=(2 * low, 2 * high), feature_names=tuple(reversed(schema.feature_names))
    )
    save_schema(path, changed)
    target = find_target(copied)
    releases, run = target.releases, target.run
    assert releases is not None
    assert run is not None
    *_, model = models_of(load_config(copied / "config.toml"), run, releases, verify(target.ledger), changed)

    def follow(arrays: dict[str, Any], facts: dict[str, Any]) -> None:
        arrays.update(beta=model.beta, U=model.U)
        facts.update(b_variance=model.b_variance, noise_variance=model.noise_variance)
        facts.update(feature_names=list(changed.feature_names))

    change_model(copied, follow)
    ended = umbel("audit", copied)
    assert ended.code == 4
    assert "schema.safetensors" in ended.out


def test_a_run_whose_schema_nothing_signs_is_not_recomputed(finished: Path) -> None:
    """As of ledgers from before START lines had its digest."""
    target = find_target(finished)
    found = verify(target.ledger)
    (run,) = found.runs
    older = {name: value for name, value in found.runs[run]["schedule"].items() if name != "schema"}
    check = check_model(target, dataclasses.replace(found, runs={run: {**found.runs[run], "schedule": older}}))
    assert (check.status, "schema.safetensors" in check.reason) == ("not recomputed", True)


@pytest.mark.parametrize("name", ["config.toml", "schema.safetensors"])
def test_taking_away_what_it_takes_does_not_hide_a_swapped_model(umbel: Command, copied: Path, name: str) -> None:
    """A run folder without a file whose digest is in START fails and names it; so it does from a notebook."""
    change_model(copied, lambda arrays, facts: arrays["U"].__setitem__((0, 0), 1.0))
    (copied / name).unlink()
    ended = umbel("audit", copied, "--public-key", copied / "ledger.key")
    assert ended.code == 4
    assert f"{name}, whose digest is in the START line" in ended.out
    assert audit(copied)["exit_code"] == 4
    assert audit_together([copied, copied / "release"])["exit_code"] == 4
    (copied / "release/model.safetensors").unlink()  # nothing says whose folder it is without config.toml
    assert umbel("audit", copied).code == 4


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ("release", "a release folder alone"),
        ("ledger.jsonl", "a ledger alone"),
        ("", "there is no release/model.safetensors"),
    ],
)
def test_where_the_model_must_be_recomputed_nothing_else_will_do(
    umbel: Command, copied: Path, named: str, words: str
) -> None:
    """--require-model fails what is fine without it, and says what is lacking; with a model nothing changes."""
    assert umbel("audit", copied, "--require-model").code == 5
    if not named:
        (copied / "release/model.safetensors").unlink()
    assert umbel("audit", copied / named).code == 5
    ended = umbel("audit", copied / named, "--require-model", "--format", "json")
    found = json.loads(ended.out)
    assert (ended.code, found["status"]) == (4, "failed")
    assert words in found["reason"]
    assert "--require-model" in found["reason"]
    assert umbel("audit", copied, copied / named, "--require-model").code == 4


def test_a_configuration_that_cannot_be_read_is_named(umbel: Command, copied: Path) -> None:
    """One line and exit code 2: it is neither right nor wrong."""
    (copied / "schema.safetensors").unlink()
    (copied / "schema.safetensors").mkdir()
    fails_in_one_line(umbel("audit", copied), 2, "schema.safetensors", "Is a directory")


def test_a_missing_release_names_its_round_and_file(umbel: Command, copied: Path) -> None:
    """A committed release that is gone fails with its round and its file, and nothing is recomputed."""
    release = min((copied / "release/rounds").iterdir())
    data = release.read_bytes()
    release.write_bytes(data + b" ")
    assert f"{release} has other bytes" in umbel("audit", copied).out
    release.unlink()
    ended = umbel("audit", copied, "--format", "json")
    found = json.loads(ended.out)
    assert (ended.code, found["exit_code"]) == (4, 4)
    assert "round 1" in found["reason"]
    assert f"{release} is missing" in found["reason"]
    release.mkdir()
    fails_in_one_line(umbel("audit", copied), 2, str(release), "Is a directory")
    release.rmdir()
    release.write_bytes(data)
    fails_in_one_line(umbel("audit", copied, "--anchor", "9" * 5000 + ":" + "0" * 64), 2, "5065 letters")
    assert umbel("audit", copied, "--anchor", "9:" + "0" * 64).code == 4
    release.unlink()
    assert found["model"]["status"] == "not recomputed"


# --- the attack ------------------------------------------------------------------------------------------------------


def result_of(*, alarm: bool) -> dict[str, Any]:
    bounds = [
        {"name": "one-run", "epsilon": 0.2, "confidence": 0.95, "assumes": "independent coins"},
        {"name": "gaussian", "epsilon": 7.5 if alarm else 0.4, "confidence": 0.95, "assumes": "Gaussian scores"},
    ]
    return {
        "canaries": 50,
        "threat": "last",
        "noise_multiplier": "20",
        "rounds": 2,
        "claimed": {"epsilon": 1.0, "delta": 1e-6},
        "confidence": 0.95,
        "bounds": bounds,
        "tpr_at_fpr": {"fpr": 0.01, "tpr": 0.05, "low": 0.01, "high": 0.2},
        "auroc": {"value": 0.55, "low": 0.4, "high": 0.7},
        "alarm": alarm,
        "seconds": 0.1,
    }


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What the attack was asked; it answers with the result that is put first."""
    calls: list[dict[str, Any]] = [result_of(alarm=False)]

    def attack(run_root: Path, **settings: Any) -> dict[str, Any]:
        calls.append({"run_root": run_root, **settings})
        return calls[0]

    stub = ModuleType("umbel.empirical")
    stub.attack_run = attack  # type: ignore[attr-defined]
    stub.write_result = write_result  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "umbel.empirical", stub)
    return calls


def test_the_attack_is_shown_with_its_assumptions(umbel: Command, copied: Path, asked: list[dict[str, Any]]) -> None:
    """Options reach the attack, its bounds are a table, and without an alarm the verdict is that of the ledger."""
    ended = umbel("audit", copied, "--empirical", "--canaries", 50, "--threat", "last")
    assert ended.code == 5
    assert asked[1:] == [{"run_root": copied, "canaries": 50, "threat": "last", "seed": None}]
    assert [
        words for words in ("independent coins", "Gaussian scores", "no alarm", "AUROC") if words not in ended.out
    ] == []
    found = json.loads(umbel("audit", copied, "--empirical", "--format", "json").out)["empirical"]
    assert {name: value for name, value in found.items() if "written" not in name} == asked[0]
    assert (asked[2]["canaries"], asked[2]["threat"]) == (1000, "all")
    assert umbel("audit", copied / "release", "--empirical").code == 5
    assert asked[3]["run_root"] == copied / "release"


def contents_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_audit_changes_nothing_and_an_attack_brings_the_reports_up_to_date(umbel: Command, copied: Path) -> None:
    """The result and the pages are new, whoever reads them finds the attack, and the operator's blanks are kept."""
    (copied / "release/registry.yaml").write_text("filled in")
    before = contents_of(copied)
    assert umbel("audit", copied, "--all-signatures", "--require-model").code == 5
    assert contents_of(copied) == before
    ended = umbel("audit", copied, "--empirical", "--canaries", 40, "--format", "json")
    after = contents_of(copied)
    new = ["release/empirical.json", "release/report.html", "release/report.json", "report.html"]
    assert sorted(name for name, data in after.items() if before.get(name) != data) == new
    found = json.loads(ended.out)["empirical"]
    assert sorted(found["written"]) == [str(copied / name) for name in new]
    assert found["not_written"] == ""
    shown = json.loads(after["release/report.json"])
    assert (shown["empirical"]["canaries"], shown["foreign_empirical"], shown["empirical_remarks"]) == (40, [], [])
    assert b"What an attack could see" in after["report.html"]


def test_somebody_elses_release_gets_the_result_and_no_report(
    umbel: Command, copied: Path, asked: list[dict[str, Any]]
) -> None:
    """A copy of a release folder is not the run's own folder: it is said that its report is as it was."""
    before = contents_of(copied)
    ended = umbel("audit", copied / "release", "--empirical")
    assert ended.code == 5
    assert [line for line in ended.out.splitlines() if line.startswith("not written: no report")] != []
    after = contents_of(copied)
    assert [name for name, data in after.items() if before.get(name) != data] == ["release/empirical.json"]


@pytest.mark.parametrize("folder", ["", "release"])
def test_what_cannot_be_written_is_said_and_shown_all_the_same(
    umbel: Command, copied: Path, asked: list[dict[str, Any]], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder that is only for reading nothing is written, in one line, and the attack counts all the same."""
    before = contents_of(copied)
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK or Path(path) != copied / folder)
    ended = umbel("audit", copied, "--empirical")
    assert ended.code == 5
    (line,) = [line for line in ended.out.splitlines() if line.startswith("not written: ")]
    assert str(copied / folder) in line
    assert "AUROC" in ended.out
    assert contents_of(copied) == before


def test_a_disk_that_fails_does_not_take_the_attack_away(
    umbel: Command, copied: Path, asked: list[dict[str, Any]]
) -> None:
    """The verdict is that of the audit, also where the result could not be written."""
    (copied / "release/empirical.json").mkdir()
    ended = umbel("audit", copied, "--empirical")
    assert ended.code == 5
    assert "not written: Expected to write" in ended.out


def test_an_alarm_fails_the_audit(umbel: Command, copied: Path, asked: list[dict[str, Any]]) -> None:
    """A lower bound above the claim is exit code 4, with the bound that refutes it, the owner's key or not."""
    asked[0] = result_of(alarm=True)
    ended = umbel("audit", copied, "--empirical", "--public-key", copied / "ledger.key", "--format", "json")
    found = json.loads(ended.out)
    assert (ended.code, found["exit_code"], found["status"]) == (4, 4, "failed")
    assert "gaussian 7.5" in found["reason"]
    assert "one-run" not in found["reason"]
    assert "ALARM" in umbel("audit", copied, "--empirical").out


def test_what_is_not_verified_is_not_attacked(umbel: Command, copied: Path, asked: list[dict[str, Any]]) -> None:
    """A run whose release was changed fails without an attack."""
    release = min((copied / "release/rounds").iterdir())
    release.write_bytes(release.read_bytes() + b" ")
    assert umbel("audit", copied, "--empirical").code == 4
    assert len(asked) == 1


# --- from a notebook -------------------------------------------------------------------------------------------------


def test_the_python_entry_says_what_the_command_says(umbel: Command, finished: Path) -> None:
    """But for the model and the attack, which take more than what is published."""
    command = json.loads(umbel("audit", finished, "--delta", "1e-7", "--format", "json").out)
    here = audit(str(finished), deltas=[1e-7])
    assert here == {name: value for name, value in command.items() if name not in ("model", "empirical")}
    key = finished / "ledger.key"
    assert audit(finished, public_key=str(key))["exit_code"] == 0
    assert audit_together([finished, finished / "release"], public_key=[str(key)])["exit_code"] == 0
