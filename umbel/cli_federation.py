"""`umbel up`, `down`, `status` and `train`: a federation as processes on this machine, and runs on it."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from common.errors import UmbelError
from umbel.commands import Format, FormatOption, PlainCommand, print_json

commands = typer.Typer()

FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="Made by `umbel provision`.")]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress; warnings and results stay.")]


class NotFollowedError(UmbelError):
    """Ctrl-C; the message says how to go on."""

    exit_code: ClassVar[int] = 130


@commands.command(
    epilog="""\b
Examples:
  umbel up fed
  umbel up fed --stock
It starts SuperLink, the executor of ServerApps, the proxy, the metrics page and all nodes, on loopback, and ends when
they work together. What runs already is left alone, so that it can be run again; logs are in DIR/var/logs.""",
    cls=PlainCommand,
)
def up(
    folder: FolderArgument,
    *,
    stock: Annotated[
        bool, typer.Option("--stock", help="Flower's own SuperNodes, which run the code that the server sends.")
    ] = False,
    quiet: QuietOption = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Start a federation on this machine."""
    from umbel.deploy import Federation

    federation = Federation(folder)
    with _watching(quiet) as watcher:
        started = federation.up(watcher, stock=stock)
    document = {
        "started": started,
        "nodes": list(federation.deployment.nodes.names),
        "superlink": federation.superlink,
        "fleet": f"localhost:{federation.deployment.ports.fleet}",
        "metrics": f"http://127.0.0.1:{federation.deployment.ports.metrics}/metrics",
        "logs": str(federation.logs),
    }
    if output is Format.JSON:
        print_json(document)
        return
    _say(f"started {', '.join(started)}" if started else "all of it runs already")
    _say(f"{len(document['nodes'])} nodes online; devices reach {document['fleet']}, metrics {document['metrics']}")
    _say(f"next: umbel train {folder}")


@commands.command(epilog="Example: umbel down fed", cls=PlainCommand)
def down(folder: FolderArgument, *, quiet: QuietOption = False, output: FormatOption = Format.TEXT) -> None:
    """End the processes of a federation. After the next `up`, `umbel train --resume` goes on with a run."""
    from umbel.deploy import Federation

    federation = Federation(folder)
    interrupted = federation.server_app_runs() is True
    with _watching(quiet) as watcher:
        ended = federation.down(watcher)
    if output is Format.JSON:
        print_json({"ended": ended, "run_interrupted": interrupted})
        return
    _say(f"ended {', '.join(ended)}" if ended else "nothing runs")
    if interrupted:
        _say(f"a run was at work; after `umbel up` go on with: umbel train {folder} --resume NAME")


@commands.command(epilog="Example: umbel status fed --format json", cls=PlainCommand)
def status(folder: FolderArgument, *, output: FormatOption = Format.TEXT) -> None:
    """Show processes, nodes, the last run, the budget left and when certificates end."""
    from umbel.federation_status import show_status, status_of

    document = status_of(folder)
    if output is Format.JSON:
        print_json(document)
    else:
        show_status(document)


@commands.command(
    epilog="""\b
Examples:
  umbel train fed --config run.toml
  umbel train fed --epsilon 2 --rounds 20 --name second
  umbel train fed --resume second
It ends as the run does, with the run's exit code. Ctrl-C only stops following: the run goes on, and --resume NAME
follows it again. --resume also goes on with a run whose ServerApp was ended.""",
    cls=PlainCommand,
)
def train(
    folder: FolderArgument,
    *,
    config: Annotated[Path | None, typer.Option(help="TOML file; options override it.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the new run; by default the time.")] = None,
    resume: Annotated[str | None, typer.Option(metavar="NAME", help="Follow, or go on with, this run.")] = None,
    family: Annotated[str | None, typer.Option(help="Loss: squared or logistic.")] = None,
    rank: Annotated[int | None, typer.Option(help="Columns of U.")] = None,
    sparsity: Annotated[int | None, typer.Option(help="Cap on the nonzeros of a user's own part.")] = None,
    rounds: Annotated[int | None, typer.Option(help="How many releases.")] = None,
    algorithm: Annotated[str | None, typer.Option(help="gradient, or amht-lrs.")] = None,
    start: Annotated[
        Path | None, typer.Option(metavar="RUN|MODEL", help="Start from the model of an earlier run on the ledger.")
    ] = None,
    epsilon: Annotated[str | None, typer.Option(help="What the run may spend of the population's budget.")] = None,
    sampling_probability: Annotated[
        str | None, typer.Option(help="Each device tosses a coin in each round; on a ledger of its own.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any key, as in training.round_timeout=60.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Submit the run, and do not follow it.")] = False,
    quiet: QuietOption = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Train with the nodes of a federation."""
    from umbel.options import configuration

    given = {
        "model.family": family,
        "model.rank": rank,
        "model.sparsity": sparsity,
        "training.rounds": rounds,
        "training.algorithm": algorithm,
        "training.start": start,
        "privacy.epsilon": epsilon,
        "privacy.sampling_probability": sampling_probability,
    }
    if resume is not None and (name or config or set_ or detach or any(value is not None for value in given.values())):
        raise UmbelError("Expected --resume alone, to go on with a run as it was started, got more. Leave it out.")
    loaded = None if resume is not None else configuration(given, pairs=set_ or (), file=config, resume=None)
    _train(folder, loaded, name=resume or name, detach=detach, quiet=quiet, output=output)


def _train(folder: Path, config: Any, *, name: str | None, detach: bool, quiet: bool, output: Format) -> None:
    run: str | None = None
    try:
        with _watching(quiet) as watcher:
            watcher.step("starting")
            from umbel import submit
            from umbel.deploy import Federation

            federation = Federation(folder)
            if config is None:
                settings = submit.resumed(federation, str(name))
            else:
                settings = submit.lay_out(federation, config, name or submit.default_name(), watcher)
            run = settings.folder.root.name
            if detach:
                submission = submit.submit(federation, settings)
                document: dict[str, Any] = {
                    "run": str(settings.folder.root),
                    "name": run,
                    "flower_run_id": submission.flower_run_id,
                    "bundle": submission.bundle,
                }
            else:
                document = submit.train(federation, settings, watcher)
    except KeyboardInterrupt:
        way_back = f"follow it again with: umbel train {folder} --resume {run}" if run else "Nothing was submitted."
        raise NotFollowedError(f"no longer following; the run goes on, {way_back}" if run else way_back) from None
    if output is Format.JSON:
        print_json(document)
    elif detach:
        _say(f"run {run} is at work; follow it with: umbel train {folder} --resume {run}")
    else:
        from umbel.federation_status import show_run

        show_run(document)


@contextlib.contextmanager
def _watching(quiet: bool) -> Iterator[Any]:
    """Progress on stderr; nothing of Flower's on stdout."""
    from umbel import console

    with console.watching(quiet=quiet) as watcher, contextlib.redirect_stdout(sys.stderr):
        yield watcher


def _say(message: str) -> None:
    print(message)  # noqa: T201 (the command line's voice)
