"""The documentation does what it says: commands and programs run, links lead somewhere, what is named exists.

In README.md, CHANGELOG.md and docs/: a block marked `python` runs, `toml` is a valid configuration, and in a block
marked `console` every line `$ umbel ...` runs and ends with exit code 0, or the one in its comment `# exit code 5`.
Simulations are made small. `<!-- not run: reason -->` before or after a block excuses it.
"""

import ast
import importlib
import os
import random
import re
import shlex
import sys
import tomllib
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from cryptography.exceptions import InvalidSignature
from pydantic import BaseModel

from client.guard import Policy
from client.settings import NodeSettings
from common.config import Config, load_config, valid_keys
from common.errors import REFUSALS
from common.loading import load
from privacy.audit import verify as verifier
from privacy.disclosure import SIGNATURE_LIMITS, UNPROTECTED, who_sees_what
from privacy.gaussian import epsilon_of_mu
from privacy.keys import create_key, load_key, public_key_hex
from privacy.ledger import PrivacyLedger
from privacy.lines import parse_line, signed_line
from privacy.participation import mu_max_string
from umbel import cli

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXCUSE = r"<!-- not run: [^>]+ -->"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
DOTTED = re.compile(r"`((?:client|common|privacy|server|umbel)(?:\.\w+)+)`")
FILE = re.compile(r"`((?:benchmarks|client|common|docs|privacy|server|tests|umbel)/[\w./-]*)`")
SMALL = (
    *("--set", "data.synthetic.users=40", "--set", "data.synthetic.examples=[4, 12]", "--quiet"),
    *("--set", "data.synthetic.dimension=5", "--rank", "2", "--sparsity", "1", "--rounds", "2", "--no-baselines"),
)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and text of every block that is not excused."""
    text = page.read_text("utf-8")
    return [
        (found[1], found[2])
        for found in FENCE.finditer(text)
        if not re.search(EXCUSE + r"\s*\Z", text[: found.start()])
        and not re.match(r"\s*" + EXCUSE, text[found.end() :])
    ]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text("utf-8"))


RUNNABLE = [page for page in PAGES if {language for language, _ in blocks(page)} & {"python", "toml", "console"}]


@pytest.mark.parametrize("page", RUNNABLE, ids=name_of)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands, programs and configurations of a page work, in its order, in one folder."""
    monkeypatch.chdir(tmp_path)
    for language, text in blocks(page):
        if language == "python":
            exec(compile(text, name_of(page), "exec"), {"__name__": "documentation"})  # noqa: S102
        elif language == "toml":
            Path("page.toml").write_text(text, "utf-8")
            load_config("page.toml")
        elif language == "console":
            for line in re.findall(r"^\$ (umbel .*)$", text.replace("\\\n", " "), re.MULTILINE):
                run_command(line)


