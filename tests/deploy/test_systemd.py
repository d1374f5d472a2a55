"""The systemd unit of a node."""

import configparser
import shutil
import subprocess
from pathlib import Path

import click
import pytest
import typer

from umbel import cli

UNIT = Path(__file__).resolve().parents[2] / "examples" / "systemd" / "umbel-node.service"


def service() -> dict[str, str]:
    """Its section [Service]; of a key that is there twice the last one."""
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT, "utf-8")
    return dict(parser["Service"])


def test_it_starts_a_node() -> None:
    """Its command is one of ours, about a file in the folder that it may write."""
    program, *words = service()["ExecStart"].split()
    assert program == "/opt/umbel/bin/umbel"
    group = typer.main.get_command(cli.app)
    assert isinstance(group, click.Group)
    with click.Context(group) as context:
        name, command, rest = group.resolve_command(context, words)
        assert (name, command is not None) == ("node", True)
        settings = command.make_context(name, rest, parent=context).params["settings"]  # type: ignore[union-attr]
    assert Path(settings).parent == Path("/var/lib") / service()["StateDirectory"]


def test_it_drains_and_comes_back() -> None:
    """SIGTERM and time to answer; up again after a failure, but not after a wrong setting."""
    found = service()
    assert found["KillSignal"] == "SIGTERM"
    assert int(found["TimeoutStopSec"]) >= 30
    assert (found["Restart"], found["RestartPreventExitStatus"]) == ("on-failure", "2")


def test_it_can_do_little() -> None:
    """No root, no capability, nothing writable but its own folder."""
    found = service()
    assert found["User"] not in ("", "root")
    assert found["CapabilityBoundingSet"] == ""
    assert (found["ProtectSystem"], found["ProtectHome"], found["NoNewPrivileges"]) == ("strict", "yes", "yes")
    assert (found["StateDirectoryMode"], found["UMask"]) == ("0700", "0077")
    assert "ReadWritePaths" not in found


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_systemd_knows_every_key(tmp_path: Path) -> None:
    """`systemd-analyze verify` has nothing to say, but that this machine has no such program and user."""
    text = UNIT.read_text("utf-8").replace(service()["ExecStart"], "/bin/true")
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace("User=umbel", "User=root").replace("Group=umbel", "Group=root"), "utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
