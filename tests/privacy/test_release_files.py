"""What stands beside a ledger is read where it is whole, and is never a reason to have no report where it is torn."""

import json
import math

import pytest

from common.errors import UmbelError
from privacy.release_files import Attendance, RoundMetrics, read_empirical, read_metrics


def test_metrics_are_read_line_by_line(tmp_path):
    """Each line gives what is in it; a torn one, one of another kind and numbers that are none give nothing."""
    path = tmp_path / "metrics.jsonl"
    lines = [
        json.dumps({"round": 1, "invited": 3, "answered": 2, "refusals": {"policy": 1}, "noise_variance": 4.0}),
        json.dumps({"round": 2, "noise_variance": 2.25}),
        json.dumps({"round": 3, "invited": 1, "answered": 1, "refusals": {}, "noise_variance": math.nan}),
        json.dumps({"round": 4, "noise_variance": -1.0}),
        json.dumps({"initialization": {}}),
        json.dumps([1]),
        '{"round": 5, "noise_var',
    ]
    path.write_text("\n".join(lines))
    assert read_metrics(path) == {
        1: RoundMetrics(attendance=Attendance(invited=3, answered=2, refusals={"policy": 1}), residual_scale=2.0),
        2: RoundMetrics(attendance=None, residual_scale=1.5),
        3: RoundMetrics(attendance=Attendance(invited=1, answered=1, refusals={}), residual_scale=None),
        4: RoundMetrics(attendance=None, residual_scale=None),
    }
    assert read_metrics(tmp_path / "none") == {}


@pytest.mark.parametrize(("bound", "alarm"), [(0.5, False), (0.500001, True)])
def test_the_alarm_follows_from_the_bounds(tmp_path, bound, alarm):
    """Whatever the file says, an alarm is a bound above the claim."""
    path = tmp_path / "empirical.json"
    found = {
        "canaries": 100,
        "threat": "last",
        "rounds": 2,
        "claimed": {"epsilon": 0.5, "delta": 1e-6},
        "confidence": 0.95,
        "bounds": [{"name": "gaussian", "epsilon": bound, "confidence": 0.98, "assumes": "much"}],
        "tpr_at_fpr": {"fpr": 0.01, "tpr": 0.1, "low": 0.0, "high": 0.2},
        "auroc": {"value": 0.5, "low": 0.4, "high": 0.6},
        "alarm": not alarm,
    }
    path.write_text(json.dumps(found))
    audit = read_empirical(path)
    assert (audit.alarm, audit.bounds[0].epsilon, audit.threat, audit.tpr.high) == (alarm, bound, "last", 0.2)
    assert (audit.run, audit.ledger_id, audit.ledger_head, audit.version) == (None, None, None, None)
    for wrong in (
        {"auroc": {"value": "0.5", "low": 0, "high": 1}},
        {"confidence": 1.0},
        {"bounds": None},
        {"claimed": {"epsilon": 0.5, "delta": 0}},
        {"run": 3},
    ):
        path.write_text(json.dumps(found | wrong))
        with pytest.raises(UmbelError, match="empirical"):
            read_empirical(path)
    assert read_empirical(tmp_path / "none") is None
