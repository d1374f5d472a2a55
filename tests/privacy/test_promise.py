"""The promise: one sentence that an auditor can hold us to, and none where there is nothing to promise."""

import math

import pytest

from privacy.promise import promise, promise_of_ledger, reasons_against

LEDGER = {"population": "people", "rounds": 3, "runs": 1}


def noise(source):
    return {"noise": source}


def test_the_sentence_to_the_letter():
    """Unit, epsilon, delta and what they bound, relation, whole ledger and trust, in this order and nothing else."""
    assert promise_of_ledger(0.99999, 1e-6, **LEDGER) == (
        "Everything released about the users of “people” so far, counting the whole ledger (3 charged rounds of 1 run),"
        " is differentially private for each single user with ε = 1.000 and δ = 10⁻⁶: the probability of anything it "
        "could show is at most e^ε = 2.719 times what it would be if all contributions of that user were zeros, plus δ,"
        " and the other way round (the zero-out relation); the server that adds the noise is trusted (central trust)."
    )


def test_numbers_are_rounded_against_us():
    """Epsilon, delta and the factor are never printed smaller than they are; a huge factor is not printed at all."""
    assert "ε = 0.5001 and δ = 1.235·10⁻⁷" in promise("It", 0.50001, 1.2346e-7)
    assert "at most e^ε = 1.649 times" in promise("It", 0.5, 1e-6)
    assert "at most e^ε times" in promise("It", 25.0, 1e-6)


def test_a_user_of_several_nodes_is_said():
    """The zeros are on all of a user's nodes."""
    assert "if all contributions of that user, from up to 3 nodes, were zeros" in promise(
        "It", 1.0, 1e-6, max_nodes_per_user=3
    )


def test_nothing_is_promised_for_a_reason():
    """A single round without noise or with a seed, or a ledger without a budget, and nobody is promised anything."""
    good = noise("aes-256-ctr")
    assert reasons_against([good, good], "0.5") == ()
    for events, mu_max, reason in (
        ([good, noise("none")], "inf", "1 of 2 charged rounds had no noise"),
        ([noise("seeded (NOT PRIVATE)")], "0.5", "1 of 1 charged round drew the noise from a seed"),
        ([good], "inf", "no budget"),
        ([], "inf", "no budget"),
    ):
        (found,) = reasons_against(events, mu_max)
        assert reason in found
        said = promise_of_ledger(1.0, 1e-6, **LEDGER, reasons_against=(found,))
        assert said == f"No user of “people” is promised anything: {found}."


def test_before_the_first_release_nothing_is_claimed():
    """A ledger without charged rounds has released nothing."""
    assert promise_of_ledger(0.0, 1e-6, population="people", rounds=0, runs=0) == (
        "Nothing has been released about the users of “people” from this ledger yet."
    )


@pytest.mark.parametrize("epsilon", [None, math.inf])
def test_infinite_epsilon_is_never_a_promise(epsilon):
    """Without a reason against it, an infinite epsilon is a defect and not a sentence."""
    with pytest.raises(ValueError, match="finite epsilon"):
        promise_of_ledger(epsilon, 1e-6, **LEDGER)
