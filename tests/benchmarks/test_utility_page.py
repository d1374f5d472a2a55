"""The page of the utility suite says what its cells say, and needs nothing but itself."""

import copy
import re
from html.parser import HTMLParser

import pytest

from benchmarks.utility_page import markdown_table, render, summary, write_page
from benchmarks.utility_plots import STYLES
from benchmarks.utility_results import METHODS, problems_of, sweeps_of, titles_of

RANGES = ("0-9", "10-29", "30-99", "100+")


def cell(method, overall, *, data="toy", epsilon=1.0, seed=0, paired=0.01, **others):
    """One cell with a paired standard error."""
    return {
        "suite": "utility",
        "version": 1,
        "data": data,
        "family": "ratings",
        "settings": {},
        "method": method,
        "epsilon": epsilon,
        "delta": 1e-6,
        "seed": seed,
        "metric": "rmse",
        "overall": overall,
        "standard_error": 0.1,
        "by_examples": {name: None if name == "0-9" else overall for name in RANGES},
        "paired": None if method == "umbel" else {"difference": None, "standard_error": paired},
        "hyperparameters": {"rank": 4},
        "grid": [[{"rank": 4}, 1.25], [{"rank": 8}, None]],
        "noise_multiplier": "9.45",
        "rounds": 10,
        "seconds": 2.0,
        "personal_numbers": 18,
    } | others


def sweep(values=(500, 2000, 8000)):
    """Synthetic cells that differ in the number of users alone."""
    return [
        cell(
            method,
            1.0 + shift,
            data="synthetic",
            family="synthetic",
            settings={"k": 3, "n": n},
            epsilon=epsilon,
        )
        for n in values
        for epsilon in (1.0, None)
        for method, shift in (("umbel", 0.0), ("alone", 0.1))
    ]


class Text(HTMLParser):
    """Text and attributes of a page."""

    def __init__(self, page):
        super().__init__()
        self.words, self.tags, self.attributes = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def only(cells, **options):
    """The single verdict of these cells."""
    (record,) = summary(cells, **options)
    return record


def test_a_win_is_best_with_nobody_near():
    """umbel wins by the margin to the best rival."""
    record = only([cell("umbel", 1.0), cell("centaur", 1.02), cell("alone", 1.5)])
    assert (record["verdict"], record["winner"], record["rival"], record["within"]) == ("win", "umbel", "centaur", [])
    assert record["margin"] == pytest.approx(-0.02)
    assert record["standard_error"] == pytest.approx(0.01)
    assert record["seed_error"] is None


@pytest.mark.parametrize("rival", [1.009, 0.991])
def test_a_tie_is_within_one_standard_error(rival):
    """On either side of the best rival."""
    record = only([cell("umbel", 1.0), cell("centaur", rival)])
    assert record["verdict"] == "tie"
    assert {record["winner"], *record["within"]} == {"umbel", "centaur"}


@pytest.mark.parametrize(("rival", "verdict"), [(1.011, "win"), (0.989, "loss")])
def test_just_beyond_one_standard_error_is_no_tie(rival, verdict):
    """On either side."""
    assert only([cell("umbel", 1.0), cell("centaur", rival)])["verdict"] == verdict


def test_another_rival_that_is_near_makes_a_tie():
    """Though the best rival is beyond its own standard error."""
    cells = [cell("umbel", 1.0), cell("centaur", 1.02), cell("alone", 1.03, paired=0.05)]
    record = only(cells)
    assert (record["verdict"], record["rival"], record["within"]) == ("tie", "centaur", ["alone"])


def test_seeds_shrink_the_standard_error():
    """By the root of their number, and give one over seeds."""
    cells = [cell(m, e + s / 10, seed=s) for s in range(4) for m, e in (("umbel", 1.0), ("centaur", 1.008))]
    record = only(cells)
    assert record["verdict"] == "win"
    assert record["standard_error"] == pytest.approx(0.005)
    assert record["seed_error"] == pytest.approx(0.0, abs=1e-12)
    assert record["seeds"] == [0, 1, 2, 3]


