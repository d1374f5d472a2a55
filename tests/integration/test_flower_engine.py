"""The same apps under Flower's Simulation Engine: same replies, a true outcome; and the bundle it gets."""

import importlib.util
import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest

from client.app import SETTINGS_VARIABLE
from common.errors import BudgetExhausted, Refused, UmbelError
from umbel import flower_engine
from umbel.inprocess import InProcessGrid, partitions, run_server_app

PYPROJECT = """
[project]
name = "dummy"
version = "0.1.0"
license = { file = "LICENSE" }
dependencies = ["flwr>=1.41.0,<1.42"]
[tool.flwr.app]
publisher = "umbel"
fab-format-version = 1
flwr-version-target = "1.41.0"
fab-include = ["server/**/*.py", "client/**/*.py", "common/**/*.py", "LICENSE"]
[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"
[tool.flwr.app.config]
config = ""
"""

SERVER = """
import json, time
from flwr.serverapp import ServerApp
from common import errors, wire

app = ServerApp()

@app.main()
def main(grid, context):
    if context.run_config["config"] == "exhausted":
        raise errors.BudgetExhausted("Expected spent <= 1, got spent=2.")
    for server_round in (1, 2):
        payload = f"{context.run_config['config']} {server_round}".encode()
        pending = set(grid.push_messages([
            wire.request(payload, bytes(64), node_id=node_id, action="train.contribute", ttl=300)
            for node_id in grid.get_node_ids()
        ]))
        replies = []
        while pending:
            for reply in grid.pull_messages(pending):
                pending.discard(reply.metadata.reply_to_message_id)
                assert "secret" not in repr(reply)
                read = wire.read_answer(reply)
                replies.append(read.code if isinstance(read, wire.Refusal) else read.decode())
            time.sleep(0.05)
        print(json.dumps({"replies": sorted(replies), "code": __file__}))
"""

CLIENT = """
import hashlib, os
from flwr.clientapp import ClientApp
from common import wire

app = ClientApp()

@app.train("contribute")
def contribute(message, context):
    payload, signature = wire.read_request(message)
    part, parts = context.node_config["partition-id"], context.node_config["num-partitions"]
    if part == 1 and payload.endswith(b"2"):
        raise ValueError("secret")
    node = os.environ["UMBEL_NODE_CONFIG"], context.run_config["config"]
    return wire.answer(f"{part}/{parts} {payload} {len(signature)} {node}".encode(), message)
"""


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")
    return folder


def project(folder: Path, server: str = SERVER) -> Path:
    """A small Flower app with our wire format, in a folder of its own."""
    common = {
        f"common/{name}": (flower_engine.CHECKOUT / "common" / name).read_text("utf-8")
        for name in ("__init__.py", "errors.py", "sealing.py", "wire.py")
    }
    apps = {
        "server/__init__.py": "",
        "server/app.py": server,
        "client/__init__.py": "",
        "client/app.py": CLIENT,
    }
    return write(folder, {"pyproject.toml": PYPROJECT, "LICENSE": "none", **common, **apps})


