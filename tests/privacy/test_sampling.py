"""Ledgers with a sampled run: charged as a whole, first and once; what others may spend; what an audit recomputes."""

import math
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.errors import BudgetExhausted, UmbelError
from privacy.amplification import Schedule, amplified
from privacy.audit import audit, audit_together
from privacy.audit.verify import verify
from privacy.keys import public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.participation import cost_units, max_contributions, mu_max_string
from privacy.registry_yaml import registry_document
from privacy.report import report_of_ledger
from privacy.report_page import render
from privacy.sampling import is_sampling, probability_of
from server.sampling import is_unused

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
DIGEST = "0f" * 32
DELTA = 1e-6
Q = {"poisson": "0.1"}
PLAN = Schedule(noise_multiplier="2", sampling_probability="0.1", rounds=3)
EPSILON = amplified([PLAN], DELTA, capped_mu_max="0.1").epsilon
START = {
    "rounds": 3,
    "noise_multiplier": "2",
    "sampling": Q,
    "capped_mu_max": "0.1",
    "amplified_epsilon": f"{EPSILON + 1e-9:.9f}",
}
CAPPED = "14.2"


def event(noise_multiplier="2", sampling=Q, **changes):
    return {
        "mechanism": "gaussian",
        "noise_multiplier": noise_multiplier,
        "clipping_norm": "1.250000",
        "grid_scale": 65536,
        "groups": [{"name": "model", "size": 10, "share": "1"}],
        "denominator": 3,
        "noise": "aes-256-ctr",
        "sampling": sampling,
        "initialization": False,
        **changes,
    }


def capped(z=CAPPED):
    return event(z, "none")


def create(path, epsilon=1.0, s=1):
    mu_max = mu_max_string(epsilon, DELTA, s)
    return PrivacyLedger.create(
        path, population="p", epsilon=epsilon, delta=DELTA, mu_max=mu_max, max_nodes_per_user=s, key=KEY
    )


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def ledger(path):
    """A ledger with a capped run that was started and nothing charged, and room for a sampled one."""
    with create(path) as ledger:
        ledger.record_registry(3, 1, DIGEST)
        ledger.start("capped", {}, DIGEST)
        yield ledger


def test_the_forms_of_sampling():
    """None, and a probability strictly between 0 and 1 as the ledger spells decimals; nothing else."""
    assert is_sampling("none")
    assert probability_of("none") is None
    for q in ("0.1", "0.999999999999999999", "0.000000000000000001"):
        assert is_sampling({"poisson": q})
        assert float(probability_of({"poisson": q})) == float(q)
    for q in ("0", "1", "0.0", "1.0", ".1", "0.", "1e-3", "0.0000000000000000001", "nan", "", 0.1, None, "٠.١"):
        assert not is_sampling({"poisson": q})
    for value in (None, "poisson", "0.1", {}, {"poisson": "0.1", "x": 1}, ["poisson", "0.1"]):
        assert not is_sampling(value)


def test_a_sampled_run_is_charged_at_its_start_and_only_there(ledger, path):
    """Its releases add nothing to what others may spend, and epsilon is that of the whole schedule all along."""
    ledger.start("r", START, DIGEST)
    assert ledger.epsilon_spent(DELTA) == pytest.approx(EPSILON, abs=1e-8)
    for number in (1, 2, 3):
        ledger.abort(ledger.reserve("r", number, event(), 3).sequence, "no_answer")
        assert ledger.epsilon_spent(DELTA) == pytest.approx(EPSILON, abs=1e-8)
    assert ledger.capped_units == 0
    assert ledger.spent_units == 3 * cost_units("2")
    assert ledger.mu_spent == pytest.approx(math.sqrt(3) / 2)
    again = PrivacyLedger.open(path)
    assert (again.sampled, again.capped_units, again.mu_limit) == (ledger.sampled, 0, "0.1")
    assert again.sampled_start.body["run"] == "r"
    with pytest.raises(ValueError, match="delta"):
        ledger.epsilon_spent(1e-7)


def test_runs_without_sampling_share_what_it_has_left_them(ledger):
    """mu = 0.1 holds two releases at z = 14.2, whenever they come, and no third; the rest of the schedule goes on."""
    ledger.start("r", START, DIGEST)
    ledger.reserve("capped", 1, capped(), 3)
    ledger.reserve("r", 1, event(), 3)
    assert not ledger.would_exceed(capped())
    ledger.reserve("capped", 2, capped(), 3)
    assert ledger.would_exceed(capped())
    with pytest.raises(BudgetExhausted):
        ledger.reserve("capped", 3, capped(), 3)
    ledger.reserve("r", 2, event(), 3)
    assert ledger.capped_units == 2 * cost_units(CAPPED)
    assert ledger.epsilon_spent(DELTA) == pytest.approx(EPSILON, abs=1e-8)


