"""A report says what its ledger says, rounded against us, and its public part holds nothing else."""

import dataclasses
import json
import math
import os
import re
import stat
import subprocess
import sys
from hashlib import sha256
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from common.errors import UmbelError, VerificationError
from common.files import pack
from privacy.accounting import gdp_epsilon
from privacy.audit.verify import verify
from privacy.disclosure import EVALUATION_NOTICE
from privacy.keys import public_key_hex
from privacy.lines import ZERO_HEAD, parse_line, signed_line
from privacy.participation import mu_max_string
from privacy.report import PrivacyReport, report_of, report_of_ledger, shown_rounds
from privacy.report_page import METHODS, render, write_report, write_reports
from privacy.rounding import rounded_up
from umbel.console import show_results

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
OWNER = public_key_hex(KEY)
OTHER = public_key_hex(Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33))))
DIGEST = "0f" * 32
DELTA = 1e-6
CLAIM = rounded_up(gdp_epsilon(["10.000000"], DELTA))
HOSTILE = '<script>alert("x")</script>&\'$_{}'
RESULTS = {
    "metric": "rmse",
    "error": {"overall": 0.7654321, "by_examples": {"0-9": None, "10-29": 0.8123456}, "standard_error": 0.0234567},
    "baselines": {
        "global": {"overall": 0.9876543, "by_examples": {"0-9": None, "10-29": 1.2345678}},
        HOSTILE: {"overall": 1.1, "by_examples": {"0-9": None, "10-29": math.nan}},
    },
    "paired": {
        "global": {"difference": -0.2222222, "standard_error": 0.0333333},
        "non_private": {"difference": 0.0444444, "standard_error": 0.0555555},
        "alone": {"difference": None, "standard_error": None},
    },
    "penalties": {"alone": 3.0},
}


def event(z="10.000000", noise="aes-256-ctr", norm="1.250000"):
    return {
        "mechanism": "gaussian",
        "noise_multiplier": z,
        "clipping_norm": norm,
        "grid_scale": 65536,
        "groups": [{"name": "model", "size": 10, "share": "0.8"}, {"name": "scalars", "size": 5, "share": "0.6"}],
        "denominator": 40,
        "noise": noise,
        "sampling": "none",
        "initialization": False,
    }


def genesis(epsilon="2.0", s=1, population="people"):
    return {
        "ledger_id": "ledger",
        "population": population,
        "unit": "user",
        "neighboring_relation": "zero-out",
        "max_nodes_per_user": s,
        "epsilon": epsilon,
        "delta": "0.000001",
        "mu_max": "inf" if epsilon == "inf" else mu_max_string(float(epsilon), DELTA, s),
        "public_key": OWNER,
        "recovery_key": "",
        "format": 2,
    }


def write_lines(path, bodies):
    """A ledger without the cost of bringing each line to disk; returns its head, hex."""
    head, data = ZERO_HEAD, b""
    for sequence, (kind, body) in enumerate(bodies):
        time = f"2026-01-31T12:{sequence // 60 % 60:02d}:{sequence % 60:02d}Z"
        raw = signed_line(sequence=sequence, kind=kind, body=body, previous=head, time=time, key=KEY)
        head, data = parse_line(raw).head, data + raw + b"\n"
    path.write_bytes(data)
    return head.hex()


def lines(events, *, run="r", released=(), **about):
    """A ledger of one run that charged `events` and committed the bytes in `released`, first come first."""
    found = [
        ("GENESIS", genesis(**about)),
        ("REGISTRY", {"population_size": 40, "users_per_node": 20, "digest": DIGEST}),
        ("START", {"run": run, "schedule": {"rounds": len(events)}, "configuration_digest": DIGEST}),
    ]
    for index, each in enumerate(events):
        reserve = len(found)
        found.append(("RESERVE", {"run": run, "round": index + 1, "event": each, "invited_users": 40}))
        if index < len(released):
            found.append(("COMMIT", {"reserve": reserve, "release_digest": sha256(released[index]).hexdigest()}))
    return found


def attack(*epsilons, of=None, **other):
    """What an empirical audit writes; on the run in a folder as its ledger is, or nobody says on which."""
    names = ("clopper-pearson", "one-run", "gaussian")
    checked = None if of is None else verify(of / "release" / "ledger.jsonl")
    made_on = {} if checked is None else made_on_run(checked)
    return (
        made_on
        | {
            "canaries": 1234,
            "threat": "all",
            "rounds": 1 if checked is None else len(checked.rounds),
            "claimed": {
                "epsilon": 0.5 if checked is None else gdp_epsilon(checked.noise_multipliers, DELTA),
                "delta": DELTA,
            },
            "confidence": 0.95,
            "bounds": [
                {"name": name, "epsilon": epsilon, "confidence": 0.98, "assumes": f"what {name} assumes"}
                for name, epsilon in zip(names, epsilons, strict=True)
            ],
            "tpr_at_fpr": {"fpr": 0.01, "tpr": 0.0321, "low": 0.0123, "high": 0.0456},
            "auroc": {"value": 0.567, "low": 0.543, "high": 0.589},
            "alarm": False,
        }
        | other
    )


