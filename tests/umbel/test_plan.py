"""Planned noise spends the budget and no more."""

import math

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from common.config import load_config
from common.errors import UmbelError
from privacy.accounting import gdp_epsilon
from privacy.ledger import PrivacyLedger
from privacy.participation import max_contributions, mu_max_string
from umbel.plan import forecast, least_noise


@pytest.mark.parametrize("s", [1, 3])
def test_the_plan_spends_the_budget(s):
    """The last round comes to the budget and not beyond; the filter admits just the planned rounds."""
    z = least_noise(2.0, 1e-6, 20, s)
    assert 2.0 * (1 - 1e-6) < gdp_epsilon([z] * 20, 1e-6, s) <= 2.0
    assert max_contributions(mu_max_string(2.0, 1e-6, s), z) == 20
    assert float(z) == pytest.approx(s * 7.0487 * math.sqrt(2), rel=1e-3)


def test_the_curve_rises_to_the_budget():
    """A forecast's curve is increasing and ends at what the plan costs."""
    plan = forecast(epsilon=2.0, noise_multiplier=None, delta=1e-6, rounds=20)
    curve = [point["epsilon"] for point in plan["curve"]]
    assert curve == sorted(curve)
    assert curve[-1] == plan["epsilon"] <= 2.0


@pytest.mark.parametrize(
    ("epsilon", "rounds"), [(0.0, 1), (math.inf, 1), (math.nan, 1), (1.0, 0)], ids=["zero", "inf", "nan", "no rounds"]
)
def test_what_is_no_budget_is_refused(epsilon, rounds):
    """Zero, infinite or NaN budgets and counts that are none are named."""
    with pytest.raises(ValueError, match="Expected"):
        least_noise(epsilon, 1e-6, rounds, 1)


@pytest.fixture
def coarse(monkeypatch):
    """A coarser grid for the accountant of sampled rounds, which is quicker and costs a little more epsilon."""
    monkeypatch.setattr("privacy.amplification._INTERVAL", 1e-3)


@pytest.mark.usefixtures("coarse")
class TestSampling:
    """What a coin in each round would buy."""

    def test_both_curves_and_both_noises(self):
        """At the same noise sampling costs less at every round; the noise it needs keeps the budget."""
        plan = forecast(epsilon=1.0, noise_multiplier=None, delta=1e-6, rounds=20, sampling_probability="0.2")
        sampled = plan["sampling"]
        assert [point["round"] for point in sampled["curve"]][-1] == 20
        assert all(point["epsilon"] < point["epsilon_unamplified"] for point in sampled["curve"])
        assert sampled["curve"][-1]["epsilon_unamplified"] == plan["epsilon"]
        assert sampled["epsilon"] == sampled["curve"][-1]["epsilon"] < plan["epsilon"]
        assert sampled["expected_contributions"] == 4.0
        assert sampled["noise_multiplier_unamplified"] == plan["noise_multiplier"]
        assert float(sampled["noise_multiplier"]) < float(plan["noise_multiplier"])
        ratio = float(sampled["noise_multiplier"]) / 0.2 / float(plan["noise_multiplier"])
        assert sampled["relative_noise"] == pytest.approx(ratio)
        assert ratio > 1

    def test_it_says_what_must_hold(self):
        """The coin's secrecy and the fixed schedule are named."""
        plan = forecast(epsilon=None, noise_multiplier="4", delta=1e-6, rounds=5, sampling_probability="0.5")
        assert plan["sampling"]["noise_multiplier"] is None
        assert plan["sampling"]["supported"] is True
        notes = " ".join(plan["notes"])
        assert "keeps it secret" in notes
        assert "fixed before the first round" in notes

    def test_without_the_option_there_is_nothing(self):
        """A plan without a probability is as before, with null."""
        assert forecast(epsilon=1.0, noise_multiplier=None, delta=1e-6, rounds=5)["sampling"] is None

    @pytest.mark.parametrize(
        "q", ["0", "0.0", "1.5", "-.1", "nan", "1e-3", "", ".", "1.", "0,1", "0.0000000000000000001"]
    )
    def test_what_is_no_probability_is_refused(self, q):
        """Zero, more than one and what is no decimal are bad input, and the remedy names the option."""
        with pytest.raises(UmbelError, match="Write --sampling-probability as a decimal number"):
            forecast(epsilon=1.0, noise_multiplier=None, delta=1e-6, rounds=5, sampling_probability=q)

    @pytest.mark.parametrize("q", [".5", "0.5"])
    def test_a_probability_is_spelled_as_a_simulation_takes_it(self, q):
        """With or without a zero before the point, here and in a configuration, it is what the ledger says."""
        plan = forecast(epsilon=None, noise_multiplier="4", delta=1e-6, rounds=1, sampling_probability=q)
        assert plan["sampling"]["sampling_probability"] == "0.5"
        assert load_config(None, {"privacy.sampling_probability": q}).privacy.sampling_probability == "0.5"

    def test_a_ledger_with_charges_takes_no_sampled_run(self, tmp_path):
        """A plan says so; of an empty one it does not."""
        path = tmp_path / "ledger.jsonl"

        def notes() -> str:
            options = {"epsilon": None, "noise_multiplier": "40", "delta": 1e-6, "rounds": 1}
            return " ".join(forecast(**options, ledger_path=path, sampling_probability="0.5")["notes"])

        key = Ed25519PrivateKey.generate()
        with PrivacyLedger.create(
            path, population="p", epsilon=1.0, delta=1e-6, mu_max="0.2", max_nodes_per_user=1, key=key
        ) as ledger:
            assert "takes no sampled run" not in notes()
            schedule = {"rounds": 1, "noise_multiplier": "40", "sampling": {"poisson": "0.5"}}
            ledger.start("r", schedule | {"capped_mu_max": "0", "amplified_epsilon": "0.1"}, "0f" * 32)
        assert "takes no sampled run" in notes()

    def test_no_noise_is_not_amplified(self):
        """There is nothing to amplify without noise."""
        with pytest.raises(UmbelError, match="noise to amplify"):
            forecast(epsilon=None, noise_multiplier="0", delta=1e-6, rounds=5, sampling_probability="0.5")
