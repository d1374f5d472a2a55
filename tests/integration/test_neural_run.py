"""A network through the whole of umbel: engines, ledger, audit, what nodes refuse, and what the command line says."""

import json
from functools import partial
from pathlib import Path

import pytest

from client.settings import load_settings
from common.config import Config, load_config, to_toml
from common.errors import UmbelError
from common.files import pack, unpack, write_durably
from server.settings import RunFolder
from tests.federation import Silent, configuration
from umbel.auditing import audit
from umbel.cli import run as run_cli
from umbel.simulate import lay_out, run_engine, simulate

ROUNDS = 3
MODULE = """
from torch import nn


def make_model():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, OUTPUTS))
"""
VERIFIED = 5


def module(folder: Path, outputs: int = 1) -> str:
    """A small network in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.py"
    path.write_text(MODULE.replace("OUTPUTS", str(outputs)))
    return f"{path}:make_model"


def configured(folder: Path, **overrides) -> Config:
    """A run of a network on a made-up population, whose noise comes from a seed."""
    options = {
        "data__synthetic__users": 23,
        "data__synthetic__examples": 8,
        "data__synthetic__dimension": 6,
        "data__synthetic__rank": 2,
        "data__synthetic__sparsity": 2,
        "network__module": module(folder.parent),
        "model__rank": 2,
        "model__sparsity": 2,
        "training__rounds": ROUNDS,
        "privacy__epsilon": 4.0,
        "privacy__seed": 7,
    }
    return configuration(folder, **options | overrides)


def released(config: Config) -> tuple[dict[str, bytes], bytes]:
    """Lay it out and run it: the files of the releases by name, and the shared vector."""
    config = lay_out(config, Silent())
    folder = RunFolder(root=Path(str(config.run.out)))
    rounds = run_engine(config, folder)
    assert [(entry["answered"], entry["refusals"]) for entry in rounds] == [(config.training.nodes, {})] * ROUNDS
    arrays, _ = unpack(folder.model)
    return {path.name: path.read_bytes() for path in folder.rounds.iterdir()}, arrays["beta"].tobytes()


@pytest.mark.parametrize("form", ["vector", "matrix"])
def test_neither_workers_nor_nodes_nor_chunks_change_a_bit_of_a_neural_run(tmp_path, monkeypatch, form):
    """One worker and two nodes; two workers and three nodes; chunks of a user or two."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    expected = released(configured(tmp_path / "a", network__form=form))
    assert len(expected[0]) == ROUNDS
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert released(configured(tmp_path / "b", network__form=form, training__nodes=3)) == expected
    monkeypatch.setattr("client.network_work.CHUNK_BYTES", 2**13)
    assert released(configured(tmp_path / "c", network__form=form)) == expected


def test_flower_agrees_on_a_neural_run(tmp_path):
    """Flower's Simulation Engine on Ray, as `--engine flower` runs it."""
    expected = released(configured(tmp_path / "in-process", model__family="logistic"))
    assert released(configured(tmp_path / "flower", model__family="logistic", training__engine="flower")) == expected


def test_a_neural_run_learns_what_users_share(tmp_path):
    """Without noise a few rounds of a last layer beat both every user alone and one network for all."""
    (tmp_path / "linear.py").write_text(
        MODULE.replace("nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, OUTPUTS)", "nn.Linear(20, 1)")
    )
    config = configured(
        tmp_path / "run",
        network__module=f"{tmp_path / 'linear.py'}:make_model",
        data__synthetic__users=150,
        data__synthetic__examples=12,
        data__synthetic__dimension=20,
        data__synthetic__sparsity=1,
        data__synthetic__beta_scale=3.0,
        model__sparsity=1,
        data__test_fraction=0.25,
        training__rounds=8,
        privacy__epsilon="none",
        network__step_size=3.0,
        network__U_scale=1.0,
    )
    results = simulate(config, progress=Silent())
    ours, baselines = results["error"]["overall"], results["baselines"]
    assert ours < 0.97 * min(baselines["global"]["overall"], baselines["alone"]["overall"])
    assert results["network"]["parameters"] == 20 + 1
    assert results["network"]["personal_numbers"] == 2 + 2 * 1
    curve = [point["error"] for point in results["curve"]]
    assert curve[-1] == pytest.approx(ours)
    assert curve[-1] < curve[0]