def made_on_run(checked):
    """What binds an attack to the one run of a ledger."""
    (run,) = checked.runs
    return {
        "umbel": "0.0.9",
        "run": run,
        "ledger_id": checked.genesis["ledger_id"],
        "ledger_head": f"{checked.sequence}:{checked.head}",
        "noise_multiplier": checked.noise_multipliers[0],
    }


def put(root, found):
    """Leave an attack in a release folder."""
    (root / "release" / "empirical.json").write_text(json.dumps(found))


def run_folder(root, events, *, run="r", names=("a", "b"), results=RESULTS, **about):
    """A run folder as a finished run leaves it, as far as a report reads it."""
    release = root / "release"
    (release / "rounds").mkdir(parents=True)
    released = [f"release {i}".encode() for i in range(len(events))]
    for index, data in enumerate(released):
        (release / "rounds" / f"{3 + 2 * index:09d}.safetensors").write_bytes(data)
    head = write_lines(release / "ledger.jsonl", lines(events, run=run, released=released, **about))
    facts = {"run": run, "ledger_head": head, "family": "squared", "sparsity": 1, "feature_names": list(names)}
    arrays = {"beta": np.zeros(2), "U": np.zeros((2, 1))}
    (release / "model.safetensors").write_bytes(pack(arrays, facts))
    metrics = [{"round": 1, "invited": 2, "answered": 1, "refusals": {"policy": 1}}, {"round": 2}]
    (release / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)) + '\n{"round": 3, "inv')
    if results is not None:
        (root / "evaluation").mkdir()
        (root / "evaluation" / "results.json").write_text(json.dumps(results))
    return root


class Tags(HTMLParser):
    """Tags, identifiers, labels and texts of a page."""

    void = frozenset({"meta", "link", "br"})

    def __init__(self, page):
        super().__init__()
        self.open, self.ids, self.tags, self.texts, self.labels = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]
        self.labels += [value for name, value in attributes if name == "aria-label"]
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(scope="module")
def private_run(tmp_path_factory):
    root = run_folder(tmp_path_factory.mktemp("run"), [event(), event("8.000000", norm="2.500000"), event()])
    write_reports(root)
    return root


def test_losses_are_those_of_an_outside_accountant(private_run):
    """Epsilon, replace-one, mu and rho of three rounds are what dp_accounting says of the same noise."""
    from dp_accounting import get_epsilon_gaussian

    report = report_of(private_run)
    mu = math.sqrt(2 / 100 + 1 / 64)
    assert report.spent.mu == pytest.approx(mu, rel=1e-9)
    assert report.spent.rho == pytest.approx(mu**2 / 2, rel=1e-9)
    assert report.spent.epsilon == pytest.approx(get_epsilon_gaussian(1 / mu, DELTA), rel=1e-6)
    assert report.spent.replace_one_epsilon == pytest.approx(get_epsilon_gaussian(1 / (2 * mu), DELTA), rel=1e-6)
    for at in report.at_deltas:
        assert at.epsilon == pytest.approx(get_epsilon_gaussian(1 / mu, at.delta), rel=1e-6)
    assert report.delta_fp == pytest.approx((1 + math.exp(report.spent.epsilon)) * 45 * 2.0**-114)
    assert report.num_rounds == 3
    assert [point.number for point in report.curve] == [1, 2, 3]
    assert report.curve[-1].epsilon == report.spent.epsilon
    assert report.curve[0].epsilon == pytest.approx(get_epsilon_gaussian(10, DELTA), rel=1e-6)


