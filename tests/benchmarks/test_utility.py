"""The suite in miniature: the real command on a tiny population, gone on with, torn and paired."""

import json
import math

import numpy as np
import pytest

from benchmarks import cells, utility, utility_data
from benchmarks.rivals import RIVALS
from benchmarks.utility_data import BASE, parts_of, synthetic
from common.data import text_hashes
from umbel.plan import least_noise

TINY = ("--synthetic", "n=60", "m=8", "d=6", "r=1", "k=1", "--epsilon", "2", "none", "--seeds", "0", "--settings", "2")
KEYS = {
    *("suite", "version", "data", "family", "settings", "method", "epsilon", "delta", "seed", "metric", "overall"),
    *("standard_error", "by_examples", "hyperparameters", "grid", "noise_multiplier", "rounds", "seconds"),
    "personal_numbers",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("utility")
    assert utility.main(["--out", str(out), "--jobs", "1", *TINY]) == 0
    return out


def lines(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def test_every_method_has_its_cells(folder):
    """One cell a method and epsilon; what is not released has one, without epsilon."""
    found = sorted((cell["method"], str(cell["epsilon"])) for cell in lines(folder))
    released = [key for key, rival in RIVALS.items() if rival.is_released]
    expected = [(key, epsilon) for key in released for epsilon in ("2.0", "None")]
    assert found == sorted([*expected, ("alone", "None"), ("full_covariance", "None")])


def test_cells_say_what_readers_expect(folder):
    """The schema: keys, finite errors, groups by examples, the grid that was tried."""
    for cell in lines(folder):
        assert set(cell) == KEYS
        assert cell["settings"] == {**BASE, "n": 60, "m": 8, "d": 6, "r": 1, "k": 1}
        assert (cell["suite"], cell["version"], cell["family"], cell["metric"]) == ("utility", 1, "synthetic", "rmse")
        assert 0.3 < cell["overall"] < 10
        assert cell["standard_error"] > 0
        assert set(cell["by_examples"]) == {"0-9", "10-29", "30-99", "100+"}
        assert cell["by_examples"]["0-9"] == pytest.approx(cell["overall"])
        assert all(isinstance(settings, dict) and error > 0 for settings, error in cell["grid"])
        if cell["grid"]:
            assert min(cell["grid"], key=lambda entry: entry[1])[0] == cell["hyperparameters"]
        assert cell["personal_numbers"] == (0 if cell["method"] == "fedavg" else cell["personal_numbers"])


def test_umbel_is_not_tuned_and_rivals_are(folder):
    """Only umbel's own defaults have no grid."""
    assert {cell["method"] for cell in lines(folder) if not cell["grid"]} == {"umbel"}


def test_private_cells_used_the_noise_of_their_budget(folder):
    """z is the accountant's for the cell's epsilon and rounds; without epsilon there is none."""
    for cell in lines(folder):
        if cell["epsilon"] is None:
            assert cell["noise_multiplier"] == "0"
        else:
            assert float(cell["noise_multiplier"]) > 0.5
            assert cell["noise_multiplier"] == least_noise(cell["epsilon"], cell["delta"], cell["rounds"], 1)


def results(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_differences_are_paired_with_umbel(folder):
    """Method minus umbel at the same epsilon and seed; umbel has none from itself."""
    by_key = {(cell["method"], cell["epsilon"]): cell for cell in results(folder)}
    for (method, epsilon), cell in by_key.items():
        if method == "umbel":
            assert cell["paired"] is None
            continue
        difference = cell["overall"] - by_key["umbel", epsilon]["overall"]
        assert cell["paired"]["difference"] == pytest.approx(difference, abs=1e-9)
        assert cell["paired"]["standard_error"] > 0


def test_a_second_call_computes_nothing(folder, monkeypatch):
    """All cells are there: the file stays as it is, and the page is written again."""
    before = (folder / "cells.jsonl").read_bytes()
    (folder / "results.html").unlink()
    monkeypatch.setattr(cells.Group, "cell", None)
    assert utility.main(["--out", str(folder), "--jobs", "1", *TINY]) == 0
    assert (folder / "cells.jsonl").read_bytes() == before
    assert "<html" in (folder / "results.html").read_text()


def test_a_torn_line_is_computed_again(folder, monkeypatch, tmp_path):
    """What a crash left of a last line is cut off; only that cell is run, with the settings the others chose."""
    whole = (folder / "cells.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cells.jsonl").write_bytes(b"".join(whole[:-1]) + whole[-1][:40])
    run = []
    real = cells.Group.cell
    monkeypatch.setattr(cells.Group, "cell", lambda self, seed, *rest: run.append(self) or real(self, seed, *rest))
    assert utility.main(["--out", str(tmp_path), "--jobs", "1", *TINY]) == 0
    lost = json.loads(whole[-1])
    assert [(group.method, group.epsilon) for group in run] == [(lost["method"], lost["epsilon"])]
    assert len(lines(tmp_path)) == len(whole)


def test_another_seed_uses_what_the_first_has_chosen(folder, monkeypatch, tmp_path):
    """A seed that is added later is not tuned for again."""
    (tmp_path / "cells.jsonl").write_bytes((folder / "cells.jsonl").read_bytes())
    monkeypatch.setattr(cells.Group, "choose", None)
    options = [*TINY[: TINY.index("--seeds")], "--seeds", "0", "1", "--settings", "2", "--methods", "fedrep"]
    assert utility.main(["--out", str(tmp_path), "--jobs", "1", *options]) == 0
    mine = [cell for cell in lines(tmp_path) if (cell["method"], cell["epsilon"]) == ("fedrep", 2.0)]
    assert [cell["seed"] for cell in mine] == [0, 1]
    assert mine[0]["hyperparameters"] == mine[1]["hyperparameters"]
    assert mine[0]["grid"] == mine[1]["grid"]


def test_a_failure_is_said_and_the_others_go_on(tmp_path, monkeypatch, capsys):
    """The exit code is 1, the failing method is named, and the rest is computed."""
    real = cells.Group.cell

    def failing(self, *rest):
        if self.method == "alone":
            raise ZeroDivisionError("by zero")
        return real(self, *rest)

    monkeypatch.setattr(cells.Group, "cell", failing)
    options = ["--out", str(tmp_path), "--jobs", "1", *TINY, "--methods", "alone", "fedavg"]
    assert utility.main(options) == 1
    assert "alone epsilon none: ZeroDivisionError" in " ".join(capsys.readouterr().out.split())
    assert {cell["method"] for cell in lines(tmp_path)} == {"fedavg"}


def test_two_processes_share_one_file(tmp_path):
    """Workers append whole lines, and only cells that were asked for."""
    options = ["--out", str(tmp_path), "--jobs", "2", *TINY, "--methods", "umbel", "ridge_around_global"]
    assert utility.main(options) == 0
    assert len(lines(tmp_path)) == 4
    assert [cell["method"] for cell in results(tmp_path) if cell["paired"] is None] == ["umbel"] * 2


def test_a_dry_run_computes_nothing(tmp_path, capsys):
    """It counts cells; data that are not there are left out with a line."""
    assert utility.main(["--out", str(tmp_path), "--shared", str(tmp_path / "nowhere"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "ml-100k is left out" in said
    # each of the eight that release: 21 cells on the base, 9 on each of 12 ends of sweeps; the other two 3 on each
    assert f"{8 * (21 + 12 * 9) + 2 * 13 * 3} cells" in said
    assert not (tmp_path / "cells.jsonl").exists()


def test_bad_options_are_refused(tmp_path, capsys):
    """An epsilon that is none, an unknown setting."""
    for options in (["--epsilon", "0"], ["--epsilon", "inf"], ["--synthetic", "q=1"]):
        with pytest.raises(SystemExit):
            utility.main(["--out", str(tmp_path), *options])
    assert "Expected" in capsys.readouterr().err


def test_synthetic_parts_have_the_sizes_asked_for():
    """m training and ten held-out examples of each user, other ones for another seed; the tuning part is a fifth."""
    settings = tuple(synthetic(n=50, m=7, d=5, r=1, k=1).settings.items())
    first, second = (parts_of("synthetic", settings, None, seed) for seed in (0, 1))
    assert set(first.train.counts.tolist()) == {7}
    assert set(first.test.counts.tolist()) == {10}
    assert not np.array_equal(first.train.y, second.train.y)
    assert set(first.train.key.tolist()).isdisjoint(first.test.key.tolist())
    tuning = first.tuning(0)
    assert tuning.train.num_examples + tuning.test.num_examples == first.train.num_examples
    assert 0.1 < tuning.test.num_examples / first.train.num_examples < 0.3


def write_movielens(shared):
    """A folder in which movie 10 is rated by everybody, 12 by every second user and 11 by every third."""
    (shared / "ml-1m-part").mkdir()
    movies = ["10::Own (1990)::Drama", "11::Rare (1991)::Drama", "12::Often (1992)::Drama", "13::Café (1993)::Comedy"]
    (shared / "ml-1m-part" / "movies.dat").write_text("\n".join(movies), "latin-1")
    often = {10: 1, 11: 3, 12: 2}
    ratings = [f"{u},{i},{1 + (u * i) % 5}" for u in range(1, 81) for i, every in often.items() if u % every == 0]
    (shared / "ml-1m-part" / "ratings.csv").write_text("\n".join(["user_id,item_id,rating", *ratings]))


def test_items_come_from_users_who_take_no_part(tmp_path, monkeypatch):
    """The most rated movies of a public tenth; the others take part where they rated one of them."""
    write_movielens(tmp_path)
    monkeypatch.setattr(utility_data, "_ITEMS", 2)
    parts = parts_of("items-100", (), tmp_path, 0)
    assert parts.schema.feature_names == ("item=0", "item=2", "intercept")  # places in the list of movies
    everybody = {str(u) for u in range(1, 81)}
    public = {u for u in everybody if text_hashes([u], kind="public users")[0] % np.uint64(10) == 0}
    assert 0 < len(public) < 30
    assert set(parts.train.users) == everybody - public
    X = parts.train.features.rows(slice(None))
    assert (X[:, -1] == 1).all()
    assert (X[:, :-1].sum(axis=1) == 1).all()
    # of an even user the ratings of 10 and 12 stay, of an odd one that of 10
    even = np.array([int(u) % 2 == 0 for u in parts.train.users])
    assert (parts.train.counts + parts.test.counts == np.where(even, 2, 1)).all()


def test_numbers_that_are_not_finite_become_null():
    """JSON has no NaN: a diverged error is null in a cell, and the worst choice."""
    assert cells._number(math.nan) is None
    assert cells._number(1.5) == 1.5
    assert cells._finite(math.nan) == cells._finite(None) == math.inf