def test_methods_are_compared_on_the_seeds_that_they_share():
    """An easy split that only one of them has helps nobody."""
    cells = [cell("umbel", 1.0), cell("centaur", 1.1), cell("centaur", 0.2, seed=1)]
    record = only(cells)
    assert (record["verdict"], record["seeds"]) == ("win", [0])
    assert record["margin"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    "cells",
    [
        [cell("umbel", 1.0)],
        [cell("centaur", 1.0), cell("alone", 1.1)],
        [cell("umbel", 1.0), cell("centaur", 1.1, seed=1)],
        [cell("umbel", 1.0), cell("full_covariance", 0.5)],
        [cell("umbel", None), cell("centaur", None)],
    ],
)
def test_without_a_pair_there_is_no_verdict(cells):
    """Missing umbel, missing rivals, no common seed, only a ceiling, or nothing finite."""
    assert only(cells)["verdict"] is None
    assert "–" in Text(render(cells)).text


def test_what_shares_nothing_stands_at_every_epsilon():
    """Each user alone is run once, and is a rival with and without privacy; the ceiling never is."""
    cells = [
        cell("umbel", 1.0),
        cell("umbel", 0.9, epsilon=None),
        cell("alone", 0.95, epsilon=None),
        cell("full_covariance", 0.5, epsilon=None),
    ]
    assert [(r["epsilon"], r["verdict"], r["winner"]) for r in summary(cells)] == [
        (1.0, "loss", "alone"),
        (None, "win", "umbel"),
    ]


def test_a_failed_seed_is_not_averaged_away():
    """A method that failed once is not finite, and loses."""
    cells = [cell("umbel", e, seed=s) for s, e in enumerate((0.5, None))]
    cells += [cell("centaur", 1.0, seed=s) for s in range(2)]
    assert only(cells)["verdict"] == "loss"
    assert "not finite" in markdown_table(cells, "toy")


def test_where_more_is_better_the_highest_wins():
    """Recall of .3 beats .2."""
    record = only([cell("umbel", 0.3, metric="recall@20"), cell("centaur", 0.2, metric="recall@20")])
    assert (record["verdict"], record["winner"]) == ("win", "umbel")
    assert record["margin"] == pytest.approx(-0.1)


def test_tuned_umbel_has_verdicts_of_its_own():
    """It is no rival of umbel, nor umbel of it."""
    cells = [cell("umbel", 1.0), cell("umbel_tuned", 0.9), cell("centaur", 1.05)]
    assert only(cells)["verdict"] == "win"
    assert only(cells, ours="umbel_tuned")["rival"] == "centaur"
    assert only(cells, ours="umbel_tuned")["verdict"] == "win"


def test_summary_changes_nothing():
    """Its cells stay as they were."""
    cells = [cell("umbel", 1.0), cell("centaur", 1.02)]
    before = copy.deepcopy(cells)
    summary(cells)
    assert cells == before


def test_a_markdown_table_marks_the_best_and_what_is_near():
    """Missing methods have a dash; without privacy is the last column."""
    cells = [
        cell("umbel", 1.0),
        cell("centaur", 1.005),
        cell("alone", 1.5),
        cell("umbel", 0.98, epsilon=None),
        cell("amht_lrs", 0.9, epsilon=None),
    ]
    assert markdown_table(cells, "toy") == (
        "| method | epsilon 1 | none |\n"
        "| -- | -- | -- |\n"
        "| umbel | **1.0000** | 0.9800 |\n"
        "| CENTAUR | 1.0050 ≈ | – |\n"
        "| AMHT-LRS | – | **0.9000** |\n"
        "| each user alone | 1.5000 | – |\n"
    )


def test_a_markdown_table_of_unknown_data_is_refused():
    """By its name."""
    with pytest.raises(ValueError, match="data='other'"):
        markdown_table([cell("umbel", 1.0)], "other")


def test_synthetic_data_that_differ_in_one_setting_are_a_sweep():
    """By rising value; data that differ in two settings are not in one."""
    odd = cell("umbel", 1.0, data="synthetic", family="synthetic", settings={"k": 9, "n": 77})
    problems = problems_of([*reversed(sweep()), odd])
    (found,) = sweeps_of(problems)
    assert (found.factor, found.values, found.fixed) == ("n", (500, 2000, 8000), {"k": 3})
    assert titles_of(problems)[-1] == "synthetic, k 9, n 77"


def test_seeds_are_no_settings():
    """Cells that differ in the seed of their split are of one problem."""
    assert len(problems_of([cell("umbel", 1.0, settings={"split_seed": s}, seed=s) for s in range(3)])) == 1


