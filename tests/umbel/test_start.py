"""Runs that start from a released model: whose it may be, what it must fit, and that an audit recomputes from it."""

import json
import os
import shutil
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from client import sources
from common.config import Config, load_config
from common.errors import UmbelError, VerificationError
from common.families import FAMILIES
from common.files import pack, unpack, write_durably
from privacy.gaussian import epsilon_of_mu
from server.algorithms import algorithm_of
from server.checkpoint import load_model, load_schema
from server.settings import RunFolder, load_run
from tests.federation import Run, configuration, run_real
from umbel import cli, empirical
from umbel.auditing import audit
from umbel.baselines import theta_under, users_of
from umbel.curve import error_curve
from umbel.evaluate import held_out_error
from umbel.simulate import lay_out

PRIVATE = {"privacy.epsilon": 1.0, "privacy.seed": None, "privacy.delta": 1e-6, "privacy.ledger_epsilon": 4.0}


class Heard:
    """A progress that remembers warnings."""

    def __init__(self) -> None:
        self.warnings: list[str] = []

    def step(self, name: str) -> None:
        """Nothing."""

    def warn(self, message: str) -> None:
        """Remembered."""
        self.warnings.append(message)


def config_of(root: Path, **changes: Any) -> Config:
    return configuration(root, **({key.replace(".", "__"): value for key, value in PRIVATE.items()} | changes))


def ran(config: Config, heard: Heard | None = None) -> Run:
    return run_real(lay_out(config, heard or Heard()))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A private run with a model, and room left on its ledger."""
    with mock.patch.dict(os.environ):
        root = tmp_path_factory.mktemp("runs") / "first"
        ran(config_of(root))
        return root


@pytest.fixture
def first(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """That run, to be charged further or tampered with."""
    root = tmp_path / "first"
    shutil.copytree(finished, root)
    with mock.patch.dict(os.environ):
        yield root


def after(first: Path, **changes: Any) -> Config:
    """A second run on the first one's ledger, from its model."""
    defaults = {
        "run__ledger": str(first / "ledger.jsonl"),
        "training__start": str(first),
        "privacy__ledger_epsilon": None,
    }
    return config_of(first.parent / "second", **(defaults | changes))


def changed_facts(model: Path, **changes: Any) -> None:
    arrays, facts = unpack(model)
    write_durably(model, pack(arrays, facts | changes))


def test_the_first_broadcast_has_the_released_model(first: Path) -> None:
    """What nodes are sent first is the released prior, bit by bit; what is released in the end is another."""
    released, _ = load_model(RunFolder(root=first).model)
    second = ran(after(first))
    sent = second.broadcasts[min(second.broadcasts)].model
    for name in ("beta", "U", "b_variance", "noise_variance"):
        assert np.array_equal(getattr(sent, name), getattr(released, name)), name
    assert not np.array_equal(second.state.model.U, released.U)


def test_both_runs_compose_in_one_ledger(first: Path) -> None:
    """The ledger's epsilon after both is that of all their releases."""
    second = ran(after(first))
    ledger = second.ledger()
    z = [float(event["noise_multiplier"]) for event in ledger.events()]
    assert len(z) == 4
    expected = epsilon_of_mu(sum(1 / each**2 for each in z) ** 0.5, 1e-6)
    assert ledger.epsilon_spent(1e-6) == pytest.approx(expected, rel=1e-6)
    assert expected > 1.3


def test_start_binds_the_digest(first: Path) -> None:
    """The START line has the digest of the model, its run and its ledger."""
    model = RunFolder(root=first).model
    second = ran(after(first))
    ledger = second.ledger()
    assert ledger.runs[str(second.config.run.name)]["schedule"]["start"] == {
        "digest": sha256(model.read_bytes()).hexdigest(),
        "is_public": False,
        "ledger_id": ledger.ledger_id,
        "run": load_run(first).run,
    }
    assert second.folder.start.read_bytes() == model.read_bytes()


@pytest.mark.parametrize("rank", [1, 3])
def test_an_audit_recomputes_from_the_start(first: Path, rank: int) -> None:
    """The model of the second run follows from the first one's and the committed sums, also with more columns of U."""
    heard = Heard()
    second = ran(after(first, model__rank=rank), heard)
    assert (second.state.model.rank, any("2 more columns" in said for said in heard.warnings)) == (rank, rank == 3)
    found = audit([second.folder.root])
    assert (found["exit_code"], found["model"]["status"]) == (5, "recomputed")


