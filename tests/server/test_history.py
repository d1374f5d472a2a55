"""A run goes on only where registry, configuration, ledger and folder are what they were."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.errors import StorageError, UmbelError, VerificationError
from server.registry import load_registry, registry_of
from server.settings import RunFolder
from tests.federation import Run, configuration, prepare, run_answers, run_real
from umbel.simulate import lay_out


class Killed(Exception):
    """A crash."""


@pytest.fixture
def crashed(tmp_path, monkeypatch):
    """A run of four rounds that died after its second, its third being charged."""
    config = prepare(configuration(tmp_path / "run", training__rounds=4))

    def dies(node: int, message: object) -> None:
        if "contribute" in message.metadata.message_type:
            calls.append(node)
        if len(calls) > 4:
            raise Killed

    calls: list[int] = []
    with pytest.raises(Killed):
        run_real(config, faults=dies)
    return config


def root_of(config) -> Path:
    return Path(str(config.run.out))


def test_a_crashed_run_goes_on(crashed):
    """The control of the tests below: nothing is in the way of a resume."""
    run = run_real(crashed)
    assert len(run.releases) == 3


@pytest.mark.parametrize("lines", [4, 6])
def test_an_older_ledger_is_refused(crashed, lines):
    """A checkpoint ahead of the ledger means that releases were made that this ledger did not pay for."""
    ledger = root_of(crashed) / "ledger.jsonl"
    old = ledger.read_bytes().splitlines(keepends=True)[:lines]
    ledger.write_bytes(b"".join(old))
    before = ledger.read_bytes()
    with pytest.raises(VerificationError, match="older copy"):
        run_real(crashed)
    assert ledger.read_bytes() == before


def test_an_older_ledger_is_refused_without_a_checkpoint(crashed):
    """The releases themselves tell, too."""
    ledger = root_of(crashed) / "ledger.jsonl"
    ledger.write_bytes(b"".join(ledger.read_bytes().splitlines(keepends=True)[:4]))
    shutil.rmtree(root_of(crashed) / "checkpoints")
    with pytest.raises(VerificationError, match="paid for every release"):
        run_real(crashed)


@pytest.mark.parametrize("change", [("rounds = 4", "rounds = 9"), ("sparsity = 1", "sparsity = 0")])
def test_an_edited_configuration_is_refused(crashed, change):
    """START says what was planned, and a run that goes on is that run."""
    path = RunFolder(root=root_of(crashed)).config
    assert change[0] in path.read_text()
    path.write_text(path.read_text().replace(*change))
    before = (root_of(crashed) / "ledger.jsonl").read_bytes()
    with pytest.raises(VerificationError, match="another configuration or registry"):
        run_real(crashed)
    assert (root_of(crashed) / "ledger.jsonl").read_bytes() == before


def test_an_edited_registry_is_refused(crashed):
    """Also where its nodes answer as it says."""
    folder = RunFolder(root=root_of(crashed))
    registry = load_registry(folder.registry)
    registry_of([*registry.users_of().items(), ("node-9", 3)]).save(folder.registry)
    with pytest.raises((VerificationError, UmbelError)):
        run_real(crashed)


def test_a_run_with_other_nodes_leaves_the_first_alone(tmp_path, crashed):
    """Two runs on one ledger, with the same users on other nodes: each keeps its own registry."""
    ledger = str(root_of(crashed) / "ledger.jsonl")
    other = configuration(tmp_path / "other", training__rounds=1, training__nodes=4, run__ledger=ledger)
    run_real(lay_out(other, Quiet()))
    run = run_real(crashed)
    assert all(json.loads(line)["answered"] == 2 for line in run.folder.metrics.read_text().splitlines())


class Quiet:
    """A progress that shows nothing."""

    def step(self, name: str) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Nothing."""


def test_a_population_may_grow(tmp_path, crashed):
    """Somebody who joins is a REGISTRY line in the same ledger, not a new ledger with a new budget."""
    ledger = str(root_of(crashed) / "ledger.jsonl")
    more = configuration(tmp_path / "more", data__synthetic__users=13, run__ledger=ledger)
    run = run_real(lay_out(more, Quiet()))
    assert run.ledger().registry["population_size"] == 13


def test_a_node_with_other_users_than_registered_is_left_out(tmp_path):
    """Before anything is charged: later the bound on its sum would depend on its users."""
    config = prepare(configuration(tmp_path / "run"))
    with pytest.raises(UmbelError, match="policy_users"):
        run_answers(config, lambda node, broadcast: [zeros_of(config)], users_per_node=5)
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes().count(b"RESERVE") == 0


def zeros_of(config) -> np.ndarray:
    raise AssertionError("nobody may be asked for a contribution")


def test_no_time_is_published(tmp_path):
    """How long a round takes depends on users' data: it is nowhere in the release folder."""
    run: Run = run_real(prepare(configuration(tmp_path / "run")))
    text = "".join(path.read_text("latin-1") for path in run.folder.release.rglob("*") if path.is_file())
    assert "seconds" not in text
    assert len(run.folder.timings.read_text().splitlines()) == 2


def test_what_is_published_says_that_it_is_not_private(tmp_path):
    """Model and metrics of a run without noise carry the stamp."""
    run = run_real(prepare(configuration(tmp_path / "run")))
    assert all(entry["not_private"] and entry["epsilon_spent"] is None for entry in run.metrics)
    assert b"not_private" in run.folder.model.read_bytes()


def test_refusals_for_good_end_the_run(tmp_path):
    """A round is not charged after another where every node says that the ledger is not the one it knows."""
    config = prepare(configuration(tmp_path / "run", training__rounds=50))
    stores = RunFolder(root=root_of(config)).nodes / "node.toml"
    stores.write_text(stores.read_text().replace("allow_not_private = true", "allow_not_private = false"))
    with pytest.raises(UmbelError, match="policy_not_private") as refused:
        run_real(config)
    assert not isinstance(refused.value, StorageError)
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes().count(b'"type":"RESERVE"') == 1