def run_command(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    small = SMALL if words[0] == "simulate" and not {"--resume", "--config"} & set(words) else ()
    expected = re.search(r"# exit code (\d+)", line)
    with mock.patch.dict(os.environ):
        code = cli.run([*words, *small])
    assert code == (int(expected[1]) if expected else 0), line


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    """Every link inside the documentation has a file, and the heading if it names one."""
    for target in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_is_named_exists(page: Path) -> None:
    """Functions, modules and files of this project that a page names are there, and no path of one machine is."""
    text = prose(page)
    assert [name for name in DOTTED.findall(text) if not exists(name) and name not in valid_keys()] == []
    assert [name for name in FILE.findall(text) if not (ROOT / name).exists()] == []
    assert str(ROOT) not in text


def exists(dotted: str) -> bool:
    """Whether a module, or something in one, has this name."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part, None) or getattr(found, "__dataclass_fields__", {}).get(part)
        return found is not None
    return False


def test_the_check_of_names_sees_what_is_not_there() -> None:
    """A function, a field and a module that do not exist are seen."""
    assert exists("client.personalize.solve")
    assert exists("privacy.layout.Group.share")
    assert not any(map(exists, ("client.personalize.dissolve", "privacy.layout.Group.shade", "server.round")))


def test_privacy_says_what_reports_say() -> None:
    """docs/privacy.md has the report's words for who sees what, what is not protected, and what is left to trust."""
    text = " ".join((ROOT / "docs" / "privacy.md").read_text("utf-8").split())
    rows = [f"| {row.who} | {row.sees} | {row.means} |" for row in who_sees_what(None, is_private=True)]
    points = [f"- {sentence}" for sentence in (*UNPROTECTED, *SIGNATURE_LIMITS)]
    assert [words for words in (*rows, *points) if words not in text] == []


def test_refusals_named_in_the_docs_exist() -> None:
    """The table of what a node checks uses codes of the vocabulary only."""
    section = (ROOT / "docs" / "privacy.md").read_text("utf-8").split("## What a node checks")[1].split("\n## ")[0]
    codes = set(re.findall(r"`([a-z_]+)` \|$", section, re.MULTILINE))
    assert len(codes) > 8
    assert codes <= set(REFUSALS)


def test_every_key_is_documented() -> None:
    """The table of docs/configuration.md has every key of the configuration, no other, and its default."""
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| (.*?) \| (.+) \|$", page, re.MULTILINE)
    assert [key for key, _, _ in rows] == list(valid_keys())
    defaults = tomllib.loads(Config().to_toml())
    for key, cell, _ in rows:
        if cell == "unset":
            with pytest.raises(KeyError):
                reduce(getitem, key.split("."), defaults)
        else:
            assert tomllib.loads(f"default = {cell.strip('`')}")["default"] == reduce(getitem, key.split("."), defaults)


def test_every_setting_of_a_node_is_documented() -> None:
    """The table of docs/device.md has every key of node.toml, those of [policy] included, no other, and its default."""
    page = (ROOT / "docs" / "device.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z_.]+)` \| (.*?) \| (.+) \|$", page, re.MULTILINE)
    expected = {}
    for name, field in NodeSettings.model_fields.items():
        key = field.alias or name
        if isinstance(field.default, BaseModel):
            defaults = Policy.__dataclass_fields__
            expected |= {f"{key}.{limit}": defaults[limit].default for limit in type(field.default).model_fields}
        else:
            expected[key] = "required" if field.is_required() else field.default
    assert sorted(key for key, _, _ in rows) == sorted(expected)
    for key, cell, _ in rows:
        if cell in ("required", "follows"):
            assert expected[key] == "required", key
        elif cell == "unset":
            assert expected[key] is None, key
        else:
            default = tomllib.loads(f"default = {cell.strip('`')}")["default"]
            assert (tuple(default) if isinstance(default, list) else default) == expected[key], key


def test_every_refusal_is_explained_to_operators() -> None:
    """The table of docs/deploy.md has every public code with its words, and something to do about it."""
    page = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    rows = re.findall(r"^\| `([a-z_]+)` \| ([A-Z][^|]*\.) \| (.+) \|$", page, re.MULTILINE)
    assert {code: meaning for code, meaning, _ in rows} == dict(REFUSALS)
    assert len(rows) == len(REFUSALS)


def test_every_metric_is_documented() -> None:
    """docs/deploy.md names all metrics of the exporter."""
    source = (ROOT / "server" / "metrics.py").read_text("utf-8")
    page = (ROOT / "docs" / "deploy.md").read_text("utf-8")
    names = set(re.findall(r'"(umbel_\w+)"', source))
    assert len(names) > 15
    assert {name for name in names if not re.search(rf"`{name}(_total)?[`{{ ]", page)} == set()


def test_examples_of_inputs_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each configuration of docs/configuration.md reads the files shown before it, and loses no row of them."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    formats = []
    for file, language, text in re.findall(
        r"(?:`([\w./-]+)`:\n\n)?```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE
    ):
        path = tmp_path / (file or "page.toml")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, "utf-8")
        if language == "toml":
            config = load_config(path)
            loaded = load(config.data, config.model.family)
            assert loaded.population.num_users == 2
            assert loaded.num_bad_rows == loaded.num_clipped == 0
            assert max(config.model.rank, config.model.sparsity) <= loaded.schema.dimension
            formats.append(loaded.format)
    assert formats == ["table", "ratings", "ratings", "movielens-1m"]


