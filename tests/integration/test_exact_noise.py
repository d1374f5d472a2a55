"""Runs with OpenDP's discrete Gaussians through the real apps: charged, released, audited, refused where they must."""

from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec

import numpy as np
import pytest

from common.errors import UmbelError
from privacy import discrete
from privacy.audit.verify import verify
from privacy.keys import load_key, public_key_hex
from privacy.mechanism import delta_fp, distance_of
from privacy.report import report_of
from server.settings import LedgerPlace
from tests.federation import Silent, configuration, prepare, run_real
from umbel.auditing import audit
from umbel.simulate import lay_out

NAME = "opendp (discrete Gaussian)"
needs_opendp = pytest.mark.skipif(find_spec("opendp") is None, reason="needs the package opendp: umbel[exact-noise]")


def exact(root, **changes):
    """A small run with discrete noise."""
    options = {"privacy__noise": "discrete", "privacy__seed": None, "privacy__epsilon": 2.0, "privacy__delta": 1e-6}
    return configuration(root, **(options | changes))


def without_opendp(monkeypatch):
    def no_package(_):
        raise PackageNotFoundError

    monkeypatch.setattr(discrete, "version", no_package)


@needs_opendp
def test_a_run_is_charged_like_any_other_and_verified(tmp_path):
    """Nodes answer, every event names the noise, an audit recomputes the model, and the report has its distance."""
    run = run_real(prepare(exact(tmp_path / "run")))
    with run.ledger() as ledger:
        events = ledger.events()
        key = public_key_hex(load_key(LedgerPlace(ledger=ledger.path).key))
        epsilon = ledger.epsilon_spent(1e-6)
    assert [event["noise"] for event in events] == [NAME] * 2
    assert [event["mechanism"] for event in events] == ["gaussian"] * 2
    found = audit([run.folder.root], public_keys=[key])
    assert (found["status"], found["exit_code"]) == ("verified", 0)
    assert found["model"]["status"] == "recomputed"
    assert verify(run.folder.ledger_copy).is_private
    report = report_of(run.folder.root)
    assert (report.not_private, report.spent.epsilon) == ((), pytest.approx(epsilon))
    assert report.delta_fp == pytest.approx(delta_fp(epsilon, sum(map(distance_of, events))))


@needs_opendp
def test_a_run_costs_what_it_costs_with_rounded_noise(tmp_path):
    """The plan, the noise multiplier and the limit of the devices do not depend on the source of the noise."""
    runs = [lay_out(exact(tmp_path / name, privacy__noise=name), Silent()) for name in ("rounded", "discrete")]
    assert runs[0].run.noise_multiplier == runs[1].run.noise_multiplier
    limits = [(tmp_path / name / "nodes" / "node.toml").read_text() for name in ("rounded", "discrete")]
    assert [line for line in limits[0].splitlines() if "mu_max" in line] == [
        line for line in limits[1].splitlines() if "mu_max" in line
    ]


@needs_opendp
def test_two_runs_share_no_noise(tmp_path):
    """Runs of one configuration differ in every release."""
    first, second = (run_real(prepare(exact(tmp_path / name))) for name in "ab")
    assert all(not np.array_equal(a, b) for a, b in zip(first.releases.values(), second.releases.values(), strict=True))


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch):
    """Without OpenDP a run is not laid out."""
    without_opendp(monkeypatch)
    with pytest.raises(UmbelError, match=r"privacy\.noise='discrete', found none"):
        lay_out(exact(tmp_path / "run"), Silent())
    assert not (tmp_path / "run").exists()


@needs_opendp
def test_a_run_is_not_charged_where_the_package_is_gone(tmp_path, monkeypatch):
    """A server that has lost OpenDP since the run was laid out writes no line."""
    config = prepare(exact(tmp_path / "run"))
    ledger = tmp_path / "run" / "ledger.jsonl"
    before = ledger.read_bytes()
    without_opendp(monkeypatch)
    with pytest.raises(UmbelError, match=r"privacy\.noise='discrete', found none"):
        run_real(config)
    assert ledger.read_bytes() == before


def test_a_seed_cannot_reach_this_noise(tmp_path):
    """A seeded run is refused rather than stamped: its noise would not repeat."""
    with pytest.raises(UmbelError, match=r"privacy\.noise='rounded' with privacy\.seed"):
        exact(tmp_path / "run", privacy__seed=1)


@needs_opendp
def test_noise_too_coarse_for_epsilon_is_refused(tmp_path):
    """Where the distance from a Gaussian would be felt in delta, a run is refused and told of rounded noise."""
    options = {"privacy__epsilon": 40.0, "privacy__delta": 1e-12}
    with pytest.raises(UmbelError, match=r"finite precision.*privacy\.noise='discrete'"):
        lay_out(exact(tmp_path / "run", **options), Silent())
    lay_out(exact(tmp_path / "rounded", privacy__noise="rounded", **options), Silent())
