"""The metrics of a federation's files: right numbers, whatever state the files are in, and nothing about anybody."""

import json
import math
import os
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from common.errors import UmbelError
from privacy.gaussian import epsilon_of_mu
from privacy.keys import create_key
from privacy.ledger import PrivacyLedger
from privacy.lines import SEEDED_NOISE, SYSTEM_NOISE
from privacy.participation import mu_max_string
from privacy.sampling import NO_SAMPLING
from server.metrics import MAX_RUNS, STATES, FederationCollector, LedgerView, listening_address, main

ROUND = {"rounds": 5, "invited": 3, "answered": 2, "refusals": {"deadline": 1}}


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[PrivacyLedger]:
    """An open ledger with one run, no release yet."""
    (tmp_path / "runs").mkdir()
    key = create_key(tmp_path / "ledger.key")
    budget = {"epsilon": 8.0, "delta": 1e-6, "mu_max": mu_max_string(8.0, 1e-6), "max_nodes_per_user": 1}
    with PrivacyLedger.create(tmp_path / "ledger.jsonl", population="test", key=key, **budget) as opened:  # type: ignore[arg-type]
        opened.record_registry(40, 20, "0" * 64)
        opened.start("first", {}, "0" * 64)
        yield opened


def event(noise: str = SYSTEM_NOISE) -> dict[str, object]:
    return {
        "mechanism": "gaussian",
        "noise_multiplier": "4",
        "clipping_norm": "1",
        "grid_scale": 65536,
        "groups": [{"name": "model", "size": 4, "share": "1"}],
        "denominator": 40,
        "noise": noise,
        "sampling": NO_SAMPLING,
        "initialization": False,
    }


