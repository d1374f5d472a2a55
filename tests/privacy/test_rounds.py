"""The packed rounds of a ledger say what its lines said."""

import tracemalloc

import pytest

from privacy.rounds import Round, Rounds

EVENT = {
    "clipping_norm": "1.25",
    "denominator": 3,
    "groups": [{"name": "model", "share": "1", "size": 10}],
    "noise": "aes-256-ctr",
    "noise_multiplier": "10",
}
DIGEST = "0f" * 32


def body(run, server_round, **event):
    return {"run": run, "round": server_round, "invited_users": server_round + 5, "event": {**EVENT, **event}}


def test_rounds_come_back_as_they_were():
    """Run, round, event, users and outcome of every round are those of its line, by position and by sequence."""
    rounds = Rounds()
    bodies = {
        2: body("a", 1),
        3: body("b", 7, clipping_norm="123456789012.123456789012345678"),
        6: body("a", 2, noise_multiplier="12.5"),
        9: body("a", 5, clipping_norm="inf"),
        11: body("a", 3, noise_multiplier="12.5"),
    }
    for sequence, written in bodies.items():
        rounds.reserve(sequence, written)
    rounds.commit(3, DIGEST)
    rounds.abort(6, "no_answer")
    rounds.abort(11, "late")
    outcomes = {3: {"release_digest": DIGEST}, 6: {"abort_code": "no_answer"}, 11: {"abort_code": "late"}}
    expected = [
        Round(
            run=written["run"],
            server_round=written["round"],
            sequence=sequence,
            event=written["event"],
            invited_users=written["invited_users"],
            **outcomes.get(sequence, {}),
        )
        for sequence, written in bodies.items()
    ]
    assert list(rounds) == expected
    assert rounds[1:3] == tuple(expected[1:3])
    assert rounds[-1] == expected[-1]
    assert [rounds.at_sequence(sequence) for sequence in bodies] == expected
    assert [rounds.at_sequence(sequence) for sequence in (0, 4, 12)] == [None] * 3
    assert list(rounds.events()) == [entry.event for entry in expected]
    assert [entry.sequence for entry in rounds.of_run("a")] == [2, 6, 9, 11]
    assert [entry.sequence for entry in rounds.open()] == [2, 9]
    assert [entry.sequence for entry in rounds.released()] == [3]
    assert rounds.noise_multipliers() == ["10", "10", "12.5", "10", "12.5"]
    assert (rounds.noise_multipliers("a"), rounds.noise_multipliers("c")) == (["10", "12.5", "10", "12.5"], [])
    assert [rounds.is_open(sequence) for sequence in (2, 3, 4, 6)] == [True, False, False, False]
    with pytest.raises(IndexError):
        rounds[5]


def test_rounds_reserved_in_any_order_are_known():
    """Whatever order a run's rounds come in, exactly those that came are known, and counted."""
    rounds, order = Rounds(), [4, 5, 2, 8, 6, 7, 1, 9]
    for sequence, server_round in enumerate(order):
        assert not rounds.has("a", server_round)
        rounds.reserve(sequence, body("a", server_round))
        assert {n for n in range(12) if rounds.has("a", n)} == set(order[: sequence + 1])
    assert (rounds.count("a"), rounds.count("b"), rounds.has("b", 4)) == (len(order), 0, False)


def test_a_round_takes_few_bytes():
    """Rounds whose clipping norm changes each time take less than 150 bytes each, with all their fields."""
    rounds, count = Rounds(), 4000
    tracemalloc.start()
    try:
        for sequence in range(count):
            rounds.reserve(sequence, body("a", sequence + 1, clipping_norm=f"{sequence}.123456"))
            rounds.commit(sequence, DIGEST)
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert taken / count < 150