@pytest.mark.parametrize("tamper", ["other", "gone"])
def test_another_start_fails_the_audit(first: Path, tamper: str) -> None:
    """A start that was swapped or taken away is named."""
    second = ran(after(first))
    if tamper == "gone":
        second.folder.start.unlink()
    else:
        changed_facts(second.folder.start, sparsity=0)
    found = audit([second.folder.root])
    assert found["exit_code"] == 4
    assert "start.safetensors" in found["reason"]


def test_a_start_that_was_swapped_is_not_gone_on_with(first: Path) -> None:
    """A run whose start is not the one of its START line is refused before anything is asked."""
    second = ran(after(first))
    arrays, facts = unpack(second.folder.start)
    write_durably(second.folder.start, pack({**arrays, "beta": arrays["beta"] + 1}, facts))
    with pytest.raises(VerificationError, match="as it was started"):
        run_real(second.config)


def test_without_a_rank_the_start_says_it(first: Path) -> None:
    """The default rank gives way to the start's."""
    config = after(first)
    model = config.model.__class__.model_validate({"sparsity": 1})
    assert lay_out(config.model_copy(update={"model": model}), Heard()).model.rank == 1


def test_first_step_and_first_state(first: Path) -> None:
    """The state begins with the start's model, two steps behind it and the variance bounds of a new run."""
    settings = load_run(Path(str(lay_out(after(first), Heard()).run.out)))
    assert settings.start is not None
    schema, rng = load_schema(settings.folder.schema), np.random.default_rng(0)
    state = algorithm_of(settings.config, settings.start.model).first_state(schema, rng)
    fresh = algorithm_of(settings.config).first_state(schema, np.random.default_rng(0))
    assert (state.elapsed, fresh.elapsed) == (2.0, 0.0)
    assert np.array_equal(state.model.U, settings.start.model.U)
    assert state.first_noise_variance == fresh.first_noise_variance != state.model.noise_variance


def test_the_curve_of_errors_begins_with_the_start(first: Path) -> None:
    """Before the first round users have personal models under the start, after it under another."""
    settings = load_run(ran(after(first)).folder.root)
    source, family = sources.read(settings.config.data, "squared"), FAMILIES["squared"]
    released, _ = load_model(RunFolder(root=first).model)
    users = users_of(source.train, settings.schema, family)
    theta = theta_under(users, algorithm_of(settings.config).personal_task, released)
    before, *later = error_curve(settings)
    assert before["error"] == held_out_error(theta, source.test, source.train, family).error()
    assert before["epsilon"] == pytest.approx(1.0, abs=1e-3)
    assert all(point["error"] != before["error"] for point in later)


def test_an_attack_on_the_last_model_knows_the_start(first: Path) -> None:
    """It is public, so that an attacker compares with it."""
    second = ran(after(first))
    with mock.patch.object(empirical, "algorithm_of", wraps=algorithm_of) as asked:
        empirical.attack_run(second.folder.root, canaries=empirical.FEWEST_CANARIES, threat="last", seed=0)
    released, _ = load_model(RunFolder(root=first).model)
    assert np.array_equal(asked.call_args.args[1].U, released.U)


def test_statistics_spend_no_release_on_a_start(first: Path) -> None:
    """AMHT-LRS begins with statistics where it has a U, and its audit follows."""
    options = {"training__algorithm": "amht-lrs", "privacy__epsilon": "none", "privacy__seed": 0}
    root = first.parent / "statistics"
    ran(config_of(root, privacy__ledger_epsilon=None, privacy__delta=None, **options))
    ledger = str(root / "ledger.jsonl")
    second = ran(after(first, run__ledger=ledger, training__start=str(root), privacy__delta=None, **options))
    works = [broadcast.task["work"] for _, broadcast in sorted(second.broadcasts.items())]
    assert works == ["statistics", "statistics"]
    assert audit([second.folder.root])["model"]["status"] == "recomputed"


def test_a_model_of_another_ledger_must_be_declared_public(first: Path) -> None:
    """It is refused, with both remedies; where the operator says it is public, START says so and an audit follows."""
    alone = {"run__ledger": None}
    with pytest.raises(UmbelError, match=r"--ledger.*training.start_is_public=true"):
        lay_out(after(first, **alone), Heard())
    assert not (first.parent / "second").exists()
    heard = Heard()
    second = ran(after(first, training__start_is_public=True, **alone), heard)
    assert not any("NOT PRIVATE" in said for said in heard.warnings)
    start = second.ledger().runs[str(second.config.run.name)]["schedule"]["start"]
    assert start["is_public"] is True
    assert start["ledger_id"] != second.ledger().ledger_id
    assert audit([second.folder.root])["model"]["status"] == "recomputed"