def scrape(folder: Path) -> dict[tuple[str, ...], float]:
    """Every sample by its name and its labels' values."""
    registry = CollectorRegistry()
    registry.register(FederationCollector(folder / "runs", folder / "ledger.jsonl"))
    text = generate_latest(registry).decode()
    return {
        (
            sample.name,
            *(sample.labels[name] for name in ("run", "code", "state") if name in sample.labels),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def write_run(folder: Path, name: str, rounds: int, tail: bytes = b"") -> Path:
    root = folder / "runs" / name
    (root / "release").mkdir(parents=True)
    (root / "evaluation").mkdir()
    (root / "config.toml").write_text("")
    lines = [json.dumps({"round": number, **ROUND}) for number in range(1, rounds + 1)]
    if lines or tail:
        (root / "release" / "metrics.jsonl").write_bytes("".join(f"{line}\n" for line in lines).encode() + tail)
        (root / "evaluation" / "timings.jsonl").write_text('{"round": 1, "seconds": 2.5}\n')
    return root


def test_what_a_run_says(tmp_path: Path, ledger: PrivacyLedger) -> None:
    """Round, rounds, attendance and seconds are of the last round; refusals of all of them."""
    write_run(tmp_path, "spring", 3)
    found = scrape(tmp_path)
    assert found["umbel_round", "spring"] == 3
    assert found["umbel_rounds_planned", "spring"] == 5
    assert (found["umbel_nodes_invited", "spring"], found["umbel_nodes_answered", "spring"]) == (3, 2)
    assert found["umbel_refusals_total", "spring", "deadline"] == 3
    assert found["umbel_round_seconds", "spring"] == 2.5
    assert 0 <= found["umbel_seconds_since_last_round", "spring"] < 60
    assert found["umbel_broken_metric_lines", "spring"] == 0


def test_what_a_ledger_says(tmp_path: Path, ledger: PrivacyLedger) -> None:
    """Spent is what all charged rounds cost, released or not, and left what the budget has beyond it."""
    assert scrape(tmp_path)["umbel_epsilon_spent",] == 0
    for number in (1, 2, 3):
        reserved = ledger.reserve("first", number, event(), 40)
        if number == 1:
            ledger.commit(reserved.sequence, "0" * 64)
        if number == 2:
            ledger.abort(reserved.sequence, "no_answer")
    found = scrape(tmp_path)
    expected = epsilon_of_mu(math.sqrt(3) / 4, 1e-6)
    assert found["umbel_epsilon_spent",] == pytest.approx(expected, rel=1e-9)
    assert found["umbel_epsilon_left",] == pytest.approx(8 - expected, rel=1e-9)
    assert (found["umbel_epsilon_budget",], found["umbel_delta",]) == (8, 1e-6)
    assert found["umbel_releases_charged_total",] == 3
    assert (found["umbel_releases_total",], found["umbel_releases_aborted_total",]) == (1, 1)
    assert (found["umbel_population_users",], found["umbel_ledger_valid",]) == (40, 1)


def test_a_ledger_that_promises_nothing_has_no_epsilon(tmp_path: Path, ledger: PrivacyLedger) -> None:
    """After one seeded round epsilon is not a number."""
    ledger.reserve("first", 1, event(SEEDED_NOISE), 40)
    found = scrape(tmp_path)
    assert math.isnan(found["umbel_epsilon_spent",])
    assert math.isnan(found["umbel_epsilon_left",])


def test_a_changed_ledger_is_noticed(tmp_path: Path, ledger: PrivacyLedger) -> None:
    """A line that was tampered with makes the ledger invalid, none at all as well, and a mended one is valid again."""
    path = tmp_path / "ledger.jsonl"
    view, good = LedgerView(path), path.read_bytes()
    assert view.read() is view.read()
    path.write_bytes(good.replace(b'"population":"test"', b'"population":"tess"'))
    assert scrape(tmp_path)["umbel_ledger_valid",] == 0
    path.write_bytes(good[:-20])
    assert scrape(tmp_path)["umbel_ledger_valid",] == 1
    path.unlink()
    assert scrape(tmp_path)["umbel_ledger_valid",] == 0
    assert view.read() is None
    path.write_bytes(good)
    assert view.read() is not None


@pytest.mark.parametrize(
    "tail",
    [b'{"round": 4, "inv', b"\xff\xfe\n", b"[]\n", b'{"round": "4"}\n', b'{"round": true}\n', b"NaN\n", b"[" * 10_000],
)
def test_a_torn_or_foreign_line_is_counted_and_passed_over(tmp_path: Path, ledger: PrivacyLedger, tail: bytes) -> None:
    """Whatever a crash or another program left, the rounds before it are shown."""
    write_run(tmp_path, "torn", 3, tail)
    found = scrape(tmp_path)
    assert found["umbel_round", "torn"] == 3
    assert found["umbel_broken_metric_lines", "torn"] == 1


def test_half_made_folders_are_no_trouble(tmp_path: Path, ledger: PrivacyLedger) -> None:
    """A run without rounds is prepared; what is no run folder, or holds other things, is left out."""
    write_run(tmp_path, "prepared", 0)
    (tmp_path / "runs" / "empty").mkdir()
    (tmp_path / "runs" / "file").write_text("")
    odd = write_run(tmp_path, "odd", 1)
    line = {"round": 1, "rounds": None, "invited": "3", "answered": [], "refusals": [1]}
    (odd / "release" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    (odd / "evaluation" / "timings.jsonl").write_text("torn")
    (odd / "outcome.json").write_text("[1]")
    found = scrape(tmp_path)
    assert found["umbel_run_state", "prepared", "prepared"] == 1
    assert ("umbel_round", "prepared") not in found
    assert {key[1] for key in found if key[0] == "umbel_run_state"} == {"prepared", "odd"}
    assert found["umbel_round", "odd"] == 1
    assert ("umbel_nodes_invited", "odd") not in found


def test_the_state_follows_the_outcome(tmp_path: Path, ledger: PrivacyLedger) -> None:
    """A run with an outcome has ended, well or not; an outcome of before it was resumed says nothing."""
    for name, outcome in (("well", None), ("ill", "StorageError")):
        root = write_run(tmp_path, name, 2)
        (root / "outcome.json").write_text(json.dumps({"error": outcome, "exit_code": 0}))
    resumed = write_run(tmp_path, "resumed", 2)
    (resumed / "outcome.json").write_text('{"error": "StorageError"}')
    os.utime(resumed / "outcome.json", (1, 1))
    found = scrape(tmp_path)
    states = {name: [s for s in STATES if found["umbel_run_state", name, s]] for name in ("well", "ill", "resumed")}
    assert states == {"well": ["finished"], "ill": ["failed"], "resumed": ["running"]}


def test_the_newest_runs_are_shown(tmp_path: Path, ledger: PrivacyLedger) -> None:
    """However many runs there were, the page has those that were at work last."""
    for number in range(MAX_RUNS + 3):
        root = write_run(tmp_path, f"run-{number:02d}", 1)
        os.utime(root / "release" / "metrics.jsonl", (1000 + number, 1000 + number))
    found = scrape(tmp_path)
    shown = {key[1] for key in found if key[0] == "umbel_round"}
    assert shown == {f"run-{number:02d}" for number in range(3, MAX_RUNS + 3)}


def test_labels_are_runs_codes_and_states_only(tmp_path: Path, ledger: PrivacyLedger) -> None:
    """No sample is of a user or a node, and a code that is not public is counted as "error"."""
    root = write_run(tmp_path, "spring", 0)
    line = {"round": 1, **ROUND, "refusals": {"user-17": 2, "busy": 1}, "node": "edge-1", "user": 17}
    (root / "release" / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    registry = CollectorRegistry()
    registry.register(FederationCollector(tmp_path / "runs", tmp_path / "ledger.jsonl"))
    text = generate_latest(registry).decode()
    assert "edge-1" not in text
    assert "user-17" not in text
    assert scrape(tmp_path)["umbel_refusals_total", "spring", "error"] == 2
    assert set(re.findall(r'(\w+)="', text)) == {"run", "code", "state"}


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.4", "[::]", "example.org"])  # noqa: S104 (refused)
def test_other_hosts_need_leave(host: str) -> None:
    """Nothing but loopback without --allow-any-host."""
    with pytest.raises(UmbelError, match="--allow-any-host"):
        listening_address(f"{host}:9464", allow_any_host=False)
    assert listening_address(f"{host}:9464", allow_any_host=True) == (host.strip("[]"), 9464)


def test_loopback_needs_none() -> None:
    """Loopback by number or name is fine, and what is no address is an error."""
    for host in ("127.0.0.1", "127.8.8.8", "[::1]", "localhost"):
        assert listening_address(f"{host}:0", allow_any_host=False)[1] == 0
    for text in ("9464", "127.0.0.1", "127.0.0.1:x", ":9464", "127.0.0.1:70000"):
        with pytest.raises(UmbelError, match="HOST:PORT"):
            listening_address(text, allow_any_host=False)


def test_the_program_serves_until_it_is_told_to_end(tmp_path: Path, ledger: PrivacyLedger) -> None:
    """`python -m server.metrics` says where it listens, answers a scrape, and ends with 0 on SIGTERM."""
    write_run(tmp_path, "spring", 2)
    words = ["--runs", str(tmp_path / "runs"), "--ledger", str(tmp_path / "ledger.jsonl"), "--listen", "127.0.0.1:0"]
    environment = {**os.environ, "UMBEL_LOG": "json"}
    program = [sys.executable, "-m", "server.metrics", *words]
    with subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            address = json.loads(process.stderr.readline())["address"]
            with urllib.request.urlopen(address, timeout=20) as answer:  # noqa: S310 (loopback)
                assert b'umbel_round{run="spring"} 2.0' in answer.read()
        finally:
            process.terminate()
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def test_the_program_refuses_another_host(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With an address that is not loopback it ends with 2 and says what to do."""
    words = ["--runs", str(tmp_path), "--ledger", str(tmp_path / "l"), "--listen", "0.0.0.0:0"]
    assert main(words) == 2
    assert "--allow-any-host" in capsys.readouterr().err
