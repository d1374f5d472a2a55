"""One seeded configuration, three ways to run it: the same integers, bit for bit, and the same model.

Runs are NOT PRIVATE, since their noise is seeded: only so can two runs be compared.
"""

import json
import subprocess
import sys
import venv
from functools import partial
from pathlib import Path

import pytest

import client.service
from client.shard import Shard
from common.config import Config
from common.errors import UmbelError
from common.files import unpack
from server.settings import RunFolder
from tests.federation import Silent, configuration
from umbel import flower_engine
from umbel.simulate import CHECKOUT, lay_out, run_engine

ROUNDS = 3

Released = tuple[dict[str, bytes], dict[str, bytes]]
"""The files of the releases by name, and the model's arrays."""


def seeded(folder: Path, **overrides) -> Config:
    """A run with noise from a seed, laid out."""
    options = {
        "data__synthetic__users": 23,
        "data__synthetic__examples": 8,
        "data__synthetic__dimension": 6,
        "data__synthetic__rank": 2,
        "data__synthetic__sparsity": 2,
        "model__rank": 2,
        "model__sparsity": 2,
        "training__rounds": ROUNDS,
        "privacy__epsilon": 4.0,
        "privacy__seed": 7,
    }
    return lay_out(configuration(folder, **options | overrides), Silent())


def released(config: Config, **engine_options) -> Released:
    """Run it; what it has released."""
    folder = RunFolder(root=Path(str(config.run.out)))
    rounds = run_engine(config, folder, **engine_options)
    assert [(entry["answered"], entry["refusals"]) for entry in rounds] == [(config.training.nodes, {})] * ROUNDS
    arrays, facts = unpack(folder.model)
    model = {name: array.tobytes() for name, array in arrays.items()}
    model |= {name: str(facts[name]).encode() for name in ("b_variance", "noise_variance")}
    return {path.name: path.read_bytes() for path in folder.rounds.iterdir()}, model


@pytest.mark.parametrize("family", ["squared", "logistic"])
def test_neither_workers_nor_nodes_nor_chunks_change_a_bit(tmp_path, monkeypatch, family):
    """One worker and two nodes; two workers and three nodes; chunks of one or two users that are not kept."""
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    expected = released(seeded(tmp_path / "a", model__family=family))
    assert len(expected[0]) == ROUNDS
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert released(seeded(tmp_path / "b", model__family=family, training__nodes=3)) == expected
    small = partial(Shard, chunk_bytes=2 * 8 * 6 * 8, cache_bytes=0)
    monkeypatch.setattr(client.service, "Shard", small)
    assert released(seeded(tmp_path / "c", model__family=family)) == expected


def test_the_seed_matters(tmp_path):
    """What is compared here would differ if anything did: another seed gives other integers."""
    one, other = (released(seeded(tmp_path / str(seed), privacy__seed=seed)) for seed in (7, 8))
    assert one[0].keys() == other[0].keys()
    assert not set(one[0].values()) & set(other[0].values())


def test_flower_with_the_apps_of_the_checkout_agrees(tmp_path):
    """Flower's Simulation Engine on Ray, as `--engine flower` runs it."""
    expected = released(seeded(tmp_path / "in-process", model__family="logistic"))
    flower = seeded(tmp_path / "flower", model__family="logistic", training__engine="flower")
    assert released(flower) == expected


def test_flower_with_an_installed_bundle_agrees(tmp_path, monkeypatch):
    """The bundle needs nothing of the project: it runs in an environment in which no package of it can be found."""
    expected = released(seeded(tmp_path / "in-process"))
    bundle = flower_engine.build_bundle(tmp_path)
    installed = flower_engine.install_bundle(bundle, tmp_path / "apps")
    monkeypatch.setattr(sys, "executable", str(python_without_project(tmp_path / "venv")))
    assert released(seeded(tmp_path / "flower", training__engine="flower"), app_dir=installed) == expected


def python_without_project(folder: Path) -> Path:
    """An interpreter that finds what is installed beside this one, but no project that is installed as a link."""
    venv.create(folder, symlinks=True)
    (library,) = folder.glob("lib/python*/site-packages")
    # folders that a .pth file names are searched, the .pth files in them are not read
    here = [path for path in sys.path if path.endswith("site-packages")]
    (library / "dependencies.pth").write_text("\n".join(here))
    python = folder / "bin" / "python"
    search = "import importlib.util as u; print([u.find_spec(p) for p in ('umbel', 'client', 'common', 'flwr')])"
    found = subprocess.run([python, "-I", "-c", search], capture_output=True, text=True, check=True, cwd="/")
    assert found.stdout.startswith("[None, None, None, ModuleSpec"), found.stdout
    return python


def test_flower_needs_stores_that_its_processes_share(tmp_path):
    """Ray's workers share no memory: filters that live in it would be counted once in each of them."""
    with pytest.raises(UmbelError, match=r"run\.stores"):
        seeded(tmp_path, training__engine="flower", run__stores="memory")
    assert not any(tmp_path.iterdir())


SERVE = """
import json, sys, time
from client import app
before = set(sys.modules)
from client.service import NodeService
from client.settings import load_settings
service = NodeService(load_settings(sys.argv[1]), 0, 2)
payload, signature = (open(path, "rb").read() for path in sys.argv[2:])
reply = service.contribute(payload, signature)
service.close()
print(json.dumps([len(reply), sorted(name for name in sys.modules if "." not in name)]))
"""
HEAVY = {"torch", "opacus", "ray", "scipy", "dp_accounting", "matplotlib", "pandas", "sklearn", "jinja2", "mpmath"}


def test_a_node_with_a_linear_model_imports_nothing_heavy(tmp_path, monkeypatch):
    """From import to the bytes of a reply, a node needs the base dependencies only."""
    config = seeded(tmp_path / "run", training__rounds=1)
    sent: list[tuple[bytes, bytes]] = []
    contribute = client.service.NodeService.contribute

    def record(self, payload, signature):
        sent.append((payload, signature))
        return contribute(self, payload, signature)

    monkeypatch.setattr(client.service.NodeService, "contribute", record)
    folder = RunFolder(root=Path(str(config.run.out)))
    run_engine(config, folder)
    paths = tmp_path / "payload", tmp_path / "signature"
    for path, data in zip(paths, sent[0], strict=True):
        path.write_bytes(data)
    fresh = folder.nodes / "fresh.toml"  # a node that has not answered yet
    fresh.write_text((folder.nodes / "node.toml").read_text().replace("node-{partition}.sqlite", "fresh.sqlite"))
    command = [sys.executable, "-c", SERVE, fresh, *paths]
    finished = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    size, modules = json.loads(finished.stdout)
    assert size > 8 * 6 * 3
    assert not HEAVY & set(modules)
    assert "flwr" in modules


PRODUCTS = """
import hashlib, numpy as np
rng = np.random.default_rng(0)
X = rng.standard_normal((3, 200, 60))
U = rng.standard_normal((60, 8))
found = [np.matrix_transpose(X) @ X, X @ U, np.linalg.cholesky(U @ U.T + np.eye(60)), np.linalg.eigh(X[0].T @ X[0])[1]]
print([hashlib.sha256(array.tobytes()).hexdigest() for array in found])
"""


def test_threads_of_blas_do_not_change_products_of_usual_size():
    """An engine's workers may have another number of threads; up to some hundred features that is not seen."""
    found = {
        subprocess.run(
            [sys.executable, "-c", PRODUCTS],
            env={"OPENBLAS_NUM_THREADS": threads},
            capture_output=True,
            check=True,
        ).stdout
        for threads in ("1", "2", "4")
    }
    assert len(found) == 1
