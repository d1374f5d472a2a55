"""The replay predicts before it learns, compares like with like, and its page needs nothing but itself."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import log_loss as their_log_loss
from sklearn.metrics import roc_auc_score

from benchmarks.replay import (
    METHODS,
    _groups,
    auc,
    chosen,
    fit_of_past,
    learned,
    log_loss,
    markdown,
    replayed,
    run,
    scores,
)
from benchmarks.replay_page import render
from benchmarks.replay_streams import Stream, drifting, movielens

SMALL = {"entities": 12, "features": 3, "examples": 4, "past": 4, "batches": 3}
METHOD = {method.key: method for method in METHODS}


def one_kind(family: str) -> Stream:
    """A stream with random effects only."""
    stream = drifting(0.3, **SMALL)
    y = stream.y if family == "logistic" else stream.y - 0.5 + stream.kinds[0].features[:, 1]
    return replace(stream, kinds=stream.kinds[1:], family=family, y=y)


def test_all_of_the_past_kept_is_full_retraining():
    """Squared loss, one type: incremental at 1 predicts what training on everything again does, and .5 does not."""
    stream, precisions = one_kind("squared"), (2.0,)
    first = fit_of_past(stream, precisions)
    full, kept, half = (
        replayed(stream, METHOD[key], first, precisions).predictions
        for key in ("full", "incremental-1", "incremental-0.5")
    )
    np.testing.assert_allclose(kept, full, rtol=0, atol=1e-9)
    assert np.abs(half - full).max() > 0.01


@pytest.mark.parametrize("key", METHOD)
def test_a_batch_is_predicted_before_it_is_learned_from(key):
    """Other targets in the first batch change no prediction in it, and later ones unless nothing is ever learned."""
    stream, precisions = drifting(0.3, **SMALL), (1.0, 2.0)
    first = fit_of_past(stream, precisions)
    y = stream.y.copy()
    y[stream.batch(1)] = 1 - y[stream.batch(1)]
    before = replayed(stream, METHOD[key], first, precisions).predictions
    after = replayed(replace(stream, y=y), METHOD[key], first, precisions).predictions
    size = len(stream.batch(1))
    assert np.array_equal(before[:size], after[:size])
    assert np.array_equal(before[size:], after[size:]) == (key == "never")


def test_never_updated_is_the_fit_of_the_past():
    """Its predictions are that model's scores."""
    stream, precisions = drifting(0.3, **SMALL), (1.0, 2.0)
    first = fit_of_past(stream, precisions)
    events = np.arange(stream.ends[0], stream.ends[-1])
    expected = sum(scores(kind, posterior, events) for kind, posterior in zip(stream.kinds, first, strict=True))
    np.testing.assert_allclose(replayed(stream, METHOD["never"], first, precisions).predictions, expected, atol=1e-12)


def test_last_batch_only_forgets_and_keeps_whom_it_lacks():
    """Who has no event in the last batch keeps the model of the one before."""
    stream, precisions = one_kind("logistic"), (2.0,)
    lacking = stream.kinds[0].entity != 5
    lacking[: stream.ends[0]] = True
    kept = np.flatnonzero(lacking)
    kinds = tuple(replace(kind, entity=kind.entity[kept], row=kind.row[kept]) for kind in stream.kinds)
    ends = tuple(int(np.searchsorted(kept, end)) for end in stream.ends)
    fewer = replace(stream, y=stream.y[kept], kinds=kinds, ends=ends)
    first = fit_of_past(fewer, precisions)
    asked = replace(fewer, kinds=tuple(replace(kind, entity=np.full_like(kind.entity, 5)) for kind in kinds))
    late = np.arange(ends[-2], ends[-1])
    shown = scores(asked.kinds[0], first[0], late)
    after = learned(fewer, METHOD["last"], first, 1, precisions)
    assert np.array_equal(scores(asked.kinds[0], after[0], late), shown)
    assert not np.array_equal(after[0].mean[:5], first[0].mean[:5])