def test_it_comes_before_every_charge(ledger):
    """After a release nothing says what a schedule may be chosen by, also if the release came to nothing."""
    ledger.abort(ledger.reserve("capped", 1, capped(), 3).sequence, "no_answer")
    with pytest.raises(ValueError, match="first that is charged"):
        ledger.start("r", START, DIGEST)


def test_lost_lines_come_before_it_as_charges_do(path):
    """Nobody knows what they have released, so behind a RESTORE line no schedule is fixed before the first release."""
    recovery = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
    with PrivacyLedger.create(
        path, population="p", epsilon=1.0, delta=DELTA, mu_max=mu_max_string(1.0, DELTA), max_nodes_per_user=1,
        key=KEY, recovery_key=public_key_hex(recovery),
    ) as ledger:  # fmt: skip
        assert is_unused(ledger)
        ledger.restore(up_to=3, noise_multiplier="100", recovery_key=recovery)
        assert not is_unused(ledger)
        with pytest.raises(ValueError, match="first that is charged"):
            ledger.start("r", START, DIGEST)


def test_there_is_one_of_it(ledger):
    """A second one is refused, also before the first has released anything; capped runs may start."""
    ledger.start("r", START, DIGEST)
    with pytest.raises(ValueError, match="first that is charged"):
        ledger.start("r2", START, DIGEST)
    ledger.start("more", {"sampling": "none"}, DIGEST)


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": {"poisson": "1"}},
        {"sampling": "poisson"},
        {"rounds": 0},
        {"rounds": "3"},
        {"rounds": True},
        {"rounds": 1_000_001},
        {"noise_multiplier": "0"},
        {"noise_multiplier": "0.04"},
        {"noise_multiplier": 2},
        {"noise_multiplier": "nan"},
        {"capped_mu_max": "inf"},
        {"capped_mu_max": "-1"},
        {"capped_mu_max": "0.3"},
        {"amplified_epsilon": "1.000000001"},
        {"amplified_epsilon": "inf"},
        {"amplified_epsilon": "1e-3"},
        {"amplified_epsilon": 1},
    ],
    ids=str,
)
def test_a_start_line_beyond_the_budget_or_without_its_numbers_is_refused(ledger, changes):
    """Nothing is written, and the ledger goes on."""
    before = ledger.head
    for schedule in (START | changes, {k: v for k, v in START.items() if k not in changes} | {"sampling": Q}):
        if schedule != START:
            with pytest.raises(ValueError, match="Expected"):
                ledger.start("r", schedule, DIGEST)
    assert ledger.head == before
    ledger.start("r", START, DIGEST)


@pytest.mark.parametrize(
    ("run", "number", "wrong"),
    [
        ("r", 1, event(sampling="none")),
        ("r", 1, capped()),
        ("r", 1, event(sampling={"poisson": "0.2"})),
        ("r", 1, event(sampling={"poisson": "0.10"})),
        ("r", 1, event("2.0")),
        ("r", 0, event()),
        ("r", 4, event()),
        ("capped", 1, event()),
    ],
    ids=[
        "no coin",
        "no coin and much noise",
        "another q",
        "q spelled otherwise",
        "another z",
        "round 0",
        "round 4",
        "a coin of another run",
    ],
)
def test_a_release_is_what_its_start_line_says(ledger, run, number, wrong):
    """Sampling, noise and number of rounds; and no other run is sampled."""
    ledger.start("r", START, DIGEST)
    with pytest.raises((ValueError, BudgetExhausted), match="Expected"):
        ledger.reserve(run, number, wrong, 3)
    ledger.reserve("r", 1, event(), 3)


def test_a_ledger_without_budget_promises_nothing_with_sampling_either(path):
    """Its START says so, and so does an audit."""
    with create(path, epsilon=math.inf) as ledger:
        with pytest.raises(ValueError, match="within"):
            ledger.start("r", START, DIGEST)
        ledger.start("r", START | {"capped_mu_max": "inf", "amplified_epsilon": "inf"}, DIGEST)
        ledger.reserve("r", 1, event(), 3)
        assert ledger.epsilon_spent(DELTA) == math.inf
    found = audit(path)["privacy"]
    assert found["not_private"]
    assert found["epsilon"] is None


