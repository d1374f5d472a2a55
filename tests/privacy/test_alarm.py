"""What dp-accounting and opacus answer, pinned: an upgrade that changes an answer fails here and is looked at.

The numbers are the libraries' own (dp-accounting 0.6.0, opacus 1.6.0), asked directly. They show that an answer has
changed, not which one is right; that other accountants come close to them is tested elsewhere.
"""

import pytest
from dp_accounting import (
    GaussianDpEvent,
    NeighboringRelation,
    PoissonSampledDpEvent,
    SelfComposedDpEvent,
    get_epsilon_gaussian,
    get_sigma_gaussian,
)
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant

REPLACE_ONE = NeighboringRelation.REPLACE_ONE
PINNED = [
    (1.0, 0.01, 100, 1e-5, (0.7180367, 0.8951259, 1.2141453, 0.7281339, 1.2141452)),
    (2.0, 1.0, 5, 1e-6, (5.5508599, 12.5952467, 5.9268219, 5.5610959, 5.9268219)),
    (5.0, 0.02, 500, 1e-6, (0.3626146, 0.7398487, 0.3941048, 0.3726333, 0.3941048)),
]


def composed(z: float, q: float, rounds: int) -> SelfComposedDpEvent:
    event = GaussianDpEvent(z) if q == 1 else PoissonSampledDpEvent(q, GaussianDpEvent(z))
    return SelfComposedDpEvent(event, rounds)


def answers(z: float, q: float, rounds: int, delta: float) -> tuple[float, ...]:
    """Epsilon by each accountant."""
    from opacus.accountants import PRVAccountant, RDPAccountant  # imports torch

    event = composed(z, q, rounds)
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(z, q, rounds)]
    accountants = PLDAccountant(), PLDAccountant(REPLACE_ONE), RdpAccountant()
    theirs = [accountant.compose(event).get_epsilon(delta) for accountant in accountants]
    return (*theirs, prv.get_epsilon(delta), rdp.get_epsilon(delta))


@pytest.mark.filterwarnings("ignore")  # opacus divides by zero at q = 1
@pytest.mark.parametrize(("z", "q", "rounds", "delta", "expected"), PINNED)
def test_epsilon(z, q, rounds, delta, expected):
    """Epsilon by PLD, PLD under replace-one, RDP, opacus' PRV and opacus' RDP, to six decimals."""
    assert answers(z, q, rounds, delta) == pytest.approx(expected, abs=2e-6)


@pytest.mark.parametrize(
    ("sigma", "delta", "expected"), [(2.0, 1e-6, 2.254084650), (1.0, 1e-5, 4.377178096), (0.2, 1e-9, 41.833375081)]
)
def test_epsilon_of_one_gaussian(sigma, delta, expected):
    """dp-accounting's exact formula, to nine decimals, from noise to epsilon and back."""
    assert get_epsilon_gaussian(sigma, delta) == pytest.approx(expected, abs=2e-9)
    assert get_sigma_gaussian(expected, delta) == pytest.approx(sigma, rel=1e-8)