def test_the_released_network_is_recomputed_by_the_audit(tmp_path):
    """From the noised sums; another shared vector, or another start than START names, is found."""
    run = tmp_path / "run"
    released(configured(run))
    assert audit([run])["model"]["status"] == "recomputed"
    folder = RunFolder(root=run)
    arrays, facts = unpack(folder.model)
    whole = folder.model.read_bytes()
    write_durably(folder.model, pack(arrays | {"beta": arrays["beta"] + 1e-3}, facts))
    assert audit([run])["model"]["status"] == "differs"
    write_durably(folder.model, pack(arrays, facts | {"network": facts["network"] | {"outputs": 2}}))
    assert audit([run])["model"]["status"] == "differs"
    write_durably(folder.model, whole)
    start, described = unpack(folder.network)
    write_durably(folder.network, pack({"shared": start["shared"] * 2}, described))
    assert audit([run])["model"]["status"] == "differs"


def test_a_node_with_another_network_refuses_and_sends_nothing(tmp_path):
    """The code is the node's own: what the server asks for has to be of the same architecture."""
    config = lay_out(configured(tmp_path / "run"), Silent())
    path = Path(config.network.module.partition(":")[0])
    path.write_text(path.read_text().replace("nn.Linear(8,", "nn.Linear(9,").replace("(6, 8)", "(6, 9)"))
    with pytest.raises(UmbelError, match="policy_shape"):
        run_engine(config, RunFolder(root=tmp_path / "run"))
    assert not list((tmp_path / "run" / "release" / "rounds").iterdir())


def test_a_node_without_a_network_refuses_a_neural_task(tmp_path):
    """It says so with a code."""
    config = lay_out(configured(tmp_path / "run"), Silent())
    path = tmp_path / "run" / "nodes" / "node.toml"
    linear = load_settings(path).model_copy(update={"network": None})
    write_durably(path, to_toml(linear.model_dump(exclude_none=True, by_alias=True)).encode())
    with pytest.raises(UmbelError, match="policy_work"):
        run_engine(config, RunFolder(root=tmp_path / "run"))


def test_a_neural_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """With the same integers as one that was not."""
    expected = released(configured(tmp_path / "whole"))
    config = lay_out(configured(tmp_path / "cut"), Silent())
    folder, calls = RunFolder(root=tmp_path / "cut"), []

    def stop(*arguments, original, **named):
        calls.append(1)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    from server import training

    with monkeypatch.context() as patched:
        patched.setattr(training, "save_checkpoint", partial(stop, original=training.save_checkpoint))
        with pytest.raises(KeyboardInterrupt):
            run_engine(config, folder)
    run_engine(config, folder)
    arrays, _ = unpack(folder.model)
    assert arrays["beta"].tobytes() == expected[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "nowhere.py:make_model"], "Expected a Python file, got network.module="),
        (["--model", "model.py"], "Expected network.module as 'FILE.py:FUNCTION'"),
        (["--family", "softmax"], "network.module"),
        (["--model", "{module}", "--algorithm", "amht-lrs"], "training.algorithm='gradient'"),
        (["--model", "{module}", "--set", 'network.layers=["5*"]'], "There are: 0, 2."),
        (["--model", "{module}", "--set", "data.synthetic.dimension=7"], "from 7 numbers to 1 an example"),
        (["--model", "{module}", "--rank", "65"], "Expected model.rank <= 64 of each layer"),
    ],
)
def test_what_is_wrong_with_a_neural_run_is_said_before_anything_is_charged(tmp_path, capsys, options, message):
    """Naming the key, the value and the remedy."""
    named = [option.replace("{module}", module(tmp_path)) for option in options]
    arguments = ["simulate", "--out", str(tmp_path / "run"), "--set", "data.synthetic.users=20"]
    if "data.synthetic.dimension=7" not in named:
        arguments += ["--set", "data.synthetic.dimension=6"]
    assert run_cli([*arguments, "--set", "data.synthetic.rank=2", *named]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_nothing_personal_of_a_neural_run_is_in_what_it_releases(tmp_path):
    """The model says what the network is; a round's line has what a linear model's has."""
    run = tmp_path / "run"
    released(configured(run))
    assert load_config(run / "config.toml").network.module is not None
    facts = unpack(RunFolder(root=run).model)[1]
    assert set(facts) >= {"network", "family", "sparsity"}
    (numbers, *_) = [json.loads(line) for line in RunFolder(root=run).metrics.read_bytes().splitlines()]
    assert set(numbers) == {
        "round",
        "rounds",
        "invited",
        "answered",
        "refusals",
        "epsilon_spent",
        "epsilon_budget",
        "clipping_norm",
        "noise_variance",
        "b_variance",
        "not_private",
    }