# --- the verifier of docs/ledger.md ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page_verifier() -> dict[str, Any]:
    """What the programs of docs/ledger.md define."""
    programs = [text for language, text in blocks(ROOT / "docs" / "ledger.md") if language == "python"]
    names: dict[str, Any] = {}
    for text in programs:
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {alias.name for alias in node.names} <= {"hashlib", "json", "math"}
            elif isinstance(node, ast.ImportFrom):
                assert str(node.module).startswith("cryptography.")
        exec(compile(text, "docs/ledger.md", "exec"), names)  # noqa: S102
    return names


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ledger that a real run was charged to, then a round that was aborted, another key and another run."""
    folder = tmp_path_factory.mktemp("population")
    path, key = folder / "all.jsonl", create_key(folder / "all.key")
    budget = {"epsilon": 3.0, "delta": 1e-6, "mu_max": mu_max_string(3.0, 1e-6, 2), "max_nodes_per_user": 2}
    with PrivacyLedger.create(path, population="synthetic", key=key, **budget):
        pass
    words = ["simulate", *SMALL, "--out", str(folder / "run"), "--ledger", str(path)]
    with mock.patch.dict(os.environ):
        assert cli.run([*words, "--set", "privacy.max_nodes_per_user=2"]) == 0
    with PrivacyLedger.open(path, key=key) as opened:
        (run,) = opened.runs
        opened.start("aborted", opened.runs[run]["schedule"], "0" * 64)
        aborted = opened.reserve("aborted", 1, opened.events()[0], 40)
        opened.abort(aborted.sequence, "no_answer")
        opened.rotate_key(create_key(folder / "next.key"))
        opened.start("other", {}, "0" * 64)
    return path


def test_the_pages_verifier_agrees_with_ours(page_verifier: dict[str, Any], ledger: Path) -> None:
    """It finds the same head, the same spending, the same epsilon, and the budget kept."""
    ours = verifier.verify(ledger, public_key=public_key_hex(load_key(ledger.with_name("all.key"))))
    found = page_verifier["verify"](ledger, ours.public_keys[0])
    assert ours.status == "verified"
    assert found["head"] == f"{ours.sequence}:{ours.head}"
    assert (found["spent"], found["rounds"]) == (ours.spent_units, len(ours.rounds))
    assert page_verifier["within_budget"](found["genesis"])
    assert not page_verifier["within_budget"]({**found["genesis"], "epsilon": "2.99"})
    epsilon = page_verifier["epsilon_of"](ours.mu_spent, float(ours.genesis["delta"]))
    assert epsilon == pytest.approx(epsilon_of_mu(ours.mu_spent, 1e-6), rel=1e-6)
    with pytest.raises(AssertionError):
        page_verifier["verify"](ledger, "0" * 64)


def test_the_pages_verifier_sees_damage(page_verifier: dict[str, Any], ledger: Path, tmp_path: Path) -> None:
    """A changed byte, a dropped, repeated or swapped line is refused; a torn end counts for nothing."""
    good, copy = ledger.read_bytes(), tmp_path / "copy.jsonl"
    lines = good.splitlines(keepends=True)
    owner = parse_line(lines[0][:-1]).body["public_key"]
    rng = random.Random(1)  # noqa: S311 (which bytes)
    places = [rng.randrange(len(good) - len(lines[-1])) for _ in range(60)]
    damaged = [good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :] for i in places]
    for i in range(len(lines) - 1):
        damaged += [b"".join(lines[:i] + lines[i + 1 :]), b"".join([*lines[:i], lines[i], *lines[i:]])]
        damaged.append(b"".join([*lines[:i], lines[i + 1], lines[i], *lines[i + 2 :]]))
    for data in damaged:
        copy.write_bytes(data)
        with pytest.raises((AssertionError, InvalidSignature, ValueError, KeyError, TypeError)):
            page_verifier["verify"](copy, owner)
    copy.write_bytes(good + lines[-1][:40])
    assert page_verifier["verify"](copy, owner) == page_verifier["verify"](ledger, owner)


def test_the_pages_verifier_holds_the_owner_to_the_rules(
    page_verifier: dict[str, Any], ledger: Path, tmp_path: Path
) -> None:
    """What the owner signs beyond the budget or a schedule, twice, without a START, for a RESERVE that is closed, or
    after another line than the last, is refused."""
    good, copy = ledger.read_bytes(), tmp_path / "copy.jsonl"
    lines = [parse_line(raw) for raw in good.splitlines()]
    reserve = next(line for line in lines if line.kind == "RESERVE")
    last, key = lines[-1], load_key(ledger.with_name("next.key"))
    run_again = {"run": "other", "schedule": {}, "configuration_digest": "0" * 64}
    dear = {**reserve.body["event"], "noise_multiplier": "0.5"}
    other_noise = {**reserve.body["event"], "noise_multiplier": "1000"}
    for kind, body, previous in (
        ("RESERVE", {**reserve.body, "run": "other", "event": dear}, last.head),
        ("RESERVE", reserve.body, last.head),
        ("RESERVE", {**reserve.body, "run": "never started"}, last.head),
        ("RESERVE", {**reserve.body, "round": 3}, last.head),
        ("RESERVE", {**reserve.body, "run": "aborted", "round": 2, "event": other_noise}, last.head),
        ("COMMIT", {"reserve": reserve.sequence, "release_digest": "0" * 64}, last.head),
        ("START", run_again, last.head),
        ("START", {**run_again, "run": "a third"}, reserve.head),
        ("RESTORE", {"lost": 1, "noise_multiplier": "1", "recovery_signature": "0" * 128}, last.head),
    ):
        raw = signed_line(sequence=last.sequence + 1, kind=kind, body=body, previous=previous, time=last.time, key=key)
        copy.write_bytes(good + raw + b"\n")
        with pytest.raises((AssertionError, KeyError)):
            page_verifier["verify"](copy, lines[0].body["public_key"])
        assert verifier.verify(copy).status == "failed"


def test_a_command_that_fails_is_seen() -> None:
    """The exit code in the comment is what counts."""
    run_command("umbel plan --epsilon 0 # exit code 2")
    with pytest.raises(AssertionError):
        run_command("umbel plan --epsilon 0")
    assert sys.exc_info() == (None, None, None)