def test_accountants_stand_side_by_side_at_every_delta(private_run):
    """At each delta there are the exact epsilon, PLD equal to it, PRV and RDP above, and the page has them all."""
    from dp_accounting import ComposedDpEvent, GaussianDpEvent
    from dp_accounting.pld import PLDAccountant
    from dp_accounting.rdp import RdpAccountant

    events = ComposedDpEvent([GaussianDpEvent(z) for z in (10.0, 8.0, 10.0)])
    report = report_of(private_run)
    page = (private_run / "release" / "report.html").read_text()
    assert [at.delta for at in report.at_deltas] == [1e-5, 1e-6, 1e-7, 1e-9]
    for at in report.at_deltas:
        assert at.pld_epsilon == pytest.approx(PLDAccountant().compose(events).get_epsilon(at.delta), rel=1e-3)
        assert at.rdp_epsilon == pytest.approx(RdpAccountant().compose(events).get_epsilon(at.delta), rel=1e-6)
        assert at.epsilon <= at.prv_epsilon <= at.epsilon + 0.03
        for epsilon in (at.epsilon, at.pld_epsilon, at.prv_epsilon, at.rdp_epsilon, at.replace_one_epsilon):
            assert f">{rounded_up(epsilon)}</td>" in page
    assert report.spent.prv_epsilon == report.at_deltas[1].prv_epsilon
    for name in ("Exact", "PLD", "PRV", "RDP", "Replace-one"):
        assert page.count(f">{name}<") == 2  # over its numbers, and beside what it is


def test_the_participation_cap_is_said(tmp_path):
    """How often one user can take part is in words: the filter's mu, and what it admits of rounds like these."""
    write_lines(tmp_path / "l", lines([event(), event("8.000000")]))
    report = report_of_ledger(tmp_path / "l")
    page = render(report)
    assert report.mu_max == float(genesis()["mu_max"])
    caps = [int(report.mu_max**2 * z**2) for z in (8, 10)]
    assert f"above μ = {rounded_up(report.mu_max)}" in page
    assert f"{caps[0]} to {caps[1]} contributions" in page
    write_lines(tmp_path / "l", lines([event()], epsilon="inf"))
    assert "this ledger sets no limit" in render(report_of_ledger(tmp_path / "l"))


def test_released_error_is_drawn_over_rounds_and_epsilon(tmp_path):
    """The residual scale of the metrics is on the public page, twice; one that is never learned is not drawn."""
    root = run_folder(tmp_path, [event(), event(), event()], results=None)
    metrics = root / "release" / "metrics.jsonl"
    metrics.write_text("".join(json.dumps({"round": n, "noise_variance": 9.0 / n**2}) + "\n" for n in (1, 2, 3)))
    report = report_of(root)
    page = render(report)
    assert [facts.residual_scale for facts in report.rounds] == [3.0, 1.5, 1.0]
    assert all(facts.attendance is None for facts in report.rounds)
    assert "residual scale against rounds of the run: from 3 to 1." in Tags(page).labels
    assert "residual scale against epsilon spent: from 3 to 1." in Tags(page).labels
    assert "not an error on held-out examples" in page
    metrics.write_text("".join(json.dumps({"round": n, "noise_variance": 4.0}) + "\n" for n in (1, 2, 3)))
    assert "residual scale" not in render(report_of(root))


def test_an_attack_stands_beside_the_claim(tmp_path):
    """Bounds, what each assumes, TPR and AUROC with intervals are on the page and in the JSON; nothing is wrong."""
    root = run_folder(tmp_path, [event(z="10.000000")], results=None)
    assert report_of(root).empirical is None
    put(root, attack(0.1234, 0.0, 0.3321, of=root))
    write_reports(root)
    page = (root / "release" / "report.html").read_text()
    for text in (
        *("0.1234", "0.3321", "98 %", "1,234 made-up users", "no alarm", "all releases"),
        *("what clopper-pearson assumes", "what one-run assumes", "what gaussian assumes"),
        *("0.032 (0.012 to 0.046)", "0.567 (0.543 to 0.589)", "No alarm."),
    ):
        assert text in page
    assert any(
        label.startswith("Lower bounds on epsilon:") and f"claimed is {CLAIM}" in label for label in Tags(page).labels
    )
    assert "ALARM" not in page
    machine = json.loads((root / "release" / "report.json").read_text())
    assert [bound["epsilon"] for bound in machine["empirical"]["bounds"]] == [0.1234, 0.0, 0.3321]
    assert (machine["empirical_remarks"], machine["foreign_empirical"]) == ([], [])
    assert "Nothing signs it" in page
    assert "Read with care" not in page


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"run": "s"}, "its run is 's', here it is 'r'"),
        ({"run": None}, "its run is None, here it is 'r'"),
        ({"ledger_id": "theirs"}, "its ledger_id is 'theirs', here it is 'ledger'"),
        ({"ledger_head": "4:" + 64 * "0"}, "the ledger's head after line 4 was 0000000000000000… for it"),
        ({"ledger_head": "9:" + 64 * "0"}, "it was made at line 9 of the ledger, which ends at line 4"),
        ({"ledger_head": "x"}, "line 9223372036854775808"),
        ({"ledger_head": None}, "it does not say which run"),
        ({"rounds": 3}, "it says 3 rounds up to its line, the ledger 1"),
    ],
)
def test_an_attack_on_another_run_is_not_shown_as_this_ones(tmp_path, other, words):
    """It is named with what differs, and neither its numbers nor its alarm are on the page or in the JSON."""
    root = run_folder(tmp_path, [event()], results=None)
    put(root, attack(0.1, 9.876, 0.0, of=root, **other))
    write_reports(root)
    page = (root / "release" / "report.html").read_text()
    machine = json.loads((root / "release" / "report.json").read_text())
    assert machine["empirical"] is None
    assert words in machine["foreign_empirical"][0]
    assert escape(words, quote=False).replace("'", "&#39;") in page
    assert "9.876" not in page
    assert "ALARM" not in page
    assert "another run's" in page


