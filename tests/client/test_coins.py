"""Coins: their rate, exactly; one toss each; and a node whose replies do not show what they said."""

import math
import secrets
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binom

import client.coins
from client.coins import Coins, seeded
from client.sources import forget
from client.store import DeviceStore
from common.config import DataConfig, SyntheticConfig
from common.errors import Refused
from privacy.participation import cost_units
from tests.asking import Asker, node, total_of
from tests.client.test_service import while_computing
from tests.populations import draw_model

FAILURE_RATE = 1e-6
D, R = 4, 1
DATA = DataConfig(synthetic=SyntheticConfig(users=6, examples=5, dimension=D, rank=R, sparsity=1))
USERS = [f"user-{i}" for i in range(6)]
MODEL = draw_model(np.random.default_rng(0), D, R)
Z = "4.000000"
HEADS, TAILS = 0, 2**64 - 1


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    forget()
    yield
    forget()


class Scripted:
    """Coins that show what a test wants, and count their tosses."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *heads: int) -> None:
        self.heads, self.tosses = set(heads), 0
        monkeypatch.setattr(client.coins, "_from_the_system", self)

    def __call__(self, user: int) -> int:
        self.tosses += 1
        return HEADS if user in self.heads else TAILS


def asker(q: str | None = "0.5") -> Asker:
    """A server that samples with probability q."""
    return Asker(MODEL, DATA, noise_multiplier=Z, sampling_probability=q)


@pytest.mark.parametrize(
    ("q", "count", "off"), [("0.5", 60_000, 1.05), ("0.1", 400_000, 1.06), ("0.001", 2_000_000, 1.35)]
)
def test_coins_show_heads_as_often_as_they_should(q, count, off):
    """As many heads as the binomial distribution has, and never as many as with a rate 5 % (at .001: 35 %) off."""
    heads = int(Coins(count, Fraction(q)).heads(np.arange(count)).sum())

    def plausible(rate: float) -> tuple[float, float]:
        low, high = binom.ppf([FAILURE_RATE / 2, 1 - FAILURE_RATE / 2], count, rate)
        return low, high

    low, high = plausible(float(q))
    assert low <= heads <= high
    # the ranges do not meet, so that this test fails for correct coins no more often than once in a million
    assert plausible(float(q) / off)[1] < low
    assert high < plausible(float(q) * off)[0]


@pytest.mark.parametrize("q", ["0.5", "0.1", "0.999999999999999999", "0.000000000000000001"])
def test_the_rate_is_never_above_q(q):
    """Heads are the floor(q 2^64) smallest of 2^64 values: the exact decimal, and not its float."""
    below = math.floor(Fraction(q) * 2**64)
    assert 0 <= Fraction(q) - Fraction(below, 2**64) < Fraction(1, 2**64)
    for value, shown in ((below - 1, True), (below, False)):
        assert Coins(1, Fraction(q), lambda _, value=value: value).heads(np.array([0])).item() is shown


def test_bits_come_from_the_operating_system(monkeypatch):
    """64 of them for each toss, from `secrets`."""
    asked = []
    monkeypatch.setattr(secrets, "randbits", lambda bits: asked.append(bits) or 0)
    assert Coins(3, Fraction(1, 2)).heads(np.arange(3)).all()
    assert asked == [64] * 3


def test_a_coin_is_tossed_once():
    """However often and in whatever order it is looked at; one that nobody looks at is not tossed."""
    tosses = []
    coins = Coins(5, Fraction(1, 2), lambda user: tosses.append(user) or (HEADS if user % 2 else TAILS))
    assert coins.heads(np.array([3, 0])).tolist() == [True, False]
    assert coins.heads(np.array([0, 1, 3])).tolist() == [False, True, True]
    assert tosses == [3, 0, 1]


def test_seeded_coins_repeat_and_differ_by_node_sequence_and_user():
    """What repeats is fixed by the seed; what should not repeat does not."""
    draws = {seeded(seed, name, sequence)(user) for seed in (0, 1) for name in "ab" for sequence in (3, 5)
             for user in (0, 1)}  # fmt: skip
    assert len(draws) == 16
    assert seeded(0, "a", 3)(1) == seeded(0, "a", 3)(1)
    assert max(draws) < 2**64


def test_heads_contribute_what_they_would_without_sampling(monkeypatch):
    """One user at a time: the six sums are different, and add up to the sum without sampling."""
    whole = total_of(node(DATA), asker(None).train())
    parts = []
    for user in range(6):
        Scripted(monkeypatch, user)
        parts.append(total_of(node(DATA), asker().train()))
    assert np.array_equal(np.sum(parts, axis=0), whole)
    assert len({part.tobytes() for part in parts}) == 6


def test_a_reply_is_as_large_whatever_the_coins_show(monkeypatch):
    """Tails are zeros, of the same shape, in the same bytes."""
    replies = []
    for heads in ((), (2,), range(6)):
        Scripted(monkeypatch, *heads)
        replies.append(node(DATA).contribute(*asker().train()))
    assert len({len(reply) for reply in replies}) == 1
    assert len(set(replies)) == 3


def test_the_device_charges_heads_as_if_there_were_no_sampling(tmp_path, monkeypatch):
    """The whole cost of a release, to those whose coin showed heads; `forget` takes that out of the record."""
    path = tmp_path / "node.sqlite"
    Scripted(monkeypatch, 1, 4)
    service, server = node(DATA, store=str(path), mu_max="1"), asker()
    total_of(service, server.train())
    service.close()
    with DeviceStore.open(path, USERS) as store:
        assert store.spent(USERS).tolist() == [0, cost_units(Z), 0, 0, cost_units(Z), 0]
        assert np.flatnonzero(store.charged("L", server.sequence, USERS)).tolist() == [1, 4]
        store.forget("user-1")
        assert np.flatnonzero(store.charged("L", server.sequence, USERS)).tolist() == [4]


@pytest.mark.parametrize("heads", [(), (0,), (19,), range(20)], ids=str)
def test_what_is_kept_of_coins_is_of_one_size(tmp_path, monkeypatch, heads):
    """The record of whom a release was charged to has a bit for everybody."""
    Scripted(monkeypatch, *heads)
    twenty = DataConfig(synthetic=DATA.synthetic.model_copy(update={"users": 20}))
    service = node(twenty, store=str(tmp_path / "node.sqlite"))
    total_of(service, asker().train())
    ((charged,),) = service._store._connection.execute("SELECT charged FROM charges").fetchall()
    assert len(charged) == 3
    service.close()


def test_no_coin_is_tossed_a_second_time_when_the_sum_is_made_again(tmp_path, monkeypatch):
    """Another process spends meanwhile, so the sum is made anew, of the same coins."""
    path, once = tmp_path / "node.sqlite", "0.300000"
    coins = Scripted(monkeypatch, 1, 2, 4)
    service = node(DATA, store=str(path), mu_max=once)
    with DeviceStore.open(path, USERS) as elsewhere:
        cost, mask = cost_units(Z), np.arange(6) == 2
        while_computing(monkeypatch, lambda: elsewhere.charge("M", 0, bytes(32), USERS, mask, cost))
        total = total_of(service, asker().train())
        assert elsewhere.spent(USERS).tolist() == [0, cost, cost, 0, cost, 0]
    assert coins.tosses == 6
    Scripted(monkeypatch, 1, 4)
    assert np.array_equal(total, total_of(node(DATA), asker().train()))
    service.close()


def test_a_release_that_was_answered_is_tossed_for_no_more(tmp_path, monkeypatch):
    """A second delivery is refused, also by another process on the same store, and changes nothing."""
    path = str(tmp_path / "node.sqlite")
    coins = Scripted(monkeypatch, 1)
    message = asker().train()
    first, second = node(DATA, store=path), node(DATA, store=path)
    total_of(first, message)
    for service in (first, second):
        with pytest.raises(Refused, match="line"):
            service.contribute(*message)
    assert coins.tosses == 6
    with DeviceStore.open(path, USERS) as store:
        assert np.count_nonzero(store.spent(USERS)) == 1
    first.close()
    second.close()


def test_of_two_processes_that_answer_one_release_the_first_counts(tmp_path, monkeypatch):
    """Each tosses for itself, and only what was charged first leaves the node."""
    path = str(tmp_path / "node.sqlite")
    message = asker().train()
    first, second = node(DATA, store=path), node(DATA, store=path)
    Scripted(monkeypatch, 3)
    while_computing(monkeypatch, lambda: second.contribute(*message))
    with pytest.raises(Refused) as refused:
        first.contribute(*message)
    assert refused.value.code == "replayed"
    with DeviceStore.open(Path(path), USERS) as store:
        assert np.flatnonzero(store.spent(USERS)).tolist() == [3]
    first.close()
    second.close()


def test_a_seed_makes_coins_repeat_for_seeded_noise_only(monkeypatch):
    """With noise of the operating system a node's coins are its own, whatever its settings say."""
    coins = Scripted(monkeypatch)
    total_of(node(DATA, coin_seed=7), asker().train())
    assert coins.tosses == 6
    replies = [
        node(DATA, coin_seed=7).contribute(
            *Asker(MODEL, DATA, noise_multiplier=Z, sampling_probability="0.5", seeded=True).train()
        )
        for _ in range(2)
    ]
    assert replies[0] == replies[1]
    assert coins.tosses == 6
