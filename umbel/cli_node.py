"""`umbel node` and `umbel forget`: what runs on a device."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from umbel.commands import Format, FormatOption, PlainCommand, print_json

commands = typer.Typer()

SettingsArgument = Annotated[Path, typer.Argument(metavar="NODE.toml", help="The node's settings.")]


@commands.command(
    epilog="""\b
Examples:
  umbel node /etc/umbel/node.toml
  umbel node node.toml --once
It ends after SIGTERM, with the message at work answered. Exit code 6: the server does not accept the node's key.
UMBEL_LOG=json makes its log one JSON object a line.""",
    cls=PlainCommand,
)
def node(
    settings: SettingsArgument,
    *,
    once: Annotated[bool, typer.Option("--once", help="Answer what is waiting, then end.")] = False,
    poll: Annotated[
        float | None, typer.Option(min=0.01, max=3600, help="Seconds between questions for work.", show_default=False)
    ] = None,
    superlink: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Where the server is, in place of the settings'.")
    ] = None,
) -> None:
    """Be a node of a federation until told to end."""
    from client.node import run_node
    from common import logs

    logs.configure("text")
    run_node(settings, once=once, poll=poll, superlink=superlink)


@commands.command(
    epilog="""\b
Examples:
  umbel forget node.toml ann
  umbel forget node.toml ann --yes --format json
  umbel forget node.toml ann --enrol
It works while the node runs. Rows of the user in the data's source are yours to delete.""",
    cls=PlainCommand,
)
def forget(
    settings: SettingsArgument,
    user: Annotated[str, typer.Argument(metavar="USER", help="As the data name the user.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    enrol: Annotated[bool, typer.Option("--enrol", help="Take a forgotten user in again; nothing comes back.")] = False,
    output: FormatOption = Format.TEXT,
) -> None:
    """Erase what this device keeps of a user, who contributes nothing from then on."""
    from client.settings import load_settings
    from common.errors import UmbelError
    from umbel.node_state import open_store

    with open_store(load_settings(settings)) as store:
        if enrol:
            store.remember(user)
        else:
            if not yes and not sys.stdin.isatty():
                raise UmbelError("Expected a terminal to ask at, got none. Add --yes.")
            if not yes and not typer.confirm("Erase this user's model? It cannot be undone.", err=True):
                raise UmbelError("Expected yes, got no; nothing was erased.")
            store.forget(user)
    if output is Format.JSON:
        print_json({"user": user, "forgotten": not enrol})
    elif enrol:
        _say("Enrolled again, with the privacy filter as it was.")
    else:
        _say("Erased. The user's place and privacy filter stay; rows in the data's source are yours to delete.")


def _say(text: str) -> None:
    print(text, file=sys.stderr)  # noqa: T201