def test_an_attack_on_an_earlier_state_says_so(tmp_path):
    """It counts for the rounds that it was made on, with their claim, and the page says that the run went on."""
    early, late = run_folder(tmp_path / "early", [event()]), run_folder(tmp_path / "late", [event()] * 2)
    bodies = lines([event()] * 2, released=[b"release 0", b"release 1"])
    write_lines(early / "release" / "ledger.jsonl", bodies[:5])
    put(late, attack(0.1, 0.0, 0.3, of=early))
    report = report_of(late)
    assert report.foreign_empirical == ()
    assert report.empirical_remarks == ("It was made at round 1 of 2: the run went on since.",)
    assert report.empirical.claimed_epsilon == gdp_epsilon(["10.000000"], DELTA)
    assert "It was made at round 1 of 2" in render(report)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"claimed": {"epsilon": 5.0, "delta": DELTA}}, "Its file claims ε = 5.000 for these rounds, the ledger 0."),
        ({"claimed": {"epsilon": 5.0, "delta": 1e-5}}, "It was made for δ = 10⁻⁵, the ledger's is 10⁻⁶."),
        ({"noise_multiplier": "3"}, "Its file says that z = 3, the ledger that z = 10.000000."),
    ],
)
def test_an_attack_on_another_claim_is_marked(tmp_path, other, words):
    """The ledger's claim is the one that bounds are compared with, so that a larger one hides no alarm."""
    root = run_folder(tmp_path, [event()], results=None)
    put(root, attack(0.1, 0.6, 0.0, of=root, **other))
    report = report_of(root)
    assert [words in remark for remark in report.empirical_remarks].count(True) == 1
    assert report.empirical.alarm
    delta = other.get("claimed", {"delta": DELTA})["delta"]
    assert report.empirical.claimed_epsilon == gdp_epsilon(["10.000000"], delta)
    assert escape(words, quote=False).replace("'", "&#39;") in render(report)


def test_an_alarm_is_that_of_the_ledgers_claim(tmp_path):
    """A file that claims less than the ledger raises no alarm by itself."""
    root = run_folder(tmp_path, [event()], results=None)
    put(root, attack(0.1, 0.2, 0.0, of=root, claimed={"epsilon": 0.15, "delta": DELTA}))
    assert not report_of(root).empirical.alarm


@pytest.mark.parametrize("without", [{"z": "0", "noise": "none"}])
def test_what_has_no_noise_has_no_attack(tmp_path, without):
    """Such a file is nothing that umbel makes."""
    root = run_folder(tmp_path, [event(**without)], results=None, epsilon="inf")
    put(root, attack(0.1, 0.2, 0.0, of=root, claimed={"epsilon": 0.15, "delta": DELTA}))
    assert "are not attacked" in report_of(root).foreign_empirical[0]


def test_an_alarm_comes_before_the_statement(tmp_path):
    """A bound above the claim is an alarm at the top of the page, whatever the file says of it."""
    root = run_folder(tmp_path, [event()], results=None)
    put(root, attack(0.1, 0.6, 0.0, of=root))
    report = report_of(root)
    page = render(report)
    assert report.empirical.alarm
    assert page.index("ALARM") < page.index(report.statement)
    assert re.search(r'<td class="number bad"[^>]*>0.6<', page)


@pytest.mark.parametrize("text", ["[]", "{", '{"canaries": 1}', json.dumps(attack(math.nan, 0, 0))])
def test_a_broken_attack_is_named(tmp_path, text):
    """A file that umbel did not write is refused, not shown in part."""
    root = run_folder(tmp_path, [event()])
    (root / "release" / "empirical.json").write_text(text)
    with pytest.raises(UmbelError, match=r"empirical\.json"):
        report_of(root)


