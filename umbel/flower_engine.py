"""The same ServerApp and ClientApp under Flower's Simulation Engine on Ray, and the bundle that Flower ships.

Everything runs in a child process: with a neutral working directory, since Ray's actors would import `client`
from there first; in isolated mode, so that the apps come from their folder and from nowhere else; and in a
process group of its own, which is ended as a whole.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import click
from flwr.app.user_config import UserConfig
from flwr.cli.build import build_fab_from_disk, get_fab_filename
from flwr.cli.install import install_from_fab

from common import errors
from common.errors import Refused, UmbelError

OnLine = Callable[[dict[str, Any]], None]

CHECKOUT = Path(__file__).resolve().parents[1]

_PROGRAM = Path(__file__).with_name("flower_child.py")
_LONGEST_FOLDER = 36  # Ray's sockets lie some 70 characters below it, and the path of a socket has at most 107
# What would call home, count usage or fetch packages.
_QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


def run(
    app_dir: Path,
    num_nodes: int,
    run_config: UserConfig,
    env: Mapping[str, str] | None = None,
    *,
    log_file: Path,
    on_line: OnLine | None = None,
    cpus_per_client: float = 1,
) -> None:
    """Run a simulation to its end.

    Args:
        app_dir: A checkout or an installed bundle: a folder with a pyproject.toml and the apps that it names.
        num_nodes: Number of SuperNodes.
        run_config: Overrides of the configuration in pyproject.toml; Flower takes only keys that stand there.
        env: Environment variables for server and clients, such as `client.app.SETTINGS_VARIABLE`: Flower's simulation
            gives a node no configuration of its own but its partition.
        log_file: Where everything goes that server, Flower and Ray print.
        on_line: Called with each line of the server's standard output that is a JSON object.
        cpus_per_client: CPUs that Ray reserves for each client at work.

    Raises:
        UmbelError: If the ServerApp or the simulation failed; where the server raised one of our own errors,
            that error again.
    """
    if importlib.util.find_spec("ray") is None:
        raise UmbelError("Expected the package ray, found none. Install umbel[ray] or use the in-process engine.")
    app_dir = app_dir.resolve()
    if not (app_dir / "pyproject.toml").is_file():
        raise UmbelError(f"Expected a folder with a pyproject.toml, got app_dir={app_dir}. Build a bundle first.")
    with tempfile.TemporaryDirectory(prefix="umbel-", ignore_cleanup_errors=True) as folder:
        temporary = Path(folder)
        environment = _environment(env or {}, temporary)
        task = {
            "app_dir": str(app_dir),
            "num_nodes": num_nodes,
            "run_config": dict(run_config),
            "environment": dict(env or {}),
            "cpus_per_client": cpus_per_client,
            "ray": _ray_options(environment, temporary),
            "outcome": str(temporary / "outcome.json"),
        }
        (temporary / "neutral").mkdir()
        with log_file.open("ab") as log:
            status = _run_child(task, environment, temporary / "neutral", log, on_line)
        _check(temporary / "outcome.json", status, log_file)


def build_bundle(out_dir: Path, app_dir: Path = CHECKOUT) -> Path:
    """Build the Flower App Bundle of a checkout: for equal files the same bytes as `flwr build` makes.

    Unlike that command it does not mind what the checkout's folder is called.

    Returns:
        The path of the bundle, whose name ends in the first digits of its hash.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "GitWildMatchPattern", DeprecationWarning)  # Flower's, not ours
            content = build_fab_from_disk(app_dir)
    except (ValueError, click.ClickException) as error:
        raise UmbelError(f"Expected a Flower app, got app_dir={app_dir}. {error}") from error
    config = tomllib.loads((app_dir / "pyproject.toml").read_text("utf-8"))
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / get_fab_filename(config, hashlib.sha256(content).hexdigest())
    path.write_bytes(content)
    return path


def install_bundle(fab: Path, target_dir: Path) -> Path:
    """Check a bundle's hashes and unpack it into a folder of its own in `target_dir`.

    What is there under the same name is replaced: Flower itself would take it as it is, complete or not.

    Returns:
        The folder, an `app_dir` for `run`.
    """
    target_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target_dir, prefix=".install-") as fresh:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                installed = install_from_fab(fab, Path(fresh), skip_prompt=True)
        except (ValueError, OSError, zipfile.BadZipFile, click.ClickException) as error:
            raise UmbelError(f"Expected a Flower App Bundle, got fab={fab}. {error}") from error
        destination = target_dir / installed.name
        shutil.rmtree(destination, ignore_errors=True)
        return installed.rename(destination)


def _environment(env: Mapping[str, str], temporary: Path) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return {**inherited, **env, **_QUIET, "FLWR_HOME": str(temporary / "flwr")}


def _ray_options(environment: Mapping[str, str], temporary: Path) -> dict[str, Any]:
    # A cluster that is already there has its own folder, and a long path has no room for Ray's sockets.
    if "RAY_ADDRESS" in environment or len(str(temporary)) > _LONGEST_FOLDER:
        return {}
    return {"_temp_dir": str(temporary / "ray")}


def _run_child(
    task: Mapping[str, Any],
    environment: Mapping[str, str],
    working_dir: Path,
    log: BinaryIO,
    on_line: OnLine | None,
) -> int:
    child = subprocess.Popen(  # noqa: S603 - our own program in this interpreter
        [sys.executable, "-I", "-u", "-X", "utf8", str(_PROGRAM)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=working_dir,
        env=environment,
        start_new_session=True,
    )
    # A child that ended at once breaks the pipe; its log and status say why.
    with contextlib.suppress(BrokenPipeError), child:
        try:
            _talk(child, json.dumps(task).encode() + b"\n", log, on_line)
        finally:
            # Its group with all of Ray's processes; until the child is waited for, the number is its own.
            os.killpg(child.pid, signal.SIGKILL)
    return child.returncode


def _talk(child: subprocess.Popen[bytes], task: bytes, log: BinaryIO, on_line: OnLine | None) -> None:
    """Tell the child its task and listen until its output ends, as it does with the child."""
    child_input, output = cast("tuple[BinaryIO, BinaryIO]", (child.stdin, child.stdout))
    child_input.write(task)
    child_input.flush()
    for line in output:
        log.write(line)
        log.flush()
        if on_line is not None and (parsed := _json_object(line)) is not None:
            on_line(parsed)


def _json_object(line: bytes) -> dict[str, Any] | None:
    try:
        parsed = json.loads(line)
    except ValueError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _check(outcome_file: Path, status: int, log_file: Path) -> None:
    """Raise what the outcome says, or that there is none."""
    try:
        outcome = json.loads(outcome_file.read_text("utf-8"))
    except (OSError, ValueError):
        raise UmbelError(f"Expected a simulation that ends by itself, got status={status}. See {log_file}.") from None
    name, message = outcome["error"], outcome.get("message")
    if name is None:
        return
    if message is None:
        raise UmbelError(f"Expected a simulation without errors, got {name}. See {log_file}.")
    kind = getattr(errors, name, UmbelError)
    raise kind(outcome["code"], message) if issubclass(kind, Refused) else kind(message)