def everything():
    """Several data sets, with what can be missing missing."""
    cells = [
        cell(method, 1.0 + 0.01 * place + (0.02 / epsilon if epsilon else 0), epsilon=epsilon, seed=seed)
        for seed in range(3)
        for epsilon in (0.5, 2.0, None)
        for place, method in enumerate(METHODS)
        if method != "full_covariance" or epsilon is None
    ]
    hostile = "<script>alert('x')</script> & http"
    cells += [cell("umbel", 1.0, data=hostile), cell("something_new", 1.2, data=hostile)]
    nothing = dict.fromkeys(RANGES)
    cells += [cell("umbel", 4e-5, data="empty ranges", by_examples=nothing, grid=[], epsilon=None, delta=None)]
    return cells + sweep(), hostile


@pytest.fixture(scope="module")
def page():
    """The page of all of it."""
    return render(everything()[0], text="Some <b>words</b>.\n\nMore.")


def test_the_page_names_every_data_set_and_escapes_it(page):
    """And what its author says, as text."""
    _, hostile = everything()
    page = Text(page)
    assert all(name in page.text for name in ("toy", "empty ranges", "synthetic", hostile, "Some <b>words</b>."))
    assert "script" not in page.tags
    assert "something_new" in page.text
    assert {METHODS[m] for m in METHODS} <= {word.strip() for word in page.words}


def test_the_page_asks_for_nothing(page):
    """No address, no script, and no reference out of it."""
    assert not re.search(r"https?://|//[a-z]+\.|@import", page.replace("& http", ""))
    links = {value for name, value in Text(page).attributes if name in ("src", "href", "xlink:href")}
    assert all(link.startswith(("#", "data:")) for link in links)
    assert not re.search(r"url\((?!#)", page)


def test_the_drawings_have_the_colours_of_the_page(page):
    """All placeholders become variables, and every variable is defined for light, dark and paper."""
    assert not re.search(r"#010[0-9a-f]{3}\b|#0203[0-9a-f]{2}\b", page)
    for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", page)):
        assert f"{variable}:" in page
    assert all(page.count(f"--m-{number}:") == 3 for number in range(len(STYLES)))


def test_identifiers_are_unique(page):
    """Though many drawings share the page."""
    found = [value for name, value in Text(page).attributes if name == "id"]
    assert len(found) == len(set(found)) > 0


def test_equal_cells_give_equal_pages():
    """To the byte."""
    cells = sweep()
    assert render(cells) == render(copy.deepcopy(cells))


def test_the_matrix_has_each_verdict_and_margin():
    """In words, not by colour alone."""
    cells = [cell("umbel", 1.0, data=name) for name in ("a", "b", "c")]
    cells += [cell("centaur", error, data=name) for name, error in (("a", 1.05), ("b", 1.001), ("c", 0.95))]
    text = Text(render(cells)).text
    assert "umbel wins 1, ties 1 and loses 1" in text
    assert all(words in text for words in ("win −.0500", "tie −.0010", "loss +.0500"))


def test_intervals_over_seeds_are_student_s():
    """Half of the interval of three seeds is 4.303 standard errors of their mean."""
    cells = [cell("umbel", 1.0 + 0.01 * seed, seed=seed) for seed in range(3)]
    assert "± .0248" in Text(render(cells)).text  # 4.3027 * .01 / sqrt(3)
    assert "± .0" not in Text(render(cells[:1])).text


def test_what_was_chosen_is_said_with_its_grid():
    """A setting that failed is named as such."""
    text = Text(render([cell("umbel", 1.0)])).text
    assert "rank 4: 1.25; rank 8: failed" in text


def test_umbel_with_its_defaults_is_not_called_tuned():
    """What the first paragraph says of tuning follows the cells."""
    cells = [cell("umbel", 1.0, grid=[]), cell("centaur", 1.1)]
    assert "umbel runs with its defaults" in Text(render(cells)).text
    assert "umbel runs with its defaults" not in Text(render([cell("umbel", 1.0)])).text


def test_the_page_is_written_where_it_is_asked_for(tmp_path):
    """Its folder is made."""
    path = tmp_path / "new" / "utility.html"
    write_page([cell("umbel", 1.0), cell("alone", 1.1)], path)
    assert path.read_text("utf-8").startswith("<!doctype html>")


def test_a_page_without_cells_is_a_page():
    """A suite that has not begun."""
    assert "0 cells" in Text(render([])).text