def test_exact_errors_over_rounds_are_in_the_evaluation_only(private_run):
    """The curve of held-out errors is drawn on the page of the run; without finite epsilons, over rounds alone."""
    curve = [{"round": n, "epsilon": n / 10, "error": 1.5 - n / 9} for n in (0, 1, 3)]
    reference = {"overall": 0.7, "by_examples": {}}
    evaluation = {**RESULTS, "curve": curve, "baselines": {"non_private": reference}}
    page = render(report_of(private_run), evaluation)
    inside = page[page.index("evaluation-title") : page.index("How much was spent")]
    assert "held-out rmse against rounds of the run: from 1.5 to 1.167." in inside
    assert "held-out rmse against epsilon spent: from 1.5 to 1.167." in inside
    assert "0 → 1.5000, 1 → 1.3889, 3 → 1.1667" in inside
    endless = [{**point, "epsilon": 0.0 if point["round"] == 0 else None} for point in curve]
    page = render(report_of(private_run), {**evaluation, "curve": endless})
    assert "held-out rmse against rounds" in page
    assert "held-out rmse against epsilon" not in page
    assert "As training went on" not in render(report_of(private_run), RESULTS)


def test_the_statement_names_the_whole_promise(private_run):
    """One sentence has unit, epsilon, delta, relation, trust, rounds and ledger, and stands first on the page."""
    report = report_of(private_run)
    for part in (
        "each single user",
        f"ε = {rounded_up(report.spent.epsilon)}",
        "δ = 10⁻⁶",
        "zero-out",
        "central trust",
        "whole ledger (3 charged rounds of 1 run)",
    ):
        assert part in report.statement
    assert report.statement.count(". ") == 0
    page = (private_run / "release" / "report.html").read_text()
    assert page.index(report.statement) < page.index("<h2>")
    assert "NOT PRIVATE" not in page


def test_a_user_of_two_nodes_costs_twice_the_mu(tmp_path):
    """With two nodes a user, mu doubles and the statement says so."""
    write_lines(tmp_path / "l", lines([event()], s=2))
    report = report_of_ledger(tmp_path / "l")
    assert report.spent.mu == pytest.approx(2 / 10, rel=1e-9)
    assert "up to 2 nodes" in report.statement


@pytest.mark.parametrize(
    ("epsilon", "events"),
    [("inf", [event("0", "none", "inf")]), ("2.0", [event(), event(noise="seeded (NOT PRIVATE)")])],
    ids=["no noise", "seeded noise"],
)
def test_what_promises_nothing_says_so_first(tmp_path, epsilon, events):
    """A ledger with a single round without noise, or with seeded noise, is reported as NOT PRIVATE throughout."""
    report = report_of(run_folder(tmp_path, events, epsilon=epsilon))
    page = render(report)
    assert page.index("<strong>NOT PRIVATE</strong>") < page.index(escape(report.statement))
    assert report.statement.startswith("No user of “people” is promised anything: 1 of ")
    assert "NOT PRIVATE" in report.who_sees_what[0].means
    assert "for each single user" not in page


def test_infinite_losses_are_null_for_machines_and_a_sign_for_people(tmp_path):
    """Without noise epsilon is null in JSON and ∞ on the page, and there is no curve to draw."""
    write_reports(run_folder(tmp_path, [event("0", "none", "inf")], epsilon="inf"))
    machine = json.loads((tmp_path / "release" / "report.json").read_text())
    assert machine["spent"]["epsilon"] is machine["budget_epsilon"] is machine["curve"][0]["epsilon"] is None
    assert machine["spent"]["delta"] == DELTA
    page = (tmp_path / "release" / "report.html").read_text()
    assert "∞" in page
    assert "<svg" not in page


def test_a_release_folder_holds_nothing_of_the_evaluation(private_run):
    """Errors, baselines and penalties are on the page of the run and nowhere in the folder that may be published."""
    full = (private_run / "report.html").read_text()
    numbers = ("0.7654", "0.8123", "0.0235", "0.9877", "1.2346", "0.2222", "0.0333", "0.0556")
    assert EVALUATION_NOTICE in full
    assert all(number in full for number in numbers)
    for name in ("report.html", "report.json", "registry.yaml"):
        public = (private_run / "release" / name).read_text()
        assert EVALUATION_NOTICE not in public
        assert not any(text in public for text in (*numbers, "0.765", "root mean squared", "valuation: do"))