def test_a_public_model_without_a_promise_is_used_with_a_warning(first: Path) -> None:
    """Trained without noise on public data, say: the operator's word, and a warning."""
    root, heard = first.parent / "public", Heard()
    ran(configuration(root))
    lay_out(after(first, run__ledger=None, training__start=str(root), training__start_is_public=True), heard)
    assert any("NOT PRIVATE" in said for said in heard.warnings)


@pytest.mark.parametrize("declared", [False, True])
def test_a_model_without_a_promise_starts_no_private_run_of_its_ledger(first: Path, declared: bool) -> None:
    """Of these users' data it tells more than the ledger counts, whatever the operator says."""
    model = RunFolder(root=first).model
    changed_facts(model, not_private=["seeded noise"])
    with pytest.raises(UmbelError, match="NOT PRIVATE: seeded noise"):
        lay_out(after(first, training__start=str(model), training__start_is_public=declared), Heard())
    lines = (first / "ledger.jsonl").read_bytes()
    resolved = lay_out(after(first, training__start=str(model), privacy__seed=3), Heard())
    assert resolved.training.start == str(model)
    assert (first / "ledger.jsonl").read_bytes() == lines


def test_a_model_of_a_run_that_the_ledger_lacks_is_refused(first: Path) -> None:
    """As after an older copy of the ledger was put back."""
    model = RunFolder(root=first).model
    changed_facts(model, run="another")
    with pytest.raises(UmbelError, match="run='another', which it does not have"):
        lay_out(after(first, training__start=str(model)), Heard())


def test_a_model_that_its_releases_do_not_make_is_refused(first: Path) -> None:
    """The start's own run is audited first."""
    model = RunFolder(root=first).model
    arrays, facts = unpack(model)
    write_durably(model, pack({**arrays, "beta": arrays["beta"] + 1}, facts))
    with pytest.raises(VerificationError, match="failed audit: Expected beta"):
        lay_out(after(first), Heard())
    heard = Heard()
    lay_out(after(first, training__start=str(model)), heard)
    assert any("taken as it is" in said for said in heard.warnings)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__family": "logistic"}, "model.family='logistic'"),
        ({"training__algorithm": "amht-lrs"}, "training.algorithm='amht-lrs'"),
        ({"data__synthetic__dimension": 5}, "the 5 features of the data in their order"),
        ({"training__start": "nowhere"}, "Expected a file at nowhere"),
    ],
)
def test_another_kind_of_model_is_refused(first: Path, changes: dict[str, Any], words: str) -> None:
    """The message names what differs."""
    with pytest.raises(UmbelError, match=words):
        lay_out(after(first, **changes), Heard())


def test_a_smaller_rank_is_refused(first: Path) -> None:
    """Columns are never dropped."""
    second = ran(after(first, model__rank=2))
    again = after(first, run__out=str(first.parent / "third"), training__start=str(second.folder.root))
    with pytest.raises(UmbelError, match=r"Expected model\.rank >= 2"):
        lay_out(again, Heard())


def test_public_without_a_model_is_refused(tmp_path: Path) -> None:
    """A word about no model is a mistake."""
    with pytest.raises(UmbelError, match="Name a model"):
        lay_out(configuration(tmp_path / "run", training__start_is_public=True), Heard())


def test_the_option(first: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`umbel simulate --start RUN` does the same, from a relative path too."""
    config = load_config(first / "config.toml")
    synthetic = config.data.synthetic.model_dump(exclude_none=True)
    sets = [word for key, value in synthetic.items() for word in ("--set", f"data.synthetic.{key}={json.dumps(value)}")]
    monkeypatch.chdir(first.parent)
    budget = ("--epsilon", "0.5", "--delta", "1e-6", "--rounds", "1", "--ledger", "first/ledger.jsonl")
    rest = ("--sparsity", "1", "--out", "second", "--no-baselines", "--quiet")
    assert cli.run(["simulate", "--start", "first", *budget, *rest, *sets]) == 0, capsys.readouterr().err
    assert load_run(first.parent / "second").config.training.start == str(first.resolve())