def module(path: Path) -> Any:
    """A module by its file, under a name that nothing else has."""
    spec = importlib.util.spec_from_file_location(f"dummy_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def replies_in_process(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[Any]:
    client, server = module(folder / "client/app.py"), module(folder / "server/app.py")
    with InProcessGrid(client.app, partitions(2), run_config={"config": "run.toml"}) as grid:
        run_server_app(server.app, grid)
    return [json.loads(line)["replies"] for line in capsys.readouterr().out.splitlines()]


def test_a_bundle_under_flower_answers_as_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On Ray the apps of the installed bundle, not those of the working directory, give the same replies."""
    source = project(tmp_path / "source")
    wrong = {f"{package}/app.py": "raise SystemExit" for package in ("server", "client")}
    decoy = write(tmp_path / "decoy", {"server/__init__.py": "", "client/__init__.py": "", **wrong})
    installed = flower_engine.install_bundle(flower_engine.build_bundle(tmp_path, source), tmp_path / "apps")
    monkeypatch.chdir(decoy)
    monkeypatch.setenv("PYTHONPATH", str(decoy))
    lines: list[dict[str, Any]] = []
    flower_engine.run(
        installed,
        2,
        {"config": "run.toml"},
        {SETTINGS_VARIABLE: "node.toml"},
        log_file=tmp_path / "log",
        on_line=lines.append,
    )
    assert [Path(line["code"]) for line in lines] == [installed / "server" / "app.py"] * 2
    monkeypatch.setenv(SETTINGS_VARIABLE, "node.toml")
    under_flower = [line["replies"] for line in lines]
    assert under_flower == replies_in_process(source, capsys)
    assert "client_error" in under_flower[1]
    assert "secret" not in (tmp_path / "log").read_text("utf-8")


def test_an_error_of_the_server_is_raised_again(tmp_path: Path) -> None:
    """A server that raises one of our errors under Flower ends the run with that error and its text."""
    with pytest.raises(BudgetExhausted, match=r"^Expected spent <= 1, got spent=2\.$"):
        flower_engine.run(project(tmp_path), 1, {"config": "exhausted"}, log_file=tmp_path / "log")


def test_an_app_that_cannot_be_loaded_is_an_error(tmp_path: Path) -> None:
    """A server that fails at import ends the run with its exception's type and the log's path."""
    folder = project(tmp_path, server="1 / 0")
    with pytest.raises(UmbelError, match=rf"ZeroDivisionError.*{tmp_path / 'log'}"):
        flower_engine.run(folder, 1, {"config": ""}, log_file=tmp_path / "log")
    assert "1 / 0" in (tmp_path / "log").read_text("utf-8")


def test_only_declared_configuration_is_taken(tmp_path: Path) -> None:
    """A key that pyproject.toml does not have is an error, as it is for Flower."""
    with pytest.raises(UmbelError, match="ValueError"):
        flower_engine.run(project(tmp_path), 1, {"unknown": 1}, log_file=tmp_path / "log")


def test_an_interrupt_ends_the_child(tmp_path: Path) -> None:
    """Whatever interrupts the parent, the child is gone when it does."""
    waiting = "import json, os, time\nprint(json.dumps({'pid': os.getpid()}), flush=True)\ntime.sleep(3600)"
    pids: list[int] = []

    def interrupt(line: dict[str, Any]) -> None:
        pids.append(line["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flower_engine.run(project(tmp_path, server=waiting), 1, {}, log_file=tmp_path / "log", on_line=interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_a_killed_child_is_an_error(tmp_path: Path) -> None:
    """A child that could not say how it ended has failed, with the status that the system gives."""
    killed = "import os\nos.kill(os.getpid(), 9)"
    with pytest.raises(UmbelError, match="status=-9"):
        flower_engine.run(project(tmp_path, server=killed), 1, {}, log_file=tmp_path / "log")


def test_a_refusal_keeps_its_code(tmp_path: Path) -> None:
    """Our errors cross the border between the processes with what they carry."""
    refusing = "from common.errors import Refused\nraise Refused('protocol', 'Expected 1, got 2.')"
    with pytest.raises(Refused, match="Expected 1, got 2") as caught:
        flower_engine.run(project(tmp_path, server=refusing), 1, {}, log_file=tmp_path / "log")
    assert caught.value.code == "protocol"


def test_a_folder_that_is_no_app_is_an_error(tmp_path: Path) -> None:
    """Neither run nor build take a folder without a pyproject.toml."""
    with pytest.raises(UmbelError, match=r"pyproject\.toml"):
        flower_engine.run(tmp_path, 1, {}, log_file=tmp_path / "log")
    with pytest.raises(UmbelError, match="Expected a Flower app"):
        flower_engine.build_bundle(tmp_path / "out", tmp_path)


def checkout(folder: Path) -> Path:
    """A copy of this checkout in `folder`, without what git ignores."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info")
    shutil.copytree(flower_engine.CHECKOUT, folder, ignore=ignored, copy_function=shutil.copy)
    for name in ("LICENSE", "README.md"):
        (folder / name).touch()
    return folder


def test_the_bundle_holds_the_four_packages(tmp_path: Path) -> None:
    """Every module of server, client, common and privacy is in the bundle, no other part of the checkout."""
    source = checkout(tmp_path / "a_name_that_flower_refuses")
    with zipfile.ZipFile(flower_engine.build_bundle(tmp_path, source)) as bundle:
        names = set(bundle.namelist())
    modules = {
        path.relative_to(source).as_posix()
        for package in ("server", "client", "common", "privacy")
        for path in (source / package).rglob("*.py")
    }
    assert names == modules | {"pyproject.toml", "LICENSE", "README.md", ".info/CONTENT"}


def test_the_bundle_is_deterministic(tmp_path: Path) -> None:
    """Two copies of the checkout, with other names and times, give the same bytes."""
    first, second = (
        flower_engine.build_bundle(tmp_path / name, checkout(tmp_path / f"source-{name}")) for name in ("a", "b")
    )
    assert first.name == second.name
    assert first.read_bytes() == second.read_bytes()


def test_installing_replaces_what_is_there(tmp_path: Path) -> None:
    """A folder that was changed after installation holds the bundle's files again."""
    fab = flower_engine.build_bundle(tmp_path, project(tmp_path / "source"))
    installed = flower_engine.install_bundle(fab, tmp_path / "apps")
    (installed / "server" / "app.py").write_text("raise SystemExit")
    (installed / "more.py").touch()
    assert flower_engine.install_bundle(fab, tmp_path / "apps") == installed
    assert (installed / "server" / "app.py").read_text("utf-8") == SERVER
    assert not (installed / "more.py").exists()
    assert list((tmp_path / "apps").iterdir()) == [installed]


def test_a_changed_bundle_is_not_installed(tmp_path: Path) -> None:
    """One byte more, and the hash no longer fits the name."""
    fab = flower_engine.build_bundle(tmp_path, project(tmp_path / "source"))
    with zipfile.ZipFile(fab, "a") as bundle:
        bundle.writestr("client/more.py", "")
    with pytest.raises(UmbelError, match="Expected a Flower App Bundle"):
        flower_engine.install_bundle(fab, tmp_path / "apps")
    (tmp_path / "no.fab").write_text("no bundle")
    with pytest.raises(UmbelError, match="Expected a Flower App Bundle"):
        flower_engine.install_bundle(tmp_path / "no.fab", tmp_path / "apps")
