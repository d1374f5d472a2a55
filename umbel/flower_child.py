"""The program of the child process in which Flower's Simulation Engine runs; `flower_engine` starts it.

It is started by its path in Python's isolated mode and imports nothing of ours, so that `server`, `client`,
`common` and `privacy` can only come from the folder of the app. What to do comes as one line of JSON on
standard input, which then stays open for as long as the parent lives. How it ended goes to a file, since
Flower tells only part of it.
"""

import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp.client_app import LoadClientAppError
from flwr.common.config import get_fused_config_from_dir, get_project_config
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.server_app import LoadServerAppError
from flwr.simulation.run_simulation import _run_simulation
from flwr.supercore.constant import NOOP_FEDERATION_ID
from flwr.supercore.logger import update_console_handler
from flwr.supercore.object_ref import load_app
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.supercore.telemetry import EventType


class WatchedServerApp(ServerApp):
    """A ServerApp that finds all its nodes there, and whether it has finished.

    Flower starts it while nodes are still being registered, and does not notice one that just exits.
    """

    def __init__(self, app: ServerApp, num_nodes: int) -> None:
        super().__init__()
        self.app = app
        self.num_nodes = num_nodes
        self.finished = False

    def __call__(self, grid: Grid, context: Context) -> None:
        """Run the app, once."""
        while len(list(grid.get_node_ids())) < self.num_nodes:
            time.sleep(0.05)
        self.app(grid=grid, context=context)
        self.finished = True


class NamedClientApp:
    """A ClientApp that each Ray actor loads by name from the app's folder, whatever else there is to find."""

    def __init__(self, reference: str, app_dir: str, environment: dict[str, str]) -> None:
        self.reference = reference
        self.app_dir = app_dir
        self.environment = environment

    def __call__(self, message: Message, context: Context) -> Message:
        """Let the app answer; of an exception only the type leaves the node, its text can hold data."""
        os.environ.update(self.environment)
        app = load(self.reference, self.app_dir, LoadClientAppError)
        try:
            reply: Message = app(message=message, context=context)
        except Exception as error:  # caught here, or Flower would send the text and Ray the traceback
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, type(error).__name__), reply_to=message)
        return reply


def load(reference: str, app_dir: str, error_type: type[Exception]) -> Any:
    """Load an app by its name as Flower does, and make sure that it is the one in `app_dir`."""
    sys.path[:] = [app_dir, *(entry for entry in sys.path if entry != app_dir)]
    app = load_app(reference, error_type, app_dir)
    found = sys.modules[reference.partition(":")[0]].__file__
    if found is None or not Path(found).resolve().is_relative_to(Path(app_dir).resolve()):
        raise error_type(f"Expected {reference} from {app_dir}, got it from {found}.")
    return app


def simulate(task: dict[str, Any]) -> None:
    """Run the ServerApp of `task["app_dir"]` to its end; raise what it has raised."""
    app_dir = task["app_dir"]
    names = get_project_config(app_dir)["tool"]["flwr"]["app"]["components"]
    run = Run.create_empty(run_id=secrets.randbits(62) + 1)
    run.primary_task_id = 1
    run.federation_id = NOOP_FEDERATION_ID
    run.override_config = task["run_config"]
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, run.run_id, SUPERLINK_NODE_ID
    context = Context(
        run_id=run.run_id,
        node_id=SUPERLINK_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=get_fused_config_from_dir(Path(app_dir), run.override_config),
    )
    server_app = WatchedServerApp(load(names["serverapp"], app_dir, LoadServerAppError), task["num_nodes"])
    load(names["clientapp"], app_dir, LoadClientAppError)  # one that cannot be loaded fails here, once
    # What `flwr-simulation` calls. The public `run_simulation` is deprecated and takes no run
    # configuration; `flwr run` leaves a SuperLink behind and exits with 0 whatever happened.
    _run_simulation(
        num_supernodes=task["num_nodes"],
        server_app=server_app,
        client_app=NamedClientApp(names["clientapp"], app_dir, task["environment"]),  # type: ignore[arg-type]
        backend_config={
            "client_resources": {"num_cpus": task["cpus_per_client"], "num_gpus": 0.0},
            "init_args": task["ray"],
        },
        app_dir=app_dir,
        is_app=True,
        run=run,
        server_app_context=context,
        exit_event=EventType.PYTHON_API_RUN_SIMULATION_LEAVE,
    )
    if not server_app.finished:
        raise RuntimeError("Expected the ServerApp to finish, got a simulation that ended without it.")


class RoundLines(logging.Handler):
    """Passes the server's log of rounds on to the parent, one JSON object a line on standard output."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record's name and numbers."""
        sys.stdout.write(json.dumps({record.getMessage(): getattr(record, record.getMessage(), {})}) + "\n")
        sys.stdout.flush()


def described(error: BaseException) -> dict[str, Any]:
    """What the parent is told: the type, and the text where it is one of our own errors."""
    ours = type(error).__module__ == "common.errors"
    return {
        "error": type(error).__name__,
        "message": str(error) if ours else None,
        "code": getattr(error, "code", None) if ours else None,
    }


def end_with_parent() -> None:
    """End this process and all of Ray's as soon as the parent is gone and standard input ends."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Read the task, do it, write how it ended."""
    task = json.loads(sys.stdin.readline())
    threading.Thread(target=end_with_parent, daemon=True).start()
    update_console_handler(timestamps=True, colored=False)
    rounds = logging.getLogger("umbel.rounds")
    rounds.setLevel(logging.INFO)
    rounds.addHandler(RoundLines())
    outcome: dict[str, Any] = {"error": None}
    try:
        simulate(task)
    except BaseException as error:
        traceback.print_exc()
        outcome = described(error)
    Path(task["outcome"]).write_text(json.dumps(outcome), "utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if outcome["error"] is None else 1)  # a ServerApp's thread may still wait for replies


if __name__ == "__main__":
    main()
