"""A node at work: filters hold whoever spends at the same time, and a user's failure is that user's."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import client.service
import client.shard
from client.service import _finite
from client.sources import forget
from client.store import DeviceStore
from common.config import DataConfig, SyntheticConfig
from common.model import IntArray, PersonalState, SharedModel
from privacy.participation import cost_units
from tests.asking import Asker, node, total_of
from tests.populations import draw_model

D, R = 4, 1
DATA = DataConfig(synthetic=SyntheticConfig(users=6, examples=5, dimension=D, rank=R, sparsity=1))
USERS = [f"user-{i}" for i in range(6)]
MODEL = draw_model(np.random.default_rng(0), D, R)
Z, ONCE = "4.000000", "0.300000"
"""A noise multiplier, and a limit that allows one release of it."""
COST = cost_units(Z)


@pytest.fixture(autouse=True)
def nothing_cached() -> Iterator[None]:
    forget()
    yield
    forget()


def while_computing(monkeypatch: pytest.MonkeyPatch, *events: Any) -> None:
    """Let each of `events` happen after one computation, between reading the filters and charging them."""
    real, waiting = client.service.total_contribution, list(events)

    def total_contribution(*arguments: Any, **options: Any) -> IntArray:
        total = real(*arguments, **options)
        if waiting:
            waiting.pop(0)()
        return total

    monkeypatch.setattr(client.service, "total_contribution", total_contribution)


def test_two_releases_at_once_are_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second sees the filters that the first has filled: one sum and zeros, and no refusal."""
    service, asker = node(DATA, mu_max=ONCE), Asker(MODEL, DATA, noise_multiplier=Z)
    first, second = asker.train(), asker.train()
    totals: dict[str, IntArray] = {}
    other = threading.Thread(target=lambda: totals.update(second=total_of(service, second)))

    def begin() -> None:
        other.start()
        other.join(0.2)  # in vain, unless the second does not wait for the first

    while_computing(monkeypatch, begin)
    totals["first"] = total_of(service, first)
    other.join()
    assert totals["first"].any()
    assert not totals["second"].any()


def test_what_another_process_spends_meanwhile_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whose filter filled up in between counts as zeros, the others as ever."""
    path = tmp_path / "node.sqlite"
    service, asker = node(DATA, store=str(path), mu_max=ONCE), Asker(MODEL, DATA, noise_multiplier=Z)
    mask = np.arange(6) == 2

    with DeviceStore.open(path, USERS) as elsewhere:
        while_computing(monkeypatch, lambda: elsewhere.charge("M", 0, bytes(32), USERS, mask, COST))
        total = total_of(service, asker.train())
        assert elsewhere.spent(USERS).tolist() == [COST] * 6
    service.close()
    filled = node(DATA, store=str(tmp_path / "other.sqlite"), mu_max=ONCE)
    with DeviceStore.open(tmp_path / "other.sqlite", USERS) as store:
        store.charge("M", 0, bytes(32), USERS, mask, COST)
    expected = total_of(filled, Asker(MODEL, DATA, noise_multiplier=Z).train())
    filled.close()
    assert total.any()
    assert np.array_equal(total, expected)


def test_who_is_overtaken_twice_answers_zeros_and_charges_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filter is never a reason to refuse."""
    path = tmp_path / "node.sqlite"
    service, asker = node(DATA, store=str(path), mu_max=ONCE), Asker(MODEL, DATA, noise_multiplier=Z)
    with DeviceStore.open(path, USERS) as elsewhere:

        def spend(user: int) -> None:
            elsewhere.charge("M", user, bytes([user] * 32), USERS, np.arange(6) == user, COST)

        while_computing(monkeypatch, lambda: spend(0), lambda: spend(1))
        assert not total_of(service, asker.train()).any()
        assert elsewhere.spent(USERS).tolist() == [COST] * 2 + [0] * 4
    assert total_of(service, asker.train()).any()
    service.close()


def test_a_user_who_raises_while_folding_in_keeps_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others' posteriors are kept, and the node says "done" as ever."""
    path = tmp_path / "node.sqlite"
    service, asker = node(DATA, store=str(path)), Asker(MODEL, DATA)
    population = service._shard.population
    population.y[population.offsets[3]] = 0.123456
    real = client.shard.form_of

    def form_of(design: Any, **options: Any) -> Any:
        if (design.y == 0.123456).any():
            raise MemoryError
        return real(design, **options)

    monkeypatch.setattr(client.shard, "form_of", form_of)
    asker.train()
    service.fold_in(*asker.fold_in())
    service.close()
    with DeviceStore.open(path, USERS) as store:
        assert store.load_states(USERS).found.tolist() == [True] * 3 + [False] + [True] * 2


def test_a_state_that_is_not_finite_is_the_prior():
    """A user whose numbers overflow keeps the released prior, b's variance included, and nobody else changes."""
    model = SharedModel(beta=np.array([1.0, 2.0]), U=np.ones((2, 1)), b_variance=0.25, noise_variance=1.0)
    theta = np.array([[5.0, 6.0], [np.nan, 0.0]])
    state = PersonalState(
        w=np.ones((2, 1)), support=np.zeros((2, 1), np.int64), b=np.ones((2, 1)), scale=np.full(2, 3.0),
        precision=np.tile(7 * np.eye(2), (2, 1, 1)), theta=theta,
    )  # fmt: skip
    kept = _finite(state, model)
    assert kept.theta.tolist() == [[5.0, 6.0], [1.0, 2.0]]
    assert kept.precision.tolist() == [[[7, 0], [0, 7]], [[1, 0], [0, 4]]]
    assert (kept.support[1, 0], kept.b[1, 0], kept.w[1, 0], kept.scale[1]) == (-1, 0, 0, 1)