def test_without_results_there_is_no_evaluation(tmp_path):
    """A run that was not evaluated has the public page in both places."""
    page = write_reports(run_folder(tmp_path, [event()], results=None))
    assert page == tmp_path / "report.html"
    assert page.read_bytes() == (tmp_path / "release" / "report.html").read_bytes()


def test_the_evaluation_comes_first_and_is_its_owner_s(private_run):
    """Whoever ran the simulation finds the errors right after the key numbers, in a file that only they can read."""
    page, public = private_run / "report.html", private_run / "release" / "report.html"
    titles = re.findall(r"<h2[^>]*>(.*?)</h2>", page.read_text())
    assert titles == ["Evaluation: do not publish", *re.findall(r"<h2[^>]*>(.*?)</h2>", public.read_text())]
    assert stat.S_IMODE(page.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644 & ~current_umask()


def current_umask():
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def test_certain_differences_are_told_from_chance(private_run):
    """A paired difference of more than two standard errors has a direction; another could be chance."""
    text = re.sub(r"<[^>]*>", "|", (private_run / "report.html").read_text())
    assert re.search(r"one global model\|+−0.2222 ± 0.0333\|+this run is better", text)
    assert re.search(r"without privacy\|+\+0.0444 ± 0.0556\|+could be chance", text)
    worse = {**RESULTS, "paired": {"global": {"difference": 0.2, "standard_error": 0.09}}}
    assert "this run is worse" in render(report_of(private_run), worse)
    assert "Table of differences" not in render(report_of(private_run), {**RESULTS, "paired": {}})


def test_page_and_terminal_use_the_same_names(private_run, capsys):
    """What is compared has one name, on the page and in the terminal's table."""
    nothing = {"overall": 1.0, "by_examples": {}}
    evaluation = {**RESULTS, "baselines": dict.fromkeys(METHODS, nothing), "paired": {}, "penalties": {}}
    facts = {"run": "r", "report": "r", "users": 1, "users_per_second": None, "peak_memory_bytes": 0}
    show_results({**evaluation, **facts, "privacy": {"not_private": True}})
    printed = {line.strip().split("  ")[0] for line in capsys.readouterr().out.splitlines()}
    page = render(report_of(private_run), evaluation)
    rows = re.findall(r'<th scope="row">([^<{]*)</th>', page[page.index("evaluation-title") : page.index("How much")])
    assert rows == ["umbel (this run)", *METHODS.values()]
    assert set(rows) <= printed


def test_names_are_text_wherever_they_come_from(tmp_path):
    """Markup in names of population, run, columns, baselines and refusal codes is shown, not interpreted."""
    root = run_folder(tmp_path, [event()], run=HOSTILE, population=HOSTILE, names=(HOSTILE, "b"))
    (root / "release" / "metrics.jsonl").write_text(
        json.dumps({"round": 1, "invited": 2, "answered": 1, "refusals": {HOSTILE: 1}})
    )
    page = write_reports(root).read_text()
    tags = Tags(page)
    assert "script" not in tags.tags
    # population in title, head and statement, run, column, refusal code, and a baseline in plot and table
    assert "".join(tags.texts).count(HOSTILE) >= 8
    assert sum(HOSTILE in label for label in tags.labels) == 1


def test_pages_need_nothing_else(private_run):
    """No page names another resource, and a policy in it forbids loading any."""
    for page in (private_run / "report.html", private_run / "release" / "report.html"):
        text = page.read_text()
        assert re.findall(r"https?:|//|\bsrc=|@import|javascript:", text) == []
        assert set(re.findall(r'href="(.)', text)) <= {"#", "d"}
        assert re.findall(r"url\((?!#)", text) == []
        assert "default-src 'none'" in text


def test_pages_are_well_formed(private_run):
    """Every tag is closed, no identifier is used twice, and every reference has a target."""
    text = (private_run / "report.html").read_text()
    tags = Tags(text)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', text)) <= set(tags.ids)
    assert tags.tags.count("svg") == 3  # epsilon, all users, and the one group that has examples
    assert tags.tags.count("h1") == 1


def test_colours_of_plots_are_the_page_s(private_run):
    """No colour is fixed inside a drawing, so that it is readable on light and dark."""
    text = (private_run / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert not any(re.search(r"#[0-9a-f]{6}\b", drawing) for drawing in drawings)
    used = {name for drawing in drawings for name in re.findall(r"var\(--(\w+)\)", drawing)}
    assert used <= set(re.findall(r"--(\w+):", text))
    assert {"ink", "muted", "accent", "sans"} <= used


def test_equal_runs_give_equal_bytes(private_run):
    """Writing a report again changes nothing: it has no time of its own."""
    report = report_of(private_run)
    assert render(report, RESULTS) == render(report, RESULTS)
    before = (private_run / "report.html").read_bytes()
    write_reports(private_run)
    assert (private_run / "report.html").read_bytes() == before


def test_rounds_are_reported_as_charged(private_run):
    """A round has the parameters of its ledger line, and the attendance of its line of metrics, if that is whole."""
    first, second, third = report_of(private_run).rounds
    assert (first.noise_multiplier, second.noise_multiplier) == ("10.000000", "8.000000")
    assert (second.clipping_norm, second.shares) == ("2.500000", {"model": "0.8", "scalars": "0.6"})
    assert (first.coordinates, first.grid_scale, first.denominator, first.noise) == (15, 65536, 40, "aes-256-ctr")
    assert first.cap == int(100 * float(genesis()["mu_max"]) ** 2)
    assert (first.attendance.invited, first.attendance.answered, first.attendance.refusals) == (2, 1, {"policy": 1})
    assert second.attendance is third.attendance is None
    page = (private_run / "release" / "report.html").read_text()
    assert "1 of 2, policy 1" in page
    assert "65,536" in page


def test_charges_without_a_release_are_told_apart(tmp_path):
    """A round is released, aborted with its code, or charged with nothing to show; all of them cost the same."""
    bodies = [*lines([event(), event(), event()], released=[b"x"])]
    bodies.append(("ABORT", {"reserve": 5, "code": "no_answer"}))
    write_lines(tmp_path / "l", bodies)
    report = report_of_ledger(tmp_path / "l")
    outcomes = [facts.outcome for facts in report.rounds]
    assert outcomes == ["released", "charged, aborted: no_answer", "charged, nothing released"]
    assert report.spent.mu == pytest.approx(math.sqrt(3) / 10, rel=1e-9)


def test_the_verdict_is_the_verifier_s(tmp_path):
    """Verified against the owner's key, consistent without one, failed against another."""
    write_lines(tmp_path / "l", lines([event()]))
    for key, status, words in (
        (OWNER, "verified", "against the owner's key"),
        (None, "consistent, owner not verified", "owner not verified"),
        (OTHER, "failed", "THE LEDGER DOES NOT VERIFY"),
    ):
        report = report_of_ledger(tmp_path / "l", public_key=key)
        assert report.verification.status == status
        assert words in render(report)
        assert ("Nothing can be said" in report.statement) is (status == "failed")


def test_a_missing_model_hides_no_missing_release(tmp_path):
    """Where nothing says whose run a folder is, a committed release that is gone takes the statement back."""
    root = run_folder(tmp_path, [event(), event()])
    (root / "release" / "model.safetensors").unlink()
    assert report_of(root).verification.status != "failed"
    (root / "release" / "rounds" / "000000003.safetensors").unlink()
    assert "Nothing can be said" in report_of(root).statement


def test_a_changed_line_or_release_takes_the_statement_back(tmp_path):
    """One changed byte in the ledger's copy, or in a released sum, and the report states no promise."""
    root = run_folder(tmp_path, [event(), event()])
    assert report_of(root).verification.releases_found == 2
    ledger, release = root / "release" / "ledger.jsonl", root / "release" / "rounds" / "000000003.safetensors"
    good = ledger.read_bytes()
    ledger.write_bytes(good.replace(b'"invited_users":40', b'"invited_users":41', 1))
    report = report_of(root)
    assert "Nothing can be said" in report.statement
    assert report.verification.line == 5
    assert "THE LEDGER DOES NOT VERIFY" in render(report)
    ledger.write_bytes(good)
    release.write_bytes(b"other")
    assert "SHA-256" in report_of(root).verification.reason
    assert "Nothing can be said" in report_of(root).statement


def test_what_is_not_a_ledger_has_no_report(tmp_path):
    """A file that does not begin with a valid line, and a run without a release, are refused with a remedy."""
    (tmp_path / "l").write_bytes(b"nothing\n")
    with pytest.raises(VerificationError, match="nothing to report"):
        report_of_ledger(tmp_path / "l")
    with pytest.raises(UmbelError, match="Resume the run"):
        report_of(tmp_path)


def test_nothing_held_out_is_said(private_run):
    """Results without a single error are a sentence, not an empty plot and table."""
    nothing = {"overall": None, "by_examples": {"0-9": None}, "standard_error": None}
    page = render(report_of(private_run), {"metric": "rmse", "error": nothing, "baselines": {}})
    assert "No example was held out" in page
    assert Tags(page).tags.count("svg") == 1


def test_broken_results_are_named(tmp_path):
    """A results file that umbel did not write is refused, not shown in part."""
    root = run_folder(tmp_path, [event()])
    (root / "evaluation" / "results.json").write_text("[]")
    with pytest.raises(UmbelError, match=r"results\.json"):
        write_reports(root)


def test_a_ledger_without_rounds_has_spent_nothing(tmp_path):
    """A new ledger is reported with epsilon 0 and says that nothing was released."""
    write_lines(tmp_path / "l", lines([]))
    report = report_of_ledger(tmp_path / "l")
    assert report.spent.epsilon == report.delta_fp == 0
    assert "Nothing has been released" in report.statement
    assert "No round was charged yet." in render(report)


def test_long_ledgers_are_shown_in_part(tmp_path):
    """The page shows at most 200 of many rounds and says so; the machine-readable report has all."""
    write_lines(tmp_path / "l", lines([event("100.000000")] * 300))
    report = report_of_ledger(tmp_path / "l")
    page = render(report)
    assert "of 300 rounds" in page
    assert Tags(page).tags.count("tr") < 230
    write_report(report, html=tmp_path / "new" / "r.html", machine=tmp_path / "new" / "r.json")
    machine = json.loads((tmp_path / "new" / "r.json").read_text())
    assert len(machine["rounds"]) == 300
    assert machine["curve"][-1]["number"] == 300
    assert (tmp_path / "new" / "r.html").read_text() == page


def test_very_long_ledgers_are_reported_in_part(tmp_path, monkeypatch):
    """Where a record of every round would be too much, both reports have a selection, and the losses of all rounds."""
    bodies = lines([event("100.000000")] * 299 + [event("50.000000")])
    write_lines(tmp_path / "l", bodies)
    every = report_of_ledger(tmp_path / "l")
    monkeypatch.setattr("privacy.report._MOST_ROUNDS", 299)
    report = report_of_ledger(tmp_path / "l")
    assert [facts.number for facts in report.rounds] == shown_rounds(300)
    assert report.num_rounds == 300
    assert (report.spent, report.delta_fp, report.curve) == (every.spent, every.delta_fp, every.curve)
    assert report.statement == every.statement
    page = render(report)
    assert f"{len(report.rounds)} of 300 rounds" in re.sub(r"<[^>]*>", "", page)
    assert "has the same ones" in page
    assert page.replace("has the same ones", "has all") == render(every)


def test_when_a_ledger_was_written(tmp_path):
    """The times are those of the first and the last valid line, also where a later line is not valid."""
    write_lines(tmp_path / "l", lines([event(), event()]))
    found = report_of_ledger(tmp_path / "l").verification
    assert (found.first_time, found.last_time) == ("2026-01-31T12:00:00Z", "2026-01-31T12:00:04Z")
    data = (tmp_path / "l").read_bytes()
    (tmp_path / "l").write_bytes(data.replace(b'"round":1', b'"round": 1'))
    found = report_of_ledger(tmp_path / "l").verification
    assert (found.line, found.last_time) == (4, "2026-01-31T12:00:02Z")
    (tmp_path / "l").write_bytes(data.split(b"\n")[0] + b"\n")
    found = report_of_ledger(tmp_path / "l").verification
    assert found.first_time == found.last_time == "2026-01-31T12:00:00Z"


@given(st.integers(0, 10**6))
def test_the_selection_of_rounds_is_short_and_has_both_ends(count):
    """Never more than 200 rounds, in order, none twice, with the first and the last."""
    shown = shown_rounds(count)
    assert len(shown) <= 200
    assert shown == sorted(set(shown))
    assert shown == list(range(1, count + 1)) or (len(shown) > 150 and (shown[0], shown[-1]) == (1, count))


def test_every_field_reaches_the_machine(private_run):
    """`report.json` is the record and its statement, as valid JSON."""
    report = report_of(private_run)
    machine = json.loads((private_run / "release" / "report.json").read_text())
    names = {field.name for field in dataclasses.fields(PrivacyReport)}
    assert machine.keys() == names | {"format", "statement"}
    assert machine["statement"] == report.statement
    assert machine["spent"] == dataclasses.asdict(report.spent)
    assert machine["verification"]["head"] == report.model.ledger_head
    assert {"python", "numpy", "flwr", "cryptography", "dp-accounting", "umbel"} <= machine["versions"].keys()


def test_facts_are_collected_without_drawing_or_flower():
    """Collecting a report needs neither Flower nor what draws the page, and the page's module loads them late."""
    code = (
        "import sys, privacy.report_page; print({'flwr', 'jinja2', 'matplotlib', 'dp_accounting'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