def test_settings_are_chosen_inside_the_past():
    """Nothing that is replayed has any influence on them."""
    stream = drifting(0.3, **SMALL)
    y = stream.y.copy()
    y[stream.ends[0] :] = 1 - y[stream.ends[0] :]
    assert chosen(stream) == chosen(replace(stream, y=y))


def test_more_drift_needs_more_forgetting():
    """Without drift keeping all is best, with strong drift the most forgetful."""
    best = []
    for drift in (0.0, 0.6):
        stream = drifting(drift, entities=60, features=4, examples=15, past=8, batches=10)
        first = fit_of_past(stream, (1.0, 3.0))
        losses = {
            method.forgetting: log_loss(stream.replayed_y, replayed(stream, method, first, (1.0, 3.0)).predictions)
            for method in METHODS
            if method.forgetting is not None
        }
        best.append(min(losses, key=losses.__getitem__))
    assert (best[0], best[1] <= 0.8) == (1.0, True)


def test_groups_have_every_event_once():
    """Each entity is in one group, with its own events and at most a third of padding."""
    entity = np.repeat(np.arange(7), [1, 2, 3, 17, 40, 41, 100])
    np.random.default_rng(0).shuffle(entity)
    seen = []
    for who, at, used in _groups(entity):
        assert (entity[at] == who[:, None]).all()
        assert used.sum() >= 0.75 * used.size
        seen += at[used].tolist()
    assert sorted(seen) == list(range(entity.size))


def test_metrics_agree_with_scikit_learn():
    """AUC with ties, and logarithmic loss."""
    rng = np.random.default_rng(0)
    y, eta = (rng.random(200) < 0.4) * 1.0, rng.integers(-3, 4, 200) * 0.5
    assert auc(y, eta) == pytest.approx(roc_auc_score(y, eta), abs=1e-12)
    assert log_loss(y, eta) == pytest.approx(their_log_loss(y, 1 / (1 + np.exp(-eta))), abs=1e-12)


def test_movielens_in_order_of_time(tmp_path: Path):
    """Events are sorted by timestamp, a like is a rating of at least 4, users' sex and age are their features."""
    (tmp_path / "u.data").write_text("1\t2\t4\t30\n2\t1\t3\t10\n2\t2\t5\t20\n1\t1\t1\t40\n")
    (tmp_path / "u.user").write_text("1|24|M|x|1\n2|53|F|y|2\n")
    flags = "|".join(["0", "1", *["0"] * 17])
    (tmp_path / "u.item").write_text("".join(f"{i}|A (199{i})|d||u|{flags}\n" for i in (1, 2)))
    stream = movielens(tmp_path, batch=1)
    assert stream.y.tolist() == [0, 1, 1, 0]
    assert movielens(tmp_path, family="squared", batch=1).y.tolist() == [-0.5, 1.5, 0.5, -2.5]
    fixed, user, movie = stream.kinds
    assert user.entity.tolist() == [1, 1, 0, 0]
    assert movie.entity.tolist() == [0, 1, 1, 0]
    assert (movie.X(np.array([0]))[0, :2].tolist(), movie.X(np.array([0]))[0].sum()) == ([1, 1], 3)
    assert fixed.features.shape[1] == user.features.shape[1] + movie.features.shape[1] - 1
    assert stream.ends == (2, 3, 4)


def test_the_page_needs_nothing_but_itself():
    """No request, no script, drawings with identifiers of their own, every method and the chosen one."""
    document = run(drifting(0.3, **SMALL))
    page = render([document, {**document, "stream": "<other>"}])
    assert "<script" not in page
    assert "<other>" not in page
    assert not re.search(r"(?:src|href)=[\"'](?!data:|#)", page)
    assert not re.search(r"url\((?!#)", page)
    assert len(re.findall("<svg", page)) == 2 * 5
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))
    assert "#0203" not in page
    assert all(page.count(f">{method.name}") >= 2 for method in METHODS)
    assert page.count('class="ours"') == 2
    table = markdown([document])
    assert table.count("(chosen)") == 1
    assert all(method.name in table for method in METHODS)