@pytest.mark.parametrize("s", [1, 2])
def test_an_audit_recomputes_epsilon(path, s):
    """PLD of the whole schedule and of the others' share, at any delta, by each accountant; s nodes have s coins."""
    expected = {
        delta: amplified([PLAN], delta, capped_mu_max="0.1", s=s, with_replace_one=True) for delta in (1e-6, 1e-5)
    }
    with create(path, epsilon=3.0, s=s) as ledger:
        ledger.start("r", START | {"amplified_epsilon": f"{expected[1e-6].epsilon + 1e-9:.9f}"}, DIGEST)
        ledger.reserve("r", 1, event(), 3)
    found = audit(path, deltas=[1e-6, 1e-5])
    assert found["status"] == "consistent, owner not verified"
    for row in found["privacy"]["at_deltas"]:
        whole = expected[row["delta"]]
        assert row["epsilon"] == row["pld_epsilon"] == whole.epsilon
        assert (row["rdp_epsilon"], row["prv_epsilon"]) == (whole.rdp_epsilon, whole.prv_upper)
        assert row["replace_one_epsilon"] == whole.replace_one_epsilon
    assert found["privacy"]["mu"] == pytest.approx(s / 2)
    assert "toss the coins" in found["privacy"]["promise"]
    together = audit_together([path, path])
    assert together["privacy"]["epsilon"] == expected[1e-6].epsilon


def test_a_cost_that_start_understates_is_found(path):
    """The lines are in order; only the accountants see it."""
    with create(path) as ledger:
        ledger.start("r", START | {"amplified_epsilon": f"{EPSILON * 0.999:.9f}"}, DIGEST)
        ledger.reserve("r", 1, event(), 3)
    assert verify(path).status == "consistent, owner not verified"
    found = audit(path)
    assert (found["status"], found["exit_code"]) == ("over budget", 3)
    assert "amplified_epsilon" in found["reason"]


def test_another_ledger_does_not_add_to_one_with_a_sampled_run(path, tmp_path):
    """Its schedule could have been chosen by what the other has shown."""
    with create(path) as ledger:
        ledger.start("r", START, DIGEST)
    with create(tmp_path / "other.jsonl") as other:
        other.start("capped", {}, DIGEST)
    with pytest.raises(UmbelError, match="one ledger where a run is sampled"):
        audit_together([path, tmp_path / "other.jsonl"])


def test_a_report_says_the_amplified_epsilon(ledger, path):
    """At each delta, and from the first round on; the rounds say how they were sampled."""
    ledger.start("r", START, DIGEST)
    ledger.reserve("r", 1, event(), 3)
    ledger.reserve("capped", 1, capped(), 3)
    report = report_of_ledger(path)
    assert report.spent.epsilon == EPSILON
    assert [point.epsilon for point in report.curve] == [EPSILON] * 2
    assert {each.delta for each in report.at_deltas} >= {1e-5, 1e-6, 1e-7, 1e-9}
    assert [(facts.sampling, facts.cap is None) for facts in report.rounds] == [
        ("Poisson, q = 0.1", True),
        ("none", False),
    ]
    # of the limit that START has left to runs without sampling, not of the one in GENESIS
    assert (report.mu_max, report.rounds[1].cap) == (0.1, max_contributions("0.1", CAPPED))
    assert report.rounds[1].cap < max_contributions(mu_max_string(1.0, DELTA), CAPPED)
    assert any("before the noise" in sentence for sentence in report.unprotected)
    page = render(report)
    assert "as coins fall" in page
    assert "no limit" not in page
    assert "toss the coins" in report.statement
    loss, accounting = (registry_document(report)["deployment"][name] for name in ("privacy_loss", "accounting"))
    assert "exact" not in loss["privacy_parameters_details"]
    assert "without amplification" not in accounting["composition"]


def test_the_published_verifier_reads_it(ledger, path, page_verifier):
    """The page's program finds what ours does, and what breaks the rules."""
    ledger.start("r", START, DIGEST)
    ledger.reserve("r", 1, event(), 3)
    ledger.reserve("capped", 1, capped(), 3)
    found = page_verifier["verify"](path, ledger.public_key)
    assert (found["spent"], found["rounds"]) == (ledger.spent_units, 2)


@pytest.fixture
def page_verifier():
    """The program of docs/ledger.md."""
    page = (Path(__file__).parents[2] / "docs" / "ledger.md").read_text()
    names: dict[str, object] = {}
    exec(page.split("```python\n")[1].split("```")[0], names)  # noqa: S102 (our own page)
    return names
